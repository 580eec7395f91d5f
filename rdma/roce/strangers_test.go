package roce

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"ublk-nvmeof/rdma/roce/wire"
)

// requestOf returns a connect request as it arrives from an address.
func requestOf(from netip.Addr, port uint16, n uint32) *wire.MAD {
	r := wire.Request{Port: port, GUID: 1 + uint64(n), QPN: 100 + n, MTU: 1024, Source: from, Destination: targetAddr}
	m := wire.NewMAD(wire.REQ, uint64(n), 1000+n, 0)
	r.Put(m)
	return m
}

// manyAddrs returns addresses that do not exist.
func manyAddrs(i uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 127<<24|1<<16|i%(1<<20))))
}

// arrive passes a message to an endpoint as if it came from an address.
func (p *endpoint) arrive(m *wire.MAD, from netip.Addr) {
	p.manage(m, netip.AddrPortFrom(from, testPort), targetAddr)
}

// TestForgedFlood checks that a new host can connect while requests arrive from more
// forged addresses than the target can remember, faster than it accepts requests.
func TestForgedFlood(t *testing.T) {
	testFlood(t, manyAddrs)
}

// TestFloodOfFew does the same with requests from four addresses.
func TestFloodOfFew(t *testing.T) {
	testFlood(t, func(i uint32) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, byte(10 + i%4)}) })
}

// TestFloodOfOwn does the same with requests from the address of the host itself.
func TestFloodOfOwn(t *testing.T) {
	testFlood(t, func(uint32) netip.Addr { return hostAddr })
}

func testFlood(t *testing.T, forged func(uint32) netip.Addr) {
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}})
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 128)
	check(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	most := serve(ctx, t, l, func(e *end) {
		for range e.id.Events() {
			return
		}
	})
	p, n := target.endpoints[0], uint32(0)
	// The tokens of many seconds are used up before the host comes, and no place is
	// free.
	flood := func(requests int) {
		for range requests {
			p.arrive(requestOf(forged(n), l.Addr().Port(), n), forged(n))
			n++
		}
	}
	flood(20000)
	id, err := host.Resolve(ctx, netip.Addr{}, l.Addr(), -1)
	check(t, err)
	e := makeEnd(t, id, 16, 4096, false)
	done := make(chan error, 1)
	begun := time.Now()
	go func() {
		_, err := id.Connect(ctx, param)
		done <- err
	}()
	for connected := false; !connected; {
		select {
		case err := <-done:
			check(t, err)
			connected = true
		case <-time.After(time.Millisecond):
			flood(20) // 20000 in a second, or fewer on a slow machine
		}
	}
	if d := time.Since(begun); d > 5*time.Second {
		t.Errorf("the host has connected after %v", d)
	}
	c := target.Snapshot()
	e.close()
	check(t, l.Close())
	cancel()
	if n := most(); n > 2*defaultHalfOpen+1 {
		t.Errorf("%d connections at a time", n)
	}
	if c.ChallengesSent == 0 || c.AddressesProven != 1 || c.RequestsDropped < 19000 {
		t.Errorf("%+v", c)
	}
}

// TestProvenFlood checks that a new host can connect while sources with proven addresses
// send requests as fast as they can, and confirm none.
func TestProvenFlood(t *testing.T) {
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}})
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 128)
	check(t, err)
	p := target.endpoints[0]
	n := uint32(0)
	flood := func() {
		for range 6000 {
			n++
			a := netip.AddrFrom4([4]byte{127, 0, 0, byte(10 + n%4)})
			p.mu.Lock()
			p.strangers.find(a).proven = true
			p.mu.Unlock()
			p.arrive(requestOf(a, l.Addr().Port(), n), a)
		}
	}
	flood()
	honest := netip.MustParseAddr("127.0.0.99")
	p.mu.Lock()
	p.strangers.find(honest).proven = true
	p.mu.Unlock()
	for i := range uint32(8) {
		p.arrive(requestOf(honest, l.Addr().Port(), 1<<20+i), honest)
		flood()
	}
	p.mu.Lock()
	if n := p.handshakes.byShare[originKey{addr: honest}]; n != 8 {
		t.Errorf("%d of 8 requests of an honest host were taken: %+v", n, target.Snapshot())
	}
	p.mu.Unlock()
	check(t, l.Close())
}

// TestFloodedHost checks that a host that gets connect and disconnect requests of
// strangers answers the challenge of its target.
func TestFloodedHost(t *testing.T) {
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}})
	p := host.endpoints[0]
	id, err := host.Resolve(t.Context(), netip.Addr{}, netip.AddrPortFrom(targetAddr, 1), -1)
	check(t, err)
	e := newEnd(t, id, 16, 4096, false)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := e.id.Connect(ctx, param)
		done <- err
	}()
	await := newIntruder(t, targetAddr, hostAddr)
	v := newVictim(t, await)
	v.received(50 * time.Millisecond) // the request: the host is connecting
	for i := range uint32(20000) {
		p.manage(wire.NewMAD(wire.DREQ, uint64(i), i, 0), netip.AddrPortFrom(manyAddrs(i), testPort), hostAddr)
	}
	await.send(await.seal(wire.NewMAD(wire.DREQ, 77, 77, 0).Packet(1)))
	b := make([]byte, 2048)
	check(t, v.conn.SetReadDeadline(time.Now().Add(patience)))
	for {
		_, err := v.conn.Read(b)
		check(t, err)
		if m := (*wire.MAD)(b[wire.BTHLen+wire.DETHLen:]); m.Attribute() == wire.DREP && m.TID() == 77 {
			break
		}
	}
	cancel()
	<-done
}

