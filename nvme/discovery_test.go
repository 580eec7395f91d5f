package nvme

import (
	"slices"
	"testing"
)

func TestDiscoveryEntry(t *testing.T) {
	testFields(t, func() any { return new(DiscoveryEntry) }, []field{
		{"TRTYPE", 0, 1}, {"ADRFAM", 1, 1}, {"SUBTYPE", 2, 1}, {"TREQ", 3, 1}, {"PORTID", 4, 2}, {"CNTLID", 6, 2},
		{"ASQSZ", 8, 2}, {"EFLAGS", 10, 2},
		{"RDMAQPType", 768, 1}, {"RDMAProvider", 769, 1}, {"RDMACMS", 770, 1}, {"RDMAPKey", 776, 2}, {"TCPSecurity", 768, 1},
	}, "TRSVCID", "SUBNQN", "TRADDR")

	e := new(DiscoveryEntry)
	for _, err := range []error{e.SetTRSVCID("4420"), e.SetSUBNQN(DiscoveryNQN), e.SetTRADDR("10.0.0.1")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if string(e[32:38]) != "4420  " || string(e[256:260]) != "nqn." || e[256+len(DiscoveryNQN)] != 0 || string(e[512:521]) != "10.0.0.1 " {
		t.Error("texts at the wrong place, or not padded")
	}
	if e.TRSVCID() != "4420" || e.SUBNQN() != DiscoveryNQN || e.TRADDR() != "10.0.0.1" {
		t.Errorf("decoded %q %q %q", e.TRSVCID(), e.SUBNQN(), e.TRADDR())
	}
	// nvmet pads with NULs.
	copy(e[512:768], make([]byte, 256))
	copy(e[512:], "fe80::1")
	if e.TRADDR() != "fe80::1" {
		t.Errorf("nul padding: %q", e.TRADDR())
	}
}

func TestDiscoveryLog(t *testing.T) {
	h := DiscoveryHeader{GenCtr: 0x0102030405060708, NumRec: 2}
	b := h.AppendTo(nil)
	wantBytes(t, b, layout(1024, at{0, "0807060504030201 0200000000000000 0000"}))
	first, second := new(DiscoveryEntry), new(DiscoveryEntry)
	first.SetPORTID(1)
	second.SetPORTID(2)
	b = append(append(b, first[:]...), second[:]...)
	got, entries, err := ParseDiscoveryLog(b)
	if err != nil || got != h || !slices.Equal(entries, []DiscoveryEntry{*first, *second}) {
		t.Errorf("%+v, %d entries, %v", got, len(entries), err)
	}
	if got, err := ParseDiscoveryHeader(b[:20]); err != nil || got != h {
		t.Errorf("short header: %+v, %v", got, err)
	}
	for name, bad := range map[string][]byte{
		"empty":          nil,
		"19 bytes":       b[:19],
		"entry cut off":  b[:len(b)-1],
		"header only":    b[:1024],
		"huge count":     layout(2048, at{8, "ffffffffffffffff"}),
		"wrapping count": layout(2048, at{8, "0100000000004000"}), // times 1024 is 1024 in 64 bits
		"record format":  layout(2048, at{16, "0100"}),
	} {
		if _, entries, err := ParseDiscoveryLog(bad); err == nil || entries != nil {
			t.Errorf("%s: %d entries, %v", name, len(entries), err)
		}
	}
	if _, entries, err := ParseDiscoveryLog(layout(20)); err != nil || len(entries) != 0 {
		t.Errorf("no records: %d, %v", len(entries), err)
	}
}

// The words are an interface, because scripts look for those of nvme-cli.
func TestDiscoveryWords(t *testing.T) {
	type stringer interface{ String() string }
	for want, values := range map[string][]stringer{
		"rdma": {TransportType(1)}, "fc": {TransportType(2)}, "tcp": {TransportType(3)}, "loop": {TransportType(254)},
		"pci": {AddressFamily(0)}, "ipv4": {AddressFamily(1)}, "ipv6": {AddressFamily(2)},
		"infiniband": {AddressFamily(3), RDMAProvider(2)}, "fibre-channel": {AddressFamily(4)},
		"discovery subsystem referral": {SubsystemType(1)}, "nvme subsystem": {SubsystemType(2)},
		"current discovery subsystem": {SubsystemType(3)},
		"not specified":               {TransportRequirements(0), RDMAProvider(1)},
		"required":                    {TransportRequirements(1)}, "not required": {TransportRequirements(2)},
		"not specified, sq flow control disable supported": {TransportRequirements(4)},
		"required, sq flow control disable supported":      {TransportRequirements(5)},
		"not required, sq flow control disable supported":  {TransportRequirements(6)},
		"none":                            {EntryFlags(0)},
		"duplicate discovery information": {EntryFlags(1)},
		"explicit discovery connections":  {EntryFlags(2)},
		"explicit discovery connections, duplicate discovery information": {EntryFlags(3)},
		"no cdc connectivity": {EntryFlags(4)},
		"explicit discovery connections, duplicate discovery information, no cdc connectivity": {EntryFlags(7)},
		"roce": {RDMAProvider(3)}, "roce-v2": {RDMAProvider(4)}, "iwarp": {RDMAProvider(5)},
		"connected": {RDMAQPType(1)}, "datagram": {RDMAQPType(2)}, "rdma-cm": {RDMACMS(1)},
		"unrecognized": {TransportType(0), TransportType(4), AddressFamily(5), AddressFamily(254), SubsystemType(0),
			TransportRequirements(3), TransportRequirements(7), TransportRequirements(8), EntryFlags(8), RDMAProvider(0),
			RDMAQPType(0), RDMACMS(0)},
	} {
		for _, v := range values {
			if got := v.String(); got != want {
				t.Errorf("%T %d: %q, want %q", v, v, got, want)
			}
		}
	}
	if TREQNotSpecified.DisableSQFlow() || !(TREQRequired | TREQDisableSQFlow).DisableSQFlow() {
		t.Error("flow control is bit 2")
	}
}
