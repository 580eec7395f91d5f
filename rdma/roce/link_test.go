package roce

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// patience limits every wait for something that must happen.
const patience = 60 * time.Second

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// end is one end of a connection.
type end struct {
	t      testing.TB
	id     rdma.ID
	pd     rdma.PD
	sendCQ rdma.CQ
	recvCQ rdma.CQ
	mr     rdma.MR
	qp     rdma.QP
}

const allAccess = rdma.AccessLocalWrite | rdma.AccessRemoteRead | rdma.AccessRemoteWrite

// lastVector is the vector of the last end. Ends use the vectors in turn.
var lastVector atomic.Int32

// newEnd makes the resources of an ID. They are closed at the end of the test.
func newEnd(t testing.TB, id rdma.ID, depth, memory int, events bool) *end {
	t.Helper()
	e := makeEnd(t, id, depth, memory, events)
	if e == nil {
		t.FailNow()
	}
	t.Cleanup(e.close)
	return e
}

// makeEnd is newEnd for any goroutine. The caller must close the end. makeEnd returns nil
// after an error, which it has reported to the test.
func makeEnd(t testing.TB, id rdma.ID, depth, memory int, events bool) *end {
	t.Helper()
	e := &end{t: t, id: id}
	vector := int(lastVector.Add(1))
	dev := id.Device()
	var err error
	if e.pd, err = dev.AllocPD(); err == nil {
		e.mr, err = e.pd.AllocMR(memory, allAccess)
	}
	if err == nil {
		e.sendCQ, err = dev.CreateCQ(2*depth, events, vector)
	}
	if err == nil {
		e.recvCQ, err = dev.CreateCQ(2*depth, events, vector)
	}
	if err == nil {
		e.qp, err = id.CreateQP(e.pd, rdma.QPConfig{SendCQ: e.sendCQ, RecvCQ: e.recvCQ, MaxSendWR: depth, MaxRecvWR: depth, MaxSendSGE: 2, MaxRecvSGE: 1})
	}
	if err != nil {
		t.Error(err)
		return nil
	}
	return e
}

func (e *end) close() {
	for _, c := range []interface{ Close() error }{e.id, e.sendCQ, e.recvCQ, e.mr, e.pd} {
		if err := c.Close(); err != nil {
			e.t.Errorf("close: %v", err)
		}
	}
}

// param suits all tests.
var param = rdma.ConnParam{ResponderResources: 8, InitiatorDepth: 8, RetryCount: 7, RNRRetryCount: 7}

// join connects two providers.
func join(t testing.TB, host, target *Provider, depth, memory int, events bool) (a, b *end) {
	t.Helper()
	return joinVia(t, host, netip.Addr{}, target, depth, memory, events)
}

// joinVia is join with a source address.
func joinVia(t testing.TB, host *Provider, local netip.Addr, target *Provider, depth, memory int, events bool) (a, b *end) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := target.Listen(netip.AddrPortFrom(target.endpoints[0].sock.local.Addr(), 0), 16)
	check(t, err)
	defer func() { check(t, l.Close()) }()
	id, err := host.Resolve(ctx, local, l.Addr(), -1)
	check(t, err)
	a = newEnd(t, id, depth, memory, events)
	done := make(chan error, 1)
	go func() {
		_, err := id.Connect(ctx, param)
		done <- err
	}()
	request, err := l.Accept(ctx)
	check(t, err)
	b = newEnd(t, request, depth, memory, events)
	check(t, request.Accept(ctx, param))
	check(t, <-done)
	return a, b
}

func (e *end) queuePair() *queuePair { return e.qp.(*queuePair) }

func (e *end) sge(off, n int) rdma.SGE {
	return rdma.SGE{Addr: e.mr.Addr() + uint64(off), Length: uint32(n), LKey: e.mr.LKey()}
}

