package nvme

import "testing"

func TestNumberOfQueues(t *testing.T) {
	for n, want := range map[int]uint32{1: 0, 2: 0x00010001, 128: 0x007F007F, 65535: 0xFFFEFFFE} {
		if got := NumberOfQueues(n); got != want {
			t.Errorf("%d: %#x, want %#x", n, got, want)
		}
		if got := GrantedQueues(want); got != n {
			t.Errorf("granted %#x: %d, want %d", want, got, n)
		}
	}
	for result, want := range map[uint32]int{0x00000005: 1, 0x00050000: 1, 0x00030007: 4, 0x00070003: 4, 0xFFFFFFFF: 65536} {
		if got := GrantedQueues(result); got != want {
			t.Errorf("granted %#x: %d, want %d", result, got, want)
		}
	}
	wantPanic(t, "no queues", func() { NumberOfQueues(0) })
	wantPanic(t, "65536 queues", func() { NumberOfQueues(65536) })
}

func TestHostBehavior(t *testing.T) {
	h := new(HostBehavior)
	h.SetACRE(true)
	h.SetLBAFEE(true)
	wantBytes(t, h[:], layout(512, at{0, "01"}, at{2, "01"}))
	if !h.ACRE() || !h.LBAFEE() {
		t.Error("not read back")
	}
	h.SetACRE(false)
	h.SetLBAFEE(false)
	if h.ACRE() || h.LBAFEE() {
		t.Error("not cleared")
	}
}
