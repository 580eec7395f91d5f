// Package nbd serves block devices by the NBD protocol: to any client on a Unix or TCP
// socket (Server), and as /dev/nbdN through the kernel's client (Start).
//
// The specification is doc/proto.md of the NBD project. The package implements the
// fixed newstyle negotiation with the options ABORT, LIST, INFO, GO, EXPORT_NAME,
// STARTTLS and STRUCTURED_REPLY. In the transmission phase it implements reads, writes,
// flushes, trims and write zeroes, with FUA, and simple and structured replies. It does
// not implement block status, resizing and extended headers.
//
// # Data path
//
// A goroutine negotiates a connection. The connection then belongs to one poller.Loop,
// the one with the fewest connections, until it ends. The loop's ring receives and
// sends. The data of a write is received into the back end's buffer of its tag, except
// for the part that came together with the header. The data of a read is sent from
// that buffer. All requests that arrived in one pass go to the back end in one
// block.Queue.Submit, and all replies that are due go out in one message.
//
// A loop has one block.Queue of each export, which the connections of the loop share.
// A connection may hold half of its tags. A request takes all the tags that it needs
// at once, before its data is received, so requests wait for each other but never
// deadlock. A request that is larger than a buffer takes several tags. A request that
// is larger than half of all the buffers is refused; NBD_INFO_BLOCK_SIZE tells the
// client how large that is.
//
// A client that uses TLS is served through a socket pair. Two goroutines at the other
// end of the pair encrypt and decrypt. Everything else is the same.
//
// # Concurrency
//
// Start, New, and the methods of Server and Device may be called from any goroutine
// except those of the loops.
//
// # Hazards
//
//  1. A buffer belongs to the back end from Submit to Reap, whatever happens to the
//     connection. A connection that is lost ends when its last request has ended. So
//     Stop waits for the back end, which has to fail the requests that it cannot
//     execute.
//  2. A tag belongs to the socket while its reply is being sent. A client that does
//     not read its replies holds its tags until it is disconnected. So does a client
//     that announces a write and does not send its data. Two such clients can starve
//     the others on their loop.
//  3. The specification allows a client to send a request before it knows the block
//     size. A request that is not aligned to it is refused with EINVAL.
//  4. The sockets are blocking, because io_uring does not wait for a socket that is
//     O_NONBLOCK.
package nbd
