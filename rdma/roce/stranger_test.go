package roce

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// The tests of this file show the abilities of an attacker who sends from the address of
// a peer and sees none of its packets.

// lives checks that a connection still works.
func (e *end) lives() {
	e.t.Helper()
	q := e.queuePair()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.state != qpReady {
		e.t.Fatalf("the queue pair is in state %d", q.state)
	}
}

// TestBlindRead checks that a READ that claims to have been sent before, with any
// sequence number and any key, ends no connection and gets no answer.
func TestBlindRead(t *testing.T) {
	host, target := openForeign(t)
	a, b := join(t, host, target, 64, 2*area, false)
	exchange(t, a, b, 1, rand.New(rand.NewPCG(1, 2))) // READs among others
	rnd := rand.New(rand.NewPCG(3, 4))
	x := newIntruder(t, hostAddr, targetAddr).at(b)
	q := b.queuePair()
	sent := target.Snapshot().PacketsSent
	const tries = 2000
	for i := range uint64(tries) {
		r := wire.RETH{VA: rnd.Uint64(), RKey: rnd.Uint32(), Length: rnd.Uint32()}
		switch i % 4 {
		case 1: // all right, but not what was asked for
			r = wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey(), Length: 1 << 30}
		case 2:
			r = wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey(), Length: 64}
		case 3:
			r.Length = 0
		}
		psn := b.expected() - 1 - rnd.Uint64N(1<<23-1)
		if i%8 == 0 {
			psn = b.expected() - 1 - i/8 // near
		}
		x.send(x.seal(request(wire.ReadRequest, q.num, psn, r, nil)))
		if i%64 == 0 {
			until(t, target, "packets", func(c Counters) bool { return c.StaleReads > i })
		}
	}
	until(t, target, "dropped", func(c Counters) bool { return c.StaleReads == tries })
	b.lives()
	if c := target.Snapshot(); c.PacketsSent != sent || c.FatalNAKsSent != 0 {
		t.Errorf("%d packets were sent: %+v", c.PacketsSent-sent, c)
	}
	exchange(t, a, b, 1, rand.New(rand.NewPCG(1, 2)))
}

// TestReadAgainRevoked checks that a READ that is repeated after its key has become
// invalid is not answered.
func TestReadAgainRevoked(t *testing.T) {
	host, target := openForeign(t)
	_, b := join(t, host, target, 16, 1<<16, false)
	read := request(wire.ReadRequest, b.qp.Num(), b.expected(), wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey(), Length: 100}, nil)
	b.take(read)
	sent := target.Snapshot().PacketsSent
	b.take(read)
	if c := target.Snapshot(); c.PacketsSent != sent+1 || c.StaleReads != 0 {
		t.Fatalf("it is not answered again: %+v", c)
	}
	check(t, b.mr.Close())
	b.take(read)
	b.lives()
	if c := target.Snapshot(); c.PacketsSent != sent+1 || c.StaleReads != 1 {
		t.Errorf("%+v", c)
	}
}

// TestUnsolicited checks that answers without a request have no effect.
func TestUnsolicited(t *testing.T) {
	host, target := openForeign(t)
	a, b := join(t, host, target, 64, 2*area, false)
	exchange(t, a, b, 1, rand.New(rand.NewPCG(1, 2)))
	x := newIntruder(t, hostAddr, targetAddr).at(b)
	q := b.queuePair()
	q.mu.Lock()
	una, before := q.una, q.requester.window
	q.mu.Unlock()
	rnd := rand.New(rand.NewPCG(3, 4))
	answer := func(op wire.Opcode, psn uint64, s wire.Syndrome, n int) {
		p := request(op, q.num, psn, wire.RETH{}, make([]byte, n))
		if op.HeaderLen() == wire.BTHLen+wire.AETHLen {
			h := wire.AETH{Syndrome: s, MSN: rnd.Uint32()}
			h.Put(p[wire.BTHLen:])
		}
		x.send(x.seal(p))
	}
	n := uint64(0)
	for range 200 {
		for _, s := range []wire.Syndrome{wire.ACK, wire.NAKSequence, wire.NAKInvalid, wire.NAKRemoteAccess, wire.NAKRemoteOp, wire.NAKNotReady | 31} {
			answer(wire.Acknowledge, una+1+rnd.Uint64N(1<<23-2), s, 0)
			answer(wire.Acknowledge, una-2-rnd.Uint64N(1<<23-3), s, 0)
			n += 2
		}
		for _, op := range []wire.Opcode{wire.ReadResponseFirst, wire.ReadResponseMid, wire.ReadResponseLast, wire.ReadResponseOnly} {
			answer(op, una+rnd.Uint64N(1<<23), wire.ACK, 4096)
			answer(op, una-rnd.Uint64N(1<<23), wire.ACK, 4096)
			n += 2
		}
		until(t, target, "dropped", func(c Counters) bool { return c.Unsolicited == n })
	}
	b.lives()
	q.mu.Lock()
	if q.una != una || q.requester.window != before {
		t.Errorf("una moved by %d, the window from %d to %d", q.una-una, before, q.requester.window)
	}
	q.mu.Unlock()
	exchange(t, a, b, 1, rand.New(rand.NewPCG(1, 2)))
}

