package initiator

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
)

// TestPathStatus checks that retries after path errors are limited by time, not by
// number, and do not delay other commands.
func TestPathStatus(t *testing.T) {
	for _, status := range []nvme.Status{nvme.StatusANATransition, nvme.StatusANAInaccessible, nvme.StatusANAPersistentLoss, nvme.StatusInternalPathError, nvme.StatusControllerPathError} {
		t.Run(status.String(), func(t *testing.T) {
			t.Parallel()
			var fails atomic.Bool
			var tries atomic.Int32
			fails.Store(true)
			s := newLookSetup(t, func(f *fakeTarget, _ *Config) {
				f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
					if qid == 0 || cmd.Opcode() != nvme.OpWrite || cmd.SLBA() != 0 || !fails.Load() {
						return 0, false
					}
					tries.Add(1)
					return status, true
				}
			})
			ns := s.sub.Namespaces()[0]
			done := make(chan unix.Errno, 1)
			go func() { done <- s.write(t, ns) }()
			waitFor(t, "more tries than an error has", func() bool { return tries.Load() > maxRetries+2 })
			if e := unix.Errno(single(t, s.loops[0], ns, block.Request{Op: block.OpWrite, Sector: 8, Sectors: 8})); e != 0 {
				t.Errorf("another write: %v", e)
			}
			fails.Store(false)
			if e := <-done; e != 0 {
				t.Errorf("write: %v", e)
			}
		})
	}
}

// TestPathStatusEnds checks that such requests fail when they may not wait any longer,
// and at once if the target says that a retry is useless.
func TestPathStatusEnds(t *testing.T) {
	for name, c := range map[string]struct {
		status nvme.Status
		anatt  uint8
		least  time.Duration
	}{
		"path":       {nvme.StatusInternalPathError, 1, 400 * time.Millisecond},
		"ANA":        {nvme.StatusANATransition, 1, 1400 * time.Millisecond},
		"no retries": {nvme.StatusANATransition | nvme.StatusDNR, 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
				cfg.FastIOFail = 400 * time.Millisecond
				f.anatt = c.anatt
				f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
					return c.status, qid > 0 && cmd.Opcode() == nvme.OpWrite
				}
			})
			began := time.Now()
			if e := s.write(t, s.sub.Namespaces()[0]); e == 0 {
				t.Error("write succeeded")
			}
			if took := time.Since(began); took < c.least || c.least == 0 && took > 300*time.Millisecond {
				t.Errorf("failed after %v, want %v", took, c.least)
			}
		})
	}
}

// TestRetryDelay checks that a retry delay of almost two hours ends with the controller,
// and is limited to the I/O timeout.
func TestRetryDelay(t *testing.T) {
	const delayed = nvme.StatusInternal | 1<<11 // CRD 1
	newSetup := func(t *testing.T, failures int32, set func(*Config)) *lookSetup {
		var left atomic.Int32
		left.Store(failures)
		return newLookSetup(t, func(f *fakeTarget, cfg *Config) {
			f.crdt = 0xFFFF
			f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
				return delayed, qid > 0 && cmd.Opcode() == nvme.OpWrite && left.Add(-1) >= 0
			}
			set(cfg)
		})
	}
	start := func(t *testing.T, s *lookSetup) <-chan unix.Errno {
		done := make(chan unix.Errno, 1)
		go func() { done <- s.write(t, s.sub.Namespaces()[0]) }()
		waitFor(t, "the first try", func() bool { return s.sub.Info().Lanes[0].Retried == 1 })
		return done
	}
	t.Run("bounded", func(t *testing.T) {
		s := newSetup(t, 1, func(cfg *Config) { cfg.IOTimeout = time.Second })
		began := time.Now()
		if e := <-start(t, s); e != 0 || time.Since(began) < time.Second {
			t.Errorf("write: %v after %v", e, time.Since(began))
		}
	})
	t.Run("aborted", func(t *testing.T) {
		s := newSetup(t, 100, func(cfg *Config) { cfg.IOTimeout = time.Hour })
		done := start(t, s)
		s.sub.Abort(errors.New("not wanted"))
		if e := <-done; e != unix.ENOLINK {
			t.Errorf("write: %v", e)
		}
	})
	t.Run("fast_io_fail_tmo", func(t *testing.T) {
		s := newSetup(t, 100, func(cfg *Config) { cfg.IOTimeout, cfg.FastIOFail = time.Hour, 200*time.Millisecond })
		done := start(t, s)
		s.fabric.SetSilent(targetAddr, true)
		s.fabric.KillAll(hostAddr)
		if e := <-done; e != unix.ENOLINK {
			t.Errorf("write: %v", e)
		}
		s.fabric.SetSilent(targetAddr, false)
	})
	t.Run("namespace removed", func(t *testing.T) {
		s := newSetup(t, 100, func(cfg *Config) { cfg.IOTimeout = time.Hour })
		done := start(t, s)
		s.target.change(func() { s.target.namespaces = nil })
		if e := <-done; e != unix.ENODEV {
			t.Errorf("write: %v", e)
		}
	})
}

