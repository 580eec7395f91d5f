package server

import (
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

// TestSupersededBy: an id that a target gave to two servers is the later one's
// controller. A target that restarts can swap the ids of two servers.
func TestSupersededBy(t *testing.T) {
	entry := func(name, nqn string, made map[uint16]int64) *state.Entry {
		return &state.Entry{Record: state.Record{State: state.State{Name: name, Target: state.Target{NQN: nqn}, Made: made}}}
	}
	r := newRecord(entry("ctrl0", "nqn.a", map[uint16]int64{1: 10, 2: 50}), 0)
	for name, c := range map[string]struct {
		other *state.Entry
		id    uint16
		want  bool
	}{
		"later":             {entry("ctrl1", "nqn.a", map[uint16]int64{1: 20}), 1, true},
		"earlier":           {entry("ctrl1", "nqn.a", map[uint16]int64{1: 5}), 1, false},
		"another id":        {entry("ctrl1", "nqn.a", map[uint16]int64{2: 20}), 1, false},
		"another subsystem": {entry("ctrl1", "nqn.b", map[uint16]int64{1: 20}), 1, false},
		"itself":            {entry("ctrl0", "nqn.a", map[uint16]int64{1: 20}), 1, false},
		"unknown":           {entry("ctrl1", "nqn.a", map[uint16]int64{3: 20}), 3, false},
	} {
		if got := r.supersededBy([]state.Record{c.other.Record}, c.id); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestMade: the time of a controller stays on record as long as it may have commands, or is
// the newest.
func TestMade(t *testing.T) {
	r := newRecord(&state.Entry{}, 0)
	r.own = false // nothing is saved
	r.made(1)
	if err := r.associated(1); err != nil {
		t.Fatal(err)
	}
	r.made(2)
	r.made(3)
	if m := r.entry.Made; len(m) != 2 || m[1] == 0 || m[3] < m[1] {
		t.Errorf("%v", m)
	}
}
