package roce

import (
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// dropFirst loses the first of each kind of message of the connection manager,
// and gives all others twice.
func dropFirst() func([]byte, func([]byte)) {
	seen := map[wire.Attribute]bool{}
	return func(p []byte, deliver func([]byte)) {
		h, payload, ok := wire.Parse(p)
		if ok {
			if m, ok := wire.ParseMAD(&h, p, payload); ok && !seen[m.Attribute()] {
				seen[m.Attribute()] = true
				return
			}
		}
		deliver(p)
		deliver(p)
	}
}

// TestHandshakeLoss: every message of the connection manager is sent again, and
// none does harm when it comes twice.
func TestHandshakeLoss(t *testing.T) {
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}, tamper: dropFirst})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}, tamper: dropFirst})
	a, b := join(t, host, target, 16, 1<<16, false)
	b.recv(1, 0, 8)
	a.post(a.wr(2, rdma.Send, 0, 8, b, 0))
	b.ok(b.recvCQ, 1)
	a.ok(a.sendCQ, 2)
	check(t, a.id.Disconnect())
	for _, e := range []*end{b, a} {
		select {
		case ev := <-e.id.Events():
			if ev.Type != rdma.EventDisconnected {
				t.Errorf("event %v", ev)
			}
		case <-time.After(patience):
			t.Fatal("no event")
		}
	}
	if n := target.Snapshot().Requests; n < 2 {
		t.Errorf("%d requests", n)
	}
}

// TestFarewellWithoutAnswer: a peer that is gone does not keep what was closed.
func TestFarewellWithoutAnswer(t *testing.T) {
	host, target := openPair(t)
	a, b := join(t, host, target, 16, 1<<16, false)
	o := target.endpoints[0]
	o.mu.Lock()
	delete(o.ids, b.id.(*connID).comm) // it forgot
	o.mu.Unlock()
	check(t, a.id.Disconnect())
	select {
	case ev := <-a.id.Events(): // even an unknown connection's end is confirmed
		if ev.Type != rdma.EventDisconnected {
			t.Errorf("event %v", ev)
		}
	case <-time.After(patience):
		t.Fatal("no event")
	}
}

// TestLostConfirmation: a passive side that has lost the RTU is established all the same, though
// nobody sends anything else.
func TestLostConfirmation(t *testing.T) {
	var lost atomic.Int32
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}, tamper: func() func([]byte, func([]byte)) {
		return func(p []byte, deliver func([]byte)) {
			if h, payload, ok := wire.Parse(p); ok && lost.Load() < 2 {
				if m, ok := wire.ParseMAD(&h, p, payload); ok && m.Attribute() == wire.RTU {
					lost.Add(1)
					return
				}
			}
			deliver(p)
		}
	}})
	join(t, host, target, 16, 4096, false)
	if n := lost.Load(); n != 2 {
		t.Errorf("%d were lost", n)
	}
}
