// Package ublk serves a block.Device as /dev/ublkbN through the Linux driver ublk_drv
// (drivers/block/ublk_drv.c, include/uapi/linux/ublk_cmd.h). It needs Linux 6.5 and
// CAP_SYS_ADMIN.
//
// Start adds a device, and Device.Stop ends it. List, Get and Remove concern the devices
// of the host, whichever process serves them.
//
// # Data path
//
// Each hardware queue of the device belongs to one poller.Loop. Its requests arrive as
// completions of that loop's ring, and those of one pass go to the back end in one
// block.Queue.Submit. What block.Queue.Reap returns becomes commands that commit a
// result and fetch the next request of the tag, in the loop's next io_uring_enter. The
// driver copies the data between the pages of the request and the back end's buffer of
// the tag, on the thread of the loop. The data of a write is in the buffer when the
// request arrives, and the data of a read is taken when its result is committed.
//
// With Config.ShareMemory, users can share memory with the driver and the back end (Device.Share).
// Requests from contiguous parts of it name the back end's region (block.Region) and an offset,
// and the driver does not copy. The driver does not tell of requests in several parts of it, and
// copies their data.
//
// # Concurrency
//
// Start, the methods of Device and the functions may be called from any goroutine except
// those of the loops. The descriptors, counters and block.Queue of a queue are used on
// its loop only. The kernel binds the tags of a queue to the thread that fetched them,
// so a queue never changes its loop.
//
// Control commands go through a ring of their own. The kernel executes them in its own
// threads, and they end with the context of the caller at the latest.
//
// # Hazards
//
// A test or the type system covers each of them where that is possible.
//
//  1. A request is completed in its whole length, or with an error. Linux 7.3 takes a
//     short count of a write for success. (TestRequests)
//  2. EAGAIN is never committed, because io_uring clients would try again forever. It
//     becomes EIO. (TestNeverEAGAIN, TestErrnos)
//  3. A device that we did not add is never deleted: not if ADD_DEV says that the number
//     is taken, and not if our device was deleted from outside and its number was
//     assigned again. A device is recognized by a cookie that the driver keeps.
//     (TestIDTaken, TestNumberReused)
//  4. The descriptors of queue q are mapped at q times the size of 4096 descriptors,
//     whatever the depth is. With any other offset queue 1 would read the requests of
//     queue 0. (TestDataPerQueue)
//  5. ADD_DEV may grant fewer queues, a smaller buffer size or fewer flags than it was
//     asked for. Only what it granted counts. (TestStartStop)
//  6. START_DEV waits until all tags of all queues are fetched, and in Linux 6 for the
//     reads of a partition scan. So the loops run before it is sent. (TestStuckStart)
//  7. A tag that returns with ENODEV is not fetched again. Requests that the back end
//     still holds are committed by the only command that exists, and the driver ends the
//     fetch that this command contains. (TestEnd)
//  8. DEL_DEV waits for every reference to ublkcN: the descriptor, the mappings, pending
//     commands, and the openers of the block device. The order is STOP_DEV, all tags
//     returned, unmap, close ublkcN, DEL_DEV. Openers are waited for at most a second.
//     (TestCycles, TestForce)
//  9. No file may be fixed on a ring that other devices use. Before Linux 6.13, the
//     reference to a removed file lives as long as any command of the ring that was
//     pending then and used a fixed file, and a FETCH of an idle device is pending
//     forever. Commands name ublkcN by its descriptor.
//  10. A child process inherits no descriptor, because it would keep the device alive.
//     (TestCloseOnExec)
//  11. The end of a loop's thread is the end of the device. In Linux 7 the requests that
//     this thread had taken hang, and Stop with them, until the threads of the other
//     loops end as well. A process that loses a loop must end. (TestDeadLoop)
//  12. A request may be committed only when nobody can write to its buffer any more,
//     because a late target would write into the next request of the tag. Only the back
//     end can know that. So Stop waits for what is in flight, and a back end that has
//     lost its target fails its requests when that is safe. (TestStuckBackEnd)
//  13. The driver sets no time limit for requests. The back end does.
package ublk
