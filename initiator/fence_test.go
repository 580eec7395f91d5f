package initiator

import (
	"context"
	"testing"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
)

// TestPatience: how long a target may take to end a controller whose host fell silent.
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

// TestFenceAfterFreeze: the time that a target has for ending the old controller counts
// from when it answers anew, because its timers did not run while it stood still.
func TestFenceAfterFreeze(t *testing.T) {
	s := newLookSetup(t, func(f *fakeTarget, cfg *Config) {
		f.immortal = true
		cfg.KeepAlive = 100 * time.Millisecond
	})
	patience := s.ctrl.patience(s.ctrl.assoc, s.ctrl.cfg.KeepAlive)
	s.fabric.SetRefuse(targetAddr, rdma.RejectInvalidServiceID, nil)
	s.fabric.KillAll(hostAddr)
	time.Sleep(patience + 200*time.Millisecond) // the freeze
	thawed := time.Now()
	s.fabric.SetRefuse(targetAddr, 0, nil)
	if e := s.write(t, s.ctrl.Namespaces()[0]); e != 0 {
		t.Errorf("write: %v", e)
	}
	if took := time.Since(thawed); took < patience {
		t.Errorf("a write was sent %v after the thaw, while the target had the old controller", took)
	}
}

// TestFenceIsKept: an association that is lost while it waits for the end of an old
// controller leaves that to the next one.
func TestFenceIsKept(t *testing.T) {
	s := newLookSetup(t, func(f *fakeTarget, _ *Config) { f.immortal = true })
	old := s.ctrl.Info().CNTLID
	asked := func() int {
		s.target.mu.Lock()
		defer s.target.mu.Unlock()
		return s.target.asked[old]
	}
	q, err := s.ctrl.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096})
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
	for id := range s.target.queues {
		s.target.queues[id] = 0
	}
	s.target.immortal = false
	s.target.mu.Unlock()
	waitFor(t, "the write", func() bool {
		n := 0
		s.loops[0].Call(func() { n = q.Reap(make([]block.Result, 1)) })
		return n == 1
	})
	q.Close()
}

// TestLoopStoppedFirst: closing a controller whose loops have ended works, with what is
// left to close, or says so; it does not hang.
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
