// Package vhost serves a block device to a virtual machine monitor with the vhost-user
// protocol, as the back end of a virtio-blk device. The specifications are
// docs/interop/vhost-user.rst of QEMU and virtio 1.2, sections 2.7 (split rings) and 5.2
// (block device).
//
// The package implements several rings, tables of descriptors (INDIRECT_DESC), event
// indices, reads, writes, flushes, discards, write zeroes, and the protocol features MQ,
// LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE and
// CONFIGURE_MEM_SLOTS. It does not implement packed rings, an IOMMU, postcopy and the
// change of the cache mode.
//
// # Data path
//
// A Server has a block.Queue on each loop. Ring i belongs to loop i mod the number of
// loops, and the rings of a loop share the tags of its queue. The eventfd of a kick wakes
// the loop. In each pass, the loop looks at the indices of its rings, takes requests as long
// as there are tags, copies the data of writes from the guest to the buffers of the tags,
// and passes all of them to the back end in one block.Queue.Submit. When it reaps results,
// it copies the data of reads to the guest. At the end of the pass it publishes the used
// ring once, and writes to the eventfd of the call if the guest wants that. The write goes
// to the kernel together with the loop's next wait. A guest is asked to kick only when the
// loop is about to sleep.
//
// With Config.ZeroCopy the back end has registered the guest's memory, and accesses the data
// of requests itself where it is contiguous or, if the queues are of the type block.Gatherer, in
// several large pieces. If the front end replaces memory meanwhile, what
// used the old mapping is executed again with the new one. Memory that cannot be registered
// is copied.
//
// A request that is larger than a buffer is executed in pieces, as many at a time as
// there are tags.
//
// # What a front end can do
//
// The front end and the guest are not trusted. Every message, index, address and length is
// read once and then checked. What is malformed ends the session with a reason. The front
// end may then connect again. Other servers are not affected.
//
// The front end can truncate the file of the guest's memory. The access that follows is
// a SIGBUS, which ends the session like other errors (debug.SetPanicOnFault). A file with the
// seal F_SEAL_SHRINK cannot be truncated. The guest can change its buffers while a request
// is in flight. The data of a write is what the copy finds.
//
// A front end can remove memory while requests use it. The session ends when one of these
// requests is completed. With Config.ZeroCopy, the answer to a message that removes memory or
// resets the device comes when the back end does not access the memory any more, and a session
// that fails hangs up only then.
//
// # Crash of the server
//
// The front end keeps a record of the requests in flight in memory that it shares with the
// server. When a server dies, the next one finds there which requests the guest still waits
// for, and executes them again in their order. The caller must make sure that the requests
// of the dead server are not executed any more. The back ends of this module do that
// before they open a queue.
//
// When a session ends but the server lives on, its requests at the back end cannot be
// recalled. Their results are dropped. The next session starts at once, but sends no
// request before they have ended, because a request could overtake one of them.
//
// # Concurrency
//
// New, Serve and the methods of Server may be called from any goroutine except those of the
// loops.
//
// # Hazards
//
//  1. From Submit to Reap a buffer belongs to the back end. So Stop waits for the back end,
//     which must fail requests that it cannot complete. So does GET_VRING_BASE, which a
//     front end sends when it stops the device: until the back end has answered, the front
//     end waits.
//  2. If a loop ends before the Server, the buffers of requests at the back end are never
//     freed, because the back end may still use them.
//  3. New calls debug.SetPanicOnFault on the loops. A fault of other code there is a panic
//     as well, which nothing recovers.
package vhost
