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
// # Building
//
// Debian: libibverbs-dev and librdmacm-dev, version 44 or later.
//
// # Hazards
//
//  1. QP.Fail on hardware returns when the device has stopped. rdma_rxe only
//     tells its worker: a packet that the worker is copying at that moment may
//     still land. A receive that was posted before and has come back flushed
//     proves that it is over, and so does ID.Close.
//  2. rdma_rxe takes RetryCount 7 for "for ever": a peer that died without a
//     word is noticed by the caller's own timeouts only.
//  3. rdma_rxe does not notice a receive that is posted after QP.Fail, so that
//     it may never come back.
//  4. Device removal: where the driver cannot detach from its users (rdma_rxe
//     before Linux 7), the removal of the device, and of the network device
//     under it, waits until the last ID, PD, CQ and listener on it is closed, and
//     for ever if it was the host's only RDMA device: librdmacm then keeps it open
//     until the process ends.
package verbs
