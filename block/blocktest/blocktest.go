// Package blocktest is the test suite that every back end must pass: it tests the contract of
// block.Queue that is in the documentation of package block.
//
// A back end calls Test from a test of its own:
//
//	func TestConformance(t *testing.T) {
//		blocktest.Test(t, func(t *testing.T) blocktest.Backend {
//			…
//			return blocktest.Backend{Device: device, Loops: loops}
//		})
//	}
package blocktest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/poller"
)

// Backend is a device with the loops that serve it.
type Backend struct {
	Device block.Device
	// Loops are the loops of the queues: Loops[i] uses queue i. The device must have at
	// least 1024 sectors for each of them. They may be asleep.
	Loops []*poller.Loop
	// Forgets means that reads do not return what was written, as those of block/null.
	Forgets bool
}

// patience is the time after which a result is taken to be lost.
const patience = 30 * time.Second

// Test runs the suite. open makes a device that nobody else uses, and undoes that with
// t.Cleanup.
func Test(t *testing.T, open func(t *testing.T) Backend) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Backend)
	}{
		{"Geometry", testGeometry},
		{"Buffers", testBuffers},
		{"OpenQueue", testOpenQueue},
		{"OpenAtOnce", testOpenAtOnce},
		{"Data", testData},
		{"Zeroes", testZeroes},
		{"Errors", testErrors},
		{"Tags", testTags},
		{"Limits", testLimits},
		{"ReapInParts", testReapInParts},
		{"WakeUps", testWakeUps},
		{"ExactlyOnce", testExactlyOnce},
		{"TwoFrontEnds", testTwoFrontEnds},
		{"Close", testClose},
		{"Regions", testRegions},
		{"CloseRegion", testCloseRegion},
		{"Segments", testSegments},
		{"CloseSegments", testCloseSegments},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
}

const (
	depth = 8
	maxIO = 64 << 10
)

// user is a front end on one loop. It reaps in each pass of the loop, and has no other
// means to find results.
type user struct {
	t     *testing.T
	loop  *poller.Loop
	queue block.Queue
	done  []block.Result // where Poll stores results

	mu      sync.Mutex
	results []block.Result // that were reaped
	arrived chan struct{}  // has a token if there may be new results
}

// open opens queue i of the device, and closes it when the test ends.
func open(t *testing.T, b Backend, i int, cfg block.QueueConfig) *user {
	t.Helper()
	u := &user{t: t, loop: b.Loops[i], done: make([]block.Result, 3), arrived: make(chan struct{}, 1)}
	u.onLoop(func() {
		var err error
		if u.queue, err = b.Device.OpenQueue(i, cfg); err != nil {
			t.Errorf("open queue %d: %v", i, err)
			return
		}
		u.loop.Attach(u)
	})
	if u.queue == nil {
		t.FailNow()
	}
	t.Cleanup(u.close)
	return u
}

func (u *user) close() {
	u.onLoop(func() {
		if u.queue == nil {
			return
		}
		u.loop.Detach(u)
		if u.t.Failed() {
			return // there may be requests in flight
		}
		if err := u.queue.Close(); err != nil {
			u.t.Errorf("close: %v", err)
		}
		u.queue = nil
	})
}

func (u *user) onLoop(fn func()) {
	u.t.Helper()
	if err := u.loop.Call(fn); err != nil {
		u.t.Fatal(err)
	}
}

// Poll implements poller.Source.
func (u *user) Poll() int {
	n := u.queue.Reap(u.done)
	if n == 0 {
		return 0
	}
	u.mu.Lock()
	u.results = append(u.results, u.done[:n]...)
	u.mu.Unlock()
	select {
	case u.arrived <- struct{}{}:
	default:
	}
	return n
}

// Arm implements poller.Source.
func (u *user) Arm() poller.Readiness { return poller.Sleep }

// submit submits requests in one batch, and then spoils the slice.
func (u *user) submit(reqs ...block.Request) {
	u.t.Helper()
	u.onLoop(func() {
		u.queue.Submit(reqs)
		for i := range reqs {
			reqs[i] = block.Request{Op: 255, Tag: 65535}
		}
	})
}

// await returns n results, and fails if there are others.
func (u *user) await(n int) []block.Result {
	u.t.Helper()
	timeout := time.After(patience)
	for {
		u.mu.Lock()
		if have := u.results; len(have) >= n {
			u.results = nil
			u.mu.Unlock()
			if len(have) > n {
				u.t.Fatalf("%d results, want %d: %+v", len(have), n, have)
			}
			return have
		}
		u.mu.Unlock()
		select {
		case <-u.arrived:
		case <-timeout:
			u.t.Fatalf("%d of %d results did not come, or did not wake the loop", n-len(u.results), n)
		}
	}
}