// TestChallenge checks that only the answer to a challenge of the last minute proves an
// address, and only the address to which the challenge was sent.
func TestChallenge(t *testing.T) {
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}, MaxHalfOpen: 2})
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 16)
	check(t, err)
	t.Cleanup(func() { check(t, l.Close()) })
	p := target.endpoints[0]
	x := newIntruder(t, netip.MustParseAddr("127.0.0.3"), targetAddr)
	v := newVictim(t, x)
	x.ask(l.Addr().Port(), 0, 2) // there is room for one
	b := make([]byte, 2048)
	check(t, v.conn.SetReadDeadline(time.Now().Add(patience)))
	n, err := v.conn.Read(b)
	check(t, err)
	m := (*wire.MAD)(b[wire.BTHLen+wire.DETHLen:])
	if m.Attribute() != wire.DREQ || n != wire.MADPacketLen {
		t.Fatalf("%d bytes, message %#x", n, m.Attribute())
	}
	if packets, _ := v.received(50 * time.Millisecond); packets != 0 {
		t.Errorf("%d more answers", packets)
	}
	proven := func(a netip.Addr) bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.strangers.find(a).proven
	}
	answer := func(tid uint64, from netip.Addr) { p.arrive(wire.NewMAD(wire.DREP, tid, m.Remote(), m.Local()), from) }
	for i := range uint64(64) {
		answer(m.TID()^1<<i, x.from.Addr())
	}
	other := netip.MustParseAddr("127.0.0.4")
	answer(m.TID(), other)
	p.mu.Lock()
	old, young := p.strangers.proof(x.from.Addr(), time.Now().Add(-2*challengeTime)), p.strangers.proof(other, time.Now().Add(-challengeTime))
	p.mu.Unlock()
	answer(old, x.from.Addr())
	if proven(x.from.Addr()) || proven(other) {
		t.Error("an address is proven without an answer to its challenge")
	}
	answer(m.TID(), x.from.Addr())
	answer(young, other)
	if !proven(x.from.Addr()) || !proven(other) {
		t.Errorf("the answers prove nothing: %+v", target.Snapshot())
	}
	if c := target.Snapshot(); c.ChallengesSent != 1 || c.AddressesProven != 2 || c.StaleMessages != 66 {
		t.Errorf("%+v", c)
	}
}

// TestManySources checks that proven sources are remembered, however many strangers there
// are.
func TestManySources(t *testing.T) {
	s := newStrangers(false)
	const hosts = 100
	for i := range uint32(hosts) {
		o := s.find(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}))
		o.proven = true
		o.bucket.take(time.Unix(1, 0), 1, 0)
	}
	for i := range uint32(10 * sourceSets * sourceWays) {
		s.find(manyAddrs(i)).bucket.take(time.Unix(2+int64(i), 0), 1, 0)
	}
	for i := range uint32(hosts) {
		if o := s.find(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})); !o.proven {
			t.Errorf("source %d is a stranger again", i)
		}
	}
}

// TestFloodAllocates checks that a request that finds no room costs no memory, challenged
// or not.
func TestFloodAllocates(t *testing.T) {
	// Few requests are enough, so that the one that has the room keeps it until the end.
	const rate = 16
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}, MaxHalfOpen: 2, MaxRequestRatePerSource: rate})
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 16)
	check(t, err)
	t.Cleanup(func() { check(t, l.Close()) })
	p := target.endpoints[0]
	from := netip.MustParseAddr("127.0.0.3")
	requests := make([]*wire.MAD, 512)
	for i := range requests {
		requests[i] = requestOf(from, l.Addr().Port(), uint32(i))
	}
	p.arrive(requests[0], from)
	i := 1
	if n := testing.AllocsPerRun(len(requests)-2, func() {
		p.arrive(requests[i], from)
		i++
	}); n != 0 {
		t.Errorf("%v allocations for a request", n)
	}
	if c := target.Snapshot(); c.ChallengesSent == 0 || c.ChallengesSent > 10*burst*rate || c.RequestsDropped != uint64(len(requests)-1) {
		t.Errorf("%+v", c)
	}
	exchangeAfter(t, target)
}

// exchangeAfter checks that connections work.
func exchangeAfter(t *testing.T, target *Provider) {
	t.Helper()
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}})
	a, b := join(t, host, target, 64, 2*area, false)
	exchange(t, a, b, 1, rand.New(rand.NewPCG(1, 2)))
}
