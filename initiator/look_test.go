package initiator

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/loglimit"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/rdmatest"
)

// lookSetup is a controller with a fake target whose namespaces change.
type lookSetup struct {
	fabric *rdmatest.Fabric
	target *fakeTarget
	loops  []*poller.Loop
	sub    *Subsystem
	heard  chan string
}

func newLookSetup(t *testing.T, set func(*fakeTarget, *Config)) *lookSetup {
	t.Helper()
	s := &lookSetup{fabric: rdmatest.NewFabric(), loops: newLoops(t, 1), heard: make(chan string, 64)}
	s.target = newFakeTarget(t, s.fabric, 1<<20)
	cfg := testConfig(s.fabric.Provider(hostAddr), s.loops, poller.Request{IO: 1})
	cfg.ReconnectDelay = 10 * time.Millisecond
	cfg.Changed = func(ns *Namespace, what Change) { s.heard <- fmt.Sprintf("%d %v", ns.NSID(), what) }
	if set != nil {
		set(s.target, &cfg)
	}
	s.sub = connect(t, cfg)
	t.Cleanup(func() { closeSubsystem(t, s.sub) })
	return s
}

// restart changes the target while the host is cut off from it.
func (s *lookSetup) restart(change func(*fakeTarget)) {
	s.target.mu.Lock()
	change(s.target)
	s.target.mu.Unlock()
	s.fabric.KillAll(hostAddr)
}

func (s *lookSetup) expect(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-s.heard:
		if got != want {
			t.Fatalf("heard %q, want %q", got, want)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("%q was not heard", want)
	}
}

func (s *lookSetup) expectNothing(t *testing.T) {
	t.Helper()
	select {
	case got := <-s.heard:
		t.Fatalf("heard %q", got)
	default:
	}
}

func (s *lookSetup) write(t *testing.T, ns *Namespace) unix.Errno {
	t.Helper()
	return unix.Errno(single(t, s.loops[0], ns, block.Request{Op: block.OpWrite, Sectors: 8}))
}

// isLook reports whether a command belongs to a look at namespaces.
func isLook(qid uint16, cmd *nvme.Command) bool {
	return qid == 0 && cmd.Opcode() == nvme.AdminIdentify && cmd.CNS() != nvme.CNSController
}

// TestLookFails checks that the failure of one command of the look after an event does
// not affect the present namespaces, and that a later look finds the new one.
func TestLookFails(t *testing.T) {
	for _, status := range []nvme.Status{nvme.StatusInternal, nvme.StatusANAInaccessible, nvme.StatusNamespaceNotReady, nvme.StatusInternal | nvme.StatusDNR} {
		for skip := range 8 {
			t.Run(fmt.Sprintf("%v, command %d", status, skip), func(t *testing.T) {
				var left atomic.Int32 // commands until the one that fails
				left.Store(-1)
				s := newLookSetup(t, func(f *fakeTarget, _ *Config) {
					f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
						return status, isLook(qid, cmd) && left.Add(-1) == 0
					}
				})
				ns := s.sub.Namespaces()[0]
				left.Store(int32(skip + 1))
				s.target.change(func() { s.target.namespaces = []uint32{1, 5} })
				s.expect(t, "5 added")
				if e := s.write(t, ns); e != 0 {
					t.Errorf("write: %v", e)
				}
				s.expectNothing(t)
			})
		}
	}
}

// TestPartlyIdentified checks that a namespace that cannot be identified does not prevent
// the others from being served, neither at the first connect nor at a later one, and that
// it is added when it can be identified.
func TestPartlyIdentified(t *testing.T) {
	for _, status := range []nvme.Status{nvme.StatusInternal, nvme.StatusANAInaccessible, nvme.StatusNamespaceNotReady, nvme.StatusInternal | nvme.StatusDNR} {
		t.Run(status.String(), func(t *testing.T) {
			var fails atomic.Bool
			fails.Store(true)
			s := newLookSetup(t, func(f *fakeTarget, _ *Config) {
				f.namespaces = []uint32{1, 2}
				f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
					return status, isLook(qid, cmd) && cmd.CNS() == nvme.CNSNamespace && cmd.NSID() == 2 && fails.Load()
				}
			})
			if all := s.sub.Namespaces(); len(all) != 1 || all[0].NSID() != 1 {
				t.Fatalf("%d namespaces", len(all))
			}
			s.restart(func(*fakeTarget) {})
			if e := s.write(t, s.sub.Namespaces()[0]); e != 0 {
				t.Errorf("write: %v", e)
			}
			fails.Store(false)
			s.expect(t, "2 added")
		})
	}
}

