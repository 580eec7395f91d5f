// Package rdmatest tests users and providers of rdma: a Fabric, whose endpoints
// are rdma.Providers that connect to each other inside the process, and Run,
// the conformance suite that every provider must pass.
//
// # What the fabric keeps
//
// Reliable-connected semantics: work requests complete in order; a SEND waits
// for a receive, for ever, whatever the RNR retry count; RDMA READ and WRITE
// check key, bounds, rights and protection domain, and need granted depth;
// an error moves the queue pair to the error state and flushes the rest;
// private data arrives padded with zeros to the length of its CM message. A
// send slot is free again when a signaled completion of it or of a later one
// was polled, and completion queues overrun, as on hardware.
//
// Unlike most hardware it lets SEND with invalidate end the remote key of an
// ordinary memory region, if that was allocated with rdma.AccessRemoteInvalidate.
//
// # What it does not keep
//
// Without Fabric.SetDelay a work request takes effect before PostSend returns,
// which hides users that touch a buffer too early. An error on one side reaches
// the other at once. Nothing ever gets lost unless a fault is asked for.
//
// # Faults
//
// The Fabric's methods break things: Kill, Cut, SetSilent, SetRefuse,
// SetDelay, SetHold. All may be called from any goroutine at any time.
package rdmatest
