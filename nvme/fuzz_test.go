package nvme

import (
	"bytes"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// Each target passes arbitrary bytes to a decoder. The decoder must not panic, and the
// bytes that it accepts must be the result of encoding again.

// image copies b into a structure of n bytes. It is cut off or filled with zeroes.
func image(b []byte, n int) []byte {
	out := make([]byte, n)
	copy(out, b)
	return out
}

// callGetters calls every method of p without arguments, and passes the result of X to
// SetX. The bytes must stay the same, except for texts, which SetX may refuse or
// normalize.
func callGetters(t *testing.T, p any) {
	v := reflect.ValueOf(p)
	raw := v.Elem().Slice(0, v.Elem().Len()).Bytes()
	before := bytes.Clone(raw)
	for i := range v.NumMethod() {
		name := v.Type().Method(i).Name
		if v.Method(i).Type().NumIn() != 0 || strings.HasPrefix(name, "Set") {
			continue
		}
		got := v.Method(i).Call(nil)
		set := v.MethodByName("Set" + name)
		if !set.IsValid() || set.Type().NumIn() != 1 || len(got) != 1 || got[0].Kind() == reflect.String {
			continue
		}
		set.Call(got)
		switch {
		case bytes.Equal(raw, before):
		case name == "Status":
			copy(raw, before) // SetStatus clears the phase bit
		case got[0].Kind() == reflect.Uint64 && got[0].Uint() == ^uint64(0):
			copy(raw, before) // a saturated counter
		default:
			t.Fatalf("Set%s(%s()) changed the bytes", name, name)
		}
	}
}

func FuzzCommand(f *testing.F) {
	for _, build := range []func(*Command){
		func(c *Command) { c.SetRead(1, 2, 3, true); c.SetKeyedSGL(0x1000, 4096, 7, true) },
		func(c *Command) { c.SetWrite(1, 2, 3, true); c.SetInCapsuleSGL(0, 4096) },
		func(c *Command) { c.SetWriteZeroes(1, 2, 3, true, true) },
		func(c *Command) { c.SetDSM(1, 256) },
		func(c *Command) { c.SetFlush(1) },
		func(c *Command) { c.SetIdentify(6, 1, 2) },
		func(c *Command) { c.SetGetLogPage(0x70, 0, 4096, 1<<40, true) },
		func(c *Command) { c.SetSetFeatures(7, 0x30003) },
		func(c *Command) { c.SetGetFeatures(15) },
		func(c *Command) { c.SetAbort(1, 2) },
		func(c *Command) { c.SetConnect(1, 127, 5000, true) },
		func(c *Command) { c.SetPropertyGet(0, true) },
		func(c *Command) { c.SetPropertySet(0x14, 0x460001, false) },
		func(c *Command) { c.SetAuthSend(64) },
		func(c *Command) { c.SetDisconnect() },
	} {
		c := new(Command)
		build(c)
		f.Add(c[:])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := CommandAt(image(b, CommandSize))
		IsWrite(c)
		callGetters(t, c)

		// The builder gets the results of the decoders, and the decoders must
		// return the same again.
		d := new(Command)
		d.SetWriteZeroes(c.NSID(), c.SLBA(), c.NLB(), c.FUA(), c.DEAC())
		if d.NSID() != c.NSID() || d.SLBA() != c.SLBA() || d.NLB() != c.NLB() || d.FUA() != c.FUA() || d.DEAC() != c.DEAC() {
			t.Fatalf("write zeroes: %v, built %v", c, d)
		}
		if d.SetDSM(1, c.DSMRanges()); d.DSMRanges() != c.DSMRanges() {
			t.Fatalf("dsm: %v, built %v", c, d)
		}
		lid, length, offset, rae := c.LogPage()
		if length < 1<<32 && offset%4 == 0 {
			d.SetGetLogPage(lid, 0, uint32(length), offset, rae)
			if l2, n2, o2, r2 := d.LogPage(); l2 != lid || n2 != length || o2 != offset || r2 != rae {
				t.Fatalf("log page: %v, built %v", c, d)
			}
		}
		if off, size8, ok := c.Property(); ok {
			d.SetPropertySet(off, c.PropertyValue(), size8)
			if o2, s2, ok := d.Property(); o2 != off || s2 != size8 || !ok || d.PropertyValue() != c.PropertyValue() {
				t.Fatalf("property: %v, built %v", c, d)
			}
		}
		p := c.ConnectParams()
		d.SetConnect(p.QID, p.SQSize, p.KATO, p.Attributes&ConnectDisableSQFlow != 0)
		p.RecFmt, p.Attributes = 0, p.Attributes&ConnectDisableSQFlow
		if got := d.ConnectParams(); got != p {
			t.Fatalf("connect: %+v, built %+v", p, got)
		}
	})
}

