package roce

import (
	"net/netip"
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

// TestExpiry: requests that nobody accepted make room for others, even at
// another listener.
func TestExpiry(t *testing.T) {
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}, MaxHalfOpen: 2})
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 10)
	check(t, err)
	defer func() { check(t, l.Close()) }()
	x := newIntruder(t, netip.MustParseAddr("127.0.0.3"), targetAddr)
	for i := range uint32(5) {
		r := wire.Request{Port: l.Addr().Port(), GUID: 1, QPN: 100 + i, MTU: 1024, Source: x.from.Addr(), Destination: targetAddr}
		m := wire.NewMAD(wire.REQ, uint64(i), 1000+i, 0)
		r.Put(m)
		x.send(x.seal(m.Packet(i)))
	}
	until(t, target, "requests", func(c Counters) bool { return c.Requests == 5 && c.RequestsDropped == 3 })
	o := target.endpoints[0]
	o.mu.Lock()
	for _, id := range o.ids {
		id.arrived = id.arrived.Add(-2 * requestExpiry)
	}
	o.mu.Unlock()
	a, b := join(t, host, target, 16, 1<<16, false) // by a listener of its own
	b.recv(1, 0, 8)
	a.post(a.wr(2, rdma.Send, 0, 8, b, 0))
	b.ok(b.recvCQ, 1)
}
