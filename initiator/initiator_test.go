package initiator

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/target"
)

func newLoops(t testing.TB, n int) []*poller.Loop {
	t.Helper()
	var loops []*poller.Loop
	for i := range n {
		l, err := poller.New(poller.Config{Name: fmt.Sprintf("test-%d", i)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Stop() })
		loops = append(loops, l)
	}
	return loops
}

func testConfig(p rdma.Provider, loops []*poller.Loop, q poller.Request) Config {
	return Config{
		Path: Path{Provider: p, Address: netip.AddrPortFrom(targetAddr, 4420)}, SubNQN: fakeNQN,
		HostNQN: "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-0000-0000-000000000001", HostID: nvme.NewUUID(),
		Queues: q, Loops: loops,
		AdminTimeout: 2 * time.Second, IOTimeout: 2 * time.Second, ConnectTimeout: 2 * time.Second,
	}
}

func connect(t testing.TB, cfg Config) *Subsystem {
	t.Helper()
	c, err := Connect(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func closeSubsystem(t testing.TB, c *Subsystem) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := c.Close(ctx); err != nil {
		t.Errorf("close: %v", err)
	}
}

// TestVerifyEverySplit runs verified I/O on controllers with many requests and grants:
// fewer queues than loops, and classes without queues.
func TestVerifyEverySplit(t *testing.T) {
	cpus := runtime.NumCPU()
	for _, q := range []poller.Request{{IO: 1}, {IO: 2}, {IO: 2, Write: 2}, {IO: 2, Poll: 2}, {IO: 2, Write: 1, Poll: 1}, {IO: 1, Write: 1, Poll: 1}, {IO: 2, Write: 2, Poll: 2}} {
		q = q.Clip(cpus)
		for grant := 1; grant <= q.Total(); grant++ {
			t.Run(fmt.Sprintf("%d-%d-%d granted %d", q.IO, q.Write, q.Poll, grant), func(t *testing.T) {
				fabric := rdmatest.NewFabric()
				target := newFakeTarget(t, fabric, 4<<20)
				target.grant.Store(int32(grant))
				loops := newLoops(t, q.Loops())
				c := connect(t, testConfig(fabric.Provider(hostAddr), loops, q))
				if got := c.Info().Paths[0].Plan; got != poller.Split(q, grant) {
					t.Errorf("plan %v", got)
				}
				f := newFrontEnd(t, c.Namespaces()[0], loops, 32, 64<<10, 1)
				f.run(1500)
				f.close()
				closeSubsystem(t, c)
				target.mu.Lock()
				defer target.mu.Unlock()
				for qid := 1; qid <= grant; qid++ {
					if target.byQueue[uint16(qid)] == 0 {
						t.Errorf("queue %d of %d was not used: %v", qid, grant, target.byQueue)
					}
				}
				if !target.shutdown {
					t.Error("no shutdown notification arrived")
				}
			})
		}
	}
}

// TestVariants runs verified I/O on targets with other properties.
func TestVariants(t *testing.T) {
	for name, set := range map[string]func(*fakeTarget, *Config){
		"no in-capsule data":    func(f *fakeTarget, _ *Config) { f.inCapsule = 0 },
		"big capsules":          func(f *fakeTarget, _ *Config) { f.inCapsule = 16384 },
		"4096 byte blocks":      func(f *fakeTarget, _ *Config) { f.lbads = 12 },
		"queue size 16":         func(_ *fakeTarget, c *Config) { c.QueueSize = 16 },
		"target with 8 entries": func(f *fakeTarget, _ *Config) { f.maxEntries = 8 },
		"sq flow control off":   func(_ *fakeTarget, c *Config) { c.DisableSQFlow = true },
	} {
		t.Run(name, func(t *testing.T) {
			fabric := rdmatest.NewFabric()
			target := newFakeTarget(t, fabric, 4<<20)
			loops := newLoops(t, 1)
			cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1})
			set(target, &cfg)
			c := connect(t, cfg)
			f := newFrontEnd(t, c.Namespaces()[0], loops, 64, 128<<10, 2)
			f.run(3000)
			f.close()
			closeSubsystem(t, c)
		})
	}
}

