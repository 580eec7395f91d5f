package rdmatest

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

var (
	hostAddr   = netip.MustParseAddr("192.0.2.1")
	targetAddr = netip.MustParseAddr("192.0.2.2")
	silentAddr = netip.MustParseAddr("192.0.2.3")
)

// newSetup makes a fabric of two endpoints and checks at the end that nothing
// was left open.
func newSetup(t testing.TB) (*Fabric, Setup) {
	f := NewFabric()
	t.Cleanup(func() {
		if open := f.Objects(); open != (Objects{}) {
			t.Errorf("left open: %+v", open)
		}
	})
	return f, Setup{
		Active: f.Provider(hostAddr), Passive: f.Provider(targetAddr),
		Listen: targetAddr, Silent: silentAddr, Invalidate: true,
	}
}

func TestConformance(t *testing.T) {
	Run(t, func(t *testing.T) Setup {
		_, s := newSetup(t)
		return s
	})
}

func TestKill(t *testing.T) {
	f, s := newSetup(t)
	a, p := connection(t, s, config{})
	b, q := connection(t, s, config{})
	p.postRecv(1, 0, 64)
	p.postSend(p.sendWR(2, 0, 64)) // waits for a receive
	f.Kill(a.id)
	waitEventType(t, a.id, rdma.EventDisconnected)
	waitEventType(t, p.id, rdma.EventDisconnected)
	if wc := p.wait(p.sendCQ, 1)[0]; wc.ID != 2 || wc.Status != rdma.WCRetryExc {
		t.Errorf("outstanding send: %+v, want retry exceeded", wc)
	}
	if wc := p.wait(p.recvCQ, 1)[0]; wc.ID != 1 || wc.Status != rdma.WCFlushErr {
		t.Errorf("receive: %+v, want flushed", wc)
	}
	b.transfer(q)
	f.KillAll(targetAddr)
	waitEventType(t, b.id, rdma.EventDisconnected)
}

func TestCut(t *testing.T) {
	f, s := newSetup(t)
	a, p := connection(t, s, config{})
	p.postRecv(1, 0, 64)
	f.Cut(p.id)
	p.none(p.recvCQ)
	a.postSend(a.sendWR(2, 0, 64), a.sendWR(3, 0, 64))
	wcs := a.wait(a.sendCQ, 2)
	if wcs[0].Status != rdma.WCRetryExc || wcs[1].Status != rdma.WCFlushErr {
		t.Errorf("sends: %s, %s, want retry exceeded and flushed", wcs[0].Status, wcs[1].Status)
	}
	p.none(p.recvCQ)
	select {
	case ev := <-p.id.Events():
		t.Errorf("event %v", ev)
	default:
	}
}

func TestSilent(t *testing.T) {
	f, s := newSetup(t)
	l := listen(t, s)
	a, p := connect(t, s, l, config{})
	b := newSide(t, resolve(t, s, l.Addr()), config{})
	f.SetSilent(targetAddr, true)
	p.postRecv(1, 0, 64)
	a.postSend(a.sendWR(2, 0, 64), a.remoteWR(3, rdma.Read, 100, 64, p, 0))
	a.none(a.sendCQ)
	p.none(p.recvCQ)
	_, err := s.Active.Resolve(within(t, short), netip.Addr{}, l.Addr(), -1)
	wantStep(t, err, "resolve address", context.DeadlineExceeded)
	done := goConnect(within(t, patience), b.id, nil)
	_, err = l.Accept(within(t, short))
	wantStep(t, err, "accept on", context.DeadlineExceeded)

	f.SetSilent(targetAddr, false)
	p.waitOK(p.recvCQ, 1)
	for i, wc := range a.wait(a.sendCQ, 2) {
		if wc.ID != uint64(2+i) || wc.Status != rdma.WCSuccess {
			t.Errorf("completion %+v, want success of %d", wc, 2+i)
		}
	}
	id, err := l.Accept(within(t, patience))
	check(t, err)
	q := newSide(t, id, config{})
	check(t, id.Accept(within(t, patience), connParam(nil)))
	check(t, (<-done).err)
	b.transfer(q)
}

func TestRefuse(t *testing.T) {
	f, s := newSetup(t)
	l := listen(t, s)
	for _, reason := range []int{rdma.RejectStaleConnection, rdma.RejectConsumer} {
		f.SetRefuse(targetAddr, reason, []byte("no"))
		a := newSide(t, resolve(t, s, l.Addr()), config{})
		_, err := a.id.Connect(within(t, patience), connParam(nil))
		var e *rdma.RejectError
		if !errors.As(err, &e) || e.Reason != reason || (reason == rdma.RejectConsumer) != (len(e.Private) > 0) {
			t.Errorf("error %v, want reason %d", err, reason)
		}
	}
	f.SetRefuse(targetAddr, 0, nil)
	a, p := connect(t, s, l, config{})
	a.transfer(p)
}

func TestDelay(t *testing.T) {
	f, s := newSetup(t)
	a, p := connection(t, s, config{})
	f.SetDelay(short)
	p.postRecv(1, 0, 64)
	start := time.Now()
	a.postSend(a.sendWR(2, 0, 64))
	a.none(a.sendCQ)
	pattern(a.mr.Bytes()[:64], 4) // what is sent is what stands there when it is sent
	p.waitOK(p.recvCQ, 1)
	a.waitOK(a.sendCQ, 2)
	wantPattern(t, p.mr.Bytes()[:64], 4)
	if d := time.Since(start); d < short {
		t.Errorf("took %v, want %v", d, short)
	}
	f.SetDelay(0)
	a.transfer(p)
}

