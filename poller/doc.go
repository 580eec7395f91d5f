// Package poller runs the loops of the data path. A Loop is one goroutine that is
// locked to one OS thread and has one io_uring. It serves a front-end queue, the queue
// pairs behind it and their buffers to completion, and sleeps in one place. The package
// also defines the queue classes (read, default, poll), and the pure functions Split
// and Map, which distribute the queues that a target granted over classes and loops.
//
// The package defines Source, Watcher and Handler. It does not know NVMe, RDMA or ublk.
//
// # One pass
//
// A pass dispatches the completions of the ring, then polls each Source once, in the
// order in which they were attached, and then runs calls. If it found something,
// another pass follows. What a pass leaves in the submission queue is submitted after
// one more pass, or when a quarter of the queue is filled, or when completions wait for
// an enter.
//
// A pass that found nothing arms the sources (Source.Arm) and polls them a last time.
// If all of them agree to sleep, it enters the kernel once, to submit what is pending
// and to wait. The wait is a raw system call of at most 2 ms. It keeps the scheduler's
// P, so that the scheduler is not involved while there is traffic. When it expires, one
// ordinary blocking call gives the P back, so an idle loop costs nothing.
//
// # Spinning
//
// A source whose work makes no event, such as a completion queue without a channel,
// returns true from Spin while it expects completions. The loop then polls on in shared
// memory Config.Spin times, and after that at intervals of 50 to 200 µs, so that a dead
// target does not burn a CPU. A source that could sleep but expects an answer soon can
// implement Flight. The loop then polls it as often before it arms it, as long as such
// spins usually find something. No source in this module implements Flight.
//
// A provider without hardware needs a thread that takes its packets. On a loop, the
// loop does that: it waits for the socket in the same enter (WatchReadable), and no
// goroutine has to be scheduled before it continues.
//
// # Concurrency
//
// The methods of Loop say whether they must be called from the loop's own goroutine
// ("loop") or may be called from any other ("any"). The methods of Source, Watcher and
// Handler are called on the loop.
//
// Wake and the sleep use Dekker's handshake. The loop sets asleep and then polls; the
// waker publishes its work and then reads asleep. So at least one of them sees the
// other. The eventfd is written only if asleep was set, by the goroutine that clears
// it.
//
// # Hazards
//
//  1. Code on the loop must not block, allocate memory, or end the goroutine. The end
//     of the thread cancels every pending io_uring command of it, and so kills the
//     block device.
//  2. Call deadlocks if it is called on the loop itself. Call the function directly
//     there.
//  3. A loop with traffic keeps its P. GOMAXPROCS must be at least the number of loops
//     plus 2, or other goroutines have to wait until a loop pauses.
//  4. Stop waits for the last Unhandle.
package poller