func (e *end) wr(id uint64, op rdma.SendOp, off, n int, peer *end, peerOff int) rdma.SendWR {
	return rdma.SendWR{
		ID: id, Op: op, Signaled: true, NumSGE: 1, SGE: [2]rdma.SGE{e.sge(off, n)},
		RemoteAddr: peer.mr.Addr() + uint64(peerOff), RKey: peer.mr.RKey(),
	}
}

func (e *end) post(wrs ...rdma.SendWR) {
	e.t.Helper()
	if n, err := e.qp.PostSend(wrs); err != nil {
		e.t.Fatalf("posted %d: %v", n, err)
	}
}

func (e *end) recv(id uint64, off, n int) {
	e.t.Helper()
	if _, err := e.qp.PostRecv([]rdma.RecvWR{{ID: id, SGE: e.sge(off, n)}}); err != nil {
		e.t.Fatal(err)
	}
}

// wait polls for one completion.
func wait(t testing.TB, cq rdma.CQ) rdma.WC {
	t.Helper()
	var wc [1]rdma.WC
	for deadline := time.Now().Add(patience); ; {
		n, err := cq.Poll(wc[:])
		check(t, err)
		if n == 1 {
			return wc[0]
		}
		if time.Now().After(deadline) {
			t.Fatal("a completion that was expected did not come")
		}
		runtime.Gosched()
	}
}

func (e *end) ok(cq rdma.CQ, id uint64) {
	e.t.Helper()
	if wc := wait(e.t, cq); wc.ID != id || wc.Status != rdma.WCSuccess {
		e.t.Fatalf("completion of %d: %s, want success of %d", wc.ID, wc.Status, id)
	}
}

// link loses, repeats, delays and damages arriving packets.
type link struct {
	rnd                              *rand.Rand
	loss, repeat, reorder, corrupted float64
	held                             func()
	hold                             int // packets until the held one is delivered
	lost, spoilt                     int
}

func newLink(seed uint64, loss, repeat, reorder, corrupted float64) *link {
	return &link{rnd: rand.New(rand.NewPCG(seed, 7)), loss: loss, repeat: repeat, reorder: reorder, corrupted: corrupted}
}

// pass is the tamper function. The receive loop calls it.
func (l *link) pass(packet []byte, deliver func([]byte)) {
	chance := func(p float64) bool { return l.rnd.Float64() < p }
	switch {
	case chance(l.loss):
		l.lost++
	case chance(l.corrupted):
		b := slices.Clone(packet)
		i := l.rnd.IntN(len(b))
		if i == 4 {
			i++ // the ICRC does not cover it
		}
		b[i] ^= 1 << l.rnd.IntN(8)
		l.spoilt++
		deliver(b)
	case l.held == nil && chance(l.reorder):
		b := slices.Clone(packet)
		l.held, l.hold = func() { deliver(b) }, 1+l.rnd.IntN(3)
		return
	default:
		deliver(packet)
		if chance(l.repeat) {
			deliver(packet)
		}
	}
	if l.held == nil {
		return
	}
	if l.hold--; l.hold == 0 {
		l.held()
		l.held = nil
	}
}

// through makes a port's tamper function with its own link.
func through(in func(seed uint64) *link) func() func([]byte, func([]byte)) {
	var seed uint64
	return func() func([]byte, func([]byte)) {
		seed++
		return in(seed).pass
	}
}

// openLossy is openPair with a link in each direction.
func openLossy(t testing.TB, in func(seed uint64) *link, psn func() uint32) (host, target *Provider) {
	tamper := through(in)
	host = open(t, Config{Addrs: []netip.Addr{hostAddr}, tamper: tamper, psn: psn})
	target = open(t, Config{Addrs: []netip.Addr{targetAddr}, tamper: tamper, psn: psn})
	return host, target
}

const (
	area  = 512 << 10 // of the work requests in flight
	slots = 8
	slot  = area / slots
)

