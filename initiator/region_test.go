package initiator

import (
	"bytes"
	"context"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
)

const regionSize = 1 << 20

// regionSetup is a namespace with a region.
type regionSetup struct {
	fabric *rdmatest.Fabric
	target *fakeTarget
	sub    *Subsystem
	loop   *poller.Loop
	queue  block.Queue
	mem    []byte
	region block.Region
}

func newRegionSetup(t *testing.T, prepare func(*fakeTarget)) *regionSetup {
	t.Helper()
	s := &regionSetup{fabric: rdmatest.NewFabric()}
	s.target = newFakeTarget(t, s.fabric, 1<<20)
	if prepare != nil {
		prepare(s.target)
	}
	s.loop = newLoops(t, 1)[0]
	cfg := testConfig(s.fabric.Provider(hostAddr), []*poller.Loop{s.loop}, poller.Request{IO: 1})
	cfg.ReconnectDelay = 10 * time.Millisecond
	s.sub = connect(t, cfg)
	t.Cleanup(func() { closeSubsystem(t, s.sub) })
	var err error
	if s.queue, err = s.sub.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 4, MaxIO: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.queue.Close() })
	s.register(t)
	return s
}

func (s *regionSetup) register(t *testing.T) {
	t.Helper()
	mem, err := hostmem.Map(regionSize)
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.sub.Namespaces()[0].Register(mem)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = r.Close() // most tests have closed it
		if err := hostmem.Unmap(mem); err != nil {
			t.Error(err)
		}
	})
	s.mem, s.region = mem, r
}

// do executes a request with the region.
func (s *regionSetup) do(t *testing.T, op block.Op) unix.Errno {
	t.Helper()
	return submit(t, s.loop, s.queue, block.Request{Op: op, Sectors: 16, Region: s.region.Number()})
}

// start is do in the background.
func (s *regionSetup) start(t *testing.T, op block.Op) <-chan unix.Errno {
	done := make(chan unix.Errno, 1)
	go func() { done <- s.do(t, op) }()
	return done
}

// close closes the region in the background.
func (s *regionSetup) close() chan error {
	done := make(chan error, 1)
	go func() { done <- s.region.Close() }()
	return done
}

// slowRead is a target whose first read waits before it writes the host's memory.
func slowRead() (prepare func(*fakeTarget), began, late chan struct{}) {
	began, late = make(chan struct{}), make(chan struct{})
	var first sync.Once
	return func(f *fakeTarget) {
		copy(f.disk.Bytes(), "disk")
		f.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
			if qid > 0 && cmd.Opcode() == nvme.OpRead {
				first.Do(func() {
					close(began)
					<-late
				})
			}
			return 0, false
		}
	}, began, late
}

// TestCloseRegionAwaitsTarget closes a region while the target executes a read to it. The memory
// is free only after the target has written it.
func TestCloseRegionAwaitsTarget(t *testing.T) {
	prepare, began, late := slowRead()
	s := newRegionSetup(t, prepare)
	done := s.start(t, block.OpRead)
	<-began
	closed := s.close()
	select {
	case err := <-closed:
		t.Error("closed while the target may write the region")
		closed <- err
	case <-time.After(50 * time.Millisecond):
	}
	close(late)
	if errno, err := <-done, <-closed; errno != 0 || err != nil {
		t.Errorf("read: %v; close: %v", errno, err)
	}
	if string(s.mem[:4]) != "disk" {
		t.Errorf("the region has %q", s.mem[:4])
	}
}

// TestCloseRegionAfterLoss closes a region while the target executes a read to it over an
// association that is lost. When Close returns, the target cannot write the region any more.
func TestCloseRegionAfterLoss(t *testing.T) {
	for name, lose := range map[string]func(*regionSetup){
		"broken": func(s *regionSetup) { s.fabric.KillAll(hostAddr) },
		"noticed by the host only": func(s *regionSetup) {
			s.sub.slots[0].current().fail(because(LossKeepAlive, context.DeadlineExceeded))
		},
	} {
		t.Run(name, func(t *testing.T) {
			prepare, began, late := slowRead()
			s := newRegionSetup(t, prepare)
			done := s.start(t, block.OpRead)
			<-began
			closed := s.close()
			lose(s)
			if errno, err := <-done, <-closed; errno != unix.EFAULT || err != nil {
				t.Errorf("read: %v, want EFAULT; close: %v", errno, err)
			}
			mine := []byte("used for something else")
			copy(s.mem, mine)
			close(late)
			s.register(t)
			if errno := s.do(t, block.OpRead); errno != 0 { // the target is there again
				t.Errorf("read: %v", errno)
			}
			if got := s.mem[:4]; string(got) != "disk" {
				t.Errorf("the next region has %q", got)
			}
		})
	}
}

// TestRegionsWhileDown adds and removes regions while there is no association.
func TestRegionsWhileDown(t *testing.T) {
	s := newRegionSetup(t, func(f *fakeTarget) { copy(f.disk.Bytes(), "disk") })
	s.fabric.SetRefuse(targetAddr, rdma.RejectInvalidServiceID, nil)
	s.fabric.KillAll(hostAddr)
	waitFor(t, "an attempt", func() bool { return s.sub.Info().Paths[0].Attempts >= 1 })
	done := s.start(t, block.OpWrite)
	waitFor(t, "a request to wait", func() bool { return s.sub.Info().Lanes[0].Held == 1 })
	closed := s.close() // although there is nobody to answer
	if errno, err := <-done, <-closed; errno != unix.EFAULT || err != nil {
		t.Errorf("write: %v, want EFAULT; close: %v", errno, err)
	}
	s.fabric.ReplaceDevice(hostAddr)
	s.register(t)
	done = s.start(t, block.OpRead)
	waitFor(t, "a request to wait", func() bool { return s.sub.Info().Lanes[0].Held == 1 })
	s.fabric.SetRefuse(targetAddr, 0, nil)
	if errno := <-done; errno != 0 || string(s.mem[:4]) != "disk" {
		t.Errorf("read: %v, %q", errno, s.mem[:4])
	}
	if got := s.sub.Info().Memory.Regions; got != regionSize {
		t.Errorf("%d bytes of regions, want %d", got, regionSize)
	}
}

// TestRegionOutlivesSends closes a region whose data may have to be sent again.
func TestRegionOutlivesSends(t *testing.T) {
	s := newRegionSetup(t, nil)
	copy(s.mem, "sent")
	s.fabric.SetDeaf(hostAddr, true)
	if errno := submit(t, s.loop, s.queue, block.Request{Op: block.OpWrite, Sectors: 1, Region: s.region.Number()}); errno != 0 {
		t.Fatal(errno)
	}
	closed := s.close()
	select {
	case err := <-closed:
		t.Error("closed before the data in a capsule was acknowledged")
		closed <- err
	case <-time.After(50 * time.Millisecond):
	}
	s.fabric.SetDeaf(hostAddr, false)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if !bytes.HasPrefix(s.target.disk.Bytes(), []byte("sent")) {
		t.Error("the data did not arrive")
	}
	if got := s.sub.Info().Memory.Regions; got != 0 {
		t.Errorf("%d bytes of regions are left", got)
	}
}
