package nvme

import (
	"errors"
	"strings"
	"testing"
)

func TestConnectData(t *testing.T) {
	d := new(ConnectData)
	d.SetHostID(UUID{0: 0x11, 15: 0x22})
	d.SetCNTLID(0x0304)
	if err := d.SetSubNQN("nqn.sub"); err != nil {
		t.Fatal(err)
	}
	if err := d.SetHostNQN("nqn.host"); err != nil {
		t.Fatal(err)
	}
	wantBytes(t, d[:], layout(1024, at{0, "11"}, at{15, "22"}, at{16, "0403"},
		at{256, "6e716e2e737562"}, at{512, "6e716e2e686f7374"}))
	if d.HostID() != (UUID{0: 0x11, 15: 0x22}) || d.CNTLID() != 0x0304 || d.SubNQN() != "nqn.sub" || d.HostNQN() != "nqn.host" {
		t.Errorf("decoded %v %d %q %q", d.HostID(), d.CNTLID(), d.SubNQN(), d.HostNQN())
	}
	// A shorter name leaves nothing of the longer one.
	if err := d.SetSubNQN("a"); err != nil {
		t.Fatal(err)
	}
	wantBytes(t, d[256:512], layout(256, at{0, "61"}))
	// A name without a NUL ends with its field.
	long := new(ConnectData)
	for i := range long {
		long[i] = 'x'
	}
	if got := len(long.SubNQN()); got != 256 {
		t.Errorf("unterminated nqn of %d bytes", got)
	}
}

func TestConnectDataRefusesBadNames(t *testing.T) {
	d := new(ConnectData)
	for _, bad := range []string{"", strings.Repeat("x", 224), "nqn\x00x", "nqn\xff"} {
		if err := d.SetSubNQN(bad); !errors.Is(err, ErrInvalidNQN) {
			t.Errorf("subsystem %q: %v", bad, err)
		}
		if err := d.SetHostNQN(bad); !errors.Is(err, ErrInvalidNQN) {
			t.Errorf("host %q: %v", bad, err)
		}
	}
	if *d != (ConnectData{}) {
		t.Error("a refused name left bytes")
	}
	if err := d.SetSubNQN(strings.Repeat("x", 223)); err != nil {
		t.Errorf("223 bytes: %v", err)
	}
}

func TestConnectResult(t *testing.T) {
	for _, tt := range []struct {
		r      ConnectResult
		cntlid uint16
		atr    bool
		ascr   bool
	}{
		{0x00000001, 1, false, false}, {0x0002FFEF, 0xFFEF, true, false}, {0x00060010, 16, true, true}, {0x00010000, 0, false, false},
	} {
		if tt.r.CNTLID() != tt.cntlid || tt.r.AuthRequired() != tt.atr || tt.r.SecureChannelRequired() != tt.ascr {
			t.Errorf("%#x: %d %v %v", uint32(tt.r), tt.r.CNTLID(), tt.r.AuthRequired(), tt.r.SecureChannelRequired())
		}
	}
	if got := NewConnectResult(0x1234, true); got != 0x00021234 {
		t.Errorf("built %#x", uint32(got))
	}
}

func TestConnectInvalidParam(t *testing.T) {
	for p, want := range map[ConnectInvalidParam]string{
		0x00000028: "record format", 0x0000002A: "queue id", 0x0000002C: "submission queue size",
		0x0000002E: "connect attributes", 0x00000030: "keep alive timeout", 0x00000005: "connect command byte 5",
		0x00010000: "host identifier", 0x00010010: "controller id", 0x00010100: "subsystem nqn",
		0x00010200: "host nqn", 0x00010012: "connect data byte 18", 0x0001FFFF: "connect data byte 65535",
	} {
		if got := p.String(); got != want {
			t.Errorf("%#x: %q, want %q", uint32(p), got, want)
		}
		if got := NewConnectInvalidParam(p.Offset(), p.InData()); got != p {
			t.Errorf("built %#x, want %#x", uint32(got), uint32(p))
		}
	}
}

func TestVersion(t *testing.T) {
	for v, want := range map[Version]string{0x00010400: "1.4", 0x00020100: "2.1", 0x00010201: "1.2.1"} {
		if got := v.String(); got != want {
			t.Errorf("%#x: %q, want %q", uint32(v), got, want)
		}
		if got := NewVersion(v.Major(), v.Minor(), v.Tertiary()); got != v {
			t.Errorf("built %#x, want %#x", uint32(got), uint32(v))
		}
	}
}

