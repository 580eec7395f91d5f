package initiator

import (
	"context"
	"fmt"
	"net/netip"
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

// TestPatience checks the time that a target may take to end a controller whose host fell
// silent.
func TestPatience(t *testing.T) {
	c := &Controller{cfg: Config{KeepAlive: 5 * time.Second}}
	a := &association{}
	if got := c.patience(a, c.cfg.KeepAlive); got != 11*time.Second {
		t.Errorf("%v", got)
	}
	a.identify.SetCTRATT(nvme.CTRATTTBKAS)
	a.identify.SetCQT(2500)
	if got := c.patience(a, c.cfg.KeepAlive); got != 18500*time.Millisecond {
		t.Errorf("with traffic based keep alive and 2.5 s to quiesce: %v", got)
	}
}

// TestOutliveTime checks that the time depends on the longer keep alive timeout of the
// old controllers and the new one, and on the values that the target announces.
func TestOutliveTime(t *testing.T) {
	a := &association{}
	a.identify.SetCQT(2500)
	for _, tt := range []struct {
		assoc     *association
		keepAlive time.Duration
		n         int
		want      time.Duration
	}{
		{a, 30 * time.Second, 1, 2 * 63500 * time.Millisecond},
		{a, time.Second, 3, 4 * 13500 * time.Millisecond},
		{nil, 30 * time.Second, 1, 2 * 91 * time.Second},
	} {
		c := &Controller{cfg: Config{KeepAlive: 5 * time.Second}, assoc: tt.assoc}
		s := &Subsystem{slots: [MaxPaths]*Controller{c}}
		if got := s.OutliveTime(tt.keepAlive, tt.n); got != tt.want {
			t.Errorf("%v, %d controllers: %v, want %v", tt.keepAlive, tt.n, got, tt.want)
		}
	}
}

// vague makes the target answer questions for some controllers with a status that does
// not tell whether they exist.
func vague(f *fakeTarget, _ *Config) {
	f.connect = func(p nvme.ConnectParams, data *nvme.ConnectData) nvme.Status {
		f.mu.Lock()
		defer f.mu.Unlock()
		if p.QID > 0 && data.CNTLID() != f.lastID {
			return nvme.StatusInternal
		}
		return nvme.StatusSuccess
	}
}

// TestFenceAfterFreeze checks that the time for ending the old controller begins when the
// target answers again, because its timers did not run while it stood still.
func TestFenceAfterFreeze(t *testing.T) {
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		vague(f, cfg)
		cfg.KeepAlive = 100 * time.Millisecond
	})
	patience := s.sub.slots[0].patience(s.sub.slots[0].assoc, s.sub.cfg.KeepAlive)
	s.fabric.SetRefuse(targetAddr, rdma.RejectInvalidServiceID, nil)
	s.fabric.KillAll(hostAddr)
	time.Sleep(patience + 200*time.Millisecond) // the freeze
	thawed := time.Now()
	s.fabric.SetRefuse(targetAddr, 0, nil)
	if e := s.write(t, s.sub.Namespaces()[0]); e != 0 {
		t.Errorf("write: %v", e)
	}
	if took := time.Since(thawed); took < patience {
		t.Errorf("a write was sent %v after the thaw", took)
	}
}

// TestFenceCountsAnswers checks that at most one step of the time between two answers
// counts. The target may have stood still for the rest.
func TestFenceCountsAnswers(t *testing.T) {
	f := &fencing{answered: time.Now().Add(-time.Hour)}
	f.alive()
	if f.lived != fenceStep {
		t.Errorf("lived for %v after an answer that took an hour", f.lived)
	}
	f.alive()
	if f.lived > fenceStep+time.Second/2 {
		t.Errorf("lived for %v", f.lived)
	}
}

