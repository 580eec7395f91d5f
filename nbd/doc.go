// Package nbd serves block devices by the NBD protocol: to any client on a unix or
// TCP socket (Server), and as /dev/nbdN through the kernel's client (Start).
//
// The specification is doc/proto.md of the NBD project. Implemented are the fixed
// newstyle negotiation with its options ABORT, LIST, INFO, GO, EXPORT_NAME, STARTTLS
// and STRUCTURED_REPLY, and in the transmission phase reads, writes, flushes, trims
// and write zeroes, with FUA, simple and structured replies. Block status, resizing
// and extended headers are not.
//
// # Data path
//
// A connection is negotiated by a goroutine of its own, and then belongs to one
// poller.Loop, the one with the fewest connections, until it ends. The loop's ring
// receives and sends. The data of a write is received into the back end's buffer of
// its tag, but for what came together with its header, and the data of a read is sent
// from there. What arrived in one pass goes to the back end in one
// block.Queue.Submit, and all replies that are due go out in one message.
//
// A loop has one block.Queue of each export, which the connections of that loop
// share. A connection may hold half of its tags, and a request takes all the tags
// that it needs at once, before its data is received, so requests wait for each
// other but never in a circle. A request larger than a buffer takes several tags; one
// larger than half of all the buffers is refused. (NBD_INFO_BLOCK_SIZE says how large
// that is.)
//
// A client that speaks TLS is served through a socket pair, whose other end two
// goroutines encrypt and decrypt: nothing else differs.
//
// # Concurrency
//
// Start, New, and the methods of Server and Device may be called from any goroutine
// but the loops'.
//
// # Hazards
//
//  1. A buffer is the back end's from Submit to Reap, whatever becomes of the
//     connection: one that is lost ends when its last request has. So Stop waits for
//     the back end, which has to fail what it cannot do.
//  2. A tag is the socket's while its reply is being sent. A client that does not
//     read its replies holds its tags until it is disconnected, as does one that
//     announces a write and does not send it. Two such clients on a loop can starve
//     the others there.
//  3. The specification lets a client send a request without having heard of the
//     block size. One that is not aligned to it is refused with EINVAL.
//  4. The sockets are blocking: io_uring does not wait for one that is O_NONBLOCK.
package nbd