// TestDelayedFabric delays the effect of work requests, which reveals buffers that are
// reused too early.
func TestDelayedFabric(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 4<<20)
	fabric.SetDelay(200 * time.Microsecond)
	loops := newLoops(t, min(2, runtime.NumCPU()))
	c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: len(loops), Write: 1}))
	f := newFrontEnd(t, c.Namespaces()[0], loops, 32, 64<<10, 3)
	f.run(300)
	f.close()
	closeSubsystem(t, c)
}

// TestTwoNamespaces serves two namespaces at once on the same loops and queue pairs.
func TestTwoNamespaces(t *testing.T) {
	fabric := rdmatest.NewFabric()
	target := newFakeTarget(t, fabric, 4<<20)
	target.namespaces = []uint32{1, 7}
	loops := newLoops(t, 1)
	c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1}))
	ns := c.Namespaces()
	if len(ns) != 2 || ns[0].NSID() != 1 || ns[1].NSID() != 7 {
		t.Fatalf("namespaces %v", ns)
	}
	// The fake's namespaces share their memory, so the second one only reads.
	a := newFrontEnd(t, ns[0], loops, 128, 4096, 4)
	q, err := ns[1].OpenQueue(0, block.QueueConfig{Depth: 128, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	a.start(2000)
	var results [128]block.Result
	for range 20 {
		reqs := make([]block.Request, 128)
		for i := range reqs {
			reqs[i] = block.Request{Op: block.OpRead, Tag: uint16(i), Sector: uint64(i * 8), Sectors: 8}
		}
		loops[0].Call(func() { q.Submit(reqs) })
		for got := 0; got < len(reqs); {
			n := 0
			loops[0].Call(func() { n = q.Reap(results[:]) })
			for _, r := range results[:n] {
				if r.Errno != 0 {
					t.Fatalf("read: errno %d", r.Errno)
				}
			}
			got += n
		}
	}
	for _, err := range a.wait(30 * time.Second) {
		t.Error(err)
	}
	q.Close()
	a.close()
	closeSubsystem(t, c)
}

// TestRefusals checks that the error of each step names the step.
func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		set  func(*fakeTarget, *Config)
		want []string
		as   any
	}{
		"unknown subsystem": {func(_ *fakeTarget, c *Config) { c.SubNQN = "nqn.2026-01.org.example:other" }, []string{"connect admin queue", "subsystem nqn"}, new(ConnectStatus)},
		"host not allowed": {func(f *fakeTarget, _ *Config) {
			f.connect = func(nvme.ConnectParams, *nvme.ConnectData) nvme.Status {
				return nvme.StatusConnectInvalidHost | nvme.StatusDNR
			}
		}, []string{"connect admin queue", "host"}, new(ConnectStatus)},
		"I/O queue refused": {func(f *fakeTarget, _ *Config) {
			f.connect = func(p nvme.ConnectParams, _ *nvme.ConnectData) nvme.Status {
				if p.QID == 2 {
					return nvme.StatusConnectControllerBusy
				}
				return nvme.StatusSuccess
			}
		}, []string{"connect I/O queues", "queue 2", "busy"}, new(ConnectStatus)},
		"no queue granted": {func(f *fakeTarget, _ *Config) { f.grant.Store(0) }, []string{"negotiate I/O queues", "no I/O queues"}, nil},
		"nobody listens":   {func(_ *fakeTarget, c *Config) { c.Address = netip.AddrPortFrom(targetAddr, 4421) }, []string{"connect admin queue", "nobody listens"}, new(*rdma.RejectError)},
		"silent command": {func(f *fakeTarget, c *Config) {
			c.AdminTimeout = 200 * time.Millisecond
			f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
				return noAnswer, cmd.Opcode() == nvme.AdminIdentify
			}
		}, []string{"identify controller", "deadline"}, nil},
		"bad queue size": {func(_ *fakeTarget, c *Config) { c.QueueSize = 15 }, []string{"queue size 15", "16..1024"}, nil},
		"bad host NQN":   {func(_ *fakeTarget, c *Config) { c.HostNQN = "" }, []string{"host NQN"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			fabric := rdmatest.NewFabric()
			target := newFakeTarget(t, fabric, 1<<20)
			loops := newLoops(t, min(2, runtime.NumCPU()))
			cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: len(loops)})
			c.set(target, &cfg)
			ctl, err := Connect(context.Background(), cfg)
			if err == nil {
				closeSubsystem(t, ctl)
				t.Fatal("connected")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not say %q", err, w)
				}
			}
			switch as := c.as.(type) {
			case *ConnectStatus:
				if !errors.As(err, as) {
					t.Errorf("error %v holds no %T", err, *as)
				}
			case **rdma.RejectError:
				if !errors.As(err, as) {
					t.Errorf("error %v holds no %T", err, *as)
				}
			}
		})
	}
}

