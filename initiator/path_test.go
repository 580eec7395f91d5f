package initiator

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/rdma/roce"
	"ublk-nvmeof/target"
)

// hall is a host with a device of its own for each path, and targets with ports of package
// target that have the same disk.
type hall struct {
	t       testing.TB
	fabric  *rdmatest.Fabric
	loops   []*poller.Loop
	targets []*target.Target
	subs    []*target.Subsystem
	disks   []*target.Namespace
	ports   []*target.Port
	uuid    nvme.UUID
}

// Addresses of the n-th port, and of the host's device that leads to it
func portAddr(n int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + n)}) }
func sideAddr(n int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(100 + n)}) }

// newHall makes one target with ports, or for each port a target of its own with other
// controller ids.
func newHall(t testing.TB, ports int, separate bool, set func(*target.Config, *target.NamespaceConfig)) *hall {
	t.Helper()
	h := &hall{t: t, fabric: rdmatest.NewFabric(), loops: newLoops(t, 1), uuid: nvme.NewUUID()}
	store := target.NewRAM(1 << 20)
	for n := range ports {
		if n > 0 && !separate {
			h.addPort(h.targets[0], n)
			continue
		}
		cfg := target.Config{MinControllerID: uint16(1 + 1000*n), MaxControllerID: uint16(1000 + 1000*n)}
		ns := target.NamespaceConfig{NSID: 1, Store: store, UUID: h.uuid}
		if set != nil {
			set(&cfg, &ns)
		}
		h.open(cfg, ns)
		h.addPort(h.targets[n], n)
	}
	return h
}

// addPort makes a target listen on the n-th address.
func (h *hall) addPort(tg *target.Target, n int) {
	h.t.Helper()
	p, err := tg.AddPorts(target.PortConfig{Provider: h.fabric.Provider(portAddr(n)), Addr: netip.AddrPortFrom(portAddr(n), 4420)})
	if err != nil {
		h.t.Fatal(err)
	}
	h.ports = append(h.ports, p...)
}

func (h *hall) open(cfg target.Config, ns target.NamespaceConfig) {
	h.t.Helper()
	tg, err := target.New(cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { tg.Close() })
	sub, err := tg.AddSubsystem(target.SubsystemConfig{NQN: fakeNQN, AllowAny: true})
	if err != nil {
		h.t.Fatal(err)
	}
	disk, err := sub.AddNamespace(ns)
	if err != nil {
		h.t.Fatal(err)
	}
	h.targets, h.subs, h.disks = append(h.targets, tg), append(h.subs, sub), append(h.disks, disk)
}

func (h *hall) path(n int) Path {
	return Path{Provider: h.fabric.Provider(sideAddr(n)), Address: netip.AddrPortFrom(portAddr(n), 4420)}
}

// connect connects over all ports.
func (h *hall) connect(set func(*Config)) *Subsystem {
	h.t.Helper()
	cfg := testConfig(nil, h.loops, poller.Request{IO: len(h.loops)})
	cfg.Path, cfg.ReconnectDelay = h.path(0), 10*time.Millisecond
	if set != nil {
		set(&cfg)
	}
	s := connect(h.t, cfg)
	h.t.Cleanup(func() { closeSubsystem(h.t, s) })
	for n := 1; n < len(h.ports); n++ {
		if _, err := s.AddPath(h.t.Context(), h.path(n)); err != nil {
			h.t.Fatal(err)
		}
	}
	return s
}

// vouched waits until each path knows whether the others vouch for it.
func (h *hall) vouched(s *Subsystem) {
	h.t.Helper()
	waitFor(h.t, "all paths to vouch for all others", func() bool {
		for _, p := range s.Info().Paths {
			if len(p.Vouched) != len(h.ports)-1 {
				return false
			}
		}
		return true
	})
}

// cut breaks a path and keeps it from being made again until mend is called.
func (h *hall) cut(n int) (mend func()) {
	h.fabric.SetRefuse(portAddr(n), rdma.RejectInvalidServiceID, nil)
	h.fabric.KillAll(sideAddr(n))
	return func() { h.fabric.SetRefuse(portAddr(n), 0, nil) }
}

// ios returns the number of I/O commands that arrived at each port.
func (s *Subsystem) inflight() (all []int) {
	for _, p := range s.Info().Paths {
		all = append(all, p.InFlight)
	}
	return all
}

// job is one request in flight.
type flight struct {
	q    block.Queue
	loop *poller.Loop
	done chan unix.Errno
}

// send submits a request on a queue of its own and returns at once.
func (h *hall) send(s *Subsystem, r block.Request, data string) *flight {
	h.t.Helper()
	q, err := s.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096})
	if err != nil {
		h.t.Fatal(err)
	}
	f := &flight{q: q, loop: h.loops[0], done: make(chan unix.Errno, 1)}
	copy(q.Buffer(0), data)
	f.loop.Call(func() { q.Submit([]block.Request{r}) })
	return f
}

// wait returns the errno of the request.
func (f *flight) wait(t testing.TB) unix.Errno {
	t.Helper()
	var results [1]block.Result
	waitFor(t, "a request", func() bool {
		n := 0
		f.loop.Call(func() { n = f.q.Reap(results[:]) })
		return n == 1
	})
	f.q.Close()
	return unix.Errno(results[0].Errno)
}

// ended reports whether the request has ended, without taking the result.
func (f *flight) ended() bool {
	ended := false
	f.loop.Call(func() { ended = f.q.(*nsQueue).done.head != nil })
	return ended
}

var (
	readBlock  = block.Request{Op: block.OpRead, Sectors: 8}
	writeBlock = block.Request{Op: block.OpWrite, Sectors: 8}
)

// TestPathsNoAllocations checks that requests over four paths do not allocate, with each
// policy.
func TestPathsNoAllocations(t *testing.T) {
	h := newHall(t, 4, false, nil)
	s := h.connect(nil)
	h.vouched(s)
	q, err := s.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 32, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	reqs := make([]block.Request, 32)
	for i := range reqs {
		reqs[i] = block.Request{Op: block.OpRead + block.Op(i%2), Tag: uint16(i), Sector: uint64(i) * 8, Sectors: 8}
	}
	results := make([]block.Result, 32)
	// The targets end the connections that asked for controllers, and allocate for that.
	asked := h.fabric.Objects().QPs
	waitFor(t, "the end of the questions", func() bool {
		before := asked
		asked = h.fabric.Objects().QPs
		return asked == before && asked == 2*2*len(h.ports)
	})
	for policy := range nPolicies {
		if err := s.SetPolicy(policy, nil); err != nil {
			t.Fatal(err)
		}
		var allocs float64
		h.loops[0].Call(func() {
			l := s.lanes[0]
			allocs = testing.AllocsPerRun(100, func() {
				q.Submit(reqs)
				for got := 0; got < len(reqs); {
					if l.Poll()+l.Flush() == 0 {
						runtime.Gosched()
					}
					got += q.Reap(results)
				}
			})
		})
		if allocs != 0 {
			t.Errorf("%v: %v allocations per batch of 32 requests", policy, allocs)
		}
	}
}

