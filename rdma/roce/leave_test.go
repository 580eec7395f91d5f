package roce

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/rdma"
)

// TestLeave ends a connection of which this process knows only the trace. The peer hears of it.
func TestLeave(t *testing.T) {
	for name, open := range map[string]func(testing.TB) (host, target *Provider){"one host": openPair, "foreign": openForeign} {
		t.Run(name, func(t *testing.T) {
			host, target := open(t)
			a, b := join(t, host, target, 16, 1<<16, false)
			id := a.id.(*connID)
			trace := id.Trace()
			if err := host.Leave(t.Context(), trace); !errors.Is(err, unix.EADDRINUSE) {
				t.Fatalf("a connection that this process has: %v", err)
			}
			id.endpoint.mu.Lock()
			delete(id.endpoint.ids, id.comm) // as if another process had had it
			id.endpoint.mu.Unlock()
			if err := host.Leave(t.Context(), trace); err != nil {
				t.Fatal(err)
			}
			if e := testenv.Receive(t, b.id.Events(), "the end of the connection"); e.Type != rdma.EventDisconnected {
				t.Errorf("event %v", e)
			}
			if got := b.id.(*connID).Trace(); got != "" {
				t.Errorf("the trace of a connection that has ended is %q", got)
			}
		})
	}
}

// TestLeaveOwnPort sends from the port of the connection, which is none of this provider's.
func TestLeaveOwnPort(t *testing.T) {
	host := open(t, Config{OnDemand: true})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}})
	a, b := join(t, host, target, 16, 1<<16, false)
	id := a.id.(*connID)
	trace := id.Trace()
	id.endpoint.mu.Lock()
	id.state = idEnded // without a word to the peer, like a process that dies
	id.endpoint.mu.Unlock()
	a.close()
	host.drops.Wait()
	next := open(t, Config{OnDemand: true})
	if err := next.Leave(t.Context(), trace); err != nil {
		t.Fatal(err)
	}
	if e := testenv.Receive(t, b.id.Events(), "the end of the connection"); e.Type != rdma.EventDisconnected {
		t.Errorf("event %v", e)
	}
}

// TestLeaveMalformed gives Leave what is no trace.
func TestLeaveMalformed(t *testing.T) {
	host, _ := openPair(t)
	for _, text := range []string{
		"", "x", "127.0.0.1:1 127.0.0.1:2 1 2", "127.0.0.1 127.0.0.1:2 1 2 3", "127.0.0.1:1 127.0.0.1:2 0 2 3",
		"127.0.0.1:1 127.0.0.1:2 1 2 100000000", "127.0.0.1:1 127.0.0.1:2 1 2 3 4", "127.0.0.1:1 127.0.0.1:2 1 2 z",
	} {
		if err := host.Leave(t.Context(), text); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%q: %v", text, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	silent := netip.AddrPortFrom(netip.MustParseAddr("127.0.42.77"), 4791)
	if err := host.Leave(ctx, trace{netip.AddrPortFrom(hostAddr, testPort), silent, 1, 2, 3}.String()); !errors.Is(err, context.Canceled) {
		t.Errorf("nobody answers: %v", err)
	}
}
