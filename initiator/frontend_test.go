package initiator

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/poller"
)

// frontEnd is a front end for tests. On each loop it has a source that writes and reads
// its own stripe of a device at random, and knows the contents of every block.
type frontEnd struct {
	t       testing.TB
	jobs    []*job
	regions []block.Region
}

// job is the part of a front end on one loop. Only the loop uses its fields.
type job struct {
	loop    *poller.Loop
	queue   block.Queue
	rng     *rand.Rand
	first   uint64   // sector of the stripe
	content []uint32 // generation per block of the stripe; 0 = zeroes
	known   []bool   // whether content says what a block reads
	busy    []bool   // blocks under a request
	tags    []tagState
	free    []uint16
	batch   []block.Request
	results []block.Result
	left    int // requests to start
	flying  int
	err     error
	ended   bool
	done    chan struct{} // closed when ended is set
	errnos  atomic.Int64  // results with an errno, where allowed
	allow   bool
	lbs     int // bytes
	maxIO   int

	mem    []byte // region, of which half of the reads and writes have segments; nil: all use buffers
	region uint16
}

type tagState struct {
	op     block.Op
	at, n  int // blocks of the stripe
	genera uint32
	list   []block.Segment // that have the data; empty: the buffer
}

// newFrontEnd opens a queue of the device on every loop.
func newFrontEnd(t testing.TB, dev block.Device, loops []*poller.Loop, depth, maxIO int, seed uint64) *frontEnd {
	t.Helper()
	f := &frontEnd{t: t}
	g := dev.Geometry()
	stripe := g.Sectors / uint64(len(loops)) / 8 * 8
	for i, l := range loops {
		q, err := dev.OpenQueue(i, block.QueueConfig{Depth: depth, MaxIO: maxIO})
		if err != nil {
			t.Fatal(err)
		}
		lbs := int(g.LogicalBlock)
		blocks := min(int(stripe)*512/lbs, 4096)
		j := &job{
			loop: l, queue: q, rng: rand.New(rand.NewPCG(seed, uint64(i))), first: uint64(i) * stripe,
			content: make([]uint32, blocks), known: make([]bool, blocks), busy: make([]bool, blocks),
			tags: make([]tagState, depth), batch: make([]block.Request, 0, depth), results: make([]block.Result, depth),
			lbs: lbs, maxIO: maxIO,
		}
		for tag := range depth {
			j.free = append(j.free, uint16(tag))
		}
		f.jobs = append(f.jobs, j)
	}
	return f
}

// scatter makes the front end have the data of half of its reads and writes in segments of a region,
// which are 4 bytes behind the beginning of a block. It is called once, before run or start.
func (f *frontEnd) scatter(dev block.Registrar) {
	f.t.Helper()
	for _, j := range f.jobs {
		mem, err := hostmem.Map(len(j.tags) * j.stride())
		if err != nil {
			f.t.Fatal(err)
		}
		r, err := dev.Register(mem)
		if err != nil {
			f.t.Fatal(err)
		}
		f.t.Cleanup(func() { hostmem.Unmap(mem) })
		f.regions = append(f.regions, r)
		j.mem, j.region = mem, r.Number()
	}
}

// stride is the number of bytes of the region for a tag.
func (j *job) stride() int { return j.maxIO + 2*block.MaxSegments*j.lbs }

// place chooses segments for the data of a request: blocks in any order, with gaps.
func (j *job) place(tag uint16, blocks int) {
	s := &j.tags[tag]
	if s.list = s.list[:0]; j.mem == nil || j.rng.IntN(2) == 0 {
		return
	}
	n := 1 + j.rng.IntN(min(blocks, block.MaxSegments))
	at := uint64(int(tag)*j.stride() + 4)
	for left := n; left > 0; left-- {
		length := blocks
		if left > 1 {
			length = 1 + j.rng.IntN(min(2*blocks/left, blocks-left+1))
		}
		s.list = append(s.list, block.Segment{Region: j.region, Offset: at, Length: uint32(length * j.lbs)})
		at += uint64((length + j.rng.IntN(2)) * j.lbs)
		blocks -= length
	}
	j.rng.Shuffle(n, func(a, b int) { s.list[a], s.list[b] = s.list[b], s.list[a] })
	copy(j.queue.(block.Gatherer).Segments(tag)[:], s.list)
}

// block returns the memory of block i of the data of a request.
func (j *job) block(tag uint16, i int) []byte {
	at := i * j.lbs
	for _, g := range j.tags[tag].list {
		if at < int(g.Length) {
			return j.mem[int(g.Offset)+at:][:j.lbs]
		}
		at -= int(g.Length)
	}
	return j.queue.Buffer(tag)[at:][:j.lbs]
}

// run makes every job execute n requests, and waits for them.
func (f *frontEnd) run(n int) {
	f.t.Helper()
	for _, err := range f.try(n) {
		f.t.Error(err)
	}
	if f.t.Failed() {
		// Buffers may still be in use, so nothing may be closed.
		f.t.FailNow()
	}
}

func (f *frontEnd) try(n int) (errs []error) {
	f.start(n)
	return f.wait(3 * time.Minute) // emulated machines are slow
}

func (f *frontEnd) start(n int) {
	for _, j := range f.jobs {
		j.done = make(chan struct{})
		if err := j.loop.Call(func() { j.left, j.err, j.ended = n, nil, false; j.loop.Attach(j) }); err != nil {
			f.t.Fatal(err)
		}
	}
}

