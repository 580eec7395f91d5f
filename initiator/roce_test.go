package initiator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce"
	"ublk-nvmeof/target"
)

// wire is a target of package target over a real network: RoCEv2 on the loopback
// interface, on its own address.
type wire struct {
	host   *roce.Provider
	target *target.Target
	sub    *target.Subsystem
	ns     *target.Namespace
}

var wires atomic.Uint32

// wireAddr returns an address that no other user has, in this process or in one that
// tests at the same time.
func wireAddr() netip.Addr {
	pid := os.Getpid()
	return netip.AddrFrom4([4]byte{127, byte(1 + pid>>8&0x7f), byte(pid), byte(1 + wires.Add(1)%250)})
}

// newWire starts a target with one namespace. Everything is closed at the end of the
// test, after the hosts.
func newWire(t testing.TB, cfg target.Config, ns target.NamespaceConfig) *wire {
	t.Helper()
	w := &wire{}
	addr := wireAddr()
	p, err := roce.New(roce.Config{Addrs: []netip.Addr{addr}})
	if err != nil {
		t.Fatal(err)
	}
	if w.target, err = target.New(cfg); err != nil {
		t.Fatal(err)
	}
	if w.host, err = roce.New(roce.Config{OnDemand: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(w.target.Close(), w.host.Close(), p.Close()); err != nil {
			t.Error(err)
		}
	})
	if w.sub, err = w.target.AddSubsystem(target.SubsystemConfig{NQN: fakeNQN, AllowAny: true}); err != nil {
		t.Fatal(err)
	}
	if ns.Store == nil {
		ns.Store = target.NewRAM(16 << 20)
	}
	if w.ns, err = w.sub.AddNamespace(ns); err != nil {
		t.Fatal(err)
	}
	if _, err := w.target.AddPorts(target.PortConfig{Provider: p, Addr: netip.AddrPortFrom(addr, 4420)}); err != nil {
		t.Fatal(err)
	}
	return w
}

// config is testConfig for the wire.
func (w *wire) config(loops []*poller.Loop, q poller.Request) Config {
	cfg := testConfig(nil, loops, q)
	cfg.Provider, cfg.Address = w.host, w.target.Ports()[0].Addr()
	cfg.ReconnectDelay = 10 * time.Millisecond
	return cfg
}

// reader keeps reads of one size in flight.
type reader struct {
	queue   block.Queue
	sectors uint32
	ready   []uint16
	batch   []block.Request
	results []block.Result
	left    int
	flying  int
	failed  bool
	done    chan struct{}
}

func (r *reader) Poll() int {
	n := r.queue.Reap(r.results)
	for _, res := range r.results[:n] {
		r.failed = r.failed || res.Errno != 0
		r.ready = append(r.ready, res.Tag)
	}
	r.flying -= n
	r.batch = r.batch[:0]
	for r.left > 0 && len(r.ready) > 0 {
		tag := r.ready[len(r.ready)-1]
		r.ready = r.ready[:len(r.ready)-1]
		r.batch = append(r.batch, block.Request{Tag: tag, Op: block.OpRead, Sector: uint64(tag) * uint64(r.sectors), Sectors: r.sectors})
		r.left--
		r.flying++
	}
	if len(r.batch) > 0 {
		r.queue.Submit(r.batch)
	}
	if r.left == 0 && r.flying == 0 && n > 0 {
		r.done <- struct{}{}
	}
	return n + len(r.batch)
}

func (r *reader) Arm() poller.Readiness { return poller.Sleep }