// TestPolicies checks that requests go where the policy says, counted at the target.
func TestPolicies(t *testing.T) {
	h := newHall(t, 3, false, nil)
	s := h.connect(nil)
	h.vouched(s)
	q, err := s.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 30, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	// spread submits requests together and returns how many each path got.
	spread := func() (got [3]int) {
		var reqs []block.Request
		for i := range 30 {
			reqs = append(reqs, block.Request{Op: block.OpRead, Tag: uint16(i), Sectors: 8})
		}
		results := make([]block.Result, 30)
		h.loops[0].Call(func() {
			q.Submit(reqs)
			for n := range got {
				if p := s.lanes[0].routes[n][poller.Default]; p != nil {
					got[n] = int(p.inflight.Load())
				}
			}
		})
		waitFor(t, "the requests", func() bool {
			n := 0
			h.loops[0].Call(func() { n = q.Reap(results) })
			results = results[n:]
			return len(results) == 0
		})
		return got
	}
	check := func(what string, want [3]int) {
		t.Helper()
		if got := spread(); got != want {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	set := func(p Policy, preferred *Controller) {
		t.Helper()
		if err := s.SetPolicy(p, preferred); err != nil {
			t.Fatal(err)
		}
	}
	settle := func(n int, want access) {
		waitFor(t, "the ANA state", func() bool {
			v := s.Namespaces()[0].views[n].Load()
			return v != nil && v.access == want
		})
	}
	check("queue depth", [3]int{10, 10, 10})
	set(RoundRobin, nil)
	check("round robin", [3]int{10, 10, 10})
	set(Preferred, s.Paths()[1])
	check("preferred", [3]int{0, 30, 0})
	h.subs[0].SetPortANAState(h.ports[1], 1, nvme.ANANonOptimized)
	settle(1, nonOptimized)
	if got := spread(); got[1] != 0 || got[0] != 30 && got[2] != 30 {
		t.Errorf("preferred path is not optimized: %v", got)
	}
	set(QueueDepth, nil)
	check("one is not optimized", [3]int{15, 0, 15})
	h.subs[0].SetPortANAState(h.ports[0], 1, nvme.ANAInaccessible)
	h.subs[0].SetPortANAState(h.ports[2], 1, nvme.ANAPersistentLoss)
	settle(0, noAccess)
	settle(2, noAccess)
	check("nothing is optimized", [3]int{0, 30, 0})
	h.subs[0].SetPortANAState(h.ports[0], 1, nvme.ANAOptimized)
	h.subs[0].SetPortANAState(h.ports[1], 1, nvme.ANAOptimized)
	settle(0, optimized)
	settle(1, optimized)
	set(Preferred, s.Paths()[1])
	check("fail-back", [3]int{0, 30, 0})
}

// TestPreferredOfAnotherLoop checks that all requests take the preferred path, also those of a
// loop that has a queue pair of another path, and none of that one.
func TestPreferredOfAnotherLoop(t *testing.T) {
	h := newHall(t, 2, false, nil)
	h.loops = append(h.loops, newLoops(t, 1)...)
	if err := h.subs[0].SetMaxQueues(1); err != nil {
		t.Fatal(err)
	}
	s := h.connect(func(c *Config) { c.Queues = poller.Request{IO: len(h.loops)} })
	for n := range s.Paths() {
		if err := s.SetPolicy(Preferred, s.Paths()[n]); err != nil {
			t.Fatal(err)
		}
		owner := s.Paths()[n].current().plan.Owner[0]
		for i, loop := range h.loops {
			before := s.lanes[i].handedOver.Load()
			q, err := s.Namespaces()[0].OpenQueue(i, block.QueueConfig{Depth: 1, MaxIO: 4096})
			if err != nil {
				t.Fatal(err)
			}
			f := &flight{q: q, loop: loop}
			loop.Call(func() { q.Submit([]block.Request{readBlock}) })
			if e := f.wait(t); e != 0 {
				t.Errorf("read: %v", e)
			}
			if handed := s.lanes[i].handedOver.Load() - before; handed != uint64(min(1, max(i-owner, owner-i))) {
				t.Errorf("path %d of loop %d is preferred: loop %d handed %d requests over", n, owner, i, handed)
			}
		}
	}
}

// TestReadsGoOn checks that reads and disjoint writes continue within 100 ms after the loss of
// a path, and that the held write is sent when another path says that the controller is gone.
func TestReadsGoOn(t *testing.T) {
	h := newHall(t, 2, false, nil)
	s := h.connect(func(c *Config) { c.Policy = Preferred })
	h.vouched(s)
	hold := h.targets[0].Faults().Add(target.Fault{Match: target.Match{Port: 1, Opcodes: []nvme.Opcode{nvme.OpRead}}, Count: 8, Hold: 700 * time.Millisecond})
	defer hold.Remove()
	var reads []*flight
	for range 8 {
		reads = append(reads, h.send(s, readBlock, ""))
	}
	waitFor(t, "the reads", func() bool { return s.inflight()[0] == 8 })
	lost := time.Now()
	defer h.cut(0)()
	for _, r := range reads {
		if e := r.wait(t); e != 0 {
			t.Errorf("read: %v", e)
		}
	}
	if e := h.send(s, writeBlock, "x").wait(t); e != 0 {
		t.Errorf("write: %v", e)
	}
	took := time.Since(lost)
	t.Logf("8 reads and a write after %v", took)
	if took > 100*time.Millisecond {
		t.Errorf("reads continue after %v", took)
	}
	if p := s.Info().Paths[0]; p.Failovers != 8 || p.State != StateConnecting {
		t.Errorf("%d failovers, %v", p.Failovers, p.State)
	}
}

// lateWrite holds a write inside the target, cuts its path, writes to the same blocks again,
// lets the first write finish, and returns what is on the disk after the second one was
// answered.
func lateWrite(h *hall, s *Subsystem) string {
	t := h.t
	added := h.targets[0].Faults().Add(target.Fault{Match: target.Match{Port: 1, Opcodes: []nvme.Opcode{nvme.OpWrite}}, Count: 1, Hold: 150 * time.Millisecond})
	defer added.Remove()
	old := h.send(s, writeBlock, "old")
	waitFor(t, "the first write to be held", func() bool { return added.UsedUp() })
	mend := h.cut(0)
	if e := old.wait(t); e != 0 {
		t.Errorf("first write: %v", e)
	}
	if e := h.send(s, writeBlock, "new").wait(t); e != 0 {
		t.Errorf("second write: %v", e)
	}
	time.Sleep(200 * time.Millisecond) // the target is done with the first copy by then
	f := h.send(s, readBlock, "")
	var data string
	waitFor(t, "the read", func() bool { return f.ended() })
	h.loops[0].Call(func() { data = string(f.q.Buffer(0)[:3]) })
	f.wait(t)
	mend()
	waitFor(t, "the path", func() bool { return s.Info().Paths[0].State == StateLive })
	return data
}

// TestLateWrite checks that a write that the target of a lost path finishes late does not
// overwrite a newer one. Without the fence it does: the test can fail.
func TestLateWrite(t *testing.T) {
	for name, c := range map[string]struct {
		none, separate bool
		want           string
		rounds         int
	}{
		"fence":             {false, false, "new", testenv.Rounds(5)},
		"separate targets":  {false, true, "new", 1},
		"without the fence": {true, false, "old", 2},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHall(t, 2, c.separate, nil)
			s := h.connect(func(cfg *Config) {
				cfg.Policy, cfg.NoFence, cfg.KeepAlive = Preferred, c.none, 200*time.Millisecond
			})
			if !c.separate && !c.none {
				h.vouched(s)
			}
			for round := range c.rounds {
				waitFor(t, "the first path", func() bool { return s.Info().Paths[0].State == StateLive })
				began := time.Now()
				if got := lateWrite(h, s); got != c.want {
					t.Fatalf("round %d: the disk has the %q write, want %q", round, got, c.want)
				}
				if c.separate && time.Since(began) < s.Paths()[0].lastPatience {
					t.Errorf("the time rule was not used: %v", time.Since(began))
				}
			}
		})
	}
}