// TestVolatileCache checks that a namespace may lack the cache that its controller has.
func TestVolatileCache(t *testing.T) {
	for _, writeThrough := range []bool{false, true} {
		fabric := rdmatest.NewFabric()
		newFakeTarget(t, fabric, 1<<20).writeThrough = writeThrough
		c := connect(t, testConfig(fabric.Provider(hostAddr), newLoops(t, 1), poller.Request{IO: 1}))
		if got := c.Namespaces()[0].Geometry().VolatileCache; got == writeThrough {
			t.Errorf("write through %v: volatile cache %v", writeThrough, got)
		}
		closeSubsystem(t, c)
	}
}

// TestErrorStatus checks that a status without Do Not Retry is retried at most five
// times, and that a status with it fails at once, with the errno of the block layer.
func TestErrorStatus(t *testing.T) {
	fabric := rdmatest.NewFabric()
	target := newFakeTarget(t, fabric, 1<<20)
	failures := map[uint64]int{8: 3, 16: 100, 24: 1} // by LBA
	status := map[uint64]nvme.Status{8: nvme.StatusInternal, 16: nvme.StatusInternal, 24: nvme.StatusCapacityExceeded | nvme.StatusDNR}
	seen := map[uint64]int{}
	target.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
		if qid == 0 || cmd.Opcode() != nvme.OpWrite {
			return 0, false
		}
		seen[cmd.SLBA()]++
		if failures[cmd.SLBA()] > 0 {
			failures[cmd.SLBA()]--
			return status[cmd.SLBA()], true
		}
		return 0, false
	}
	loops := newLoops(t, 1)
	c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1}))
	for _, want := range []struct {
		sector uint64
		errno  unix.Errno
		tries  int
	}{{0, 0, 1}, {8, 0, 4}, {16, unix.EIO, 6}, {24, unix.ENOSPC, 1}} {
		got := single(t, loops[0], c.Namespaces()[0], block.Request{Op: block.OpWrite, Sector: want.sector, Sectors: 8})
		if unix.Errno(got) != want.errno || seen[want.sector] != want.tries {
			t.Errorf("sector %d: errno %v after %d tries, want %v after %d", want.sector, unix.Errno(got), seen[want.sector], want.errno, want.tries)
		}
	}
	closeSubsystem(t, c)
}

// single executes one request and returns its errno.
func single(t testing.TB, loop *poller.Loop, dev block.Device, r block.Request, data ...string) uint16 {
	t.Helper()
	q, err := dev.OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 65536})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	for _, text := range data {
		copy(q.Buffer(0), text)
	}
	return uint16(submit(t, loop, q, r))
}

// submit executes one request on a queue without others, and returns its errno.
func submit(t testing.TB, loop *poller.Loop, q block.Queue, r block.Request) unix.Errno {
	t.Helper()
	if err := loop.Call(func() { q.Submit([]block.Request{r}) }); err != nil {
		t.Fatal(err)
	}
	var done [1]block.Result
	for deadline := time.Now().Add(10 * time.Second); ; {
		n := 0
		loop.Call(func() { n = q.Reap(done[:]) })
		if n == 1 {
			return unix.Errno(done[0].Errno)
		}
		if time.Now().After(deadline) {
			t.Fatal("request did not end")
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// TestRequestsThatMustNotBeSent checks that such requests are refused without sending
// anything to the target, above all those that would let it access memory beyond a
// buffer.
func TestRequestsThatMustNotBeSent(t *testing.T) {
	fabric := rdmatest.NewFabric()
	target := newFakeTarget(t, fabric, 1<<20)
	target.lbads = 12
	loops := newLoops(t, 1)
	c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1}))
	for _, r := range []block.Request{
		{Op: block.OpRead, Sectors: 136},                     // longer than the buffer
		{Op: block.OpWrite, Sectors: 1 << 31},                // wraps in 32 bits
		{Op: block.OpWrite, Sectors: 4},                      // half a block
		{Op: block.OpRead, Sector: 4, Sectors: 8},            // between blocks
		{Op: block.OpRead},                                   // nothing
		{Op: block.OpDiscard},                                // nothing
		{Op: block.OpUnset, Sectors: 8},                      // no operation
		{Op: block.OpWriteZeroes + 1, Sector: 0, Sectors: 8}, // unknown
	} {
		if got := single(t, loops[0], c.Namespaces()[0], r); got == 0 {
			t.Errorf("%+v succeeded", r)
		}
	}
	if len(target.commands) != 0 {
		t.Errorf("the target saw %v", target.commands)
	}
	closeSubsystem(t, c)
}

