package roce

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// ask sends n connect requests that are never confirmed.
func (x *intruder) ask(port uint16, first, n uint32) {
	for i := first; i < first+n; i++ {
		r := wire.Request{Port: port, GUID: 1, QPN: 100 + i, MTU: 1024, Source: x.from.Addr(), Destination: x.to.Addr()}
		m := wire.NewMAD(wire.REQ, uint64(i), 1000+i, 0)
		r.Put(m)
		x.send(x.seal(m.Packet(i)))
	}
}

// victim gets the answers to an intruder's messages: it has the well-known port of the
// address from which they come.
type victim struct {
	t    *testing.T
	conn *net.UDPConn
}

func newVictim(t *testing.T, x *intruder) *victim {
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(x.from.Addr(), testPort)))
	check(t, err)
	check(t, conn.SetReadBuffer(4<<20))
	t.Cleanup(func() { check(t, conn.Close()) })
	return &victim{t, conn}
}

// received counts messages until none has arrived for a while.
func (v *victim) received(quiet time.Duration) (packets, bytes int) {
	b := make([]byte, 2048)
	for {
		check(v.t, v.conn.SetReadDeadline(time.Now().Add(quiet)))
		n, err := v.conn.Read(b)
		if err != nil {
			return packets, bytes
		}
		packets, bytes = packets+1, bytes+n
	}
}

// serve accepts all requests of a listener, with a queue pair and memory for each, like a
// target, until ctx is done. It returns the largest number of connections at a time.
func serve(ctx context.Context, t *testing.T, l rdma.Listener, established func(*end)) (most func() int) {
	var mu sync.Mutex
	var running sync.WaitGroup
	open, top := 0, 0
	running.Go(func() {
		for {
			id, err := l.Accept(ctx)
			if err != nil {
				return
			}
			mu.Lock()
			open++
			top = max(top, open)
			mu.Unlock()
			running.Go(func() {
				e := makeEnd(t, id, 16, 1<<20, false)
				if e == nil {
					return
				}
				if err := id.Accept(ctx, param); err == nil && established != nil {
					established(e)
				}
				e.close()
				mu.Lock()
				open--
				mu.Unlock()
			})
		}
	})
	return func() int {
		running.Wait()
		return top
	}
}

// TestRequestFlood checks that connect requests of a source that does not confirm them
// cost little memory, cause no more answers than requests, and affect neither connections
// nor new requests.
func TestRequestFlood(t *testing.T) {
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}, MaxHalfOpenPerSource: 6, MaxHalfOpen: 10, MaxRequestRate: 200, MaxRequestRatePerSource: 100})
	a, b := join(t, host, target, 64, 2*area, false)
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 128)
	check(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	most := serve(ctx, t, l, func(e *end) {
		for range e.id.Events() {
			return
		}
	})
	strangers := []*intruder{
		newIntruder(t, netip.MustParseAddr("127.0.0.3"), targetAddr), newIntruder(t, netip.MustParseAddr("127.0.0.4"), targetAddr),
	}
	var victims []*victim
	for _, x := range strangers {
		victims = append(victims, newVictim(t, x))
	}
	const rounds, each = 60, 20
	for i := range uint32(rounds) {
		for _, x := range strangers {
			x.ask(l.Addr().Port(), i*each, each)
		}
		time.Sleep(20 * time.Millisecond)
		if i%20 != 10 {
			continue
		}
		// An honest host among them
		id, err := host.Resolve(ctx, netip.Addr{}, l.Addr(), -1)
		check(t, err)
		e := makeEnd(t, id, 16, 4096, false)
		_, err = id.Connect(ctx, param)
		check(t, err)
		e.close()
	}
	exchange(t, a, b, 1, rand.New(rand.NewPCG(1, 2)))
	o := target.endpoints[0]
	o.mu.Lock()
	half := len(o.handshakes.open)
	o.mu.Unlock()
	c := target.Snapshot()
	packets := 0
	for _, v := range victims {
		n, bytes := v.received(50 * time.Millisecond)
		packets += n
		if sent := rounds * each * wire.MADPacketLen; bytes > sent {
			t.Errorf("%d bytes were sent to a stranger for %d", bytes, sent)
		}
	}
	check(t, l.Close())
	cancel()
	// A connection is not half-open any more while its memory is being freed.
	if n := most(); half > 10 || n > 10+5 {
		t.Errorf("%d half-open connections at the end, %d at most, want 10", half, n)
	}
	if c.RequestsDropped < rounds*each/2 || c.HalfOpenEvicted == 0 {
		t.Errorf("%d answers, %+v", packets, c)
	}
}

