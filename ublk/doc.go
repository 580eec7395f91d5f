// Package ublk serves a block.Device as /dev/ublkbN, through the Linux driver
// ublk_drv (drivers/block/ublk_drv.c, include/uapi/linux/ublk_cmd.h). It needs
// Linux 6.5 and CAP_SYS_ADMIN.
//
// Start adds a device, Device.Stop ends it. List, Get and Remove are about the
// devices of the host, whoever serves them.
//
// # Data path
//
// Each hardware queue of the device belongs to one poller.Loop. Its requests
// come as completions of that loop's ring; those of one pass go to the back
// end in one block.Queue.Submit, and what block.Queue.Reap returns goes back as
// commands that commit a result and fetch the tag's next request, in the loop's
// next io_uring_enter. The driver copies the data between the request's pages
// and the back end's buffer of the tag, on the loop's thread: the data of a
// write is in the buffer when its request comes, and that of a read is taken
// when its result is committed.
//
// # Concurrency
//
// Start, the methods of Device and the functions may be called from any
// goroutine but the loops'. A queue's descriptors, counters and block.Queue are
// used on its loop only. The kernel binds the tags of a queue to the thread that
// fetched them, so a queue never changes its loop.
//
// Control commands go through a ring of their own, where the kernel carries them
// out in threads of its own, and end with the caller's context at the latest.
//
// # Hazards
//
// Each is held by a test, or by the type system, where that is possible.
//
//  1. A request is done in its whole length, or with an error. Linux 7.3 takes a
//     short count of a write for success. (TestRequests)
//  2. EAGAIN is never committed: io_uring clients try again for ever. It becomes
//     EIO. (TestNeverEAGAIN, TestErrnos)
//  3. A device that we did not add is never deleted: not when ADD_DEV says that
//     the number is taken, and not when our device was deleted by somebody else
//     and its number given out again. A device is told by a cookie, which the
//     driver keeps. (TestIDTaken, TestNumberReused)
//  4. The descriptors of queue q are mapped at q times the size of 4096 of them,
//     whatever the depth is. With any other offset queue 1 reads the requests of
//     queue 0. (TestDataPerQueue)
//  5. ADD_DEV may grant less than was asked for: queues, buffer size, flags. What
//     it granted counts. (TestStartStop)
//  6. START_DEV waits until all tags of all queues are fetched, and in Linux 6 for
//     the reads of a partition scan: the loops run before it is sent.
//     (TestStuckStart)
//  7. A tag that comes back with ENODEV is not fetched again. Requests that the
//     back end still has are committed with the only command there is, whose
//     fetch the driver ends as well. (TestEnd)
//  8. DEL_DEV waits for every reference to ublkcN: the descriptor, the mappings,
//     pending commands, and the block device's openers. The order is: STOP_DEV,
//     all tags back, unmap, close ublkcN, DEL_DEV; openers are not waited for
//     longer than a second. (TestCycles, TestForce)
//  9. No file may be fixed on a ring that other devices use: before Linux 6.13 the
//     reference of a removed one lives as long as any command of the ring that was
//     pending then and used a fixed file, and a FETCH of an idle device is pending
//     for ever. Commands name ublkcN by its descriptor.
//  10. No descriptor is inherited by a child, which would keep the device alive.
//     (TestCloseOnExec)
//  11. The end of a loop's thread is the end of the device. In Linux 7 the
//     requests that this thread had taken hang, and Stop with them, until the
//     threads of the other loops end, too: whoever loses a loop ends the process.
//     (TestDeadLoop)
//  12. A request may be committed only when nobody can write to its buffer any
//     more: a target that is late would write into the tag's next request. That is
//     the back end's to know, so Stop waits for what is in flight, and a back end
//     that has lost its target fails its requests when that is safe.
//     (TestStuckBackEnd)
//  13. The driver sets no time limit to requests. (The back end does.)
package ublk
