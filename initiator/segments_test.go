package initiator

import (
	"bytes"
	"fmt"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/target"
)

// pieces is a region with segments of 512 bytes, which do not touch each other.
type pieces struct {
	mem    []byte
	region block.Region
}

func newPieces(t testing.TB, ns *Namespace) *pieces {
	t.Helper()
	mem, err := hostmem.Map(64 << 10)
	if err != nil {
		t.Fatal(err)
	}
	r, err := ns.Register(mem)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { hostmem.Unmap(mem) })
	return &pieces{mem, r}
}

// request fills in the table of tag 0 with n segments, and returns a request with them.
func (p *pieces) request(q block.Queue, op block.Op, n int) block.Request {
	table := q.(block.Gatherer).Segments(0)
	for i := range n {
		table[i] = block.Segment{Region: p.region.Number(), Offset: uint64(4 + 1024*i), Length: 512}
	}
	return block.Request{Op: op, Sectors: uint32(n), Segments: uint8(n)}
}

// fill writes a pattern to n segments, and returns it.
func (p *pieces) fill(n int, seed byte) (data []byte) {
	for i := range n {
		copy(p.mem[4+1024*i:], bytes.Repeat([]byte{seed + byte(i)}, 512))
		data = append(data, p.mem[4+1024*i:][:512]...)
	}
	return data
}

func (p *pieces) data(n int) (data []byte) {
	for i := range n {
		data = append(data, p.mem[4+1024*i:][:512]...)
	}
	return data
}

// TestDescriptors counts the commands of a request with 16 segments: as few as the target allows.
func TestDescriptors(t *testing.T) {
	for _, c := range []struct{ limit, transfer, commands, lists int }{
		{16, 1 << 20, 1, 1}, {1, 1 << 20, 16, 0}, {3, 1 << 20, 6, 5}, {5, 1 << 20, 4, 3}, {16, 8192, 1, 1}, {15, 1 << 20, 2, 1},
	} {
		h := newHall(t, 1, false, func(cfg *target.Config, _ *target.NamespaceConfig) {
			cfg.MaxDescriptors, cfg.MaxTransfer = c.limit, c.transfer
		})
		s := h.connect(nil)
		ns := s.Namespaces()[0]
		q, err := ns.OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096})
		if err != nil {
			t.Fatal(err)
		}
		if got := q.(block.Gatherer).SegmentLimit(); got != c.limit {
			t.Errorf("%+v: the limit is %d segments", c, got)
		}
		p := newPieces(t, ns)
		for _, op := range []block.Op{block.OpWrite, block.OpRead} {
			before := h.targets[0].Snapshot().IO
			want := p.fill(16, byte(c.limit))
			if op == block.OpRead {
				clear(p.mem)
			}
			if e := submit(t, h.loops[0], q, p.request(q, op, 16)); e != 0 {
				t.Fatalf("%+v: %v: %v", c, op, e)
			}
			if !bytes.Equal(p.data(16), want) {
				t.Errorf("%+v: %v: wrong data", c, op)
			}
			after := h.targets[0].Snapshot().IO
			code := map[block.Op]nvme.Opcode{block.OpRead: nvme.OpRead, block.OpWrite: nvme.OpWrite}[op]
			if n, lists := after.Commands[code]-before.Commands[code], after.Lists-before.Lists; n != uint64(c.commands) || lists != uint64(c.lists) {
				t.Errorf("%+v: %v: %d commands and %d lists", c, op, n, lists)
			}
		}
		if err := q.Close(); err != nil {
			t.Error(err)
		}
		if err := p.region.Close(); err != nil {
			t.Error(err)
		}
	}
}

// newMixedHall has targets of one disk that allow different numbers of descriptors.
func newMixedHall(t testing.TB, limits ...int) *hall {
	n := 0
	return newHall(t, len(limits), true, func(c *target.Config, _ *target.NamespaceConfig) {
		c.MaxDescriptors = limits[n]
		n++
	})
}

// TestSegmentLimit: what each present path allows counts.
func TestSegmentLimit(t *testing.T) {
	h := newMixedHall(t, 16, 1)
	s := h.connect(func(c *Config) { c.Policy = Preferred })
	q, err := s.Namespaces()[0].OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	limit := func(want int) {
		t.Helper()
		waitFor(t, fmt.Sprintf("a limit of %d segments", want), func() bool { return q.(block.Gatherer).SegmentLimit() == want })
	}
	limit(1)
	mend := h.cut(1)
	limit(16)
	mend()
	limit(1)
	defer h.cut(0)()
	time.Sleep(50 * time.Millisecond)
	limit(1)
}

