package nvme

import (
	"bytes"
	"slices"
	"testing"
)

func TestExtendedEntry(t *testing.T) {
	var e DiscoveryEntry
	e.SetPORTID(7)
	in := []ExtendedAttribute{{AttributeHostID, []byte("0123456789abcdef")}, {2, []byte("abc")}, {9, nil}}
	b, err := AppendExtendedEntry(nil, &e, in)
	if err != nil {
		t.Fatal(err)
	}
	wantBytes(t, b[1024:], layout(8+20+8+4,
		at{0, "28040000 0300 0000"}, at{8, "0100 1000"}, at{12, "30313233343536373839616263646566"},
		at{28, "0200 0300 616263 00"}, at{36, "0900 0000"}))
	got, attributes, size, err := ParseExtendedEntry(append(slices.Clone(b), 1, 2, 3, 4))
	if err != nil || size != len(b) || got != e || len(attributes) != 3 {
		t.Fatalf("%d attributes, %d bytes, %v", len(attributes), size, err)
	}
	for i := range in {
		if attributes[i].Type != in[i].Type || !bytes.Equal(attributes[i].Value, in[i].Value) {
			t.Errorf("attribute %d: %+v", i, attributes[i])
		}
	}
	for name, change := range map[string]func([]byte) []byte{
		"cut off":             func(b []byte) []byte { return b[:len(b)-1] },
		"no length":           func(b []byte) []byte { return b[:1024] },
		"length 0":            func(b []byte) []byte { le.PutUint32(b[1024:], 0); return b },
		"length not dwords":   func(b []byte) []byte { le.PutUint32(b[1024:], 1033); return b },
		"huge length":         func(b []byte) []byte { le.PutUint32(b[1024:], 0xFFFFFFFC); return b },
		"too many attributes": func(b []byte) []byte { le.PutUint16(b[1028:], 4); return b },
		"65535 attributes":    func(b []byte) []byte { le.PutUint16(b[1028:], 0xFFFF); return b },
		"attribute too long":  func(b []byte) []byte { le.PutUint16(b[1024+8+2:], 0xFFFF); return b },
	} {
		if _, attributes, size, err := ParseExtendedEntry(change(slices.Clone(b))); err == nil || attributes != nil || size != 0 {
			t.Errorf("%s: %d attributes, %v", name, len(attributes), err)
		}
	}
	if _, err := AppendExtendedEntry(nil, &e, []ExtendedAttribute{{1, make([]byte, MaxExtendedEntry)}}); err == nil {
		t.Error("an entry of more than the largest size")
	}
}

func TestExtendedHeader(t *testing.T) {
	h := DiscoveryHeader{GenCtr: 1, NumRec: 2, Returned: DiscoveryExtended, Length: 0x01020304}
	b := h.AppendTo(nil)
	wantBytes(t, b, layout(1024, at{0, "0100000000000000 0200000000000000 0000 01 00 04030201"}))
	if got, err := ParseDiscoveryHeader(b); err != nil || got != h {
		t.Errorf("%+v, %v", got, err)
	}
	var c Command
	c.SetGetLogPage(LogDiscovery, 0, 1024, 0, true)
	c.SetLogSpecific(0xFF)
	if lid, n, _, rae := c.LogPage(); c.LogSpecific() != 0x7f || lid != LogDiscovery || n != 1024 || !rae {
		t.Errorf("%v: lsp %#x", c, c.LogSpecific())
	}
	if s := LogSupport(0x00050001); !s.Supported() || s.Specific() != DiscoveryExtended|DiscoveryAll {
		t.Errorf("%v %#x", s.Supported(), s.Specific())
	}
}

func FuzzExtendedEntry(f *testing.F) {
	var e DiscoveryEntry
	b, _ := AppendExtendedEntry(nil, &e, []ExtendedAttribute{{1, []byte("abc")}})
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		e, attributes, size, err := ParseExtendedEntry(b)
		if err != nil {
			return
		}
		again, err := AppendExtendedEntry(nil, &e, attributes)
		if err != nil || len(again) > size {
			t.Fatalf("%d bytes of %d: %v", len(again), size, err)
		}
	})
}
