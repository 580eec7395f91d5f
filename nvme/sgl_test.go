package nvme

import "testing"

func TestSGL(t *testing.T) {
	for _, tt := range []struct {
		name   string
		set    func(c *Command)
		sgl    SGL
		want   at
		string string
	}{
		{"keyed", func(c *Command) { c.SetKeyedSGL(0x0102030405060708, 0x111213, 0x21222324, false) },
			KeyedSGL(0x0102030405060708, 0x111213, 0x21222324, false),
			at{0, "0807060504030201 131211 24232221 40"}, "keyed 0x102030405060708+1118739"},
		{"keyed, invalidate", func(c *Command) { c.SetKeyedSGL(0x1000, MaxKeyedLength, 0xFFFFFFFF, true) },
			KeyedSGL(0x1000, MaxKeyedLength, 0xFFFFFFFF, true),
			at{0, "0010000000000000 ffffff ffffffff 4f"}, "keyed, invalidate 0x1000+16777215"},
		{"in capsule", func(c *Command) { c.SetInCapsuleSGL(0x10, 0x01020304) },
			InCapsuleSGL(0x10, 0x01020304),
			at{0, "1000000000000000 04030201 000000 01"}, "in capsule 16+16909060"},
		{"list", func(c *Command) { c.SetLastSegmentSGL(0x20, 16) },
			LastSegmentSGL(0x20, 16),
			at{0, "2000000000000000 00010000 000000 31"}, "list in capsule 32+256"},
		{"no data", func(c *Command) { c.SetNoData() },
			NoDataSGL(), at{15, "40"}, "no data"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := layout(SGLSize, tt.want)
			wantBytes(t, tt.sgl[:], want)

			c := new(Command)
			c.SetKeyedSGL(^uint64(0), MaxKeyedLength, 0xFFFFFFFF, true) // must be overwritten
			tt.set(c)
			whole := make([]byte, CommandSize)
			copy(whole[24:40], want)
			wantBytes(t, c[:], whole)

			if c.SGL() != tt.sgl {
				t.Error("Command.SGL differs")
			}
			if got := tt.sgl.String(); got != tt.string {
				t.Errorf("String() = %q, want %q", got, tt.string)
			}
			a1, l1, k1, i1, ok1 := c.KeyedSGL()
			a2, l2, k2, i2, ok2 := tt.sgl.Keyed()
			if a1 != a2 || l1 != l2 || k1 != k2 || i1 != i2 || ok1 != ok2 {
				t.Error("Command.KeyedSGL and SGL.Keyed differ")
			}
			o1, n1, in1 := c.InCapsuleSGL()
			o2, n2, in2 := tt.sgl.InCapsule()
			if o1 != o2 || n1 != n2 || in1 != in2 {
				t.Error("Command.InCapsuleSGL and SGL.InCapsule differ")
			}
			o3, n3, list3 := c.LastSegmentSGL()
			o4, n4, list4 := tt.sgl.LastSegment()
			if o3 != o4 || n3 != n4 || list3 != list4 {
				t.Error("Command.LastSegmentSGL and SGL.LastSegment differ")
			}
			kinds := 0
			for _, is := range []bool{ok1, in1, list3} {
				if is {
					kinds++
				}
			}
			if kinds != 1 {
				t.Errorf("keyed %v, in capsule %v, list %v", ok1, in1, list3)
			}
		})
	}
}

func TestKeyedSGLDecode(t *testing.T) {
	addr, length, key, invalidate, ok := KeyedSGL(0xABCD, 0x800001, 0x80000001, true).Keyed()
	if addr != 0xABCD || length != 0x800001 || key != 0x80000001 || !invalidate || !ok {
		t.Errorf("%#x %#x %#x %v %v", addr, length, key, invalidate, ok)
	}
	if _, _, _, invalidate, ok = KeyedSGL(1, 2, 3, false).Keyed(); invalidate || !ok {
		t.Errorf("plain key: invalidate %v, ok %v", invalidate, ok)
	}
	for _, typ := range []byte{0x00, 0x01, 0x30, 0x41, 0x5A, 0xFF} {
		s := SGL{15: typ}
		if _, _, _, _, ok := s.Keyed(); ok {
			t.Errorf("type %02x taken for keyed", typ)
		}
		if _, _, ok := s.InCapsule(); ok != (typ == 0x01) {
			t.Errorf("type %02x: in capsule %v", typ, ok)
		}
		if _, _, ok := s.LastSegment(); ok {
			t.Errorf("type %02x taken for a list", typ)
		}
	}
}

// TestCapsuleOfList is the golden image of a read whose data has two pieces: the command, and behind
// it the keyed descriptors.
func TestCapsuleOfList(t *testing.T) {
	capsule := make([]byte, CommandSize+2*SGLSize)
	c := CommandAt(capsule)
	c.SetRead(0x31, 0x0807060504030201, 16, false)
	c.SetCID(0x1234)
	c.SetLastSegmentSGL(0, 2)
	SGLAt(capsule[CommandSize:]).SetKeyed(0x0102030405060708, 0x1000, 0x21222324)
	SGLAt(capsule[CommandSize+SGLSize:]).SetKeyed(0x1112131415161718, 0x1000, 0x31323334)
	wantBytes(t, capsule, layout(len(capsule),
		at{0, "02 40 3412 31000000"}, at{32, "20000000 000000 31"}, at{40, "0102030405060708 0f00"},
		at{64, "0807060504030201 001000 24232221 40"}, at{80, "1817161514131211 001000 34333231 40"}))
}
