package nvme

import (
	"errors"
	"strings"
	"testing"
)

func TestStatusFields(t *testing.T) {
	s := Status(0x7FFF)
	if s.SC() != 0xFF || s.SCT() != 7 || s.CRD() != 3 || !s.More() || !s.DNR() || s.Code() != 0x7FF || s.OK() {
		t.Errorf("%#x: sc %#x sct %d crd %d more %v dnr %v", uint16(s), s.SC(), s.SCT(), s.CRD(), s.More(), s.DNR())
	}
	for _, tt := range []struct {
		s    Status
		sct  uint8
		crd  uint8
		more bool
		dnr  bool
	}{
		{0x0000, 0, 0, false, false}, {0x0371, 3, 0, false, false}, {0x0800, 0, 1, false, false},
		{0x1000, 0, 2, false, false}, {0x2000, 0, 0, true, false}, {0x4182, 1, 0, false, true},
	} {
		if tt.s.SCT() != tt.sct || tt.s.CRD() != tt.crd || tt.s.More() != tt.more || tt.s.DNR() != tt.dnr {
			t.Errorf("%#x: sct %d crd %d more %v dnr %v", uint16(tt.s), tt.s.SCT(), tt.s.CRD(), tt.s.More(), tt.s.DNR())
		}
	}
	if !StatusDNR.OK() {
		t.Error("flags alone are no failure")
	}
}

// Numbers as the specification lists them. A constant that was copied wrongly cannot
// match its words by accident.
func TestStatusWords(t *testing.T) {
	for code, want := range map[Status]string{
		0x000: "success", 0x001: "invalid command opcode", 0x00B: "invalid namespace or format",
		0x00F: "invalid sgl data length", 0x011: "invalid sgl descriptor type", 0x020: "namespace is write protected",
		0x02A: "invalid placement handle list", 0x080: "lba out of range", 0x083: "reservation conflict",
		0x084: "format in progress", 0x089: "key exists",
		0x101: "invalid queue id", 0x104: "command to abort is missing", 0x109: "invalid log page",
		0x10D: "feature is not saveable", 0x11F: "invalid controller id", 0x125: "ana attach failed",
		0x12C: "invalid i/o command set", 0x13B: "controller data queue full",
		0x180: "conflicting attributes", 0x182: "write to read only range", 0x184: "connect: invalid host",
		0x190: "discovery information changed, restart", 0x191: "authentication required",
		0x1B8: "zone boundary error", 0x1BD: "too many active zones", 0x1BF: "invalid zone state transition",
		0x280: "write fault", 0x281: "unrecovered read error", 0x285: "compare failure", 0x288: "storage tag check error",
		0x300: "internal path error", 0x302: "ana inaccessible", 0x360: "controller path error",
		0x370: "host path error", 0x371: "aborted by host",
		0x017: "unknown status", 0x07F: "unknown status", 0x117: "unknown status", 0x3BF: "unknown status", 0x400: "unknown status", 0x4C0: "unknown status",
		0x0C0: "vendor specific", 0x1FF: "vendor specific", 0x2C0: "vendor specific", 0x3C0: "vendor specific", 0x700: "vendor specific",
	} {
		if got := code.describe(); got != want {
			t.Errorf("%03xh: %q, want %q", uint16(code), got, want)
		}
	}
	for s, want := range map[Status]string{
		0x4002: "002h: invalid field in command, do not retry",
		0x6281: "281h: unrecovered read error, more in error log, do not retry",
		0x0000: "000h: success",
	} {
		if got := s.String(); got != want {
			t.Errorf("%#x: %q, want %q", uint16(s), got, want)
		}
	}
	for s, want := range map[Status]string{
		0x4180: "180h: connect: incompatible format, do not retry",
		0x0181: "181h: connect: controller busy",
		0x4182: "182h: connect: invalid parameters, do not retry",
		0x0183: "183h: connect: restart discovery",
		0x4184: "184h: connect: invalid host, do not retry",
		0x0185: "185h: disconnect: invalid queue type",
		0x400C: "00ch: command sequence error, do not retry",
	} {
		if got := s.FabricsString(); got != want {
			t.Errorf("fabrics %#x: %q, want %q", uint16(s), got, want)
		}
	}
}

// Every constant has words.
func TestStatusConstantsHaveWords(t *testing.T) {
	var all []Status
	for _, r := range [][2]Status{
		{0x000, 0x016}, {0x018, 0x02A}, {0x080, 0x089}, {0x100, 0x116}, {0x118, 0x13B}, {0x180, 0x189},
		{0x190, 0x191}, {0x1B6, 0x1BF}, {0x280, 0x288}, {0x300, 0x303}, {0x360, 0x360}, {0x370, 0x371},
	} {
		for s := r[0]; s <= r[1]; s++ {
			all = append(all, s)
		}
	}
	seen := map[string]Status{}
	for _, s := range all {
		w := s.describe()
		if w == "unknown status" {
			t.Errorf("%03xh has no words", uint16(s))
		}
		if other, dup := seen[w]; dup {
			t.Errorf("%03xh and %03xh share %q", uint16(s), uint16(other), w)
		}
		seen[w] = s
	}
}

func TestStatusErrno(t *testing.T) {
	want := map[Status]int{
		0x000: 0,
		0x081: 28,
		0x080: 121, 0x082: 121, 0x021: 121,
		0x001: 95, 0x002: 95, 0x00B: 95, 0x180: 95,
		0x280: 61, 0x281: 61, 0x287: 61, 0x286: 61, 0x182: 61, 0x285: 61,
		0x282: 84, 0x283: 84, 0x284: 84, 0x181: 84,
		0x083: 52,
		0x370: 67,
		0x1BD: 75,
		0x1BE: 109,
	}
	for s := range Status(0x800) {
		w, ok := want[s]
		if !ok {
			w = 5
		}
		if got := s.Errno(); got != w {
			t.Errorf("%03xh: errno %d, want %d", uint16(s), got, w)
		}
		if flagged := s | StatusDNR | StatusMore | StatusCRD; flagged.Errno() != w {
			t.Errorf("%04xh: errno %d, want %d", uint16(flagged), flagged.Errno(), w)
		}
	}
}

func TestStatusAsError(t *testing.T) {
	if err := StatusSuccess.Err(); err != nil {
		t.Errorf("success: %v", err)
	}
	err := (StatusNamespaceNotReady | StatusDNR).Err()
	var s Status
	if !errors.As(err, &s) || s.Code() != StatusNamespaceNotReady {
		t.Errorf("%v is not the status", err)
	}
	if !strings.Contains(err.Error(), "namespace not ready, do not retry") {
		t.Errorf("text %q", err)
	}
}

func TestStatusClasses(t *testing.T) {
	for s, want := range map[Status][2]bool{ // path, ana
		0x000: {false, false}, 0x006: {false, false}, 0x300: {true, false}, 0x301: {true, true}, 0x302: {true, true},
		0x4303: {true, true}, 0x360: {true, false}, 0x370: {true, false}, 0x281: {false, false},
	} {
		if got := [2]bool{s.IsPathError(), s.IsANAError()}; got != want {
			t.Errorf("%03xh: %v, want %v", uint16(s), got, want)
		}
	}
}
