package initiator

import (
	"errors"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"

	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/verbs"
)

// TestNvmet runs verified I/O against a real target over libibverbs. UN_TARGET names it
// as ADDR:PORT,NQN. The data on its namespaces is overwritten.
func TestNvmet(t *testing.T) {
	addr, nqn, ok := strings.Cut(os.Getenv("UN_TARGET"), ",")
	if !ok {
		testenv.Need(t, "target", errors.New("UN_TARGET is not set"))
	}
	provider, err := verbs.New()
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range []poller.Request{{IO: 1}, {IO: 2, Write: 1, Poll: 1}, {IO: 2, Write: 2, Poll: 2}} {
		q = q.Clip(runtime.NumCPU())
		loops := newLoops(t, q.Loops())
		cfg := testConfig(provider, loops, q)
		cfg.Address, cfg.SubNQN = netip.MustParseAddrPort(addr), nqn
		cfg.AdminTimeout, cfg.IOTimeout = 0, 0
		c := connect(t, cfg)
		t.Logf("%v: %v", q, c.Info().Paths[0].Plan)
		for _, ns := range c.Namespaces() {
			t.Logf("namespace %d: %+v", ns.NSID(), ns.Geometry())
			f := newFrontEnd(t, ns, loops, 64, 256<<10, 5)
			f.run(2000)
			f.close()
		}
		closeSubsystem(t, c)
	}
}
