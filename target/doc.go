// Package target is an NVMe over Fabrics target on RDMA: subsystems with
// namespaces on any [Store], a discovery subsystem, and faults for tests of hosts.
// It shares no code with this module's host.
//
// It answers like Linux' nvmet (drivers/nvme/target), down to status codes, except
// where the specifications leave a choice and tests need another one: the limit on
// I/O queues can be changed at any time, Compare is supported, and completions
// carry the submission queue head.
//
// # Flow of a command
//
// Each connection carries one queue, which has a goroutine of its own. A capsule
// arrives in a receive buffer and stays there until its command is complete. Data
// is transferred from and to registered memory of the queue, which is allocated in
// adjacent chunks:
//
//	read:  Store.ReadAt into chunks, RDMA WRITE and SEND in one post
//	write: RDMA READ into chunks, Store.WriteAt, SEND
//
// In-capsule data is written to the store from the receive buffer. The buffer is
// posted again before the SEND, so a host that respects its queue size always finds
// a buffer. Commands get chunks in the order of their arrival.
//
// # Limits
//
// Everything that a host can make the target hold is bounded. A connection has
// memory for one command, less than 64 KiB with its rings, until its Connect
// command is accepted. Without one it ends after [Config.ConnectTimeout], or when
// 128 newer connections, or 64 of the same address, wait for theirs.
// [Config.MaxConnections] and [Config.MaxPerHost] bound the connections, and
// [Config.QueueMemory] the memory of connected queues. Events that hosts cause are
// logged at a bounded rate; [Snapshot.Refusals] counts all refusals.
//
// # The end of a controller
//
// A controller is known until its last queue, and with it its last command, has
// ended. From then on a Connect command to it is refused with "invalid parameter:
// controller id", which tells the host that no old write can reach the store any
// more. A reset and a shutdown work in the same way: CSTS says that they are
// complete when no I/O command executes any more.
//
// # Concurrency
//
// Any goroutine may call what is exported, except where the documentation says
// otherwise. Locks are taken in the order Faults, Target, Subsystem, controller,
// registry. As long as no fault is set, the I/O path takes no lock and allocates
// nothing.
package target