// BenchmarkRoCE reads from a target in the same process. With two loops, there are as
// many loops as GOMAXPROCS on a small machine.
func BenchmarkRoCE(b *testing.B) {
	for _, s := range []struct {
		name               string
		size, depth, loops int
	}{
		{"4KiB-QD1", 4 << 10, 1, 1}, {"4KiB-QD32", 4 << 10, 32, 1}, {"128KiB-QD8", 128 << 10, 8, 1}, {"4KiB-QD1-2loops", 4 << 10, 1, 2},
	} {
		b.Run(s.name, func(b *testing.B) {
			w := newWire(b, target.Config{}, target.NamespaceConfig{})
			loops := newLoops(b, s.loops)
			c := connect(b, w.config(loops, poller.Request{IO: s.loops}))
			var readers []*reader
			for i, l := range loops {
				q, err := c.Namespaces()[0].OpenQueue(i, block.QueueConfig{Depth: s.depth, MaxIO: s.size})
				if err != nil {
					b.Fatal(err)
				}
				r := &reader{
					queue: q, sectors: uint32(s.size / 512), batch: make([]block.Request, 0, s.depth), results: make([]block.Result, s.depth),
					done: make(chan struct{}, 1),
				}
				for tag := range s.depth {
					r.ready = append(r.ready, uint16(tag))
				}
				readers = append(readers, r)
				if err := l.Call(func() { l.Attach(r) }); err != nil {
					b.Fatal(err)
				}
			}
			b.SetBytes(int64(s.size * s.loops))
			b.ReportAllocs()
			cpu := cpuTime(b)
			b.ResetTimer()
			for i, l := range loops {
				if err := l.Call(func() { readers[i].left = b.N }); err != nil {
					b.Fatal(err)
				}
			}
			for _, r := range readers {
				<-r.done
			}
			b.StopTimer()
			b.ReportMetric(float64(cpuTime(b)-cpu)/float64(b.N*s.loops), "cpu-ns/op")
			for i, l := range loops {
				if err := l.Call(func() { l.Detach(readers[i]) }); err != nil || readers[i].failed {
					b.Fatal(err, "or a read failed")
				}
				if err := readers[i].queue.Close(); err != nil {
					b.Fatal(err)
				}
			}
			closeSubsystem(b, c)
		})
	}
}

// cpuTime returns the CPU time of the process. It is steadier than the clock on a machine
// with other work.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestRoCESplits runs verified I/O over every grant of every request.
func TestRoCESplits(t *testing.T) {
	for _, q := range []poller.Request{{IO: 2}, {IO: 2, Write: 2}, {IO: 2, Poll: 1}, {IO: 1, Write: 1, Poll: 1}} {
		q = q.Clip(runtime.NumCPU())
		for grant := 1; grant <= q.Total()+1; grant++ {
			t.Run(fmt.Sprintf("%d-%d-%d granted %d", q.IO, q.Write, q.Poll, grant), func(t *testing.T) {
				w := newWire(t, target.Config{}, target.NamespaceConfig{})
				if err := w.sub.SetMaxQueues(grant); err != nil {
					t.Fatal(err)
				}
				loops := newLoops(t, q.Loops())
				c := connect(t, w.config(loops, q))
				if got := c.Info().Paths[0].Plan; got != poller.Split(q, min(grant, q.Total())) {
					t.Errorf("plan %v", got)
				}
				f := newFrontEnd(t, c.Namespaces()[0], loops, 16, 64<<10, 1)
				f.run(200)
				f.close()
				if i := c.Info().Paths[0]; i.Losses != 0 {
					t.Errorf("lost %d times: %v", i.Losses, i.Reason)
				}
				closeSubsystem(t, c)
			})
		}
	}
}

// TestRoCEShapes runs verified I/O on targets with other properties.
func TestRoCEShapes(t *testing.T) {
	for name, c := range map[string]struct {
		cfg    target.Config
		ns     target.NamespaceConfig
		noFlow bool
	}{
		"no in-capsule data":                {cfg: target.Config{InCapsule: -1}},
		"large capsules, small transfers":   {cfg: target.Config{InCapsule: 16384, MaxTransfer: 16384, QueueSize: 16}},
		"4 KiB blocks, no SQ flow control":  {ns: target.NamespaceConfig{BlockSize: 4096}, noFlow: true},
		"the largest transfers, many slots": {cfg: target.Config{QueueSize: 1024}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWire(t, c.cfg, c.ns)
			loops := newLoops(t, 1)
			cfg := w.config(loops, poller.Request{IO: 1})
			cfg.DisableSQFlow = c.noFlow
			ctl := connect(t, cfg)
			ns := ctl.Namespaces()[0]
			f := newFrontEnd(t, ns, loops, 64, min(512<<10, int(ns.Geometry().MaxIO)), 2)
			f.run(300)
			f.close()
			closeSubsystem(t, ctl)
		})
	}
}

