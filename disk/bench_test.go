package disk

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
	tgt, err := target.New(target.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tgt.Close() })
	if _, err := tgt.AddPorts(target.PortConfig{Provider: fabric.Provider(targetAddr), Addr: netip.AddrPortFrom(targetAddr, 4420)}); err != nil {
		t.Fatal(err)
	}
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

// run makes the driver execute n requests, and returns how long they took.
func (d *driver) run(b *testing.B, l *poller.Loop, n int) time.Duration {
	ended, began := make(chan struct{}), time.Now()
	if err := l.Call(func() {
		d.left, d.ended = n, ended
		for tag := range d.depth {
			d.request(uint16(tag))
		}
		d.queue.Submit(d.batch)
		d.batch = d.batch[:0]
	}); err != nil {
		b.Fatal(err)
	}
	<-ended
	return time.Since(began)
}

// read makes callers execute n calls of ReadAt, and returns how long they took.
func read(b *testing.B, d *Disk, callers, n int) time.Duration {
	began := time.Now()
	var running sync.WaitGroup
	for g := range callers {
		running.Go(func() {
			rng, p := rand.New(rand.NewPCG(1, uint64(g))), make([]byte, 4096)
			for range max(1, n/callers) {
				if _, err := d.ReadAt(p, rng.Int64N(8192)*4096); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	running.Wait()
	return time.Since(began)
}

// batch makes one goroutine read with a Batch of depth buffers, and returns how long n requests took.
func batch(b *testing.B, d *Disk, depth, n int) time.Duration {
	rng, done := rand.New(rand.NewPCG(1, 2)), make([]Completion, depth)
	set, err := d.NewBatch(depth)
	if err != nil {
		b.Fatal(err)
	}
	next := make([]Request, 0, depth)
	add := func(buffer int) {
		next = append(next, Request{Buffer: buffer, Op: block.OpRead, Offset: rng.Int64N(8192) * 4096, Length: 4096})
	}
	for i := range depth {
		add(i)
	}
	began := time.Now()
	for n > 0 {
		if err := set.Submit(next...); err != nil {
			b.Fatal(err)
		}
		next = next[:0]
		got, err := set.Wait(context.Background(), done)
		if err != nil {
			b.Fatal(err)
		}
		for _, c := range done[:got] {
			add(c.Buffer)
		}
		n -= got
	}
	took := time.Since(began)
	if err := set.Close(); err != nil {
		b.Fatal(err)
	}
	return took
}

// benchmark compares callers of ReadAt, or a Batch, with a loop that is driven by hand, at the same depth,
// over the same connection, in turns. It reports the median of the quotients of the times, with the
// least and the greatest, and the quotient of the CPU times. What else the machine does matters: the
// driver sleeps once for all requests of a batch. On an idle machine this costs more than everything
// else, also for callers, and if other programs keep the CPUs awake, almost nothing.
func benchmark(b *testing.B, depth int, calls func(b *testing.B, d *Disk, depth, n int) time.Duration) {
	const turn = 2000
	// One for the loop, two as for every program with a loop, and one for the target.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0))))
	ns, loops := newNamespace(b, 64<<20)
	by := &driver{depth: depth, rng: rand.New(rand.NewPCG(1, 2))}
	if err := loops[0].Call(func() {
		var err error
		if by.queue, err = ns.OpenQueue(0, block.QueueConfig{Depth: 64, MaxIO: 4096}); err != nil {
			b.Error(err)
			return
		}
		loops[0].Attach(by)
	}); err != nil || b.Failed() {
		b.Fatal(err)
	}
	d, err := New(DeviceConfig{Device: ns, Depth: 64, MaxIO: 4096})
	if err != nil {
		b.Fatal(err)
	}
	var quotients, hand, others []float64
	var handCPU, callsCPU time.Duration
	for b.Loop() {
		began := cpuTime()
		one := by.run(b, loops[0], turn)
		between := cpuTime()
		other := calls(b, d, depth, turn)
		handCPU, callsCPU = handCPU+between-began, callsCPU+cpuTime()-between
		quotients = append(quotients, other.Seconds()/one.Seconds())
		hand, others = append(hand, one.Seconds()*1e9/turn), append(others, other.Seconds()*1e9/turn)
	}
	median := func(x []float64) float64 {
		slices.Sort(x)
		return x[len(x)/2]
	}
	b.ReportMetric(median(quotients), "calls/hand")
	b.ReportMetric(slices.Min(quotients), "calls/hand-min")
	b.ReportMetric(slices.Max(quotients), "calls/hand-max")
	b.ReportMetric(callsCPU.Seconds()/handCPU.Seconds(), "cpu-calls/hand")
	b.ReportMetric(median(hand), "ns/hand")
	b.ReportMetric(median(others), "ns/call")
	b.ReportMetric(0, "ns/op")
	if err := d.Close(); err != nil {
		b.Error(err)
	}
	_ = loops[0].Call(func() {
		loops[0].Detach(by)
		if err := by.queue.Close(); err != nil {
			b.Error(err)
		}
	})
}

// cpuTime returns the CPU time of this process.
func cpuTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u) // cannot fail
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkCalls1 is for one caller, and BenchmarkCalls32 for 32.
func BenchmarkCalls1(b *testing.B)  { benchmark(b, 1, read) }
func BenchmarkCalls32(b *testing.B) { benchmark(b, 32, read) }

// BenchmarkBatch32 is for a Batch of 32.
func BenchmarkBatch32(b *testing.B) { benchmark(b, 32, batch) }
