// Package poller runs the loops of the data path: a Loop is one goroutine
// locked to one OS thread with one io_uring, which serves a front-end queue,
// the queue pairs behind it and their buffers, to completion, and sleeps in one
// place. It also holds the queue classes (read, default, poll) and the pure
// functions Split and Map that spread what a target granted over the loops.
//
// The package knows Source, Watcher and Handler; it knows nothing of NVMe,
// RDMA or ublk.
//
// # One pass
//
// Step dispatches the ring's completions, then polls each Source once, in the
// order in which they were attached. A pass that found something is followed
// by another. A pass that found nothing arms the sources (Source.Arm) and, if
// all agree to sleep, enters the kernel once: to submit what is pending and to
// wait. The wait is a raw system call bounded to 2 ms, which keeps the
// scheduler's P and costs no scheduler contact while traffic flows; when that
// expires, one ordinary blocking call gives the P back, so an idle loop costs
// nothing.
//
// # Concurrency
//
// Methods of Loop say whether they may be called from the loop's own goroutine
// only ("loop") or from any other ("any"). Source, Watcher and Handler methods
// are called on the loop.
//
// # Hazards
//
//  1. Nothing on the loop may block, allocate, or leave the goroutine: the end
//     of the thread cancels every io_uring command that it has pending, and so
//     kills the block device.
//  2. Call from the loop itself deadlocks; on the loop, just do it.
package poller
