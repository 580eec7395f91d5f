// Package host provides what the command needs of the machine besides ublk and
// RDMA: kernel modules, the network device on the route to a target, the limits and
// marks of a process that serves a block device, and the service manager.
package host
