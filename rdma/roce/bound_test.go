package roce

import (
	"net/netip"
	"testing"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// TestReceiveBound checks that a flood of packets does not hold up a caller with other
// work. The endpoint takes the packets that the caller leaves.
func TestReceiveBound(t *testing.T) {
	_, b := joinOneHost(t, 16, 1<<16, Config{})
	p := b.queuePair().provider
	x := newIntruder(t, targetAddr, targetAddr).at(b)
	r := b.recvCQ.(rdma.Receiver)
	r.Receiving(true)
	defer r.Receiving(false)
	const flood, most = 1000, mostBatches * recvMessages
	packet := request(wire.WriteOnly, b.qp.Num(), 0, wire.RETH{}, nil)
	// The endpoint also looks once per second, and may be first.
	for try := uint64(1); ; try++ {
		taken := p.Snapshot().WrongAddress
		b.queuePair().endpoint.recvMu.Lock()
		for range flood {
			x.send(packet)
		}
		b.queuePair().endpoint.recvMu.Unlock()
		r.Receive()
		taken = p.Snapshot().WrongAddress - taken
		until(t, p, "the rest", func(c Counters) bool { return c.WrongAddress == try*flood })
		if taken <= most {
			return
		}
		if try == 20 {
			t.Fatalf("%d packets were taken at once, want %d", taken, most)
		}
	}
}

// TestStrayRead checks that a READ that arrives at another endpoint than that of its
// queue pair is answered, without holding up that endpoint.
func TestStrayRead(t *testing.T) {
	const size = 32 << 20
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}})
	host.guid = 1 // or the queue pair would have an endpoint of its own
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}, Receivers: 2})
	_, b := join(t, host, target, 16, size, false)
	q := b.queuePair()
	other := target.endpoints[0]
	if other == q.endpoint {
		other = target.endpoints[1]
	}
	x := newIntruder(t, hostAddr, targetAddr)
	x.from = netip.AddrPortFrom(hostAddr, testPort) // as if it were the peer's
	packet := x.seal(request(wire.ReadRequest, q.num, b.expected(), wire.RETH{VA: b.mr.Addr(), RKey: b.mr.RKey(), Length: size}, nil))
	sent := target.Snapshot().PacketsSent
	a := arrival{src: x.from, dst: x.to, data: packet, segment: len(packet)}
	other.packet(&a, packet, 0)
	const want = size / 4096
	if n := target.Snapshot().PacketsSent - sent; n >= want {
		t.Errorf("%d responses were sent at once", n)
	}
	until(t, target, "responses", func(c Counters) bool { return c.PacketsSent-sent == want })
	if c := target.Snapshot(); c.Strays != 1 {
		t.Errorf("%+v", c)
	}
}
