package discovery

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
)

func disk(i int) Endpoint {
	e := at(i)
	e.NQN = "nqn.2026-01.org.example:disk"
	return e
}

func TestRead(t *testing.T) {
	for _, n := range []int{0, 1, 3, 9, 4096} {
		var entries []nvme.DiscoveryEntry
		for i := range n {
			entries = append(entries, entry(t, nvme.SubsystemNVMe, disk(i)))
		}
		s := &service{log: encode(5, entries...)}
		log, err := Read(t.Context(), s, Limits{})
		if err != nil || log.Generation != 5 || log.Extended || len(log.Entries) != n {
			t.Fatalf("%d entries: %v", n, err)
		}
		for i := range log.Entries {
			if got, err := log.Entries[i].Endpoint(); err != nil || got != disk(i) {
				t.Fatalf("entry %d: %v, %v", i, got, err)
			}
		}
		if !s.armed {
			t.Error("the event stays disabled")
		}
	}
}

// TestReadChanging: a log that changes is read again, and no torn log is returned.
func TestReadChanging(t *testing.T) {
	one, two := entry(t, nvme.SubsystemNVMe, disk(1)), entry(t, nvme.SubsystemNVMe, disk(2))
	s := &service{log: encode(1, one)}
	s.before = func(initiator.LogRequest) {
		switch s.reads {
		case 1: // between the header and the entries
			s.log = encode(2, one, two)
		case 5: // between the entries and the second header, with as many entries
			s.log = encode(3, two, one)
		}
	}
	log, err := Read(t.Context(), s, Limits{})
	if err != nil || log.Generation != 3 || len(log.Entries) != 2 || s.reads != 9 {
		t.Fatalf("%+v, %v after %d reads", log, err, s.reads)
	}
	if got, _ := log.Entries[0].Endpoint(); got != disk(2) {
		t.Errorf("first entry %v", got)
	}

	// A log that becomes shorter cannot be read where it ended before.
	s = &service{log: encode(1, one, two)}
	s.fail = func(r initiator.LogRequest) error {
		if s.reads == 2 {
			s.log = encode(2, one)
			return nvme.StatusInvalidField
		}
		return nil
	}
	if log, err := Read(t.Context(), s, Limits{}); err != nil || log.Generation != 2 || len(log.Entries) != 1 {
		t.Errorf("a log that became shorter: %+v, %v", log, err)
	}
}

