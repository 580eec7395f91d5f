package discovery

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/target"
)

const (
	testHost = "nqn.2026-01.org.example:host"
	testDisk = "nqn.2026-01.org.example:disk"
)

var hostAddr = netip.MustParseAddr("192.0.2.99")

// lab is a fabric with targets.
type lab struct {
	t      *testing.T
	fabric *rdmatest.Fabric
}

func newLab(t *testing.T) *lab {
	l := &lab{t, rdmatest.NewFabric()}
	t.Cleanup(func() {
		if left := l.fabric.Objects(); left != (rdmatest.Objects{}) {
			t.Errorf("objects are left: %+v", left)
		}
	})
	return l
}

func (l *lab) target(to Endpoint, nqns ...string) *target.Target {
	l.t.Helper()
	tg, err := target.New(target.Config{})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		if err := tg.Close(); err != nil {
			l.t.Error(err)
		}
	})
	if _, err := tg.AddPorts(target.PortConfig{Provider: l.fabric.Provider(to.Address.Addr()), Addr: to.Address}); err != nil {
		l.t.Fatal(err)
	}
	for _, nqn := range nqns {
		if _, err := tg.AddSubsystem(target.SubsystemConfig{NQN: nqn, AllowAny: true}); err != nil {
			l.t.Fatal(err)
		}
	}
	return tg
}

func (l *lab) config(to Endpoint) initiator.Config {
	return initiator.Config{
		Path: initiator.Path{Provider: l.fabric.Provider(hostAddr), Address: to.Address}, HostNQN: testHost, HostID: nvme.UUID{1},
		ReconnectDelay: 10 * time.Millisecond, CtrlLoss: -1,
	}
}

func (l *lab) open(ctx context.Context, to Endpoint, changed func()) (Conn, error) {
	cfg := l.config(to)
	cfg.DiscoveryChanged = changed
	return OpenUnique(ctx, cfg)
}

// TestOpen: the log of a target, over a controller without I/O queues.
func TestOpen(t *testing.T) {
	l := newLab(t)
	tg := l.target(at(1), testDisk)
	if _, err := tg.AddSubsystem(target.SubsystemConfig{NQN: "nqn.2026-01.org.example:secret", AllowHosts: []string{"x"}}); err != nil {
		t.Fatal(err)
	}
	c, err := Open(t.Context(), l.config(at(1)))
	if err != nil {
		t.Fatal(err)
	}
	log, err := Read(t.Context(), c, Limits{})
	if err != nil || len(log.Entries) != 2 {
		t.Fatalf("%+v, %v", log, err)
	}
	for i, want := range []Endpoint{{at(1).Address, nvme.DiscoveryNQN}, {at(1).Address, testDisk}} {
		if got, err := log.Entries[i].Endpoint(); err != nil || got != want {
			t.Errorf("entry %d: %v, %v", i, got, err)
		}
	}
	if i := c.Info(); i.State != initiator.StateLive || i.Paths[0].Plan.Queues() != 0 || len(c.Namespaces()) != 0 {
		t.Errorf("%+v", i)
	}
	if err := c.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestOpenExtended: a target has the log with attributes, with the same entries, also if they
// do not fit into one command.
func TestOpenExtended(t *testing.T) {
	l := newLab(t)
	tg := l.target(at(1), testDisk)
	for i := range 9 {
		if err := tg.AddReferral(at(10 + i).Address); err != nil {
			t.Fatal(err)
		}
	}
	c, err := Open(t.Context(), l.config(at(1)))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := Read(t.Context(), c, Limits{})
	if err != nil || plain.Extended || len(plain.Entries) != 11 {
		t.Fatalf("%+v, %v", plain, err)
	}
	extended, err := ReadExtended(t.Context(), c, Limits{})
	if err != nil || !extended.Extended || extended.Generation != plain.Generation || len(extended.Entries) != len(plain.Entries) {
		t.Fatalf("%+v, %v", extended, err)
	}
	for i, e := range extended.Entries {
		if e.DiscoveryEntry != plain.Entries[i].DiscoveryEntry || len(e.Attributes) != 0 {
			t.Errorf("entry %d: %+v", i, e)
		}
	}
	if err := c.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestOpenOther: a subsystem is no discovery service, and the other way round.
func TestOpenOther(t *testing.T) {
	l := newLab(t)
	l.target(at(1), testDisk)
	cfg := l.config(at(1))
	cfg.SubNQN = testDisk
	if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "no discovery controller (type 1)") {
		t.Errorf("%v", err)
	}
	cfg.SubNQN = "nqn.2026-01.org.example:unknown"
	if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "subsystem") {
		t.Errorf("%v", err)
	}
}