// TestResponseForWrite checks that a READ response does not acknowledge a request that is
// not a READ.
func TestResponseForWrite(t *testing.T) {
	host, target := openForeign(t)
	a, b := join(t, host, target, 64, 1<<16, false)
	a.queuePair().endpoint.recvMu.Lock() // no acknowledgement comes
	a.post(a.wr(1, rdma.Write, 0, 8, b, 0), a.wr(2, rdma.Write, 8, 8, b, 8))
	q := a.queuePair()
	q.mu.Lock()
	una := q.una
	q.mu.Unlock()
	a.take(request(wire.ReadResponseOnly, q.num, una+1, wire.RETH{}, make([]byte, 8)))
	q.mu.Lock()
	if q.una != una {
		t.Errorf("%d packets were acknowledged", q.una-una)
	}
	q.mu.Unlock()
	a.queuePair().endpoint.recvMu.Unlock()
	a.ok(a.sendCQ, 1)
	a.ok(a.sendCQ, 2)
	if c := host.Snapshot(); c.Unsolicited != 1 {
		t.Errorf("%+v", c)
	}
}

// TestPortOfPeer checks that another user of the peer's host, who knows everything but
// cannot send from the peer's port, has no effect.
func TestPortOfPeer(t *testing.T) {
	for _, c := range []struct {
		name string
		join func(t *testing.T) (a, b *end)
	}{
		{"shared port", func(t *testing.T) (a, b *end) {
			host, target := openPair(t)
			return join(t, host, target, 64, 2*area, false)
		}},
		{"own ports", func(t *testing.T) (a, b *end) { return joinOneHost(t, 64, 2*area, Config{}) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := c.join(t)
			target := b.queuePair().provider
			x := newIntruder(t, a.queuePair().here, targetAddr).at(b)
			x.send(x.seal(request(wire.WriteOnly, b.qp.Num(), b.expected(), wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey(), Length: 8}, []byte("intruder"))))
			x.send(x.seal(request(wire.ReadRequest, b.qp.Num(), b.expected(), wire.RETH{Length: 8}, nil)))
			until(t, target, "wrong address", func(c Counters) bool { return c.WrongAddress == 2 })
			x.to = netip.AddrPortFrom(targetAddr, testPort)
			id := b.id.(*connID)
			m := wire.NewMAD(wire.DREQ, 1, id.peerComm, id.comm)
			m.SetQPN(b.qp.Num())
			x.send(x.seal(m.Packet(1)))
			until(t, target, "wrong address", func(c Counters) bool { return c.WrongAddress == 3 })
			b.lives()
			a.mr.Bytes()[0] = 1
			a.post(a.wr(1, rdma.Write, 0, 8, b, 0))
			a.ok(a.sendCQ, 1)
		})
	}
}

// TestForgedMessages checks that messages of the connection manager need values that only
// the peer knows.
func TestForgedMessages(t *testing.T) {
	host, target := openForeign(t)
	a, b := join(t, host, target, 64, 2*area, false)
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 4)
	check(t, err)
	t.Cleanup(func() { check(t, l.Close()) })
	connecting, err := host.Resolve(t.Context(), netip.Addr{}, l.Addr(), -1)
	check(t, err)
	c := newEnd(t, connecting, 16, 4096, false)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := connecting.Connect(ctx, param)
		done <- err
	}()
	requested, err := l.Accept(ctx)
	check(t, err)
	d := newEnd(t, requested, 16, 4096, false)

	send := func(from, to netip.Addr, m *wire.MAD) {
		x := newIntruder(t, from, to)
		x.send(x.seal(m.Packet(1)))
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	established, asking := b.id.(*connID), connecting.(*connID)
	for _, attr := range []wire.Attribute{wire.MRA, wire.REJ, wire.REP, wire.RTU, wire.DREQ, wire.DREP} {
		// The communication ids are known, but nothing else.
		send(hostAddr, targetAddr, wire.NewMAD(attr, rnd.Uint64(), established.peerComm, established.comm))
		send(hostAddr, targetAddr, wire.NewMAD(attr, rnd.Uint64(), asking.comm, requested.(*connID).comm))
		send(targetAddr, hostAddr, wire.NewMAD(attr, rnd.Uint64(), requested.(*connID).comm, asking.comm))
		// Only the peer's id is known.
		send(hostAddr, targetAddr, wire.NewMAD(attr, rnd.Uint64(), established.peerComm, 0))
		// Everything is known, but the message comes from another address.
		m := wire.NewMAD(attr, established.tid, established.peerComm, established.comm)
		m.SetQPN(b.qp.Num())
		send(netip.MustParseAddr("127.0.0.3"), targetAddr, m)
	}
	until(t, target, "messages", func(c Counters) bool { return c.StaleMessages >= 8 && c.WrongAddress >= 5 })
	b.lives()
	exchange(t, a, b, 1, rand.New(rand.NewPCG(1, 2)))
	check(t, d.id.Accept(ctx, param))
	check(t, <-done)
	c.lives()
}

