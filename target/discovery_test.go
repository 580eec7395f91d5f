package target

import (
	"encoding/binary"
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

// TestDiscoveryOfPort: a host may ask for the entries of its own port only, and log page 00h
// says so. What the target does not have is not returned.
func TestDiscoveryOfPort(t *testing.T) {
	r := newRig(t, Config{}, SubsystemConfig{})
	if err := r.target.AddReferral(netip.MustParseAddrPort("192.0.2.9:4420")); err != nil {
		t.Fatal(err)
	}
	h := r.admin(nvme.DiscoveryNQN)
	page := h.log(nvme.LogSupported, nvme.LogSupportedSize)
	for lid, want := range map[uint8]uint32{nvme.LogSupported: 1, nvme.LogDiscovery: 1 | (nvme.DiscoveryExtended|nvme.DiscoveryPortOnly)<<16, nvme.LogANA: 0} {
		if got := binary.LittleEndian.Uint32(page[4*int(lid):]); got != want {
			t.Errorf("log page %02xh: %#x, want %#x", lid, got, want)
		}
	}
	for asked, want := range map[uint8]nvme.DiscoveryHeader{
		0:                      {NumRec: 3},
		nvme.DiscoveryPortOnly: {NumRec: 2, Returned: nvme.DiscoveryPortOnly},
		nvme.DiscoveryAll:      {NumRec: 3},
		nvme.DiscoveryExtended: {NumRec: 3, Returned: nvme.DiscoveryExtended, Length: 1024 + 3*nvme.ExtendedEntryMin},
		0x7f:                   {NumRec: 2, Returned: nvme.DiscoveryExtended | nvme.DiscoveryPortOnly, Length: 1024 + 2*nvme.ExtendedEntryMin},
	} {
		got, err := nvme.ParseDiscoveryHeader(h.logWith(nvme.LogDiscovery, asked, nvme.DiscoveryHeaderSize))
		want.GenCtr = got.GenCtr
		if err != nil || got != want {
			t.Errorf("asked for %#x: %+v, %v, want %+v", asked, got, err, want)
		}
	}
}