// TestHostileResponses checks that the association ends with a reason, whatever a target
// answers, and that the requests in flight are sent again over the next one.
func TestHostileResponses(t *testing.T) {
	for name, c := range map[string]struct {
		tamper func(*nvme.Completion) bool
		want   string
	}{
		"id of no slot":     {func(c *nvme.Completion) bool { c.SetCID(c.CID() | 0x0FFF); return true }, "not outstanding"},
		"wrong generation":  {func(c *nvme.Completion) bool { c.SetCID(c.CID() ^ 0x1000); return true }, "not outstanding"},
		"another slot":      {func(c *nvme.Completion) bool { c.SetCID(c.CID()&0xF000 | (c.CID()+9)&0x0FFF); return true }, "not outstanding"},
		"head beyond queue": {func(c *nvme.Completion) bool { c.SetSQHead(4000); return true }, "submission queue head"},
		"no answer":         {func(c *nvme.Completion) bool { return false }, "not answered within"},
	} {
		t.Run(name, func(t *testing.T) {
			fabric := rdmatest.NewFabric()
			target := newFakeTarget(t, fabric, 1<<20)
			var hostile atomic.Bool
			target.tamper = func(qid uint16, done *nvme.Completion) bool {
				return qid == 0 || !hostile.Swap(false) || c.tamper(done)
			}
			loops := newLoops(t, 1)
			ctl := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1}))
			hostile.Store(true)
			f := newFrontEnd(t, ctl.Namespaces()[0], loops, 8, 4096, 9)
			f.run(200)
			i := ctl.Info().Paths[0]
			if i.Losses != 1 || i.State != StateLive || i.Reason == nil || !strings.Contains(i.Reason.Error(), c.want) {
				t.Errorf("state %v after %d losses, reason %v, want %q", i.State, i.Losses, i.Reason, c.want)
			}
			f.close()
			closeSubsystem(t, ctl)
		})
	}
}

// TestSilentLoss checks that the loss of a target is noticed long before a command times
// out, if the target received the command, lost the connection and sends nothing.
func TestSilentLoss(t *testing.T) {
	fabric := rdmatest.NewFabric()
	target := newFakeTarget(t, fabric, 1<<20)
	var lose atomic.Bool
	lost := make(chan struct{})
	target.tamper = func(qid uint16, _ *nvme.Completion) bool {
		if qid == 0 || !lose.CompareAndSwap(true, false) {
			return true
		}
		close(lost)
		return false
	}
	loops := newLoops(t, 1)
	cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1})
	cfg.IOTimeout = time.Hour
	cfg.KeepAlive = time.Second // the target does not hear of the end of what is cut
	ctl := connect(t, cfg)
	id := ctl.slots[0].assoc.pairs[0].id
	f := newFrontEnd(t, ctl.Namespaces()[0], loops, 1, 4096, 9)
	lose.Store(true)
	f.start(3)
	<-lost
	// The SEND is complete; nothing is outstanding whose retries could run out.
	fabric.Cut(id)
	old := ctl.Info().Paths[0].CNTLID
	time.AfterFunc(2*cfg.KeepAlive, func() { target.end(old) }) // as its keep alive timer does
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	if i := ctl.Info().Paths[0]; i.Losses != 1 || i.State != StateLive {
		t.Errorf("state %v after %d losses, reason %v", i.State, i.Losses, i.Reason)
	}
	f.close()
	closeSubsystem(t, ctl)
}

