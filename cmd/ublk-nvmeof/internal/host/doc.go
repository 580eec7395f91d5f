// Package host is what the command needs of the machine beside ublk and RDMA:
// kernel modules, the network device on the way to a target, a process fit to
// serve a block device, and the service manager.
package host
