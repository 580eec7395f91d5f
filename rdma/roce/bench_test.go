package roce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/spin"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
)

// The benchmarks do the work of a block device: a request of 64 bytes is answered with n
// bytes of data and a response of 16 bytes, depth at a time. Over RoCE, the request is a
// SEND, the data an RDMA WRITE and the response a SEND. All WRITEs of a batch precede all
// SENDs. Over TCP, the answers to one wake-up go in one writev, which is the best that
// TCP allows.
//
// Goroutines that wait for TCP take turns on one thread, which finds the other one ready
// and never sleeps. That is possible only because both ends are in one process. Ends on
// two hosts sleep, like threads that wait in the kernel.
const (
	requestLen  = 64
	responseLen = 16
)

var shapes = []struct {
	name        string
	size, depth int
}{{"4KiB-QD1", 4096, 1}, {"4KiB-QD32", 4096, 32}, {"128KiB-QD8", 128 << 10, 8}}

func BenchmarkRead(b *testing.B) {
	for _, s := range shapes {
		b.Run(s.name+"/tcp-goroutines", func(b *testing.B) { benchTCP(b, s.size, s.depth, newGoroutineEnd) })
		b.Run(s.name+"/tcp-threads", func(b *testing.B) { benchTCP(b, s.size, s.depth, newThreadEnd) })
		b.Run(s.name+"/roce-poll", func(b *testing.B) { benchRoCE(b, s.size, s.depth, false, false) })
		b.Run(s.name+"/roce-event", func(b *testing.B) { benchRoCE(b, s.size, s.depth, true, false) })
		b.Run(s.name+"/roce-adaptive", func(b *testing.B) { benchRoCE(b, s.size, s.depth, true, true) })
	}
}

// BenchmarkLoss moves the data of reads of 128 KiB, 8 at a time, over a link that loses packets of
// 4 KiB in both directions.
func BenchmarkLoss(b *testing.B) {
	const size, depth = 128 << 10, 8
	for _, loss := range []float64{0, 0.01, 0.05} {
		b.Run(fmt.Sprintf("%v", loss), func(b *testing.B) {
			host, target := openLossy(b, func(seed uint64) *link { return newLink(seed, loss, 0, 0, 0) }, nil)
			h, g := join(b, host, target, 2*depth, depth*size, false)
			b.SetBytes(size)
			b.ResetTimer()
			wcs := make([]rdma.WC, depth)
			for sent, done := 0, 0; done < b.N; {
				for ; sent < b.N && sent < done+depth; sent++ {
					at := sent % depth * size
					g.post(g.wr(uint64(sent), rdma.Write, at, size, h, at))
				}
				n, err := g.sendCQ.Poll(wcs)
				check(b, err)
				for i := range n {
					if wcs[i].Status != rdma.WCSuccess {
						b.Fatal(wcs[i].Status)
					}
				}
				done += n
				if n == 0 {
					runtime.Gosched()
				}
			}
		})
	}
}

// BenchmarkSuite is the benchmark of all providers, which polls without sleep.
func BenchmarkSuite(b *testing.B) {
	host, target := openPair(b)
	rdmatest.Benchmark(b, rdmatest.Setup{Active: host, Passive: target, Listen: targetAddr})
}

// waiter waits for completions like a poller's loop: it takes its own packets, and it
// either spins or sleeps until packets arrive, or spins first as long as that pays.
type waiter struct {
	cq      rdma.Receiver
	fds     [2]unix.PollFd // the packets, and the completion channel
	sleeps  bool
	spins   bool // before it sleeps
	spinner spin.Spinner
	event   [8]byte
}

func newWaiter(b *testing.B, cq rdma.CQ, spins bool) *waiter {
	w := &waiter{cq: cq.(rdma.Receiver), sleeps: cq.FD() >= 0, spins: spins, spinner: spin.New()}
	if w.cq.PacketFD() < 0 {
		b.Fatal("several queue pairs share the packets")
	}
	w.fds = [2]unix.PollFd{{Fd: int32(w.cq.PacketFD()), Events: unix.POLLIN}, {Fd: int32(cq.FD()), Events: unix.POLLIN}}
	w.cq.Receiving(true)
	b.Cleanup(func() { w.cq.Receiving(false) })
	return w
}

