package output

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"ublk-nvmeof/nvme"
)

// noise is a page without structure.
func noise(size int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	page := make([]byte, size)
	for i := range page {
		page[i] = byte(r.Uint32())
	}
	return page
}

// TestPlaces compares the fields with the accessors of package nvme that have their names.
func TestPlaces(t *testing.T) {
	page := noise(nvme.IdentifySize)
	for name, tt := range map[string]struct {
		view   any
		places []place
		least  int // fields that have an accessor
	}{
		"controller": {nvme.IdentifyControllerAt(page), controllerPlaces, 45},
		"namespace":  {nvme.IdentifyNamespaceAt(page), namespacePlaces, 30},
		"smart":      {nvme.SMARTLogAt(page), smartPlaces, 1},
		"error":      {nvme.ErrorLogEntryAt(page), errorPlaces, 4},
	} {
		compared := 0
		for _, p := range tt.places {
			m := reflect.ValueOf(tt.view).MethodByName(strings.ToUpper(p.name))
			if !m.IsValid() {
				m = reflect.ValueOf(tt.view).MethodByName(strings.ToUpper(p.name[:1]) + p.name[1:])
			}
			if !m.IsValid() || p.kind == text || p.kind == digits || p.kind == uuid {
				continue
			}
			want := fmt.Sprint(m.Call(nil)[0].Convert(reflect.TypeFor[uint64]()))
			got, err := json.Marshal(p.decode(page[p.at : p.at+p.size]).value)
			if p.size == 16 && want == "18446744073709551615" {
				want = string(got) // the accessor has 64 bits
			}
			if err != nil || string(got) != want {
				t.Errorf("%s: %s is %s, want %s, %v", name, p.name, got, want, err)
			}
			compared++
		}
		if compared < tt.least {
			t.Errorf("%s: only %d fields were compared", name, compared)
		}
	}
}

// TestPlacesAreApart finds fields that overlap, and names that come twice.
func TestPlacesAreApart(t *testing.T) {
	for name, places := range map[string][]place{
		"controller": controllerPlaces, "namespace": namespacePlaces, "power state": powerPlaces,
		"smart": append(smartPlaces, thermalPlaces...), "error": errorPlaces, "reservation": reservationPlaces,
	} {
		owner := map[int]string{}
		seen := map[string]bool{}
		for _, p := range places {
			if seen[p.name] {
				t.Errorf("%s: %s comes twice", name, p.name)
			}
			seen[p.name] = true
			for at := p.at; at < p.at+p.size; at++ {
				if owner[at] != "" {
					t.Errorf("%s: %s overlaps %s at byte %d", name, p.name, owner[at], at)
				}
				owner[at] = p.name
			}
		}
	}
}

// pages are what a controller could answer.
type pages struct {
	controller, namespace, descriptors, smart, errors, ana, report, extended []byte
}