// TestSegmentsOverAnotherPath loses the path of a request with segments that is in flight. The request
// is executed over another path that allows fewer descriptors, and with the keys of that path.
func TestSegmentsOverAnotherPath(t *testing.T) {
	for _, limits := range [][]int{{16, 1}, {1, 16}, {16, 3}, {3, 16}} {
		for _, op := range []block.Op{block.OpRead, block.OpWrite} {
			t.Run(fmt.Sprintf("%v/%v", limits, op), func(t *testing.T) {
				h := newMixedHall(t, limits...)
				s := h.connect(func(c *Config) { c.Policy, c.KeepAlive = Preferred, 200*time.Millisecond })
				ns := s.Namespaces()[0]
				q, err := ns.OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 16 << 10})
				if err != nil {
					t.Fatal(err)
				}
				p := newPieces(t, ns)
				want := p.fill(16, 3)
				if e := submit(t, h.loops[0], q, p.request(q, block.OpWrite, 16)); e != 0 {
					t.Fatal(e)
				}
				if clear(p.mem); op == block.OpWrite {
					want = p.fill(16, 100)
				}
				// The second command of the request gets no answer, so there is progress to forget.
				skip := 0
				if limits[0] < 16 {
					skip = 1
				}
				lost := h.targets[0].Faults().Add(target.Fault{Match: target.Match{QID: 1, Opcodes: []nvme.Opcode{nvme.OpRead, nvme.OpWrite}}, Skip: skip, Drop: true})
				done := make(chan unix.Errno, 1)
				r := p.request(q, op, 16)
				go func() { done <- submit(t, h.loops[0], q, r) }()
				waitFor(t, "a command without an answer", func() bool {
					return h.targets[0].Snapshot().IO.Commands[nvme.OpRead]+h.targets[0].Snapshot().IO.Commands[nvme.OpWrite] > uint64(skip) && s.inflight()[0] == 1
				})
				defer lost.Remove()
				defer h.cut(0)()
				if e := <-done; e != 0 {
					t.Fatal(e)
				}
				if !bytes.Equal(p.data(16), want) {
					t.Error("wrong data")
				}
				clear(p.mem)
				if e := submit(t, h.loops[0], q, p.request(q, block.OpRead, 16)); e != 0 || !bytes.Equal(p.data(16), want) {
					t.Errorf("the disk has something else, %v", e)
				}
				if n := h.targets[1].Snapshot().IO.Commands[nvme.OpRead]; n < uint64((16+limits[1]-1)/limits[1]) {
					t.Errorf("the second path has executed %d reads", n)
				}
				if err := q.Close(); err != nil {
					t.Error(err)
				}
				if err := p.region.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestSegmentsWhileDown closes one region of a request that waits for a path.
func TestSegmentsWhileDown(t *testing.T) {
	h := newHall(t, 1, false, nil)
	s := h.connect(nil)
	ns := s.Namespaces()[0]
	q, err := ns.OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	p, other := newPieces(t, ns), newPieces(t, ns)
	mend := h.cut(0)
	r := p.request(q, block.OpWrite, 4)
	q.(block.Gatherer).Segments(0)[3].Region = other.region.Number()
	done := make(chan unix.Errno, 1)
	go func() { done <- submit(t, h.loops[0], q, r) }()
	waitFor(t, "a request to wait", func() bool { return s.Info().Lanes[0].Held == 1 })
	if err := other.region.Close(); err != nil {
		t.Error(err)
	}
	if e := <-done; e != unix.EFAULT {
		t.Errorf("write: %v, want EFAULT", e)
	}
	mend()
	if e := submit(t, h.loops[0], q, p.request(q, block.OpWrite, 4)); e != 0 {
		t.Errorf("write: %v", e)
	}
	if err := q.Close(); err != nil {
		t.Error(err)
	}
	if err := p.region.Close(); err != nil {
		t.Error(err)
	}
}

// TestSegmentsFailover verifies I/O with segments over paths that allow different numbers of descriptors, while one after
// the other is lost. No request fails, and each path has had some.
func TestSegmentsFailover(t *testing.T) {
	h := newMixedHall(t, 1, 16, 3)
	s := h.connect(func(c *Config) { c.KeepAlive = 200 * time.Millisecond })
	f := newFrontEnd(t, s.Namespaces()[0], h.loops, 8, 64<<10, 7)
	f.scatter(s.Namespaces()[0])
	f.start(6000)
	for round := range 6 {
		time.Sleep(20 * time.Millisecond)
		mend := h.cut(round % 3)
		time.Sleep(20 * time.Millisecond)
		mend()
		waitFor(t, "the path", func() bool { return s.Info().Paths[round%3].State == StateLive })
	}
	for _, err := range f.wait(2 * time.Minute) {
		t.Error(err)
	}
	f.close()
	for n, want := range []bool{false, true, true} {
		io := h.targets[n].Snapshot().IO
		if io.Commands[nvme.OpRead] == 0 || (io.Lists > 0) != want {
			t.Errorf("path %d: %d reads, %d lists", n, io.Commands[nvme.OpRead], io.Lists)
		}
	}
}

// TestRoCESegments verifies I/O with segments over RoCEv2, also while connections are lost.
func TestRoCESegments(t *testing.T) {
	for name, c := range map[string]target.Config{
		"sixteen":         {},
		"one":             {MaxDescriptors: 1},
		"small transfers": {MaxDescriptors: 5, MaxTransfer: 16384, QueueSize: 16},
		"small capsules":  {InCapsule: 64},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWire(t, c, target.NamespaceConfig{})
			loops := newLoops(t, 1)
			ctl := connect(t, w.config(loops, poller.Request{IO: 1}))
			f := newFrontEnd(t, ctl.Namespaces()[0], loops, 16, 128<<10, 11)
			if got := f.jobs[0].queue.(block.Gatherer).SegmentLimit(); got != 1 {
				t.Errorf("the limit is %d segments, but copies cost less than packets", got)
			}
			f.scatter(ctl.Namespaces()[0])
			f.start(1500)
			for range 3 {
				time.Sleep(30 * time.Millisecond)
				w.sub.DropControllers()
				waitFor(t, "the next association", func() bool { return ctl.Info().Paths[0].State == StateLive })
			}
			for _, err := range f.wait(2 * time.Minute) {
				t.Error(err)
			}
			f.close()
			if lists := w.target.Snapshot().IO.Lists; (lists > 0) != (c.MaxDescriptors != 1) {
				t.Errorf("%d commands with lists", lists)
			}
			closeSubsystem(t, ctl)
		})
	}
}

// TestSegmentsAfterRestart has a target that allows fewer descriptors after a restart.
func TestSegmentsAfterRestart(t *testing.T) {
	h := newHall(t, 1, false, nil)
	cfg := testConfig(nil, h.loops, poller.Request{IO: 1})
	cfg.Path, cfg.ReconnectDelay = h.path(0), 10*time.Millisecond
	s := connect(t, cfg)
	defer closeSubsystem(t, s) // before the last target
	ns := s.Namespaces()[0]
	q, err := ns.OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	p := newPieces(t, ns)
	store := target.NewRAM(1 << 20)
	want := p.fill(16, 1)
	for _, limit := range []int{16, 1, 4} {
		if limit != 16 {
			h.targets[len(h.targets)-1].Close()
			h.open(target.Config{MaxDescriptors: limit}, target.NamespaceConfig{NSID: 1, Store: store, UUID: h.uuid})
			h.addPort(h.targets[len(h.targets)-1], 0)
		}
		r := p.request(q, block.OpWrite, 16)
		if e := submit(t, h.loops[0], q, r); e != 0 {
			t.Fatalf("limit %d: %v", limit, e)
		}
		waitFor(t, "the limit", func() bool { return q.(block.Gatherer).SegmentLimit() == limit })
		clear(p.mem)
		if e := submit(t, h.loops[0], q, p.request(q, block.OpRead, 16)); e != 0 || !bytes.Equal(p.data(16), want) {
			t.Errorf("limit %d: wrong data, %v", limit, e)
		}
	}
	if err := q.Close(); err != nil {
		t.Error(err)
	}
	if err := p.region.Close(); err != nil {
		t.Error(err)
	}
}

// BenchmarkSegments reads 8 KiB to 16 segments, of which a command can have one or all.
func BenchmarkSegments(b *testing.B) {
	for _, limit := range []int{1, 16} {
		b.Run(fmt.Sprint(limit), func(b *testing.B) {
			h := newHall(b, 1, false, func(c *target.Config, _ *target.NamespaceConfig) { c.MaxDescriptors = limit })
			s := h.connect(nil)
			ns := s.Namespaces()[0]
			q, err := ns.OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: 4096})
			if err != nil {
				b.Fatal(err)
			}
			p := newPieces(b, ns)
			reqs, results := []block.Request{p.request(q, block.OpRead, 16)}, make([]block.Result, 1)
			b.ReportAllocs()
			b.ResetTimer()
			h.loops[0].Call(func() {
				for range b.N {
					q.Submit(reqs)
					for q.Reap(results) == 0 {
						if s.lanes[0].Poll()+s.lanes[0].Flush() == 0 {
							runtime.Gosched()
						}
					}
				}
			})
			b.StopTimer()
			if results[0].Errno != 0 {
				b.Fatal(unix.Errno(results[0].Errno))
			}
			if err := q.Close(); err != nil {
				b.Error(err)
			}
			if err := p.region.Close(); err != nil {
				b.Error(err)
			}
		})
	}
}