// TestNewerWriteWaitsAtOnce checks that a write that comes as soon as a queue pair has failed does
// not overtake a lost one to the same blocks, and that a read and a write to others do not wait.
func TestNewerWriteWaitsAtOnce(t *testing.T) {
	h := newHall(t, 2, false, nil)
	s := h.connect(func(c *Config) { c.Policy = Preferred })
	h.vouched(s)
	hold := h.targets[0].Faults().Add(target.Fault{Match: target.Match{Port: 1, Opcodes: []nvme.Opcode{nvme.OpWrite}}, Count: 1, Hold: 300 * time.Millisecond})
	defer hold.Remove()
	q, err := s.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 4, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	for tag, data := range []string{"old", "new", "", "else"} {
		copy(q.Buffer(uint16(tag)), data)
	}
	h.loops[0].Call(func() { q.Submit([]block.Request{{Tag: 0, Op: block.OpWrite, Sectors: 8}}) })
	waitFor(t, "the first write to be held", hold.UsedUp)
	defer h.cut(0)()
	h.loops[0].Call(func() {
		for _, p := range s.lanes[0].pairs {
			if p.slot == 0 {
				p.fail(errors.New("the test says so"))
			}
		}
		q.Submit([]block.Request{
			{Tag: 1, Op: block.OpWrite, Sectors: 8},
			{Tag: 2, Op: block.OpRead, Sectors: 8},
			{Tag: 3, Op: block.OpWrite, Sector: 8, Sectors: 8},
		})
	})
	var order []uint16
	waitFor(t, "all requests", func() bool {
		h.loops[0].Call(func() {
			var results [4]block.Result
			for _, r := range results[:q.Reap(results[:])] {
				if r.Errno != 0 {
					t.Errorf("request %d: %v", r.Tag, unix.Errno(r.Errno))
				}
				order = append(order, r.Tag)
			}
		})
		return len(order) == 4
	})
	if !slices.Equal(order[2:], []uint16{0, 1}) {
		t.Errorf("requests ended in the order %v, want the two writes of the same blocks last, the old one first", order)
	}
	f := h.send(s, readBlock, "")
	waitFor(t, "the read", f.ended)
	if got := string(f.q.Buffer(0)[:3]); got != "new" {
		t.Errorf("the disk has %q", got)
	}
	f.wait(t)
}

// TestVouchAgain checks that a path whose target gives no clear answer at first vouches later.
func TestVouchAgain(t *testing.T) {
	h := newHall(t, 2, false, nil)
	// The first two commands connect the I/O queues of the paths, the next two ask for controllers.
	vague := h.targets[0].Faults().Add(target.Fault{
		Match: target.Match{QID: 1, Opcodes: []nvme.Opcode{nvme.OpFabrics}}, Skip: 2, Count: 2, Status: nvme.StatusInternal,
	})
	s := h.connect(nil)
	h.vouched(s)
	if !vague.UsedUp() {
		t.Error("each question was answered")
	}
}

// TestHeldChanges checks what waits for the end of a controller, and what the status says.
func TestHeldChanges(t *testing.T) {
	h := newHall(t, 2, true, nil) // nobody vouches, so changes wait for long
	s := h.connect(func(c *Config) { c.Policy, c.KeepAlive = Preferred, 500*time.Millisecond })
	added := h.targets[0].Faults().Add(target.Fault{Match: target.Match{Opcodes: []nvme.Opcode{nvme.OpWrite}}, Count: 1, Hold: 300 * time.Millisecond})
	lost := h.send(s, writeBlock, "old")
	waitFor(t, "the write to be held", added.UsedUp)
	defer h.cut(0)()
	waitFor(t, "the fence", func() bool { return len(s.Info().Fences) == 1 })
	waits := map[string]*flight{
		"write":  h.send(s, block.Request{Op: block.OpWrite, Sector: 7, Sectors: 1}, "x"),
		"zeroes": h.send(s, block.Request{Op: block.OpWriteZeroes, Sectors: 1}, ""),
		"trim":   h.send(s, block.Request{Op: block.OpDiscard, Sectors: 64}, ""),
	}
	for name, f := range map[string]*flight{
		"read":            h.send(s, readBlock, ""),
		"flush":           h.send(s, block.Request{Op: block.OpFlush}, ""),
		"disjoint write":  h.send(s, block.Request{Op: block.OpWrite, Sector: 8, Sectors: 8}, "y"),
		"disjoint zeroes": h.send(s, block.Request{Op: block.OpWriteZeroes, Sector: 16, Sectors: 8}, ""),
	} {
		if e := f.wait(t); e != 0 {
			t.Errorf("%s: %v", name, e)
		}
	}
	for name, f := range waits {
		if f.ended() {
			t.Errorf("%s did not wait", name)
		}
	}
	i := s.Info()
	if len(i.Fences) != 1 || i.Fences[0].Changes != 1 || i.Fences[0].Since.IsZero() || !strings.Contains(i.Fences[0].WaitsFor, "no other path knows the controller") {
		t.Errorf("fences %+v", i.Fences)
	}
	waits["lost write"] = lost
	for name, f := range waits {
		if e := f.wait(t); e != 0 {
			t.Errorf("%s: %v", name, e)
		}
	}
	if f := s.Info().Fences; len(f) != 0 {
		t.Errorf("fences %+v", f)
	}
}

// TestFailedWriteStaysFenced checks that a write that failed because it waited for too long still
// keeps newer writes from its blocks.
func TestFailedWriteStaysFenced(t *testing.T) {
	h := newHall(t, 2, true, nil)
	s := h.connect(func(c *Config) { c.Policy, c.KeepAlive, c.FastIOFail = Preferred, 2*time.Second, time.Second })
	added := h.targets[0].Faults().Add(target.Fault{Match: target.Match{Opcodes: []nvme.Opcode{nvme.OpWrite}}, Count: 1, Hold: 100 * time.Millisecond})
	lost := h.send(s, writeBlock, "old")
	waitFor(t, "the write to be held", added.UsedUp)
	defer h.cut(0)()
	if e := lost.wait(t); e != unix.ENOLINK {
		t.Errorf("lost write: %v", e)
	}
	if e := h.send(s, writeBlock, "new").wait(t); e != unix.ENOLINK {
		t.Errorf("newer write: %v", e)
	}
	if e := h.send(s, readBlock, "").wait(t); e != 0 {
		t.Errorf("read: %v", e)
	}
}

// TestNoExtentOutlivesItsRemnant ends remnants while changes are barred because of them. An
// extent that stayed would hold all later changes to its blocks for ever.
func TestNoExtentOutlivesItsRemnant(t *testing.T) {
	h := newHall(t, 1, false, nil)
	s := h.connect(nil)
	ns := s.Namespaces()[0]
	r := &request{home: &nsQueue{ns: ns}}
	r.io = block.Request{Op: block.OpWrite, Sectors: 8}
	for range 20_000 {
		rem := &remnant{ctrl: s.paths()[0], over: make(chan struct{})}
		var both sync.WaitGroup
		for range 4 {
			both.Go(func() { ns.bar(rem, r) })
		}
		both.Go(func() { rem.end("the test says so") })
		both.Wait()
		if left := ns.barrier.Load(); left != nil {
			t.Fatalf("extents %v are left", *left)
		}
	}
}