// TestSilentWhileConnecting checks that a target that falls silent while an association
// is being made costs a connect timeout, but not the timeout of the command that is not
// answered.
func TestSilentWhileConnecting(t *testing.T) {
	for name, from := range map[string]func(qid uint16, cmd *nvme.Command) bool{
		"property": func(_ uint16, cmd *nvme.Command) bool { return cmd.FCType() == nvme.FabricsPropertyGet },
		"identify controller": func(_ uint16, cmd *nvme.Command) bool {
			return cmd.Opcode() == nvme.AdminIdentify && cmd.CNS() == nvme.CNSController
		},
		"I/O queue": func(qid uint16, _ *nvme.Command) bool { return qid == 1 },
		"look":      isLook,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fabric := rdmatest.NewFabric()
			target := newFakeTarget(t, fabric, 1<<20)
			var silent atomic.Bool
			target.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
				if from(qid, cmd) {
					silent.Store(true)
				}
				return noAnswer, silent.Load()
			}
			cfg := testConfig(fabric.Provider(hostAddr), newLoops(t, 1), poller.Request{IO: 1})
			cfg.AdminTimeout, cfg.IOTimeout = time.Hour, time.Hour
			cfg.KeepAlive, cfg.ConnectTimeout = time.Second, time.Second
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			c, err := Connect(ctx, cfg)
			if err == nil {
				closeSubsystem(t, c)
			}
			if err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), "was not answered") {
				t.Errorf("connect: %v", err)
			}
		})
	}
}

// TestRegrant changes the grant while I/O of every class is in flight. Each association
// has the plan of a first connect, and no request fails.
func TestRegrant(t *testing.T) {
	cpus := runtime.NumCPU()
	for _, q := range []poller.Request{{IO: 2, Write: 2, Poll: 2}, {IO: 2, Write: 2}, {IO: 2, Poll: 2}} {
		q = q.Clip(cpus)
		t.Run(fmt.Sprintf("%d-%d-%d", q.IO, q.Write, q.Poll), func(t *testing.T) {
			fabric := rdmatest.NewFabric()
			target := newFakeTarget(t, fabric, 4<<20)
			target.grant.Store(5)
			loops := newLoops(t, q.Loops())
			cfg := testConfig(fabric.Provider(hostAddr), loops, q)
			cfg.ReconnectDelay = 20 * time.Millisecond
			c := connect(t, cfg)
			f := newFrontEnd(t, c.Namespaces()[0], loops, 32, 64<<10, 6)
			f.start(20000)
			losses := 0
			for _, grant := range []int{3, 8, 1, 4, 2, 0, 6, 1, 6} {
				target.grant.Store(int32(grant))
				fabric.KillAll(hostAddr)
				losses++
				if grant == 0 {
					waitFor(t, "a refused attempt", func() bool { return c.Info().Paths[0].Attempts >= 2 })
					continue
				}
				waitFor(t, "the next association", func() bool {
					i := c.Info().Paths[0]
					return i.State == StateLive && i.Plan == poller.Split(q, grant)
				})
			}
			for _, err := range f.wait(time.Minute) {
				t.Error(err)
			}
			f.close()
			closeSubsystem(t, c)
		})
	}
}

// waitFor polls a condition that causes no event.
func waitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	limit := time.After(20 * time.Second)
	for !cond() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("%s did not come", what)
		}
	}
}

// TestDeviceReplaced checks that, if the route leads through another RDMA device, the
// association and the buffers move there, and nothing stays on the old device.
func TestDeviceReplaced(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20)
	q := poller.Request{IO: 2, Write: 1, Poll: 1}.Clip(runtime.NumCPU())
	loops := newLoops(t, q.Loops())
	cfg := testConfig(fabric.Provider(hostAddr), loops, q)
	cfg.ReconnectDelay = 10 * time.Millisecond
	before := fabric.Objects()
	c := connect(t, cfg)
	f := newFrontEnd(t, c.Namespaces()[0], loops, 8, 64<<10, 7)
	f.start(3000)
	for n := range 3 {
		fabric.ReplaceDevice(hostAddr)
		waitFor(t, "the next association", func() bool { i := c.Info().Paths[0]; return i.State == StateLive && i.Losses == n+1 })
	}
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
	closeSubsystem(t, c)
	waitFor(t, "the end of the target's connections", func() bool { return fabric.Objects() == before })
}

// TestIdleDeviceRemoved checks that a device which is removed while there is no association is
// left at once, and not only when the next association is made.
func TestIdleDeviceRemoved(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20)
	loops := newLoops(t, 1)
	cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1})
	cfg.ReconnectDelay = time.Hour
	before := fabric.Objects()
	c := connect(t, cfg)
	f := newFrontEnd(t, c.Namespaces()[0], loops, 8, 4096, 7)
	fabric.SetRefuse(targetAddr, rdma.RejectInvalidServiceID, nil)
	fabric.KillAll(hostAddr)
	waitFor(t, "an attempt", func() bool { i := c.Info().Paths[0]; return i.Attempts >= 1 && i.Failure != nil })
	fabric.ReplaceDevice(hostAddr)
	waitFor(t, "the end of what is on the device", func() bool { return fabric.Objects() == before })
	f.close()
	closeSubsystem(t, c)
}

