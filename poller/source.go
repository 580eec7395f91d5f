package poller

// Readiness is a Source's answer to Arm.
type Readiness uint8

// Answers to Arm. The zero value is no answer and counts as Busy.
const (
	Unset Readiness = iota
	// Sleep means that nothing is pending, and that an event (of a Watcher, of a
	// Handler or by Wake) will follow when something is.
	Sleep
	// Busy means that something has arrived, so the loop must poll before it sleeps.
	Busy
	// Spin means that something is in flight that causes no event, so the loop must
	// keep polling.
	Spin
)

// Source is a source of work that a Loop serves.
type Source interface {
	// Poll does the pending work without blocking, and returns the number of things
	// done. If it returns 0, the loop may sleep.
	Poll() int
	// Arm is called before the loop sleeps. It requests events for everything that
	// may arrive from now on. The loop polls every source once more between Arm and
	// its sleep, so a source need not look again by itself.
	Arm() Readiness
}

// Flusher is a Source that collects what other sources hand to it while they are polled,
// and posts all of it in one call. The order in which the sources were attached does not
// matter then: what one source hands to another is posted in the same pass.
type Flusher interface {
	Source
	// Flush is called after every source was polled. It posts what was collected,
	// without blocking, and returns the number of things posted.
	Flush() int
}

// Flight is a Source that knows what it waits for. While InFlight is true, the loop polls for a
// short time before it arms the sources, as long as such spins usually find work. This saves
// the event, the sleep and the wake-up. It pays if a poll brings the answer about, as with
// rdma/roce, whose packets nobody else takes, and if a caller of package disk sends one request
// after the other. With an adapter that interrupts it only delays whoever shares the CPU.
type Flight interface {
	Source
	// InFlight reports whether work is due.
	InFlight() bool
}

// Watcher gets the events of a file descriptor (an RDMA completion channel, an eventfd).
// Event is called after n events of 8 bytes each were read from it.
type Watcher interface {
	Event(n int)
}

// Failer is a Watcher that is told when its file can no longer be read, for example
// because an RDMA device was removed (EIO). No event follows.
type Failer interface {
	Watcher
	Failed(err error)
}

// Handler handles the completions of the submission queue entries that it has put into
// the loop's ring with the user data base of Loop.Handle.
type Handler interface {
	// Complete gets the low 48 bits of the user data, and the result and flags of the
	// completion.
	Complete(data uint64, res int32, flags uint32)
}

// Looper is a back end that has loops of its own, such as a namespace of the initiator.
// Loops[i] uses queue i of its device. Front ends serve on these loops unless they are given
// others. Any goroutine may call Loops.
type Looper interface {
	Loops() []*Loop
}
