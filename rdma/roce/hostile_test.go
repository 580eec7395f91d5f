package roce

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// intruder sends its own packets with a valid ICRC.
type intruder struct {
	t    testing.TB
	conn *net.UDPConn
	from netip.AddrPort
	to   netip.AddrPort
}

func newIntruder(t testing.TB, from, to netip.Addr) *intruder {
	t.Helper()
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)))
	check(t, err)
	t.Cleanup(func() { check(t, conn.Close()) })
	raw, err := conn.SyscallConn()
	check(t, err)
	s := &socket{v4: true}
	var cerr error
	check(t, raw.Control(func(fd uintptr) { cerr = s.configure(int(fd), socketConfig{plain: true, ecn: ecnCapable}) })) // "don't fragment"
	check(t, cerr)
	return &intruder{t, conn, conn.LocalAddr().(*net.UDPAddr).AddrPort(), netip.AddrPortFrom(to, testPort)}
}

// at makes the intruder send to the address of a queue pair.
func (x *intruder) at(e *end) *intruder {
	x.to = netip.AddrPortFrom(x.to.Addr(), e.queuePair().endpoint.sock.local.Port())
	return x
}

// seal gives a packet the ICRC for the address of the intruder.
func (x *intruder) seal(b []byte) []byte {
	end := len(b) - wire.ICRCLen
	crc := wire.Update(wire.Header(wire.Base(x.from, x.to, len(b)), b[:wire.BTHLen]), b[wire.BTHLen:end])
	wire.PutICRC(b[end:], crc)
	return b
}

func (x *intruder) send(b []byte) {
	x.t.Helper()
	if _, err := x.conn.WriteToUDPAddrPort(b, x.to); err != nil {
		x.t.Fatal(err)
	}
}

// request makes the packet of a request.
func request(op wire.Opcode, qpn uint32, psn uint64, r wire.RETH, payload []byte) []byte {
	pad := -len(payload) & 3
	h := wire.BTH{Op: op, Pad: uint8(pad), AckReq: true, PKey: wire.DefaultPKey, DestQP: qpn, PSN: uint32(psn & 0xffffff)}
	b := make([]byte, op.HeaderLen()+len(payload)+pad+wire.ICRCLen)
	h.Put(b)
	if op.HeaderLen() >= wire.BTHLen+wire.RETHLen {
		r.Put(b[wire.BTHLen:])
	}
	copy(b[op.HeaderLen():], payload)
	return b
}

// expected returns the sequence number for which a queue pair waits.
func (e *end) expected() uint64 {
	q := e.queuePair()
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.responder.expected
}

// until waits for a condition of the counters.
func until(t testing.TB, p *Provider, what string, ok func(Counters) bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(p.Snapshot()); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: %+v", what, p.Snapshot())
		}
	}
}

func TestStrangers(t *testing.T) {
	host, target := openForeign(t)
	a, b := join(t, host, target, 64, 2*area, false)
	qpn := b.qp.Num()
	write := wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey(), Length: 8}
	payload := []byte("intruder")

	// From another address, everything else is right.
	elsewhere := newIntruder(t, netip.MustParseAddr("127.0.0.3"), targetAddr).at(b)
	elsewhere.send(elsewhere.seal(request(wire.WriteOnly, qpn, b.expected(), write, payload)))
	until(t, target, "wrong address", func(c Counters) bool { return c.WrongAddress == 1 })

	// From the peer's address, something is wrong.
	near := newIntruder(t, hostAddr, targetAddr).at(b)
	near.send(near.seal(request(wire.WriteOnly, qpn^1, b.expected(), write, payload)))
	until(t, target, "unknown queue pair", func(c Counters) bool { return c.UnknownQP == 1 })
	bad := near.seal(request(wire.WriteOnly, qpn, b.expected(), write, payload))
	bad[len(bad)-6] ^= 1
	near.send(bad)
	until(t, target, "bad ICRC", func(c Counters) bool { return c.BadICRC == 1 })
	near.send(near.seal(request(wire.WriteOnly, qpn, b.expected()+1000, write, payload)))
	until(t, target, "sequence", func(c Counters) bool { return c.OutOfSequence == 1 })
	for _, spoil := range []func([]byte) []byte{
		func(b []byte) []byte { return b[:3] },
		func(b []byte) []byte { return b[:len(b)-4] },
		func(b []byte) []byte { b[0] = 0xff; return b },
		func(b []byte) []byte { b[1] |= 7; return b },
		func(b []byte) []byte { b[2] = 0; return b },
	} {
		near.send(spoil(near.seal(request(wire.WriteOnly, qpn, b.expected(), write, nil))))
	}
	until(t, target, "malformed", func(c Counters) bool { return c.Malformed+c.BadICRC == 1+5 })
	if string(b.mr.Bytes()[:8]) != string(make([]byte, 8)) {
		t.Error("an intruder wrote")
	}
	exchange(t, a, b, 1, rand.New(rand.NewPCG(1, 2)))
}