// TestOutage checks that requests wait while the target does not listen, and finish when
// it does.
func TestOutage(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20)
	loops := newLoops(t, 1)
	cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1})
	cfg.ReconnectDelay = 10 * time.Millisecond
	c := connect(t, cfg)
	f := newFrontEnd(t, c.Namespaces()[0], loops, 8, 4096, 7)
	f.start(20000)
	fabric.SetRefuse(targetAddr, rdma.RejectInvalidServiceID, nil)
	fabric.KillAll(hostAddr)
	waitFor(t, "the third attempt", func() bool { return c.Info().Paths[0].Attempts >= 3 })
	if i := c.Info().Paths[0]; i.State != StateConnecting {
		t.Errorf("state %v", i.State)
	}
	fabric.SetRefuse(targetAddr, 0, nil)
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
	closeSubsystem(t, c)
}

// TestOldWrite checks that a write that the target still executes when its association is
// lost does not overwrite a newer write. It is sent again only when the target has ended
// the old controller.
func TestOldWrite(t *testing.T) {
	fabric := rdmatest.NewFabric()
	target := newFakeTarget(t, fabric, 1<<20)
	late, began := make(chan struct{}), make(chan struct{})
	var first sync.Once
	target.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
		if qid > 0 && cmd.Opcode() == nvme.OpWrite {
			first.Do(func() {
				close(began)
				<-late
				copy(target.disk.Bytes(), "old")
			})
		}
		return 0, false
	}
	loops := newLoops(t, 1)
	cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1})
	cfg.ReconnectDelay = 10 * time.Millisecond
	c := connect(t, cfg)
	old := c.Info().Paths[0].CNTLID
	asked := func() int {
		target.mu.Lock()
		defer target.mu.Unlock()
		return target.asked[old]
	}
	queues := asked()

	write := func(text string) <-chan uint16 {
		done := make(chan uint16, 1)
		go func() {
			done <- single(t, loops[0], c.Namespaces()[0], block.Request{Op: block.OpWrite, Sectors: 8}, text)
		}()
		return done
	}
	done := write("old")
	<-began
	fabric.KillAll(hostAddr)
	waitFor(t, "the third question for the old controller", func() bool { return asked() >= queues+3 })
	target.mu.Lock()
	if n := target.commands[nvme.OpWrite]; n != 1 || c.Info().State != StateConnecting {
		t.Errorf("%d writes arrived in state %v while the first was under way", n, c.Info().State)
	}
	target.mu.Unlock()
	close(late)
	for _, errno := range []uint16{<-done, <-write("new")} {
		if errno != 0 {
			t.Errorf("write: %v", unix.Errno(errno))
		}
	}
	closeSubsystem(t, c)
	if got := string(target.disk.Bytes()[:3]); got != "new" {
		t.Errorf("the disk has the %q write", got)
	}
}

// TestOutlive checks that a controller waits for the end of a controller of another host
// process.
func TestOutlive(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20)
	loops := newLoops(t, 2)
	cfg := testConfig(fabric.Provider(hostAddr), loops[:1], poller.Request{IO: 1})
	first := connect(t, cfg)
	cfg.Loops = loops[1:]
	second := connect(t, cfg)
	gone := make(chan error, 1)
	go func() { gone <- second.Outlive(t.Context(), 0, ControllerID{CNTLID: first.Info().Paths[0].CNTLID}) }()
	select {
	case err := <-gone:
		t.Fatalf("not waited: %v", err)
	case <-time.After(5 * fencePause):
	}
	closeSubsystem(t, first)
	if err := <-gone; err != nil {
		t.Error(err)
	}
	closeSubsystem(t, second)
}

