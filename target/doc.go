// Package target is an NVMe over Fabrics target on RDMA: subsystems with
// namespaces on any [Store], a discovery subsystem, and faults to order. It is
// what hosts are tested against, and uses no code of this module's host.
//
// Its answers are like those of Linux' nvmet (drivers/nvme/target), down to
// status codes, except where the specifications leave more to the controller
// and a test wants it: the limit on I/O queues may change at any time, Compare
// is supported, and SQ flow control can be observed to work.
//
// # Flow of a command
//
// A connection carries one queue, which one goroutine serves. A capsule arrives
// in a receive buffer and stays there until its command is done. Data moves
// through registered memory of the queue, which is given out in neighbouring
// chunks:
//
//	read:  Store.ReadAt into chunks, RDMA WRITE and SEND in one post
//	write: RDMA READ into chunks, Store.WriteAt, SEND
//
// In-capsule data is written from the receive buffer itself. The buffer is
// posted again before the SEND, so a host that keeps to its queue size never
// finds the queue without one. Commands wait for chunks in the order of their
// arrival.
//
// # Limits
//
// Everything that a host can make the target hold is bounded: connections by
// [Config.MaxConnections], and per queue the receive buffers, chunks and
// completions, all allocated when it connects. A connection on which no Connect
// command comes is ended after [Config.ConnectTimeout].
//
// # Concurrency
//
// Everything exported may be called from any goroutine, except where it says
// otherwise. Locks are taken in the order Target, Subsystem, controller. No
// lock is taken on the I/O path, nor is anything allocated there, as long as no
// fault is set.
package target