// TestIdentifiers checks which identifiers identify a namespace after an outage.
func TestIdentifiers(t *testing.T) {
	refused := func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
		return nvme.StatusInvalidField | nvme.StatusDNR, isLook(qid, cmd) && cmd.CNS() == nvme.CNSNamespaceDescriptors
	}
	t.Run("another NGUID without descriptors", func(t *testing.T) {
		s := newLookSetup(t, func(f *fakeTarget, _ *Config) { f.intercept, f.nguid = refused, [16]byte{0xaa} })
		ns := s.sub.Namespaces()[0]
		s.restart(func(f *fakeTarget) { f.nguid = [16]byte{0xbb} })
		s.expect(t, "1 removed")
		s.expect(t, "1 added")
		if e := s.write(t, ns); e != unix.ENODEV {
			t.Errorf("write: %v", e)
		}
		if n := s.target.commands[nvme.OpWrite]; n != 0 {
			t.Errorf("%d writes reached the other volume", n)
		}
	})
	t.Run("the same NGUID without descriptors", func(t *testing.T) {
		s := newLookSetup(t, func(f *fakeTarget, _ *Config) { f.intercept, f.nguid = refused, [16]byte{0xaa} })
		s.restart(func(*fakeTarget) {})
		if e := s.write(t, s.sub.Namespaces()[0]); e != 0 {
			t.Errorf("write: %v", e)
		}
	})
	t.Run("descriptors are gone for a while", func(t *testing.T) {
		var gone atomic.Bool
		s := newLookSetup(t, func(f *fakeTarget, _ *Config) {
			f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
				status, answer := refused(qid, cmd)
				return status, answer && gone.Load()
			}
		})
		gone.Store(true)
		s.restart(func(*fakeTarget) {})
		done := make(chan unix.Errno, 1)
		go func() { done <- s.write(t, s.sub.Namespaces()[0]) }()
		select {
		case e := <-done:
			t.Fatalf("write to a namespace that is not known: %v", e)
		case <-time.After(300 * time.Millisecond):
		}
		gone.Store(false)
		if e := <-done; e != 0 {
			t.Errorf("write: %v", e)
		}
		s.expectNothing(t)
	})
}

// TestLateNamespaces checks that requests wait for the namespaces of a target that opens
// its port before its namespaces exist, as they wait for the target itself.
func TestLateNamespaces(t *testing.T) {
	t.Run("come back", func(t *testing.T) {
		s := newLookSetup(t, nil)
		s.restart(func(f *fakeTarget) { f.namespaces = nil })
		done := make(chan unix.Errno, 1)
		go func() { done <- s.write(t, s.sub.Namespaces()[0]) }()
		waitFor(t, "the next association", func() bool { i := s.sub.Info().Paths[0]; return i.State == StateLive && i.Losses == 1 })
		// Another namespace comes first, with an event.
		s.target.change(func() { s.target.namespaces = []uint32{7} })
		s.expect(t, "7 added")
		s.target.mu.Lock()
		s.target.namespaces = []uint32{1, 7}
		s.target.mu.Unlock()
		if e := <-done; e != 0 {
			t.Errorf("write: %v", e)
		}
		s.expectNothing(t)
	})
	t.Run("fast_io_fail_tmo", func(t *testing.T) {
		s := newLookSetup(t, func(_ *fakeTarget, cfg *Config) { cfg.FastIOFail = 200 * time.Millisecond })
		ns := s.sub.Namespaces()[0]
		s.restart(func(f *fakeTarget) { f.namespaces = nil })
		if e := s.write(t, ns); e != unix.ENOLINK {
			t.Errorf("write: %v", e)
		}
		s.target.change(func() { s.target.namespaces = []uint32{1} })
		waitFor(t, "the namespace", func() bool { return s.write(t, ns) == 0 })
		s.expectNothing(t)
	})
	t.Run("ctrl_loss_tmo", func(t *testing.T) {
		s := newLookSetup(t, func(_ *fakeTarget, cfg *Config) { cfg.CtrlLoss = time.Second })
		ns := s.sub.Namespaces()[0]
		s.restart(func(f *fakeTarget) { f.namespaces = nil })
		if e := s.write(t, ns); e != unix.ENODEV {
			t.Errorf("write: %v", e)
		}
		s.expect(t, "1 removed")
	})
}