// TestGivenUp checks that the controller is dead and requests fail after ctrl_loss_tmo,
// and that requests fail but the controller comes back after fast_io_fail_tmo.
func TestGivenUp(t *testing.T) {
	for name, fast := range map[string]bool{"ctrl_loss_tmo": false, "fast_io_fail_tmo": true} {
		t.Run(name, func(t *testing.T) {
			fabric := rdmatest.NewFabric()
			newFakeTarget(t, fabric, 1<<20)
			loops := newLoops(t, 1)
			cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1})
			cfg.ReconnectDelay = 10 * time.Millisecond
			if fast {
				cfg.FastIOFail = 100 * time.Millisecond
			} else {
				cfg.CtrlLoss = 100 * time.Millisecond
			}
			c := connect(t, cfg)
			fabric.SetRefuse(targetAddr, rdma.RejectInvalidServiceID, nil)
			fabric.KillAll(hostAddr)
			read := block.Request{Op: block.OpRead, Sectors: 8}
			if got := single(t, loops[0], c.Namespaces()[0], read); got != uint16(unix.ENOLINK) {
				t.Errorf("read: %v", unix.Errno(got))
			}
			if fast {
				fabric.SetRefuse(targetAddr, 0, nil)
				waitFor(t, "the next association", func() bool { return c.Info().State == StateLive })
				if got := single(t, loops[0], c.Namespaces()[0], read); got != 0 {
					t.Errorf("read after the outage: %v", unix.Errno(got))
				}
			} else {
				<-c.Done()
				if err := c.Err(); err == nil || !strings.Contains(err.Error(), "given up after 100ms") {
					t.Errorf("reason %v", err)
				}
			}
			closeSubsystem(t, c)
		})
	}
}

// TestAbort checks that Abort fails the requests that wait for a target that does not
// come back.
func TestAbort(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20)
	loops := newLoops(t, 1)
	c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1}))
	fabric.SetSilent(targetAddr, true)
	fabric.KillAll(hostAddr)
	f := newFrontEnd(t, c.Namespaces()[0], loops, 8, 4096, 7)
	f.jobs[0].allow = true
	f.start(20)
	reason := errors.New("not wanted any more")
	c.Abort(reason)
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	<-c.Done()
	if c.Err() != reason { //nolint:errorlint // it and nothing around it
		t.Errorf("reason %v", c.Err())
	}
	f.close()
	closeSubsystem(t, c)
}

// TestNamespaceReplaced checks that a namespace that is another one after the outage is
// not written to.
func TestNamespaceReplaced(t *testing.T) {
	fabric := rdmatest.NewFabric()
	target := newFakeTarget(t, fabric, 1<<20)
	loops := newLoops(t, 1)
	c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1}))
	target.mu.Lock()
	target.uuid[0]++
	target.mu.Unlock()
	fabric.KillAll(hostAddr)
	waitFor(t, "the next association", func() bool { i := c.Info().Paths[0]; return i.State == StateLive && i.Losses == 1 })
	write := block.Request{Op: block.OpWrite, Sectors: 8}
	if got := single(t, loops[0], c.Namespaces()[0], write); unix.Errno(got) != unix.ENODEV {
		t.Errorf("write: %v", unix.Errno(got))
	}
	if n := target.commands[nvme.OpWrite]; n != 0 {
		t.Errorf("%d writes arrived", n)
	}
	closeSubsystem(t, c)
}

// TestNamespaceEvents checks that changes that the target announces become known and are
// reported.
func TestNamespaceEvents(t *testing.T) {
	fabric := rdmatest.NewFabric()
	target := newFakeTarget(t, fabric, 1<<20)
	loops := newLoops(t, 1)
	cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1})
	heard := make(chan string, 16)
	cfg.Changed = func(ns *Namespace, what Change) { heard <- fmt.Sprintf("%d %v", ns.NSID(), what) }
	c := connect(t, cfg)
	ns := c.Namespaces()[0]
	write := block.Request{Op: block.OpWrite, Sectors: 8}
	for _, step := range []struct {
		change func()
		heard  string
		errno  unix.Errno // of a write to namespace 1
	}{
		{func() { target.namespaces = []uint32{1, 7} }, "7 added", 0},
		{func() { target.namespaces = []uint32{7} }, "1 removed", unix.ENODEV},
		{func() { target.namespaces = []uint32{1, 7} }, "1 added", 0},
		{func() { target.namespaces = []uint32{1} }, "7 removed", 0},
		{func() { target.blocks = 1000 }, "1 resized", 0},
		{func() { target.readOnly = true }, "1 write protection changed", 0},
		{func() { target.lbads, target.blocks = 12, 1 }, "1 removed", unix.ENODEV}, // and a new one is in its place
	} {
		target.change(step.change)
		select {
		case got := <-heard:
			if got != step.heard {
				t.Errorf("heard %q, want %q", got, step.heard)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: not heard", step.heard)
		}
		if got := single(t, loops[0], ns, write); unix.Errno(got) != step.errno {
			t.Errorf("write after %q: %v", step.heard, unix.Errno(got))
		}
	}
	if got := <-heard; got != "1 added" {
		t.Errorf("heard %q of the namespace with another block size", got)
	}
	if g := ns.Geometry(); g.Sectors != 1000 || !g.ReadOnly || g.LogicalBlock != 512 {
		t.Errorf("%+v", g)
	}
	// The same while the target cannot announce it.
	all := c.Namespaces()
	ns = all[len(all)-1]
	target.mu.Lock()
	target.blocks = 100
	target.mu.Unlock()
	fabric.KillAll(hostAddr)
	if got := <-heard; got != "1 resized" || ns.Geometry().Sectors != 800 {
		t.Errorf("heard %q after the outage, %d sectors", got, ns.Geometry().Sectors)
	}
	closeSubsystem(t, c)
}