// refusal is a request that a peer must not send.
type refusal struct {
	name    string
	packets func(b *end) [][]byte
}

// refusals returns the requests. It needs another connection, for keys and queue pairs
// that belong to it.
func refusals(otherPeer *end) []refusal {
	mtu := make([]byte, 4096)
	return []refusal{
		{"wrong key", func(b *end) [][]byte {
			return [][]byte{request(wire.WriteOnly, b.qp.Num(), b.expected(), wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey() ^ 1, Length: 4}, mtu[:4])}
		}},
		{"key of another domain", func(b *end) [][]byte {
			return [][]byte{request(wire.WriteOnly, b.qp.Num(), b.expected(), wire.RETH{VA: otherPeer.mr.Addr(), RKey: otherPeer.mr.RKey(), Length: 4}, mtu[:4])}
		}},
		{"out of bounds", func(b *end) [][]byte {
			return [][]byte{request(wire.WriteOnly, b.qp.Num(), b.expected(), wire.RETH{VA: b.mr.Addr() + uint64(len(b.mr.Bytes())) - 3, RKey: b.mr.RKey(), Length: 4}, mtu[:4])}
		}},
		{"address wraps around", func(b *end) [][]byte {
			return [][]byte{request(wire.WriteOnly, b.qp.Num(), b.expected(), wire.RETH{VA: ^uint64(1), RKey: b.mr.RKey(), Length: 4}, mtu[:4])}
		}},
		{"READ out of bounds", func(b *end) [][]byte {
			return [][]byte{request(wire.ReadRequest, b.qp.Num(), b.expected(), wire.RETH{VA: b.mr.Addr() - 1, RKey: b.mr.RKey(), Length: 4}, nil)}
		}},
		{"longer than it says", func(b *end) [][]byte {
			return [][]byte{request(wire.WriteOnly, b.qp.Num(), b.expected(), wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey(), Length: 4}, mtu[:8])}
		}},
		{"huge", func(b *end) [][]byte {
			return [][]byte{request(wire.WriteFirst, b.qp.Num(), b.expected(), wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey(), Length: 1 << 31}, mtu)}
		}},
		{"huge READ", func(b *end) [][]byte {
			return [][]byte{request(wire.ReadRequest, b.qp.Num(), b.expected(), wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey(), Length: 1 << 31}, nil)}
		}},
		{"short first packet", func(b *end) [][]byte {
			return [][]byte{request(wire.SendFirst, b.qp.Num(), b.expected(), wire.RETH{}, mtu[:100])}
		}},
		{"no first packet", func(b *end) [][]byte {
			return [][]byte{request(wire.SendMiddle, b.qp.Num(), b.expected(), wire.RETH{}, mtu)}
		}},
		{"WRITE in a SEND", func(b *end) [][]byte {
			b.recv(1, 0, 8192)
			psn := b.expected()
			return [][]byte{
				request(wire.SendFirst, b.qp.Num(), psn, wire.RETH{}, mtu),
				request(wire.WriteLast, b.qp.Num(), psn+1, wire.RETH{}, mtu[:4]),
			}
		}},
		{"READ in a SEND", func(b *end) [][]byte {
			b.recv(1, 0, 8192)
			psn := b.expected()
			return [][]byte{
				request(wire.SendFirst, b.qp.Num(), psn, wire.RETH{}, mtu),
				request(wire.ReadRequest, b.qp.Num(), psn+1, wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey(), Length: 4}, nil),
			}
		}},
		{"SEND longer than the receive", func(b *end) [][]byte {
			b.recv(1, 0, 4100)
			psn := b.expected()
			return [][]byte{
				request(wire.SendFirst, b.qp.Num(), psn, wire.RETH{}, mtu),
				request(wire.SendLast, b.qp.Num(), psn+1, wire.RETH{}, mtu[:8]),
			}
		}},
		{"invalidates a key that is not there", func(b *end) [][]byte {
			b.recv(1, 0, 8)
			p := request(wire.SendOnlyInv, b.qp.Num(), b.expected(), wire.RETH{}, nil)
			binary.BigEndian.PutUint32(p[wire.BTHLen:], otherPeer.mr.RKey())
			return [][]byte{p}
		}},
	}
}