// do executes one request.
func (u *user) do(r block.Request) unix.Errno {
	u.t.Helper()
	tag := r.Tag
	u.submit(r)
	got := u.await(1)[0]
	if got.Tag != tag {
		u.t.Fatalf("the result of tag %d has tag %d", tag, got.Tag)
	}
	if got.Errno == 0 && got.Status != 0 {
		u.t.Errorf("a request that succeeded has status %#x", got.Status)
	}
	return unix.Errno(got.Errno)
}

// must executes a request that succeeds.
func (u *user) must(r block.Request) {
	u.t.Helper()
	if e := u.do(r); e != 0 {
		u.t.Fatalf("%v at sector %d: %v", r.Op, r.Sector, e)
	}
}

// unit is the length of a logical block in sectors.
func unit(b Backend) uint32 { return b.Device.Geometry().LogicalBlock >> block.SectorShift }

// writable reports whether the device takes changes.
func writable(b Backend) bool { return !b.Device.Geometry().ReadOnly }

func testGeometry(t *testing.T, b Backend) {
	g := b.Device.Geometry()
	if err := g.Validate(); err != nil {
		t.Error(err)
	}
	if g.Sectors < uint64(1024*len(b.Loops)) {
		t.Errorf("%d sectors are too few for this suite", g.Sectors)
	}
}

func testBuffers(t *testing.T, b Backend) {
	u := open(t, b, 0, block.QueueConfig{Depth: depth, MaxIO: maxIO})
	u.onLoop(func() {
		for tag := range uint16(depth) {
			buf := u.queue.Buffer(tag)
			addr := uintptr(unsafe.Pointer(unsafe.SliceData(buf)))
			switch {
			case len(buf) != maxIO || cap(buf) != maxIO:
				t.Errorf("buffer of tag %d has %d bytes and room for %d, want %d", tag, len(buf), cap(buf), maxIO)
			case addr%uintptr(os.Getpagesize()) != 0:
				t.Errorf("buffer of tag %d at %#x is not at a page", tag, addr)
			case &u.queue.Buffer(tag)[0] != &buf[0]:
				t.Errorf("buffer of tag %d has moved", tag)
			}
			fill(buf, uint32(tag))
		}
		for tag := range uint16(depth) {
			if !holds(u.queue.Buffer(tag), uint32(tag)) {
				t.Errorf("buffer of tag %d overlaps another one", tag)
			}
		}
	})
}

func testOpenQueue(t *testing.T, b Backend) {
	for _, cfg := range []block.QueueConfig{
		{}, {Depth: depth}, {MaxIO: maxIO}, {Depth: block.MaxDepth + 1, MaxIO: os.Getpagesize()},
		{Depth: -1, MaxIO: maxIO}, {Depth: depth, MaxIO: os.Getpagesize() + 512}, {Depth: depth, MaxIO: -os.Getpagesize()},
	} {
		if q, err := b.Device.OpenQueue(0, cfg); err == nil {
			t.Errorf("%+v: no error", cfg)
			_ = q.Close()
		}
	}
	for range 3 { // a loop may open a queue again
		u := open(t, b, 0, block.QueueConfig{Depth: 1, MaxIO: os.Getpagesize()})
		u.must(block.Request{Op: block.OpRead, Sectors: unit(b)})
		u.close()
	}
}

// testOpenAtOnce opens the queues of all loops at the same time.
func testOpenAtOnce(t *testing.T, b Backend) {
	queues := make([]block.Queue, len(b.Loops))
	var opening sync.WaitGroup
	for i := range queues {
		opening.Go(func() {
			var err error
			if queues[i], err = b.Device.OpenQueue(i, block.QueueConfig{Depth: depth, MaxIO: maxIO}); err != nil {
				t.Errorf("open queue %d: %v", i, err)
			}
		})
	}
	opening.Wait()
	for i, q := range queues {
		if q == nil {
			continue
		}
		q.Buffer(depth - 1)[maxIO-1] = byte(i) // each has buffers of its own
		if err := b.Loops[i].Call(func() {
			if err := q.Close(); err != nil {
				t.Errorf("close queue %d: %v", i, err)
			}
		}); err != nil {
			t.Error(err)
		}
	}
}

