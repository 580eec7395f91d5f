// Package target is an NVMe over Fabrics target on RDMA. It has subsystems with
// namespaces on any [Store], a discovery subsystem, and fault injection. Hosts are
// tested against it, and it uses no code of the host in this module.
//
// Its answers are like those of Linux' nvmet (drivers/nvme/target), including status
// codes. It differs only where the specifications leave more to the controller and a
// test needs it: the limit on I/O queues can change at any time, Compare is supported,
// and SQ flow control can be observed.
//
// # Flow of a command
//
// A connection carries one queue, and one goroutine serves it. A capsule arrives in a
// receive buffer and stays there until its command has ended. Data moves through
// registered memory of the queue, which is given out in adjacent chunks:
//
//	read:  Store.ReadAt into chunks, RDMA WRITE and SEND in one post
//	write: RDMA READ into chunks, Store.WriteAt, SEND
//
// In-capsule data is written from the receive buffer itself. The buffer is posted again
// before the SEND. So a host that respects its queue size always finds a receive
// buffer. Commands wait for chunks in the order of their arrival.
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
// All exported functions and methods may be called from any goroutine unless they say
// otherwise. Locks are taken in the order Target, Subsystem, controller. As long as no
// fault is set, the I/O path takes no lock and allocates no memory.
package target