// TestRefusals checks that a forbidden request ends the connection of the peer, and no
// other.
func TestRefusals(t *testing.T) {
	host, target := openForeign(t)
	other, otherPeer := join(t, host, target, 64, 2*area, false)
	near := newIntruder(t, hostAddr, targetAddr)
	for _, c := range refusals(otherPeer) {
		t.Run(c.name, func(t *testing.T) {
			_, b := join(t, host, target, 16, 8192, false)
			near.at(b)
			before := target.Snapshot()
			for _, p := range c.packets(b) {
				near.send(near.seal(p))
			}
			until(t, target, "refused", func(c Counters) bool { return c.FatalNAKsSent == before.FatalNAKsSent+1 })
			q := b.queuePair()
			q.mu.Lock()
			defer q.mu.Unlock()
			if q.state != qpFailed {
				t.Error("the connection lives on")
			}
		})
	}
	exchange(t, other, otherPeer, 1, rand.New(rand.NewPCG(1, 2)))
	check(t, otherPeer.id.Close())
}

// TestReadDepth checks that a READ beyond the granted number is refused.
func TestReadDepth(t *testing.T) {
	host, target := openPair(t)
	a, b := join(t, host, target, 64, 8<<20, false)
	q := a.queuePair()
	q.mu.Lock()
	q.depth = maxReadAtomic // 8 were granted
	q.mu.Unlock()
	var wrs []rdma.SendWR
	for i := range 16 {
		wrs = append(wrs, a.wr(uint64(i), rdma.Read, i*4096, 4096, b, 0))
	}
	a.post(wrs...)
	until(t, target, "refused", func(c Counters) bool { return c.FatalNAKsSent == 1 })
	for {
		if wc := wait(t, a.sendCQ); wc.Status != rdma.WCSuccess {
			if wc.Status != wcRemoteInvalid {
				t.Errorf("%s, want %s", wc.Status, wcRemoteInvalid)
			}
			return
		}
	}
}

// take passes packets to an end at one time.
func (e *end) take(packets ...[]byte) {
	e.t.Helper()
	q := e.queuePair()
	for _, p := range packets {
		h, payload, ok := wire.Parse(p)
		if !ok {
			e.t.Fatal("not a packet")
		}
		q.receive(&h, p, payload, false)
	}
	q.settle()
}

// TestReadsAgain checks that a peer that requested READs again, but then got the first
// responses, may request more.
func TestReadsAgain(t *testing.T) {
	host, target := openPair(t)
	_, b := join(t, host, target, 16, 1<<16, false)
	q := b.queuePair()
	read := wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey(), Length: 100}
	psn := b.expected()
	var packets [][]byte
	for range q.served {
		packets = append(packets, request(wire.ReadRequest, q.num, psn, read, nil))
		psn++
	}
	b.take(packets...)
	for range 3 {
		packets = append(packets, request(wire.ReadRequest, q.num, psn, read, nil))
		psn++
	}
	b.take(packets...)
	if got := b.expected(); got != psn || q.reads.n != 0 {
		t.Errorf("%d of 3 were not taken, %d not answered: %+v", psn-got, q.reads.n, target.Snapshot())
	}
}

