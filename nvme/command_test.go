package nvme

import (
	"bytes"
	"strings"
	"testing"
)

// dirty returns a command full of ones, which reveals a builder that does not write a
// byte.
func dirty() *Command {
	return CommandAt(bytes.Repeat([]byte{0xFF}, CommandSize))
}

func TestCommandBuilders(t *testing.T) {
	// Byte 1 is 40h (SGLs used) and byte 39 is 40h (keyed descriptor) in each.
	base := []at{{1, "40"}, {39, "40"}}
	for _, tt := range []struct {
		name  string
		build func(c *Command)
		want  []at
	}{
		{"read", func(c *Command) { c.SetRead(0x01020304, 0x1112131415161718, 0x2122, false) },
			[]at{{0, "02"}, {4, "04030201"}, {40, "1817161514131211"}, {48, "2121"}}},
		{"read fua, one block", func(c *Command) { c.SetRead(1, 0, 1, true) },
			[]at{{0, "02"}, {4, "01"}, {51, "40"}}},
		{"write", func(c *Command) { c.SetWrite(7, 0x80000000000000FF, 65536, false) },
			[]at{{0, "01"}, {4, "07"}, {40, "ff00000000000080"}, {48, "ffff"}}},
		{"write fua", func(c *Command) { c.SetWrite(7, 8, 256, true) },
			[]at{{0, "01"}, {4, "07"}, {40, "08"}, {48, "ff000040"}}},
		{"write limited retry", func(c *Command) { c.SetWrite(7, 8, 256, true); c.SetLimitedRetry() },
			[]at{{0, "01"}, {4, "07"}, {40, "08"}, {48, "ff0000c0"}}},
		{"flush", func(c *Command) { c.SetFlush(NSIDAll) },
			[]at{{0, "00"}, {4, "ffffffff"}}},
		{"dsm", func(c *Command) { c.SetDSM(3, 256) },
			[]at{{0, "09"}, {4, "03"}, {40, "ff"}, {44, "04"}}},
		{"write zeroes", func(c *Command) { c.SetWriteZeroes(3, 0x55, 2, false, false) },
			[]at{{0, "08"}, {4, "03"}, {40, "55"}, {48, "01"}}},
		{"write zeroes fua deac", func(c *Command) { c.SetWriteZeroes(3, 0x55, 2, true, true) },
			[]at{{0, "08"}, {4, "03"}, {40, "55"}, {48, "01000042"}}},
		{"identify", func(c *Command) { c.SetIdentify(0x06, 0x0A0B0C0D, 2) },
			[]at{{0, "06"}, {4, "0d0c0b0a"}, {40, "06"}, {47, "02"}}},
		{"set features", func(c *Command) { c.SetSetFeatures(FeatureNumberOfQueues, 0x00070003) },
			[]at{{0, "09"}, {40, "07"}, {44, "03000700"}}},
		{"get features", func(c *Command) { c.SetGetFeatures(FeatureKeepAlive) },
			[]at{{0, "0a"}, {40, "0f"}}},
		{"get log page", func(c *Command) { c.SetGetLogPage(0x70, NSIDAll, 0x00040008, 0x0000000112345678, false) },
			// 65538 dwords: NUMD 0x00010001.
			[]at{{0, "02"}, {4, "ffffffff"}, {40, "70"}, {42, "01000100"}, {48, "7856341201000000"}}},
		{"get log page rae", func(c *Command) { c.SetGetLogPage(0x0C, 0, 4096, 0, true) },
			[]at{{0, "02"}, {40, "0c80ff03"}}},
		{"reservation report", func(c *Command) { c.SetReservationReport(3, 4096, true) },
			[]at{{0, "0e"}, {4, "03"}, {40, "ff03"}, {44, "01"}}},
		{"reservation register", func(c *Command) { c.SetReservationRegister(3, 2, true, 3) },
			[]at{{0, "0d"}, {4, "03"}, {40, "0a0000c0"}}},
		{"reservation acquire", func(c *Command) { c.SetReservationAcquire(3, 1, false, 6) },
			[]at{{0, "11"}, {4, "03"}, {40, "0106"}}},
		{"reservation release", func(c *Command) { c.SetReservationRelease(3, 1, true, 2) },
			[]at{{0, "15"}, {4, "03"}, {40, "0902"}}},
		{"async event", func(c *Command) { c.SetAsyncEvent() }, []at{{0, "0c"}}},
		{"keep alive", func(c *Command) { c.SetKeepAlive() }, []at{{0, "18"}}},
		{"abort", func(c *Command) { c.SetAbort(0x0102, 0x0304) }, []at{{0, "08"}, {40, "02010403"}}},
		{"connect", func(c *Command) { c.SetConnect(0x0102, 0x007F, 0x00001388, true) },
			[]at{{0, "7f"}, {4, "01"}, {42, "0201"}, {44, "7f00"}, {46, "04"}, {48, "88130000"}}},
		{"connect with flow control", func(c *Command) { c.SetConnect(0, 31, 5000, false) },
			[]at{{0, "7f"}, {4, "01"}, {44, "1f00"}, {48, "88130000"}}},
		{"property get 8", func(c *Command) { c.SetPropertyGet(0x00, true) },
			[]at{{0, "7f"}, {4, "04"}, {40, "01"}}},
		{"property get 4", func(c *Command) { c.SetPropertyGet(0x1C, false) },
			[]at{{0, "7f"}, {4, "04"}, {44, "1c"}}},
		{"property set", func(c *Command) { c.SetPropertySet(0x14, 0x00460001, false) },
			[]at{{0, "7f"}, {4, "00"}, {44, "14"}, {48, "01004600"}}},
		{"property set 8", func(c *Command) { c.SetPropertySet(0x28, 0x0102030405060708, true) },
			[]at{{0, "7f"}, {4, "00"}, {40, "01"}, {44, "28"}, {48, "0807060504030201"}}},
		{"auth send", func(c *Command) { c.SetAuthSend(0x0102) },
			[]at{{0, "7f"}, {4, "05"}, {41, "0101e9"}, {44, "0201"}}},
		{"auth receive", func(c *Command) { c.SetAuthReceive(4096) },
			[]at{{0, "7f"}, {4, "06"}, {41, "0101e9"}, {44, "0010"}}},
		{"disconnect", func(c *Command) { c.SetDisconnect() }, []at{{0, "7f"}, {4, "08"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := dirty()
			tt.build(c)
			wantBytes(t, c[:], layout(CommandSize, append(base, tt.want...)...))
			if c.SGL() != NoDataSGL() {
				t.Errorf("descriptor %v, want no data", c.SGL())
			}
		})
	}
}

func TestCommandFields(t *testing.T) {
	testFields(t, func() any { return new(Command) }, []field{
		{"Opcode", 0, 1}, {"Flags", 1, 1}, {"CID", 2, 2}, {"FCType", 4, 1}, {"NSID", 4, 4},
		{"CDW2", 8, 4}, {"CDW3", 12, 4}, {"MPTR", 16, 8}, {"SGL", 24, 16},
		{"CDW10", 40, 4}, {"CDW11", 44, 4}, {"CDW12", 48, 4}, {"CDW13", 52, 4}, {"CDW14", 56, 4}, {"CDW15", 60, 4},
	},
		// Builders and descriptor setters, tested with golden bytes.
		"Read", "Write", "WriteZeroes", "Flush", "DSM", "Identify", "SetFeatures", "GetFeatures", "GetLogPage",
		"ReservationReport", "ReservationRegister", "ReservationAcquire", "ReservationRelease",
		"AsyncEvent", "KeepAlive", "Abort", "Connect", "PropertyGet", "PropertySet", "AuthSend", "AuthReceive",
		"Disconnect", "LogSpecific", "LimitedRetry", "KeyedSGL", "InCapsuleSGL", "LastSegmentSGL", "NoData")
}

// A controller reads the commands of a host.
func TestCommandDecode(t *testing.T) {
	c := new(Command)
	c.SetWrite(3, 1<<40, 65536, true)
	if c.SLBA() != 1<<40 || c.NLB() != 65536 || !c.FUA() || c.DEAC() {
		t.Errorf("write: slba %d nlb %d fua %v deac %v", c.SLBA(), c.NLB(), c.FUA(), c.DEAC())
	}
	c.SetWriteZeroes(3, 9, 1, false, true)
	if c.SLBA() != 9 || c.NLB() != 1 || c.FUA() || !c.DEAC() {
		t.Errorf("write zeroes: slba %d nlb %d fua %v deac %v", c.SLBA(), c.NLB(), c.FUA(), c.DEAC())
	}
	c.SetDSM(1, 17)
	if c.DSMRanges() != 17 || !c.DSMDeallocate() {
		t.Errorf("dsm: %d ranges, deallocate %v", c.DSMRanges(), c.DSMDeallocate())
	}
	c.SetIdentify(CNSControllerCSI, 5, CSIZoned)
	if c.CNS() != CNSControllerCSI || c.NSID() != 5 || c.IdentifyCSI() != CSIZoned || c.IdentifyCNTID() != 0 {
		t.Errorf("identify: cns %d nsid %d csi %d", c.CNS(), c.NSID(), c.IdentifyCSI())
	}
	c.SetSetFeatures(FeatureAsyncEvent, AENDiscoveryChange)
	if c.FeatureID() != FeatureAsyncEvent || c.CDW11() != AENDiscoveryChange {
		t.Errorf("features: fid %d cdw11 %#x", c.FeatureID(), c.CDW11())
	}
	c.SetGetLogPage(LogANA, 0, 0xFFFFFFFC, 1<<33, true)
	if lid, length, offset, rae := c.LogPage(); lid != LogANA || length != 0xFFFFFFFC || offset != 1<<33 || !rae {
		t.Errorf("log page: %#x %d %d %v", lid, length, offset, rae)
	}
	c.SetAbort(4, 0x7FFF)
	if sqid, cid := c.AbortTarget(); sqid != 4 || cid != 0x7FFF {
		t.Errorf("abort: %d %d", sqid, cid)
	}
	c.SetConnect(9, 127, 0, true)
	if p, want := c.ConnectParams(), (ConnectParams{QID: 9, SQSize: 127, Attributes: ConnectDisableSQFlow}); p != want {
		t.Errorf("connect: %+v, want %+v", p, want)
	}
	c.SetPropertySet(PropCC, 0x460001, false)
	if off, size8, ok := c.Property(); off != PropCC || size8 || !ok || c.PropertyValue() != 0x460001 {
		t.Errorf("property set: %#x %v %v %#x", off, size8, ok, c.PropertyValue())
	}
	c.SetPropertyGet(PropCAP, true)
	if off, size8, ok := c.Property(); off != PropCAP || !size8 || !ok {
		t.Errorf("property get: %#x %v %v", off, size8, ok)
	}
	c[40] = 2
	if _, _, ok := c.Property(); ok {
		t.Error("property of reserved size accepted")
	}
	c.SetAuthSend(77)
	if n, ok := c.AuthLength(); n != 77 || !ok {
		t.Errorf("auth send: %d %v", n, ok)
	}
	c[43] = 0xEA
	if _, ok := c.AuthLength(); ok {
		t.Error("foreign security protocol accepted")
	}
}

func TestCommandPanics(t *testing.T) {
	c := new(Command)
	wantPanic(t, "short buffer", func() { CommandAt(make([]byte, 63)) })
	wantPanic(t, "0 blocks", func() { c.SetRead(1, 0, 0, false) })
	wantPanic(t, "65537 blocks", func() { c.SetWrite(1, 0, 65537, false) })
	wantPanic(t, "0 blocks to zero", func() { c.SetWriteZeroes(1, 0, 0, false, false) })
	wantPanic(t, "0 ranges", func() { c.SetDSM(1, 0) })
	wantPanic(t, "257 ranges", func() { c.SetDSM(1, 257) })
	wantPanic(t, "empty log page", func() { c.SetGetLogPage(1, 0, 0, 0, false) })
	wantPanic(t, "odd log page", func() { c.SetGetLogPage(1, 0, 6, 0, false) })
	wantPanic(t, "odd log offset", func() { c.SetGetLogPage(1, 0, 8, 2, false) })
	wantPanic(t, "long sgl", func() { c.SetKeyedSGL(0, 1<<24, 0, false) })
	wantPanic(t, "short range", func() { PutDSMRange(make([]byte, 15), 0, 0, 0) })
}

// A view must not reach past its own slot of the slab.
func TestViewsShareMemory(t *testing.T) {
	slab := make([]byte, 3*CommandSize)
	CommandAt(slab[CommandSize:]).SetRead(1, 2, 3, false)
	for i, b := range slab {
		if inside := i >= CommandSize && i < 2*CommandSize; !inside && b != 0 {
			t.Errorf("byte %d written", i)
		}
	}
	if slab[CommandSize] != 2 {
		t.Error("view is a copy")
	}
}

func TestDSMRange(t *testing.T) {
	b := make([]byte, DSMRangeSize)
	PutDSMRange(b, 0x01020304, 0x11121314, 0x2122232425262728)
	wantBytes(t, b, layout(16, at{0, "04030201 14131211 2827262524232221"}))
	if cattr, nlb, slba := DSMRange(b); cattr != 0x01020304 || nlb != 0x11121314 || slba != 0x2122232425262728 {
		t.Errorf("decoded %#x %#x %#x", cattr, nlb, slba)
	}
}

func TestIsWrite(t *testing.T) {
	for _, tt := range []struct {
		name string
		op   Opcode
		fc   FCType
		want bool
	}{
		{"flush", OpFlush, 0, false},
		{"write", OpWrite, 0, true},
		{"read", OpRead, 0, false},
		{"compare", OpCompare, 0, true},
		{"dsm", OpDSM, 0, true},
		{"zone append", OpZoneAppend, 0, true},
		{"report zones", OpZoneManagementRecv, 0, false},
		{"identify", AdminIdentify, 0, false},
		{"set features", AdminSetFeatures, 0, true},
		{"get log page", AdminGetLogPage, 0, false},
		{"keep alive", AdminKeepAlive, 0, false},
		{"connect", OpFabrics, FabricsConnect, true},
		{"property set", OpFabrics, FabricsPropertySet, false},
		{"property get", OpFabrics, FabricsPropertyGet, false},
		{"auth send", OpFabrics, FabricsAuthSend, true},
		{"auth receive", OpFabrics, FabricsAuthReceive, false},
	} {
		c := new(Command)
		c.SetOpcode(tt.op)
		if tt.op == OpFabrics {
			c.SetFCType(tt.fc)
		} else {
			c.SetNSID(0x01010101) // must not matter
		}
		if got := IsWrite(c); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestOpcodeNames(t *testing.T) {
	for op, want := range map[Opcode]string{
		AdminIdentify: "identify", AdminGetLogPage: "get log page", OpFabrics: "fabrics", 0xC1: "admin opcode c1h",
	} {
		if got := op.AdminString(); got != want {
			t.Errorf("admin %v: %q, want %q", op, got, want)
		}
	}
	for op, want := range map[Opcode]string{
		OpRead: "read", OpWriteZeroes: "write zeroes", OpDSM: "dataset management", 0xC1: "i/o opcode c1h",
	} {
		if got := op.IOString(); got != want {
			t.Errorf("i/o %v: %q, want %q", op, got, want)
		}
	}
	if got := FabricsPropertyGet.String(); got != "property get" {
		t.Errorf("fabrics: %q", got)
	}
}

func TestCommandString(t *testing.T) {
	c := new(Command)
	c.SetRead(3, 16, 8, false)
	c.SetCID(0x1002)
	c.SetKeyedSGL(0x7000, 4096, 0xDEADBEEF, false)
	got := c.String()
	for _, want := range []string{"02h", "1002h", "nsid 3", "0x7000+4096"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q lacks %q", got, want)
		}
	}
	if strings.Contains(strings.ToLower(got), "deadbeef") {
		t.Errorf("%q shows the key", got)
	}
}