// TestRoCERegrant drops the connection while I/O is in flight, and changes the grant each
// time, also to no queues. No request fails.
func TestRoCERegrant(t *testing.T) {
	q := poller.Request{IO: 2, Write: 1, Poll: 1}.Clip(runtime.NumCPU())
	w := newWire(t, target.Config{}, target.NamespaceConfig{})
	loops := newLoops(t, q.Loops())
	c := connect(t, w.config(loops, q))
	f := newFrontEnd(t, c.Namespaces()[0], loops, 16, 64<<10, 6)
	f.start(3000)
	for _, grant := range []int{1, 3, -1, 2, nvme.MaxQueues} {
		w.target.Faults().Grant(grant)
		w.sub.DropControllers()
		if grant < 0 {
			waitFor(t, "a refused attempt", func() bool { return c.Info().Paths[0].Attempts >= 2 })
			continue
		}
		waitFor(t, "the next association", func() bool {
			i := c.Info().Paths[0]
			return i.State == StateLive && i.Plan == poller.Split(q, min(grant, q.Total()))
		})
	}
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
	closeSubsystem(t, c)
}

// TestRoCEMisbehaviour checks that the controller names the fault and reconnects,
// whatever the target does to a completion or a command, and that no byte is wrong.
func TestRoCEMisbehaviour(t *testing.T) {
	for name, c := range map[string]struct {
		fault target.Fault
		want  string
	}{
		"wrong command id": {target.Fault{Corrupt: target.CorruptID}, "not outstanding"},
		"duplicate":        {target.Fault{Corrupt: target.CorruptDuplicate}, "not outstanding"},
		"short":            {target.Fault{Corrupt: target.CorruptShort}, "response of 8 bytes"},
		"wrong SQ head":    {target.Fault{Corrupt: target.CorruptSQHead}, "submission queue head"},
		"wrong key":        {target.Fault{Corrupt: target.CorruptKey}, "queue 1"},
		"no answer":        {target.Fault{Drop: true}, "not answered within"},
		"disconnect":       {target.Fault{Disconnect: true}, "queue 1"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWire(t, target.Config{}, target.NamespaceConfig{})
			loops := newLoops(t, 1)
			ctl := connect(t, w.config(loops, poller.Request{IO: 1}))
			c.fault.Skip, c.fault.Count = 20, 1
			w.target.Faults().Add(c.fault)
			f := newFrontEnd(t, ctl.Namespaces()[0], loops, 8, 64<<10, 9)
			f.run(200)
			// Requests end before the last lane has its queues.
			waitFor(t, "the next association", func() bool { return ctl.Info().State == StateLive })
			i := ctl.Info().Paths[0]
			if i.Losses != 1 || i.Reason == nil || !strings.Contains(i.Reason.Error(), c.want) {
				t.Errorf("%d losses, reason %v, want %q", i.Losses, i.Reason, c.want)
			}
			f.close()
			closeSubsystem(t, ctl)
		})
	}
}

// TestRoCEStatus checks that failed commands are retried, unless the target forbids it.
func TestRoCEStatus(t *testing.T) {
	w := newWire(t, target.Config{}, target.NamespaceConfig{})
	loops := newLoops(t, 1)
	c := connect(t, w.config(loops, poller.Request{IO: 1}))
	ns, faults := c.Namespaces()[0], w.target.Faults()
	read := block.Request{Op: block.OpRead, Sectors: 8}
	for _, tt := range []struct {
		status nvme.Status
		count  int
		errno  uint16
	}{
		{nvme.StatusInternal, 2, 0},
		{nvme.StatusInternal, 0, uint16(unix.EIO)},
		{nvme.StatusInternal | nvme.StatusDNR, 1, uint16(unix.EIO)},
		{nvme.StatusUnrecoveredRead | nvme.StatusDNR, 1, uint16(unix.ENODATA)},
	} {
		added := faults.Add(target.Fault{Status: tt.status, Count: tt.count})
		if got := single(t, loops[0], ns, read); got != tt.errno {
			t.Errorf("%v, %d times: errno %d, want %d", tt.status, tt.count, got, tt.errno)
		}
		added.Remove()
	}
	if i := c.Info().Paths[0]; i.Losses != 0 {
		t.Errorf("lost %d times: %v", i.Losses, i.Reason)
	}
	closeSubsystem(t, c)
}