// testData writes on one queue what it reads on another.
func testData(t *testing.T, b Backend) {
	if !writable(b) || b.Forgets {
		return
	}
	cfg := block.QueueConfig{Depth: depth, MaxIO: maxIO}
	from := open(t, b, 0, cfg)
	to := from
	if last := len(b.Loops) - 1; last > 0 {
		to = open(t, b, last, cfg)
	}
	most := uint32(maxIO >> block.SectorShift)
	for i, sectors := range []uint32{unit(b), 8, 16, most / 2, most} {
		tag, sector := uint16(i), uint64(64*i)
		size := int(sectors) << block.SectorShift
		var flags block.Flags
		if i%2 == 1 {
			flags = block.FUA
		}
		from.onLoop(func() { fill(from.queue.Buffer(tag)[:size], uint32(i)+100) })
		from.must(block.Request{Op: block.OpWrite, Tag: tag, Sector: sector, Sectors: sectors, Flags: flags})
		from.must(block.Request{Op: block.OpFlush, Tag: tag, Sector: ^uint64(0), Sectors: 7})
		to.must(block.Request{Op: block.OpRead, Tag: depth - 1, Sector: sector, Sectors: sectors})
		to.onLoop(func() {
			if !holds(to.queue.Buffer(depth - 1)[:size], uint32(i)+100) {
				t.Errorf("%d sectors do not read what was written", sectors)
			}
		})
	}
}

func testZeroes(t *testing.T, b Backend) {
	g := b.Device.Geometry()
	if g.ReadOnly {
		return
	}
	u := open(t, b, 0, block.QueueConfig{Depth: depth, MaxIO: maxIO})
	ops := map[block.Op]bool{block.OpDiscard: g.MaxDiscardSectors > 0, block.OpWriteZeroes: g.MaxZeroesSectors > 0}
	for op, has := range ops {
		for _, flags := range []block.Flags{0, block.NoUnmap} {
			u.onLoop(func() { fill(u.queue.Buffer(1), 5) })
			u.must(block.Request{Op: block.OpWrite, Tag: 1, Sectors: maxIO >> block.SectorShift})
			switch e := u.do(block.Request{Op: op, Tag: 2, Sector: 8, Sectors: 16, Flags: flags}); {
			case e != 0 && (has || e != unix.EOPNOTSUPP):
				t.Errorf("%v: %v", op, e)
			case e != 0 || op == block.OpDiscard || b.Forgets:
				continue // a discarded block reads as it likes
			}
			u.must(block.Request{Op: block.OpRead, Tag: 1, Sectors: maxIO >> block.SectorShift})
			u.onLoop(func() {
				buf := u.queue.Buffer(1)
				if !bytes.Equal(buf[4096:3*4096], make([]byte, 2*4096)) {
					t.Errorf("%v: not zeroes", op)
				}
				want := make([]byte, maxIO)
				fill(want, 5)
				if !bytes.Equal(buf[:4096], want[:4096]) || !bytes.Equal(buf[3*4096:], want[3*4096:]) {
					t.Errorf("%v: other blocks have changed", op)
				}
			})
		}
	}
}

