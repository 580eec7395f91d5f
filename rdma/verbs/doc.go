// Package verbs is the rdma.Provider on libibverbs and librdmacm: every RDMA
// NIC, and rdma_rxe. It is built with cgo on Linux unless the tag noverbs is
// set; otherwise New returns rdma.ErrUnsupported.
//
// # Threads
//
// Each ID, Listener and opened device has one goroutine that reads its events.
// The descriptors are non-blocking and wait in Go's network poller, so that no
// thread is blocked while nothing happens. Close joins them.
//
// The posting and polling calls make one cgo call per batch, without callbacks
// into Go, and pass the caller's slices as they are.
//
// # Hazards
//
//  1. QP.Fail on hardware returns when the device has stopped. rdma_rxe only
//     tells its worker: a packet that the worker is copying at that moment may
//     still land. A receive that was posted and comes back flushed, or ID.Close,
//     proves that it is over.
//  2. Device removal: an adapter whose driver cannot detach from its users
//     (rdma_rxe) disappears only when every object on it has been closed.
package verbs