// TestNoAnswerIsNoPermission checks that the host waits for a target that does not answer
// the question for the old controller, nor anything else.
func TestNoAnswerIsNoPermission(t *testing.T) {
	var frozen atomic.Bool
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		f.immortal = true
		cfg.KeepAlive = 200 * time.Millisecond
		f.intercept = func(uint16, *nvme.Command) (nvme.Status, bool) { return noAnswer, frozen.Load() }
	})
	old := s.sub.Info().Paths[0].CNTLID
	s.fabric.KillAll(hostAddr)
	waitFor(t, "a question", func() bool {
		s.target.mu.Lock()
		defer s.target.mu.Unlock()
		return s.target.asked[old] > 1
	})
	frozen.Store(true)
	q, err := s.sub.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	s.loops[0].Call(func() { q.Submit([]block.Request{{Op: block.OpWrite, Sectors: 8}}) })
	time.Sleep(2500 * time.Millisecond) // longer than the patience
	if state := s.sub.Info().State; state != StateConnecting {
		t.Errorf("state %v", state)
	}
	s.target.end(old)
	frozen.Store(false)
	waitFor(t, "the write", func() bool {
		n := 0
		s.loops[0].Call(func() { n = q.Reap(make([]block.Result, 1)) })
		return n == 1
	})
}

// TestOldControllerStays checks that nothing is sent as long as the target says that it
// has the old controller. The loss times limit this.
func TestOldControllerStays(t *testing.T) {
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		f.immortal = true
		cfg.KeepAlive = 100 * time.Millisecond
		cfg.FastIOFail = 3 * time.Second
	})
	s.fabric.KillAll(hostAddr)
	began := time.Now()
	if e := s.write(t, s.sub.Namespaces()[0]); e != unix.ENOLINK {
		t.Errorf("write: %v", e)
	}
	if took := time.Since(began); took < 2*time.Second {
		t.Errorf("failed after %v", took)
	}
	if n := s.target.commands[nvme.OpWrite]; n != 0 {
		t.Errorf("%d writes arrived while the old controller was there", n)
	}
}

// TestSuperseded checks that the old controller counts as ended if its id was given to
// another association of the host since, whatever the target says about the id.
func TestSuperseded(t *testing.T) {
	var made, other atomic.Uint32
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		f.immortal = true
		cfg.Made = func(_ netip.AddrPort, id uint16, _ time.Time) { made.Store(uint32(id)) }
		cfg.Superseded = func(_ context.Context, p Present) bool {
			if p.Address != cfg.Address || p.Serial == "" || p.Model == "" {
				t.Errorf("asked for %+v", p)
			}
			return uint32(p.CNTLID) == other.Load()
		}
	})
	old := s.sub.Info().Paths[0].CNTLID
	if made.Load() != uint32(old) {
		t.Errorf("%d was made, it is %d", made.Load(), old)
	}
	s.fabric.KillAll(hostAddr)
	done := make(chan unix.Errno, 1)
	go func() { done <- s.write(t, s.sub.Namespaces()[0]) }()
	select {
	case e := <-done:
		t.Fatalf("write while the target has the controller: %v", e)
	case <-time.After(300 * time.Millisecond):
	}
	other.Store(uint32(old))
	if e := <-done; e != 0 {
		t.Errorf("write: %v", e)
	}
	if made.Load() == uint32(old) {
		t.Error("the next controller was not made known")
	}
}

// TestVagueOnce checks that an unclear answer is no permission after answers that said
// that the controller exists.
func TestVagueOnce(t *testing.T) {
	var doubt atomic.Bool
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		f.immortal = true
		cfg.KeepAlive = 100 * time.Millisecond
		f.connect = func(p nvme.ConnectParams, data *nvme.ConnectData) nvme.Status {
			if p.QID > 0 && doubt.Load() {
				return nvme.StatusInternal
			}
			return nvme.StatusSuccess
		}
	})
	old := s.sub.Info().Paths[0].CNTLID
	s.fabric.KillAll(hostAddr)
	done := make(chan unix.Errno, 1)
	go func() { done <- s.write(t, s.sub.Namespaces()[0]) }()
	time.Sleep(2 * s.sub.slots[0].lastPatience)
	doubt.Store(true)
	select {
	case e := <-done:
		t.Fatalf("write after one vague answer: %v", e)
	case <-time.After(time.Second):
	}
	doubt.Store(false)
	s.target.end(old)
	if e := <-done; e != 0 {
		t.Errorf("write: %v", e)
	}
}