// TestANATurns checks that no request fails while ANA groups change, in both orders, with a
// window in which no path can be used, whether the status or the event comes first.
func TestANATurns(t *testing.T) {
	h := newHall(t, 2, false, nil)
	s := h.connect(nil)
	f := newFrontEnd(t, s.Namespaces()[0], h.loops, 8, 16<<10, 3)
	f.start(4000)
	states := [][2]nvme.ANAState{
		{nvme.ANAOptimized, nvme.ANAInaccessible}, {nvme.ANAInaccessible, nvme.ANAInaccessible}, {nvme.ANAInaccessible, nvme.ANAOptimized},
		{nvme.ANAChange, nvme.ANAChange}, {nvme.ANANonOptimized, nvme.ANAPersistentLoss}, {nvme.ANAOptimized, nvme.ANAOptimized},
	}
	for round := range 4 {
		for i := range states {
			to := states[i]
			if round%2 == 1 {
				to = [2]nvme.ANAState{to[1], to[0]}
			}
			for n := range to {
				if err := h.subs[0].SetPortANAState(h.ports[n], 1, to[n]); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(30 * time.Millisecond)
		}
	}
	h.disks[0].SetANAGroup(2)
	h.subs[0].SetPortANAState(h.ports[0], 1, nvme.ANAPersistentLoss)
	h.subs[0].SetPortANAState(h.ports[0], 2, nvme.ANAInaccessible)
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
	waitFor(t, "the new group", func() bool {
		i := s.Info()
		return i.Paths[0].Access[1] == nvme.ANAInaccessible && i.Paths[1].Access[1] == nvme.ANAOptimized
	})
	if i := s.Info(); i.Paths[0].Losses+i.Paths[1].Losses != 0 {
		t.Errorf("losses: %v, %v", i.Paths[0].Reason, i.Paths[1].Reason)
	}
}

// TestLyingANALog checks that a path whose log says optimized, and whose commands end with an
// ANA status, does not stop requests: another path serves them.
func TestLyingANALog(t *testing.T) {
	h := newHall(t, 2, false, nil)
	s := h.connect(nil)
	fault := h.targets[0].Faults().Add(target.Fault{Match: target.Match{Port: 1}, Status: nvme.StatusANAInaccessible})
	defer fault.Remove()
	f := newFrontEnd(t, s.Namespaces()[0], h.loops, 8, 16<<10, 3)
	f.run(1000)
	f.close()
}

// TestBadANALog checks that a log that makes no sense leaves the path in use.
func TestBadANALog(t *testing.T) {
	h := newHall(t, 1, false, nil)
	fault := h.targets[0].Faults().Add(target.Fault{
		Match:   target.Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminGetLogPage}, Selectors: []uint8{nvme.LogANA}},
		Patches: []target.Patch{{Offset: 8, Bytes: []byte{0xFF, 0xFF}}},
	})
	defer fault.Remove()
	s := h.connect(nil)
	if e := h.send(s, writeBlock, "x").wait(t); e != 0 {
		t.Errorf("write: %v", e)
	}
}

// TestManyANAGroups checks that the states of all groups are read, also if the controller has
// as many as Linux' target can have, or more than fit into an admin buffer.
func TestManyANAGroups(t *testing.T) {
	const anagrpmax = 344 // in Identify Controller; NANAGRPID follows
	for _, n := range []uint32{128, 511, 512, 2000} {
		h := newHall(t, 1, false, nil)
		limit := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, n), 2*n)
		h.targets[0].Faults().Add(target.Fault{
			Match:   target.Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminIdentify}, Selectors: []uint8{nvme.CNSController}},
			Patches: []target.Patch{{Offset: anagrpmax, Bytes: limit}},
		})
		log := nvme.AppendANAHeader(nil, 1, uint16(n))
		for id := n; id > 0; id-- { // the group of the namespace is the last one
			log = nvme.AppendANAGroup(log, id, 1, nvme.ANANonOptimized)
		}
		h.targets[0].Faults().Add(target.Fault{
			Match:   target.Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminGetLogPage}, Selectors: []uint8{nvme.LogANA}},
			Patches: []target.Patch{{Bytes: log}},
		})
		s := h.connect(nil)
		if got := s.Info().Paths[0].Access[1]; got != nvme.ANANonOptimized {
			t.Errorf("%d groups: access %v", n, got)
		}
		if e := h.send(s, writeBlock, "x").wait(t); e != 0 {
			t.Errorf("%d groups: write: %v", n, e)
		}
	}
}

// TestLongTransition checks that a group that stays in transition for twice ANATT ends the
// association.
func TestLongTransition(t *testing.T) {
	h := newHall(t, 1, false, func(c *target.Config, _ *target.NamespaceConfig) { c.ANATransition = time.Second })
	s := h.connect(nil)
	h.subs[0].SetANAState(1, nvme.ANAChange)
	write := h.send(s, writeBlock, "x")
	waitFor(t, "the end of the association", func() bool { return s.Info().Paths[0].Outages.Losses[LossANA] > 0 })
	if write.ended() {
		t.Error("a request ended")
	}
	h.subs[0].SetANAState(1, nvme.ANAOptimized)
	if e := write.wait(t); e != 0 {
		t.Errorf("write: %v", e)
	}
}

// TestNoAccess checks that requests fail when no path has given access for longer than they may
// wait and a transition may take, that the namespace stays, and that it works again later.
func TestNoAccess(t *testing.T) {
	h := newHall(t, 2, false, func(c *target.Config, _ *target.NamespaceConfig) { c.ANATransition = time.Second })
	var changes atomic.Int32
	s := h.connect(func(c *Config) {
		c.FastIOFail, c.CtrlLoss = time.Second, 1500*time.Millisecond
		c.Changed = func(*Namespace, Change) { changes.Add(1) }
	})
	h.subs[0].SetANAState(1, nvme.ANAPersistentLoss)
	read := h.send(s, readBlock, "")
	ns := s.Namespaces()[0]
	waitFor(t, "no access", func() bool { _, waits := ns.Wait(); return waits })
	if w, _ := ns.Wait(); w.Left <= 0 || w.Left > 2*time.Second || w.Reason != "no path gives access to the namespace (ANA)" {
		t.Errorf("it waits for %+v", w)
	}
	if e := read.wait(t); e != unix.ENOLINK {
		t.Errorf("read without access: %v", e)
	}
	waitFor(t, "the time limit", func() bool { w, waits := ns.Wait(); return !waits || w.Left == 0 })
	s.expireHeld(time.Now()) // as after each look
	if w, waits := ns.Wait(); !waits || w.Left != 0 {
		t.Errorf("%t, %+v: requests do not fail", waits, w)
	}
	h.subs[0].SetANAState(1, nvme.ANAOptimized)
	waitFor(t, "access", func() bool { return s.Info().Paths[0].Access[1] == nvme.ANAOptimized })
	if n := changes.Load(); n != 0 {
		t.Errorf("the namespace has changed %d times", n)
	}
	if _, waits := ns.Wait(); waits {
		t.Error("requests wait")
	}
	if e := h.send(s, readBlock, "").wait(t); e != 0 {
		t.Errorf("read: %v", e)
	}
}

// TestPathStatusElsewhere checks that a command that ends with a path error goes over another
// path at once.
func TestPathStatusElsewhere(t *testing.T) {
	for _, status := range []nvme.Status{nvme.StatusInternalPathError, nvme.StatusControllerPathError, nvme.StatusHostPathError} {
		h := newHall(t, 2, false, nil)
		s := h.connect(func(c *Config) { c.Policy = Preferred })
		fault := h.targets[0].Faults().Add(target.Fault{Match: target.Match{Port: 1}, Status: status})
		began := time.Now()
		if e := h.send(s, writeBlock, "x").wait(t); e != 0 || time.Since(began) > pathRetryDelay {
			t.Errorf("%v: %v after %v", status, e, time.Since(began))
		}
		fault.Remove()
	}
}