func examples() pages {
	p := pages{controller: make([]byte, 4096), namespace: make([]byte, 4096), descriptors: make([]byte, 4096), smart: make([]byte, 512), errors: make([]byte, 128)}
	id := nvme.IdentifyControllerAt(p.controller)
	id.SetSN("0123456789abcdef0123")
	id.SetMN("Linux")
	copy(p.controller[64:], "7.3\x1b[1m")
	id.SetSUBNQN("nqn.2026-01.org.example:lab")
	id.SetCNTLID(0x1234)
	id.SetVER(nvme.NewVersion(2, 1, 0))
	id.SetSGLS(0x108005)
	id.SetNN(1024)
	id.SetKAS(10)
	copy(p.controller[280:], []byte{0: 0xFF, 8: 1}) // TNVMCAP beyond 64 bits
	ns := nvme.IdentifyNamespaceAt(p.namespace)
	ns.SetNSZE(1 << 20)
	ns.SetNCAP(1 << 20)
	ns.SetNUSE(1 << 19)
	ns.SetNSFEAT(1 << 4)
	ns.SetNPWG(7)
	ns.SetNLBAF(1)
	ns.SetLBAFormat(0, nvme.LBAFormat{LBADS: 9})
	ns.SetLBAFormat(1, nvme.LBAFormat{LBADS: 12, MS: 8, RP: 1})
	ns.SetNGUID([16]byte{1, 2, 3, 15: 0xFF})
	ids := nvme.NamespaceIDs{NGUID: ns.NGUID(), EUI64: [8]byte{7: 9}, UUID: nvme.UUID{0x22, 15: 0x33}, HasCSI: true}
	list := append(ids.AppendTo(nil), 0xC0, 2, 0, 0, 1, 1) // a type that is not known
	copy(p.descriptors, list)
	smart := nvme.SMARTLogAt(p.smart)
	smart.SetTemperature(298)
	smart.SetAvailableSpare(100)
	smart.SetDataUnitsRead(123456789)
	p.smart[202] = 0x2B // the second sensor
	p.smart[203] = 1
	e := nvme.ErrorLogEntryAt(p.errors)
	e.SetErrorCount(7)
	e.SetSQID(1)
	e.SetStatus(nvme.StatusLBAOutOfRange | nvme.StatusDNR)
	e.SetLBA(1 << 40)
	e.SetOpcode(nvme.OpRead)
	p.ana = nvme.AppendANAHeader(nil, 5, 2)
	p.ana = nvme.AppendANAGroup(p.ana, 1, 5, nvme.ANAOptimized, 1, 7)
	p.ana = nvme.AppendANAGroup(p.ana, 2, 4, nvme.ANAInaccessible)
	p.report = append([]byte{3, 0, 0, 0, 1, 1, 0, 0, 0, 1, 23: 0}, []byte{5, 0, 1, 23: 0}...)
	le.PutUint64(p.report[32:], 0x1122334455667788)
	le.PutUint64(p.report[40:], 0xABCD)
	p.extended = append(append(append([]byte{}, p.report[:24]...), make([]byte, 40)...), make([]byte, 64)...)
	copy(p.extended[64:], []byte{5, 0, 1})
	le.PutUint64(p.extended[72:], 0xABCD)
	copy(p.extended[80:], []byte{0xAA, 15: 0xBB})
	return p
}

// inspected are all outputs of the verbs that show what a controller says.
func inspected() map[string]func(b *bytes.Buffer, format string) error {
	p := examples()
	ana, _ := nvme.ParseANALog(p.ana)
	features := []Feature{
		{ID: nvme.FeatureVolatileWriteCache, Result: 1}, {ID: nvme.FeatureNumberOfQueues, Result: 0x7F007F},
		{ID: nvme.FeatureAsyncEvent, Result: 0x900}, {ID: nvme.FeatureKeepAlive, Result: 5000}, {ID: nvme.FeatureHostID, Data: p.extended[80:96]},
		{ID: nvme.FeatureWriteProtect}, {ID: nvme.FeatureReservationMask, Result: 2}, {ID: nvme.FeatureReservationPersist},
		{ID: nvme.FeatureKeepAlive, Select: 3, Result: 4}, {ID: 0xD0, Select: 1, Result: 9},
	}
	values := map[uint32]uint64{nvme.PropCAP: 0x8000820F01007F, nvme.PropVS: 0x20100, nvme.PropCC: 0x460061, nvme.PropCSTS: 1, nvme.PropCRTO: 15}
	return map[string]func(*bytes.Buffer, string) error{
		"id-ctrl":       func(b *bytes.Buffer, f string) error { return IdentifyController(b, p.controller, false, f) },
		"id-ns":         func(b *bytes.Buffer, f string) error { return IdentifyNamespace(b, p.namespace, 1, false, f) },
		"id-ctrl-human": func(b *bytes.Buffer, f string) error { return IdentifyController(b, p.controller, true, f) },
		"id-ns-human":   func(b *bytes.Buffer, f string) error { return IdentifyNamespace(b, p.namespace, 1, true, f) },
		"smart-human":   func(b *bytes.Buffer, f string) error { return SMARTLog(b, p.smart, "ublkb0", nvme.NSIDAll, true, f) },
		"list-ns":       func(b *bytes.Buffer, f string) error { return NamespaceList(b, []uint32{1, 7}, f) },
		"ns-descs":      func(b *bytes.Buffer, f string) error { return NamespaceDescriptors(b, p.descriptors, 1, f) },
		"smart-log":     func(b *bytes.Buffer, f string) error { return SMARTLog(b, p.smart, "ublkb0", nvme.NSIDAll, false, f) },
		"error-log":     func(b *bytes.Buffer, f string) error { return ErrorLog(b, p.errors, "ublkb0", f) },
		"ana-log":       func(b *bytes.Buffer, f string) error { return ANALog(b, ana, "ublkb0", "10.0.2.15", f) },
		"get-log": func(b *bytes.Buffer, f string) error {
			return LogPage(b, []byte("log\x00 page\x1b and more"), "ublkb0", 2, 1, f)
		},
		"get-feature":   func(b *bytes.Buffer, f string) error { return Features(b, features, true, f) },
		"show-regs":     func(b *bytes.Buffer, f string) error { return Properties(b, values, true, f) },
		"get-property":  func(b *bytes.Buffer, f string) error { return Property(b, nvme.PropVS, 0x20100, true, f) },
		"resv-report":   func(b *bytes.Buffer, f string) error { return Reservations(b, p.report, false, f) },
		"resv-extended": func(b *bytes.Buffer, f string) error { return Reservations(b, p.extended, true, f) },
	}
}

