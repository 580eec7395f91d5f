// Package server is the process that serves one subsystem: it composes an RDMA
// provider, run loops, a controller and one ublk device per namespace, keeps
// them until it is told to end, and takes them apart in the reverse order.
//
// # Ending
//
// Whatever asks for the end (a signal, a disconnect request, the last device
// being deleted by somebody else), the order is the same and every step is
// bounded: devices, whose requests in flight are waited for; if those do not
// come back, the controller is aborted, which makes them fail; then the
// controller's orderly leave; then the loops. A step that does not end in time
// is given up with everything that depends on it: the process ends anyway, and
// the kernel takes back what is left.
package server
