package rdmatest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// The suite closes the objects of a connection in every order. Closing too early may be an error
// (EBUSY). What was closed can still be called: no call panics, reads or writes a descriptor
// that was closed, or closes it once more.

// piece is an object of a connection.
type piece struct {
	name  string
	close func() error
	early bool // may be in use
}

// testCloseOrder makes a connection for each order. The provider is among the objects if it can
// be closed.
func testCloseOrder(t *testing.T, setup func(*testing.T) Setup) {
	n := 5
	t.Run("kind", func(t *testing.T) {
		if _, ok := setup(t).Active.(io.Closer); ok {
			n++
		}
	})
	for i, order := range permutations(n) {
		if n > 5 && !adjacent(order) {
			continue
		}
		t.Run("", func(t *testing.T) { closeInOrder(t, setup(t), order, i%2 == 0) })
	}
}

// adjacent picks the orders of six objects in which the completion queues, 1 and 2, follow each
// other: what they are to the others is the same.
func adjacent(order []int) bool {
	for i, o := range order[:len(order)-1] {
		if o == 1 && order[i+1] == 2 {
			return true
		}
	}
	return false
}

// permutations of 0..n-1.
func permutations(n int) [][]int {
	if n == 0 {
		return [][]int{nil}
	}
	var all [][]int
	for _, p := range permutations(n - 1) {
		for i := range n {
			q := append(append(append([]int{}, p[:i]...), n-1), p[i:]...)
			all = append(all, q)
		}
	}
	return all
}

func closeInOrder(t *testing.T, s Setup, order []int, active bool) {
	l := listen(t, s)
	a, p := connect(t, s, l, config{events: true, memory: 4096, depth: 4})
	one, provider := a, s.Active
	if !active {
		one, provider = p, s.Passive
	}
	one.postRecv(1, 0, 64)
	check(t, one.recvCQ.Arm())
	dev := one.id.Device()
	pieces := []piece{
		{"id", one.id.Close, false}, {"send CQ", one.sendCQ.Close, true}, {"receive CQ", one.recvCQ.Close, true},
		{"memory region", one.mr.Close, false}, {"protection domain", one.pd.Close, true},
	}
	if c, ok := provider.(io.Closer); ok {
		pieces = append(pieces, piece{"provider", c.Close, false})
	}
	var strangers canaries
	defer strangers.check(t)
	var done []string
	defer func() {
		if t.Failed() {
			t.Logf("closed: %s", strings.Join(done, ", "))
		}
	}()
	for _, i := range order {
		err := pieces[i].close()
		done = append(done, fmt.Sprintf("%s (%v)", pieces[i].name, err))
		if err != nil && !(pieces[i].early && errors.Is(err, unix.EBUSY)) {
			t.Errorf("close %s: %v", pieces[i].name, err)
		}
		strangers.add(t)
		one.useAll(dev, provider, l.Addr())
		// The other side may share the provider.
		other := a
		if active {
			other = p
		}
		other.useAll(other.id.Device(), s.Passive, l.Addr())
	}
	for _, p := range pieces {
		check(t, p.close())
	}
}

// useAll calls everything that there is to call. Errors are all right.
func (s *side) useAll(dev rdma.Device, provider rdma.Provider, addr netip.AddrPort) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	for _, cq := range []rdma.CQ{s.sendCQ, s.recvCQ} {
		for range 3 { // a provider may look for packets only after some
			_, _ = cq.Poll(s.wcs[:])
		}
		_ = cq.Arm()
		cq.Ack(0)
		_ = cq.FD()
		if r, ok := cq.(rdma.Receiver); ok {
			_ = r.PacketFD()
			r.Receiving(true)
			r.Receive()
			r.Receiving(false)
		}
	}
	_, _ = s.qp.PostRecv([]rdma.RecvWR{{ID: 1, SGE: s.sge(0, 64)}})
	_, _ = s.qp.PostSend([]rdma.SendWR{s.sendWR(1, 0, 64)})
	_ = s.qp.Num()
	_ = s.mr.RKey()
	_ = dev.Attr()
	if mr, err := s.pd.AllocMR(4096, 0); err == nil {
		if again, err := s.pd.RegMR(mr.Bytes(), 0); err == nil {
			_ = again.Close()
		}
		_ = mr.Close()
	}
	cfg := rdma.QPConfig{SendCQ: s.sendCQ, RecvCQ: s.recvCQ, MaxSendWR: 1, MaxRecvWR: 1, MaxSendSGE: 1, MaxRecvSGE: 1}
	if _, err := s.id.CreateQP(s.pd, cfg); err == nil {
		s.t.Error("a second queue pair was made")
	}
	_, _ = s.id.Connect(ctx, connParam(nil))
	_ = s.id.Accept(ctx, connParam(nil))
	_ = s.id.Reject(nil)
	_, _ = s.id.LocalAddr(), s.id.RemoteAddr()
	if pd, err := dev.AllocPD(); err == nil {
		_ = pd.Close()
	}
	if cq, err := dev.CreateCQ(4, true, 0); err == nil {
		_ = cq.Close()
	}
	if id, err := provider.Resolve(ctx, netip.Addr{}, addr, -1); err == nil {
		_ = id.Close()
	}
}

