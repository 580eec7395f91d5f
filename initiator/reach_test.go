package initiator

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
)

func addrPorts(texts ...string) []netip.AddrPort {
	var out []netip.AddrPort
	for _, s := range texts {
		out = append(out, netip.MustParseAddrPort(s))
	}
	return out
}

func resolveTo(texts ...string) func(context.Context) ([]netip.AddrPort, error) {
	return func(context.Context) ([]netip.AddrPort, error) { return addrPorts(texts...), nil }
}

// A target with several addresses is reached at the first one where it listens, and again
// at that one.
func TestSeveralAddresses(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 4<<20)
	loops := newLoops(t, 1)
	cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1})
	good := netip.AddrPortFrom(targetAddr, 4420)
	cfg.Address = netip.AddrPort{}
	cfg.Resolve = resolveTo("192.0.2.77:4420", netip.AddrPortFrom(targetAddr, 4421).String(), good.String())
	c := connect(t, cfg)
	defer closeSubsystem(t, c)
	if got := c.Info().Paths[0].Address; got != good {
		t.Errorf("connected to %s, want %s", got, good)
	}
	f := newFrontEnd(t, c.Namespaces()[0], loops, 16, 4096, 1)
	fabric.KillAll(targetAddr)
	f.run(200)
	f.close()
	if got := c.Info().Paths[0]; got.Address != good || got.Losses == 0 {
		t.Errorf("%d losses, then connected to %s, want %s", got.Losses, got.Address, good)
	}
}

// The error of a target that cannot be reached names each of its addresses.
func TestNoAddressAccepts(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20)
	cfg := testConfig(fabric.Provider(hostAddr), newLoops(t, 1), poller.Request{IO: 1})
	closed := netip.AddrPortFrom(targetAddr, 4421).String()
	cfg.Resolve = resolveTo("192.0.2.77:4420", closed)
	_, err := Connect(t.Context(), cfg)
	if reject := (*rdma.RejectError)(nil); !errors.As(err, &reject) || !strings.Contains(err.Error(), "192.0.2.77:4420: ") || !strings.Contains(err.Error(), closed+": ") {
		t.Errorf("%v", err)
	}
	cfg.Resolve = func(context.Context) ([]netip.AddrPort, error) { return nil, errors.New("no such host") }
	if _, err := Connect(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "no such host") {
		t.Errorf("%v", err)
	}
	cfg.Resolve = resolveTo()
	if _, err := Connect(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "the target has no address") {
		t.Errorf("%v", err)
	}
}

// One silent address does not use up all the time.
func TestSilentAddressGetsItsShare(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20)
	silent := netip.MustParseAddr("192.0.2.66")
	p := fabric.Provider(silent)
	l, err := p.Listen(netip.AddrPortFrom(silent, 4420), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cfg := testConfig(fabric.Provider(hostAddr), newLoops(t, 1), poller.Request{IO: 1})
	cfg.ConnectTimeout = time.Minute
	cfg.Resolve = resolveTo("192.0.2.66:4420", netip.AddrPortFrom(targetAddr, 4420).String())
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	c, err := Connect(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	closeSubsystem(t, c)
}

func TestAddressesForTheNextAssociation(t *testing.T) {
	const a, b, d = "192.0.2.1:4420", "192.0.2.2:4420", "192.0.2.3:4420"
	many := []string{a}
	for i := range 20 {
		many = append(many, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 1).String())
	}
	none := func(context.Context) ([]netip.AddrPort, error) { return nil, errors.New("no such host") }
	for name, tt := range map[string]struct {
		last    string
		ago     time.Duration
		resolve func(context.Context) ([]netip.AddrPort, error)
		want    []string
	}{
		"the first":                         {"", time.Hour, resolveTo(a, b), []string{a, b}},
		"each once":                         {"", time.Hour, resolveTo(a, b, a), []string{a, b}},
		"bounded":                           {"", time.Hour, resolveTo(many...), many[:maxAddresses]},
		"the old controller may still work": {b, time.Second, resolveTo(a, d), []string{b}},
		"the last one first":                {b, time.Hour, resolveTo(a, b, d), []string{b, a, d}},
		"the last one has no name any more": {b, time.Hour, resolveTo(a), []string{b, a}},
		"names cannot be resolved":          {b, time.Hour, none, []string{b}},
		"without names":                     {b, time.Hour, nil, []string{d}},
	} {
		c := &Controller{since: time.Now().Add(-tt.ago), lastPatience: 11 * time.Second}
		c.cfg = Config{
			Path:      Path{Address: netip.MustParseAddrPort(d), Resolve: tt.resolve},
			KeepAlive: DefaultKeepAlive, Log: slog.New(slog.DiscardHandler),
		}
		if tt.last != "" {
			c.remote = netip.MustParseAddrPort(tt.last)
		}
		if got, err := c.addresses(t.Context()); err != nil || !slices.Equal(got, addrPorts(tt.want...)) {
			t.Errorf("%s: %v, %v, want %v", name, got, err, tt.want)
		}
	}
}

// TestFailure checks that, while there is no association, Info has the reason of the loss
// and the error of the last attempt.
func TestFailure(t *testing.T) {
	s := newLookSetup(t, nil)
	s.fabric.SetRefuse(targetAddr, rdma.RejectInvalidServiceID, nil)
	s.fabric.KillAll(hostAddr)
	waitFor(t, "a failed attempt", func() bool { return s.sub.Info().Paths[0].Failure != nil })
	i := s.sub.Info().Paths[0]
	if step := (*StepError)(nil); !errors.As(i.Failure, &step) || step.Step != "connect admin queue" || i.Reason == nil || errors.As(i.Reason, &step) {
		t.Errorf("lost because of %v, last attempt: %v", i.Reason, i.Failure)
	}
	s.fabric.SetRefuse(targetAddr, 0, nil)
	waitFor(t, "the next association", func() bool { return s.sub.Info().State == StateLive })
	if i := s.sub.Info().Paths[0]; i.Failure != nil || i.Reason == nil {
		t.Errorf("lost because of %v, last attempt: %v, although it succeeded", i.Reason, i.Failure)
	}
}
