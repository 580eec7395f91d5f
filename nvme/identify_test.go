package nvme

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestIdentifyControllerFields(t *testing.T) {
	testFields(t, func() any { return new(IdentifyController) }, []field{
		{"VID", 0, 2}, {"SSVID", 2, 2}, {"RAB", 72, 1}, {"CMIC", 76, 1}, {"MDTS", 77, 1}, {"CNTLID", 78, 2},
		{"VER", 80, 4}, {"RTD3R", 84, 4}, {"RTD3E", 88, 4}, {"OAES", 92, 4}, {"CTRATT", 96, 4}, {"CNTRLTYPE", 111, 1},
		{"CRDT1", 128, 2}, {"CRDT2", 130, 2}, {"CRDT3", 132, 2}, {"OACS", 256, 2}, {"ACL", 258, 1}, {"AERL", 259, 1},
		{"FRMW", 260, 1}, {"LPA", 261, 1}, {"ELPE", 262, 1}, {"WCTEMP", 266, 2}, {"CCTEMP", 268, 2}, {"MTFA", 270, 2},
		{"KAS", 320, 2}, {"SANICAP", 328, 4}, {"ANATT", 342, 1}, {"ANACAP", 343, 1}, {"ANAGRPMAX", 344, 4},
		{"NANAGRPID", 348, 4}, {"CQT", 386, 2}, {"SQES", 512, 1}, {"CQES", 513, 1}, {"MAXCMD", 514, 2}, {"NN", 516, 4}, {"ONCS", 520, 2},
		{"FUSES", 522, 2}, {"FNA", 524, 1}, {"VWC", 525, 1}, {"AWUN", 526, 2}, {"AWUPF", 528, 2}, {"ACWU", 532, 2},
		{"SGLS", 536, 4}, {"MNAN", 540, 4}, {"IOCCSZ", 1792, 4}, {"IORCSZ", 1796, 4}, {"ICDOFF", 1800, 2},
		{"FCATTR", 1802, 1}, {"MSDBD", 1803, 1}, {"OFCS", 1804, 2}, {"DCTYPE", 1806, 1},
	}, "SN", "MN", "FR", "SUBNQN")
}