// canaries are descriptors that take the numbers of those that were closed.
type canaries []int

func (c *canaries) add(t *testing.T) {
	for range 6 {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		check(t, err)
		*c = append(*c, fd)
	}
}

// check reports whether anybody has touched them, and closes them.
func (c *canaries) check(t *testing.T) {
	var b [8]byte
	for _, fd := range *c {
		if n, err := unix.Read(fd, b[:]); !errors.Is(err, unix.EAGAIN) {
			t.Errorf("descriptor %d was somebody else's: read %d bytes % x, error %v", fd, n, b[:n], err)
		}
		if err := unix.Close(fd); err != nil {
			t.Errorf("descriptor %d was closed by somebody else: %v", fd, err)
		}
	}
}

// testCloseUsed: a queue pair is not made of what is closed, nor a region registered there.
func testCloseUsed(t *testing.T, s Setup) {
	id := resolve(t, s, listen(t, s).Addr())
	dev := id.Device()
	closed, err := dev.AllocPD()
	check(t, err)
	check(t, closed.Close())
	pd, err := dev.AllocPD()
	check(t, err)
	closer(t, pd)
	mr, err := pd.AllocMR(4096, rdma.AccessLocalWrite)
	check(t, err)
	closer(t, mr)
	if _, err := closed.RegMR(mr.Bytes(), 0); !errors.Is(err, rdma.ErrClosed) {
		t.Errorf("registered in a closed domain: %v", err)
	}
	if _, err := closed.AllocMR(4096, 0); !errors.Is(err, rdma.ErrClosed) {
		t.Errorf("region in a closed domain: %v", err)
	}
	var cqs [2]rdma.CQ
	for i := range cqs {
		cqs[i], err = dev.CreateCQ(4, true, 0)
		check(t, err)
		closer(t, cqs[i])
	}
	check(t, cqs[1].Close())
	if fd := cqs[1].FD(); fd != -1 {
		t.Errorf("a closed queue has descriptor %d", fd)
	}
	cfg := func(send, recv rdma.CQ) rdma.QPConfig {
		return rdma.QPConfig{SendCQ: send, RecvCQ: recv, MaxSendWR: 1, MaxRecvWR: 1, MaxSendSGE: 1, MaxRecvSGE: 1}
	}
	for _, c := range []struct {
		pd         rdma.PD
		send, recv rdma.CQ
	}{{closed, cqs[0], cqs[0]}, {pd, cqs[1], cqs[0]}, {pd, cqs[0], cqs[1]}} {
		if _, err := id.CreateQP(c.pd, cfg(c.send, c.recv)); !errors.Is(err, rdma.ErrClosed) {
			t.Errorf("queue pair of something closed: %v", err)
		}
	}
	qp, err := id.CreateQP(pd, cfg(cqs[0], cqs[0])) // nothing stayed behind
	check(t, err)
	for _, used := range []io.Closer{pd, cqs[0]} {
		if err := used.Close(); !errors.Is(err, unix.EBUSY) {
			t.Errorf("closed in use: %v", err)
		}
	}
	check(t, id.Close())
	for _, post := range []func() (int, error){
		func() (int, error) { return qp.PostSend([]rdma.SendWR{{Op: rdma.Write}}) },
		func() (int, error) { return qp.PostRecv([]rdma.RecvWR{{}}) },
	} {
		if n, err := post(); n != 0 || !errors.Is(err, rdma.ErrClosed) {
			t.Errorf("posted %d to a queue pair that is gone: %v", n, err)
		}
	}
	check(t, cqs[0].Close())
	if n, err := cqs[0].Poll(make([]rdma.WC, 1)); n != 0 || !errors.Is(err, rdma.ErrClosed) {
		t.Errorf("polled %d from a closed queue: %v", n, err)
	}
	if err := cqs[0].Arm(); !errors.Is(err, rdma.ErrClosed) {
		t.Errorf("armed a closed queue: %v", err)
	}
}

// testCloseProvider: a provider that was closed makes nothing any more.
func testCloseProvider(t *testing.T, s Setup) {
	l, err := s.Passive.Listen(netip.AddrPortFrom(s.Listen, 0), 4)
	check(t, err)
	closing := []rdma.Provider{s.Active, s.Passive}
	for _, p := range closing {
		c, ok := p.(io.Closer)
		if !ok {
			check(t, l.Close())
			return
		}
		check(t, c.Close())
		check(t, c.Close())
	}
	_, err = l.Accept(within(t, patience))
	wantStep(t, err, "accept on", rdma.ErrClosed)
	check(t, l.Close())
	_, err = s.Active.Resolve(within(t, patience), netip.Addr{}, l.Addr(), -1)
	wantStep(t, err, "resolve address", rdma.ErrClosed)
	_, err = s.Passive.Listen(netip.AddrPortFrom(s.Listen, 0), 4)
	wantStep(t, err, "listen on", rdma.ErrClosed)
}
