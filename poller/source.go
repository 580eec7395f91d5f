package poller

// Readiness is a Source's answer to Arm.
type Readiness uint8

// Answers to Arm. The zero value is no answer and is taken as Again.
const (
	Unset Readiness = iota
	// Sleep: nothing is pending, and an event (a Watcher's, a Handler's or a
	// Wake) will come when something is.
	Sleep
	// Again: something arrived meanwhile; poll before sleeping.
	Again
	// Spin: something is in flight that makes no event; keep polling.
	Spin
)

// Source is a piece of work that a Loop serves.
type Source interface {
	// Poll does what is pending, without blocking, and says how many things
	// it did; 0 lets the loop think of sleeping.
	Poll() int
	// Arm is asked before the loop sleeps. It requests events for whatever may
	// arrive from now on.
	Arm() Readiness
}

// Watcher hears of a file descriptor: n events of 8 bytes each were read from
// it (an RDMA completion channel, an eventfd).
type Watcher interface {
	Event(n int)
}

// Handler takes the completions of the submission queue entries that it put
// into the loop's ring with the user data base of Loop.Handle.
type Handler interface {
	// Complete gets the low 48 bits of the user data and the result.
	Complete(data uint64, res int32, flags uint32)
}