func FuzzSGL(f *testing.F) {
	for _, s := range []SGL{NoDataSGL(), KeyedSGL(1<<40, MaxKeyedLength, 0xDEADBEEF, true), InCapsuleSGL(8, 4096), LastSegmentSGL(16, 16)} {
		f.Add(s[:])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s := SGL(image(b, SGLSize))
		_ = s.String()
		addr, length, key, invalidate, keyed := s.Keyed()
		if keyed && KeyedSGL(addr, length, key, invalidate) != s {
			t.Fatalf("keyed: %x", s)
		}
		offset, n, inCapsule := s.InCapsule()
		if inCapsule && [3]byte(s[12:15]) == [3]byte{} && InCapsuleSGL(offset, n) != s {
			t.Fatalf("in capsule: %x", s)
		}
		at, size, list := s.LastSegment()
		if list && size%SGLSize == 0 && [3]byte(s[12:15]) == [3]byte{} && LastSegmentSGL(at, int(size/SGLSize)) != s {
			t.Fatalf("list: %x", s)
		}
		if keyed && inCapsule || list && (keyed || inCapsule) {
			t.Fatalf("two types at once: %x", s)
		}
	})
}

func FuzzDSMRange(f *testing.F) {
	f.Add(make([]byte, DSMRangeSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = image(b, DSMRangeSize)
		out := make([]byte, DSMRangeSize)
		cattr, nlb, slba := DSMRange(b)
		if PutDSMRange(out, cattr, nlb, slba); !bytes.Equal(out, b) {
			t.Fatalf("%x, built %x", b, out)
		}
	})
}

func FuzzCompletion(f *testing.F) {
	f.Add(make([]byte, CompletionSize))
	f.Add(bytes.Repeat([]byte{0xFF}, CompletionSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := CompletionAt(image(b, CompletionSize))
		callGetters(t, c)
		d := new(Completion)
		d.Set(c.Result(), c.SQHead(), c.CID(), c.Status())
		c.SetSQID(0)
		c.SetStatus(c.Status())
		if *d != *c {
			t.Fatalf("%x, built %x", *c, *d)
		}
	})
}

func FuzzStatus(f *testing.F) {
	for _, s := range []uint16{0, 0x4182, 0x371, 0x7FFF, 0xFFFF} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, v uint16) {
		s := Status(v)
		if s.String() == "" || s.FabricsString() == "" || s.Error() == "" {
			t.Fatalf("%#x has no words", v)
		}
		if (s.Errno() == 0) != s.OK() || (s.Err() == nil) != s.OK() {
			t.Fatalf("%#x: errno %d, error %v, ok %v", v, s.Errno(), s.Err(), s.OK())
		}
		if Status(s.SC())|Status(s.SCT())<<8 != s.Code() {
			t.Fatalf("%#x: sc %#x sct %d", v, s.SC(), s.SCT())
		}
	})
}

