package rdmatest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"ublk-nvmeof/rdma"
)

// short is a deadline that a test waits for.
const short = 300 * time.Millisecond

// timely fails the test when something that must be bounded took too long.
func timely(t *testing.T, what string, start time.Time) {
	t.Helper()
	if d := time.Since(start); d > patience {
		t.Errorf("%s took %v", what, d)
	}
}

// wantStep checks for a StepError of this step that wraps target.
func wantStep(t *testing.T, err error, step string, target error) {
	t.Helper()
	var e *rdma.StepError
	if !errors.As(err, &e) || e.Step != step || (target != nil && !errors.Is(err, target)) {
		t.Fatalf("error %v, want a StepError of %q for %v", err, step, target)
	}
}

// wantPrivate checks private data that may have been padded.
func wantPrivate(t *testing.T, got, want []byte) {
	t.Helper()
	if len(got) < len(want) || !bytes.Equal(got[:len(want)], want) || len(bytes.Trim(got[len(want):], "\x00")) != 0 {
		t.Errorf("private data % x, want % x and zeros", got, want)
	}
}

func testDevice(t *testing.T, s Setup) {
	l := listen(t, s)
	a := resolve(t, s, l.Addr()).Device().Attr()
	if a.Name == "" || a.MaxQPWR < 256 || a.MaxSGE < 2 || a.MaxCQE < 1024 || a.MaxMR < 16 || a.MaxMRSize < 1<<20 ||
		a.MaxQPReadAtomic < 1 || a.CompVectors < 1 {
		t.Errorf("implausible limits %+v", a)
	}
}

func testMemory(t *testing.T, s Setup) {
	id := resolve(t, s, listen(t, s).Addr())
	pd, err := id.Device().AllocPD()
	check(t, err)
	closer(t, pd)
	for _, n := range []int{1, 4096, 4097, 3 << 20} {
		mr, err := pd.AllocMR(n, rdma.AccessLocalWrite)
		check(t, err)
		closer(t, mr)
		b := mr.Bytes()
		if len(b) < n || mr.Addr()%4096 != 0 || len(bytes.Trim(b, "\x00")) != 0 {
			t.Errorf("region for %d bytes: %d bytes at %#x, zeroed: %v", n, len(b), mr.Addr(), len(bytes.Trim(b, "\x00")) == 0)
		}
		pattern(b, n)
		wantPattern(t, b, n)
	}
	if _, err := pd.AllocMR(0, rdma.AccessLocalWrite); err == nil {
		t.Error("a region of no bytes was made")
	}
}

func testPrivateData(t *testing.T, s Setup) {
	l := listen(t, s)
	for _, c := range []struct{ request, answer int }{{0, 0}, {1, 1}, {32, 32}, {56, 196}} {
		t.Run(fmt.Sprintf("%d and %d", c.request, c.answer), func(t *testing.T) {
			ask, say := make([]byte, c.request), make([]byte, c.answer)
			pattern(ask, 1)
			pattern(say, 2)
			a := newSide(t, resolve(t, s, l.Addr()), config{})
			done := goConnect(within(t, patience), a.id, ask)
			id, err := l.Accept(within(t, patience))
			check(t, err)
			p := newSide(t, id, config{})
			wantPrivate(t, id.PrivateData(), ask)
			check(t, p.id.Accept(within(t, patience), connParam(say)))
			got := <-done
			check(t, got.err)
			wantPrivate(t, got.private, say)
		})
	}
}

func testPrivateDataTooLong(t *testing.T, s Setup) {
	l := listen(t, s)
	a := newSide(t, resolve(t, s, l.Addr()), config{})
	_, err := a.id.Connect(within(t, patience), connParam(make([]byte, 57)))
	wantStep(t, err, "connect", nil)

	b := newSide(t, resolve(t, s, l.Addr()), config{})
	ctx, cancel := context.WithCancel(t.Context())
	done := goConnect(ctx, b.id, nil)
	id, err := l.Accept(within(t, patience))
	check(t, err)
	p := newSide(t, id, config{})
	wantStep(t, p.id.Accept(within(t, patience), connParam(make([]byte, 197))), "accept", nil)
	wantStep(t, p.id.Reject(make([]byte, 149)), "reject", nil)
	cancel()
	if got := <-done; got.err == nil {
		t.Error("connected without an answer")
	}
}

func testAddresses(t *testing.T, s Setup) {
	l := listen(t, s)
	if l.Addr().Addr() != s.Listen || l.Addr().Port() == 0 {
		t.Errorf("listens on %s, want %s and a port", l.Addr(), s.Listen)
	}
	a, p := connect(t, s, l, config{})
	// A passive side may not know the zone.
	passive := netip.AddrPortFrom(s.Listen.WithZone(""), l.Addr().Port())
	if local := p.id.LocalAddr(); a.id.RemoteAddr() != l.Addr() || netip.AddrPortFrom(local.Addr().WithZone(""), local.Port()) != passive {
		t.Errorf("active side's remote address %s, passive side's local address %s, want %s", a.id.RemoteAddr(), local, l.Addr())
	}
	active, seen := a.id.LocalAddr().Addr(), p.id.RemoteAddr().Addr()
	if !active.IsValid() || active.WithZone("") != seen.WithZone("") {
		t.Errorf("active side's local address %s is %s for the passive side", active, seen)
	}
	id, err := s.Active.Resolve(within(t, patience), a.id.LocalAddr().Addr(), l.Addr(), 32)
	check(t, err)
	closer(t, id)
	if id.LocalAddr().Addr() != a.id.LocalAddr().Addr() {
		t.Errorf("bound to %s, want %s", id.LocalAddr(), a.id.LocalAddr())
	}
}

