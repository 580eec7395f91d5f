// Package rdmatest tests users and providers of rdma. A Fabric has endpoints that are
// rdma.Providers and connect to each other inside the process. Run is the conformance
// suite that every provider must pass.
//
// # What the fabric does like hardware
//
// It has the semantics of reliable connections. Work requests complete in order. A SEND
// waits for a receive without a limit, whatever the RNR retry count. RDMA READ and WRITE
// check key, bounds, rights and protection domain, and need granted depth. An error
// moves the queue pair to the error state and flushes the rest. Private data arrives
// padded with zeros to the length of its CM message. As on hardware, a send slot is free
// again when a signaled completion of it, or of a later one, was polled, and completion
// queues can overrun.
//
// Unlike most hardware it lets SEND with invalidate end the remote key of an
// ordinary memory region, if that was allocated with rdma.AccessRemoteInvalidate.
//
// # What the fabric does differently
//
// Without Fabric.SetDelay a work request takes effect before PostSend returns, which
// hides users that touch a buffer too early. An error on one side reaches the other side
// at once. Nothing is lost unless a fault is requested.
//
// # Faults
//
// These methods of Fabric inject faults: Kill, Cut, SetSilent, SetDeaf, SetRefuse,
// SetDelay, SetHold. All of them may be called from any goroutine at any time.
package rdmatest