var errStopped = errors.New("stopped")

// wait returns at least one completion, or stops.
func (w *waiter) wait(wcs []rdma.WC, stop *atomic.Bool) (int, error) {
	for {
		n, err := w.cq.Poll(wcs)
		if n > 0 || err != nil {
			return n, err
		}
		if stop.Load() {
			return 0, errStopped
		}
		if !w.sleeps {
			continue // Poll takes packets, too
		}
		if n, err := w.spin(wcs); n > 0 || err != nil {
			return n, err
		}
		if err := w.cq.Arm(); err != nil {
			return 0, err
		}
		if n, err := w.cq.Poll(wcs); n > 0 || err != nil {
			return n, err
		}
		w.sleep()
		if w.fds[1].Revents != 0 {
			if _, err := unix.Read(w.cq.FD(), w.event[:]); err != nil {
				return 0, err
			}
			w.cq.Ack(1)
		}
		if w.fds[0].Revents != 0 {
			w.cq.Receive()
		}
	}
}

// spin polls for a short time, if that usually finds something.
func (w *waiter) spin(wcs []rdma.WC) (int, error) {
	if !w.spins || !w.spinner.Worth() {
		return 0, nil
	}
	for range spin.Polls {
		if n, err := w.cq.Poll(wcs); n > 0 || err != nil {
			w.spinner.Record(true)
			return n, err
		}
	}
	w.spinner.Record(false)
	return 0, nil
}

// sleep waits for packets or an event, for a short time without the scheduler, like the
// poller.
func (w *waiter) sleep() {
	bound := unix.NsecToTimespec(int64(100 * time.Microsecond))
	n, _, _ := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&w.fds[0])), 2, uintptr(unsafe.Pointer(&bound)), 0, 0, 0)
	if n == 0 {
		_, _ = unix.Poll(w.fds[:], -1) // EINTR: the caller looks again
	}
}

// cpuTime returns the CPU time of the process in user and kernel mode. It is steadier
// than the clock on a machine with other work.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	check(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func report(b *testing.B, cpu time.Duration) {
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "op/s")
	b.ReportMetric(float64((cpuTime(b)-cpu).Nanoseconds())/float64(b.N), "cpu-ns/op")
}