func TestCap(t *testing.T) {
	// The value of nvmet: MQES 127, CQR, TO 15, CSS bits 0 and 6
	c := Cap(127 | 1<<16 | 15<<24 | 1<<37 | 1<<43)
	if c.MQES() != 127 || !c.CQR() || c.TO() != 15 || c.CSS() != CSSNVM|CSSIOSets || c.MPSMIN() != 0 || c.MPSMAX() != 0 ||
		c.CRMS() != 0 || c.NSSRS() || c.DSTRD() != 0 {
		t.Errorf("%#x decoded wrong", uint64(c))
	}
	if got := NewCap(127, 15, CSSNVM|CSSIOSets); got != c {
		t.Errorf("built %#x, want %#x", uint64(got), uint64(c))
	}
	for bit, get := range map[int]func(Cap) bool{
		16: Cap.CQR, 36: Cap.NSSRS, 59: Cap.CRWMS, 60: Cap.CRIMS,
	} {
		if !get(1<<bit) || get(^Cap(1<<bit)) {
			t.Errorf("bit %d", bit)
		}
	}
	all := ^Cap(0)
	for name, tt := range map[string]struct {
		shift int
		mask  uint64
		get   func(Cap) uint64
	}{
		"MQES":   {shift: 0, mask: 0xFFFF, get: func(c Cap) uint64 { return uint64(c.MQES()) }},
		"TO":     {shift: 24, mask: 0xFF, get: func(c Cap) uint64 { return uint64(c.TO()) }},
		"DSTRD":  {shift: 32, mask: 0xF, get: func(c Cap) uint64 { return uint64(c.DSTRD()) }},
		"CSS":    {shift: 37, mask: 0xFF, get: func(c Cap) uint64 { return uint64(c.CSS()) }},
		"MPSMIN": {shift: 48, mask: 0xF, get: func(c Cap) uint64 { return uint64(c.MPSMIN()) }},
		"MPSMAX": {shift: 52, mask: 0xF, get: func(c Cap) uint64 { return uint64(c.MPSMAX()) }},
		"CRMS":   {shift: 59, mask: 0x3, get: func(c Cap) uint64 { return uint64(c.CRMS()) }},
	} {
		if tt.get(all) != tt.mask || tt.get(Cap(tt.mask)<<tt.shift) != tt.mask || tt.get(^(Cap(tt.mask)<<tt.shift)) != 0 {
			t.Errorf("%s is not bits %d, mask %#x", name, tt.shift, tt.mask)
		}
	}
	if c := CRTO(0x00050064); c.CRWMT() != 100 || c.CRIMT() != 5 {
		t.Errorf("crto %d %d", c.CRWMT(), c.CRIMT())
	}
}

func TestCC(t *testing.T) {
	if got := NewCC(CCSelectNVM); got != 0x460000 {
		t.Errorf("nvm: %#x", uint32(got))
	}
	c := NewCC(CCSelectAll)
	if c != 0x460060 {
		t.Errorf("all sets: %#x", uint32(c))
	}
	if c.EN() || c.CSS() != 6 || c.MPS() != 0 || c.AMS() != 0 || c.SHN() != 0 || c.IOSQES() != 6 || c.IOCQES() != 4 || c.CRIME() {
		t.Errorf("%#x decoded wrong", uint32(c))
	}
	if got := c.WithEN(true); got != 0x460061 || !got.EN() {
		t.Errorf("enabled: %#x", uint32(got))
	}
	if got := c.WithEN(true).WithEN(false); got != c {
		t.Errorf("disabled: %#x", uint32(got))
	}
	if got := c.WithEN(true).WithSHN(ShutdownNormal); got != 0x464061 || got.SHN() != ShutdownNormal {
		t.Errorf("shutdown: %#x", uint32(got))
	}
	if got := c.WithSHN(ShutdownAbrupt).WithSHN(ShutdownNone); got != c {
		t.Errorf("no shutdown: %#x", uint32(got))
	}
	if c := CC(0xF<<7 | 7<<11 | 1<<24); c.MPS() != 15 || c.AMS() != 7 || !c.CRIME() {
		t.Errorf("mps %d ams %d crime %v", c.MPS(), c.AMS(), c.CRIME())
	}
}

func TestCSTS(t *testing.T) {
	for c, want := range map[CSTS]string{
		0x00: "not ready", 0x01: "ready", 0x03: "ready, fatal error", 0x05: "ready, shutting down",
		0x09: "ready, shut down", 0x11: "ready, subsystem was reset", 0x21: "ready, processing paused",
		0xFFFFFFFF: "gone",
	} {
		if got := c.String(); got != want {
			t.Errorf("%#x: %q, want %q", uint32(c), got, want)
		}
	}
	for bit, get := range map[int]func(CSTS) bool{0: CSTS.RDY, 1: CSTS.CFS, 4: CSTS.NSSRO, 5: CSTS.PP} {
		if !get(1<<bit) || get(^CSTS(1<<bit)) {
			t.Errorf("bit %d", bit)
		}
	}
	if got := NewCSTS(true, true, ShutdownStatusComplete); got != 0x0B || got.SHST() != ShutdownStatusComplete {
		t.Errorf("built %#x", uint32(got))
	}
	if got := NewCSTS(false, false, 0); got != 0 {
		t.Errorf("built %#x", uint32(got))
	}
}
