package initiator

import (
	"testing"

	"ublk-nvmeof/block"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/target"
)

// buffers returns the number of queues whose buffers are not free.
func (s *Subsystem) buffers() int {
	s.mem.mu.Lock()
	defer s.mem.mu.Unlock()
	return len(s.mem.slabs)
}

// losses returns the number of associations that were lost.
func (s *Subsystem) losses() int {
	n := 0
	for _, count := range s.Info().Outages.Losses {
		n += count
	}
	return n
}

// TestBuffersOutliveSends closes queues whose data may have to be sent again. The buffers are
// freed when the SENDs are confirmed, and at the end of the association otherwise.
func TestBuffersOutliveSends(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 1<<20)
	loops := newLoops(t, 2)
	c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 2}))
	write := func() {
		r := block.Request{Op: block.OpWrite, Sectors: 1}
		if errno := single(t, loops[0], c.Namespaces()[0], r, "data"); errno != 0 {
			t.Fatalf("errno %d", errno)
		}
	}
	fabric.SetDeaf(hostAddr, true)
	write()
	write()
	if n, used := c.buffers(), c.Info().Memory.Used; n != 2 || used != 0 {
		t.Errorf("%d queues have buffers before their SENDs are confirmed, want 2; %d bytes are said to be in use", n, used)
	}
	fabric.SetDeaf(hostAddr, false)
	waitFor(t, "buffers to be freed", func() bool { return c.buffers() == 0 })
	write()
	if n := c.losses(); n != 0 {
		t.Errorf("%d associations were lost", n)
	}

	fabric.SetDeaf(hostAddr, true)
	write()
	closeSubsystem(t, c)
	if n := c.buffers(); n != 0 {
		t.Errorf("%d queues have buffers after the end", n)
	}
}

// TestReusedBuffers rewrites buffers as soon as the target has answered, while
// acknowledgements are lost.
func TestReusedBuffers(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 4<<20)
	loops := newLoops(t, 2)
	c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 2}))
	f := newFrontEnd(t, c.Namespaces()[0], loops, 32, 4096, 3)
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for deaf := true; ; deaf = !deaf {
			fabric.SetDeaf(hostAddr, deaf)
			select {
			case <-end:
				fabric.SetDeaf(hostAddr, false)
				return
			default:
			}
		}
	}()
	f.run(5000)
	close(end)
	<-ended
	f.close()
	if n := c.losses(); n != 0 {
		t.Errorf("%d associations were lost", n)
	}
	closeSubsystem(t, c)
}

// TestCloseAfterWrite closes a queue right after its last write, again and again. RoCEv2 in Go
// asks for few acknowledgements, so the SEND is often not confirmed yet, and sent again later.
func TestCloseAfterWrite(t *testing.T) {
	w := newWire(t, target.Config{}, target.NamespaceConfig{})
	loops := newLoops(t, 2)
	c := connect(t, w.config(loops, poller.Request{IO: 2}))
	for i := range 50 {
		r := block.Request{Op: block.OpWrite, Sector: uint64(i), Sectors: 1}
		if errno := single(t, loops[0], c.Namespaces()[0], r, "data"); errno != 0 {
			t.Fatalf("errno %d", errno)
		}
	}
	waitFor(t, "buffers to be freed", func() bool { return c.buffers() == 0 })
	for _, l := range c.lanes {
		l.loop.Call(func() {
			for _, p := range l.pairs {
				if !p.sq.Confirmed(p.sq.Mark()) {
					t.Errorf("queue %d may have to send data again whose buffer is gone", p.qid)
				}
			}
		})
	}
	if n := c.losses(); n != 0 {
		t.Errorf("%d associations were lost", n)
	}
	closeSubsystem(t, c)
}