// silences are faults that leave one admin or Connect command without an answer, each in
// another step of connecting.
func silences() map[string]target.Fault {
	all := map[string]target.Fault{}
	add := func(name string, admin bool, op nvme.Opcode, skip int) {
		all[name] = target.Fault{Match: target.Match{Admin: admin, Opcodes: []nvme.Opcode{op}}, Skip: skip, Count: 1, Drop: true}
	}
	for skip := range 6 { // Connect, and properties after it
		add(fmt.Sprintf("fabrics command %d", skip), true, nvme.OpFabrics, skip)
	}
	for skip := range 4 {
		add(fmt.Sprintf("identify %d", skip), true, nvme.AdminIdentify, skip)
	}
	add("number of queues", true, nvme.AdminSetFeatures, 0)
	add("connect of the I/O queue", false, nvme.OpFabrics, 0)
	return all
}

// TestRoCESilence checks that Connect waits for a target that falls silent in any step as
// long as that step may take, and that the error names the step.
func TestRoCESilence(t *testing.T) {
	for name, fault := range silences() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWire(t, target.Config{}, target.NamespaceConfig{})
			loops := newLoops(t, 1)
			cfg := w.config(loops, poller.Request{IO: 1})
			cfg.AdminTimeout, cfg.IOTimeout, cfg.ConnectTimeout = time.Second, time.Second, time.Second
			w.target.Faults().Add(fault)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			c, err := Connect(ctx, cfg)
			var step *StepError
			switch {
			case err == nil:
				// A step without so late a command, or whose loss does
				// not matter
				t.Log("connected all the same")
				closeSubsystem(t, c)
			case !errors.As(err, &step) || !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil:
				t.Errorf("%v, want a step that timed out", err)
			}
		})
	}
}

// TestRoCEGarbage checks that random identify data and log pages are refused or
// interpreted, without further harm.
func TestRoCEGarbage(t *testing.T) {
	setUp := func(t *testing.T) (*wire, Config, func(op nvme.Opcode, skip int)) {
		w := newWire(t, target.Config{}, target.NamespaceConfig{})
		cfg := w.config(newLoops(t, 1), poller.Request{IO: 1})
		cfg.AdminTimeout, cfg.IOTimeout, cfg.ConnectTimeout = time.Second, time.Second, time.Second
		return w, cfg, func(op nvme.Opcode, skip int) {
			w.target.Faults().Add(target.Fault{Match: target.Match{Admin: true, Opcodes: []nvme.Opcode{op}}, Skip: skip, Corrupt: target.CorruptData})
		}
	}
	for skip := range 4 {
		t.Run(fmt.Sprintf("connect with noise from Identify %d on", skip), func(t *testing.T) {
			t.Parallel()
			w, cfg, noise := setUp(t)
			refused := 0
			for range 10 {
				noise(nvme.AdminIdentify, skip)
				c, err := Connect(t.Context(), cfg)
				w.target.Faults().Clear()
				if err != nil {
					refused++
					continue
				}
				closeSubsystem(t, c)
			}
			// A random list of namespaces is refused, too, unless it is
			// empty.
			if skip == 0 && refused < 10 {
				t.Errorf("%d of 10 were refused with a noisy controller", refused)
			}
		})
	}

	w, cfg, noise := setUp(t)
	loops, faults := cfg.Loops, w.target.Faults()
	c := connect(t, cfg)
	f := newFrontEnd(t, c.Namespaces()[0], loops, 8, 64<<10, 12)
	f.start(2000)
	noise(nvme.AdminGetLogPage, 0)
	for i := range 5 {
		ns, err := w.sub.AddNamespace(target.NamespaceConfig{Store: target.NewRAM(1 << 20)})
		if err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			noise(nvme.AdminIdentify, 1) // after a log page that was in order
		}
		if err := w.sub.RemoveNamespace(ns.NSID()); err != nil {
			t.Fatal(err)
		}
	}
	faults.Clear()
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
	closeSubsystem(t, c)
}

