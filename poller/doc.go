// Package poller runs the loops of the data path: a Loop is one goroutine
// locked to one OS thread with one io_uring, which serves a front-end queue,
// the queue pairs behind it and their buffers, to completion, and sleeps in one
// place. It also holds the queue classes (read, default, poll) and the pure
// function Assign, which spreads what a target granted over the loops.
//
// The package knows Source, Watcher and Handler; it knows nothing of NVMe,
// RDMA or ublk.
//
// # One pass
//
// A pass dispatches the ring's completions, then polls each Source once, in the
// order in which they were attached, then runs calls. A pass that found
// something is followed by another; what it left in the submission queue is
// submitted after one more pass, or when a quarter of the queue is filled, or
// when completions wait for an enter.
//
// A pass that found nothing arms the sources (Source.Arm), polls them a last
// time and, if all agree to sleep, enters the kernel once: to submit what is
// pending and to wait. The wait is a raw system call bounded to 2 ms, which
// keeps the scheduler's P and costs no scheduler contact while traffic flows;
// when that expires, one ordinary blocking call gives the P back, so an idle
// loop costs nothing.
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
// A provider without hardware needs a thread to take its packets. On a loop,
// that is the loop: it waits for the socket in the same enter (WatchReadable),
// and no goroutine has to be scheduled before it goes on.
//
// # Concurrency
//
// Methods of Loop say whether they may be called from the loop's own goroutine
// only ("loop") or from any other ("any"). Source, Watcher and Handler methods
// are called on the loop.
//
// Wake and the sleep are Dekker's handshake: the loop sets asleep and then
// polls, the waker publishes and then reads asleep, so one sees the other. The
// eventfd is written only if asleep was set, by the one who clears it.
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