// exchange writes, sends and reads messages of all lengths, several at a time, and
// compares every byte.
func exchange(t *testing.T, a, b *end, rounds int, rnd *rand.Rand) {
	t.Helper()
	out, back, in := a.mr.Bytes()[:area], a.mr.Bytes()[area:2*area], b.mr.Bytes()
	for round := range rounds {
		var n [slots]int
		for i := range n {
			n[i] = 1 + rnd.IntN(slot)
			if rnd.IntN(2) == 0 {
				n[i] = 1 + rnd.IntN(200)
			}
		}
		for i := range out {
			out[i] = byte(i*7 + i>>9 + round*13)
		}
		clear(back)
		clear(in)
		for i := range n {
			b.recv(uint64(100+i), area+i*slot, slot)
		}
		for i := range n { // WRITE and SEND of the same bytes
			w := a.wr(uint64(i), rdma.Write, i*slot, n[i], b, i*slot)
			w.Signaled = i%3 == 0
			a.post(w, a.wr(uint64(10+i), rdma.Send, i*slot, n[i], b, 0))
		}
		for i := range n { // read back
			a.post(a.wr(uint64(20+i), rdma.Read, area+i*slot, n[i], b, i*slot))
		}
		for i := range n {
			if i%3 == 0 {
				a.ok(a.sendCQ, uint64(i))
			}
			a.ok(a.sendCQ, uint64(10+i))
			b.ok(b.recvCQ, uint64(100+i))
		}
		for i := range n {
			a.ok(a.sendCQ, uint64(20+i))
			want := out[i*slot : i*slot+n[i]]
			for name, got := range map[string][]byte{
				"written": in[i*slot:], "sent": in[area+i*slot:], "read back": back[i*slot:],
			} {
				if !bytes.Equal(got[:n[i]], want) {
					t.Fatalf("round %d: %d bytes %s: they differ", round, n[i], name)
				}
				if n[i] < slot && got[n[i]] != 0 {
					t.Fatalf("round %d: %d bytes %s: more was written", round, n[i], name)
				}
			}
		}
	}
}

func TestLoss(t *testing.T) {
	for _, c := range []struct {
		name                           string
		loss, repeat, reorder, corrupt float64
	}{
		{"loss 1 %", 0.01, 0, 0, 0},
		{"loss 5 %", 0.05, 0, 0, 0},
		{"repeated 5 %", 0, 0.05, 0, 0},
		{"reordered 2 %", 0, 0, 0.02, 0},
		{"corrupted 1 %", 0, 0, 0, 0.01},
		{"all", 0.02, 0.01, 0.01, 0.01},
	} {
		t.Run(c.name, func(t *testing.T) {
			var links []*link
			in := func(seed uint64) *link {
				links = append(links, newLink(seed, c.loss, c.repeat, c.reorder, c.corrupt))
				return links[len(links)-1]
			}
			// The sequence numbers wrap around in each.
			host, target := openLossy(t, in, func() uint32 { return 0xffffff - 20 })
			a, b := join(t, host, target, 64, 2*area, false)
			start := time.Now()
			rounds := 12
			exchange(t, a, b, rounds, rand.New(rand.NewPCG(3, 4)))
			h, g := host.Snapshot(), target.Snapshot()
			t.Logf("%d rounds in %v; host %+v; target %+v", rounds, time.Since(start).Round(time.Millisecond), h, g)
			switch {
			case c.loss > 0 && h.Retransmits == 0:
				t.Error("nothing was sent again")
			case c.repeat > 0 && g.Duplicates == 0:
				t.Error("no duplicate was seen")
			case c.reorder > 0 && g.OutOfSequence == 0:
				t.Error("nothing was out of sequence")
			case c.corrupt > 0 && h.BadICRC+g.BadICRC == 0:
				t.Error("no bad ICRC was seen")
			}
		})
	}
}