// poisonSetup is a controller whose connections end with each read of sector 0.
func poisonSetup(t *testing.T, set func(*Config)) *lookSetup {
	t.Helper()
	var s *lookSetup
	s = newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
			if qid > 0 && cmd.Opcode() == nvme.OpRead && cmd.SLBA() == 0 {
				f.killers.Add(1)
				go s.fabric.KillAll(hostAddr)
				return noAnswer, true
			}
			return 0, false
		}
		set(cfg)
	})
	return s
}

// TestPoison checks that a request that ends the connection each time fails after a
// limited number of associations, and that other requests do not fail.
func TestPoison(t *testing.T) {
	s := poisonSetup(t, func(cfg *Config) { cfg.IOTimeout = 500 * time.Millisecond })
	ns := s.sub.Namespaces()[0]
	f := newFrontEnd(t, ns, s.loops, 8, 4096, 31)
	j := f.jobs[0]
	j.first, j.content = 8, j.content[:len(j.content)-8] // nobody else reads sector 0
	f.start(1 << 30)
	if e := unix.Errno(single(t, s.loops[0], ns, block.Request{Op: block.OpRead, Sectors: 8})); e != unix.EIO {
		t.Errorf("read: %v", e)
	}
	s.loops[0].Call(func() { j.left = 100 })
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
	waitFor(t, "the association", func() bool { return s.sub.Info().State == StateLive })
	if n := s.target.killers.Load(); n < suspectLosses+minBlames {
		t.Errorf("given up after %d times", n)
	}
}

// TestPoisonWithLimits checks that a client that repeats such a request does not harm the
// others, even if the loss times are short.
func TestPoisonWithLimits(t *testing.T) {
	s := poisonSetup(t, func(cfg *Config) {
		cfg.ReconnectDelay, cfg.IOTimeout, cfg.FastIOFail, cfg.CtrlLoss = time.Second, 10*time.Second, 6*time.Second, 8*time.Second
	})
	ns := s.sub.Namespaces()[0]
	began := time.Now()
	f := newFrontEnd(t, ns, s.loops, 8, 4096, 31)
	j := f.jobs[0]
	j.first, j.content = 8, j.content[:len(j.content)-8] // nobody else reads sector 0
	f.start(1 << 30)
	for range 3 {
		if e := unix.Errno(single(t, s.loops[0], ns, block.Request{Op: block.OpRead, Sectors: 8})); e != unix.EIO {
			t.Errorf("read: %v", e)
		}
	}
	if took := time.Since(began); took < 3*s.sub.cfg.FastIOFail/2 {
		t.Errorf("failed after %v", took)
	}
	if n := s.target.killers.Load(); n > 3*8 {
		t.Errorf("%d associations were lost", n)
	}
	s.loops[0].Call(func() { j.left = 100 })
	for _, err := range f.wait(time.Minute) {
		t.Error(err)
	}
	f.close()
	waitFor(t, "the association", func() bool { return s.sub.Info().State == StateLive })
}

