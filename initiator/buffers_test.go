package initiator

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
)

// exhausted is a domain on a device that registers nothing more.
type exhausted struct{ rdma.PD }

func (exhausted) RegMR([]byte, rdma.Access) (rdma.MR, error) { return nil, unix.ENOMEM }

// exhaust makes the device of a path register nothing, until the function that it returns is called.
func exhaust(m *memory, slot int) (heal func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.domains[slot]
	pd := d.pd
	d.pd = exhausted{pd}
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		d.pd = pd
	}
}

// chunkSetup is a namespace with a queue whose chunks have one buffer each.
type chunkSetup struct {
	fabric *rdmatest.Fabric
	target *fakeTarget
	sub    *Subsystem
	loop   *poller.Loop
	queue  *nsQueue
}

const chunkDepth = 4

func newChunkSetup(t *testing.T) *chunkSetup {
	t.Helper()
	s := &chunkSetup{fabric: rdmatest.NewFabric(), loop: newLoops(t, 1)[0]}
	s.target = newFakeTarget(t, s.fabric, 1<<20)
	cfg := testConfig(s.fabric.Provider(hostAddr), []*poller.Loop{s.loop}, poller.Request{IO: 1})
	cfg.ReconnectDelay = 10 * time.Millisecond
	s.sub = connect(t, cfg)
	t.Cleanup(func() { closeSubsystem(t, s.sub) })
	s.sub.mem.chunk, s.sub.mem.turns, s.sub.mem.limited = 64<<10, 0, false
	s.queue = s.open(t)
	t.Cleanup(func() { s.queue.Close() })
	return s
}

func (s *chunkSetup) open(t *testing.T) *nsQueue {
	t.Helper()
	q, err := s.sub.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: chunkDepth, MaxIO: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	return q.(*nsQueue)
}

// ready tells which chunks are ready, when none is being made ready any more.
func (s *chunkSetup) ready(t *testing.T) (all []bool) {
	t.Helper()
	s.queue.buffers.preparing.Wait()
	s.loop.Call(func() {
		for i := range s.queue.buffers.chunks {
			all = append(all, s.queue.buffers.chunks[i].ready)
		}
	})
	return all
}

func (s *chunkSetup) expect(t *testing.T, want ...bool) {
	t.Helper()
	if got := s.ready(t); !slices.Equal(got, want) {
		t.Errorf("ready chunks %v, want %v", got, want)
	}
	bytes := int64(64 << 10) // the spare buffer
	for _, ready := range want {
		if ready {
			bytes += 64 << 10
		}
	}
	if got := s.sub.Info().Memory; got.Used != (chunkDepth+1)*64<<10 || got.Registered != bytes {
		t.Errorf("%d bytes are reserved and %d registered, want %d and %d", got.Used, got.Registered, (chunkDepth+1)*64<<10, bytes)
	}
}

// echo writes text with one tag and reads it with another.
func (s *chunkSetup) echo(t *testing.T, text string, write, read uint16) {
	t.Helper()
	copy(s.queue.Buffer(write), text)
	if e := submit(t, s.loop, s.queue, block.Request{Op: block.OpWrite, Tag: write, Sectors: 128}); e != 0 {
		t.Error(e)
	}
	if e := submit(t, s.loop, s.queue, block.Request{Op: block.OpRead, Tag: read, Sectors: 128}); e != 0 {
		t.Error(e)
	}
	if got := s.queue.Buffer(read)[:len(text)]; string(got) != text {
		t.Errorf("%q was written, %q read", text, got)
	}
}

// TestChunks: memory is populated and registered where requests need it.
func TestChunks(t *testing.T) {
	s := newChunkSetup(t)
	s.expect(t, false, false, false, false)
	if e := submit(t, s.loop, s.queue, block.Request{Op: block.OpFlush}); e != 0 {
		t.Error(e)
	}
	s.expect(t, false, false, false, false)
	s.echo(t, "first", 3, 1)
	s.expect(t, false, true, false, true)
	s.echo(t, "second", 1, 3)
	s.echo(t, "third", 0, 1)
	s.expect(t, true, true, false, true)
}