// TestOpenUnique: a service that has a name of its own is known by it, if the connection is
// kept and the service takes the name.
func TestOpenUnique(t *testing.T) {
	const own = "nqn.2026-01.org.example:services"
	l := newLab(t)
	tg, err := target.New(target.Config{DiscoveryNQN: own})
	if err != nil {
		t.Fatal(err)
	}
	defer tg.Close()
	if _, err := tg.AddPorts(target.PortConfig{Provider: l.fabric.Provider(at(1).Address.Addr()), Addr: at(1).Address}); err != nil {
		t.Fatal(err)
	}
	l.target(at(2))
	for _, c := range []struct {
		to        Endpoint
		open      func(context.Context, initiator.Config) (*initiator.Subsystem, error)
		ask, want string
	}{
		{at(1), Open, "", nvme.DiscoveryNQN}, {at(1), OpenUnique, "", own}, {at(1), OpenUnique, nvme.DiscoveryNQN, own},
		{at(1), OpenUnique, own, own}, {at(1), Open, own, own}, {at(2), OpenUnique, "", nvme.DiscoveryNQN},
	} {
		cfg := l.config(c.to)
		cfg.SubNQN = c.ask
		ctrl, err := c.open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		if got := ctrl.Info().SubNQN; got != c.want {
			t.Errorf("%v asked for by %q is known as %s, want %s", c.to, c.ask, got, c.want)
		}
		log, err := Read(t.Context(), ctrl, Limits{})
		if err != nil || len(log.Entries) != 1 || c.to == at(1) && log.Entries[0].NQN() != own {
			t.Errorf("%+v, %v", log, err)
		}
		if err := ctrl.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	// A controller whose name leads nowhere is used by the well-known one.
	const subnqn = 768 // in Identify Controller
	tg.Faults().Add(target.Fault{
		Match:   target.Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminIdentify}, Selectors: []uint8{nvme.CNSController}},
		Patches: []target.Patch{{Offset: subnqn, Bytes: []byte("nqn.nowhere\x00")}},
	})
	ctrl, err := OpenUnique(t.Context(), l.config(at(1)))
	if err != nil || ctrl.Info().SubNQN != nvme.DiscoveryNQN {
		t.Fatalf("%v", err)
	}
	if err := ctrl.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestWatchTargets: subsystems that appear, a service that is referred to, and a connection
// that is lost while the log changes.
func TestWatchTargets(t *testing.T) {
	l := newLab(t)
	first, second := l.target(at(1), testDisk), l.target(at(2), "nqn.2026-01.org.example:far")
	pages := make(chan Page, 100)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		Watch(ctx, at(1), WatchConfig{Open: l.open, Report: func(p Page) { pages <- p }, Settle: time.Millisecond, Poll: time.Hour, Retry: 10 * time.Millisecond})
	}()
	defer func() { cancel(); <-ended }()
	// until takes pages until one of the service lists a subsystem, or does not any more.
	until := func(from Endpoint, nqn string, listed bool) {
		t.Helper()
		limit := time.After(20 * time.Second)
		for {
			select {
			case p := <-pages:
				if p.From != from || p.Log == nil {
					continue
				}
				have := false
				for i := range p.Log.Entries {
					have = have || p.Log.Entries[i].NQN() == nqn
				}
				if have == listed {
					return
				}
			case <-limit:
				t.Fatalf("%v: %s listed: not %v in time", from, nqn, listed)
			}
		}
	}
	until(at(1), testDisk, true)
	add := func(tg *target.Target, nqn string) {
		t.Helper()
		if _, err := tg.AddSubsystem(target.SubsystemConfig{NQN: nqn, AllowAny: true}); err != nil {
			t.Fatal(err)
		}
	}
	add(first, "nqn.2026-01.org.example:second")
	until(at(1), "nqn.2026-01.org.example:second", true)
	if err := first.AddReferral(at(2).Address); err != nil {
		t.Fatal(err)
	}
	until(at(2), "nqn.2026-01.org.example:far", true)
	add(second, "nqn.2026-01.org.example:farther")
	until(at(2), "nqn.2026-01.org.example:farther", true)

	// What changes while nobody is connected is found afterwards.
	second.Faults().RejectConnects(nvme.RDMARejectNoResources)
	second.Faults().Disconnect(-1)
	if err := second.RemoveSubsystem("nqn.2026-01.org.example:far"); err != nil {
		t.Fatal(err)
	}
	second.Faults().Clear()
	until(at(2), "nqn.2026-01.org.example:far", false)

	// A service that is not referred to any more is left.
	if err := first.RemoveReferral(at(2).Address); err != nil {
		t.Fatal(err)
	}
	limit := time.Now().Add(20 * time.Second)
	for len(second.Snapshot().Controllers) > 0 {
		if time.Now().After(limit) {
			t.Fatal("the second service still has a controller")
		}
		time.Sleep(time.Millisecond)
	}
}