// TestHastyRetry checks that on a path that loses packets the first retry comes early and does
// not count, and that it comes once.
func TestHastyRetry(t *testing.T) {
	var broken atomic.Bool
	tamper := func() func([]byte, func([]byte)) {
		return func(packet []byte, deliver func([]byte)) {
			if !broken.Load() {
				deliver(packet)
			}
		}
	}
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}, tamper: tamper})
	a, b := join(t, host, target, 16, 1<<16, false)
	q := a.queuePair()
	q.mu.Lock()
	q.timer = stopped(func() {}) // the test calls tick
	q.window = maxWindow / 2
	if got := q.nextTick(); got != hastyRetry {
		t.Errorf("first look after %v, want %v", got, hastyRetry)
	}
	q.mu.Unlock()
	broken.Store(true)
	a.post(a.wr(1, rdma.Write, 0, 100, b, 0))
	for i, want := range []Counters{{Retransmits: 1}, {Retransmits: 1}, {Retransmits: 2, Timeouts: 1}} {
		q.tick()
		if c := host.Snapshot(); c.Retransmits != want.Retransmits || c.Timeouts != want.Timeouts {
			t.Errorf("look %d: %d packets sent again, %d retries, want %d and %d", i+1, c.Retransmits, c.Timeouts, want.Retransmits, want.Timeouts)
		}
	}
	broken.Store(false)
	q.tick()
	q.tick()
	a.ok(a.sendCQ, 1)
}

// TestWrap passes the end of the 24-bit sequence numbers without loss.
func TestWrap(t *testing.T) {
	for first := uint32(0xffffff - 3); first != 2; first = (first + 1) & 0xffffff {
		t.Run(fmt.Sprintf("%#x", first), func(t *testing.T) {
			in := func(uint64) *link { return newLink(1, 0, 0, 0, 0) }
			host, target := openLossy(t, in, func() uint32 { return first })
			a, b := join(t, host, target, 64, 2*area, false)
			exchange(t, a, b, 1, rand.New(rand.NewPCG(1, 1)))
			exchange(t, b, a, 1, rand.New(rand.NewPCG(1, 1)))
			// A timer that fires early on a loaded machine only costs time. A
			// wrong comparison of sequence numbers makes the peer refuse a
			// packet.
			if h, g := host.Snapshot(), target.Snapshot(); h.FatalNAKs+h.NAKsReceived+g.FatalNAKs+g.NAKsReceived != 0 {
				t.Errorf("%+v, %+v", h, g)
			}
		})
	}
}

// TestCongestion marks all packets of one side, as routers do before they lose packets.
// Both sides then send less, and nothing is lost.
func TestCongestion(t *testing.T) {
	window := func(e *end) uint64 {
		q := e.queuePair()
		q.mu.Lock()
		defer q.mu.Unlock()
		return q.window
	}
	t.Run("IPv4", func(t *testing.T) {
		host := open(t, Config{Addrs: []netip.Addr{hostAddr}, ecn: ecnCongested})
		target := open(t, Config{Addrs: []netip.Addr{targetAddr}})
		a, b := join(t, host, target, 64, 2*area, false)
		exchange(t, a, b, 2, rand.New(rand.NewPCG(1, 2)))
		h, g := host.Snapshot(), target.Snapshot()
		if h.Marks != 0 || h.Notes == 0 || g.Marks == 0 || g.Notes != 0 || window(a) > maxWindow/2 || window(b) != maxWindow {
			t.Errorf("sending: windows %d and %d, %+v, %+v", window(a), window(b), h, g)
		}
		// Packets that the host only answers are marked, too. The target need not
		// be told.
		exchange(t, b, a, 2, rand.New(rand.NewPCG(3, 4)))
		if g := target.Snapshot(); g.Notes != 0 || window(b) > maxWindow/2 {
			t.Errorf("answering: window %d, %+v", window(b), g)
		}
	})
	t.Run("IPv6", func(t *testing.T) {
		needIPv6(t)
		both := open(t, Config{Addrs: []netip.Addr{netip.IPv6Loopback()}, ecn: ecnCongested})
		a, b := join(t, both, both, 64, 2*area, false)
		exchange(t, a, b, 2, rand.New(rand.NewPCG(5, 6)))
		if s := both.Snapshot(); s.Marks == 0 || s.Notes == 0 || window(a) > maxWindow/2 {
			t.Errorf("window %d, %+v", window(a), s)
		}
	})
}

