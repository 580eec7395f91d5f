// Package target is an NVMe over Fabrics target on RDMA. It has subsystems with
// namespaces on any [Store], a discovery subsystem, and faults for tests of hosts. It
// shares no code with the initiator of this module.
//
// Its answers, including status codes, are those of Linux nvmet (drivers/nvme/target).
// It differs where the specifications allow a choice and tests need another one: the
// limit on I/O queues can change at any time, Compare is supported, completions carry
// the submission queue head, and the data of a command can be in several places.
//
// # Flow of a command
//
// Each connection carries one queue, which has its own goroutine. A capsule arrives in a
// receive buffer and stays there until its command completes. Data is transferred from and
// to registered memory of the queue, which is allocated in adjacent chunks:
//
//	read:  Store.ReadAt into chunks, RDMA WRITE and SEND in one post
//	write: RDMA READ into chunks, Store.WriteAt, SEND
//
// If the data is in several places of the host, which a list in the capsule names
// ([Config.MaxDescriptors]), there is one RDMA READ or WRITE for each.
//
// In-capsule data is written to the store from the receive buffer. The target posts the
// buffer again before the SEND, so a host that respects its queue size always finds a
// buffer. Commands get chunks and work requests in the order of their arrival.
//
// # Limits
//
// All resources that a host can make the target use are limited. Until its Connect command
// is accepted, a connection has memory for one command, less than 128 KiB with its rings. A
// connection without a Connect command ends after [Config.ConnectTimeout], or when 128
// newer connections, or 64 from the same address, have no Connect command either.
// [Config.MaxConnections] and [Config.MaxPerHost] limit the connections, and
// [Config.QueueMemory] the memory of connected queues. A namespace has at most 63 registrants
// of reservations, which it forgets with the target. The log of events that hosts cause
// is limited in rate; [Snapshot.Refusals] counts all refusals.
//
// # The end of a controller
//
// A controller exists until its last queue has ended, and with it its last command. After
// that the target refuses a Connect command to the controller with "invalid parameter:
// controller id", which tells the host that no old write can reach the store any more. The
// same holds for a reset and a shutdown: CSTS shows that they are complete only when no
// I/O command executes any more.
//
// # Concurrency
//
// Any goroutine may call the exported functions and methods, unless their documentation
// says otherwise. Locks are taken in the order Faults, Target, Subsystem, controller,
// registry. While no fault is set, the I/O path takes no lock and allocates nothing.
package target
