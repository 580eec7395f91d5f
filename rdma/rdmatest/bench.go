package rdmatest

import (
	"fmt"
	"testing"

	"ublk-nvmeof/rdma"
)

// Benchmark measures the cost of a message: posting and polling, without sleep.
func Benchmark(b *testing.B, s Setup) {
	active, passive := connection(b, s, config{depth: 128})
	b.Run("PollEmpty", func(b *testing.B) {
		wcs := make([]rdma.WC, 32)
		b.ReportAllocs()
		for b.Loop() {
			if n, err := active.recvCQ.Poll(wcs); n != 0 || err != nil {
				b.Fatal(n, err)
			}
		}
	})
	for _, batch := range []int{1, 32} {
		b.Run(fmt.Sprintf("Send/%d", batch), func(b *testing.B) { benchmarkSend(b, active, passive, batch) })
	}
}

// benchmarkSend sends batch times 64 bytes per iteration, with one call for the receives
// and one for the sends. Only the last SEND is signaled.
func benchmarkSend(b *testing.B, a, p *side, batch int) {
	recvs, sends := make([]rdma.RecvWR, batch), make([]rdma.SendWR, batch)
	for i := range batch {
		recvs[i] = rdma.RecvWR{ID: 1, SGE: p.sge(i*64, 64)}
		sends[i] = a.sendWR(2, i*64, 64)
		sends[i].Signaled = i == batch-1
	}
	wcs := make([]rdma.WC, batch)
	drain := func(cq rdma.CQ, n int) {
		for n > 0 {
			k, err := cq.Poll(wcs[:n])
			if err != nil || k > 0 && wcs[0].Status != rdma.WCSuccess {
				b.Fatal(err, wcs[0])
			}
			n -= k
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.qp.PostRecv(recvs); err != nil {
			b.Fatal(err)
		}
		if _, err := a.qp.PostSend(sends); err != nil {
			b.Fatal(err)
		}
		drain(a.sendCQ, 1)
		drain(p.recvCQ, batch)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/message")
}
