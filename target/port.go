package target

import (
	"errors"
	"fmt"
	"net/netip"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// MaxPorts is the largest number of ports that a target has had at one time.
const MaxPorts = 16

// Port is an address on which a target listens. All subsystems can be reached over every port.
// The ANA states of a subsystem are those of a port. Any goroutine may call its methods.
type Port struct {
	target   *Target
	index    int // in the ANA states of the subsystems
	listener rdma.Listener
}

// AddPort makes the target listen on another address. If provider is nil, it is the one of
// the target.
func (t *Target) AddPort(provider rdma.Provider, addr netip.AddrPort) (*Port, error) {
	if provider == nil {
		provider = t.cfg.Provider
	}
	l, err := provider.Listen(addr, backlog)
	if err != nil {
		return nil, err
	}
	p := &Port{target: t, listener: l}
	t.mu.Lock()
	p.index = -1
	for i := range t.ports {
		if t.ports[i] == nil && p.index < 0 {
			p.index = i
		}
	}
	if p.index < 0 || t.ctx.Err() != nil {
		t.mu.Unlock()
		return nil, errors.Join(fmt.Errorf("add port: the target has %d, which is the limit, or it is closed", MaxPorts), l.Close())
	}
	t.ports[p.index] = p
	t.genctr++
	started := t.started
	t.mu.Unlock()
	for _, s := range t.all() {
		s.resetANA(p.index)
	}
	t.notifyDiscovery(anyHost)
	if started {
		t.running.Go(p.accept)
	}
	return p, nil
}

// Ports returns the ports, in the order of their numbers.
func (t *Target) Ports() []*Port {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []*Port
	for _, p := range t.ports {
		if p != nil {
			all = append(all, p)
		}
	}
	return all
}

// Addr returns the address on which the port listens.
func (p *Port) Addr() netip.AddrPort { return p.listener.Addr() }

// ID returns the number of the port, as in the discovery log: 1..MaxPorts.
func (p *Port) ID() uint16 { return uint16(p.index + 1) }

// Disconnect ends all connections to the port and returns their number.
func (p *Port) Disconnect() int {
	return p.target.disconnect(func(q *queuePair) bool { return q.port == p }, "port disconnects")
}

// Close ends the port and its connections. Commands that execute continue.
func (p *Port) Close() error {
	t := p.target
	t.mu.Lock()
	if t.ports[p.index] != p {
		t.mu.Unlock()
		return nil
	}
	t.ports[p.index] = nil
	t.genctr++
	t.mu.Unlock()
	err := p.listener.Close()
	p.Disconnect()
	t.notifyDiscovery(anyHost)
	return err
}

// resetANA makes all groups optimized over a port that is new.
func (s *Subsystem) resetANA(port int) {
	for i := range s.ana[port] {
		s.ana[port][i].Store(uint32(nvme.ANAOptimized))
	}
}

// SetPortANAState sets the state of an ANA group (1..MaxANAGroups) over one port, and notifies
// the hosts that are connected to it.
func (s *Subsystem) SetPortANAState(p *Port, group uint32, state nvme.ANAState) error {
	if err := checkANA(group, state); err != nil {
		return err
	}
	s.setANA(p.index, group, state)
	return nil
}

// SetANAGroup moves a namespace to another ANA group and notifies the hosts.
func (n *Namespace) SetANAGroup(group uint32) error {
	if err := checkANA(group, nvme.ANAOptimized); err != nil {
		return err
	}
	s := n.subsystem
	s.mu.Lock()
	n.group.Store(group)
	s.anaChanges++
	s.mu.Unlock()
	s.notify(eventANA, 0)
	return nil
}