// TestOtherStorage checks that a path with other storage is refused with words.
func TestOtherStorage(t *testing.T) {
	other := target.NewRAM(2 << 20)
	for name, c := range map[string]struct {
		set  func(*target.Config, *target.NamespaceConfig, *target.SubsystemConfig)
		want string
	}{
		"UUID":   {func(_ *target.Config, n *target.NamespaceConfig, _ *target.SubsystemConfig) { n.UUID = nvme.NewUUID() }, "another namespace has its id: its UUID was "},
		"NGUID":  {func(_ *target.Config, n *target.NamespaceConfig, _ *target.SubsystemConfig) { n.NGUID[0] = 1 }, "its NGUID is 0100"},
		"EUI":    {func(_ *target.Config, n *target.NamespaceConfig, _ *target.SubsystemConfig) { n.EUI64[0] = 1 }, "its EUI-64 is 01"},
		"no id":  {func(_ *target.Config, n *target.NamespaceConfig, _ *target.SubsystemConfig) { n.NoUUID = true }, "identifier"},
		"size":   {func(_ *target.Config, n *target.NamespaceConfig, _ *target.SubsystemConfig) { n.Store = other }, "its size in sectors is 4096, over another path it is 2048"},
		"block":  {func(_ *target.Config, n *target.NamespaceConfig, _ *target.SubsystemConfig) { n.BlockSize = 4096 }, "its block size was 512 and is 4096"},
		"serial": {func(_ *target.Config, _ *target.NamespaceConfig, s *target.SubsystemConfig) { s.Serial = "other" }, `the serial number is "other"`},
		"model":  {func(_ *target.Config, _ *target.NamespaceConfig, s *target.SubsystemConfig) { s.Model = "other" }, `the model number is "other"`},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHall(t, 1, false, nil)
			s := h.connect(nil)
			var cfg target.Config
			ns := target.NamespaceConfig{NSID: 1, Store: target.NewRAM(1 << 20), UUID: h.uuid}
			sub := target.SubsystemConfig{NQN: fakeNQN, AllowAny: true}
			c.set(&cfg, &ns, &sub)
			tg, err := target.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { tg.Close() })
			added, err := tg.AddSubsystem(sub)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := added.AddNamespace(ns); err != nil {
				t.Fatal(err)
			}
			h.addPort(tg, 1)
			if _, err := s.AddPath(t.Context(), h.path(1)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			if n := len(s.Info().Paths); n != 1 {
				t.Errorf("%d paths", n)
			}
			if e := h.send(s, writeBlock, "x").wait(t); e != 0 {
				t.Errorf("write: %v", e)
			}
		})
	}
}

// TestSameControllerID checks that a path is refused whose controller has the id of another path's.
func TestSameControllerID(t *testing.T) {
	h := newHall(t, 2, true, func(c *target.Config, _ *target.NamespaceConfig) { c.MinControllerID, c.MaxControllerID = 7, 7 })
	h.ports = h.ports[:1]
	s := h.connect(nil)
	const want = "path refused: its controller has id 7, as that of 192.0.2.10:4420 has"
	if _, err := s.AddPath(t.Context(), h.path(1)); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %q", err, want)
	}
}

// TestSameIdentifiers checks that a namespace is left out that has an identifier of another one, and
// is served when the other one is gone.
func TestSameIdentifiers(t *testing.T) {
	h := newHall(t, 1, false, nil)
	heard := make(chan string, 8)
	s := h.connect(func(c *Config) {
		c.Changed = func(ns *Namespace, what Change) { heard <- fmt.Sprint(ns.NSID(), " ", what) }
	})
	if _, err := h.subs[0].AddNamespace(target.NamespaceConfig{NSID: 2, Store: target.NewRAM(1 << 20), UUID: h.uuid}); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("namespace 2 is not used over this path: it has the UUID %v, as namespace 1 has", h.uuid)
	waitFor(t, "the refusal", func() bool { return s.Info().Paths[0].Refused != nil })
	if err := s.Info().Paths[0].Refused; err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	if e := h.send(s, writeBlock, "x").wait(t); e != 0 {
		t.Errorf("write: %v", e)
	}
	if err := h.subs[0].RemoveNamespace(1); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"1 removed", "2 added"} {
		if got := <-heard; got != want {
			t.Errorf("heard %q, want %q", got, want)
		}
	}
	waitFor(t, "the refusal to be over", func() bool { return s.Info().Paths[0].Refused == nil })
}

// TestStorageChangesBehindPath checks that a path that comes back with other storage is not
// used, while the other path serves.
func TestStorageChangesBehindPath(t *testing.T) {
	h := newHall(t, 2, true, nil)
	s := h.connect(func(c *Config) { c.KeepAlive = 200 * time.Millisecond })
	mend := h.cut(1)
	if _, err := h.subs[1].ReplaceNamespace(target.NamespaceConfig{NSID: 1, Store: target.NewRAM(1 << 20)}); err != nil {
		t.Fatal(err)
	}
	mend()
	waitFor(t, "the refusal", func() bool { return s.Info().Paths[1].Refused != nil })
	for range 20 {
		if e := h.send(s, readBlock, "").wait(t); e != 0 {
			t.Fatalf("read: %v", e)
		}
	}
	if n := len(s.Namespaces()); n != 1 || s.Namespaces()[0].presence.Load() != served {
		t.Errorf("%d namespaces", n)
	}
	defer h.cut(0)() // now only the wrong one is left
	f := h.send(s, readBlock, "")
	waitFor(t, "the loss", func() bool { return s.Info().Paths[0].State == StateConnecting })
	time.Sleep(100 * time.Millisecond)
	if f.ended() {
		t.Error("a request was sent to other storage")
	}
	h.fabric.SetRefuse(portAddr(0), 0, nil)
	if e := f.wait(t); e != 0 {
		t.Errorf("read: %v", e)
	}
}

// TestNamespaceLeavesPaths checks that a namespace that one controller loses stays while another
// has it, and is gone with the last one.
func TestNamespaceLeavesPaths(t *testing.T) {
	h := newHall(t, 2, true, nil)
	heard := make(chan Change, 8)
	s := h.connect(func(c *Config) { c.Changed = func(_ *Namespace, what Change) { heard <- what } })
	h.subs[0].RemoveNamespace(1)
	waitFor(t, "the loss over the first path", func() bool { _, has := s.Info().Paths[0].Access[1]; return !has })
	if e := h.send(s, writeBlock, "x").wait(t); e != 0 {
		t.Errorf("write: %v", e)
	}
	h.subs[1].RemoveNamespace(1)
	if got := <-heard; got != Removed {
		t.Errorf("heard %v", got)
	}
}

// TestNamespaceLeavesPathInFlight checks that a command that one controller refuses, because it has
// lost the namespace, goes over another path that has it. It fails if no path has it.
func TestNamespaceLeavesPathInFlight(t *testing.T) {
	h := newHall(t, 2, true, nil)
	s := h.connect(func(c *Config) { c.Policy = Preferred })
	refuse := func(n int) {
		h.targets[n].Faults().Add(target.Fault{Match: target.Match{Opcodes: []nvme.Opcode{nvme.OpWrite}}, Count: 1, Status: nvme.StatusInvalidNamespace | nvme.StatusDNR})
	}
	refuse(0)
	if e := h.send(s, writeBlock, "x").wait(t); e != 0 {
		t.Errorf("one path refuses: %v", e)
	}
	refuse(0)
	refuse(1)
	if e := h.send(s, writeBlock, "x").wait(t); e != unix.ENODEV {
		t.Errorf("both paths refuse: %v", e)
	}
}

