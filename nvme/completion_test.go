package nvme

import (
	"bytes"
	"testing"
)

func TestCompletion(t *testing.T) {
	c := CompletionAt(bytes.Repeat([]byte{0xFF}, 20))
	c.Set(0x0102030405060708, 0x1112, 0x2122, StatusDNR|StatusInvalidField)
	// 4002h shifted over the phase bit is 8004h.
	wantBytes(t, c[:], layout(16, at{0, "0807060504030201 1211 0000 2221 0480"}))
	if c.Result() != 0x0102030405060708 || c.DW0() != 0x05060708 || c.SQHead() != 0x1112 || c.SQID() != 0 ||
		c.CID() != 0x2122 || c.Status() != 0x4002 {
		t.Errorf("decoded %v", c)
	}
	want := "cid 2122h result 0x102030405060708 sqhead 4370: 002h: invalid field in command, do not retry"
	if got := c.String(); got != want {
		t.Errorf("String() = %q, want %q", got, want)
	}
	wantPanic(t, "short buffer", func() { CompletionAt(make([]byte, 15)) })
}

func TestCompletionFields(t *testing.T) {
	testFields(t, func() any { return new(Completion) }, []field{
		{"Result", 0, 8}, {"DW0", 0, 4}, {"SQHead", 8, 2}, {"SQID", 10, 2}, {"CID", 12, 2},
	}, "" /* Set */, "Status")
	c := &Completion{14: 0x01, 15: 0x00}
	if !c.Status().OK() {
		t.Error("phase bit taken for status")
	}
	c.SetStatus(0x7FFF)
	wantBytes(t, c[:], layout(16, at{14, "feff"}))
	if c.Status() != 0x7FFF {
		t.Errorf("status %#x", uint16(c.Status()))
	}
}