// TestRoCESilentReconnect checks the same during a reconnect. One attempt fails, the next
// one succeeds, and the data of the waiting requests is right.
func TestRoCESilentReconnect(t *testing.T) {
	w := newWire(t, target.Config{}, target.NamespaceConfig{})
	loops := newLoops(t, 1)
	cfg := w.config(loops, poller.Request{IO: 1})
	cfg.AdminTimeout, cfg.IOTimeout, cfg.ConnectTimeout = time.Second, time.Second, time.Second
	c := connect(t, cfg)
	f := newFrontEnd(t, c.Namespaces()[0], loops, 8, 64<<10, 11)
	for _, name := range []string{"fabrics command 0", "fabrics command 2", "identify 0", "number of queues", "connect of the I/O queue"} {
		w.target.Faults().Add(silences()[name])
		w.target.Faults().Disconnect(-1)
		f.run(50)
		waitFor(t, "the association after "+name, func() bool { return c.Info().State == StateLive })
	}
	// Nothing is answered for a while.
	w.target.Faults().Stall(true)
	w.target.Faults().Disconnect(-1)
	f.start(50)
	waitFor(t, "the second attempt", func() bool { return c.Info().Paths[0].Attempts >= 2 })
	w.target.Faults().Stall(false)
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
	closeSubsystem(t, c)
}

// TestRoCERefusals checks that the error of Connect has the target's reason.
func TestRoCERefusals(t *testing.T) {
	w := newWire(t, target.Config{}, target.NamespaceConfig{})
	loops := newLoops(t, 1)
	faults := w.target.Faults()
	try := func() error {
		c, err := Connect(t.Context(), w.config(loops, poller.Request{IO: 1}))
		if err == nil {
			closeSubsystem(t, c)
		}
		return err
	}
	faults.Grant(-1)
	if err := try(); !errors.Is(err, ErrNoQueues) {
		t.Errorf("no queues: %v", err)
	}
	faults.Clear()
	faults.RejectConnects(nvme.RDMARejectNoResources)
	var reject *rdma.RejectError
	if err := try(); !errors.As(err, &reject) || !strings.Contains(err.Error(), "no resources") {
		t.Errorf("rejected: %v", err)
	}
	faults.Clear()
	faults.FailConnects(nvme.StatusConnectInvalidHost | nvme.StatusDNR)
	var status ConnectStatus
	if err := try(); !errors.As(err, &status) {
		t.Errorf("refused: %v", err)
	}
	faults.Clear()
	if err := w.target.RemoveSubsystem(fakeNQN); err != nil {
		t.Fatal(err)
	}
	if err := try(); !errors.As(err, &status) {
		t.Errorf("no subsystem: %v", err)
	}
}

// slowStore holds its first write until late is closed, and reports its beginning.
type slowStore struct {
	target.Store
	first       atomic.Bool
	began, late chan struct{}
}

func (s *slowStore) WriteAt(b []byte, off int64) (int, error) {
	if !s.first.Swap(true) {
		close(s.began)
		<-s.late
	}
	return s.Store.WriteAt(b, off)
}

// TestOldWriteOfTarget is TestOldWrite with the real target, which ends a controller when
// the store has completed the controller's writes.
func TestOldWriteOfTarget(t *testing.T) {
	store := &slowStore{Store: target.NewRAM(1 << 20), began: make(chan struct{}), late: make(chan struct{})}
	w := newWire(t, target.Config{}, target.NamespaceConfig{Store: store})
	loops := newLoops(t, 1)
	c := connect(t, w.config(loops, poller.Request{IO: 1}))
	write := func(text string) <-chan uint16 {
		done := make(chan uint16, 1)
		go func() {
			done <- single(t, loops[0], c.Namespaces()[0], block.Request{Op: block.OpWrite, Sectors: 8}, text)
		}()
		return done
	}
	done := write("old")
	<-store.began
	w.sub.DropControllers()
	waitFor(t, "the loss", func() bool { return c.Info().Paths[0].Losses == 1 })
	select {
	case <-done:
		t.Error("the write was sent again while the target had the first copy")
	case <-time.After(500 * time.Millisecond):
	}
	if s := c.Info().State; s != StateConnecting {
		t.Errorf("state %v", s)
	}
	close(store.late)
	for _, errno := range []uint16{<-done, <-write("new")} {
		if errno != 0 {
			t.Errorf("write: %v", unix.Errno(errno))
		}
	}
	closeSubsystem(t, c)
	got := make([]byte, 3)
	if _, err := store.ReadAt(got, 0); err != nil || string(got) != "new" {
		t.Errorf("the disk has the %q write, %v", got, err)
	}
}
