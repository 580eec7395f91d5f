//go:build linux && cgo && !noverbs

package verbs

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/rdma/rdmatest"
)

// rxeAddrs returns the addresses of the network devices under rdma_rxe devices, IPv4
// first. If there are none, the test is skipped, or fails if UN_REQUIRE lists rxe.
func rxeAddrs(t testing.TB) []netip.Addr {
	t.Helper()
	parents, err := filepath.Glob("/sys/class/infiniband/*/parent")
	if err != nil {
		t.Fatal(err)
	}
	var found []netip.Addr
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
			prefix, err := netip.ParsePrefix(a.String())
			if err != nil {
				continue
			}
			addr := prefix.Addr()
			if addr.IsLinkLocalUnicast() {
				addr = addr.WithZone(iface.Name)
			}
			found = append(found, addr)
		}
	}
	slices.SortStableFunc(found, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	if len(found) == 0 {
		without(t, "no rdma_rxe device with an address")
	}
	return found
}

// rxeAddr returns the first of them, or UN_RXE_ADDR.
func rxeAddr(t testing.TB) netip.Addr {
	t.Helper()
	if text := os.Getenv("UN_RXE_ADDR"); text != "" {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			t.Fatal(err)
		}
		return addr
	}
	return rxeAddrs(t)[0]
}

// without ends a test that cannot run.
func without(t testing.TB, reason string) {
	t.Helper()
	testenv.Need(t, "rxe", errors.New(reason))
}

func TestConformance(t *testing.T) { conformance(t, rxeAddr(t)) }

// TestConformanceIPv6 uses a link-local address, which needs its zone.
func TestConformanceIPv6(t *testing.T) {
	for _, addr := range rxeAddrs(t) {
		if addr.Zone() != "" {
			conformance(t, addr)
			return
		}
	}
	without(t, "no rdma_rxe device with a link-local IPv6 address")
}

func conformance(t *testing.T, addr netip.Addr) {
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	rdmatest.Run(t, func(*testing.T) rdmatest.Setup {
		return rdmatest.Setup{Active: p, Passive: p, Listen: addr, Silent: silent(addr)}
	})
}

// silent returns an address in the network of addr that is unlikely to be in use.
func silent(addr netip.Addr) netip.Addr {
	b := addr.AsSlice()
	b[len(b)-1] ^= 0x55
	s, _ := netip.AddrFromSlice(b)
	return s.WithZone(addr.Zone())
}

func BenchmarkVerbs(b *testing.B) {
	addr := rxeAddr(b)
	p, err := New()
	if err != nil {
		b.Fatal(err)
	}
	rdmatest.Benchmark(b, rdmatest.Setup{Active: p, Passive: p, Listen: addr})
}
