package roce

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ublk-nvmeof/rdma"
)

// TestCloseUnderLoad closes providers while all their objects are in use. Each call works
// or returns an error, and nothing hangs.
func TestCloseUnderLoad(t *testing.T) {
	for round := range 12 {
		target := open(t, Config{Addrs: []netip.Addr{targetAddr}, Receivers: 1 + round%3})
		host := open(t, Config{OnDemand: true})
		a, b := joinVia(t, host, []netip.Addr{targetAddr, hostAddr}[round%2], target, 16, 1<<16, true)
		l, err := target.Listen(netip.AddrPortFrom(targetAddr, 0), 4)
		check(t, err)
		var running sync.WaitGroup
		var stop atomic.Bool
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		loop := func(f func()) {
			running.Go(func() {
				for !stop.Load() {
					f()
				}
			})
		}
		for _, e := range []*end{a, b} {
			other := b
			if e == b {
				other = a
			}
			loop(func() {
				_, _ = e.qp.PostSend([]rdma.SendWR{e.wr(1, rdma.Write, 0, 4096, other, 0), e.wr(2, rdma.Read, 0, 8192, other, 0)})
			})
			loop(func() { _, _ = e.sendCQ.Poll(make([]rdma.WC, 16)) })
			r := e.recvCQ.(rdma.Receiver)
			loop(func() {
				_ = r.PacketFD()
				r.Receiving(true)
				r.Receive()
				_ = r.Arm()
				_, _ = r.Poll(make([]rdma.WC, 16))
				r.Receiving(false)
			})
		}
		loop(func() {
			id, err := host.Resolve(ctx, netip.Addr{}, l.Addr(), -1)
			if err != nil {
				return
			}
			short, cancel := context.WithTimeout(ctx, time.Millisecond)
			_, _ = id.Connect(short, param)
			cancel()
			_ = id.Close()
		})
		loop(func() {
			short, cancel := context.WithTimeout(ctx, time.Millisecond)
			defer cancel()
			if id, err := l.Accept(short); err == nil {
				_ = id.Close()
			}
		})
		time.Sleep(10 * time.Millisecond)
		first, second := host, target
		if round%2 == 0 {
			first, second = target, host
		}
		check(t, first.Close())
		time.Sleep(time.Millisecond)
		check(t, second.Close())
		time.Sleep(time.Millisecond)
		stop.Store(true)
		running.Wait()
		cancel()
		check(t, l.Close())
	}
}