// TestReadHostile: whatever a controller says, Read ends soon, with little memory and an
// error that says why.
func TestReadHostile(t *testing.T) {
	header := func(h nvme.DiscoveryHeader) []byte { return h.AppendTo(nil) }
	var clock uint64
	for _, c := range []struct {
		name  string
		s     *service
		want  error
		words string
	}{
		{"100000 entries", &service{log: header(nvme.DiscoveryHeader{NumRec: 100000})}, ErrTooLarge, "100000 entries"},
		{"2^64-1 entries", &service{log: header(nvme.DiscoveryHeader{NumRec: 1<<64 - 1})}, ErrTooLarge, "at most 4096"},
		{"2^54 entries", &service{log: header(nvme.DiscoveryHeader{NumRec: 1 << 54})}, ErrTooLarge, ""},
		{"wrong format", &service{log: func() []byte { b := encode(1); b[16] = 7; return b }()}, nil, "record format 7"},
		{"extended, too short", &service{log: header(nvme.DiscoveryHeader{NumRec: 2, Returned: 1, Length: 2048})}, nil, "2048 bytes cannot hold 2 entries"},
		{"extended, length 0", &service{log: header(nvme.DiscoveryHeader{NumRec: 2, Returned: 1})}, nil, "0 bytes cannot hold"},
		{"extended, 4 GiB", &service{log: header(nvme.DiscoveryHeader{NumRec: 2, Returned: 1, Length: 1<<32 - 4})}, ErrTooLarge, "4294967292 bytes"},
		{"extended, zeroes", &service{log: append(header(nvme.DiscoveryHeader{NumRec: 1, Returned: 1, Length: 1024 + 1032}), make([]byte, 1032)...)}, nil, "entry 0 of 1"},
		{"refuses", &service{fail: func(initiator.LogRequest) error { return nvme.StatusInvalidField }}, nvme.StatusInvalidField, ""},
		{"refuses entries", &service{log: encode(1, nvme.DiscoveryEntry{}), fail: func(r initiator.LogRequest) error {
			if r.Offset > 0 {
				return nvme.StatusInternal
			}
			return nil
		}}, nvme.StatusInternal, ""},
		{"changes always", func() *service {
			s := &service{log: encode(1)}
			s.before = func(initiator.LogRequest) { clock++; binary.LittleEndian.PutUint64(s.log, clock) }
			return s
		}(), ErrChanging, "10 attempts"},
	} {
		began := time.Now()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		log, err := Read(t.Context(), c.s, Limits{})
		runtime.ReadMemStats(&after)
		switch {
		case err == nil || log != nil:
			t.Errorf("%s: %d entries, no error", c.name, len(log.Entries))
		case c.want != nil && !errors.Is(err, c.want), !strings.Contains(err.Error(), c.words):
			t.Errorf("%s: %v", c.name, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
			t.Errorf("%s: %d bytes were allocated", c.name, n)
		}
		if took := time.Since(began); took > 5*time.Second || c.s.reads > 40 {
			t.Errorf("%s: %v, %d reads", c.name, took, c.s.reads)
		}
	}
}

// TestReadTime: a controller that answers slowly does not hold Read up for ever.
func TestReadTime(t *testing.T) {
	s := &service{log: encode(1)}
	s.before = func(initiator.LogRequest) { time.Sleep(5 * time.Millisecond); s.log[0]++ }
	_, err := Read(t.Context(), s, Limits{Time: 20 * time.Millisecond, Attempts: 1 << 30})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v after %d reads", err, s.reads)
	}
}

func TestReadExtended(t *testing.T) {
	e := entry(t, nvme.SubsystemNVMe, disk(1))
	var body []byte
	var err error
	for _, attributes := range [][]nvme.ExtendedAttribute{{{Type: 1, Value: []byte("0123456789abcdef")}}, nil} {
		if body, err = nvme.AppendExtendedEntry(body, &e, attributes); err != nil {
			t.Fatal(err)
		}
	}
	log := nvme.DiscoveryHeader{GenCtr: 2, NumRec: 2, Returned: nvme.DiscoveryExtended, Length: uint32(1024 + len(body))}.AppendTo(nil)
	s := &service{support: 0x00010001, log: append(log, body...)}
	var asked []uint8
	s.before = func(r initiator.LogRequest) { asked = append(asked, r.Specific) }
	got, err := ReadExtended(t.Context(), s, Limits{})
	if err != nil || !got.Extended || len(got.Entries) != 2 || len(got.Entries[1].Attributes) != 0 ||
		len(got.Entries[0].Attributes) != 1 || string(got.Entries[0].Attributes[0].Value) != "0123456789abcdef" {
		t.Fatalf("%+v, %v", got, err)
	}
	if !bytes.Equal(asked, []byte{1, 1, 1}) {
		t.Errorf("asked for %v", asked)
	}
	// Without the page that tells, or without the bit, the plain log is asked for.
	for _, support := range []uint32{0, 1, 0x00010000} {
		s := &service{support: support, log: encode(1, e)}
		asked = nil
		s.before = func(r initiator.LogRequest) { asked = append(asked, r.Specific) }
		if got, err := ReadExtended(t.Context(), s, Limits{}); err != nil || got.Extended || len(got.Entries) != 1 || !bytes.Equal(asked, make([]byte, 3)) {
			t.Errorf("support %#x: %+v, %v, asked for %v", support, got, err, asked)
		}
	}
}

