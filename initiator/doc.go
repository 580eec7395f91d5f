// Package initiator is the host side of an NVMe over Fabrics controller on
// RDMA: it connects, negotiates, splits what the target grants into queue
// classes, connects the I/O queues, keeps the controller alive, and offers each
// namespace as a block.Device.
//
// # Structure
//
// A Controller outlives its associations. An association is one admin
// connection and the I/O queue pairs that belong to it; each one is made by
// the same code and from zero. A lane is what the controller does on one
// poller.Loop: it drives the pairs that the loop owns and takes the requests of
// the namespaces' queues on that loop. A request whose class is served by a
// pair of another loop is handed over through that lane's inbox.
//
//	front end ── queue.Submit ─► lane ─► pair ─► sq ─► SEND
//	front end ◄─ queue.Reap  ◄── lane ◄─ pair ◄─ cq ◄─ RECV
//
// # Completion
//
// A request without data in its capsule ends with its response: its buffer is
// read and written by the target only, which is done when it answers. A request
// with data in its capsule ends when the SEND is complete too, because the
// adapter may send the capsule again until then. When a queue pair is lost, no
// request of it ends before the queue pair is in the error state.
//
// # Memory
//
// Each queue registers one slab of depth × maximum I/O, whose key the target
// is given for the time of the connection. A target can reach the I/O buffers
// of the subsystem it serves, and nothing else.
//
// # Concurrency
//
// Methods of Controller and Namespace may be called from any goroutine. The
// block.Queue of a namespace is for the loop that it was opened for.
package initiator