func TestHold(t *testing.T) {
	f, s := newSetup(t)
	a, p := connection(t, s, config{events: true})
	f.SetHold(targetAddr, true)
	check(t, p.recvCQ.Arm())
	p.postRecv(1, 0, 64)
	a.postSend(a.sendWR(2, 0, 64))
	a.waitOK(a.sendCQ, 2)
	p.none(p.recvCQ)
	noEvent(t, p.recvCQ, "the completion is held")
	f.SetHold(targetAddr, false)
	check(t, waitEvent(p.recvCQ))
	p.waitOK(p.recvCQ, 1)
}

// What hardware does and users have to reckon with.

func TestSendSlotsNeedSignals(t *testing.T) {
	_, s := newSetup(t)
	a, p := connection(t, s, config{depth: 4})
	wr := a.remoteWR(1, rdma.Write, 0, 8, p, 0)
	wr.Signaled = false
	a.postSend(wr, wr, wr)
	wr.Signaled = true
	a.postSend(wr)
	if n, err := a.qp.PostSend([]rdma.SendWR{wr}); n != 0 || err == nil {
		t.Errorf("posted %d into a full queue, error %v", n, err)
	}
	a.waitOK(a.sendCQ, 1) // frees all four
	a.postSend(wr, wr, wr, wr)
	a.wait(a.sendCQ, 4)
}

func TestCompletionQueueOverrun(t *testing.T) {
	_, s := newSetup(t)
	a, p := connection(t, s, config{depth: 4, cqe: 2})
	wr := a.remoteWR(1, rdma.Write, 0, 8, p, 0)
	a.postSend(wr, wr, wr)
	if n, err := a.sendCQ.Poll(make([]rdma.WC, 4)); err == nil {
		t.Errorf("polled %d from an overrun queue", n)
	}
}

func TestReadNeedsDepth(t *testing.T) {
	_, s := newSetup(t)
	l := listen(t, s)
	a := newSide(t, resolve(t, s, l.Addr()), config{})
	done := make(chan error, 1)
	go func() { // as an NVMe host: the target may READ, we may not
		_, err := a.id.Connect(within(t, patience), rdma.ConnParam{ResponderResources: 1})
		done <- err
	}()
	id, err := l.Accept(within(t, patience))
	check(t, err)
	p := newSide(t, id, config{})
	check(t, id.Accept(within(t, patience), rdma.ConnParam{InitiatorDepth: 1}))
	check(t, <-done)
	p.postSend(p.remoteWR(1, rdma.Read, 0, 8, a, 0))
	p.waitOK(p.sendCQ, 1)
	a.postSend(a.remoteWR(2, rdma.Read, 0, 8, p, 0))
	if wc := a.wait(a.sendCQ, 1)[0]; wc.Status == rdma.WCSuccess {
		t.Error("READ without granted depth")
	}
}

func TestUnacknowledgedEvent(t *testing.T) {
	_, s := newSetup(t)
	a, p := connection(t, s, config{events: true})
	check(t, p.recvCQ.Arm())
	p.postRecv(1, 0, 8)
	a.postSend(a.sendWR(2, 0, 8))
	if got, err := readEvent(p.recvCQ); !got {
		t.Fatal("no event", err)
	}
	check(t, p.id.Close())
	closed := make(chan error, 1)
	go func() { closed <- p.recvCQ.Close() }()
	select {
	case err := <-closed:
		t.Fatal("closed without waiting for the acknowledgement", err)
	case <-time.After(short):
	}
	p.recvCQ.Ack(1)
	check(t, <-closed)
}

func TestBusy(t *testing.T) {
	_, s := newSetup(t)
	a, _ := connection(t, s, config{})
	for name, c := range map[string]interface{ Close() error }{"PD": a.pd, "send CQ": a.sendCQ, "receive CQ": a.recvCQ} {
		if err := c.Close(); !errors.Is(err, unix.EBUSY) {
			t.Errorf("close %s in use: %v, want EBUSY", name, err)
		}
	}
}

func TestBacklog(t *testing.T) {
	_, s := newSetup(t)
	l, err := s.Passive.Listen(netip.AddrPortFrom(s.Listen, 0), 1)
	check(t, err)
	closer(t, l)
	first := newSide(t, resolve(t, s, l.Addr()), config{})
	_ = goConnect(within(t, patience), first.id, []byte{1})
	second := newSide(t, resolve(t, s, l.Addr()), config{})
	done := goConnect(within(t, patience), second.id, []byte{2})
	for range 2 {
		id, err := l.Accept(within(t, patience))
		check(t, err)
		closer(t, id)
		if id.PrivateData()[0] == 2 {
			check(t, id.Reject(nil))
		}
	}
	var e *rdma.RejectError
	if got := <-done; !errors.As(got.err, &e) {
		t.Errorf("error %v, want a RejectError", got.err)
	}
}

func BenchmarkFabric(b *testing.B) {
	_, s := newSetup(b)
	Benchmark(b, s)
}