// TestNoAmplification checks that a source that does not confirm gets one answer for each
// request, whatever the passive side needs to send.
func TestNoAmplification(t *testing.T) {
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}})
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 16)
	check(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond) // of the accepting side
	defer cancel()
	most := serve(ctx, t, l, nil)
	x := newIntruder(t, netip.MustParseAddr("127.0.0.3"), targetAddr)
	v := newVictim(t, x)
	x.ask(l.Addr().Port(), 0, 3)
	if n, bytes := v.received(3 * time.Second); n != 3 || bytes != 3*wire.MADPacketLen {
		t.Errorf("%d answers of %d bytes to 3 requests", n, bytes)
	}
	most()
	check(t, l.Close())
	if c := target.Snapshot(); c.AnswersWithheld != 3 { // that the time is over
		t.Errorf("%+v", c)
	}
}

// TestStrangersRate checks that strangers get one answer for each message, at a limited
// rate.
func TestStrangersRate(t *testing.T) {
	open(t, Config{Addrs: []netip.Addr{targetAddr}, MaxRequestRatePerSource: 10})
	for _, attr := range []wire.Attribute{wire.REP, wire.DREQ, wire.REQ, wire.RTU, wire.MRA, wire.REJ, wire.DREP} {
		x := newIntruder(t, netip.AddrFrom4([4]byte{127, 0, 1, byte(attr)}), targetAddr)
		v := newVictim(t, x)
		const sent = 400
		for i := range uint32(sent) {
			m := wire.NewMAD(attr, 1, 1000+i, 2000+i)
			if attr == wire.REQ {
				r := wire.Request{Port: 1, GUID: 1, QPN: 100 + i, MTU: 1024, Source: x.from.Addr(), Destination: x.to.Addr()}
				r.Put(m)
			}
			x.send(x.seal(m.Packet(i)))
		}
		n, _ := v.received(100 * time.Millisecond)
		answered := attr == wire.REP || attr == wire.DREQ || attr == wire.REQ
		if n > 10*burst+30 || answered && n < 10*burst || !answered && n != 0 {
			t.Errorf("%d answers to %d messages %#x", n, sent, attr)
		}
	}
}

// TestSources checks that an IPv6 host is one source, whatever its interface identifier
// is.
func TestSources(t *testing.T) {
	for _, c := range []struct{ a, b string }{
		{"2001:db8::1", "2001:db8::ffff:0:0:2"}, {"192.0.2.1", "192.0.2.1"}, {"fe80::1%3", "fe80::1%3"},
	} {
		if a, b := source(netip.MustParseAddr(c.a)), source(netip.MustParseAddr(c.b)); a != b {
			t.Errorf("%s is of %s, %s of %s", c.a, a, c.b, b)
		}
	}
	for _, c := range []struct{ a, b string }{
		{"2001:db8:0:1::1", "2001:db8:0:2::1"}, {"192.0.2.1", "192.0.2.2"}, {"fe80::1%3", "fe80::2%3"}, {"fe80::1%3", "fe80::1%4"},
	} {
		if a, b := source(netip.MustParseAddr(c.a)), source(netip.MustParseAddr(c.b)); a == b {
			t.Errorf("%s and %s are both of %s", c.a, c.b, a)
		}
	}
}

// age makes half-open connections older.
func (p *endpoint) age(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, id := range p.handshakes.open {
		id.arrived = id.arrived.Add(-d)
	}
}