func benchRoCE(b *testing.B, size, depth int, events, spins bool) {
	host, target := open(b, Config{OnDemand: true}), open(b, Config{Addrs: []netip.Addr{targetAddr}})
	const slack = 2
	h, g := joinVia(b, host, targetAddr, target, slack*2*depth+64, (depth+1)*size+1<<16, events)
	data := depth * size // the capsules stand behind the data
	requests, responses := data, data+depth*requestLen
	recvs := make([]rdma.RecvWR, depth)
	for i := range depth {
		g.recv(uint64(i), requests+i*requestLen, requestLen)
		h.recv(uint64(i), responses+i*responseLen, responseLen)
	}
	var stop atomic.Bool
	done := make(chan error, 1)
	base := h.mr.Addr()
	rkey := h.mr.RKey()
	go func() { done <- serveRoCE(b, g, size, depth, spins, base, rkey, &stop) }()

	runtime.LockOSThread() // as a loop of the poller
	defer runtime.UnlockOSThread()
	w := newWaiter(b, h.recvCQ, spins)
	wcs := make([]rdma.WC, depth)
	sends := make([]rdma.SendWR, 0, depth)
	sent, got, unsignaled := 0, 0, 0
	send := func(slot uint64) {
		wr := rdma.SendWR{ID: slot, Op: rdma.Send, NumSGE: 1, SGE: [2]rdma.SGE{h.sge(requests+int(slot)*requestLen, requestLen)}}
		if unsignaled++; unsignaled == max(1, depth/2) && depth > 1 || unsignaled == 8 {
			wr.Signaled, unsignaled = true, 0
		}
		sends = append(sends, wr)
		sent++
	}
	flush := func() {
		if _, err := h.qp.PostSend(sends); err != nil {
			b.Fatal(err)
		}
		sends = sends[:0]
	}
	b.SetBytes(int64(size))
	b.ReportAllocs()
	cpu := cpuTime(b)
	b.ResetTimer()
	for i := range min(depth, b.N) {
		send(uint64(i))
	}
	flush()
	trash := make([]rdma.WC, 64)
	for got < b.N {
		n, err := w.wait(wcs, &stop)
		if err != nil {
			b.Fatal(err)
		}
		for i := range n {
			if wcs[i].Status != rdma.WCSuccess {
				b.Fatal(wcs[i])
			}
			slot := wcs[i].ID
			recvs[i] = rdma.RecvWR{ID: slot, SGE: h.sge(responses+int(slot)*responseLen, responseLen)}
		}
		if _, err := h.qp.PostRecv(recvs[:n]); err != nil {
			b.Fatal(err)
		}
		got += n
		for i := range n {
			if sent < b.N {
				// The slot of the receive says which data has arrived.
				send(binary.LittleEndian.Uint64(h.mr.Bytes()[responses+int(wcs[i].ID)*responseLen:]))
			}
		}
		flush()
		if _, err := h.sendCQ.(*completionQueue).take(trash); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	report(b, cpu)
	stop.Store(true)
	check(b, g.qp.Fail()) // wakes it
	check(b, <-done)
	disturbed(b, host, target)
}

// disturbed reports whether packets were lost or damaged.
func disturbed(b *testing.B, host, target *Provider) {
	c, d := host.Snapshot(), target.Snapshot()
	if c.Timeouts+d.Timeouts+c.BadICRC+d.BadICRC > 0 {
		b.Logf("host %+v\ntarget %+v", c, d)
	}
}

// serveRoCE runs the target.
func serveRoCE(b *testing.B, g *end, size, depth int, spins bool, base uint64, rkey uint32, stop *atomic.Bool) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	w := newWaiter(b, g.recvCQ, spins)
	data := depth * size
	requests, responses := data, data+depth*requestLen
	wcs, trash := make([]rdma.WC, depth), make([]rdma.WC, 64)
	recvs, sends := make([]rdma.RecvWR, depth), make([]rdma.SendWR, 2*depth)
	unsignaled := 0
	for {
		n, err := w.wait(wcs, stop)
		if err != nil || n > 0 && wcs[0].Status != rdma.WCSuccess {
			if errors.Is(err, errStopped) || err == nil && stop.Load() {
				return nil
			}
			return errors.Join(err, errors.New(wcs[0].Status.String()))
		}
		for i := range n {
			slot := wcs[i].ID
			recvs[i] = rdma.RecvWR{ID: slot, SGE: g.sge(requests+int(slot)*requestLen, requestLen)}
			sends[i] = rdma.SendWR{Op: rdma.Write, NumSGE: 1, SGE: [2]rdma.SGE{g.sge(int(slot)*size, size)}, RemoteAddr: base + slot*uint64(size), RKey: rkey}
			binary.LittleEndian.PutUint64(g.mr.Bytes()[responses+int(slot)*responseLen:], slot)
			sends[n+i] = rdma.SendWR{Op: rdma.Send, NumSGE: 1, SGE: [2]rdma.SGE{g.sge(responses+int(slot)*responseLen, responseLen)}}
			if unsignaled++; unsignaled == max(1, depth/2) && depth > 1 || unsignaled == 8 {
				sends[n+i].Signaled, unsignaled = true, 0
			}
		}
		if _, err := g.qp.PostRecv(recvs[:n]); err != nil {
			return err
		}
		if _, err := g.qp.PostSend(sends[:2*n]); err != nil {
			return err
		}
		if _, err := g.sendCQ.(*completionQueue).take(trash); err != nil {
			return err
		}
	}
}