// TestVagueTarget checks that the host waits for a target that never tells whether it has
// the old controller only as long as the target may take to end it.
func TestVagueTarget(t *testing.T) {
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		vague(f, cfg)
		cfg.KeepAlive = 100 * time.Millisecond
	})
	patience := s.sub.slots[0].patience(s.sub.slots[0].assoc, s.sub.cfg.KeepAlive)
	began := time.Now()
	s.fabric.KillAll(hostAddr)
	if e := s.write(t, s.sub.Namespaces()[0]); e != 0 {
		t.Errorf("write: %v", e)
	}
	if took := time.Since(began); took < patience || took > 4*patience {
		t.Errorf("sent after %v, patience is %v", took, patience)
	}
}

// TestOutliveLater checks that the time for ending a controller of an earlier process
// begins with the wait for it, and depends on the keep alive timeout of that process if
// that is longer. The process may have ended long after this controller was made, as in
// an upgrade.
func TestOutliveLater(t *testing.T) {
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		vague(f, cfg)
		cfg.KeepAlive = 100 * time.Millisecond
	})
	for _, keepAlive := range []time.Duration{0, 500 * time.Millisecond} {
		began := time.Now()
		if err := s.sub.Outlive(t.Context(), keepAlive, ControllerID{CNTLID: 777}); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took < 2*keepAlive+time.Second {
			t.Errorf("the target was given %v, with a keep alive timeout of %v", took, keepAlive)
		}
	}
}

// TestExistence checks the interpretation of the answers of targets.
func TestExistence(t *testing.T) {
	for _, c := range []struct {
		err  error
		want existence
	}{
		{nil, joined},
		{fmt.Errorf("x: %w (%w)", ConnectStatus(nvme.StatusConnectInvalidParam|nvme.StatusDNR), ConnectParam(nvme.NewConnectInvalidParam(16, true))), ended},
		{fmt.Errorf("x: %w (%w)", ConnectStatus(nvme.StatusConnectInvalidParam|nvme.StatusDNR), ConnectParam(nvme.NewConnectInvalidParam(42, false))), present},
		{fmt.Errorf("x: %w (%w)", ConnectStatus(nvme.StatusConnectInvalidParam|nvme.StatusDNR), ConnectParam(nvme.NewConnectInvalidParam(512, true))), unclear},
		{ConnectStatus(nvme.StatusCommandSequence | nvme.StatusDNR), present},
		{ConnectStatus(nvme.StatusConnectControllerBusy), unclear},
		{context.DeadlineExceeded, unclear},
	} {
		if got := existenceOf(c.err); got != c.want {
			t.Errorf("%v: %d, want %d", c.err, got, c.want)
		}
	}
}

// TestFenceIsKept checks that an association that is lost while it waits for the end of
// an old controller leaves this task to the next one.
func TestFenceIsKept(t *testing.T) {
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) { f.immortal, cfg.KeepAlive = true, 200*time.Millisecond })
	old := s.sub.Info().Paths[0].CNTLID
	asked := func() int {
		s.target.mu.Lock()
		defer s.target.mu.Unlock()
		return s.target.asked[old]
	}
	q, err := s.sub.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		before := asked()
		s.fabric.KillAll(hostAddr)
		waitFor(t, "two questions for the old controller", func() bool { return asked() >= before+2 })
	}
	s.loops[0].Call(func() { q.Submit([]block.Request{{Op: block.OpWrite, Sectors: 8}}) })
	s.target.mu.Lock()
	if n := s.target.commands[nvme.OpWrite]; n != 0 {
		t.Errorf("%d writes arrived while the old controller was there", n)
	}
	s.target.mu.Unlock()
	s.target.end(old)
	waitFor(t, "the write", func() bool {
		n := 0
		s.loops[0].Call(func() { n = q.Reap(make([]block.Result, 1)) })
		return n == 1
	})
	q.Close()
}

// TestLoopStoppedFirst checks that Close of a controller whose loops have ended closes
// the rest or returns an error, and does not hang.
func TestLoopStoppedFirst(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20)
	loops := newLoops(t, 1)
	c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1}))
	if err := loops[0].Stop(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- c.Close(ctx) }()
	select {
	case err := <-done:
		t.Logf("close: %v", err)
	case <-time.After(10 * time.Second):
		t.Fatal("close hangs")
	}
}