func FuzzConnectData(f *testing.F) {
	d := new(ConnectData)
	d.SetHostID(UUID{1})
	if err := d.SetSubNQN(DiscoveryNQN); err != nil {
		f.Fatal(err)
	}
	f.Add(d[:])
	f.Add(bytes.Repeat([]byte{0xFF}, ConnectDataSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := ConnectDataAt(image(b, ConnectDataSize))
		callGetters(t, d)
		e := new(ConnectData)
		if nqn := d.SubNQN(); e.SetSubNQN(nqn) == nil && e.SubNQN() != nqn {
			t.Fatalf("subsystem %q", nqn)
		}
		if nqn := d.HostNQN(); e.SetHostNQN(nqn) == nil && e.HostNQN() != nqn {
			t.Fatalf("host %q", nqn)
		}
	})
}

func FuzzDwords(f *testing.F) {
	f.Add(uint64(0x460001))
	f.Add(uint64(0x0070F002))
	f.Add(^uint64(0))
	f.Fuzz(func(t *testing.T, v uint64) {
		w := uint32(v)
		for _, s := range []string{
			ConnectInvalidParam(w).String(), CSTS(w).String(), Version(w).String(), AsyncEvent(w).String(),
			ANAState(v).String(), RDMARejectStatus(v).String(), TransportType(v).String(), AddressFamily(v).String(),
			SubsystemType(v).String(), TransportRequirements(v).String(), EntryFlags(v).String(), RDMAQPType(v).String(),
			RDMAProvider(v).String(), RDMACMS(v).String(), Opcode(v).String(), Opcode(v).AdminString(), Opcode(v).IOString(),
			FCType(v).String(), SGLType(v).String(), AsyncEventType(v).String(),
		} {
			if s == "" {
				t.Fatalf("%#x: a value without words", v)
			}
		}
		if n := GrantedQueues(w); n < 1 || n > 65536 {
			t.Fatalf("%#x grants %d queues", w, n)
		} else if n <= MaxQueues && GrantedQueues(NumberOfQueues(n)) != n {
			t.Fatalf("%d queues", n)
		}
		e := AsyncEvent(w)
		if got := NewAsyncEvent(e.Type(), e.Info(), e.LogPage()); got != e&0x00FFFF07 {
			t.Fatalf("event %#x, built %#x", w, uint32(got))
		}
		c := Cap(v)
		n := NewCap(c.MQES(), c.TO(), c.CSS())
		if n.MQES() != c.MQES() || n.TO() != c.TO() || n.CSS() != c.CSS() {
			t.Fatalf("cap %#x, built %#x", v, uint64(n))
		}
		cc := CC(w)
		if cc.WithEN(cc.EN()).WithSHN(cc.SHN()) != cc {
			t.Fatalf("cc %#x", w)
		}
		s := CSTS(w)
		if got := NewCSTS(s.RDY(), s.CFS(), s.SHST()); got != s&0xF {
			t.Fatalf("csts %#x, built %#x", w, uint32(got))
		}
	})
}

func FuzzIdentify(f *testing.F) {
	c := new(IdentifyController)
	if err := c.SetMN("model"); err != nil {
		f.Fatal(err)
	}
	f.Add(c[:])
	n := new(IdentifyNamespace)
	n.SetFLBAS(0x75)
	n.SetNLBAF(63)
	f.Add(n[:])
	f.Add(bytes.Repeat([]byte{0xFF}, IdentifySize))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = image(b, IdentifySize)
		c := IdentifyControllerAt(b)
		callGetters(t, c)
		c.MaxTransfer(b[0])
		c.CRDT(b[0])
		n := IdentifyNamespaceAt(b)
		callGetters(t, n)
		for i := range MaxLBAFormats {
			before := n.LBAFormat(i)
			if n.SetLBAFormat(i, before); n.LBAFormat(i) != before {
				t.Fatalf("format %d: %+v, built %+v", i, before, n.LBAFormat(i))
			}
		}
		callGetters(t, IdentifyNamespaceNVMAt(b))
		callGetters(t, IdentifyControllerNVMAt(b))
		callGetters(t, IdentifyNSIndependentAt(b))
	})
}