func testReject(t *testing.T, s Setup) {
	l := listen(t, s)
	for _, n := range []int{0, 4, 148} {
		private := make([]byte, n)
		pattern(private, n)
		a := newSide(t, resolve(t, s, l.Addr()), config{})
		done := goConnect(within(t, patience), a.id, []byte("may I?"))
		id, err := l.Accept(within(t, patience))
		check(t, err)
		closer(t, id)
		wantPrivate(t, id.PrivateData(), []byte("may I?"))
		check(t, id.Reject(private))
		got := <-done
		var e *rdma.RejectError
		if !errors.As(got.err, &e) || e.Reason != rdma.RejectConsumer || e.Peer != l.Addr() {
			t.Fatalf("error %v, want a RejectError by the consumer", got.err)
		}
		wantPrivate(t, e.Private, private)
	}
}

func testNobodyListens(t *testing.T, s Setup) {
	l := listen(t, s)
	addr := l.Addr()
	check(t, l.Close())
	a := newSide(t, resolve(t, s, addr), config{})
	_, err := a.id.Connect(within(t, patience), connParam(nil))
	var e *rdma.RejectError
	if !errors.As(err, &e) || e.Reason != rdma.RejectInvalidServiceID || e.Private != nil {
		t.Fatalf("error %v, want a RejectError with reason %d", err, rdma.RejectInvalidServiceID)
	}
}

func testConnectDeadline(t *testing.T, s Setup) {
	l := listen(t, s)
	a := newSide(t, resolve(t, s, l.Addr()), config{})
	start := time.Now()
	_, err := a.id.Connect(within(t, short), connParam(nil))
	wantStep(t, err, "connect", context.DeadlineExceeded)
	if d := time.Since(start); d < short {
		t.Errorf("gave up after %v, want %v", d, short)
	}
	start = time.Now()
	check(t, a.id.Close())
	timely(t, "close", start)
}

func testConnectCanceled(t *testing.T, s Setup) {
	l := listen(t, s)
	a := newSide(t, resolve(t, s, l.Addr()), config{})
	ctx, cancel := context.WithCancel(t.Context())
	done := goConnect(ctx, a.id, nil)
	id, err := l.Accept(within(t, patience))
	check(t, err)
	closer(t, id)
	cancel()
	wantStep(t, (<-done).err, "connect", context.Canceled)
}

func testConnectClosed(t *testing.T, s Setup) {
	l := listen(t, s)
	a := newSide(t, resolve(t, s, l.Addr()), config{})
	done := goConnect(within(t, patience), a.id, nil)
	id, err := l.Accept(within(t, patience))
	check(t, err)
	closer(t, id)
	check(t, a.id.Close())
	wantStep(t, (<-done).err, "connect", rdma.ErrClosed)
}

func testResolveDeadline(t *testing.T, s Setup) {
	if !s.Silent.IsValid() {
		return
	}
	start := time.Now()
	_, err := s.Active.Resolve(within(t, short), netip.Addr{}, netip.AddrPortFrom(s.Silent, 4420), -1)
	wantStep(t, err, "resolve address", context.DeadlineExceeded)
	timely(t, "resolve", start)
}

func testAcceptGivenUp(t *testing.T, s Setup) {
	l := listen(t, s)
	a := newSide(t, resolve(t, s, l.Addr()), config{})
	done := goConnect(within(t, patience), a.id, nil)
	id, err := l.Accept(within(t, patience))
	check(t, err)
	p := newSide(t, id, config{})
	check(t, a.id.Close())
	<-done
	if err := p.id.Accept(within(t, patience), connParam(nil)); err == nil {
		t.Error("accepted a request that was given up")
	} else {
		wantStep(t, err, "accept", nil)
	}
}

func testRequestDropped(t *testing.T, s Setup) {
	l := listen(t, s)
	a := newSide(t, resolve(t, s, l.Addr()), config{})
	done := goConnect(within(t, patience), a.id, nil)
	id, err := l.Accept(within(t, patience))
	check(t, err)
	check(t, id.Close())
	var e *rdma.RejectError
	if got := <-done; !errors.As(got.err, &e) {
		t.Errorf("error %v, want a RejectError", got.err)
	}
}