func (f *frontEnd) wait(limit time.Duration) (errs []error) {
	timeout := time.After(limit)
	for i, j := range f.jobs {
		select {
		case <-j.done:
		case <-timeout:
			j.loop.Call(func() {
				q := j.queue.(*nsQueue)
				errs = append(errs, fmt.Errorf("job %d did not end: %d to start, %d in flight, %s", i, j.left, j.flying, q.lane.describe()))
			})
			continue
		}
		j.loop.Call(func() {
			j.loop.Detach(j)
			if j.err != nil {
				errs = append(errs, fmt.Errorf("job %d: %w", i, j.err))
			}
		})
	}
	return errs
}

func (f *frontEnd) close() {
	f.t.Helper()
	for _, j := range f.jobs {
		if err := j.queue.Close(); err != nil {
			f.t.Error(err)
		}
	}
	for _, r := range f.regions {
		if err := r.Close(); err != nil {
			f.t.Error(err)
		}
	}
}

// Poll implements poller.Source.
func (j *job) Poll() int {
	n := j.queue.Reap(j.results)
	for _, r := range j.results[:n] {
		j.finish(r)
	}
	j.batch = j.batch[:0]
	for j.left > 0 && len(j.free) > 0 && j.prepare() {
		j.left--
	}
	if len(j.batch) > 0 {
		j.queue.Submit(j.batch)
	}
	if j.left == 0 && j.flying == 0 && !j.ended {
		j.ended = true
		close(j.done)
	}
	return n + len(j.batch)
}

// Arm implements poller.Source.
func (j *job) Arm() poller.Readiness { return poller.Sleep }

func (j *job) prepare() bool {
	size := 1 + j.rng.IntN(min(j.maxIO/j.lbs, len(j.content)/4))
	at := j.rng.IntN(len(j.content) - size)
	for i := at; i < at+size; i++ {
		if j.busy[i] {
			return j.flying == 0 || len(j.batch) == 0 && j.flying < 2
		}
	}
	tag := j.free[len(j.free)-1]
	j.free = j.free[:len(j.free)-1]
	perBlock := j.lbs / 512
	r := block.Request{Tag: tag, Sector: j.first + uint64(at*perBlock), Sectors: uint32(size * perBlock)}
	s := &j.tags[tag]
	*s = tagState{at: at, n: size, list: s.list[:0]}
	switch k := j.rng.IntN(20); {
	case k < 9:
		r.Op = block.OpWrite
		s.genera = j.rng.Uint32() | 1
		j.place(tag, size)
		for i := range size {
			b := j.block(tag, i)
			binary.LittleEndian.PutUint32(b, s.genera)
			binary.LittleEndian.PutUint32(b[4:], uint32(at+i))
			binary.LittleEndian.PutUint32(b[j.lbs-4:], s.genera)
		}
		if k == 0 {
			r.Flags = block.FUA
		}
	case k < 17:
		r.Op = block.OpRead
		j.place(tag, size)
		for i := range size {
			clear(j.block(tag, i))
		}
	case k < 18:
		r.Op = block.OpDiscard
	case k < 19:
		r.Op = block.OpWriteZeroes
	default:
		r.Op, r.Sector, r.Sectors = block.OpFlush, 0, 0
		s.n = 0
	}
	s.op, r.Segments = r.Op, uint8(len(s.list))
	for i := at; i < at+s.n; i++ {
		j.busy[i] = true
	}
	j.flying++
	j.batch = append(j.batch, r)
	return true
}

func (j *job) finish(r block.Result) {
	s := &j.tags[r.Tag]
	j.free = append(j.free, r.Tag)
	j.flying--
	for i := s.at; i < s.at+s.n; i++ {
		j.busy[i] = false
	}
	if r.Errno != 0 {
		j.errnos.Add(1)
		if j.err == nil && !j.allow {
			j.err = fmt.Errorf("%v of block %d+%d: errno %d", s.op, s.at, s.n, r.Errno)
		}
		return
	}
	for i := range s.n {
		switch s.op {
		case block.OpWrite:
			j.content[s.at+i], j.known[s.at+i] = s.genera, true
		case block.OpDiscard:
			j.known[s.at+i] = false
		case block.OpWriteZeroes:
			j.content[s.at+i], j.known[s.at+i] = 0, true
		case block.OpRead:
			if !j.known[s.at+i] {
				continue
			}
			want, where := j.content[s.at+i], uint32(s.at+i)
			if want == 0 {
				where = 0
			}
			b := j.block(r.Tag, i)
			if got := binary.LittleEndian.Uint32(b); (got != want || binary.LittleEndian.Uint32(b[4:]) != where || binary.LittleEndian.Uint32(b[j.lbs-4:]) != want) && j.err == nil {
				j.err = fmt.Errorf("block %d reads %#x of block %d, want %#x", s.at+i, got, binary.LittleEndian.Uint32(b[4:]), want)
			}
		}
	}
}

// describe returns the state of a lane, for a test that hangs.
func (l *lane) describe() string {
	s := fmt.Sprintf("inbox %v parked %v", l.inbox.Load() != nil, l.parked.head != nil)
	for _, p := range l.pairs {
		s += fmt.Sprintf(", queue %d: %d outstanding, %d pending, waiting %v, armed %v, lost %v",
			p.qid, p.sq.Outstanding(), p.sq.Pending(), p.waiting.head != nil, p.armed, p.lost)
	}
	return s
}