// TestEventFlood checks that a target cannot fill the log with events.
func TestEventFlood(t *testing.T) {
	var mu sync.Mutex
	var out bytes.Buffer
	s := newLookSetup(t, func(_ *fakeTarget, cfg *Config) {
		cfg.Log = slog.New(slog.NewTextHandler(lockedWriter{&mu, &out}, nil))
	})
	const more = 20
	for range loglimit.Burst + more {
		s.target.change(func() {})
	}
	waitFor(t, "the events", func() bool {
		s.target.mu.Lock()
		defer s.target.mu.Unlock()
		return len(s.target.events) == 0
	})
	mu.Lock()
	defer mu.Unlock()
	if n := strings.Count(out.String(), "asynchronous event"); n > loglimit.Burst+more/2 {
		t.Errorf("%d of %d events were logged", n, loglimit.Burst+more)
	}
}

// TestUnansweredLook checks that a look without an answer ends the association, and that
// the next one finds everything.
func TestUnansweredLook(t *testing.T) {
	var lose atomic.Bool
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		cfg.AdminTimeout = 300 * time.Millisecond
		f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
			return noAnswer, isLook(qid, cmd) && cmd.CNS() == nvme.CNSActiveNSList && lose.Swap(false)
		}
	})
	lose.Store(true)
	s.target.change(func() { s.target.namespaces = []uint32{1, 5} })
	s.expect(t, "5 added")
	if i := s.sub.Info().Paths[0]; i.Losses != 1 {
		t.Errorf("%d associations lost, reason %v", i.Losses, i.Reason)
	}
}

// TestLostAnswerAtReconnect checks that a response that is lost while an association is
// made again costs the waiting I/O a connect timeout, not the admin timeout.
func TestLostAnswerAtReconnect(t *testing.T) {
	var lose atomic.Int32
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		cfg.AdminTimeout, cfg.ConnectTimeout = time.Hour, 500*time.Millisecond
		f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
			return noAnswer, isLook(qid, cmd) && cmd.CNS() == nvme.CNSActiveNSList && lose.Add(-1) >= 0
		}
	})
	lose.Store(2)
	s.restart(func(*fakeTarget) {})
	if e := s.write(t, s.sub.Namespaces()[0]); e != 0 {
		t.Errorf("write: %v", e)
	}
	if n := lose.Load(); n > 0 {
		t.Errorf("%d responses were not lost", n)
	}
}

// TestUnansweredLog checks the same for the log page of an event.
func TestUnansweredLog(t *testing.T) {
	var lose atomic.Bool
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		cfg.AdminTimeout = 300 * time.Millisecond
		f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
			return noAnswer, qid == 0 && cmd.Opcode() == nvme.AdminGetLogPage && lose.Swap(false)
		}
	})
	lose.Store(true)
	s.target.change(func() { s.target.namespaces = []uint32{1, 5} })
	s.expect(t, "5 added")
	s.target.change(func() { s.target.namespaces = []uint32{1, 5, 6} })
	s.expect(t, "6 added")
}