// TestSpareTurns: single requests do with the spare buffer for a while. Requests that find it in use
// do not.
func TestSpareTurns(t *testing.T) {
	s := newChunkSetup(t)
	s.sub.mem.turns = 4
	s.echo(t, "first", 3, 1)
	s.echo(t, "second", 1, 3)
	s.expect(t, false, false, false, false)
	s.echo(t, "third", 2, 2)
	s.expect(t, false, false, true, false)

	other := s.open(t)
	s.loop.Call(func() {
		other.Submit([]block.Request{{Op: block.OpRead, Sectors: 8}, {Op: block.OpRead, Tag: 3, Sectors: 8}})
	})
	(&chunkSetup{loop: s.loop, queue: other}).reap(t, 2)
	if got := (&chunkSetup{loop: s.loop, queue: other}).ready(t); !slices.Equal(got, []bool{false, false, false, true}) {
		t.Errorf("ready chunks %v, want the last one", got)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
}

// TestChunksFail: requests whose buffers cannot be registered take turns.
func TestChunksFail(t *testing.T) {
	s := newChunkSetup(t)
	heal := exhaust(&s.sub.mem, 0)
	s.echo(t, "alone", 0, 2)
	for _, op := range []block.Op{block.OpDiscard, block.OpWriteZeroes} {
		if e := submit(t, s.loop, s.queue, block.Request{Op: op, Tag: 1, Sectors: 8}); e != 0 {
			t.Errorf("%v: %v", op, e)
		}
	}
	together := func() {
		t.Helper()
		var reqs []block.Request
		for tag := range uint16(chunkDepth) {
			copy(s.queue.Buffer(tag), []byte{'a' + byte(tag)})
			reqs = append(reqs, block.Request{Op: block.OpWrite, Tag: tag, Sector: uint64(tag) * 8, Sectors: 8})
		}
		s.loop.Call(func() { s.queue.Submit(reqs) })
		s.reap(t, chunkDepth)
		for tag := range chunkDepth {
			if got := s.target.disk.Bytes()[tag*4096]; got != 'a'+byte(tag) {
				t.Errorf("the data of tag %d is %q", tag, got)
			}
		}
	}
	together()
	s.expect(t, false, false, false, false)
	heal()
	waitFor(t, "the chunks to be ready", func() bool {
		together()
		return !slices.Contains(s.ready(t), false)
	})
	s.expect(t, true, true, true, true)
}

// reap waits for n results.
func (s *chunkSetup) reap(t *testing.T, n int) {
	t.Helper()
	waitFor(t, "the results", func() bool {
		var done [1]block.Result // so there may be more results than room
		s.loop.Call(func() {
			if s.queue.Reap(done[:]) == 1 {
				n--
			}
		})
		if done[0].Errno != 0 {
			t.Fatalf("tag %d: %v", done[0].Tag, unix.Errno(done[0].Errno))
		}
		return n == 0
	})
}

// TestChunksWithoutSpare: requests that wait for the spare buffer go on when their chunks are ready,
// although the target does not answer the request that has it.
func TestChunksWithoutSpare(t *testing.T) {
	s := newChunkSetup(t)
	held, answer := make(chan struct{}), make(chan struct{})
	var first sync.Once
	s.target.mu.Lock()
	s.target.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
		if qid > 0 && cmd.Opcode() == nvme.OpRead {
			wait := false
			first.Do(func() { wait = true })
			if wait {
				close(held)
				<-answer
			}
		}
		return 0, false
	}
	s.target.mu.Unlock()
	heal := exhaust(&s.sub.mem, 0)
	s.loop.Call(func() { s.queue.Submit([]block.Request{{Op: block.OpRead, Sectors: 8}}) })
	<-held
	s.loop.Call(func() {
		s.queue.Submit([]block.Request{{Op: block.OpWrite, Tag: 1, Sectors: 8}, {Op: block.OpWrite, Tag: 2, Sectors: 8}})
	})
	short := func() (n int) {
		s.loop.Call(func() {
			for r := s.queue.buffers.short.head; r != nil; r = r.next {
				n++
			}
		})
		return n
	}
	if n := short(); n != 2 {
		t.Errorf("%d requests wait for memory, want 2", n)
	}
	heal()
	waitFor(t, "memory", func() bool { return short() == 0 })
	close(answer)
	s.reap(t, 3)
}

// TestLimitedMemory: a process that may lock only so much memory learns at once that it is too
// little.
func TestLimitedMemory(t *testing.T) {
	s := newChunkSetup(t)
	s.sub.mem.limited = true
	other := s.open(t)
	if got, want := s.sub.Info().Memory.Registered, int64(64<<10)*(1+chunkDepth+1); got != want {
		t.Errorf("%d bytes are registered, want %d", got, want)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	heal := exhaust(&s.sub.mem, 0)
	if _, err := s.sub.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 2, MaxIO: 64 << 10}); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("%v, want ENOMEM", err)
	}
	heal()
	waitFor(t, "the other queue's buffers to be freed", func() bool { return s.sub.Info().Memory.Registered == 64<<10 })
	s.expect(t, false, false, false, false)
}

// TestChunksMove: chunks are registered with another device, and later ones only with that.
func TestChunksMove(t *testing.T) {
	s := newChunkSetup(t)
	s.echo(t, "before", 0, 1)
	s.fabric.ReplaceDevice(hostAddr)
	s.fabric.KillAll(hostAddr)
	s.echo(t, "after", 1, 0)
	s.echo(t, "later", 2, 3)
	s.expect(t, true, true, true, true)
}

// TestChunksOfPaths: chunks are registered for all paths, also for those that come later and for
// those that are away.
func TestChunksOfPaths(t *testing.T) {
	h := newHall(t, 3, false, nil)
	s := h.connect(nil)
	s.mem.chunk, s.mem.turns, s.mem.limited = 64<<10, 0, false
	if err := s.RemovePath(t.Context(), s.Paths()[2]); err != nil {
		t.Fatal(err)
	}
	f := newFrontEnd(t, s.Namespaces()[0], h.loops, 16, 64<<10, 5)
	f.run(20)
	if _, err := s.AddPath(t.Context(), h.path(2)); err != nil {
		t.Fatal(err)
	}
	f.run(50)
	h.fabric.KillAll(sideAddr(0))
	f.run(50)
	h.fabric.KillAll(sideAddr(1))
	f.run(50)
	f.close()
}

// TestChunksUnderLoad fills chunks on several loops while the association is lost again and again.
func TestChunksUnderLoad(t *testing.T) {
	fabric := rdmatest.NewFabric()
	newFakeTarget(t, fabric, 4<<20).grant.Store(1) // so one loop has no queue pair
	loops := newLoops(t, 2)
	cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 2})
	cfg.ReconnectDelay = 10 * time.Millisecond
	c := connect(t, cfg)
	c.mem.chunk, c.mem.turns, c.mem.limited = 32<<10, 0, false
	for seed := range uint64(5) {
		f := newFrontEnd(t, c.Namespaces()[0], loops, 32, 16<<10, seed)
		f.start(200)
		fabric.KillAll(hostAddr)
		for _, err := range f.wait(time.Minute) {
			t.Fatal(err)
		}
		f.close()
	}
	closeSubsystem(t, c)
}