func TestEntryCheck(t *testing.T) {
	for name, change := range map[string]func(*Entry){
		"subsystem type 9":         func(e *Entry) { e.SetSUBTYPE(9) },
		"transport tcp":            func(e *Entry) { e.SetTRTYPE(nvme.TransportTCP) },
		"transport unrecognized":   func(e *Entry) { e.SetTRTYPE(77) },
		"subsystem NQN":            func(e *Entry) { clear(e.DiscoveryEntry[256:512]) },
		"subsystem NQN \"\\xff":    func(e *Entry) { e.DiscoveryEntry[256] = 0xFF },
		"223":                      func(e *Entry) { copy(e.DiscoveryEntry[256:512], bytes.Repeat([]byte("x"), 256)) },
		"address \"example.com\"":  func(e *Entry) { e.SetTRADDR("example.com") },
		"address \"\"":             func(e *Entry) { e.SetTRADDR("") },
		"family ipv6":              func(e *Entry) { e.SetADRFAM(nvme.AddressIPv6) },
		"family ipv4":              func(e *Entry) { e.SetTRADDR("fd00::1") },
		"address family infiniban": func(e *Entry) { e.SetADRFAM(nvme.AddressInfiniBand) },
		"0.0.0.0: want":            func(e *Entry) { e.SetTRADDR("0.0.0.0") },
		"224.0.0.1: want":          func(e *Entry) { e.SetTRADDR("224.0.0.1") },
		"service id \"0\"":         func(e *Entry) { e.SetTRSVCID("0") },
		"service id \"65536\"":     func(e *Entry) { e.SetTRSVCID("65536") },
		"service id \"\"":          func(e *Entry) { e.SetTRSVCID("") },
		"service id \"44\\x1b\"":   func(e *Entry) { e.SetTRSVCID("44\x1b") },
	} {
		e := Entry{DiscoveryEntry: entry(t, nvme.SubsystemNVMe, disk(1))}
		change(&e)
		if err := e.Check(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Padding with spaces or NULs is the same entry.
	e := Entry{DiscoveryEntry: entry(t, nvme.SubsystemNVMe, disk(1))}
	padded := e
	copy(padded.DiscoveryEntry[256+len(disk(1).NQN):512], bytes.Repeat([]byte(" "), 256))
	copy(padded.DiscoveryEntry[512+8:768], make([]byte, 256))
	if padded.Check() != nil || padded.Key() != e.Key() {
		t.Errorf("%v, %+v", padded.Check(), padded.Key())
	}
}

func TestDiff(t *testing.T) {
	make3 := func(ids ...int) (out []Entry) {
		for _, i := range ids {
			out = append(out, Entry{DiscoveryEntry: entry(t, nvme.SubsystemNVMe, disk(i))})
		}
		return out
	}
	before, after := make3(1, 2, 3), make3(2, 4, 1)
	after[0].SetASQSZ(99) // no new entry
	appeared, vanished := Diff(before, after)
	if len(appeared) != 1 || len(vanished) != 1 || appeared[0].Key() != make3(4)[0].Key() || vanished[0].Key() != make3(3)[0].Key() {
		t.Errorf("appeared %+v, vanished %+v", appeared, vanished)
	}
}

// FuzzRead: no log makes Read panic, return an entry that is not in it, or take long.
func FuzzRead(f *testing.F) {
	e := nvme.DiscoveryEntry{1, 1, 2}
	f.Add(encode(1, e, e), uint32(0))
	body, _ := nvme.AppendExtendedEntry(nil, &e, []nvme.ExtendedAttribute{{Type: 1, Value: []byte("abc")}})
	f.Add(append(nvme.DiscoveryHeader{NumRec: 1, Returned: 1, Length: uint32(1024 + len(body))}.AppendTo(nil), body...), uint32(0x10001))
	f.Fuzz(func(t *testing.T, b []byte, support uint32) {
		s := &service{log: b, support: support}
		log, err := ReadExtended(t.Context(), s, Limits{Entries: 64})
		if err != nil {
			return
		}
		if len(log.Entries) > 64 || s.bytes > 1024*(2+2*64) {
			t.Fatalf("%d entries, %d bytes", len(log.Entries), s.bytes)
		}
		for i := range log.Entries {
			if to, err := log.Entries[i].Endpoint(); err == nil && (!to.Address.IsValid() || nvme.ValidateNQN(to.NQN) != nil) {
				t.Fatalf("entry %d leads to %v", i, to)
			}
		}
	})
}