// TestShrunkLimits checks that a target that comes back with smaller limits gets more and
// smaller commands.
func TestShrunkLimits(t *testing.T) {
	s := newLookSetup(t, nil)
	ns := s.sub.Namespaces()[0]
	f := newFrontEnd(t, ns, s.loops, 16, 128<<10, 21)
	f.run(500)
	for _, step := range []struct {
		mdts uint8
		oncs uint16
	}{{1, nvme.ONCSDSM | nvme.ONCSWriteZeroes}, {2, nvme.ONCSDSM}, {8, nvme.ONCSDSM | nvme.ONCSWriteZeroes}} {
		f.start(3000)
		s.restart(func(t *fakeTarget) {
			t.mdts, t.oncs = step.mdts, step.oncs
			t.maxEntries, t.inCapsule = 16, 0
		})
		for _, err := range f.wait(time.Minute) {
			t.Error(err)
		}
		if got := ns.Geometry().MaxIO; int(got) != min(4096<<step.mdts, maxTransfer) {
			t.Errorf("largest I/O is %d", got)
		}
		f.run(500)
	}
	f.close()
	s.expectNothing(t)

	s.restart(func(t *fakeTarget) { t.oncs = nvme.ONCSWriteZeroes })
	waitFor(t, "the end of discards", func() bool { return ns.Geometry().MaxDiscardSectors == 0 })
	if e := unix.Errno(single(t, s.loops[0], ns, block.Request{Op: block.OpDiscard, Sectors: 8})); e != unix.EOPNOTSUPP {
		t.Errorf("discard: %v", e)
	}
}

// TestPiecesFitTheTarget checks that no command is larger than the present limits of the
// target.
func TestPiecesFitTheTarget(t *testing.T) {
	s := newLookSetup(t, nil)
	ns := s.sub.Namespaces()[0]
	q, err := ns.OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	s.restart(func(f *fakeTarget) { f.mdts, f.record = 2, true })
	waitFor(t, "the smaller limit", func() bool { return ns.Geometry().MaxIO == 16<<10 })
	if e := submit(t, s.loops[0], q, block.Request{Op: block.OpWrite, Sector: 8, Sectors: 120}); e != 0 {
		t.Fatalf("write: %v", e)
	}
	if e := submit(t, s.loops[0], q, block.Request{Op: block.OpWriteZeroes, Sector: 8, Sectors: 120}); e != 0 {
		t.Fatalf("write zeroes: %v", e)
	}
	s.target.mu.Lock()
	defer s.target.mu.Unlock()
	next := uint64(8)
	for i, cmd := range s.target.recorded {
		if i == 4 {
			next = 8
		}
		if cmd.NLB() > 32 || cmd.SLBA() != next {
			t.Errorf("command %d: %v of %d blocks at %d, want at most 32 at %d", i, cmd.Opcode(), cmd.NLB(), cmd.SLBA(), next)
		}
		next += uint64(cmd.NLB())
	}
	if len(s.target.recorded) != 8 || next != 128 {
		t.Errorf("%d commands, up to block %d", len(s.target.recorded), next)
	}
}

// TestCacheAppears checks that writes bypass the cache if the controller gets one later,
// because a device that was said to have no volatile cache sends no flush.
func TestCacheAppears(t *testing.T) {
	s := newLookSetup(t, func(f *fakeTarget, _ *Config) { f.vwc = 0 })
	ns := s.sub.Namespaces()[0]
	if ns.Geometry().VolatileCache {
		t.Fatal("there is a cache already")
	}
	s.restart(func(f *fakeTarget) { f.vwc, f.record = nvme.VWCPresent, true })
	waitFor(t, "the cache", func() bool { return ns.Geometry().VolatileCache })
	for _, writeThrough := range []bool{true, false} {
		q, err := ns.OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096, WriteThrough: writeThrough})
		if err != nil {
			t.Fatal(err)
		}
		for _, op := range []block.Op{block.OpWrite, block.OpWriteZeroes} {
			if e := submit(t, s.loops[0], q, block.Request{Op: op, Sectors: 8}); e != 0 {
				t.Errorf("%v: %v", op, e)
			}
			s.target.mu.Lock()
			last := s.target.recorded[len(s.target.recorded)-1]
			s.target.mu.Unlock()
			if last.FUA() != writeThrough {
				t.Errorf("%v with write through %v: FUA %v", op, writeThrough, last.FUA())
			}
		}
		q.Close()
	}
}

