// Package server is the process that serves one subsystem. It makes an RDMA provider,
// loops, a controller and a device for each namespace, keeps them until it must end,
// and ends them in the reverse order.
//
// # Ending
//
// A signal, a disconnect request, or the removal of the last device from outside ends
// the server. The order of steps is always the same, and each step has a time limit:
//
//  1. The devices end after the requests in flight have completed. If these do not
//     complete, the server aborts the controller, and they fail.
//  2. The controller shuts down and disconnects from the target.
//  3. The loops end.
//
// A step that exceeds its limit is abandoned together with everything that depends on
// it. The process ends nevertheless, and the kernel frees its resources.
package server