func FuzzIdentifyText(f *testing.F) {
	f.Add("S123", "Linux", "6.12", DiscoveryNQN, "4420", "10.0.0.1")
	f.Add("", "", "", "", "", "")
	f.Fuzz(func(t *testing.T, sn, mn, fr, nqn, svc, addr string) {
		c, e := new(IdentifyController), new(DiscoveryEntry)
		for _, tt := range []struct {
			in  string
			set func(string) error
			get func() string
		}{
			{sn, c.SetSN, c.SN}, {mn, c.SetMN, c.MN}, {fr, c.SetFR, c.FR}, {nqn, c.SetSUBNQN, c.SUBNQN},
			{svc, e.SetTRSVCID, e.TRSVCID}, {addr, e.SetTRADDR, e.TRADDR}, {nqn, e.SetSUBNQN, e.SUBNQN},
		} {
			err := tt.set(tt.in)
			invertible := !strings.ContainsAny(tt.in, "\x00 ")
			if err == nil && invertible && tt.get() != tt.in {
				t.Fatalf("%q came back as %q", tt.in, tt.get())
			}
			if err != nil && tt.get() != "" {
				t.Fatalf("%q was refused and left %q", tt.in, tt.get())
			}
		}
	})
}

func FuzzNSLists(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 2, 0, 0, 0})
	f.Add(bytes.Repeat([]byte{0xFF}, IdentifySize))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = image(b, IdentifySize)
		if ids, err := ActiveNSListAt(b).NSIDs(); err == nil {
			out := new(ActiveNSList)
			if n := out.Set(ids); n != len(ids) || !bytes.Equal(out[:4*n], b[:4*n]) {
				t.Fatalf("active: %v", ids)
			}
		}
		if ids, overflow := ChangedNSListAt(b).NSIDs(); !overflow {
			out := new(ChangedNSList)
			if out.Set(ids); !bytes.Equal(out[:4*len(ids)], b[:4*len(ids)]) {
				t.Fatalf("changed: %v", ids)
			}
		}
	})
}

func FuzzNamespaceDescriptors(f *testing.F) {
	f.Add(NamespaceIDs{EUI64: [8]byte{1}, NGUID: [16]byte{2}, UUID: UUID{3}, CSI: 2, HasCSI: true}.AppendTo(nil))
	f.Add([]byte{0x77, 1, 0, 0, 9, 4, 1, 0, 0, 0})
	f.Add([]byte{3, 15, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		ids, err := ParseNamespaceDescriptors(b)
		if err != nil {
			if ids != (NamespaceIDs{}) {
				t.Fatalf("%+v with %v", ids, err)
			}
			return
		}
		if got, err := ParseNamespaceDescriptors(ids.AppendTo(nil)); err != nil || got != ids {
			t.Fatalf("%+v, built %+v, %v", ids, got, err)
		}
	})
}

func FuzzLogs(f *testing.F) {
	f.Add(make([]byte, SMARTLogSize))
	f.Add(bytes.Repeat([]byte{0xFF}, SMARTLogSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		callGetters(t, SMARTLogAt(image(b, SMARTLogSize)))
		callGetters(t, ErrorLogEntryAt(image(b, ErrorLogEntrySize)))
		h := (*HostBehavior)(image(b, 512))
		if acre, lbafee := h.ACRE(), h.LBAFEE(); true {
			h.SetACRE(acre)
			h.SetLBAFEE(lbafee)
			if h.ACRE() != acre || h.LBAFEE() != lbafee {
				t.Fatal("host behavior changed")
			}
		}
	})
}

