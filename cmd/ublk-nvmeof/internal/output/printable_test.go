package output

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"unicode"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/targetserver"
)

func TestText(t *testing.T) {
	for in, want := range map[string]string{
		"":                    "",
		"nqn.2026-01:disk ü→": "nqn.2026-01:disk ü→",
		`C:\n "x"`:            `C:\n "x"`,
		"a\nb\tc\r":           `a\nb\tc\r`,
		"\x1b[2J\x07":         `\x1b[2J\a`,
		"\u009b31m":           `\u009b31m`,
		"\u202eabc":           `\u202eabc`,
		"\xff\x00":            `\xff\x00`,
		"\ufffd":              "\ufffd",
		"\u2028":              `\u2028`,
	} {
		if got := Text(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// hostile fills every string below v with what a terminal must not see.
func hostile(v reflect.Value) {
	switch v.Kind() {
	case reflect.String:
		v.SetString("x\x1b]0;owned\x07\r\ny\tz")
	case reflect.Struct:
		for i := range v.NumField() {
			hostile(v.Field(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		hostile(v.Index(0))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		hostile(v.Elem())
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		value := reflect.New(v.Type().Elem()).Elem()
		hostile(value)
		v.SetMapIndex(reflect.ValueOf("1"), value)
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(1)
	case reflect.Int:
		v.SetInt(1)
	}
}

// Whatever a server, a target or a host says of itself, a table has neither
// control characters nor lines of theirs, and JSON has what they said.
func TestTablesArePrintable(t *testing.T) {
	var s control.Status
	hostile(reflect.ValueOf(&s).Elem())
	var target targetserver.Status
	hostile(reflect.ValueOf(&target).Elem())
	for name, write := range map[string]func(*strings.Builder) error{
		"connect":    func(b *strings.Builder) error { return Connected(b, s, Normal, false) },
		"connect -v": func(b *strings.Builder) error { return Connected(b, s, Normal, true) },
		"list":       func(b *strings.Builder) error { return List(b, []control.Status{s}, nil, Normal, false) },
		"list -v":    func(b *strings.Builder) error { return List(b, []control.Status{s}, nil, Normal, true) },
		"subsystems": func(b *strings.Builder) error { return Subsystems(b, []control.Status{s}, Normal) },
		"topology":   func(b *strings.Builder) error { return Topology(b, []control.Status{s}, Normal) },
		"targets":    func(b *strings.Builder) error { return Targets(b, []targetserver.Status{target}, Normal, false) },
		"targets -v": func(b *strings.Builder) error { return Targets(b, []targetserver.Status{target}, Normal, true) },
	} {
		var b strings.Builder
		if err := write(&b); err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(b.String(), "\n", "")
		if i := strings.IndexFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 || !strings.Contains(text, `\x1b`) {
			t.Errorf("%s: %q", name, b.String())
		}
		for line := range strings.Lines(b.String()) {
			if strings.HasPrefix(line, "y") {
				t.Errorf("%s has a line of a peer: %q", name, line)
			}
		}
	}
	var b strings.Builder
	if err := List(&b, []control.Status{s}, nil, JSON, false); err != nil {
		t.Fatal(err)
	}
	var l struct{ Controllers []control.Status }
	if err := json.Unmarshal([]byte(b.String()), &l); err != nil || len(l.Controllers) != 1 || !reflect.DeepEqual(l.Controllers[0], s) {
		t.Errorf("%v: JSON is not exact", err)
	}
	if before := s.NQN; printable(s).NQN == before || s.NQN != before {
		t.Error("the copy is none")
	}
}

// JSON is exact, and shows nothing raw that a terminal would interpret.
func TestJSONIsPrintable(t *testing.T) {
	for _, text := range []string{"a\x1b[31mb\nc\x7fd\u009be ü\u2028", "\u202eright", "\U000e0001tag", "日本 <&> 😀"} {
		var out bytes.Buffer
		if err := writeJSON(&out, text); err != nil {
			t.Fatal(err)
		}
		for _, r := range strings.TrimSuffix(out.String(), "\n") {
			if !unicode.IsPrint(r) {
				t.Errorf("%q: %U is raw in %q", text, r, out.String())
			}
		}
		var back string
		if err := json.Unmarshal(out.Bytes(), &back); err != nil || back != text {
			t.Errorf("%q came back as %q, %v", text, back, err)
		}
	}
}

func TestCountsOfOne(t *testing.T) {
	for got, want := range map[string]string{
		count(1, "I/O queue"): "1 I/O queue", count(0, "queue"): "0 queues", count(uint64(1), "batch"): "1 batch", count(2, "flush"): "2 flushes",
		deviceText(control.Device{NSID: 1, Size: 1, BlockSize: 512, Queues: 1, QueueDepth: 1}): "namespace 1, 1 B, blocks of 512, 1 queue of 1 request up to -",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