func testErrors(t *testing.T, b Backend) {
	u := open(t, b, 0, block.QueueConfig{Depth: depth, MaxIO: maxIO})
	end, one := b.Device.Geometry().Sectors, unit(b)
	for _, c := range []struct {
		name string
		r    block.Request
		want unix.Errno
	}{
		{"last block", block.Request{Op: block.OpRead, Sector: end - uint64(one), Sectors: one}, 0},
		{"beyond the end", block.Request{Op: block.OpRead, Sector: end, Sectors: one}, unix.EIO},
		{"across the end", block.Request{Op: block.OpWrite, Sector: end - uint64(one), Sectors: 2 * one}, unix.EIO},
		{"overflow", block.Request{Op: block.OpDiscard, Sector: ^uint64(0) &^ 7, Sectors: 16}, unix.EIO},
		{"beyond the buffer", block.Request{Op: block.OpRead, Sectors: maxIO>>block.SectorShift + 8}, unix.EINVAL},
		{"overflow of the buffer", block.Request{Op: block.OpRead, Sectors: 1<<32 - 8}, unix.EINVAL},
		{"no sector", block.Request{Op: block.OpWrite}, unix.EINVAL},
		{"unknown flag", block.Request{Op: block.OpWrite, Sectors: one, Flags: 1 << 7}, unix.EINVAL},
		{"unset", block.Request{Sectors: one}, unix.EOPNOTSUPP},
		{"unknown operation", block.Request{Op: 200, Sectors: one}, unix.EOPNOTSUPP},
	} {
		if got := u.do(c.r); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	if one > 1 {
		if got := u.do(block.Request{Op: block.OpRead, Sector: 1, Sectors: one}); got != unix.EINVAL {
			t.Errorf("within a block: %v, want EINVAL", got)
		}
		if got := u.do(block.Request{Op: block.OpRead, Sectors: one - 1}); got != unix.EINVAL {
			t.Errorf("part of a block: %v, want EINVAL", got)
		}
	}
	if !writable(b) {
		for _, op := range []block.Op{block.OpWrite, block.OpDiscard, block.OpWriteZeroes} {
			if got := u.do(block.Request{Op: op, Sectors: one}); got != unix.EROFS && got != unix.EPERM {
				t.Errorf("%v of a read-only device: %v, want EROFS or EPERM", op, got)
			}
		}
	}
}

// testTags checks that a request with a tag that is out of range or in flight is refused,
// and does no harm to the others.
func testTags(t *testing.T, b Backend) {
	u := open(t, b, 0, block.QueueConfig{Depth: depth, MaxIO: maxIO})
	for _, tag := range []uint16{depth, depth + 1, 65535} {
		if got := u.do(block.Request{Op: block.OpRead, Tag: tag, Sectors: unit(b)}); got != unix.EINVAL {
			t.Errorf("tag %d: %v, want EINVAL", tag, got)
		}
	}
	read := block.Request{Op: block.OpRead, Tag: 3, Sectors: unit(b)}
	u.submit(read, read)
	refused := 0
	for _, r := range u.await(2) {
		if r.Tag != 3 || r.Errno != 0 && unix.Errno(r.Errno) != unix.EINVAL {
			t.Errorf("tag 3 twice: %+v", r)
		}
		if r.Errno != 0 {
			refused++
		}
	}
	if refused != 1 {
		t.Errorf("of two requests with one tag, %d were refused", refused)
	}
	u.must(read)
}

// testLimits executes requests that are larger than the geometry allows, as they are when
// the limits have shrunk.
func testLimits(t *testing.T, b Backend) {
	g := b.Device.Geometry()
	size := max(maxIO, 2*int(g.MaxIO))
	if uint64(size)>>block.SectorShift > g.Sectors {
		size = int(g.Sectors<<block.SectorShift) &^ (os.Getpagesize() - 1)
	}
	u := open(t, b, 0, block.QueueConfig{Depth: 2, MaxIO: size})
	sectors := uint32(size >> block.SectorShift)
	u.must(block.Request{Op: block.OpRead, Sectors: sectors})
	if g.ReadOnly {
		return
	}
	u.onLoop(func() { fill(u.queue.Buffer(0), 9) })
	u.must(block.Request{Op: block.OpWrite, Sectors: sectors})
	u.must(block.Request{Op: block.OpRead, Tag: 1, Sectors: sectors})
	u.onLoop(func() {
		if !b.Forgets && !holds(u.queue.Buffer(1), 9) {
			t.Errorf("%d bytes do not read what was written", size)
		}
	})
	all := uint32(min(g.Sectors, 1<<31)) &^ 7
	for op, limit := range map[block.Op]uint32{block.OpDiscard: g.MaxDiscardSectors, block.OpWriteZeroes: g.MaxZeroesSectors} {
		if e := u.do(block.Request{Op: op, Sectors: all}); e != 0 && (limit > 0 || e != unix.EOPNOTSUPP) {
			t.Errorf("%v of the whole device: %v", op, e)
		}
	}
}

func testReapInParts(t *testing.T, b Backend) {
	u := open(t, b, 0, block.QueueConfig{Depth: depth, MaxIO: maxIO})
	u.onLoop(func() {
		if n := u.queue.Reap(nil); n != 0 {
			t.Errorf("reaped %d results into no room", n)
		}
		u.done = u.done[:1]
	})
	var reqs []block.Request
	for tag := range uint16(depth) {
		reqs = append(reqs, block.Request{Op: block.OpRead, Tag: tag, Sectors: unit(b)})
	}
	u.submit(reqs...)
	seen := map[uint16]int{}
	for _, r := range u.await(depth) {
		seen[r.Tag]++
	}
	if len(seen) != depth {
		t.Errorf("results of tags %v, want each of %d once", seen, depth)
	}
}

// testWakeUps waits until the loop sleeps, and has only the back end to wake it up.
func testWakeUps(t *testing.T, b Backend) {
	for i := range b.Loops {
		u := open(t, b, i, block.QueueConfig{Depth: depth, MaxIO: maxIO})
		for k := range 50 {
			had := u.loop.Snapshot().BlockingWaits
			u.must(block.Request{Op: block.OpRead, Tag: uint16(k % depth), Sector: uint64(8 * k), Sectors: 8})
			if k%10 == 0 {
				u.asleep(had)
			}
		}
	}
}

// asleep waits until the loop has waited in the kernel without a time limit more often than
// before.
func (u *user) asleep(had uint64) {
	u.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	timeout := time.After(patience)
	for u.loop.Snapshot().BlockingWaits == had {
		select {
		case <-tick.C:
		case <-timeout:
			u.t.Fatal("the loop does not sleep, although there is nothing to do")
		}
	}
}

// testExactlyOnce keeps all queues full with requests of every kind, and counts results.
func testExactlyOnce(t *testing.T, b Backend) {
	const rounds = 200
	var running sync.WaitGroup
	for i := range b.Loops {
		u := open(t, b, i, block.QueueConfig{Depth: depth, MaxIO: maxIO})
		first := uint64(i) * 1024
		rng := rand.New(rand.NewPCG(1, uint64(i)))
		running.Go(func() {
			for range rounds {
				if err := u.round(rng, first, writable(b)); err != nil {
					t.Errorf("loop %d: %v", i, err)
					return
				}
			}
		})
	}
	running.Wait()
}

// round submits a request with each tag, in two batches, and waits for the results.
func (u *user) round(rng *rand.Rand, first uint64, writable bool) error {
	var reqs []block.Request
	for _, tag := range rng.Perm(depth) {
		op := block.OpRead
		if writable {
			op = []block.Op{block.OpRead, block.OpWrite, block.OpFlush}[rng.IntN(3)]
		}
		reqs = append(reqs, block.Request{
			Op: op, Tag: uint16(tag), Sector: first + 128*uint64(tag), Sectors: 8 * (1 + rng.Uint32N(16)),
		})
	}
	cut := rng.IntN(depth)
	for _, batch := range [][]block.Request{reqs[:cut], reqs[cut:]} {
		if err := u.loop.Call(func() { u.queue.Submit(batch) }); err != nil {
			return err
		}
	}
	var seen [depth]int
	for range depth {
		got, err := u.next()
		if err != nil {
			return err
		}
		if int(got.Tag) >= depth || got.Errno != 0 {
			return fmt.Errorf("result %+v", got)
		}
		seen[got.Tag]++
	}
	for tag, n := range seen {
		if n != 1 {
			return fmt.Errorf("tag %d has %d results", tag, n)
		}
	}
	return nil
}

// next waits for one result.
func (u *user) next() (block.Result, error) {
	timeout := time.After(patience)
	for {
		u.mu.Lock()
		if len(u.results) > 0 {
			r := u.results[0]
			u.results = u.results[1:]
			u.mu.Unlock()
			return r, nil
		}
		u.mu.Unlock()
		select {
		case <-u.arrived:
		case <-timeout:
			return block.Result{}, fmt.Errorf("a result did not come within %v", patience)
		}
	}
}

// testTwoFrontEnds has two queues on one loop. Each gets its own results.
func testTwoFrontEnds(t *testing.T, b Backend) {
	cfg := block.QueueConfig{Depth: depth, MaxIO: maxIO}
	users := []*user{open(t, b, 0, cfg), open(t, b, 0, cfg)}
	var running sync.WaitGroup
	for i, u := range users {
		rng := rand.New(rand.NewPCG(2, uint64(i)))
		running.Go(func() {
			for range 50 {
				if err := u.round(rng, 0, false); err != nil {
					t.Errorf("queue %d: %v", i, err)
					return
				}
			}
		})
	}
	running.Wait()
}

func testClose(t *testing.T, b Backend) {
	u := open(t, b, 0, block.QueueConfig{Depth: depth, MaxIO: maxIO})
	u.must(block.Request{Op: block.OpRead, Sectors: unit(b)})
	u.onLoop(func() {
		u.loop.Detach(u)
		if err := u.queue.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if u.queue.Close() == nil {
			t.Error("closed twice without an error")
		}
		u.queue = nil
	})
	open(t, b, 0, block.QueueConfig{Depth: depth, MaxIO: maxIO}).must(block.Request{Op: block.OpRead, Sectors: unit(b)})
}

// fill writes a pattern that depends on key and position.
func fill(buf []byte, key uint32) {
	for i := 0; i+8 <= len(buf); i += 8 {
		binary.LittleEndian.PutUint32(buf[i:], key)
		binary.LittleEndian.PutUint32(buf[i+4:], uint32(i))
	}
}

// holds reports whether buf has what fill has written.
func holds(buf []byte, key uint32) bool {
	for i := 0; i+8 <= len(buf); i += 8 {
		if binary.LittleEndian.Uint32(buf[i:]) != key || binary.LittleEndian.Uint32(buf[i+4:]) != uint32(i) {
			return false
		}
	}
	return true
}
