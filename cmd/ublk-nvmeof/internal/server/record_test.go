package server

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
)

var (
	labAddress = netip.MustParseAddrPort("192.0.2.1:4420")
	// present is what a target says while it has a controller with id 1.
	present = initiator.Present{Address: labAddress, CNTLID: 1, Serial: "s", Model: "m"}
)

// atLab names a controller that was made at labAddress.
func atLab(id uint16) state.Controller { return state.Controller{Address: labAddress, CNTLID: id} }

// controllers names controllers of the fake target, which has no address.
func controllers(ids ...uint16) (all []state.Controller) {
	for _, id := range ids {
		all = append(all, state.Controller{CNTLID: id})
	}
	return all
}

// madeAt describes a controller that was asked for at a time and made at once.
func madeAt(at int64) state.Made {
	return state.Made{Address: labAddress, Network: "net", Clock: "boot", Asked: at, Answered: at + 1}
}

// TestSuperseded: a controller has ended if another server, whatever its run directory is,
// or the kernel's initiator was certainly given its id later. A target that restarts can
// swap the ids of two of them.
func TestSuperseded(t *testing.T) {
	const nqn, hostNQN = "nqn.a", "nqn.host"
	kernel := host.NVMeController{Address: labAddress, NQN: nqn, HostNQN: hostNQN, CNTLID: 1, Serial: "s", Model: "m"}
	for name, c := range map[string]struct {
		id     uint16 // of this server's controller, made at 10
		nqn    string // what another server told
		made   map[state.Controller]state.Made
		kernel []host.NVMeController
		want   bool
	}{
		"nobody else":              {id: 1},
		"another server":           {id: 1, nqn: nqn, made: map[state.Controller]state.Made{atLab(1): madeAt(20)}, want: true},
		"of another subsystem":     {id: 1, nqn: "nqn.b", made: map[state.Controller]state.Made{atLab(1): madeAt(20)}},
		"of unknown age":           {id: 2, nqn: nqn, made: map[state.Controller]state.Made{atLab(1): madeAt(20)}},
		"the kernel":               {id: 1, kernel: []host.NVMeController{kernel}, want: true},
		"the kernel, unknown age":  {id: 2, kernel: []host.NVMeController{kernel}, want: true},
		"the kernel, another host": {id: 1, kernel: []host.NVMeController{{Address: labAddress, NQN: nqn, HostNQN: "nqn.other", CNTLID: 1, Serial: "s", Model: "m"}}},
	} {
		w := newWorld()
		w.kernel = c.kernel
		shared := state.Host{t.TempDir()}
		s := &server{
			cfg: Config{Host: shared}, opts: &options.Connect{NQN: nqn, HostNQN: hostNQN},
			back: w.backend(), log: slog.New(slog.DiscardHandler),
			record: newRecord(&state.Entry{Record: state.Record{State: state.State{Made: map[state.Controller]state.Made{atLab(c.id): madeAt(10)}}}}, 0),
		}
		if c.made != nil {
			if err := shared.Notify(c.nqn, c.made); err != nil {
				t.Fatal(err)
			}
		}
		if got := s.superseded(t.Context(), present); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestMadeIsTold: servers of different run directories learn of each other's controllers,
// and nothing is left when they end.
func TestMadeIsTold(t *testing.T) {
	shared := state.Host{t.TempDir()}
	s := &server{cfg: Config{Host: shared}, opts: &options.Connect{NQN: "nqn.a"}, log: slog.New(slog.DiscardHandler), record: newRecord(&state.Entry{}, 0)}
	s.record.own = false // nothing is saved
	before := state.JustMade(labAddress, time.Now())
	asked := time.Now()
	s.made(labAddress, 1, asked)
	if !shared.GivenLater("nqn.a", atLab(1), before) {
		t.Error("another server does not learn of the controller")
	}
	if after := state.JustMade(labAddress, asked); shared.GivenLater("nqn.a", atLab(1), after) {
		t.Error("it is taken for a later one than one that was asked for at the same time")
	}
	s.withdraw()
	if shared.GivenLater("nqn.a", atLab(1), before) {
		t.Error("the server has ended, and others still learn of its controller")
	}
}

// TestMade: the time of a controller stays on record as long as it may have commands, or is
// the newest.
func TestMade(t *testing.T) {
	r := newRecord(&state.Entry{}, 0)
	r.own = false // nothing is saved
	r.made(1, madeAt(1))
	if err := r.associated([]initiator.ControllerID{{Address: labAddress, CNTLID: 1}}); err != nil {
		t.Fatal(err)
	}
	r.made(2, madeAt(2))
	r.made(3, madeAt(3))
	if m := r.entry.Made; len(m) != 2 || m[atLab(1)] != madeAt(1) || m[atLab(3)] != madeAt(3) {
		t.Errorf("%v", m)
	}
}

// TestMadeBeforeHandover: a server that replaces a running one knows when its own
// controller was made also after it has taken over the record.
func TestMadeBeforeHandover(t *testing.T) {
	for name, c := range map[string]struct {
		predecessor state.State // when it has ended
		want        state.Made
	}{
		"another id":           {state.State{Controllers: []state.Controller{atLab(1)}, Made: map[state.Controller]state.Made{atLab(1): madeAt(10)}}, madeAt(20)},
		"same id, earlier":     {state.State{Controllers: []state.Controller{atLab(2)}, Made: map[state.Controller]state.Made{atLab(2): madeAt(10)}}, madeAt(20)},
		"same id, later":       {state.State{Controllers: []state.Controller{atLab(2)}, Made: map[state.Controller]state.Made{atLab(2): madeAt(30)}}, madeAt(30)},
		"same id, unknown age": {state.State{Controllers: []state.Controller{atLab(2)}}, state.Made{}},
	} {
		r := copyOf(state.Record{State: state.State{Controllers: []state.Controller{atLab(1)}}}, 0)
		r.made(2, madeAt(20))
		dir := state.Dir(t.TempDir())
		e, err := dir.Reserve(t.Context(), state.Target{NQN: "nqn.a"}, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		e.Controllers, e.Made = c.predecessor.Controllers, c.predecessor.Made
		if err := r.become(e); err != nil {
			t.Fatal(err)
		}
		if got, _ := r.lastMade(atLab(2)); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
