package roce

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// joinOneHost connects a host with its own ports to a target on the same machine.
func joinOneHost(t *testing.T, depth, memory int, cfg Config) (a, b *end) {
	t.Helper()
	here, there := cfg, cfg
	here.OnDemand, there.Addrs = true, []netip.Addr{targetAddr}
	host, target := open(t, here), open(t, there)
	return joinVia(t, host, targetAddr, target, depth, memory, false)
}

func mtuOf(e *end) int {
	q := e.queuePair()
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.mtu
}

// TestOneHostMTU checks that two ends on one host use large packets if both have their
// own ports.
func TestOneHostMTU(t *testing.T) {
	t.Run("own ports", func(t *testing.T) {
		a, b := joinOneHost(t, 16, 1<<16, Config{})
		if mtuOf(a) != wire.HostMTU || mtuOf(b) != wire.HostMTU {
			t.Errorf("%d and %d", mtuOf(a), mtuOf(b))
		}
	})
	t.Run("shared port", func(t *testing.T) {
		host, target := openPair(t)
		a, b := join(t, host, target, 16, 1<<16, false)
		if mtuOf(a) != 4096 || mtuOf(b) != 4096 {
			t.Errorf("%d and %d", mtuOf(a), mtuOf(b))
		}
	})
}

// TestOneHostMTUStranger checks that the large MTU is refused to a peer that does not use
// this package.
func TestOneHostMTUStranger(t *testing.T) {
	host, target := openPair(t)
	host.guid = 1
	l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 1)
	check(t, err)
	id, err := host.Resolve(t.Context(), hostAddr, l.Addr(), -1)
	check(t, err)
	id.(*connID).mtu = wire.HostMTU
	e := newEnd(t, id, 16, 4096, false)
	done := make(chan error, 1)
	go func() {
		_, err := e.id.Connect(t.Context(), param)
		done <- err
	}()
	request, err := l.Accept(t.Context())
	check(t, err)
	g := newEnd(t, request, 16, 4096, false)
	if err := g.id.Accept(t.Context(), param); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("accept: %v", err)
	}
	var reject *rdma.RejectError
	if err := <-done; !errors.As(err, &reject) || reject.Reason != rejectInvalidPathMTU {
		t.Errorf("connect: %v", err)
	}
	check(t, l.Close())
}

// TestOneHost moves messages of many lengths, also over a lossy link.
func TestOneHost(t *testing.T) {
	for _, loss := range []float64{0, 0.05} {
		t.Run(fmt.Sprintf("loss %v", loss), func(t *testing.T) {
			const size, n = 1 << 20, 4
			tamper := through(func(seed uint64) *link { return newLink(seed, loss, loss/5, loss/5, 0) })
			a, b := joinOneHost(t, 64, 2*n*size, Config{tamper: tamper})
			out, back := a.mr.Bytes()[:n*size], a.mr.Bytes()[n*size:]
			for _, length := range []int{1, wire.HostMTU - 1, wire.HostMTU, wire.HostMTU + 1, 2 * wire.HostMTU, 128 << 10, size - 5, size} {
				for i := range out {
					out[i] = byte(i*7 + i>>9 + length)
				}
				clear(back)
				for i := range n {
					b.recv(uint64(i), n*size+i*size, size)
				}
				for i := range n {
					w := a.wr(0, rdma.Write, i*size, length, b, i*size)
					w.Signaled = false
					a.post(w, a.wr(uint64(10+i), rdma.Send, i*size, length, b, 0), a.wr(uint64(20+i), rdma.Read, (n+i)*size, length, b, i*size))
				}
				for i := range n {
					b.ok(b.recvCQ, uint64(i))
					a.ok(a.sendCQ, uint64(10+i))
					a.ok(a.sendCQ, uint64(20+i))
				}
				for i := range n {
					want := out[i*size:][:length]
					if !bytes.Equal(want, b.mr.Bytes()[i*size:][:length]) || !bytes.Equal(want, b.mr.Bytes()[(n+i)*size:][:length]) ||
						!bytes.Equal(want, back[i*size:][:length]) {
						t.Fatalf("%d bytes: they differ", length)
					}
				}
			}
		})
	}
}

// TestOneHostFlight checks that as much data is in flight as with small packets, and that
// acknowledgements of many small messages are not requested more often.
func TestOneHostFlight(t *testing.T) {
	const size = 8 << 20
	a, b := joinOneHost(t, 64, size, Config{})
	q := a.queuePair()
	flight := func() uint64 {
		q.mu.Lock()
		defer q.mu.Unlock()
		return q.carried(q.entry(q.cur), q.nxt) - q.carried(q.entry(q.head), q.una)
	}
	for i, op := range []rdma.SendOp{rdma.Write, rdma.Read} {
		b.queuePair().endpoint.recvMu.Lock() // nothing is answered
		a.post(a.wr(uint64(i), op, 0, size, b, 0))
		n := flight()
		b.queuePair().endpoint.recvMu.Unlock()
		if n < q.flight/2 || n > q.flight+wire.HostMTU {
			t.Errorf("%v: %d bytes are under way, want about %d", op, n, q.flight)
		}
		a.ok(a.sendCQ, uint64(i))
	}
	b.queuePair().endpoint.recvMu.Lock()
	for i := range askEvery {
		b.recv(uint64(i), i*64, 64)
		wr := a.wr(0, rdma.Send, 0, 64, b, 0)
		wr.Signaled = false
		a.post(wr)
		q.mu.Lock()
		if asked := q.asked == q.nxt; asked != (i == askEvery-1) {
			t.Errorf("after %d messages an acknowledgement was asked for: %v", i+1, asked)
		}
		q.mu.Unlock()
	}
	b.queuePair().endpoint.recvMu.Unlock()
	for i := range askEvery {
		b.ok(b.recvCQ, uint64(i))
	}
}

// TestOneHostBuffer checks that the data in flight does not exceed the sockets' buffers,
// which are small without privilege: nothing is lost, and nothing waits for a timer.
func TestOneHostBuffer(t *testing.T) {
	const size, buffer = 8 << 20, 212992 // net.core.rmem_max, where nobody changed it
	a, b := joinOneHost(t, 64, 2*size, Config{buffer: buffer})
	for i, op := range []rdma.SendOp{rdma.Write, rdma.Read} {
		receiver := []*end{b, a}[i].queuePair().endpoint
		sent := b.queuePair().provider.Snapshot().PacketsSent
		receiver.recvMu.Lock() // packets wait in its socket
		a.post(a.wr(uint64(i), op, 0, size, b, 0))
		q := a.queuePair()
		q.mu.Lock()
		full := q.carried(q.entry(q.cur), q.nxt)-q.carried(q.entry(q.head), q.una) >= buffer
		q.mu.Unlock()
		if op == rdma.Read { // as much was asked for; now it comes
			until(t, b.queuePair().provider, "responses", func(c Counters) bool { return c.PacketsSent >= sent+buffer/wire.HostMTU })
		}
		receiver.recvMu.Unlock()
		if !full {
			t.Errorf("%v: less is under way than there is room for", op)
		}
		a.ok(a.sendCQ, uint64(i))
	}
	for _, e := range []*end{a, b} {
		if c := e.queuePair().provider.Snapshot(); c.OutOfSequence+c.Retransmits+c.Timeouts != 0 {
			t.Errorf("%+v", c)
		}
	}
}
