// Package nbd serves block devices by the NBD protocol: to any client on a unix or
// TCP socket (Server), and as /dev/nbdN through the kernel's client (Server.Start).
//
// The specification is doc/proto.md of the NBD project. The package implements the
// fixed newstyle negotiation with its options ABORT, LIST, INFO, GO, EXPORT_NAME,
// STARTTLS and STRUCTURED_REPLY. In the transmission phase it implements reads, writes,
// flushes, trims and write zeroes, with FUA, and simple and structured replies. It does
// not implement block status, resizing and extended headers.
//
// # Data path
//
// A goroutine negotiates with a client. Then the connection belongs to one poller.Loop,
// the one with the fewest connections, until it ends. The loop's ring receives and
// sends. The data of a write is received into the back end's buffer of its tag, except
// for what came together with the header. The data of a read is sent from that buffer.
// What arrived in one pass goes to the back end in one block.Queue.Submit, and all
// replies that are due go out in one message.
//
// A loop has one block.Queue of each export (a shard), whose tags the connections of
// that loop share. A request has a task, which belongs to its connection, and for its
// data one tag for each piece that is as large as a buffer. A write takes its tags one by
// one, as its data arrives. A read takes all its tags at once if it can. Otherwise it
// is streamed: its pieces are sent as they come, and their tags are used again. So a
// request of any size is served with the memory of a few tags.
//
// A read that is streamed can fail after a part of its data was sent. A structured
// reply ends with an error chunk then. A simple reply, or one that the client wants in
// one piece (DF), has no way to say so: the connection is closed. Reads up to the size
// that the server names in NBD_INFO_BLOCK_SIZE are streamed only while other
// connections use up the tags.
//
// A client that speaks TLS is served through a socket pair, whose other end two
// goroutines encrypt and decrypt. Nothing else differs.
//
// # Blocks
//
// A client that asks for NBD_INFO_BLOCK_SIZE learns the size of a logical block, and
// gets EINVAL for requests that are not aligned to it. A client that does not ask may
// send any offset and length. A write of a part of a block reads the block and writes it
// back with the new bytes. Changes of the same block wait for each other meanwhile, on
// all loops of the Server. Changes that do not go through the Server do not wait: two
// programs must not write different parts of a block at the same time. A trim leaves
// blocks alone that it covers in part.
//
// # Fairness
//
// Clients share tags, and a client can keep a tag: it does not read its replies, or it
// announces a write and does not send the data. These rules bound what that costs
// others:
//
//   - A connection may hold three quarters of a shard's tags. The last quarter of the
//     tags is only for connections that hold none. So with up to Depth/4 connections on
//     a shard, each always gets a tag, and can go on with it.
//   - A client that lets a reply or the data of a write stand still for
//     Config.StallTimeout is disconnected. While a connection waits that holds no tag,
//     a quarter of that time is enough. So with more than Depth/4 connections on a
//     shard, one waits at most that long for each Depth others that stand still.
//   - Connections that wait for tags get them in the order in which they began to wait.
//   - Clients that negotiate do not use the places of those that are served, and are
//     disconnected in favor of new ones when there are too many (Config.MaxHandshakes).
//   - A source of clients gets at most three quarters of the places (Config.MaxConns).
//
// # Changes of the device
//
// Flush and FUA are always passed on to the back end. The limits of block.Geometry may
// become smaller: they are looked at for each new connection, every few seconds while
// there is traffic, and when the back end refuses a request, which is then tried again
// in smaller pieces.
//
// # Concurrency
//
// Start, New, and the methods of Server and Device may be called from any goroutine
// except those of the loops.
//
// # Hazards
//
//  1. A buffer is the back end's from Submit to Reap, whatever becomes of the
//     connection. A connection that is lost ends when its last request has ended. So
//     Stop waits for the back end, which has to fail what it cannot do.
//  2. When a loop ends before the Server, the buffers of requests at the back end are
//     never given back, because the back end may still use them.
//  3. The sockets are blocking: io_uring does not wait for one that is O_NONBLOCK.
package nbd
