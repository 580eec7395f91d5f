package target

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"ublk-nvmeof/nvme"
)

// gate is a store whose writes wait inside it until open is called.
type gate struct {
	*RAM
	entered chan struct{} // one for each write
	leave   chan struct{} // closed by open
	open    func()
}

func newGate(size int64) *gate {
	g := &gate{RAM: NewRAM(size), entered: make(chan struct{}, 16), leave: make(chan struct{})}
	g.open = sync.OnceFunc(func() { close(g.leave) })
	return g
}

func (g *gate) WriteAt(p []byte, off int64) (int, error) {
	g.entered <- struct{}{}
	<-g.leave
	return g.RAM.WriteAt(p, off)
}

// known reports whether the target knows a controller of this host. Like a host before
// it sends lost writes again, it asks with the Connect command of an I/O queue.
func (r *rig) known(nqn string, cntlid uint16) bool {
	r.t.Helper()
	h := r.mustDial(1, 32)
	cmd, _ := h.connectCommand(nqn, 1, cntlid, 0)
	done := h.do(cmd, nil)
	if done.Status().OK() {
		r.t.Fatalf("an I/O queue was connected to controller %d", cntlid)
	}
	param := nvme.ConnectInvalidParam(done.DW0())
	unknown := done.Status().Code() == nvme.StatusConnectInvalidParam && param.InData() && param.Offset() == paramCNTLID
	if err := h.id.Disconnect(); err != nil {
		r.t.Error(err)
	}
	return !unknown
}

// heldWrite is a controller with a write inside its store.
func heldWrite(t *testing.T) (r *rig, g *gate, admin, io *hostQueue) {
	t.Helper()
	r = newRig(t, Config{}, SubsystemConfig{})
	g = newGate(1 << 20)
	t.Cleanup(g.open) // before the target closes
	if _, err := r.subsys.AddNamespace(NamespaceConfig{NSID: 1, Store: g}); err != nil {
		t.Fatal(err)
	}
	admin = r.admin(testNQN)
	io = r.io(admin, 1, 32)
	var cmd nvme.Command
	cmd.SetWrite(1, 0, 8, false)
	cmd.SetInCapsuleSGL(0, 4096)
	io.send(&cmd, bytes.Repeat([]byte{1}, 4096))
	<-g.entered
	return r, g, admin, io
}

// TestControllerOutlivesQueues ends a controller in every way while one of its writes
// is inside the store. Its id stays known until the write has ended, so that a host
// that asks does not send the write again too early.
func TestControllerOutlivesQueues(t *testing.T) {
	for name, end := range map[string]func(r *rig, admin, io *hostQueue){
		"admin queue disconnects": func(r *rig, a, _ *hostQueue) { a.id.Disconnect() },
		"all queues disconnect":   func(r *rig, a, io *hostQueue) { io.id.Disconnect(); a.id.Disconnect() },
		"all connections die":     func(r *rig, a, io *hostQueue) { r.fabric.KillAll(hostAddr) },
		"keep alive expires": func(r *rig, a, _ *hostQueue) {
			c := r.target.controllers.find(a.cntlid, testNQN)
			c.mu.Lock()
			c.setKeepAlive(time.Millisecond)
			c.mu.Unlock()
		},
		"controllers are dropped": func(r *rig, a, _ *hostQueue) { r.subsys.DropControllers() },
		"fault":                   func(r *rig, a, _ *hostQueue) { r.target.Faults().Disconnect(-1) },
		"subsystem is replaced": func(r *rig, a, _ *hostQueue) {
			if err := r.target.RemoveSubsystem(testNQN); err != nil {
				r.t.Error(err)
			}
			var err error
			if r.subsys, err = r.target.AddSubsystem(SubsystemConfig{NQN: testNQN, AllowAny: true}); err != nil {
				r.t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, g, admin, io := heldWrite(t)
			end(r, admin, io)
			for admin.await() {
			}
			for range 3 {
				if !r.known(testNQN, admin.cntlid) {
					t.Fatal("the controller is unknown while its write executes")
				}
				if next := r.admin(testNQN); next.cntlid == admin.cntlid {
					t.Fatal("its id is another controller's")
				}
			}
			g.open()
			for deadline := time.Now().Add(patience); r.known(testNQN, admin.cntlid); time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("the controller is still known")
				}
			}
		})
	}
}

// TestResetWaitsForCommands: CSTS shows that a reset or a shutdown is complete only
// when no command executes any more.
func TestResetWaitsForCommands(t *testing.T) {
	enabled := nvme.NewCC(nvme.CCSelectNVM).WithEN(true)
	for _, c := range []struct {
		name            string
		cc              nvme.CC
		executing, done nvme.CSTS
	}{
		{"reset", 0, nvme.NewCSTS(true, false, 0), 0},
		{"shutdown", enabled.WithSHN(nvme.ShutdownNormal), nvme.NewCSTS(true, false, nvme.ShutdownStatusRunning), nvme.NewCSTS(false, false, nvme.ShutdownStatusComplete)},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, g, admin, _ := heldWrite(t)
			admin.setCC(c.cc)
			for range 3 {
				if s := nvme.CSTS(admin.property(nvme.PropCSTS, false)); s != c.executing {
					t.Fatalf("status %v while a write executes, want %v", s, c.executing)
				}
			}
			if !r.known(testNQN, admin.cntlid) {
				t.Error("the controller is unknown")
			}
			if c.cc == 0 {
				var cmd nvme.Command
				cmd.SetPropertySet(nvme.PropCC, uint64(enabled), false)
				admin.want(nvme.StatusCommandSequence|dnr, &cmd)
			}
			g.open()
			admin.untilStatus(c.done)
			admin.setCC(0)
			admin.setCC(enabled)
			r.io(admin, 1, 32)
		})
	}
}

// slowFlush is a store whose flushes wait until the test lets them continue.
type slowFlush struct {
	*RAM
	entered, leave chan struct{}
}

func (s *slowFlush) Flush() error {
	s.entered <- struct{}{}
	<-s.leave
	return nil
}

// TestShutdownFlushes: a shutdown is complete when all data is durable, and the store
// is in use until then.
func TestShutdownFlushes(t *testing.T) {
	r := newRig(t, Config{}, SubsystemConfig{})
	s := &slowFlush{NewRAM(1 << 20), make(chan struct{}), make(chan struct{})}
	n, err := r.subsys.AddNamespace(NamespaceConfig{Store: s})
	if err != nil {
		t.Fatal(err)
	}
	a := r.admin(testNQN)
	a.setCC(nvme.NewCC(nvme.CCSelectNVM).WithEN(true).WithSHN(nvme.ShutdownNormal))
	<-s.entered
	if c := nvme.CSTS(a.property(nvme.PropCSTS, false)); c.SHST() != nvme.ShutdownStatusRunning {
		t.Errorf("status %v while a flush is under way", c)
	}
	if err := r.subsys.RemoveNamespace(1); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := n.Drained(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the store is at rest: %v", err)
	}
	close(s.leave)
	a.untilStatus(nvme.NewCSTS(false, false, nvme.ShutdownStatusComplete))
	if err := n.Drained(t.Context()); err != nil {
		t.Error(err)
	}
}
