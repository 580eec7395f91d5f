package poller

// Readiness is a Source's answer to Arm.
type Readiness uint8

// Answers to Arm. The zero value is no answer and is taken as Busy.
const (
	Unset Readiness = iota
	// Sleep: nothing is pending, and an event (a Watcher's, a Handler's or a
	// Wake) will come when something is.
	Sleep
	// Busy: something arrived meanwhile; poll before sleeping.
	Busy
	// Spin: something is in flight that makes no event; keep polling.
	Spin
)

// Source is a piece of work that a Loop serves.
type Source interface {
	// Poll does what is pending, without blocking, and says how many things
	// it did; 0 lets the loop think of sleeping.
	Poll() int
	// Arm is asked before the loop sleeps. It requests events for whatever may
	// arrive from now on. The loop polls every source once more between Arm
	// and its sleep, so a source need not look again by itself.
	Arm() Readiness
}

// Flight is a Source that knows what it waits for. While InFlight is true, the
// loop may poll for a bounded time before it arms the sources: where an answer
// usually comes soon, that saves the event, the sleep and the wake-up.
//
// No source of this project implements it. Whether the spin pays with
// interrupt-driven queues has not been measured; the interface is here for that
// measurement, which decides whether it stays.
type Flight interface {
	Source
	// InFlight says that an answer is due, as of a completion queue whose
	// queue pairs have commands outstanding.
	InFlight() bool
}

// Watcher hears of a file descriptor: n events of 8 bytes each were read from
// it (an RDMA completion channel, an eventfd).
type Watcher interface {
	Event(n int)
}

// Failer is a Watcher that wants to know when its file can no longer be read,
// as when an RDMA device goes away (EIO). No event follows.
type Failer interface {
	Watcher
	Failed(err error)
}

// Handler takes the completions of the submission queue entries that it put
// into the loop's ring with the user data base of Loop.Handle.
type Handler interface {
	// Complete gets the low 48 bits of the user data and the result.
	Complete(data uint64, res int32, flags uint32)
}
