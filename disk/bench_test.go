package disk

import (
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"

	"ublk-nvmeof/block"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/target"
)

var (
	targetAddr = netip.MustParseAddr("192.0.2.1")
	hostAddr   = netip.MustParseAddr("192.0.2.2")
)

const testNQN = "nqn.2026-01.org.example:disk"

// newNamespace connects to a target over a fabric in this process, with one loop.
func newNamespace(t testing.TB, size int64) (*initiator.Namespace, []*poller.Loop) {
	t.Helper()
	fabric := rdmatest.NewFabric()
	tgt, err := target.New(target.Config{Provider: fabric.Provider(targetAddr), AddrPort: netip.AddrPortFrom(targetAddr, 4420)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tgt.Close() })
	s, err := tgt.AddSubsystem(target.SubsystemConfig{NQN: testNQN, AllowAny: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.AddNamespace(target.NamespaceConfig{Store: target.NewRAM(size)}); err != nil {
		t.Fatal(err)
	}
	l, err := poller.New(poller.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Stop() })
	loops := []*poller.Loop{l}
	sub, err := initiator.Connect(t.Context(), initiator.Config{
		Path:   initiator.Path{Provider: fabric.Provider(hostAddr), Address: netip.AddrPortFrom(targetAddr, 4420)},
		SubNQN: testNQN, HostNQN: nvme.UUIDNQN(nvme.NewUUID()), HostID: nvme.NewUUID(),
		Queues: poller.Request{IO: 1}, Loops: loops,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sub.Close(t.Context()) })
	return sub.Namespaces()[0], loops
}

// driver is a loop that is driven by hand: it keeps depth requests in flight.
type driver struct {
	queue block.Queue
	left  int
	depth int
	fly   int
	batch []block.Request
	done  [64]block.Result
	ended chan struct{}
	rng   *rand.Rand
}

func (d *driver) request(tag uint16) {
	if d.left > 0 {
		d.left--
		d.fly++
		d.batch = append(d.batch, block.Request{Op: block.OpRead, Tag: tag, Sector: d.rng.Uint64N(8192) * 8, Sectors: 8})
	}
}

func (d *driver) Poll() int {
	n := d.queue.Reap(d.done[:])
	d.fly -= n
	for _, r := range d.done[:n] {
		d.request(r.Tag)
	}
	if len(d.batch) > 0 {
		d.queue.Submit(d.batch)
		d.batch = d.batch[:0]
	}
	if d.fly == 0 && d.ended != nil {
		close(d.ended)
		d.ended = nil
	}
	return n
}

func (d *driver) Arm() poller.Readiness { return poller.Sleep }

func benchBare(b *testing.B, depth int) {
	ns, loops := newNamespace(b, 64<<20)
	d := &driver{depth: depth, rng: rand.New(rand.NewPCG(1, 2))}
	loops[0].Call(func() {
		var err error
		if d.queue, err = ns.OpenQueue(0, block.QueueConfig{Depth: 64, MaxIO: 4096}); err != nil {
			b.Error(err)
			return
		}
		loops[0].Attach(d)
	})
	b.ResetTimer()
	ended := make(chan struct{})
	loops[0].Call(func() {
		d.left, d.ended = b.N, ended
		for tag := range depth {
			d.request(uint16(tag))
		}
		d.queue.Submit(d.batch)
		d.batch = d.batch[:0]
	})
	<-ended
	b.StopTimer()
	loops[0].Call(func() { loops[0].Detach(d); d.queue.Close() })
}

func benchDisk(b *testing.B, goroutines int) {
	ns, loops := newNamespace(b, 64<<20)
	d, err := New(DeviceConfig{Device: ns, Loops: loops, Depth: 64, MaxIO: 4096})
	if err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	var running sync.WaitGroup
	for g := range goroutines {
		n := b.N / goroutines
		if g < b.N%goroutines {
			n++
		}
		running.Go(func() {
			rng, p := rand.New(rand.NewPCG(1, uint64(g))), make([]byte, 4096)
			for range n {
				if _, err := d.ReadAt(p, rng.Int64N(8192)*4096); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	running.Wait()
	b.StopTimer()
	d.freeQueues()
}

func BenchmarkQD1(b *testing.B) {
	b.Run("bare", func(b *testing.B) { benchBare(b, 1) })
	b.Run("disk", func(b *testing.B) { benchDisk(b, 1) })
}

func BenchmarkQD32(b *testing.B) {
	b.Run("bare", func(b *testing.B) { benchBare(b, 32) })
	b.Run("disk", func(b *testing.B) { benchDisk(b, 32) })
}