// TestHalfOpenExpires checks that handshakes that take too long end, whether they were
// accepted or not.
func TestHalfOpenExpires(t *testing.T) {
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}})
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 10)
	check(t, err)
	t.Cleanup(func() { check(t, l.Close()) })
	x := newIntruder(t, netip.MustParseAddr("127.0.0.3"), targetAddr)
	x.ask(l.Addr().Port(), 0, 3)
	until(t, target, "requests", func(c Counters) bool { return c.Requests == 3 })
	accepted, err := l.Accept(t.Context())
	check(t, err)
	newEnd(t, accepted, 16, 4096, false)
	done := make(chan error, 1)
	go func() { done <- accepted.Accept(t.Context(), param) }()
	taken, err := l.Accept(t.Context())
	check(t, err)
	t.Cleanup(func() { check(t, taken.Close()) })
	p := target.endpoints[0]
	p.age(halfOpenTime)
	p.expire()
	select {
	case err := <-done:
		if err == nil {
			t.Error("accepted")
		}
	case <-time.After(patience):
		t.Fatal("still accepting")
	}
	if c := target.Snapshot(); c.HalfOpenExpired != 3 {
		t.Errorf("%+v", c)
	}
	p.mu.Lock()
	if h := &p.handshakes; len(h.open) != 0 || h.ending != 2 || len(l.(*listener).requests) != 0 {
		t.Errorf("%d half-open, %d not closed yet, %d waiting", len(h.open), h.ending, len(l.(*listener).requests))
	}
	p.mu.Unlock()
	a, b := join(t, host, target, 16, 1<<16, false)
	b.recv(1, 0, 8)
	a.post(a.wr(2, rdma.Send, 0, 8, b, 0))
	b.ok(b.recvCQ, 1)
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.handshakes.open); n != 0 {
		t.Errorf("%d half-open after one was established", n)
	}
}

// TestMakeRoom checks that strangers have half of the places, and that the source with
// the most half-open connections makes room for a proven one.
func TestMakeRoom(t *testing.T) {
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}, MaxHalfOpen: 8, MaxHalfOpenPerSource: 5})
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 10)
	check(t, err)
	t.Cleanup(func() { check(t, l.Close()) })
	p := target.endpoints[0]
	asked := uint64(0)
	ask := func(last byte, first, n uint32) {
		newIntruder(t, netip.AddrFrom4([4]byte{127, 0, 0, last}), targetAddr).ask(l.Addr().Port(), first, n)
		asked += uint64(n)
		until(t, target, "requests", func(c Counters) bool { return c.Requests == asked })
	}
	counts := func(when string, strangers int, proven ...int) {
		t.Helper()
		p.mu.Lock()
		defer p.mu.Unlock()
		if n := p.handshakes.byShare[strangersShare]; n != strangers {
			t.Errorf("%s: %d half-open of strangers, want %d: %+v", when, n, strangers, target.Snapshot())
		}
		for i, want := range proven {
			if n := p.handshakes.byShare[originKey{addr: netip.AddrFrom4([4]byte{127, 0, 0, byte(11 + i)})}]; n != want {
				t.Errorf("%s: %d half-open of proven source %d, want %d: %+v", when, n, i, want, target.Snapshot())
			}
		}
	}
	for i := range byte(3) {
		p.mu.Lock()
		p.strangers.find(netip.AddrFrom4([4]byte{127, 0, 0, 11 + i})).proven = true
		p.mu.Unlock()
	}
	ask(3, 0, 3)
	ask(4, 0, 3)
	counts("strangers have what they may have", 4)
	ask(11, 0, 6)
	counts("all places are taken", 4, 4)
	ask(12, 0, 3)
	counts("a source that has fewer", 2, 3, 3)
	ask(13, 0, 2)
	counts("another one", 2, 2, 2, 2)
	ask(5, 0, 1)
	ask(13, 10, 1)
	counts("no share is larger", 2, 2, 2, 2)
	p.age(evictionAge)
	ask(5, 10, 1)
	ask(13, 20, 1)
	counts("old ones make room", 2, 2, 2, 2)
	if c := target.Snapshot(); c.HalfOpenEvicted != 7 {
		t.Errorf("%+v", c)
	}
}
