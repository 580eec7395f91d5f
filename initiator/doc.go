// Package initiator is the host side of NVMe over Fabrics on RDMA. It connects to the
// controllers of a subsystem, negotiates, splits the granted queues into classes, connects
// the I/O queues, keeps the controllers alive, and offers each namespace as a block.Device.
//
// # Structure
//
// A Subsystem owns the namespaces, the lanes and the I/O memory. A Controller is a path to
// these namespaces. It outlives its associations. An association is one admin connection with
// the I/O queue pairs that belong to it. Each association is made by the same code, from
// zero. A lane is the part of the subsystem that runs on one poller.Loop: it drives the queue
// pairs that the loop owns, and it takes the requests of the namespaces' queues on that loop.
// It chooses a path for each request. If a queue pair of another loop serves the class of the
// request there, the request is handed over through the inbox of that loop's lane. A request
// that cannot be sent now is parked on a lane.
//
//	front end ── nsQueue.Submit ─► lane ─► queuePair ─► sq ─► SEND
//	front end ◄─ nsQueue.Reap  ◄── lane ◄─ queuePair ◄─ cq ◄─ RECV
//
// A discovery subsystem (Config.Discovery) has no lanes, and its controller has an admin queue
// only. There is nothing but ReadLog, Identify and the events of Config.DiscoveryChanged.
//
// # Completion
//
// A request without data in its capsule ends with its response. Only the target
// accesses its buffer, and the target has finished when it answers. A request with
// data in its capsule ends when the SEND is complete as well, because the adapter may
// send the capsule again until then. When a queue pair is lost, none of its requests
// ends before the queue pair is in the error state.
//
// # Memory
//
// Each queue reserves depth × maximum I/O. Chunks of it are populated, and registered in the
// protection domain of each path, when requests first need them. Until that is done, and if it
// fails, requests of the queue share one buffer that is there from the start, in turns.
// Config.MaxMemory bounds what is reserved, and a queue beyond it is refused (MemoryError). If
// the process may lock only so much memory, all of a queue is registered when it is opened, and a
// queue that is too large is refused. A target holds the keys of the chunks for the time of the
// connection. It can access the I/O buffers of the subsystem that it serves, and no other memory
// except regions (Namespace.Register). The data of a request in segments of regions goes by one
// command for as many segments as the path's target takes (MSDBD).
//
// # Concurrency
//
// The methods of Subsystem, Controller and Namespace may be called from any goroutine. The
// block.Queue of a namespace must be used on the loop that it was opened for.
package initiator
