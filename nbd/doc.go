// Package nbd serves block devices with the NBD protocol, to any client on a unix or TCP
// socket (Server), and as /dev/nbdN through the kernel's client (Start).
//
// The specification is doc/proto.md of the NBD project. The package implements the
// fixed newstyle negotiation with its options ABORT, LIST, INFO, GO, EXPORT_NAME,
// STARTTLS and STRUCTURED_REPLY. In the transmission phase it implements reads, writes,
// flushes, trims and write zeroes, with FUA, and simple and structured replies. It does
// not implement block status, resizing and extended headers.
//
// # Data path
//
// A goroutine negotiates with each client. After that the connection belongs to one
// poller.Loop, the one with the fewest connections, until it ends. The loop receives and
// sends through its ring. The data of a write is received into the back end's buffer for
// its tag, except for data that came together with the header. The data of a read is sent
// from that buffer. All requests of one pass go to the back end in one block.Queue.Submit,
// and all pending replies are sent in one message.
//
// A loop has one block.Queue of each export (a shard), whose tags the connections of
// that loop share. A request has a task, which belongs to its connection, and one tag for
// each piece of its data, which is as large as a buffer. A write takes its tags one by one
// as its data arrives. A read takes all its tags at once if it can. Otherwise it is
// streamed: its pieces are sent as they complete, and their tags are used again. So a
// request of any size needs only the memory of a few tags.
//
// A streamed read can fail after a part of its data was sent. A structured reply then ends
// with an error chunk. A simple reply, or one that the client wants in one piece (DF),
// cannot report the error, so the server closes the connection. Reads up to the size that
// the server announces in NBD_INFO_BLOCK_SIZE are streamed only while other connections
// use all tags.
//
// A TLS client is served through a socket pair. Two goroutines at its other end encrypt
// and decrypt. Nothing else differs.
//
// # Blocks
//
// A client that asks for NBD_INFO_BLOCK_SIZE learns the size of a logical block, and
// gets EINVAL for requests that are not aligned to it. A client that does not ask may
// send any offset and length. To write a part of a block, the server reads the block and
// writes it back with the new bytes. Meanwhile other changes of the same block wait, on all
// loops of the Server. Changes that do not go through the Server do not wait, so two
// programs must not write different parts of a block at the same time. A trim does not
// change blocks that it covers only in part.
//
// # Fairness
//
// Clients share tags. A client keeps a tag if it does not read its replies, or if it
// announces a write and does not send the data. These rules limit the effect on others:
//
//   - A connection may hold three quarters of a shard's tags. The last quarter of the
//     tags is only for connections that hold none. So with up to Depth/4 connections on
//     a shard, each always gets a tag and can make progress.
//   - A client is disconnected if a reply or the data of a write makes no progress for
//     Config.StallTimeout. While a connection without a tag waits, a quarter of that time
//     is enough. So with more than Depth/4 connections on a shard, a connection waits at
//     most a quarter of StallTimeout for each Depth others that make no progress.
//   - Connections get tags in the order in which they began to wait for them.
//   - Negotiating clients do not count against Config.MaxConns. If there are too many,
//     old ones are disconnected in favor of new ones (Config.MaxHandshakes).
//   - One source of clients gets at most three quarters of the connections
//     (Config.MaxConns).
//   - If a client finds no place, an idle one gives way to it: one that has sent no request
//     within 10 s of its negotiation, or a connection of a large holder that has been idle
//     for a minute or was never used. A large holder is a client, or a process of a local
//     user, that has at least 64 connections and more than the holder of the new one. Common
//     clients open at most 16. A connection with a request in progress never gives way.
//
// # Changes of the device
//
// Flush and FUA are always passed on to the back end. The limits of block.Geometry may
// shrink. The server reads them for each new connection, every few seconds while there is
// traffic, and when the back end refuses a request, which it then retries in smaller
// pieces.
//
// # Concurrency
//
// Start, New, and the methods of Server and Device may be called from any goroutine
// except those of the loops.
//
// # Hazards
//
//  1. From Submit to Reap a buffer belongs to the back end, even if the connection is
//     lost. A lost connection ends when its last request has ended. So Stop waits for the
//     back end, which must fail requests that it cannot complete.
//  2. If a loop ends before the Server, the buffers of requests at the back end are never
//     freed, because the back end may still use them.
//  3. The sockets are blocking, because io_uring does not wait for a socket that is
//     O_NONBLOCK.
package nbd
