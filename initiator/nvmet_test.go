package initiator

import (
	"errors"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/verbs"
	"ublk-nvmeof/target"
)

// nvmet returns the real target that UN_TARGET names as ADDR:PORT,NQN, and libibverbs.
func nvmet(t *testing.T) (provider *verbs.Provider, addr netip.AddrPort, nqn string) {
	t.Helper()
	at, nqn, ok := strings.Cut(os.Getenv("UN_TARGET"), ",")
	if !ok {
		testenv.Need(t, "target", errors.New("UN_TARGET is not set"))
	}
	provider, err := verbs.New()
	if err != nil {
		t.Fatal(err)
	}
	return provider, netip.MustParseAddrPort(at), nqn
}

// TestNvmet runs verified I/O against a real target over libibverbs, half of it with segments, of which
// nvmet takes one at a time. The data on its namespaces is overwritten.
func TestNvmet(t *testing.T) {
	provider, addr, nqn := nvmet(t)
	for _, q := range []poller.Request{{IO: 1}, {IO: 2, Write: 1, Poll: 1}, {IO: 2, Write: 2, Poll: 2}} {
		q = q.Clip(runtime.NumCPU())
		loops := newLoops(t, q.Loops())
		cfg := testConfig(provider, loops, q)
		cfg.Address, cfg.SubNQN = addr, nqn
		cfg.AdminTimeout, cfg.IOTimeout = 0, 0
		c := connect(t, cfg)
		t.Logf("%v: %v", q, c.Info().Paths[0].Plan)
		for _, ns := range c.Namespaces() {
			t.Logf("namespace %d: %+v", ns.NSID(), ns.Geometry())
			f := newFrontEnd(t, ns, loops, 64, 256<<10, 5)
			if got := f.jobs[0].queue.(block.Gatherer).SegmentLimit(); got != 1 {
				t.Errorf("the limit is %d segments, want 1", got)
			}
			f.scatter(ns)
			f.run(2000)
			f.close()
		}
		closeSubsystem(t, c)
	}
}

// TestBesideNvmet runs verified I/O with segments against a target of package target on the device of
// the real one, which takes lists of descriptors.
func TestBesideNvmet(t *testing.T) {
	provider, addr, _ := nvmet(t)
	tgt, err := target.New(target.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tgt.Close() })
	sub, err := tgt.AddSubsystem(target.SubsystemConfig{NQN: fakeNQN, AllowAny: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sub.AddNamespace(target.NamespaceConfig{Store: target.NewRAM(16 << 20)}); err != nil {
		t.Fatal(err)
	}
	ports, err := tgt.AddPorts(target.PortConfig{Provider: provider, Addr: netip.AddrPortFrom(addr.Addr(), 0)})
	if err != nil {
		t.Fatal(err)
	}
	loops := newLoops(t, 1)
	cfg := testConfig(provider, loops, poller.Request{IO: 1})
	cfg.Address, cfg.AdminTimeout, cfg.IOTimeout = ports[0].Addr(), 0, 0
	c := connect(t, cfg)
	ns := c.Namespaces()[0]
	f := newFrontEnd(t, ns, loops, 64, 256<<10, 5)
	f.scatter(ns)
	f.run(1000)
	f.close()
	if io := tgt.Snapshot().IO; io.Lists == 0 {
		t.Error("no command had a list")
	}
	closeSubsystem(t, c)
}