// TestStatusOfLostAssociation checks that an error status that comes after the association was lost
// does not fail a request: targets that go away answer with errors.
func TestStatusOfLostAssociation(t *testing.T) {
	var armed atomic.Bool
	var s *lookSetup
	s = newLookSetup(t, func(f *fakeTarget, _ *Config) {
		f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
			if qid == 0 || cmd.Opcode() != nvme.OpWrite || !armed.Swap(false) {
				return 0, false
			}
			s.sub.Paths()[0].current().fail(errors.New("lost"))
			return nvme.StatusInvalidNamespace | nvme.StatusDNR, true
		}
	})
	for range 20 {
		waitFor(t, "the association", func() bool { return s.sub.Info().State == StateLive })
		armed.Store(true)
		if e := s.write(t, s.sub.Namespaces()[0]); e != 0 {
			t.Fatalf("write: %v", e)
		}
	}
}

// TestResizeOverPaths checks that a larger size counts when all paths have it, and a smaller
// one at once.
func TestResizeOverPaths(t *testing.T) {
	stores := []*target.RAM{target.NewRAM(1 << 20), target.NewRAM(1 << 20)}
	n := 0
	h := newHall(t, 2, true, func(_ *target.Config, ns *target.NamespaceConfig) { ns.Store = stores[n]; n++ })
	s := h.connect(nil)
	resize := func(n int, size int64) {
		stores[n].Resize(size)
		h.disks[n].Revalidate()
	}
	sectorsOver := func(slot int) uint64 {
		ns := s.Namespaces()[0]
		ns.mu.Lock()
		defer ns.mu.Unlock()
		return ns.findings[slot].geometry.Sectors
	}
	resize(0, 2<<20)
	waitFor(t, "the size over the first path", func() bool { return sectorsOver(0) == 4096 })
	if got := s.Namespaces()[0].Geometry().Sectors; got != 2048 {
		t.Errorf("%d sectors while one path has the old size", got)
	}
	resize(1, 2<<20)
	waitFor(t, "the new size", func() bool { return s.Namespaces()[0].Geometry().Sectors == 4096 })
	resize(1, 1<<20)
	waitFor(t, "the smaller size", func() bool { return s.Namespaces()[0].Geometry().Sectors == 2048 })
}

// TestLastPathWhileAnotherIsAdded: a path that is being added is not yet one with which the
// subsystem can live.
func TestLastPathWhileAnotherIsAdded(t *testing.T) {
	h := newHall(t, 2, false, nil)
	s := h.connect(nil)
	first := s.Paths()[0]
	at := s.Paths()[1].cfg.Path
	if err := s.RemovePath(t.Context(), s.Paths()[1]); err != nil {
		t.Fatal(err)
	}
	c, err := s.reservePath(at) // as AddPath does before it connects
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RemovePath(t.Context(), first); !errors.Is(err, ErrLastPath) {
		t.Errorf("the only path that is connected was removed: %v", err)
	}
	if err := s.dropPath(c); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AddPath(t.Context(), at); err != nil {
		t.Fatal(err)
	}
	if err := s.RemovePath(t.Context(), first); err != nil {
		t.Errorf("the other path was added: %v", err)
	}
}

