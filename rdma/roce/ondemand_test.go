package roce

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// TestOnDemand checks that hosts and their target can share an address, because the
// target answers to the port from which a message came.
func TestOnDemand(t *testing.T) {
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}})
	for range 2 {
		host := open(t, Config{OnDemand: true})
		a, b := joinVia(t, host, targetAddr, target, 16, 1<<16, false)
		if got := a.queuePair().path.local; got.Addr() != targetAddr || got.Port() == testPort {
			t.Errorf("sends from %v", got)
		}
		b.recv(1, 0, 8)
		a.post(a.wr(2, rdma.Send, 0, 8, b, 0))
		b.ok(b.recvCQ, 1)
		a.ok(a.sendCQ, 2)
		check(t, b.id.Disconnect())
		if ev := <-a.id.Events(); ev.Type != rdma.EventDisconnected {
			t.Errorf("event %v", ev)
		}
	}
}

// TestOnDemandRefused checks that a request from a port of its own is also refused if
// nothing listens on the target port.
func TestOnDemandRefused(t *testing.T) {
	open(t, Config{Addrs: []netip.Addr{targetAddr}})
	host := open(t, Config{OnDemand: true})
	id, err := host.Resolve(t.Context(), targetAddr, netip.AddrPortFrom(targetAddr, 4420), -1)
	check(t, err)
	e := newEnd(t, id, 16, 4096, false)
	var reject *rdma.RejectError
	if _, err := e.id.Connect(t.Context(), param); !errors.As(err, &reject) || reject.Reason != rdma.RejectInvalidServiceID {
		t.Error(err)
	}
}

// TestNobodyThere checks that a connect request ends early if the port of RoCEv2 is
// closed at the peer.
func TestNobodyThere(t *testing.T) {
	host := open(t, Config{OnDemand: true})
	id, err := host.Resolve(t.Context(), netip.Addr{}, netip.AddrPortFrom(targetAddr, 4420), -1)
	check(t, err)
	e := newEnd(t, id, 16, 4096, false)
	var step *rdma.StepError
	if _, err := e.id.Connect(t.Context(), param); !errors.Is(err, unix.ECONNREFUSED) || !errors.As(err, &step) {
		t.Error(err)
	}
}

// TestPortTaken checks that the error of a host without the port of RoCEv2 says so if it
// gets no answer.
func TestPortTaken(t *testing.T) {
	host := open(t, Config{OnDemand: true})
	id, err := host.Resolve(t.Context(), hostAddr, netip.AddrPortFrom(targetAddr, 4420), -1)
	check(t, err)
	e := newEnd(t, id, 16, 4096, false)
	// As if the target were on another machine that loses everything
	far := e.id.(*connID)
	far.local, far.remote = netip.AddrPortFrom(netip.MustParseAddr("192.0.2.2"), 1), netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), 4420)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := far.Connect(ctx, param); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "another user has port") {
		t.Error(err)
	}
}

func TestOnDemandConfig(t *testing.T) {
	if _, err := New(Config{OnDemand: true, Addrs: []netip.Addr{hostAddr}}); !errors.Is(err, unix.EINVAL) {
		t.Error(err)
	}
	host := open(t, Config{OnDemand: true})
	check(t, host.Close())
	if _, err := host.Resolve(t.Context(), netip.Addr{}, netip.AddrPortFrom(targetAddr, 1), -1); !errors.Is(err, rdma.ErrClosed) {
		t.Error(err)
	}
}

// TestReceive checks that a caller that serves a queue pair with its own port takes the
// packets, and that their completions then cause no event. If the caller does not, the
// port takes them.
func TestReceive(t *testing.T) {
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}})
	host := open(t, Config{OnDemand: true})
	a, b := joinVia(t, host, targetAddr, target, 16, 1<<16, true)
	if shared := open(t, Config{Addrs: []netip.Addr{hostAddr}}); shared != nil {
		c, _ := join(t, shared, target, 16, 1<<16, true)
		if fd := c.recvCQ.(rdma.Receiver).PacketFD(); fd >= 0 {
			t.Errorf("a shared port has the descriptor %d", fd)
		}
	}
	q := b.recvCQ.(rdma.Receiver)
	q.Receiving(true)
	// await waits for packets or for an event, and reports whether there are packets.
	await := func() bool {
		fds := []unix.PollFd{{Fd: int32(q.PacketFD()), Events: unix.POLLIN}, {Fd: int32(q.FD()), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, int(patience/time.Millisecond)); err != nil && err != unix.EINTR {
			t.Fatal(err)
		}
		return fds[0].Revents != 0
	}
	take := func() {
		var buf [8]byte
		if _, err := unix.Read(q.FD(), buf[:]); err != nil {
			t.Fatal(err)
		}
		q.Ack(1)
	}
	event := func(within time.Duration) bool {
		fds := []unix.PollFd{{Fd: int32(q.FD()), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(within/time.Millisecond))
		if err != nil && err != unix.EINTR {
			t.Fatal(err)
		}
		return n == 1
	}
	served := false
	for id := uint64(1); id <= 10 && !served; id++ {
		b.recv(id, 0, 8)
		check(t, q.Arm())
		a.post(a.wr(id, rdma.Send, 0, 8, b, 0))
		packets := await()
		if packets {
			q.Receive()
		}
		// The port also looks for packets when it is told to, and once per
		// second.
		got := event(0)
		if got {
			take()
		}
		served = packets && !got
		b.ok(q, id)
		a.ok(a.sendCQ, id)
	}
	if !served {
		t.Error("the port takes the packets")
	}

	// The caller does not take them, so the requested event comes.
	b.recv(11, 0, 8)
	check(t, q.Arm())
	a.post(a.wr(11, rdma.Send, 0, 8, b, 0))
	if !event(patience) {
		t.Fatal("no event came")
	}
	take()
	b.ok(q, 11)
	a.ok(a.sendCQ, 11)
	q.Receiving(false)
}
