package roce

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"

	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/rdma/rdmatest"
)

// Addresses and port of the tests. The port is not that of RoCEv2, so that the tests can
// run beside a user of it.
var (
	hostAddr   = netip.MustParseAddr("127.0.0.1")
	targetAddr = netip.MustParseAddr("127.0.0.2")
)

// testPort is below the ephemeral ports. Only this process has it, because tests of
// several checkouts may run at the same time.
var testPort = uint16(10000 + os.Getpid()%20000)

// open makes a provider for the length of a test, and checks at the end that nothing is
// left in it.
func open(t testing.TB, cfg Config) *Provider {
	t.Helper()
	if cfg.Port == 0 {
		cfg.Port = testPort
	}
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.mu.Lock()
		ports := slices.Clone(p.endpoints)
		p.mu.Unlock()
		for _, o := range ports {
			o.mu.Lock()
			if len(o.ids)+len(o.byPeer)+len(o.byQP)+len(o.listeners)+len(o.qps)+len(o.handshakes.open)+len(o.handshakes.byShare)+o.handshakes.ending != 0 {
				t.Errorf("left open: %d IDs, %d and %d by peer, %d listeners, %d queue pairs, %d half-open, %d ending",
					len(o.ids), len(o.byPeer), len(o.byQP), len(o.listeners), len(o.qps), len(o.handshakes.open), o.handshakes.ending)
			}
			o.mu.Unlock()
		}
		if err := p.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return p
}

func openPair(t testing.TB) (host, target *Provider) {
	return open(t, Config{Addrs: []netip.Addr{hostAddr}}), open(t, Config{Addrs: []netip.Addr{targetAddr}})
}

// openForeign is openPair with a host that the target does not recognize as a user of
// this package. So its packets may come from any port, like those of a network card.
func openForeign(t testing.TB) (host, target *Provider) {
	host, target = openPair(t)
	host.guid = 1
	return host, target
}

func TestConformance(t *testing.T) {
	for _, c := range []struct {
		name    string
		cfg     Config
		passive netip.Addr // the zero one: the same provider
	}{
		{"IPv4", Config{Addrs: []netip.Addr{hostAddr}}, targetAddr},
		{"IPv4 without offload", Config{Addrs: []netip.Addr{hostAddr}, NoOffload: true}, targetAddr},
		{"IPv4 with several receivers", Config{Addrs: []netip.Addr{hostAddr}, Receivers: 3}, targetAddr},
		{"on demand", Config{OnDemand: true}, targetAddr},
		{"IPv6 with itself", Config{Addrs: []netip.Addr{netip.IPv6Loopback()}}, netip.Addr{}},
		{"any address, with itself", Config{}, netip.Addr{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if len(c.cfg.Addrs) > 0 && c.cfg.Addrs[0].Is6() {
				needIPv6(t)
			}
			rdmatest.Run(t, func(t *testing.T) rdmatest.Setup {
				s := rdmatest.Setup{Listen: hostAddr, Invalidate: true}
				host := open(t, c.cfg)
				s.Active, s.Passive = host, host
				switch {
				case c.passive.IsValid():
					cfg := c.cfg
					cfg.Addrs, cfg.OnDemand = []netip.Addr{c.passive}, false
					s.Passive, s.Listen = open(t, cfg), c.passive
				case len(c.cfg.Addrs) > 0:
					s.Listen = c.cfg.Addrs[0]
				}
				return s
			})
		})
	}
}

// needIPv6 skips the test if the loopback interface has no IPv6 address, unless
// UN_REQUIRE lists ipv6.
func needIPv6(t *testing.T) {
	t.Helper()
	c, err := net.ListenUDP("udp6", &net.UDPAddr{IP: net.IPv6loopback})
	if err == nil {
		err = c.Close()
	}
	testenv.Need(t, "ipv6", err)
}