func FuzzANALog(f *testing.F) {
	b := AppendANAHeader(nil, 9, 2)
	b = AppendANAGroup(b, 1, 2, ANAOptimized, 1, 2, 3)
	b = AppendANAGroup(b, 2, 3, ANAChange)
	f.Add(b)
	f.Add(b[:len(b)-1])
	f.Add(layout(48, at{8, "ffff"}, at{16, "01000000 ffffffff"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := ParseANALog(b)
		if err != nil {
			return
		}
		out := AppendANAHeader(nil, l.ChangeCount(), uint16(l.NumGroups()))
		n := 0
		for g := range l.Groups() {
			n++
			if g.ID == 0 || g.State == 0 || g.State > ANAChange {
				t.Fatalf("accepted %+v", g)
			}
			out = AppendANAGroup(out, g.ID, g.ChangeCount, g.State, slices.Collect(g.NSIDs())...)
		}
		if n != l.NumGroups() || len(out) > len(b) {
			t.Fatalf("%d groups of %d, %d bytes of %d", n, l.NumGroups(), len(out), len(b))
		}
		// The same, except for reserved bytes
		want := bytes.Clone(b[:len(out)])
		clear(want[10:16])
		for off := 16; off < len(want); off += 32 + 4*int(le.Uint32(want[off+4:])) {
			clear(want[off+17 : off+32])
		}
		if !bytes.Equal(out, want) {
			t.Fatalf("built %x, want %x", out, want)
		}
	})
}

func FuzzDiscoveryLog(f *testing.F) {
	var e DiscoveryEntry
	e.SetTRTYPE(TransportRDMA)
	f.Add(append(DiscoveryHeader{GenCtr: 1, NumRec: 1}.AppendTo(nil), e[:]...))
	f.Add(layout(2048, at{8, "ffffffffffffffff"}))
	f.Add(make([]byte, 20))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, entries, err := ParseDiscoveryLog(b)
		if err != nil {
			return
		}
		if uint64(len(entries)) != h.NumRec {
			t.Fatalf("%d entries of %d", len(entries), h.NumRec)
		}
		out := h.AppendTo(nil)
		if len(entries) > 0 {
			callGetters(t, &entries[0])
		}
		for i := range entries {
			out = append(out, entries[i][:]...)
		}
		// The same, except for the reserved bytes of the header
		n := min(len(b), len(out))
		want := bytes.Clone(b[:n])
		clear(want[18:min(n, DiscoveryHeaderSize)])
		if !bytes.Equal(out[:n], want) || len(entries) > 0 && n != len(out) {
			t.Fatal("the log changed")
		}
	})
}

func FuzzRDMAPrivateData(f *testing.F) {
	f.Add(RDMARequest{QID: 1, HRQSize: 128, HSQSize: 127, CNTLID: 5}.AppendTo(nil))
	f.Add(RDMAAccept{CRQSize: 32}.AppendTo(nil))
	f.Add(RDMAReject{Status: RDMARejectNoResources}.AppendTo(nil))
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := ParseRDMARequest(b); err == nil {
			if raw := r.Marshal(); !bytes.Equal(raw[:10], b[:10]) {
				t.Fatalf("request %x, built %x", b[:10], raw)
			}
		}
		if a, err := ParseRDMAAccept(b); err == nil {
			if raw := a.Marshal(); !bytes.Equal(raw[:4], b[:4]) {
				t.Fatalf("accept %x, built %x", b[:4], raw)
			}
		}
		if r, err := ParseRDMAReject(b); err == nil {
			if raw := r.Marshal(); !bytes.Equal(raw[:], b[:4]) {
				t.Fatalf("reject %x, built %x", b[:4], raw)
			}
			_ = r.Status.Error()
		}
	})
}

func FuzzParseUUID(f *testing.F) {
	f.Add("01020304-0506-0708-090a-0b0c0d0e0f10")
	f.Add("0102030405060708090a0b0c0d0e0f10")
	f.Fuzz(func(t *testing.T, s string) {
		if u, err := ParseUUID(s); err == nil && u.String() != strings.ToLower(s) {
			t.Fatalf("%q became %v", s, u)
		}
	})
}

func FuzzNQN(f *testing.F) {
	f.Add(DiscoveryNQN)
	f.Add("nqn.2024-01.")
	f.Fuzz(func(t *testing.T, s string) {
		err := ValidateNQN(s)
		if WellFormedNQN(s) && err != nil {
			t.Fatalf("%q is well formed but %v", s, err)
		}
		d := new(ConnectData)
		if (d.SetSubNQN(s) == nil) != (err == nil) {
			t.Fatalf("%q: setter and validation differ", s)
		}
		if err == nil && d.SubNQN() != s {
			t.Fatalf("%q came back as %q", s, d.SubNQN())
		}
	})
}
