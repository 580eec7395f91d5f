package roce

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Several sockets share a port (SO_REUSEPORT), and a filter in the kernel picks the
// one that a packet goes to, by the last byte of the queue pair's number. What one
// receive loop has to do is bounded by its CPU; so there can be one for each that
// polls.

// What UDP_GRO has joined goes where its first packet belongs, so a packet may come to
// another endpoint than the filter would have picked for it alone. The queue pair takes it
// there, too.

// maxReceivers is bounded by the byte that the filter looks at, and by what is of use.
const maxReceivers = 64

// destByte is where that byte is in a packet.
const destByte = 7

// steer is where packets for a queue pair go, of n.
func steer(qpn uint32, n int) int { return int(qpn&0xff) % n }

// openShared opens the endpoints that share a UDP port. The first is the one that has the state of
// the connections. The lock is held, or nobody knows the provider yet.
func (p *Provider) openShared(addr netip.AddrPort) (*endpoint, error) {
	// That one must not share, so that somebody else's socket is an error.
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

// member is the endpoint for the queue pairs of a completion vector.
func (p *endpoint) member(vector int) *endpoint {
	if g := p.group.Load(); g != nil {
		return (*g)[uint(vector)%uint(len(*g))]
	}
	return p
}

// ownerOf is the endpoint that packets for a queue pair of this endpoint's group come to.
func (p *endpoint) ownerOf(qpn uint32) *endpoint {
	if g := p.manager.group.Load(); g != nil && !p.dedicated {
		return (*g)[steer(qpn, len(*g))]
	}
	return p
}