// TestNoAllocations checks that a batch of reads and writes does not allocate, from
// Submit to Reap, with everything in between on the loop.
func TestNoAllocations(t *testing.T) {
	request := poller.Request{IO: 1, Write: 1, Poll: 1}.Clip(runtime.NumCPU())
	t.Run("fabric", func(t *testing.T) {
		fabric := rdmatest.NewFabric()
		newFakeTarget(t, fabric, 1<<20)
		loops := newLoops(t, 1)
		checkNoAllocations(t, testConfig(fabric.Provider(hostAddr), loops, request), 64)
	})
	t.Run("RoCE", func(t *testing.T) {
		w := newWire(t, target.Config{}, target.NamespaceConfig{})
		checkNoAllocations(t, w.config(newLoops(t, 1), request), 256)
	})
}

// checkNoAllocations counts the allocations of the whole process, including the target,
// for batches of 32 requests of 8 or more sectors. What else the process allocates counts, too, so
// it looks several times, each time with a queue whose chunks are not ready yet.
func checkNoAllocations(t *testing.T, cfg Config, sectors uint32) {
	c := connect(t, cfg)
	mem, err := hostmem.Map(int(sectors) << block.SectorShift)
	if err != nil {
		t.Fatal(err)
	}
	region, err := c.Namespaces()[0].Register(mem)
	if err != nil {
		t.Fatal(err)
	}
	reqs := make([]block.Request, 32)
	for i := range reqs {
		reqs[i] = block.Request{Region: region.Number() * uint16(i%8/4), Op: block.OpRead + block.Op(i%2), Tag: uint16(i), Sector: uint64(i) * uint64(sectors), Sectors: 8}
		if i%4 >= 2 {
			reqs[i].Sectors = sectors // not in a capsule, not polled
		}
	}
	preparing, ready := math.Inf(1), math.Inf(1)
	for range 3 {
		q, err := c.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 32, MaxIO: int(sectors) << block.SectorShift})
		if err != nil {
			t.Fatal(err)
		}
		preparing = min(preparing, allocationsOf(t, c.lanes[0], q, reqs))
		q.(*nsQueue).buffers.preparing.Wait()
		ready = min(ready, allocationsOf(t, c.lanes[0], q, reqs))
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
		if preparing == 0 && ready == 0 {
			break
		}
	}
	if preparing != 0 || ready != 0 {
		t.Errorf("%v allocations per batch of 32 requests while the chunks of the queue are being made ready, %v when they are", preparing, ready)
	}
	if err := errors.Join(region.Close(), hostmem.Unmap(mem)); err != nil {
		t.Error(err)
	}
	closeSubsystem(t, c)
}

// allocationsOf returns the allocations per batch of requests.
func allocationsOf(t *testing.T, l *lane, q block.Queue, reqs []block.Request) (allocs float64) {
	t.Helper()
	results := make([]block.Result, len(reqs))
	err := l.loop.Call(func() {
		allocs = testing.AllocsPerRun(100, func() {
			q.Submit(reqs)
			for got := 0; got < len(reqs); {
				if l.Poll()+l.Flush() == 0 {
					runtime.Gosched() // there is one processor meanwhile
				}
				got += q.Reap(results)
			}
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return allocs
}
