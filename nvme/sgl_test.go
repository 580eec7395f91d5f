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
			if ok1 == in1 {
				t.Errorf("keyed %v and in capsule %v", ok1, in1)
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
	}
}