// TestEndlessList checks that the list of a target is refused if it has more namespaces
// than the target can have, and that it does not use up memory.
func TestEndlessList(t *testing.T) {
	s := newLookSetup(t, nil)
	list := make([]uint32, 100_000)
	for i := range list {
		list[i] = uint32(i + 1)
	}
	s.target.change(func() { s.target.namespaces = list })
	waitFor(t, "the third look", func() bool {
		s.target.mu.Lock()
		defer s.target.mu.Unlock()
		return s.target.looks >= 4
	})
	if n := len(s.sub.Namespaces()); n != 1 {
		t.Errorf("%d namespaces", n)
	}
	s.target.mu.Lock()
	s.target.namespaces = []uint32{1, 2}
	s.target.mu.Unlock()
	s.expect(t, "2 added")
}

// TestReplacedAllTheTime checks that namespaces that come and go are not kept forever.
func TestReplacedAllTheTime(t *testing.T) {
	s := newLookSetup(t, nil)
	for n := range 2 * maxGone {
		waitFor(t, "the association", func() bool { i := s.sub.Info().Paths[0]; return i.State == StateLive && i.Losses == n })
		s.restart(func(f *fakeTarget) { f.uuid[0]++ })
		s.expect(t, "1 removed")
		s.expect(t, "1 added")
	}
	// The last ones are dropped after the change was reported.
	waitFor(t, "most to be forgotten", func() bool { return len(s.sub.Namespaces()) <= maxGone+1 })
}

// TestMemoryBudget checks that queues are opened only while their buffers stay below the
// limit.
func TestMemoryBudget(t *testing.T) {
	s := newLookSetup(t, func(_ *fakeTarget, cfg *Config) { cfg.MaxMemory = 5 << 20 })
	ns := s.sub.Namespaces()[0]
	cfg := block.QueueConfig{Depth: 32, MaxIO: 64 << 10}
	var open []block.Queue
	for range 2 {
		q, err := ns.OpenQueue(0, cfg)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, q)
	}
	_, err := ns.OpenQueue(0, cfg)
	var memory *MemoryError
	if !errors.As(err, &memory) || memory.Want != 2<<20 || memory.Used != 4<<20 || memory.Limit != 5<<20 {
		t.Errorf("error %v", err)
	}
	if got := s.sub.Info().Memory; got != (MemoryInfo{Used: 4 << 20, Limit: 5 << 20}) {
		t.Errorf("%+v", got)
	}
	for _, q := range open {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
		if q.Close() == nil {
			t.Error("closed twice")
		}
	}
	if q, err := ns.OpenQueue(0, cfg); err != nil {
		t.Error(err)
	} else {
		q.Close()
	}
}

// TestLeftOut checks that a namespace that cannot be used is reported with the reason, until it
// can be.
func TestLeftOut(t *testing.T) {
	fabric := rdmatest.NewFabric()
	target := newFakeTarget(t, fabric, 1<<20)
	target.lbads = 20
	loops := newLoops(t, 1)
	c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1}))
	if got, want := c.Info().LeftOut, map[uint32]string{1: "block size 2^20 is not 512..4096"}; !maps.Equal(got, want) {
		t.Errorf("left out: %v, want %v", got, want)
	}
	for id := range uint32(maxLeftOut + 8) {
		c.leaveOut(id+1, "no capacity")
	}
	if got := c.Info().LeftOut; len(got) != maxLeftOut || got[1] != "no capacity" {
		t.Errorf("left out: %v", got)
	}
	c.takeIn(1)
	if got := c.Info().LeftOut; len(got) != maxLeftOut-1 || got[1] != "" {
		t.Errorf("left out: %v", got)
	}
}