// testChurn gives up at any moment of connecting, on both sides.
func testChurn(t *testing.T, s Setup) {
	l := listen(t, s)
	ctx, stop := context.WithCancel(within(t, patience))
	served := make(chan error, 1)
	go func() {
		served <- func() error {
			for {
				id, err := l.Accept(ctx)
				if err != nil {
					return nil // the end of the test
				}
				// When the peer has given up, each step may fail.
				p, err := makeSide(id, config{memory: 4096})
				if err == nil {
					short, cancel := context.WithTimeout(ctx, rand.N(10*time.Millisecond))
					_ = id.Accept(short, connParam(nil))
					cancel()
				}
				if err := p.close(); err != nil {
					return err
				}
			}
		}()
	}()
	for range 40 {
		short, cancel := context.WithTimeout(ctx, rand.N(20*time.Millisecond))
		id, err := s.Active.Resolve(short, netip.Addr{}, l.Addr(), -1)
		if err == nil {
			a, err := makeSide(id, config{memory: 4096})
			if err == nil {
				_, _ = id.Connect(short, connParam(nil)) // may fail
			}
			if err := errors.Join(err, a.close()); err != nil {
				t.Error(err)
			}
		}
		cancel()
	}
	stop()
	check(t, <-served)
	a, p := connect(t, s, listen(t, s), config{})
	a.transfer(p)
}

func testListenerDeadline(t *testing.T, s Setup) {
	l := listen(t, s)
	_, err := l.Accept(within(t, short))
	wantStep(t, err, "accept on", context.DeadlineExceeded)
	a, p := connect(t, s, l, config{}) // it still works
	a.transfer(p)
}

func testListenerClose(t *testing.T, s Setup) {
	l := listen(t, s)
	a, p := connect(t, s, l, config{})
	done := make(chan error, 1)
	go func() {
		_, err := l.Accept(context.Background())
		done <- err
	}()
	check(t, l.Close())
	check(t, l.Close())
	wantStep(t, <-done, "accept on", rdma.ErrClosed)
	a.transfer(p) // connections outlive their listener
}

func testListenerInUse(t *testing.T, s Setup) {
	l := listen(t, s)
	if second, err := s.Passive.Listen(l.Addr(), 1); err == nil {
		t.Error("two listeners on one port")
		check(t, second.Close())
	} else {
		wantStep(t, err, "listen on", nil)
	}
}

func testTwoListeners(t *testing.T, s Setup) {
	l, m := listen(t, s), listen(t, s)
	a := newSide(t, resolve(t, s, m.Addr()), config{})
	done := goConnect(within(t, patience), a.id, []byte("second"))
	_, err := l.Accept(within(t, short))
	wantStep(t, err, "accept on", context.DeadlineExceeded)
	id, err := m.Accept(within(t, patience))
	check(t, err)
	p := newSide(t, id, config{})
	wantPrivate(t, id.PrivateData(), []byte("second"))
	check(t, id.Accept(within(t, patience), connParam(nil)))
	check(t, (<-done).err)
	b, q := connect(t, s, l, config{})
	a.transfer(p)
	b.transfer(q)
}

// transfer sends a little in both directions.
func (s *side) transfer(peer *side) {
	s.t.Helper()
	for _, d := range [][2]*side{{s, peer}, {peer, s}} {
		from, to := d[0], d[1]
		pattern(from.mr.Bytes()[:100], 5)
		clear(to.mr.Bytes()[4096:4196])
		to.postRecv(1, 4096, 100)
		from.postSend(from.sendWR(2, 0, 100))
		to.waitOK(to.recvCQ, 1)
		from.waitOK(from.sendCQ, 2)
		wantPattern(s.t, to.mr.Bytes()[4096:4196], 5)
	}
}

func testDisconnect(t *testing.T, s Setup) {
	a, p := connection(t, s, config{})
	a.postRecv(7, 0, 64)
	check(t, a.id.Disconnect())
	if wc := a.wait(a.recvCQ, 1)[0]; wc.ID != 7 || wc.Status != rdma.WCFlushErr {
		t.Errorf("receive %d: %s, want 7 flushed", wc.ID, wc.Status)
	}
	waitEventType(t, p.id, rdma.EventDisconnected)
	check(t, p.id.Disconnect())
	waitEventType(t, a.id, rdma.EventDisconnected)
}

func testCloseDisconnects(t *testing.T, s Setup) {
	for _, active := range []bool{true, false} {
		a, p := connection(t, s, config{})
		first, second := a, p
		if !active {
			first, second = p, a
		}
		check(t, first.id.Close())
		waitEventType(t, second.id, rdma.EventDisconnected)
		if ev, open := <-first.id.Events(); open {
			t.Errorf("closed ID reports %v", ev)
		}
	}
}

func testCloseTwice(t *testing.T, s Setup) {
	l := listen(t, s)
	id := resolve(t, s, l.Addr()) // never connected
	check(t, id.Close())
	check(t, id.Close())
	a, p := connect(t, s, l, config{})
	for range 2 {
		check(t, a.id.Close())
		check(t, p.close())
	}
	check(t, a.qp.Fail()) // harmless
	check(t, a.id.Disconnect())
}