// TestNotReady makes a message wait for its receive through many RNR NAKs.
func TestNotReady(t *testing.T) {
	host, target := openPair(t)
	a, b := join(t, host, target, 16, 1<<16, false)
	const want = 500
	a.post(a.wr(1, rdma.Send, 0, 10000, b, 0), a.wr(2, rdma.Send, 0, 1, b, 0))
	for deadline := time.Now().Add(patience); host.Snapshot().RNRNAKs < want; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%+v", host.Snapshot())
		}
	}
	b.recv(3, 0, 10000)
	b.recv(4, 0, 1)
	a.ok(a.sendCQ, 1)
	a.ok(a.sendCQ, 2)
	b.ok(b.recvCQ, 3)
	b.ok(b.recvCQ, 4)
}

func TestNotReadyLimit(t *testing.T) {
	host, target := openPair(t)
	a, b := join(t, host, target, 16, 1<<16, false)
	q := a.queuePair()
	q.mu.Lock()
	q.notReadyLimit = 3
	q.mu.Unlock()
	a.post(a.wr(1, rdma.Send, 0, 100, b, 0), a.wr(2, rdma.Send, 0, 1, b, 0))
	if wc := wait(t, a.sendCQ); wc.ID != 1 || wc.Status != rdma.WCRNRRetryExc {
		t.Errorf("%+v", wc)
	}
	if wc := wait(t, a.sendCQ); wc.ID != 2 || wc.Status != rdma.WCFlushErr {
		t.Errorf("%+v", wc)
	}
	if n := host.Snapshot().RNRNAKs; n != 4 {
		t.Errorf("%d RNR NAKs, want 4", n)
	}
}

// TestAckBeforeNAK checks that an acknowledgement of the packets before the gap precedes
// a NAK, because rdma_rxe ignores a second NAK before an acknowledgement.
func TestAckBeforeNAK(t *testing.T) {
	var victim atomic.Int64
	victim.Store(-1)
	var mu sync.Mutex
	var heard []wire.Syndrome
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}, tamper: func() func([]byte, func([]byte)) {
		return func(p []byte, deliver func([]byte)) {
			if h, _, ok := wire.Parse(p); ok && h.Op == wire.Acknowledge {
				mu.Lock()
				heard = append(heard, wire.ParseAETH(p[wire.BTHLen:]).Syndrome)
				mu.Unlock()
			}
			deliver(p)
		}
	}})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}, tamper: func() func([]byte, func([]byte)) {
		return func(p []byte, deliver func([]byte)) {
			if h, _, ok := wire.Parse(p); !ok || !victim.CompareAndSwap(int64(h.PSN), -1) {
				deliver(p)
			}
		}
	}})
	a, b := join(t, host, target, 16, 1<<16, false)
	for range 2 { // packets, of which the second is lost
		first := a.wr(1, rdma.Write, 0, 100, b, 0)
		first.Signaled = false
		victim.Store(int64(b.expected()+1) & 0xffffff)
		a.post(first, a.wr(2, rdma.Write, 0, 100, b, 0), a.wr(3, rdma.Write, 0, 100, b, 0))
		a.ok(a.sendCQ, 2)
		a.ok(a.sendCQ, 3)
	}
	mu.Lock()
	defer mu.Unlock()
	naks := 0
	for i, s := range heard {
		if s == wire.NAKSequence {
			naks++
			if i == 0 || !heard[i-1].IsACK() {
				t.Errorf("NAK %d of %v has no acknowledgement before it", naks, heard)
			}
		}
	}
	if naks == 0 {
		t.Errorf("no NAK in %v", heard)
	}
}

