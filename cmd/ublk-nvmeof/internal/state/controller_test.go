package state

import (
	"encoding/json"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
)

// TestControllerNames: names are read as they are written, and nothing else is a name.
func TestControllerNames(t *testing.T) {
	for _, c := range []Controller{{CNTLID: 5}, atLab(65535), {netip.MustParseAddrPort("[fe80::1%eth0]:4420"), 0}} {
		text, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		var got Controller
		if err := json.Unmarshal(text, &got); err != nil || got != c {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{`""`, `"@"`, `"5@"`, `"65536"`, `"-1"`, `65536`, `"5@10.0.0.1"`, `"x@10.0.0.1:1"`, `{}`} {
		var c Controller
		if err := json.Unmarshal([]byte(text), &c); err == nil {
			t.Errorf("%s is %v", text, c)
		}
	}
}

// TestControllersOfOlderVersion: records of older versions have ids, and addresses in Made.
func TestControllersOfOlderVersion(t *testing.T) {
	s, err := parse([]byte(`{"schema_version": 1, "process": {"pid": 1}, "target": {"address": "10.0.2.15:4420", "nqn": "n"},
		"controllers": [3, 4], "earlier_controllers": [3],
		"made_at": {"3": {"address": "10.0.2.15:4420", "network": "net", "clock": "boot", "asked": 10, "answered": 15}}}`))
	if err != nil {
		t.Fatal(err)
	}
	if want := []Controller{atLab(3), {CNTLID: 4}}; !slices.Equal(s.Controllers, want) || !slices.Equal(s.Earlier, want[:1]) ||
		len(s.Made) != 1 || s.Made[atLab(3)] != at(10) {
		t.Errorf("%+v", s)
	}
}

// TestSameIDAtTwoAddresses: controllers with the same id that targets at two addresses have made
// are two controllers, in the record of a dead server and after it was given up.
func TestSameIDAtTwoAddresses(t *testing.T) {
	d := Dir(filepath.Join(t.TempDir(), "run"))
	want := []Controller{atLab(5), {netip.MustParseAddrPort("10.0.2.16:4420"), 5}}
	dead := reserve(t, d, lab)
	dead.Controllers = Distinct(want)
	dead.Made = map[Controller]Made{want[0]: at(10), want[1]: {want[1].Address, "net", "boot", 20, 25}}
	die(t, dead)
	if r, err := d.Find(dead.Name); err != nil || !slices.Equal(r.Controllers, want) || len(r.Made) != 2 || r.Made[want[0]] != at(10) {
		t.Errorf("on record %+v, %v", r, err)
	}
	if ok, err := d.Clear(ctx, dead.Name, nothingLeft); !ok || err != nil {
		t.Fatalf("%t, %v", ok, err)
	}
	if e := reserve(t, d, lab); !slices.Equal(e.Controllers, want) {
		t.Errorf("the next server waits for %v", e.Controllers)
	}
}
