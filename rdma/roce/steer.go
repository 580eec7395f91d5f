package roce

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Several sockets can share a port (SO_REUSEPORT). A filter in the kernel chooses the
// socket for a packet by the last byte of the queue pair's number. One CPU limits the
// work of one receive loop, so there can be one loop for each polling thread.

// UDP_GRO joins packets, and all of them go to the socket of the first one. So a packet
// may arrive at another endpoint than the filter would have chosen for it alone. The
// queue pair handles it there, too.

// maxReceivers is limited by the byte that the filter uses, and by what is useful.
const maxReceivers = 64

// destByte is the offset of that byte in a packet.
const destByte = 7

// steer returns the index of the socket, of n, for the packets of a queue pair.
func steer(qpn uint32, n int) int { return int(qpn&0xff) % n }

// openShared opens the endpoints that share a UDP port. The first one has the state of
// the connections. The lock is held, or the provider is not in use yet.
func (p *Provider) openShared(addr netip.AddrPort) (*endpoint, error) {
	// The first one must not share the port yet, so that a socket of another process
	// is an error.
	first, err := p.open(addr, false, nil)
	n := p.cfg.Receivers
	if err != nil || n <= 1 {
		return first, err
	}
	group := []*endpoint{first}
	fail := func(err error) (*endpoint, error) {
		errs := []error{fmt.Errorf("share RoCE port %s: %w", addr, err)}
		for _, o := range group {
			p.endpoints = slices.DeleteFunc(p.endpoints, func(have *endpoint) bool { return have == o })
			errs = append(errs, o.close())
		}
		return nil, errors.Join(errs...)
	}
	if err := unix.SetsockoptInt(first.sock.fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
		return fail(err)
	}
	for len(group) < n {
		o, err := p.open(first.sock.local, false, first)
		if err != nil {
			return fail(err)
		}
		group = append(group, o)
	}
	// The sockets are numbered in the order in which they were bound.
	program := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: destByte},
		{Code: unix.BPF_ALU | unix.BPF_MOD | unix.BPF_K, K: uint32(n)},
		{Code: unix.BPF_RET | unix.BPF_A},
	}
	err = unix.SetsockoptSockFprog(first.sock.fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF,
		&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	if err != nil {
		return fail(err)
	}
	first.group.Store(&group)
	return first, nil
}

// member returns the endpoint for the queue pairs of a completion vector.
func (p *endpoint) member(vector int) *endpoint {
	if g := p.group.Load(); g != nil {
		return (*g)[uint(vector)%uint(len(*g))]
	}
	return p
}

// ownerOf returns the endpoint, in this endpoint's group, that receives the packets of a
// queue pair.
func (p *endpoint) ownerOf(qpn uint32) *endpoint {
	if g := p.manager.group.Load(); g != nil && !p.dedicated {
		return (*g)[steer(qpn, len(*g))]
	}
	return p
}