func TestIdentifyControllerText(t *testing.T) {
	c := new(IdentifyController)
	for _, err := range []error{c.SetSN("S1"), c.SetMN("a model"), c.SetFR("6.12"), c.SetSUBNQN("nqn.x")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	wantBytes(t, c[:], layout(4096,
		at{4, "5331" + strings.Repeat("20", 18)},
		at{24, "61206d6f64656c" + strings.Repeat("20", 33)},
		at{64, "362e3132" + strings.Repeat("20", 4)},
		at{768, "6e716e2e78"}))
	if c.SN() != "S1" || c.MN() != "a model" || c.FR() != "6.12" || c.SUBNQN() != "nqn.x" {
		t.Errorf("decoded %q %q %q %q", c.SN(), c.MN(), c.FR(), c.SUBNQN())
	}
	if err := c.SetSN(strings.Repeat("9", 21)); err == nil {
		t.Error("21 bytes fit in a serial number of 20")
	}
	if err := c.SetSUBNQN(strings.Repeat("x", 224)); !errors.Is(err, ErrInvalidNQN) {
		t.Errorf("long nqn: %v", err)
	}
	if c.SN() != "S1" || c.SUBNQN() != "nqn.x" {
		t.Error("a refused text left bytes")
	}
	// Padding with NUL instead of spaces.
	copy(c[64:72], "7.3\x00\x00\x00\x00\x00")
	if c.FR() != "7.3" {
		t.Errorf("nul padding: %q", c.FR())
	}
	// A full field does not run into the next one.
	copy(c[4:24], strings.Repeat("9", 20))
	if got := c.SN(); got != strings.Repeat("9", 20) {
		t.Errorf("full field: %q", got)
	}
}

func TestIdentifyControllerDerived(t *testing.T) {
	c := new(IdentifyController)
	for _, tt := range []struct {
		mdts, mpsmin uint8
		want         uint64
	}{{0, 0, 0}, {8, 0, 1 << 20}, {5, 0, 128 << 10}, {1, 4, 128 << 10}, {51, 0, 1 << 63}, {52, 0, 0}, {255, 15, 0}} {
		c.SetMDTS(tt.mdts)
		if got := c.MaxTransfer(tt.mpsmin); got != tt.want {
			t.Errorf("mdts %d mpsmin %d: %d, want %d", tt.mdts, tt.mpsmin, got, tt.want)
		}
	}
	for ioccsz, want := range map[uint32]uint64{0: 0, 3: 0, 4: 0, 5: 16, 260: 4096, 0xFFFFFFFF: 0xFFFFFFFF*16 - 64} {
		c.SetIOCCSZ(ioccsz)
		if got := c.InCapsuleBytes(); got != want {
			t.Errorf("ioccsz %d: %d bytes, want %d", ioccsz, got, want)
		}
	}
	for _, tt := range []struct {
		msdbd        uint8
		sgls, ioccsz uint32
		want         int
	}{
		{1, 0x100005, 260, 1},   // nvmet
		{16, 0x100005, 260, 16}, // SPDK
		{16, 5, 260, 1},         // no offsets
		{16, 0x100005, 4 + 5, 5},
		{16, 0x100005, 5, 1},
		{16, 0x100005, 4, 1},
		{16, 0x100005, 0, 1},
		{0, 0x100005, 260, 1}, // no limit, or not known
		{255, 0x100005, 0xFFFFFFFF, 255},
	} {
		c.SetMSDBD(tt.msdbd)
		c.SetSGLS(tt.sgls)
		c.SetIOCCSZ(tt.ioccsz)
		if got := c.KeyedDescriptors(); got != tt.want {
			t.Errorf("msdbd %d, sgls %#x, ioccsz %d: %d descriptors, want %d", tt.msdbd, tt.sgls, tt.ioccsz, got, tt.want)
		}
	}
	c.SetCRDT1(1)
	c.SetCRDT2(20)
	c.SetCRDT3(300)
	for crd, want := range []uint16{0, 1, 20, 300, 0} {
		if got := c.CRDT(uint8(crd)); got != want {
			t.Errorf("crd %d: %d, want %d", crd, got, want)
		}
	}
	if c.TBKAS() {
		t.Error("tbkas without its bit")
	}
	c.SetCTRATT(1 << 6)
	if !c.TBKAS() {
		t.Error("tbkas is bit 6 of ctratt")
	}
	// As nvmet fills it in
	c.SetSGLS(0x100005)
	if s := c.SGLS(); s&SGLSKeyed == 0 || s&SGLSOffset == 0 || s&SGLSSupportMask != 1 {
		t.Errorf("sgls %#x", s)
	}
	c.SetOAES(0x900)
	if o := c.OAES(); o != AENNamespaceAttribute|AENANAChange {
		t.Errorf("oaes %#x", o)
	}
	c.SetONCS(0x2C)
	if o := c.ONCS(); o != ONCSDSM|ONCSWriteZeroes|ONCSReservations {
		t.Errorf("oncs %#x", o)
	}
}

func TestIdentifyNamespaceFields(t *testing.T) {
	testFields(t, func() any { return new(IdentifyNamespace) }, []field{
		{"NSZE", 0, 8}, {"NCAP", 8, 8}, {"NUSE", 16, 8}, {"NSFEAT", 24, 1}, {"NLBAF", 25, 1}, {"FLBAS", 26, 1},
		{"MC", 27, 1}, {"DPC", 28, 1}, {"DPS", 29, 1}, {"NMIC", 30, 1}, {"RESCAP", 31, 1}, {"FPI", 32, 1}, {"DLFEAT", 33, 1},
		{"NAWUN", 34, 2}, {"NAWUPF", 36, 2}, {"NACWU", 38, 2}, {"NABSN", 40, 2}, {"NABO", 42, 2}, {"NABSPF", 44, 2},
		{"NOIOB", 46, 2}, {"NPWG", 64, 2}, {"NPWA", 66, 2}, {"NPDG", 68, 2}, {"NPDA", 70, 2}, {"NOWS", 72, 2},
		{"MSSRL", 74, 2}, {"MCL", 76, 4}, {"MSRC", 80, 1}, {"NULBAF", 82, 1}, {"ANAGRPID", 92, 4}, {"NSATTR", 99, 1},
		{"NVMSETID", 100, 2}, {"ENDGID", 102, 2}, {"NGUID", 104, 16}, {"EUI64", 120, 8},
	}, "LBAFormat", "OPTPERF")
}

func TestIdentifyNamespaceFormats(t *testing.T) {
	n := new(IdentifyNamespace)
	n.SetLBAFormat(0, LBAFormat{LBADS: 9, RP: 2})
	n.SetLBAFormat(1, LBAFormat{MS: 0x0102, LBADS: 12})
	n.SetLBAFormat(63, LBAFormat{MS: 8, LBADS: 12, RP: 3})
	wantBytes(t, n[:], layout(4096, at{128, "00000902 02010c00"}, at{380, "08000c03"}))
	if got := n.LBAFormat(63); got != (LBAFormat{MS: 8, LBADS: 12, RP: 3}) {
		t.Errorf("format 63: %+v", got)
	}
	wantPanic(t, "format 64", func() { n.LBAFormat(64) })
	wantPanic(t, "format -1", func() { n.LBAFormat(-1) })

	for _, tt := range []struct {
		flbas, nlbaf, nulbaf uint8
		index                int
		extended             bool
	}{
		{0x00, 0, 0, 0, false},
		{0x01, 1, 0, 1, false},
		{0x11, 1, 0, 1, true},
		{0x6F, 15, 0, 15, false}, // 16 formats: the upper bits do not count
		{0x6F, 16, 0, 63, false},
		{0x25, 15, 1, 21, false},
		{0x50, 40, 0, 32, true},
		{0x80, 40, 0, 0, false},
	} {
		n.SetFLBAS(tt.flbas)
		n.SetNLBAF(tt.nlbaf)
		n.SetNULBAF(tt.nulbaf)
		if n.FormatIndex() != tt.index || n.ExtendedLBA() != tt.extended {
			t.Errorf("flbas %#x nlbaf %d nulbaf %d: %d %v, want %d %v", tt.flbas, tt.nlbaf, tt.nulbaf,
				n.FormatIndex(), n.ExtendedLBA(), tt.index, tt.extended)
		}
	}
	n.SetFLBAS(0x6F)
	n.SetNLBAF(63)
	if n.Format() != n.LBAFormat(63) {
		t.Errorf("format in use: %+v", n.Format())
	}
}

func TestIdentifyNamespaceBits(t *testing.T) {
	n := new(IdentifyNamespace)
	n.SetDLFEAT(0x09)
	if n.DeallocatedRead() != DLFEATZeroes || !n.WriteZeroesDEAC() {
		t.Errorf("dlfeat 09h: %d %v", n.DeallocatedRead(), n.WriteZeroesDEAC())
	}
	n.SetDLFEAT(0x12)
	if n.DeallocatedRead() != DLFEATOnes || n.WriteZeroesDEAC() {
		t.Errorf("dlfeat 12h: %d %v", n.DeallocatedRead(), n.WriteZeroesDEAC())
	}
	n.SetNSFEAT(0xCF)
	if n.OPTPERF() != 0 {
		t.Errorf("optperf %d", n.OPTPERF())
	}
	n.SetOPTPERF(2)
	if n.OPTPERF() != 2 || n.NSFEAT() != 0xEF {
		t.Errorf("optperf %d, nsfeat %#x", n.OPTPERF(), n.NSFEAT())
	}
	if n.WriteProtected() || n.Shared() {
		t.Error("bits that are not set")
	}
	n.SetNSATTR(1)
	n.SetNMIC(1)
	if !n.WriteProtected() || !n.Shared() {
		t.Error("bits that are set")
	}
}

func TestIdentifyNVMFields(t *testing.T) {
	testFields(t, func() any { return new(IdentifyNamespaceNVM) }, []field{
		{"NPDGL", 268, 4}, {"NPRG", 272, 4}, {"NPRA", 276, 4}, {"NORS", 280, 4}, {"NPDAL", 284, 4},
	})
	testFields(t, func() any { return new(IdentifyControllerNVM) }, []field{
		{"VSL", 0, 1}, {"WZSL", 1, 1}, {"WUSL", 2, 1}, {"DMRL", 3, 1}, {"DMRSL", 4, 4}, {"DMSL", 8, 8},
	})
}

func TestIdentifyNSIndependent(t *testing.T) {
	testFields(t, func() any { return new(IdentifyNSIndependent) }, []field{
		{"NSFEAT", 0, 1}, {"NMIC", 1, 1}, {"RESCAP", 2, 1}, {"FPI", 3, 1}, {"ANAGRPID", 4, 4}, {"NSATTR", 8, 1},
		{"NVMSETID", 10, 2}, {"ENDGID", 12, 2}, {"NSTAT", 14, 1},
	})
	n := new(IdentifyNSIndependent)
	if n.Ready() || n.WriteProtected() {
		t.Error("zero: not ready, writable")
	}
	n.SetNSTAT(1)
	n.SetNSATTR(1)
	if !n.Ready() || !n.WriteProtected() {
		t.Error("nstat bit 0 is ready, nsattr bit 0 is write protected")
	}
}

func TestActiveNSList(t *testing.T) {
	l := new(ActiveNSList)
	if n := l.Set([]uint32{1, 0x01020304}); n != 2 {
		t.Errorf("stored %d", n)
	}
	wantBytes(t, l[:], layout(4096, at{0, "01000000 04030201"}))
	if ids, err := l.NSIDs(); err != nil || !slices.Equal(ids, []uint32{1, 0x01020304}) {
		t.Errorf("%v, %v", ids, err)
	}
	// The bytes after the 0 are not part of the list.
	le.PutUint32(l[12:16], 9)
	if ids, err := l.NSIDs(); err != nil || len(ids) != 2 {
		t.Errorf("after the end: %v, %v", ids, err)
	}
	many := make([]uint32, 1025)
	for i := range many {
		many[i] = uint32(i) + 1
	}
	if n := l.Set(many); n != 1024 {
		t.Errorf("stored %d of 1025", n)
	}
	if ids, err := l.NSIDs(); err != nil || !slices.Equal(ids, many[:1024]) {
		t.Errorf("full list: %d ids, %v", len(ids), err)
	}
	for _, bad := range [][]uint32{{2, 1}, {3, 3}} {
		l.Set(bad)
		if ids, err := l.NSIDs(); !errors.Is(err, ErrNSListOrder) || ids != nil {
			t.Errorf("%v: %v, %v", bad, ids, err)
		}
	}
}

func TestNamespaceDescriptors(t *testing.T) {
	ids := NamespaceIDs{
		EUI64: [8]byte{1, 2, 3, 4, 5, 6, 7, 8}, NGUID: [16]byte{0xA0, 15: 0xAF},
		UUID: UUID{0xB0, 15: 0xBF}, CSI: 2, HasCSI: true,
	}
	golden := layout(61,
		at{0, "01 08 0000 0102030405060708"},
		at{12, "02 10 0000 a0"}, at{31, "af"},
		at{32, "03 10 0000 b0"}, at{51, "bf"},
		at{52, "04 01 0000 02"})[:57]
	wantBytes(t, ids.AppendTo(nil), golden)
	list := append(bytes.Clone(golden), make([]byte, 4096-57)...)
	if got, err := ParseNamespaceDescriptors(list); err != nil || got != ids {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := ParseNamespaceDescriptors(golden); err != nil || got != ids {
		t.Errorf("list without end mark: %+v, %v", got, err)
	}
	if got, err := ParseNamespaceDescriptors(nil); err != nil || got != (NamespaceIDs{}) {
		t.Errorf("empty: %+v, %v", got, err)
	}
	// An unknown type is skipped.
	future := append(layout(9, at{0, "77 05 0000"}), golden...)
	if got, err := ParseNamespaceDescriptors(future); err != nil || got != ids {
		t.Errorf("unknown type: %+v, %v", got, err)
	}
	for name, bad := range map[string][]byte{
		"short uuid":    layout(20, at{0, "03 0f"}),
		"long csi":      layout(20, at{0, "04 02"}),
		"eui64 of 16":   layout(20, at{0, "01 10"}),
		"past the end":  layout(19, at{0, "03 10"}),
		"unknown, past": layout(8, at{0, "77 05"}),
	} {
		if got, err := ParseNamespaceDescriptors(bad); err == nil || got != (NamespaceIDs{}) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}
