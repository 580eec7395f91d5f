package roce

import (
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// dropFirst loses the first message of each type of the connection manager, and delivers
// all others twice.
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

// TestHandshakeLoss checks that every message of the connection manager is repeated, and
// that no repeated message does harm.
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

// TestFarewellWithoutAnswer checks that closed objects do not stay if the peer is gone.
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

// TestLostConfirmation checks that a passive side without an RTU is established, even if
// no other packet is sent.
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
