package target

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"ublk-nvmeof/nvme"
)

// AddReferral adds a referral to the discovery service at an address to the discovery log,
// and notifies the hosts. It fails if the address cannot be that of a service, or is there
// already.
func (t *Target) AddReferral(to netip.AddrPort) error {
	to = netip.AddrPortFrom(to.Addr().Unmap().WithZone(""), to.Port())
	if a := to.Addr(); !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || to.Port() == 0 {
		return fmt.Errorf("add referral: %s is not the address of a service", to)
	}
	t.mu.Lock()
	if slices.Contains(t.referrals, to) {
		t.mu.Unlock()
		return fmt.Errorf("add referral: %s exists", to)
	}
	t.referrals = append(t.referrals, to)
	t.genctr++
	t.mu.Unlock()
	t.notifyDiscovery(anyHost)
	return nil
}

// RemoveReferral removes a referral and notifies the hosts.
func (t *Target) RemoveReferral(to netip.AddrPort) error {
	to = netip.AddrPortFrom(to.Addr().Unmap().WithZone(""), to.Port())
	t.mu.Lock()
	i := slices.Index(t.referrals, to)
	if i < 0 {
		t.mu.Unlock()
		return fmt.Errorf("remove referral: no %s", to)
	}
	t.referrals = slices.Delete(t.referrals, i, i+1)
	t.genctr++
	t.mu.Unlock()
	t.notifyDiscovery(anyHost)
	return nil
}

// Referrals returns the referrals in their order.
func (t *Target) Referrals() []netip.AddrPort {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.referrals)
}

func anyHost(string) bool { return true }

// notifyDiscovery tells the discovery controllers of hosts whose log has changed.
func (t *Target) notifyDiscovery(concerns func(host string) bool) {
	for _, c := range t.controllers.of(t.discovery) {
		if concerns(c.hostNQN) {
			c.notify(eventDiscovery, 0)
		}
	}
}

// visible is what the discovery log for a host is made of: the subsystems that it may
// connect to, by NQN, and the referrals.
func (t *Target) visible(host string) (subsystems []*Subsystem, referrals []netip.AddrPort, genctr uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.subsystems {
		if s.allows(host) {
			subsystems = append(subsystems, s)
		}
	}
	slices.SortFunc(subsystems, func(a, b *Subsystem) int {
		return cmp.Compare(a.cfg.NQN, b.cfg.NQN)
	})
	return subsystems, slices.Clone(t.referrals), t.genctr
}

// discoveryLog is log page 70h for the host of this queue: the discovery subsystem itself,
// the subsystems, and the referrals. Entries of this target have the address that the host
// is connected to, because it can reach that one. asked are Discovery bits: of the log with
// attributes, of which the entries have none, and of the one of this port only.
func (q *queuePair) discoveryLog(asked uint8) ([]byte, error) {
	subsystems, referrals, genctr := q.target.visible(q.ctrl.hostNQN)
	ports := q.listedPorts()
	h := nvme.DiscoveryHeader{GenCtr: genctr, Returned: asked & (nvme.DiscoveryExtended | nvme.DiscoveryPortOnly)}
	if h.Returned&nvme.DiscoveryPortOnly != 0 {
		ports, referrals = ports[:1], nil
	}
	h.NumRec = uint64(1 + len(subsystems)*len(ports) + len(referrals))
	size := uint64(nvme.DiscoveryEntrySize)
	if h.Returned&nvme.DiscoveryExtended != 0 {
		size = nvme.ExtendedEntryMin
		h.Length = uint32(nvme.DiscoveryHeaderSize + h.NumRec*size)
	}
	log := h.AppendTo(make([]byte, 0, nvme.DiscoveryHeaderSize+h.NumRec*size))
	var errs []error
	add := func(kind nvme.SubsystemType, nqn string, at netip.AddrPort, port uint16, flags nvme.EntryFlags, treq nvme.TransportRequirements) {
		var e nvme.DiscoveryEntry
		errs = append(errs, fillEntry(&e, nqn, at))
		e.SetSUBTYPE(kind)
		e.SetEFLAGS(flags)
		e.SetTREQ(treq)
		e.SetPORTID(port)
		if h.Returned&nvme.DiscoveryExtended == 0 {
			log = append(log, e[:]...)
			return
		}
		var err error
		log, err = nvme.AppendExtendedEntry(log, &e, nil)
		errs = append(errs, err)
	}
	ours := nvme.TREQNotSpecified | nvme.TREQDisableSQFlow
	add(nvme.SubsystemCurrentDiscovery, q.target.cfg.DiscoveryNQN, ports[0].at, ports[0].id, nvme.EntryPersistent, ours)
	for _, s := range subsystems {
		for _, p := range ports {
			add(nvme.SubsystemNVMe, s.cfg.NQN, p.at, p.id, 0, ours)
		}
	}
	for _, to := range referrals {
		add(nvme.SubsystemReferral, nvme.DiscoveryNQN, to, 0, 0, nvme.TREQNotSpecified)
	}
	return log, errors.Join(errs...)
}

// listedPort is a port in the discovery log.
type listedPort struct {
	at netip.AddrPort
	id uint16
}

// listedPorts returns the port of this queue and then the others. Of a port that listens on
// all addresses, only the address that the host is connected to is known to be reachable.
func (q *queuePair) listedPorts() []listedPort {
	own := netip.AddrPortFrom(q.id.LocalAddr().Addr(), q.port.Addr().Port())
	all := []listedPort{{own, q.port.ID()}}
	for _, p := range q.target.Ports() {
		if at := p.Addr(); p != q.port && !at.Addr().IsUnspecified() {
			all = append(all, listedPort{at, p.ID()})
		}
	}
	return all
}

// fillEntry fills in what all entries have.
func fillEntry(e *nvme.DiscoveryEntry, nqn string, at netip.AddrPort) error {
	address := at.Addr().Unmap().WithZone("")
	e.SetTRTYPE(nvme.TransportRDMA)
	e.SetADRFAM(nvme.AddressIPv4)
	if address.Is6() {
		e.SetADRFAM(nvme.AddressIPv6)
	}
	e.SetCNTLID(nvme.CNTLIDDynamic)
	e.SetASQSZ(adminDepth)
	e.SetRDMAQPType(nvme.RDMAConnected)
	e.SetRDMAProvider(nvme.RDMAProviderNotSpecified)
	e.SetRDMACMS(nvme.RDMACM)
	return errors.Join(e.SetTRADDR(address.String()), e.SetTRSVCID(strconv.Itoa(int(at.Port()))), e.SetSUBNQN(nqn))
}
