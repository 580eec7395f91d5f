package nvme

import (
	"slices"
	"testing"
)

func TestANALog(t *testing.T) {
	b := AppendANAHeader(nil, 0x0102030405060708, 2)
	b = AppendANAGroup(b, 1, 0x11, ANAOptimized, 7, 0x01020304)
	b = AppendANAGroup(b, 0x0A0B0C0D, 0x1112131415161718, ANAChange)
	wantBytes(t, b, layout(88,
		at{0, "0807060504030201 0200"},
		at{16, "01000000 02000000 1100000000000000 01"}, at{48, "07000000 04030201"},
		at{56, "0d0c0b0a 00000000 1817161514131211 0f"}))

	l, err := ParseANALog(append(b, 0xFF, 0xFF)) // bytes after the last group do not matter
	if err != nil {
		t.Fatal(err)
	}
	if l.ChangeCount() != 0x0102030405060708 || l.NumGroups() != 2 {
		t.Errorf("header: %#x %d", l.ChangeCount(), l.NumGroups())
	}
	groups := slices.Collect(l.Groups())
	if len(groups) != 2 {
		t.Fatalf("%d groups", len(groups))
	}
	g := groups[0]
	if g.ID != 1 || g.ChangeCount != 0x11 || g.State != ANAOptimized || g.NumNSIDs() != 2 ||
		!slices.Equal(slices.Collect(g.NSIDs()), []uint32{7, 0x01020304}) {
		t.Errorf("group 1: %+v", g)
	}
	g = groups[1]
	if g.ID != 0x0A0B0C0D || g.State != ANAChange || g.NumNSIDs() != 0 || slices.Collect(g.NSIDs()) != nil {
		t.Errorf("group 2: %+v", g)
	}
	// Both iterators may be left early.
	for g := range l.Groups() {
		for id := range g.NSIDs() {
			if id != 7 {
				t.Errorf("nsid %d", id)
			}
			break
		}
		break
	}
	for range (ANALog{}).Groups() {
		t.Error("the zero log has a group")
	}
}

func TestANALogErrors(t *testing.T) {
	whole := AppendANAGroup(AppendANAHeader(nil, 1, 1), 1, 1, ANAOptimized, 1, 2)
	for n := range len(whole) {
		if _, err := ParseANALog(whole[:n]); err == nil {
			t.Errorf("cut to %d of %d bytes: no error", n, len(whole))
		}
	}
	for name, b := range map[string][]byte{
		"group id 0": AppendANAGroup(AppendANAHeader(nil, 1, 1), 0, 1, ANAOptimized, 1),
		"state 0":    AppendANAGroup(AppendANAHeader(nil, 1, 1), 1, 1, 0, 1),
		"state 16":   AppendANAGroup(AppendANAHeader(nil, 1, 1), 1, 1, 16, 1),
		"no group":   AppendANAHeader(nil, 1, 1),
		// 2^30 namespaces are 2^32 bytes, which is 0 in 32 bits.
		"huge":       layout(64, at{8, "0100"}, at{16, "01000000 00000040"}, at{32, "01"}),
		"huge, full": layout(64, at{8, "0100"}, at{16, "01000000 ffffffff"}, at{32, "01"}),
	} {
		if _, err := ParseANALog(b); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestANALogSize(t *testing.T) {
	if got := ANALogSize(128, 1024); got != 16+128*32+1024*4 {
		t.Errorf("nvmet: %d", got)
	}
	if got := ANALogSize(0xFFFFFFFF, 0xFFFFFFFF); got != 16+0xFFFFFFFF*36 {
		t.Errorf("largest: %d", got)
	}
}

func TestANAState(t *testing.T) {
	for s, want := range map[ANAState]struct {
		words  string
		usable bool
	}{
		1: {"optimized", true}, 2: {"non-optimized", true}, 3: {"inaccessible", false},
		4: {"persistent-loss", false}, 15: {"change", false}, 9: {"ana state 9", false},
	} {
		if s.String() != want.words || s.Usable() != want.usable {
			t.Errorf("%d: %q %v", uint8(s), s.String(), s.Usable())
		}
	}
}
