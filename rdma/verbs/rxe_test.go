//go:build linux && cgo && !noverbs

package verbs

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"net"

	"ublk-nvmeof/rdma/rdmatest"
)

// rxeAddr is an IPv4 address of the network device under an rdma_rxe device, or
// UN_RXE_ADDR. Without one the test is skipped, or fails when UN_REQUIRE asks
// for rxe.
func rxeAddr(t testing.TB) netip.Addr {
	t.Helper()
	if text := os.Getenv("UN_RXE_ADDR"); text != "" {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			t.Fatal(err)
		}
		return addr
	}
	parents, err := filepath.Glob("/sys/class/infiniband/*/parent")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range parents {
		name, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		iface, err := net.InterfaceByName(strings.TrimSpace(string(name)))
		if err != nil {
			continue
		}
		addrs, err := iface.Addrs()
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil && prefix.Addr().Is4() {
				return prefix.Addr()
			}
		}
	}
	if slices.Contains(strings.Split(os.Getenv("UN_REQUIRE"), ","), "rxe") {
		t.Fatal("no rdma_rxe device with an IPv4 address, and UN_REQUIRE asks for rxe")
	}
	t.Skip("no rdma_rxe device with an IPv4 address")
	return netip.Addr{}
}

func TestConformance(t *testing.T) {
	addr := rxeAddr(t)
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	rdmatest.Run(t, func(*testing.T) rdmatest.Setup {
		return rdmatest.Setup{Active: p, Passive: p, Listen: addr, Silent: silent(addr)}
	})
}

// silent is an unlikely neighbour of addr.
func silent(addr netip.Addr) netip.Addr {
	b := addr.As4()
	b[3] ^= 0x55
	return netip.AddrFrom4(b)
}

func BenchmarkVerbs(b *testing.B) {
	addr := rxeAddr(b)
	p, err := New()
	if err != nil {
		b.Fatal(err)
	}
	rdmatest.Benchmark(b, rdmatest.Setup{Active: p, Passive: p, Listen: addr})
}
