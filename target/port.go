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

// PortConfig describes a Port.
type PortConfig struct {
	Provider rdma.Provider
	Addr     netip.AddrPort // the address to listen on; port 0: any free port
}

// AddPorts makes the target listen on addresses. Hosts can connect once it listens on all of
// them, so that the first host finds all ports. After an error, which is one of a provider or
// about the number of ports, none of them is added. Subsystems and namespaces that a host is
// to find at once must be there before.
func (t *Target) AddPorts(cfgs ...PortConfig) ([]*Port, error) {
	added, err := t.listen(cfgs)
	if err != nil {
		return nil, fmt.Errorf("add port: %w", err)
	}
	if err := t.accept(added); err != nil {
		return nil, errors.Join(fmt.Errorf("add port: %w", err), closeListeners(added))
	}
	t.notifyDiscovery(anyHost)
	return added, nil
}

// listen makes ports that do not accept connections yet.
func (t *Target) listen(cfgs []PortConfig) ([]*Port, error) {
	var added []*Port
	for _, cfg := range cfgs {
		l, err := cfg.Provider.Listen(cfg.Addr, backlog)
		if err != nil {
			return nil, errors.Join(err, closeListeners(added))
		}
		added = append(added, &Port{target: t, listener: l})
	}
	return added, nil
}

func closeListeners(ports []*Port) error {
	var errs []error
	for _, p := range ports {
		errs = append(errs, p.listener.Close())
	}
	return errors.Join(errs...)
}

// accept numbers ports that listen, and begins to accept connections.
func (t *Target) accept(added []*Port) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ctx.Err() != nil {
		return errors.New("the target is closed")
	}
	var free []int
	for i := range t.ports {
		if t.ports[i] == nil {
			free = append(free, i)
		}
	}
	if len(added) > len(free) {
		return fmt.Errorf("the target has %d ports of %d, and no room for %d more", MaxPorts-len(free), MaxPorts, len(added))
	}
	for n, p := range added {
		p.index = free[n]
		t.ports[p.index] = p
		for _, s := range t.subsystems {
			s.resetANA(p.index)
		}
		t.running.Go(p.accept) // before Close can wait
	}
	t.genctr++
	return nil
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