// TestRetryLimit checks the retries for a peer that is gone.
func TestRetryLimit(t *testing.T) {
	stop := make(chan struct{})
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}, tamper: func() func([]byte, func([]byte)) {
		return func(p []byte, deliver func([]byte)) {
			select {
			case <-stop:
			default:
				deliver(p)
			}
		}
	}})
	a, b := join(t, host, target, 16, 1<<16, false)
	q := a.queuePair()
	q.mu.Lock()
	q.retryLimit = 1
	q.mu.Unlock()
	close(stop)
	a.post(a.wr(1, rdma.Write, 0, 100, b, 0), a.wr(2, rdma.Send, 0, 1, b, 0))
	if wc := wait(t, a.sendCQ); wc.ID != 1 || wc.Status != rdma.WCRetryExc {
		t.Errorf("%+v", wc)
	}
	if wc := wait(t, a.sendCQ); wc.ID != 2 || wc.Status != rdma.WCFlushErr {
		t.Errorf("%+v", wc)
	}
}

// TestRetryLimitUnsignaled checks that a peer that is gone gets no more time if only
// unsignaled requests are sent: neither requests for acknowledgements nor further
// requests extend it.
func TestRetryLimitUnsignaled(t *testing.T) {
	host, target := openPair(t)
	a, b := join(t, host, target, 1024, 1<<16, false)
	b.queuePair().destroy()
	q := a.queuePair()
	q.mu.Lock()
	q.retryLimit = 2
	q.mu.Unlock()
	w := a.wr(1, rdma.Write, 0, 100, b, 0)
	w.Signaled = false
	ticks := 0
	for ; ticks < 100; ticks++ {
		a.post(w)
		q.tick()
		q.mu.Lock()
		state := q.state
		q.mu.Unlock()
		if state == qpFailed {
			break
		}
	}
	// One interval to request an acknowledgement, and three that wait
	if most := 1 + 3*retryTicks; ticks > most {
		t.Errorf("failed after %d ticks, want at most %d", ticks, most)
	}
	if wc := wait(t, a.sendCQ); wc.Status != rdma.WCRetryExc {
		t.Errorf("%+v", wc)
	}
}

// TestUnsignaled checks that unsignaled requests are acknowledged, too.
func TestUnsignaled(t *testing.T) {
	host, target := openPair(t)
	a, b := join(t, host, target, 16, 1<<16, false)
	for range 5 {
		w := a.wr(1, rdma.Write, 0, 100, b, 0)
		w.Signaled = false
		a.post(w)
	}
	q := a.queuePair()
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		q.mu.Lock()
		free := q.head == q.tail
		q.mu.Unlock()
		if free {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the send queue did not drain")
		}
	}
	if c := host.Snapshot(); c.Probes == 0 || c.Timeouts != 0 {
		t.Errorf("%+v", c)
	}
}

// TestReadBehindUnsignaled checks that a READ does not wait for room if no
// acknowledgement was requested that would make it.
func TestReadBehindUnsignaled(t *testing.T) {
	const size = 1 << 17
	host, target := openPair(t)
	a, b := join(t, host, target, 16, 2*size, false)
	q := a.queuePair()
	q.mu.Lock()
	q.window = minWindow
	q.mu.Unlock()
	b.recv(0, 0, 64)
	first := a.wr(1, rdma.Send, 0, 64, b, 0)
	first.Signaled = false
	a.post(first, a.wr(2, rdma.Read, size, size, b, size))
	q.mu.Lock()
	sent := q.nxt == q.end
	q.mu.Unlock()
	if !sent {
		t.Error("it was not sent")
	}
	b.ok(b.recvCQ, 0)
	a.ok(a.sendCQ, 2)
}

// TestPathShrinks checks that a packet that is too large for the path fails the
// connection.
func TestPathShrinks(t *testing.T) {
	host, target := openPair(t)
	a, b := join(t, host, target, 16, 1<<18, false)
	q := a.queuePair()
	q.mu.Lock()
	q.mtu = 1 << 17
	q.mu.Unlock()
	a.post(a.wr(1, rdma.Write, 0, 100_000, b, 0))
	if wc := wait(t, a.sendCQ); wc.ID != 1 || wc.Status != wcLocalOp {
		t.Errorf("%+v", wc)
	}
}