// tcpEnd is an end of a TCP connection. One goroutine uses it.
type tcpEnd interface {
	io.ReadCloser
	writev(net.Buffers) error
}

// goroutineEnd waits in Go's scheduler.
type goroutineEnd struct{ *net.TCPConn }

func newGoroutineEnd(c *net.TCPConn) (tcpEnd, error) { return goroutineEnd{c}, nil }

func (e goroutineEnd) writev(v net.Buffers) error {
	_, err := v.WriteTo(e.TCPConn)
	return err
}

// threadEnd waits in the kernel, with the thread of the goroutine that made it.
type threadEnd int

func newThreadEnd(c *net.TCPConn) (tcpEnd, error) {
	f, err := c.File()
	if err != nil {
		return nil, err
	}
	fd, err := unix.Dup(int(f.Fd())) // Fd makes the connection block
	if err := errors.Join(err, f.Close(), c.Close()); err != nil {
		return nil, err
	}
	runtime.LockOSThread()
	return threadEnd(fd), nil
}

func (e threadEnd) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(e), p)
		switch {
		case errors.Is(err, unix.EINTR):
		case err == nil && n == 0:
			return 0, io.EOF
		default:
			return n, err
		}
	}
}

func (e threadEnd) writev(v net.Buffers) error {
	for len(v) > 0 {
		n, err := unix.Writev(int(e), v)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		for n > 0 {
			k := min(n, len(v[0]))
			n -= k
			if v[0] = v[0][k:]; len(v[0]) == 0 {
				v = v[1:]
			}
		}
	}
	return nil
}

func (e threadEnd) Close() error {
	runtime.UnlockOSThread()
	return unix.Close(int(e))
}

func benchTCP(b *testing.B, size, depth int, newEnd func(*net.TCPConn) (tcpEnd, error)) {
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(targetAddr, 0)))
	check(b, err)
	done := make(chan error, 1)
	go func() {
		c, err := l.AcceptTCP()
		if err == nil {
			err = serveTCP(c, size, depth, newEnd)
		}
		done <- err
	}()
	conn, err := net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	check(b, err)
	c, err := newEnd(conn)
	check(b, err)
	request := make([]byte, depth*requestLen)
	in := make([]byte, depth*(size+responseLen))
	out := make(net.Buffers, 1)
	send := func(n int) error {
		out[0] = request[:n*requestLen]
		return c.writev(out)
	}
	b.SetBytes(int64(size))
	b.ReportAllocs()
	cpu := cpuTime(b)
	b.ResetTimer()
	sent, bytes := min(depth, b.N), 0
	if err := send(sent); err != nil {
		b.Fatal(err)
	}
	for got := 0; got < b.N; {
		n, err := c.Read(in)
		if err != nil {
			b.Fatal(err)
		}
		bytes += n
		k := bytes / (size + responseLen)
		bytes -= k * (size + responseLen)
		got += k
		if k = min(k, b.N-sent); k > 0 {
			sent += k
			if err := send(k); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.StopTimer()
	report(b, cpu)
	check(b, errors.Join(c.Close(), <-done, l.Close()))
}

// serveTCP runs the target until the peer closes.
func serveTCP(conn *net.TCPConn, size, depth int, newEnd func(*net.TCPConn) (tcpEnd, error)) error {
	c, err := newEnd(conn)
	if err != nil {
		return err
	}
	defer c.Close() // the peer closed first
	in, out := make([]byte, depth*requestLen), make([]byte, size+responseLen)
	answers := make(net.Buffers, 0, depth)
	have := 0
	for {
		n, err := c.Read(in[have:])
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return err
		}
		have += n
		v := answers[:0]
		for ; have >= requestLen; have -= requestLen {
			v = append(v, out)
		}
		if err := c.writev(v); err != nil {
			return err
		}
	}
}