// TestGapFilled checks that a packet that was only overtaken is not requested again.
func TestGapFilled(t *testing.T) {
	host, target := openPair(t)
	_, b := join(t, host, target, 16, 1<<16, false)
	psn := b.expected()
	r := wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey()}
	b.take(request(wire.WriteOnly, b.qp.Num(), psn+1, r, nil), request(wire.WriteOnly, b.qp.Num(), psn, r, nil))
	if c := target.Snapshot(); b.expected() != psn+1 || c.OutOfSequence != 1 || c.NAKsSent != 0 {
		t.Errorf("%d taken, %+v", b.expected()-psn, c)
	}
}

// TestNoAckOfRead checks that, beside the responses of READs, no acknowledgement is sent
// for the READs or for the requests before them. rdma_rxe would interpret the first as
// the last response, which may have been lost, and the second as the end of READs that it
// has received in part.
func TestNoAckOfRead(t *testing.T) {
	acked := make(chan uint32, 1000)
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}, tamper: func() func([]byte, func([]byte)) {
		return func(p []byte, deliver func([]byte)) {
			if h, _, ok := wire.Parse(p); ok && h.Op == wire.Acknowledge && wire.ParseAETH(p[wire.BTHLen:]).Syndrome.IsACK() {
				acked <- h.PSN
			}
			deliver(p)
		}
	}})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}})
	_, b := join(t, host, target, 16, 1<<16, false)
	q := b.queuePair()
	psn := b.expected()
	write := func(psn uint64) []byte {
		return request(wire.WriteOnly, q.num, psn, wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey()}, nil)
	}
	read := func(psn uint64, skip int) []byte {
		r := wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey(), Length: uint32((5 - skip) * q.mtu)}
		return request(wire.ReadRequest, q.num, psn+uint64(skip), r, nil)
	}
	for range 10 {
		b.take(write(psn), read(psn+1, 0))
		b.take(write(psn), read(psn+1, 0)) // again
		b.take(read(psn+1, 3))             // the rest
		b.take(write(psn))
		b.take(read(psn+1, 0))
		psn += 6
		b.take(write(psn + 1)) // behind a gap
	}
	b.take(write(psn))
	heard := func() {
		t.Helper()
		select {
		case got := <-acked:
			if want := uint32(psn) & 0xffffff; got != want {
				t.Errorf("acknowledged %d packets before the last WRITE", want-got)
			}
		case <-time.After(patience):
			t.Fatal("the last WRITE is not acknowledged")
		}
	}
	heard()
	b.take(read(psn+1, 0))
	b.take(write(psn))
	b.take(write(psn)) // the peer insists
	heard()
	if c := target.Snapshot(); c.Duplicates != 52 || c.NAKsSent != 10 {
		t.Errorf("the packets did not do what they are for: %+v", c)
	}
}

// TestRandomPackets sends random packets with a valid ICRC to a connection, and checks
// that another connection is unharmed.
func TestRandomPackets(t *testing.T) {
	host, target := openForeign(t)
	a, b := join(t, host, target, 64, 2*area, false)
	x := newIntruder(t, hostAddr, targetAddr)
	rnd := rand.New(rand.NewPCG(8, 9))
	for range 20 {
		_, victim := join(t, host, target, 16, 1<<16, false)
		for i := range 8 {
			victim.recv(uint64(i), 0, 1<<16)
		}
		main := x.to
		x.at(victim)
		for range 100 {
			op := wire.Opcode(rnd.IntN(0x18))
			if op.HeaderLen() == 0 {
				continue
			}
			n := []int{0, 4, 4096, rnd.IntN(5000)}[rnd.IntN(4)]
			r := wire.RETH{VA: victim.mr.Addr() + uint64(rnd.IntN(1<<17)), RKey: victim.mr.RKey(), Length: uint32(rnd.IntN(1 << 14))}
			p := request(op, victim.qp.Num(), victim.expected()+uint64(rnd.IntN(3))-uint64(rnd.IntN(2)), r, make([]byte, n))
			x.send(x.seal(p))
		}
		mad := wire.NewMAD(wire.Attribute(0x10+rnd.IntN(7)), rnd.Uint64(), rnd.Uint32(), victim.id.(*connID).comm)
		for range rnd.IntN(4) {
			mad[24+8+rnd.IntN(wire.MADLen-32)] = byte(rnd.Uint32())
		}
		x.to = main
		x.send(x.seal(mad.Packet(0)))
	}
	exchange(t, a, b, 2, rnd)
}
