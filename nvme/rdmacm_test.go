package nvme

import (
	"errors"
	"testing"
)

func TestRDMARequest(t *testing.T) {
	r := RDMARequest{QID: 0x0102, HRQSize: 0x1112, HSQSize: 0x2122, CNTLID: 0x3132}
	want := layout(32, at{0, "0000 0201 1211 2221 3231"})
	raw := r.Marshal()
	wantBytes(t, raw[:], want)
	wantBytes(t, r.AppendTo([]byte{9})[1:], want)
	// InfiniBand and RoCE deliver the whole field, 56 bytes.
	if got, err := ParseRDMARequest(append(want, make([]byte, 24)...)); err != nil || got != r {
		t.Errorf("%+v, %v", got, err)
	}
	var reject RDMARejectStatus
	if _, err := ParseRDMARequest(want[:31]); !errors.As(err, &reject) || reject != 1 {
		t.Errorf("31 bytes: %v", err)
	}
	if _, err := ParseRDMARequest(layout(32, at{0, "01"})); !errors.As(err, &reject) || reject != 2 {
		t.Errorf("record format 1: %v", err)
	}
}

func TestRDMAAccept(t *testing.T) {
	a := RDMAAccept{CRQSize: 0x0102}
	want := layout(32, at{2, "0201"})
	raw := a.Marshal()
	wantBytes(t, raw[:], want)
	wantBytes(t, a.AppendTo([]byte{9})[1:], want)
	if got, err := ParseRDMAAccept(append(want, make([]byte, 164)...)); err != nil || got != a {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := ParseRDMAAccept(want[:31]); err == nil {
		t.Error("31 bytes accepted")
	}
	if _, err := ParseRDMAAccept(layout(32, at{0, "01"})); err == nil {
		t.Error("record format 1 accepted")
	}
}

func TestRDMAReject(t *testing.T) {
	r := RDMAReject{Status: RDMARejectInvalidHSQSize}
	raw := r.Marshal()
	wantBytes(t, raw[:], layout(4, at{2, "04"}))
	wantBytes(t, r.AppendTo([]byte{9})[1:], layout(4, at{2, "04"}))
	if got, err := ParseRDMAReject(append(raw[:], make([]byte, 144)...)); err != nil || got != r {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := ParseRDMAReject(raw[:3]); err == nil {
		t.Error("3 bytes accepted")
	}
	if _, err := ParseRDMAReject(layout(4, at{0, "01"})); err == nil {
		t.Error("record format 1 accepted")
	}
	for s, want := range map[RDMARejectStatus]string{
		1: "invalid private data length", 2: "invalid record format", 3: "invalid queue id",
		4: "invalid host send queue size", 5: "invalid host receive queue size", 6: "no resources",
		7: "invalid inbound rdma read depth", 8: "invalid outbound rdma read depth", 9: "invalid controller id",
		0: "reject status 0", 10: "reject status 10",
	} {
		if got := s.String(); got != want {
			t.Errorf("%d: %q, want %q", uint16(s), got, want)
		}
		if got := s.Error(); got != "rdma connection rejected: "+want {
			t.Errorf("%d: error %q", uint16(s), got)
		}
	}
}
