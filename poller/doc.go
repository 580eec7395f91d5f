// Package poller runs the loops of the data path. A Loop is one goroutine, locked to one
// OS thread, with one io_uring. It serves a front-end queue, the queue pairs behind it and
// their buffers to completion, and sleeps in one place. The package also defines the queue
// classes (read, default, poll) and the pure function Assign, which distributes the queues
// that a target granted over the loops.
//
// The package defines the interfaces Source, Watcher and Handler. It does not depend on
// NVMe, RDMA or ublk.
//
// # One pass
//
// A pass dispatches the completions of the ring, then polls each Source once, in the
// order in which they were attached, and then runs calls. If it found work, another pass
// follows. Entries that a pass leaves in the submission queue are submitted after one more
// pass, when a quarter of the queue is full, or when completions wait for an enter.
//
// A pass that found no work arms the sources (Source.Arm) and polls them a last time. If
// all of them agree to sleep, it enters the kernel once, to submit pending entries and to
// wait. The wait is a raw system call of at most 2 ms. It keeps the scheduler's P, so the
// scheduler is not involved while there is traffic. When the wait expires, one ordinary
// blocking call gives the P back, so an idle loop costs nothing.
//
// # Spinning
//
// A source whose work causes no event (a completion queue without a channel) returns Spin
// while it expects work. The loop then continues to poll in shared memory, Config.Spin
// times, and after that at intervals of 50 to 200 µs, so that a dead target does not burn a
// CPU. A source that could sleep but expects work soon (Flight) is polled up to 64 times
// before the loop arms it, as long as such spins usually find work.
//
// A provider without hardware needs a thread that takes its packets. A loop can do that
// for its own queue pairs: it waits for the socket in the same enter (WatchReadable), and
// continues without the scheduling of another goroutine.
//
// # Concurrency
//
// The documentation of each method of Loop says whether the method must be called on the
// loop's own goroutine ("loop") or may be called from any other ("any"). The loop calls
// the methods of Source, Watcher and Handler on its own goroutine.
//
// Wake and sleep use Dekker's handshake. The loop sets asleep and then polls. The waker
// publishes its work and then reads asleep. So at least one of them sees the other. The
// goroutine that clears asleep writes the eventfd, so it is written only if asleep was
// set.
//
// # Hazards
//
//  1. Code on the loop must not block, allocate, or leave the goroutine. The end of the
//     thread cancels all its pending io_uring commands, and so kills the block device.
//  2. Call deadlocks on the loop itself. Run the function directly there.
//  3. A loop with traffic keeps its P. GOMAXPROCS must be at least the number of loops
//     plus 2, or other goroutines wait until a loop pauses.
//  4. Stop waits for the last Unhandle. Sources need not be detached; the loop does not
//     call them any more. After the end, every method returns an error or does nothing.
package poller