// TestOutageBeginsWithRemoval: the time for which requests may wait begins when the last path that
// is connected is removed, not when the path that remains was lost.
func TestOutageBeginsWithRemoval(t *testing.T) {
	h := newHall(t, 2, false, nil)
	s := h.connect(func(c *Config) { c.CtrlLoss = time.Hour })
	first, second := s.Paths()[0], s.Paths()[1]
	set := func(a *association, outage time.Time) (was *association) {
		second.mu.Lock()
		defer second.mu.Unlock()
		was, second.assoc, second.outage = second.assoc, a, outage
		return was
	}
	a := set(nil, time.Now().Add(-2*time.Hour)) // as if it had been lost
	if err := s.RemovePath(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	began, out := s.outageBegan()
	s.mu.Unlock()
	if !out || time.Since(began) > time.Hour {
		t.Errorf("out %t since %v", out, began)
	}
	set(a, time.Time{})
}

// TestAddAndRemovePaths adds and removes paths under load.
func TestAddAndRemovePaths(t *testing.T) {
	h := newHall(t, 3, false, nil)
	s := h.connect(nil)
	f := newFrontEnd(t, s.Namespaces()[0], h.loops, 16, 16<<10, 5)
	f.start(30000)
	for n := range 12 {
		p := s.Paths()[n%3]
		at := p.cfg.Path
		if err := s.RemovePath(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		if _, err := s.AddPath(t.Context(), at); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
	if _, err := s.AddPath(t.Context(), h.path(1)); !errors.Is(err, ErrPathExists) {
		t.Errorf("the same path again: %v", err)
	}
	for range 2 {
		if err := s.RemovePath(t.Context(), s.Paths()[0]); err != nil {
			t.Error(err)
		}
	}
	if err := s.RemovePath(t.Context(), s.Paths()[0]); !errors.Is(err, ErrLastPath) {
		t.Errorf("the last path: %v", err)
	}
}

// TestAllPathsDown checks that requests fail after fast_io_fail_tmo when all paths are down,
// and work again when one is back; and that the loss of one path takes nothing away.
func TestAllPathsDown(t *testing.T) {
	h := newHall(t, 2, false, nil)
	s := h.connect(func(c *Config) { c.FastIOFail, c.CtrlLoss = 300*time.Millisecond, 600*time.Millisecond })
	mend := []func(){h.cut(0)}
	waitFor(t, "more than ctrl_loss_tmo", func() bool { return s.Info().Paths[0].Outages.Time > time.Second })
	if e := h.send(s, readBlock, "").wait(t); e != 0 || s.Info().State != StateLive {
		t.Errorf("one path: %v, %v", e, s.Info().State)
	}
	mend = append(mend, h.cut(1))
	if e := h.send(s, readBlock, "").wait(t); e != unix.ENOLINK {
		t.Errorf("no path: %v", e)
	}
	mend[0]()
	waitFor(t, "the first path", func() bool { return s.Info().State == StateLive })
	if e := h.send(s, readBlock, "").wait(t); e != 0 {
		t.Errorf("the first path is back: %v", e)
	}
	mend[1]()
}

// TestKeepPath checks that a path that cannot be reached at first is used when it can.
func TestKeepPath(t *testing.T) {
	h := newHall(t, 2, false, nil)
	h.ports = h.ports[:1]
	s := h.connect(nil)
	h.fabric.SetRefuse(portAddr(1), rdma.RejectInvalidServiceID, nil)
	if _, err := s.KeepPath(h.path(1)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "an attempt", func() bool { return s.Info().Paths[1].Attempts > 1 })
	h.fabric.SetRefuse(portAddr(1), 0, nil)
	waitFor(t, "the path", func() bool { return s.Info().Paths[1].State == StateLive })
}

// TestRegrantOnOnePath changes the grant of one path while the other serves.
func TestRegrantOnOnePath(t *testing.T) {
	h := newHall(t, 2, false, nil)
	h.loops = append(h.loops, newLoops(t, 1)...)
	s := h.connect(func(c *Config) { c.Queues = poller.Request{IO: min(2, runtime.NumCPU()), Write: 1, Poll: 1} })
	f := newFrontEnd(t, s.Namespaces()[0], h.loops[:len(s.lanes)], 8, 16<<10, 5)
	f.start(4000)
	for i, grant := range []int{5, 3, 1, 4} {
		h.targets[0].Faults().Grant(grant)
		h.fabric.KillAll(sideAddr(0))
		waitFor(t, "the path", func() bool { p := s.Info().Paths[0]; return p.State == StateLive && p.Losses == i+1 })
		if got := s.Info().Paths[0].Plan.Granted; got != min(grant, s.cfg.Queues.Total()) {
			t.Errorf("%d queues of %d", got, grant)
		}
	}
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
}

// TestPathsUnderLoad cuts and mends paths under verified load.
func TestPathsUnderLoad(t *testing.T) {
	h := newHall(t, 2, false, nil)
	s := h.connect(func(c *Config) { c.Policy = RoundRobin })
	h.vouched(s)
	f := newFrontEnd(t, s.Namespaces()[0], h.loops, 16, 16<<10, 9)
	f.start(60000)
	for n := range 10 {
		mend := h.cut(n % 2)
		waitFor(t, "the loss", func() bool { return s.Info().Paths[n%2].State == StateConnecting })
		mend()
		waitFor(t, "both paths", func() bool {
			i := s.Info()
			return i.Paths[0].State == StateLive && i.Paths[1].State == StateLive
		})
	}
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
}

// FuzzANALog checks that no log makes the parser panic, or gives a state that is not defined.
func FuzzANALog(f *testing.F) {
	log := nvme.AppendANAHeader(nil, 3, 2)
	log = nvme.AppendANAGroup(log, 1, 1, nvme.ANAOptimized, 1, 2)
	log = nvme.AppendANAGroup(log, 2, 2, nvme.ANAChange)
	f.Add(log, uint32(32))
	f.Add(log[:40], uint32(32))
	f.Add(log, uint32(1))
	f.Add(nvme.AppendANAGroup(nvme.AppendANAGroup(nvme.AppendANAHeader(nil, 0, 2), 1, 0, 1), 1, 0, 1), uint32(4))
	f.Fuzz(func(t *testing.T, log []byte, most uint32) {
		groups, err := groupsOf(log, most)
		for id, state := range groups {
			if err != nil || id == 0 || id > most || !strings.Contains("optimized non-optimized inaccessible persistent-loss change", fmt.Sprint(state)) {
				t.Errorf("group %d: %v, error %v", id, state, err)
			}
		}
	})
}

// FuzzSecondPath has the controller of a second path say anything of itself, of its namespaces and of
// its ANA groups, while requests use both paths. Whatever it says, the path is used or refused with
// words, and the data are right.
func FuzzSecondPath(f *testing.F) {
	patch := func(log, selector uint8, offset int, bytes ...byte) { f.Add(log != 0, selector, uint16(offset), bytes) }
	for _, at := range []int{0, 4, 24, 76, 77, 78, 92, 111, 256, 320, 342, 343, 344, 348, 386, 512, 514, 516, 520, 525, 536, 768, 1792, 1796, 1800} {
		patch(0, nvme.CNSController, at, 0xFF, 0xFF, 0xFF, 0xFF)
		patch(0, nvme.CNSController, at, 0, 0)
	}
	for _, at := range []int{0, 8, 16, 24, 25, 26, 30, 33, 92, 99, 104, 120, 128, 130} {
		patch(0, nvme.CNSNamespace, at, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F)
		patch(0, nvme.CNSNamespace, at, 0, 0, 0, 0, 0, 0, 0, 0)
	}
	patch(0, nvme.CNSActiveNSList, 0, 1, 0, 0, 0, 1, 0, 0, 0)
	patch(0, nvme.CNSActiveNSList, 0, 0xFF, 0xFF, 0xFF, 0xFF)
	patch(0, nvme.CNSActiveNSList, 0, make([]byte, 8)...)
	patch(0, nvme.CNSNamespaceDescriptors, 0, 3, 16, 0, 0, 1)
	patch(0, nvme.CNSNamespaceDescriptors, 0, 1, 0xFF)
	patch(0, nvme.CNSNamespaceDescriptors, 4, 9, 9, 9)
	patch(0, nvme.CNSNSIndependent, 0, 0xFF, 0xFF, 0xFF)
	for _, at := range []int{8, 16, 20, 24, 32} {
		patch(1, nvme.LogANA, at, 0xFF, 0xFF, 0xFF, 0xFF)
		patch(1, nvme.LogANA, at, 0)
	}
	h := newHall(f, 2, false, nil)
	h.ports = h.ports[:1]
	s := h.connect(func(c *Config) { c.Policy, c.AdminTimeout = RoundRobin, 300*time.Millisecond })
	round := 0
	f.Fuzz(func(t *testing.T, log bool, selector uint8, offset uint16, bytes []byte) {
		opcode := nvme.AdminIdentify
		if log {
			opcode = nvme.AdminGetLogPage
		}
		fault := h.targets[0].Faults().Add(target.Fault{
			Match:   target.Match{Port: 2, Admin: true, Opcodes: []nvme.Opcode{opcode}, Selectors: []uint8{selector}},
			Patches: []target.Patch{{Offset: int(offset), Bytes: bytes}},
		})
		defer fault.Remove()
		c, err := s.AddPath(t.Context(), h.path(1))
		if err == nil {
			defer func() {
				if err := s.RemovePath(t.Context(), c); err != nil {
					t.Errorf("remove path: %v", err)
				}
			}()
		} else if err.Error() == "" {
			t.Error("refused without words")
		}
		h := &hall{t: t, loops: h.loops}
		for range 4 {
			round++
			want := fmt.Sprintf("%08d", round)
			if e := h.send(s, writeBlock, want).wait(t); e != 0 {
				t.Errorf("write: %v", e)
			}
			read := h.send(s, readBlock, "")
			waitFor(t, "the read", read.ended)
			got := ""
			h.loops[0].Call(func() { got = string(read.q.Buffer(0)[:8]) })
			if e := read.wait(t); e != 0 || got != want {
				t.Errorf("read %q, %v, want %q", got, e, want)
			}
		}
	})
}

// TestIDsAreReused checks that paths come back if the target gives the id of an old controller
// to another path.
func TestIDsAreReused(t *testing.T) {
	h := newHall(t, 2, false, func(c *target.Config, _ *target.NamespaceConfig) { c.MaxControllerID = c.MinControllerID + 1 })
	s := h.connect(func(c *Config) { c.KeepAlive = 200 * time.Millisecond })
	for round := range 6 {
		h.vouched(s)
		mend := []func(){h.cut(0), h.cut(1)}
		waitFor(t, "the loss of both", func() bool { return s.Info().State == StateConnecting })
		waitFor(t, "the end of the old controllers", func() bool { return len(h.targets[0].Snapshot().Controllers) == 0 })
		mend[(round+1)%2]()
		waitFor(t, "one path", func() bool { return s.Info().State == StateLive })
		mend[round%2]()
		waitFor(t, "both paths", func() bool {
			i := s.Info()
			return i.Paths[0].State == StateLive && i.Paths[1].State == StateLive
		})
	}
}

// BenchmarkPaths reads 4 KiB at queue depth 32 with two loops and two queue pairs in total, of one
// path or of two.
func BenchmarkPaths(b *testing.B) {
	for _, paths := range []int{1, 2} {
		b.Run(fmt.Sprintf("%d", paths), func(b *testing.B) {
			h := newHall(b, paths, false, nil)
			h.loops = append(h.loops, newLoops(b, 1)...)
			if err := h.subs[0].SetMaxQueues(2 / paths); err != nil {
				b.Fatal(err)
			}
			s := h.connect(nil)
			var readers []*reader
			for i := range h.loops {
				q, err := s.Namespaces()[0].OpenQueue(i, block.QueueConfig{Depth: 16, MaxIO: 4096})
				if err != nil {
					b.Fatal(err)
				}
				r := &reader{queue: q, sectors: 8, batch: make([]block.Request, 0, 16), results: make([]block.Result, 16), done: make(chan struct{}, 1)}
				for tag := range 16 {
					r.ready = append(r.ready, uint16(tag))
				}
				readers = append(readers, r)
				h.loops[i].Call(func() { h.loops[i].Attach(r) })
			}
			b.ReportAllocs()
			cpu := cpuTime(b)
			b.ResetTimer()
			for i, r := range readers {
				h.loops[i].Call(func() { r.left = b.N })
			}
			for _, r := range readers {
				<-r.done
			}
			b.StopTimer()
			b.ReportMetric(float64(cpuTime(b)-cpu)/float64(b.N*len(readers)), "cpu-ns/op")
			for i, r := range readers {
				h.loops[i].Call(func() { h.loops[i].Detach(r) })
				if r.failed {
					b.Fatal("a read failed")
				}
				if err := r.queue.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestRecordedControllers checks that the controllers of all paths, and those whose end is not
// known, are recorded before another one is used.
func TestRecordedControllers(t *testing.T) {
	h := newHall(t, 3, true, nil) // nobody vouches
	h.ports = h.ports[:2]
	records := make(chan []ControllerID, 8)
	s := h.connect(func(c *Config) {
		c.Policy, c.KeepAlive = Preferred, time.Second
		c.Associated = func(all []ControllerID) error { records <- all; return nil }
	})
	ids := []ControllerID{}
	for n, p := range s.Info().Paths {
		ids = append(ids, ControllerID{p.Address, p.CNTLID})
		if got := <-records; !slices.Equal(got, ids) {
			t.Errorf("path %d: recorded %v, want %v", n, got, ids)
		}
	}
	added := h.targets[0].Faults().Add(target.Fault{Match: target.Match{Opcodes: []nvme.Opcode{nvme.OpWrite}}, Count: 1, Hold: 100 * time.Millisecond})
	lost := h.send(s, writeBlock, "old")
	waitFor(t, "the write to be held", added.UsedUp)
	defer h.cut(0)()
	waitFor(t, "the loss", func() bool { return s.Info().Paths[0].State == StateConnecting })
	if _, err := s.AddPath(t.Context(), h.path(2)); err != nil {
		t.Fatal(err)
	}
	p := s.Info().Paths[2]
	ids = append(ids, ControllerID{p.Address, p.CNTLID})
	if got := <-records; !slices.Equal(got, ids) {
		t.Errorf("with a lost path: recorded %v, want %v", got, ids)
	}
	if e := lost.wait(t); e != 0 {
		t.Errorf("lost write: %v", e)
	}
	if err := s.RemovePath(t.Context(), s.Paths()[2]); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AddPath(t.Context(), h.path(2)); err != nil {
		t.Fatal(err)
	}
	p = s.Info().Paths[2]
	if got, want := <-records, []ControllerID{ids[1], {p.Address, p.CNTLID}}; !slices.Equal(got, want) {
		t.Errorf("after the end of the old controllers: recorded %v, want %v", got, want)
	}
}

// TestLinkDown checks that a path whose port loses its link is left at once if there is another
// one, and kept otherwise.
func TestLinkDown(t *testing.T) {
	h := newHall(t, 2, false, nil)
	s := h.connect(nil)
	down := func(n int) {
		a := s.Paths()[n].current()
		a.event(rdma.Event{Type: rdma.EventPortDown}, 1)
	}
	down(0)
	waitFor(t, "the loss", func() bool { return s.Info().Paths[0].Outages.Losses[LossLinkDown] == 1 })
	waitFor(t, "the path", func() bool { return s.Info().Paths[0].State == StateLive })
	if err := s.RemovePath(t.Context(), s.Paths()[0]); err != nil {
		t.Fatal(err)
	}
	down(0)
	if e := h.send(s, writeBlock, "x").wait(t); e != 0 {
		t.Errorf("write: %v", e)
	}
	if p := s.Info().Paths[0]; p.Losses != 0 {
		t.Errorf("the only path was lost: %v", p.Reason)
	}
}

// TestRoCEPaths checks over a real network that requests go on within 100 ms after the loss of a
// path, and that verified I/O survives losses of both paths in turn.
func TestRoCEPaths(t *testing.T) {
	w := newWire(t, target.Config{}, target.NamespaceConfig{})
	addr := wireAddr()
	p, err := roce.New(roce.Config{Addrs: []netip.Addr{addr}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ports, err := w.target.AddPorts(target.PortConfig{Provider: p, Addr: netip.AddrPortFrom(addr, 4420)})
	if err != nil {
		t.Fatal(err)
	}
	defer ports[0].Close()
	loops := newLoops(t, 1)
	cfg := w.config(loops, poller.Request{IO: 1})
	s := connect(t, cfg)
	defer closeSubsystem(t, s)
	if _, err := s.AddPath(t.Context(), Path{Provider: w.host, Address: ports[0].Addr()}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the vouching", func() bool {
		i := s.Info()
		return len(i.Paths[0].Vouched) == 1 && len(i.Paths[1].Vouched) == 1
	})
	ports = w.target.Ports()
	f := newFrontEnd(t, s.Namespaces()[0], loops, 16, 64<<10, 21)
	f.start(8000)
	for n := range 8 {
		ports[n%2].Disconnect()
		waitFor(t, "the loss and the next association", func() bool {
			i := s.Info()
			return i.Paths[n%2].Losses == n/2+1 && i.Paths[0].State == StateLive && i.Paths[1].State == StateLive
		})
	}
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
	if err := s.SetPolicy(Preferred, s.Paths()[0]); err != nil {
		t.Fatal(err)
	}
	h := &hall{t: t, loops: loops}
	w.target.Faults().Add(target.Fault{Match: target.Match{Port: 1}, Count: 1, Drop: true})
	read := h.send(s, readBlock, "")
	waitFor(t, "the read", func() bool { return s.inflight()[0] == 1 })
	began := time.Now()
	ports[0].Disconnect()
	if e := read.wait(t); e != 0 {
		t.Errorf("read: %v", e)
	}
	took := time.Since(began)
	t.Logf("a read goes on after %v", took)
	if took > 100*time.Millisecond {
		t.Errorf("a read goes on after %v", took)
	}
}

// TestOutliveElsewhere checks that the end of a controller of an earlier process, to whose address
// there is no path, is learned from another path if the target there knows the controller. The word
// of a target that has never known it is no proof: time is.
func TestOutliveElsewhere(t *testing.T) {
	const keepAlive = 200 * time.Millisecond
	for name, c := range map[string]struct{ separate, none bool }{"same target": {}, "separate targets": {separate: true}, "no fence": {separate: true, none: true}} {
		t.Run(name, func(t *testing.T) {
			h := newHall(t, 2, c.separate, nil)
			cfg := testConfig(nil, h.loops, poller.Request{IO: 1})
			cfg.Path, cfg.KeepAlive, cfg.NoFence = h.path(1), keepAlive, c.none
			s := connect(t, cfg)
			t.Cleanup(func() { closeSubsystem(t, s) })
			earlier := testConfig(nil, h.loops, poller.Request{IO: 1})
			earlier.Path, earlier.HostID = h.path(0), cfg.HostID
			first := connect(t, earlier)
			leave := sync.OnceFunc(func() { closeSubsystem(t, first) })
			t.Cleanup(leave)
			id := ControllerID{h.path(0).Address, first.Info().Paths[0].CNTLID}
			began, over := time.Now(), make(chan error, 1)
			go func() { over <- s.Outlive(t.Context(), keepAlive, id) }()
			if !c.separate {
				select {
				case err := <-over:
					t.Errorf("%v while the controller exists", err)
				case <-time.After(2 * (3*keepAlive + time.Second)):
				}
				leave()
			}
			if err := <-over; err != nil {
				t.Error(err)
			}
			if took := time.Since(began); c.separate && took < 3*keepAlive+time.Second != c.none {
				t.Errorf("it took %v", took)
			}
		})
	}
}
