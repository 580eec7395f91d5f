package roce

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// TestReceivers has queue pairs on each of several sockets, whose packets the kernel
// distinguishes. Without the kernel's filter, packets arrive at any socket and are taken
// in the same way.
func TestReceivers(t *testing.T) {
	const receivers = 3
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}, Receivers: receivers})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}})
	if len(host.endpoints) != receivers || host.device.Attr().CompVectors != receivers {
		t.Fatalf("%d ports, %d vectors", len(host.endpoints), host.device.Attr().CompVectors)
	}
	all := func() {
		used := map[*endpoint]int{}
		for i := range uint64(2 * receivers) { // the peer's end takes a vector, too
			a, b := join(t, host, target, 64, 2*area, false)
			used[a.queuePair().endpoint]++
			exchange(t, a, b, 1, rand.New(rand.NewPCG(1, i)))
			exchange(t, b, a, 1, rand.New(rand.NewPCG(2, i)))
		}
		for i, p := range host.endpoints {
			if used[p] != 2 {
				t.Errorf("receiver %d has %d queue pairs", i, used[p])
			}
		}
	}
	all()
	if s := host.Snapshot(); s.Strays != 0 || s.UnknownQP != 0 || s.PacketsReceived == 0 {
		t.Errorf("%+v", s)
	}
	check(t, unix.SetsockoptInt(host.endpoints[0].sock.fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0))
	all()
	if s := host.Snapshot(); s.Strays == 0 || s.UnknownQP != 0 {
		t.Errorf("without the filter: %+v", s)
	}
	// No other process gets the port, even if it would share it.
	for _, n := range []int{1, receivers} {
		if _, err := New(Config{Addrs: []netip.Addr{hostAddr}, Port: testPort, Receivers: n}); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("a second provider with %d receivers: %v", n, err)
		}
	}
}
