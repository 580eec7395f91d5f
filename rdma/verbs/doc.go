// Package verbs is the rdma.Provider for libibverbs and librdmacm, and so for every
// RDMA NIC and for rdma_rxe. It is built with cgo on Linux unless the tag noverbs is
// set. Otherwise New returns rdma.ErrUnsupported.
//
// # Threads
//
// Each ID and Listener has one goroutine that reads its events, and each opened device has
// two, which end when the device is removed. The descriptors are non-blocking and wait in Go's
// network poller, so no thread is blocked while nothing happens. Close waits for these
// goroutines.
//
// The calls that post and poll make one cgo call for each batch, without callbacks into
// Go, and pass the slices of the caller as they are.
//
// # Building
//
// Debian: libibverbs-dev and librdmacm-dev, version 44 or later.
//
// # Hazards
//
//  1. On hardware, QP.Fail returns when the device has stopped. With rdma_rxe it only
//     notifies the worker of rdma_rxe: a packet that the worker is copying at that
//     moment may still be written to memory. A receive that was posted before and has
//     been flushed proves that the worker has finished, and so does ID.Close.
//  2. rdma_rxe interprets RetryCount 7 as "forever". So only the timeouts of the caller
//     detect a peer that has died silently.
//  3. rdma_rxe does not notice a receive that is posted after QP.Fail, so the receive
//     may never be flushed.
//  4. Some drivers cannot detach from their users when a device is removed (rdma_rxe
//     before Linux 7). The removal of such a device, and of the network device under
//     it, waits until the last ID, PD and CQ on it is closed. Device.Removed tells. A
//     listener on the device closes itself.
//  5. The libraries survive the removal of a device only in a process that package
//     [ublk-nvmeof/rdma/verbs/prepare] has prepared. A program has to import it.
package verbs
