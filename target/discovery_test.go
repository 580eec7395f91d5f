package target

import (
	"net/netip"
	"testing"

	"ublk-nvmeof/nvme"
)

// discoveryLog reads the discovery log.
func (h *hostQueue) discoveryLog() (nvme.DiscoveryHeader, []nvme.DiscoveryEntry) {
	h.t.Helper()
	header, err := nvme.ParseDiscoveryHeader(h.log(nvme.LogDiscovery, nvme.DiscoveryHeaderSize))
	if err != nil {
		h.t.Fatal(err)
	}
	_, entries, err := nvme.ParseDiscoveryLog(h.log(nvme.LogDiscovery, nvme.DiscoveryHeaderSize+int(header.NumRec)*nvme.DiscoveryEntrySize))
	if err != nil {
		h.t.Fatal(err)
	}
	return header, entries
}

func TestReferrals(t *testing.T) {
	r := newRig(t, Config{}, SubsystemConfig{})
	h := r.admin(nvme.DiscoveryNQN)
	h.arm(1)
	before, _ := h.discoveryLog()
	first, second := netip.MustParseAddrPort("192.0.2.9:4420"), netip.MustParseAddrPort("[fd00::9]:8009")
	for _, to := range []netip.AddrPort{first, second} {
		if err := r.target.AddReferral(to); err != nil {
			t.Fatal(err)
		}
	}
	h.event(1, nvme.NoticeDiscoveryChanged)
	after, entries := h.discoveryLog()
	if after.GenCtr != before.GenCtr+2 || len(entries) != 4 {
		t.Fatalf("%+v after %+v", after, before)
	}
	for i, want := range []struct {
		kind    nvme.SubsystemType
		family  nvme.AddressFamily
		nqn     string
		address string
		service string
		flags   nvme.EntryFlags
	}{
		{nvme.SubsystemCurrentDiscovery, nvme.AddressIPv4, nvme.DiscoveryNQN, targetAddr.String(), "4420", nvme.EntryPersistent},
		{nvme.SubsystemNVMe, nvme.AddressIPv4, testNQN, targetAddr.String(), "4420", 0},
		{nvme.SubsystemReferral, nvme.AddressIPv4, nvme.DiscoveryNQN, "192.0.2.9", "4420", 0},
		{nvme.SubsystemReferral, nvme.AddressIPv6, nvme.DiscoveryNQN, "fd00::9", "8009", 0},
	} {
		e := &entries[i]
		if e.SUBTYPE() != want.kind || e.ADRFAM() != want.family || e.SUBNQN() != want.nqn || e.TRADDR() != want.address || e.TRSVCID() != want.service || e.EFLAGS() != want.flags {
			t.Errorf("entry %d: %v %v %s %s:%s %v", i, e.SUBTYPE(), e.ADRFAM(), e.SUBNQN(), e.TRADDR(), e.TRSVCID(), e.EFLAGS())
		}
	}
	h.arm(2)
	if err := r.target.RemoveReferral(first); err != nil {
		t.Fatal(err)
	}
	h.event(2, nvme.NoticeDiscoveryChanged)
	if got := r.target.Referrals(); len(got) != 1 || got[0] != second {
		t.Errorf("referrals %v", got)
	}
	for name, err := range map[string]error{
		"twice":       r.target.AddReferral(second),
		"unspecified": r.target.AddReferral(netip.MustParseAddrPort("0.0.0.0:4420")),
		"multicast":   r.target.AddReferral(netip.MustParseAddrPort("224.0.0.1:4420")),
		"port 0":      r.target.AddReferral(netip.MustParseAddrPort("192.0.2.9:0")),
		"no address":  r.target.AddReferral(netip.AddrPort{}),
		"not there":   r.target.RemoveReferral(first),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestDiscoveryEventOfOthers: a host hears only of changes of its own log.
func TestDiscoveryEventOfOthers(t *testing.T) {
	r := newRig(t, Config{}, SubsystemConfig{})
	h := r.admin(nvme.DiscoveryNQN)
	h.arm(1)
	const other = "nqn.2026-01.org.example:other"
	if _, err := r.target.AddSubsystem(SubsystemConfig{NQN: other, AllowHosts: []string{"nqn.2026-01.org.example:stranger"}}); err != nil {
		t.Fatal(err)
	}
	if err := r.target.RemoveSubsystem(other); err != nil {
		t.Fatal(err)
	}
	for _, c := range r.target.controllers.of(r.target.discovery) {
		c.mu.Lock()
		if c.masked[eventDiscovery] || len(c.waiting) > 0 {
			t.Error("the host hears of a subsystem that it may not use")
		}
		c.mu.Unlock()
	}
	if _, err := r.target.AddSubsystem(SubsystemConfig{NQN: other, AllowHosts: []string{hostNQN}}); err != nil {
		t.Fatal(err)
	}
	h.event(1, nvme.NoticeDiscoveryChanged)
	h.arm(2)
	h.discoveryLog()
	if err := r.target.RemoveSubsystem(testNQN); err != nil {
		t.Fatal(err)
	}
	h.event(2, nvme.NoticeDiscoveryChanged)
	if _, entries := h.discoveryLog(); len(entries) != 2 || entries[1].SUBNQN() != other {
		t.Errorf("%d entries", len(entries))
	}
}