// staleRequest returns a REQ that names a connected queue pair of the host.
func staleRequest(t *testing.T, host *Provider, to netip.AddrPort, qpn uint32) {
	x := newIntruder(t, hostAddr, targetAddr)
	r := wire.Request{Port: to.Port(), GUID: host.guid, QPN: qpn, MTU: 1024, Source: hostAddr, Destination: targetAddr}
	m := wire.NewMAD(wire.REQ, 1, random32(), 0)
	r.Put(m)
	x.send(x.seal(m.Packet(1)))
}

// TestStaleRequest checks that a peer that has lost its connection, and uses the queue
// pair again, is told so, and that the old connection ends. It does not end if the peer
// still has it and the request is forged.
func TestStaleRequest(t *testing.T) {
	host, target := openForeign(t)
	a, b := join(t, host, target, 16, 2*area, false)
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 1)
	check(t, err)
	defer func() { check(t, l.Close()) }()
	for range 3 {
		staleRequest(t, host, l.Addr(), a.qp.Num())
	}
	until(t, target, "requests", func(c Counters) bool { return c.Requests == 4 })
	b.lives()
	// The queue is as long as before, apart from the probe.
	for i := range 16 {
		a.recv(uint64(i), 0, 8)
		b.post(b.wr(uint64(i), rdma.Send, 0, 8, a, 0))
	}
	for i := range 16 {
		b.ok(b.sendCQ, uint64(i))
		a.ok(a.recvCQ, uint64(i))
	}
	select {
	case ev := <-b.id.Events():
		t.Errorf("event %v", ev)
	default:
	}

	a.queuePair().endpoint.removeQP(a.queuePair()) // it forgot
	staleRequest(t, host, l.Addr(), a.qp.Num())
	select {
	case ev := <-b.id.Events():
		if ev.Type != rdma.EventDisconnected {
			t.Errorf("event %v", ev)
		}
	case <-time.After(patience):
		t.Fatal("no event")
	}
	if n, err := b.sendCQ.Poll(make([]rdma.WC, 1)); n != 0 || err != nil {
		t.Errorf("%d completions of the question, error %v", n, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if id, err := l.Accept(ctx); err == nil {
		t.Error("the request was given out")
		check(t, id.Close())
	}
}

// TestProof checks that packets that anyone can send do not establish a connection
// without an RTU.
func TestProof(t *testing.T) {
	_, target := openForeign(t)
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 4)
	check(t, err)
	t.Cleanup(func() { check(t, l.Close()) })
	x := newIntruder(t, netip.MustParseAddr("127.0.0.3"), targetAddr)
	r := wire.Request{Port: l.Addr().Port(), GUID: 7, QPN: 100, MTU: 1024, Source: x.from.Addr(), Destination: targetAddr}
	m := wire.NewMAD(wire.REQ, 1, 1, 0)
	r.Put(m)
	x.send(x.seal(m.Packet(1)))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	id, err := l.Accept(ctx)
	check(t, err)
	e := newEnd(t, id, 16, 4096, false)
	done := make(chan error, 1)
	go func() { done <- id.Accept(ctx, param) }()
	c := id.(*connID)
	state := func() idState {
		c.endpoint.mu.Lock()
		defer c.endpoint.mu.Unlock()
		return c.state
	}
	for deadline := time.Now().Add(patience); state() != idAccepting; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not accepting")
		}
	}
	note := request(wire.CongestionNote, e.qp.Num(), 0, wire.RETH{}, nil)
	x.send(x.seal(note))
	x.send(x.seal(request(wire.WriteOnly, e.qp.Num(), e.expected()+5, wire.RETH{}, nil)))
	x.send(x.seal(request(wire.WriteOnly, e.qp.Num(), e.expected()-5, wire.RETH{}, nil)))
	until(t, target, "packets", func(c Counters) bool { return c.Notes == 1 && c.OutOfSequence == 1 && c.Duplicates == 1 })
	time.Sleep(10 * time.Millisecond)
	if s := state(); s != idAccepting {
		t.Fatalf("state %d", s)
	}
	x.send(x.seal(request(wire.WriteOnly, e.qp.Num(), e.expected(), wire.RETH{}, nil)))
	select {
	case err := <-done:
		check(t, err)
	case <-time.After(patience):
		t.Fatal("not accepted")
	}
}