func TestInspectGolden(t *testing.T) {
	for name, write := range inspected() {
		for format, ext := range map[string]string{Normal: ".txt", JSON: ".json"} {
			var b bytes.Buffer
			if err := write(&b, format); err != nil {
				t.Fatal(err)
			}
			golden(t, name+ext, b.Bytes())
			if format == JSON && !json.Valid(b.Bytes()) {
				t.Errorf("%s: no JSON", name)
			}
			if strings.Contains(b.String(), "\x1b") {
				t.Errorf("%s: a control character", name)
			}
		}
	}
}

// TestInspectNoise: whatever a controller answers, the output is text or JSON.
func TestInspectNoise(t *testing.T) {
	page := noise(nvme.IdentifySize)
	for name, write := range map[string]func(*bytes.Buffer, string) error{
		"id-ctrl":     func(b *bytes.Buffer, f string) error { return IdentifyController(b, page, true, f) },
		"id-ns":       func(b *bytes.Buffer, f string) error { return IdentifyNamespace(b, page, 1, true, f) },
		"ns-descs":    func(b *bytes.Buffer, f string) error { return NamespaceDescriptors(b, page, 1, f) },
		"smart-log":   func(b *bytes.Buffer, f string) error { return SMARTLog(b, page[:512], "ublkb0", 1, true, f) },
		"error-log":   func(b *bytes.Buffer, f string) error { return ErrorLog(b, page, "ublkb0", f) },
		"resv-report": func(b *bytes.Buffer, f string) error { return Reservations(b, page, false, f) },
		"extended":    func(b *bytes.Buffer, f string) error { return Reservations(b, page, true, f) },
	} {
		for _, format := range []string{Normal, JSON} {
			var b bytes.Buffer
			if err := write(&b, format); err != nil || format == JSON && !json.Valid(b.Bytes()) {
				t.Errorf("%s, %s: %v", name, format, err)
			}
			for _, r := range b.String() {
				if r < ' ' && r != '\n' && r != '\t' {
					t.Errorf("%s, %s: character %q", name, format, r)
				}
			}
		}
	}
}

// TestBits: each name of a bit is of a field, and within it.
func TestBits(t *testing.T) {
	size := map[string]int{}
	for _, places := range [][]place{controllerPlaces, namespacePlaces, smartPlaces} {
		for _, p := range places {
			size[p.name] = p.size
		}
	}
	for name, bits := range bitNames {
		if len(bits) > 8*size[name] {
			t.Errorf("%s has %d bits, and %d names", name, 8*size[name], len(bits))
		}
	}
}
