package state

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// at describes a controller that was requested at a time and made within 5 units.
func at(asked int64) Made { return Made{lab.Address, "net", "boot", asked, asked + 5} }

// TestMadeBefore: one controller is older than another only if their order is certain.
func TestMadeBefore(t *testing.T) {
	for name, c := range map[string]struct {
		a, b Made
		want bool
	}{
		"before":                 {at(10), at(20), true},
		"after":                  {at(20), at(10), false},
		"same":                   {at(10), at(10), false},
		"asked before an answer": {at(10), at(14), false},
		"another boot":           {at(10), Made{lab.Address, "net", "next boot", 20, 25}, false},
		"unknown":                {Made{}, Made{Asked: 1, Answered: 2}, false},
	} {
		if got := c.a.Before(c.b); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	asked := time.Now()
	first := JustMade(lab.Address, asked)
	if second := JustMade(lab.Address, time.Now()); !first.Before(second) || second.Before(first) {
		t.Errorf("%+v, then %+v", first, second)
	}
	if network, err := os.Readlink("/proc/self/ns/net"); err != nil || first.Network != network || first.Address != lab.Address {
		t.Errorf("%+v, in the network namespace %s", first, network)
	}
	if second := JustMade(lab.Address, asked); first.Before(second) {
		t.Errorf("%+v, then %+v, asked for at the same time", first, second)
	}
}

// TestGivenLater tests which notices prove that another server was given the same id
// later.
func TestGivenLater(t *testing.T) {
	other := netip.MustParseAddrPort("10.0.2.16:4420")
	for name, c := range map[string]struct {
		nqn     string
		address netip.AddrPort
		id      uint16
		made    Made
		want    bool
	}{
		"later":             {lab.NQN, lab.Address, 1, at(10), true},
		"earlier":           {lab.NQN, lab.Address, 1, at(30), false},
		"at the same time":  {lab.NQN, lab.Address, 1, at(18), false},
		"another id":        {lab.NQN, lab.Address, 2, at(10), false},
		"another subsystem": {"nqn.other", lab.Address, 1, at(10), false},
		"another address":   {lab.NQN, other, 1, at(10), false},
		"an earlier boot":   {lab.NQN, lab.Address, 1, Made{lab.Address, "net", "last boot", 10, 15}, false},
		"another network":   {lab.NQN, lab.Address, 1, Made{lab.Address, "container", "boot", 10, 15}, false},
	} {
		h := Host{t.TempDir()}
		if err := h.Notify(lab.NQN, map[Controller]Made{atLab(1): at(20)}); err != nil {
			t.Fatal(err)
		}
		if got := h.GivenLater(c.nqn, Controller{c.address, c.id}, c.made); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	var none Host
	if none.GivenLater(lab.NQN, atLab(1), at(10)) || none.Notify(lab.NQN, nil) != nil || none.Withdraw() != nil {
		t.Error("without directories")
	}
}

// TestHostDirectories: notices in all directories of a Host count, except in a
// directory that another user could have prepared.
func TestHostDirectories(t *testing.T) {
	mine, roots := t.TempDir(), t.TempDir()
	if err := (Host{roots}).Notify(lab.NQN, map[Controller]Made{atLab(1): at(20)}); err != nil {
		t.Fatal(err)
	}
	later := func() bool { return Host{mine, roots}.GivenLater(lab.NQN, atLab(1), at(10)) }
	if !later() {
		t.Error("a notice in the second directory does not count")
	}
	dir := filepath.Join(roots, madeDir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if later() {
		t.Error("a notice counts that everybody could have written")
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() != 0 {
		return // only root can change the owner of a directory
	}
	if err := os.Chown(dir, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if later() {
		t.Error("root believes another user")
	}
}

// TestNotices: a process has one notice, and removes the notices of processes that have
// ended.
func TestNotices(t *testing.T) {
	h := Host{t.TempDir()}
	dir := filepath.Join(h[0], madeDir)
	notify := func(id uint16) {
		t.Helper()
		if err := h.Notify(lab.NQN, map[Controller]Made{atLab(id): at(20)}); err != nil {
			t.Fatal(err)
		}
	}
	notify(1)
	dead := notice{SchemaVersion, deadProcess(t), lab.NQN, map[Controller]Made{atLab(3): at(20)}}
	if err := writeFile(noticeFile(dir, dead.Process), dead, public); err != nil {
		t.Fatal(err)
	}
	if !h.GivenLater(lab.NQN, atLab(3), at(10)) {
		t.Error("the target gave the id away, although that server has died since")
	}
	notify(2)
	if h.GivenLater(lab.NQN, atLab(1), at(10)) || !h.GivenLater(lab.NQN, atLab(2), at(10)) {
		t.Error("the second notice does not replace the first")
	}
	if found := notices(dir); len(found) != 1 {
		t.Errorf("notices: %v", found)
	}
	if err := os.WriteFile(filepath.Join(dir, "1-1.json"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if !h.GivenLater(lab.NQN, atLab(2), at(10)) {
		t.Error("an unreadable notice hides others")
	}
	for range 2 {
		if err := h.Withdraw(); err != nil {
			t.Error(err)
		}
	}
	if found := notices(dir); len(found) != 0 {
		t.Errorf("after the end: %v", found)
	}
}

// atLab names a controller that was made at the address of lab.
func atLab(id uint16) Controller { return Controller{lab.Address, id} }

// controllers names controllers that were made at the address of lab.
func controllers(ids ...uint16) (all []Controller) {
	for _, id := range ids {
		all = append(all, atLab(id))
	}
	return all
}

// TestLastMade: controllers of several dead servers may have had the same id. Then the
// last one counts, because it may still execute commands even if another server was
// given the id between them.
func TestLastMade(t *testing.T) {
	dead := deadProcess(t)
	for what, begin := range map[string]func(Dir) (*Entry, error){
		"new server": func(d Dir) (*Entry, error) { return d.Reserve(ctx, lab, nil, true) },
		"takeover":   func(d Dir) (*Entry, error) { return d.Adopt(ctx, "ctrl0") },
	} {
		d := Dir(t.TempDir())
		for _, s := range []State{
			{Controllers: controllers(1, 2, 3, 4), Made: map[Controller]Made{atLab(1): at(10), atLab(2): at(10), atLab(3): at(10), atLab(4): at(10)}},
			{Controllers: controllers(1, 2, 3), Made: map[Controller]Made{atLab(1): at(30), atLab(3): at(12)}},
		} {
			e, err := d.Reserve(ctx, lab, nil, true)
			if err != nil {
				t.Fatal(err)
			}
			e.Process, e.Controllers, e.Made = dead, s.Controllers, s.Made
			if err := e.Save(); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.saveLeft(left{}.with(lab, controllers(4, 5), 5)); err != nil {
			t.Fatal(err)
		}
		e, err := begin(d)
		if err != nil {
			t.Fatal(err)
		}
		if len(e.Controllers) != 5 || len(e.Made) != 1 || e.Made[atLab(1)] != at(30) {
			t.Errorf("%s: %v, %v", what, e.Controllers, e.Made)
		}
	}
}
