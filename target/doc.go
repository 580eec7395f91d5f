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
// Everything that a host can make the target hold is bounded. A connection has
// memory for one command, less than 64 KiB with its rings, until its Connect
// command is accepted; without one it ends after [Config.ConnectTimeout], or when
// 128 others, or 64 of the same address, came after it. Connections are bounded by
// [Config.MaxConnections] and [Config.MaxPerHost], and the memory that a connected
// queue gets by [Config.QueueMemory]. What hosts cause is logged at a bounded rate;
// [Snapshot.Refusals] counts all of it.
//
// # The end of a controller
//
// A controller is known until the last of its queues, and with it the last of its
// commands, has ended; only then a Connect to it is answered with "invalid
// parameter: controller id", which tells its host that no old write can land any
// more. In the same way a reset and a shutdown are done when CSTS says so.
//
// # Concurrency
//
// Everything exported may be called from any goroutine, except where it says
// otherwise. Locks are taken in the order Target, Subsystem, controller. No
// lock is taken on the I/O path, nor is anything allocated there, as long as no
// fault is set.
package target
