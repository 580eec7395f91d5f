// Package poller runs the loops of the data path: a Loop is one goroutine
// locked to one OS thread with one io_uring, which serves a front-end queue,
// the queue pairs behind it and their buffers, to completion, and sleeps in one
// place. It also holds the queue classes (read, default, poll) and the pure
// function Assign, which spreads what a target granted over the loops.
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
// A source whose work makes no event (a completion queue without a channel)
// answers Spin while it expects some. The loop then polls on in shared memory,
// Config.Spin times, and after that at intervals of 50 to 200 µs, so that a dead
// target does not burn a CPU. A source that could sleep but expects an answer
// soon (Flight, which no source implements so far) is polled as often before the
// loop arms it, as long as such spins usually find something.
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
//  1. Nothing on the loop may block, allocate, or leave the goroutine: the end
//     of the thread cancels every io_uring command that it has pending, and so
//     kills the block device.
//  2. Call from the loop itself deadlocks; on the loop, just do it.
//  3. A loop with traffic keeps its P. GOMAXPROCS is to be at least the number
//     of loops and 2, or other goroutines wait for a loop's pauses.
//  4. Stop waits for the last Unhandle. Sources need not be detached: they are
//     not called any more. After the end, every method returns an error or does
//     nothing.
package poller