// TestOutageAfterPoison checks that the outage for which a request is to blame ends with the next
// association, also if that does not live for long.
func TestOutageAfterPoison(t *testing.T) {
	s := poisonSetup(t, func(cfg *Config) { cfg.IOTimeout = 100 * time.Millisecond })
	read := block.Request{Op: block.OpRead, Sectors: 8}
	if e := unix.Errno(single(t, s.loops[0], s.sub.Namespaces()[0], read)); e != unix.EIO {
		t.Errorf("read: %v", e)
	}
	waitFor(t, "the association", func() bool { return s.sub.Info().State == StateLive })
	lost := time.Now()
	s.fabric.SetRefuse(targetAddr, rdma.RejectInvalidServiceID, nil)
	defer s.fabric.SetRefuse(targetAddr, 0, nil)
	s.fabric.KillAll(hostAddr)
	waitFor(t, "a failed attempt", func() bool { return s.sub.Info().Paths[0].Failure != nil })
	s.sub.mu.Lock()
	began, out := s.sub.outageBegan()
	s.sub.mu.Unlock()
	if !out || began.Before(lost) {
		t.Errorf("the outage began %v before the loss", lost.Sub(began))
	}
}

// TestHandedOverTimeout checks that a command on the queue pair of another loop times
// out, whatever the front end of that loop does.
func TestHandedOverTimeout(t *testing.T) {
	var silent atomic.Bool
	fabric := rdmatest.NewFabric()
	target := newFakeTarget(t, fabric, 1<<20)
	target.grant.Store(1)
	target.intercept = func(qid uint16, _ *nvme.Command) (nvme.Status, bool) {
		return noAnswer, qid > 0 && silent.Swap(false)
	}
	loops := newLoops(t, 2)
	cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 2})
	cfg.IOTimeout = time.Second
	c := connect(t, cfg)
	defer closeSubsystem(t, c)
	if len(c.lanes) < 2 {
		t.Fatal("one CPU has no second loop")
	}
	owner := c.slots[0].assoc.pairs[0].lane.index
	q, err := c.Namespaces()[0].OpenQueue(1-owner, block.QueueConfig{Depth: 1, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	silent.Store(true)
	if e := submit(t, loops[1-owner], q, block.Request{Op: block.OpRead, Sectors: 8}); e != 0 {
		t.Errorf("read: %v", e)
	}
	if i := c.Info().Paths[0]; i.Losses != 1 || !strings.Contains(i.Reason.Error(), "not answered") {
		t.Errorf("%d losses, %v", i.Losses, i.Reason)
	}
}

// TestSeam checks that a queue returns a result for each request, whatever the request
// is, and sends nothing that the target would have to refuse.
func TestSeam(t *testing.T) {
	s := newLookSetup(t, func(f *fakeTarget, _ *Config) { f.blocks = 1 << 40 })
	ns := s.sub.Namespaces()[0]
	q, err := ns.OpenQueue(0, block.QueueConfig{Depth: 2, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	for _, c := range []struct {
		io   block.Request
		want unix.Errno
	}{
		{block.Request{Op: block.OpRead, Tag: 2, Sectors: 8}, unix.EINVAL},
		{block.Request{Op: block.OpRead, Tag: 0xFFFF, Sectors: 8}, unix.EINVAL},
		{block.Request{Op: block.OpRead, Flags: 0x80, Sectors: 8}, unix.EINVAL},
		{block.Request{Op: block.OpRead, Sector: 1 << 40, Sectors: 8}, unix.EIO},
		{block.Request{Op: block.OpRead, Sector: 1<<40 - 4, Sectors: 8}, unix.EIO},
		{block.Request{Op: block.OpRead, Sector: 1<<64 - 8, Sectors: 8}, unix.EIO},
		{block.Request{Op: block.OpDiscard, Sector: 1<<64 - 8, Sectors: 1<<32 - 8}, unix.EIO},
		{block.Request{Op: block.OpWriteZeroes, Sectors: 1<<32 - 1, Sector: 1<<64 - 1}, unix.EIO},
		{block.Request{Op: 0xFF, Sectors: 8}, unix.EOPNOTSUPP},
	} {
		if got := submit(t, s.loops[0], q, c.io); got != c.want {
			t.Errorf("%+v: %v, want %v", c.io, got, c.want)
		}
	}
	if len(s.target.commands) != 0 {
		t.Errorf("the target saw %v", s.target.commands)
	}

	// A tag that is in flight
	results := make([]block.Result, 4)
	n := 0
	s.loops[0].Call(func() {
		read := block.Request{Op: block.OpRead, Tag: 1, Sectors: 8}
		q.Submit([]block.Request{read, read})
		n = q.Reap(results)
	})
	if n < 1 || results[0] != (block.Result{Tag: 1, Errno: uint16(unix.EINVAL)}) {
		t.Errorf("%d results, %v", n, results)
	}
	waitFor(t, "the other result", func() bool {
		s.loops[0].Call(func() { n += q.Reap(results[n:]) })
		return n == 2
	})
}

// TestLongZeroes checks write zeroes of any length, beyond the 16 bits of a command.
func TestLongZeroes(t *testing.T) {
	s := newLookSetup(t, func(f *fakeTarget, _ *Config) {
		f.blocks, f.record = 1<<40, true
		f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
			return nvme.StatusSuccess, qid > 0 && cmd.Opcode() == nvme.OpWriteZeroes
		}
	})
	for _, sectors := range []uint32{65536, 65537, 1 << 20, 1<<24 - 1} {
		s.target.mu.Lock()
		s.target.recorded = nil
		s.target.mu.Unlock()
		if e := unix.Errno(single(t, s.loops[0], s.sub.Namespaces()[0], block.Request{Op: block.OpWriteZeroes, Sectors: sectors})); e != 0 {
			t.Errorf("%d sectors: %v", sectors, e)
		}
		var sum uint64
		s.target.mu.Lock()
		for _, cmd := range s.target.recorded {
			if cmd.SLBA() != sum {
				t.Fatalf("command at block %d, want %d", cmd.SLBA(), sum)
			}
			sum += uint64(cmd.NLB())
		}
		s.target.mu.Unlock()
		if sum != uint64(sectors) {
			t.Errorf("%d of %d blocks", sum, sectors)
		}
	}
}

// TestStarvedQueuePair checks that the loop stays awake if requests wait for a slot while
// every free slot waits for the completion of its SEND, because that completion causes no
// event.
func TestStarvedQueuePair(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20).inCapsule = 0
	loops := newLoops(t, 1)
	cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1})
	cfg.QueueSize = MinQueueSize
	c := connect(t, cfg)
	defer closeSubsystem(t, c)
	err := loops[0].Call(func() {
		p := c.lanes[0].pairs[0]
		// Every slot except the oldest is answered, and no SEND has completed.
		for {
			slot, _, ok := p.sq.Get()
			if !ok {
				break
			}
			p.sq.Push(slot, rdma.SGE{})
			p.sq.Answer(slot)
		}
		if p.arm(); p.sq.Pending() == 0 {
			t.Error("nothing was pushed")
		}
		p.sq.Flush() // the fabric completes it later
		p.waiting.push(&request{})
		if !p.sq.Starved() {
			t.Error("slots are free without Reap")
		}
		if got := p.arm(); got != poller.Spin {
			t.Errorf("arm: %v", got)
		}
		p.waiting.take()
		p.fail(errors.New("the test has used the queue"))
	})
	if err != nil {
		t.Error(err)
	}
}
