package rdmatest

import (
	"errors"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/rdma"
)

func testEventDescriptor(t *testing.T, s Setup) {
	dev := resolve(t, s, listen(t, s).Addr()).Device()
	cq, err := dev.CreateCQ(16, true, 1<<20) // any vector will do
	check(t, err)
	closer(t, cq)
	status, err := unix.FcntlInt(uintptr(cq.FD()), unix.F_GETFL, 0)
	check(t, err)
	flags, err := unix.FcntlInt(uintptr(cq.FD()), unix.F_GETFD, 0)
	check(t, err)
	if status&unix.O_NONBLOCK == 0 || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("descriptor is non-blocking: %v, close-on-exec: %v", status&unix.O_NONBLOCK != 0, flags&unix.FD_CLOEXEC != 0)
	}
	cq.Ack(0)

	silent, err := dev.CreateCQ(16, false, 0)
	check(t, err)
	closer(t, silent)
	if silent.FD() != -1 || silent.Arm() == nil {
		t.Errorf("without events: descriptor %d, armed: %v", silent.FD(), silent.Arm() == nil)
	}
}

func testEventWhenArmed(t *testing.T, s Setup) {
	a, p := connection(t, s, config{events: true})
	for range 3 { // the queue can be armed again and again
		check(t, p.recvCQ.Arm())
		noEvent(t, p.recvCQ, "no completion")
		p.postRecv(1, 0, 8)
		p.postRecv(2, 0, 8)
		a.postSend(a.sendWR(3, 0, 8))
		a.waitOK(a.sendCQ, 3)
		check(t, waitEvent(p.recvCQ))
		p.waitOK(p.recvCQ, 1)

		// Nobody armed it again.
		a.postSend(a.sendWR(4, 0, 8))
		a.waitOK(a.sendCQ, 4)
		p.waitOK(p.recvCQ, 2)
		noEvent(t, p.recvCQ, "not armed")
	}
	noEvent(t, p.sendCQ, "another queue")
	noEvent(t, a.sendCQ, "another queue")
}

// testEventPingPong finds lost wake-ups: both sides sleep for every message.
func testEventPingPong(t *testing.T, s Setup) {
	const messages = 300
	a, p := connection(t, s, config{events: true})
	p.postRecv(1, 0, 8)
	answered := make(chan error, 1)
	go func() {
		answered <- func() error {
			for range messages {
				if err := p.sleep(p.recvCQ, 1); err != nil {
					return err
				}
				if _, err := p.qp.PostRecv([]rdma.RecvWR{{ID: 1, SGE: p.sge(0, 8)}}); err != nil {
					return err
				}
				if _, err := p.qp.PostSend([]rdma.SendWR{p.sendWR(2, 64, 8)}); err != nil {
					return err
				}
				if err := p.sleep(p.sendCQ, 2); err != nil {
					return err
				}
			}
			return nil
		}()
	}()
	for i := range messages {
		a.postRecv(3, 0, 8)
		a.postSend(a.sendWR(4, 64, 8))
		if err := errors.Join(a.sleep(a.sendCQ, 4), a.sleep(a.recvCQ, 3)); err != nil {
			t.Errorf("message %d: %v", i, err)
			break
		}
	}
	check(t, <-answered)
}

func testEventUnread(t *testing.T, s Setup) {
	a, p := connection(t, s, config{events: true})
	check(t, p.recvCQ.Arm())
	check(t, a.sendCQ.Arm())
	p.postRecv(1, 0, 8)
	a.postSend(a.sendWR(2, 0, 8))
	p.waitOK(p.recvCQ, 1)
	a.waitOK(a.sendCQ, 2)
	start := time.Now()
	check(t, errors.Join(a.close(), p.close()))
	timely(t, "close with unread events", start)
}

func testPollOnly(t *testing.T, s Setup) {
	a, p := connection(t, s, config{})
	for range 100 {
		a.transfer(p)
	}
}

func testLeaks(t *testing.T, s Setup) {
	l := listen(t, s)
	cycle := func() {
		id, err := s.Active.Resolve(within(t, patience), netip.Addr{}, l.Addr(), -1)
		check(t, err)
		a, err := makeSide(id, config{events: true})
		a.t = t
		check(t, err)
		done := goConnect(within(t, patience), id, nil)
		passive, err := l.Accept(within(t, patience))
		check(t, err)
		p, err := makeSide(passive, config{events: true})
		p.t = t
		check(t, err)
		check(t, passive.Accept(within(t, patience), connParam(nil)))
		check(t, (<-done).err)
		a.transfer(p)
		check(t, errors.Join(a.close(), p.close()))

		// One that is refused, one that gives up, and a second listener.
		id, err = s.Active.Resolve(within(t, patience), netip.Addr{}, l.Addr(), -1)
		check(t, err)
		a, err = makeSide(id, config{})
		check(t, err)
		done = goConnect(within(t, patience), id, nil)
		passive, err = l.Accept(within(t, patience))
		check(t, err)
		check(t, errors.Join(passive.Reject(nil), passive.Close()))
		if (<-done).err == nil {
			t.Error("refused, and yet connected")
		}
		check(t, a.close())
		second, err := s.Passive.Listen(netip.AddrPortFrom(s.Listen, 0), 1)
		check(t, err)
		check(t, second.Close())
	}
	cycle() // what is made once and kept
	fds, routines := testenv.OpenFiles(t), runtime.NumGoroutine()
	for range 5 {
		cycle()
	}
	// What was closed may need a moment to go.
	now, n := testenv.OpenFiles(t), runtime.NumGoroutine()
	for deadline := time.Now().Add(patience); (n > routines || len(now) > len(fds)) && time.Now().Before(deadline); {
		runtime.Gosched()
		now, n = testenv.OpenFiles(t), runtime.NumGoroutine()
	}
	if n > routines {
		t.Errorf("%d goroutines, were %d", n, routines)
	}
	if len(now) > len(fds) {
		t.Errorf("%d open descriptors, were %d: %s", len(now), len(fds), strings.Join(slices.Sorted(maps.Values(now)), " "))
	}
}

func testAllocations(t *testing.T, s Setup) {
	a, p := connection(t, s, config{events: true})
	recv := []rdma.RecvWR{{ID: 1, SGE: p.sge(0, 64)}}
	send := []rdma.SendWR{a.remoteWR(2, rdma.Write, 0, 64, p, 0), a.sendWR(3, 0, 64)}
	send[0].Signaled = false
	wcs := make([]rdma.WC, 4)
	event := make([]byte, 8)
	failed := ""
	poll := func(cq rdma.CQ) {
		for range 100_000_000 {
			if n, err := cq.Poll(wcs); err != nil || n > 1 || n == 1 && wcs[0].Status != rdma.WCSuccess {
				failed = "Poll"
			} else if n == 1 {
				return
			}
		}
		failed = "no completion"
	}
	once := func() {
		if p.recvCQ.Arm() != nil {
			failed = "Arm"
		}
		if n, err := p.qp.PostRecv(recv); n != 1 || err != nil {
			failed = "PostRecv"
		}
		if n, err := a.qp.PostSend(send); n != 2 || err != nil {
			failed = "PostSend"
		}
		poll(a.sendCQ)
		poll(p.recvCQ)
		for {
			if _, err := unix.Read(p.recvCQ.FD(), event); err == nil {
				break
			}
		}
		p.recvCQ.Ack(1)
	}
	if n := testing.AllocsPerRun(100, once); n != 0 {
		t.Errorf("%v allocations per message", n)
	}
	if failed != "" {
		t.Errorf("%s failed", failed)
	}
}
