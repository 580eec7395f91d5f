package nvme

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

// at is a run of bytes at an offset. It is copied from the specification, and does not
// use the accessors under test.
type at struct {
	off int
	hex string
}

// layout builds size zero bytes with the given runs in them.
func layout(size int, runs ...at) []byte {
	b := make([]byte, size)
	for _, r := range runs {
		raw, err := hex.DecodeString(strings.ReplaceAll(r.hex, " ", ""))
		if err != nil {
			panic(err)
		}
		copy(b[r.off:r.off+len(raw)], raw)
	}
	return b
}

// wantBytes compares bytes and shows only those that differ.
func wantBytes(t *testing.T, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("length %d, want %d", len(got), len(want))
	}
	if bytes.Equal(got, want) {
		return
	}
	var diff strings.Builder
	for i := range got {
		if got[i] != want[i] {
			fmt.Fprintf(&diff, "\n  byte %d: %02x, want %02x", i, got[i], want[i])
		}
	}
	t.Errorf("bytes differ:%s", diff.String())
}

// wantPanic runs f and fails unless it panics.
func wantPanic(t *testing.T, name string, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Errorf("%s: no panic", name)
		}
	}()
	f()
}

// field is a little-endian number, or a string of bytes, in a structure.
type field struct {
	name  string
	off   int
	width int
}

// testFields checks getters and setters of the structure that p points to against a table
// of offsets, by name. zero returns a pointer to a new, zero structure. Every method SetX
// must be in the table or in except.
func testFields(t *testing.T, zero func() any, fields []field, except ...string) {
	t.Helper()
	raw := func(p any) []byte { return reflect.ValueOf(p).Elem().Slice(0, reflect.ValueOf(p).Elem().Len()).Bytes() }
	listed := map[string]bool{}
	for _, e := range except {
		listed[e] = true
	}
	for _, f := range fields {
		listed[f.name] = true
		// The bytes are all different, so that errors of width, order and place
		// are found.
		pattern := make([]byte, f.width)
		var number uint64
		for i := range pattern {
			pattern[i] = byte(0xA1 + i)
			if i < 8 {
				number |= uint64(pattern[i]) << (8 * i)
			}
		}

		p := zero()
		copy(raw(p)[f.off:], pattern)
		got := reflect.ValueOf(p).MethodByName(f.name).Call(nil)[0]
		switch got.Kind() {
		case reflect.Array:
			for i, want := range pattern {
				if b := byte(got.Index(i).Uint()); b != want {
					t.Errorf("%s()[%d] = %#x, want %#x", f.name, i, b, want)
				}
			}
		default:
			if got.Uint() != number {
				t.Errorf("%s() = %#x, want %#x", f.name, got.Uint(), number)
			}
		}

		p = zero()
		set := reflect.ValueOf(p).MethodByName("Set" + f.name)
		if !set.IsValid() {
			t.Errorf("no method Set%s", f.name)
			continue
		}
		set.Call([]reflect.Value{got})
		want := raw(zero())
		copy(want[f.off:], pattern)
		t.Run("Set"+f.name, func(t *testing.T) { wantBytes(t, raw(p), want) })
	}
	typ := reflect.TypeOf(zero())
	for i := range typ.NumMethod() {
		if name, ok := strings.CutPrefix(typ.Method(i).Name, "Set"); ok && !listed[name] {
			t.Errorf("Set%s is not in the table", name)
		}
	}
}
