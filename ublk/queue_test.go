package ublk

import (
	"errors"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/null"
	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/internal/uring"
	"ublk-nvmeof/poller"
)

// ring is a submission queue without a kernel: the last entries are kept.
type ring struct {
	entries [256]uring.SQE
	n       int
}

func (r *ring) SQE() *uring.SQE {
	s := &r.entries[r.n%len(r.entries)]
	*s = uring.SQE{}
	r.n++
	return s
}

// take is what was submitted since the last call.
func (r *ring) take() []ioCmd {
	var cmds []ioCmd
	for i := range r.n {
		cmds = append(cmds, *(*ioCmd)(unsafe.Pointer(&r.entries[i].Cmd)))
	}
	r.n = 0
	return cmds
}

// backEnd is a block.Queue whose results the test decides.
type backEnd struct {
	mem     []byte
	size    int
	got     []block.Request
	results []block.Result
}

func (b *backEnd) Buffer(tag uint16) []byte    { return b.mem[int(tag)*b.size:][:b.size] }
func (b *backEnd) Submit(reqs []block.Request) { b.got = append(b.got, reqs...) }
func (b *backEnd) Close() error                { return nil }
func (b *backEnd) Reap(done []block.Result) int {
	n := copy(done, b.results)
	b.results = b.results[n:]
	return n
}

const testMaxIO = 8 << 10

// testQueue is a started queue between a fake ring and back.
type testQueue struct {
	*hwQueue
	ring   *ring
	back   *backEnd
	ends   int
	failed error
}

func newTestQueue(t testing.TB, depth int) *testQueue {
	t.Helper()
	mem, err := hostmem.Map(depth * testMaxIO)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hostmem.Unmap(mem) })
	q := &testQueue{ring: new(ring), back: &backEnd{mem: mem, size: testMaxIO}}
	q.hwQueue = newHWQueue(3, make([]ioDesc, depth), q.back, testMaxIO, func() { q.ends++ }, func(err error) { q.failed = err })
	return q
}

const testBase = 5 << 48

func (q *testQueue) run() { q.start(q.ring, 77, testBase) }

// dispatch is what the driver does for a request.
func (q *testQueue) dispatch(tag uint16, d ioDesc) {
	q.descs[tag] = d
	q.Complete(uint64(tag), 0, 0)
}

func TestFetch(t *testing.T) {
	q := newTestQueue(t, 4)
	q.run()
	if q.ring.n != 4 || q.fetching != 4 {
		t.Fatalf("%d entries, %d tags with the driver, want 4", q.ring.n, q.fetching)
	}
	for tag := range uint16(4) {
		e := q.ring.entries[tag]
		want := ioCmd{queue: 3, tag: tag, addr: hostmem.Addr(q.back.Buffer(tag))}
		if e.Opcode != uring.OpURingCmd || e.FD != 77 || e.Off != uint64(fetchReq) || e.UserData != testBase|uint64(tag) {
			t.Errorf("tag %d: entry %+v", tag, e)
		}
		if got := *(*ioCmd)(unsafe.Pointer(&e.Cmd)); got != want {
			t.Errorf("tag %d: command %+v, want %+v", tag, got, want)
		}
	}
}

// TestRequests follows one request of each kind through the queue and back,
// with success and with an error. A read or write that is done reports its
// whole length, never less.
func TestRequests(t *testing.T) {
	for _, c := range []struct {
		name   string
		desc   ioDesc
		want   block.Request
		result int32 // of success
		stats  block.Stats
	}{
		{"read", ioDesc{opFlags: opRead, nrSectors: 16, startSector: 1 << 40},
			block.Request{Op: block.OpRead, Sectors: 16, Sector: 1 << 40}, 8192, block.Stats{Reads: 1, ReadBytes: 8192}},
		{"write", ioDesc{opFlags: opWrite, nrSectors: 1, startSector: 7},
			block.Request{Op: block.OpWrite, Sectors: 1, Sector: 7}, 512, block.Stats{Writes: 1, WrittenBytes: 512}},
		{"FUA write", ioDesc{opFlags: opWrite | flagFUA, nrSectors: 1},
			block.Request{Op: block.OpWrite, Sectors: 1, Flags: block.FUA}, 512, block.Stats{Writes: 1, WrittenBytes: 512}},
		{"write with other flags", ioDesc{opFlags: opWrite | 0xffffff00&^flagFUA&^flagNoUnmap, nrSectors: 1},
			block.Request{Op: block.OpWrite, Sectors: 1}, 512, block.Stats{Writes: 1, WrittenBytes: 512}},
		{"flush", ioDesc{opFlags: opFlush}, block.Request{Op: block.OpFlush}, 0, block.Stats{Flushes: 1}},
		{"discard", ioDesc{opFlags: opDiscard, nrSectors: 1 << 31, startSector: 9},
			block.Request{Op: block.OpDiscard, Sectors: 1 << 31, Sector: 9}, 0, block.Stats{Discards: 1}},
		{"write zeroes", ioDesc{opFlags: opWriteZeroes | flagNoUnmap, nrSectors: 1 << 20},
			block.Request{Op: block.OpWriteZeroes, Sectors: 1 << 20, Flags: block.NoUnmap}, 0, block.Stats{WriteZeroes: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			q := newTestQueue(t, 2)
			q.run()
			q.ring.n = 0
			c.want.Tag = 1
			for _, errno := range []unix.Errno{0, unix.ENOLINK} {
				q.dispatch(1, c.desc)
				if n := q.Poll(); n != 1 || len(q.back.got) != 1 || q.back.got[0] != c.want {
					t.Fatalf("poll %d, back end got %+v, want %+v", n, q.back.got, c.want)
				}
				if q.fetching != 1 || q.inflight != 1 || q.ring.n != 0 {
					t.Fatalf("%d tags with the driver, %d in flight, %d entries", q.fetching, q.inflight, q.ring.n)
				}
				// What becomes of the descriptor meanwhile does not matter.
				q.descs[1] = ioDesc{}
				q.back.got = nil
				q.back.results = []block.Result{{Tag: 1, Errno: uint16(errno)}}
				if n := q.Poll(); n != 1 {
					t.Fatalf("poll with a result: %d", n)
				}
				want := c.result
				if errno != 0 {
					want = -int32(errno)
				}
				if e := q.ring.entries[0]; e.Off != uint64(commitAndFetchReq) || e.UserData != testBase|1 {
					t.Fatalf("entry %+v", e)
				}
				got := q.ring.take()
				if len(got) != 1 || got[0].result != want || got[0].tag != 1 || got[0].queue != 3 || got[0].addr != q.addrs[1] {
					t.Fatalf("commit %+v, want result %d", got, want)
				}
			}
			// Twice the requests, once the bytes, and one failure of the operation.
			c.stats.Failed = block.Failures{Reads: c.stats.Reads, Writes: c.stats.Writes, Flushes: c.stats.Flushes, Discards: c.stats.Discards, WriteZeroes: c.stats.WriteZeroes}
			c.stats.Reads, c.stats.Writes, c.stats.Flushes = 2*c.stats.Reads, 2*c.stats.Writes, 2*c.stats.Flushes
			c.stats.Discards, c.stats.WriteZeroes = 2*c.stats.Discards, 2*c.stats.WriteZeroes
			c.stats.Errors, c.stats.Batches = 1, 2
			if got := q.Snapshot(); got != c.stats {
				t.Fatalf("counted %+v, want %+v", got, c.stats)
			}
		})
	}
}

// TestNeverEAGAIN: a client that gets EAGAIN may try again for ever.
func TestNeverEAGAIN(t *testing.T) {
	q := newTestQueue(t, 1)
	q.run()
	q.dispatch(0, ioDesc{opFlags: opRead, nrSectors: 1})
	q.Poll()
	q.ring.n = 0
	q.back.results = []block.Result{{Errno: uint16(unix.EAGAIN)}}
	q.Poll()
	if got := q.ring.take(); len(got) != 1 || got[0].result != -int32(unix.EIO) {
		t.Fatalf("committed %+v, want EIO", got)
	}
}

// TestRefused: what the back end cannot be asked for never reaches it.
func TestRefused(t *testing.T) {
	q := newTestQueue(t, 1)
	q.run()
	for _, c := range []struct {
		desc ioDesc
		want unix.Errno
	}{
		{ioDesc{opFlags: 4}, unix.EOPNOTSUPP},
		{ioDesc{opFlags: 0xff}, unix.EOPNOTSUPP},
		{ioDesc{opFlags: opRead, nrSectors: testMaxIO>>9 + 1}, unix.EIO},
		{ioDesc{opFlags: opWrite, nrSectors: 1<<32 - 1}, unix.EIO},
	} {
		q.ring.n = 0
		q.dispatch(0, c.desc)
		if q.Poll() != 0 || len(q.back.got) != 0 {
			t.Fatalf("%+v reached the back end", c.desc)
		}
		if got := q.ring.take(); len(got) != 1 || got[0].result != -int32(c.want) {
			t.Fatalf("%+v: committed %+v, want %v", c.desc, got, c.want)
		}
	}
	if s := q.Snapshot(); s != (block.Stats{Errors: 4}) {
		t.Fatalf("counted %+v", s)
	}
}

// TestBatches: what came in one pass goes to the back end in one call, in
// order, and more results than fit in one Reap are all committed.
func TestBatches(t *testing.T) {
	const depth = 3 * reapBatch / 2
	q := newTestQueue(t, depth)
	q.run()
	for tag := range uint16(depth) {
		q.dispatch(depth-1-tag, ioDesc{opFlags: opFlush})
	}
	q.ring.n = 0
	for tag := range uint16(depth) {
		q.back.results = append(q.back.results, block.Result{Tag: tag})
	}
	if n := q.Poll(); n != 2*depth {
		t.Fatalf("poll %d, want %d", n, 2*depth)
	}
	for i, r := range q.back.got {
		if int(r.Tag) != depth-1-i {
			t.Fatalf("request %d has tag %d", i, r.Tag)
		}
	}
	for i, c := range q.ring.take() {
		if int(c.tag) != i {
			t.Fatalf("commit %d has tag %d", i, c.tag)
		}
	}
	if q.fetching != depth || q.inflight != 0 || q.Snapshot().Batches != 1 {
		t.Fatalf("%d with the driver, %d in flight, %d batches", q.fetching, q.inflight, q.Snapshot().Batches)
	}
}

// TestEnd: the end comes once, when the driver has given back every tag and
// what the back end held is committed.
func TestEnd(t *testing.T) {
	const gone = -int32(unix.ENODEV)
	q := newTestQueue(t, 3)
	q.run()
	q.dispatch(2, ioDesc{opFlags: opWrite, nrSectors: 1})
	q.Poll()
	q.ring.n = 0
	q.Complete(0, gone, 0)
	q.Complete(1, gone, 0)
	if q.Poll() != 0 || q.ring.n != 0 || q.ends != 0 {
		t.Fatalf("%d new entries, ended %d times, with a request in flight", q.ring.n, q.ends)
	}
	q.back.results = []block.Result{{Tag: 2}}
	q.Poll()
	if got := q.ring.take(); len(got) != 1 || got[0].result != 512 || q.ends != 0 {
		t.Fatalf("committed %+v, ended %d times", got, q.ends)
	}
	q.Complete(2, gone, 0)
	if q.ends != 1 || q.failed != nil {
		t.Fatalf("ended %d times, failed %v", q.ends, q.failed)
	}
	if q.Poll() != 0 || q.ends != 1 || q.Arm() != poller.Sleep {
		t.Fatal("not quiet after the end")
	}
}

func TestFailure(t *testing.T) {
	q := newTestQueue(t, 2)
	q.run()
	q.Complete(1, -int32(unix.EINVAL), 0)
	if !errors.Is(q.failed, unix.EINVAL) || q.ends != 0 {
		t.Fatalf("failed %v, ended %d times", q.failed, q.ends)
	}
	q.Complete(0, -int32(unix.ENODEV), 0)
	if q.ends != 1 {
		t.Fatalf("ended %d times", q.ends)
	}
}

// nullQueue is a queue over the null back end.
func nullQueue(t testing.TB, depth int) (*hwQueue, *ring) {
	t.Helper()
	dev, err := null.New(null.Config{})
	if err != nil {
		t.Fatal(err)
	}
	back, err := dev.OpenQueue(0, block.QueueConfig{Depth: depth, MaxIO: 4096})
	if err != nil {
		t.Fatal(err)
	}
	r := new(ring)
	q := newHWQueue(0, make([]ioDesc, depth), back, 4096, func() {}, func(error) {})
	q.start(r, 0, testBase)
	for tag := range q.descs {
		q.descs[tag] = ioDesc{opFlags: opRead, nrSectors: 8, startSector: uint64(tag)}
	}
	return q, r
}

func TestDataPathAllocatesNothing(t *testing.T) {
	q, _ := nullQueue(t, 32)
	if n := testing.AllocsPerRun(1000, func() {
		for tag := range uint64(32) {
			q.Complete(tag, 0, 0)
		}
		if q.Poll() != 64 {
			t.Fatal("not done at once")
		}
		q.Arm()
	}); n != 0 {
		t.Fatalf("%v allocations per batch", n)
	}
	if q.Snapshot().Errors != 0 || q.Snapshot().Reads < 32000 {
		t.Fatalf("counted %+v", q.Snapshot())
	}
}

// BenchmarkDataPath is the queue's own work per request: decode the descriptor,
// submit to and reap from the null back end, build the commit.
func BenchmarkDataPath(b *testing.B) {
	for _, bm := range []struct {
		name  string
		batch int
	}{{"batch=1", 1}, {"batch=8", 8}, {"batch=32", 32}} {
		b.Run(bm.name, func(b *testing.B) {
			q, _ := nullQueue(b, bm.batch)
			b.ReportAllocs()
			for i := 0; i < b.N; i += bm.batch {
				for tag := range uint64(bm.batch) {
					q.Complete(tag, 0, 0)
				}
				q.Poll()
			}
		})
	}
}

// TestSharedMemory: a request with shared memory names the region. It waits while this process does
// not have the memory, and is refused if nobody will hand it over.
func TestSharedMemory(t *testing.T) {
	q := newTestQueue(t, 4)
	q.sharing = true
	q.run()
	q.ring.take()
	read := ioDesc{opFlags: opRead | flagShmem, nrSectors: 16, startSector: 8, addr: 0<<32 | 3<<12}
	q.dispatch(0, read)
	q.dispatch(1, ioDesc{opFlags: opWrite, nrSectors: 8, addr: 3 << 12}) // in its buffer
	q.Poll()
	if len(q.back.got) != 1 || q.back.got[0].Tag != 1 || q.back.got[0].Region != 0 || q.back.got[0].Offset != 0 {
		t.Errorf("without shared memory: %+v", q.back.got)
	}
	q.share(7, false)
	q.dispatch(2, read)
	q.Poll()
	want := block.Request{Op: block.OpRead, Sector: 8, Sectors: 16, Region: 7, Offset: 3 << 12}
	for i, tag := range []uint16{0, 2} {
		if want.Tag = tag; len(q.back.got) != 3 || q.back.got[1+i] != want {
			t.Errorf("with shared memory: %+v, want %+v", q.back.got, want)
		}
	}
	q.back.results = []block.Result{{Tag: 0}, {Tag: 1}, {Tag: 2, Errno: uint16(unix.EIO)}}
	q.Poll()
	committed := q.ring.take()
	for i, want := range []int32{8192, 4096, -int32(unix.EIO)} {
		if len(committed) != 3 || committed[i].tag != uint16(i) || committed[i].result != want {
			t.Errorf("committed %+v, want %d of tag %d", committed, want, i)
		}
	}
	q.Publish()
	if s := q.Snapshot(); s.DirectBytes != 8192 || s.ReadBytes+s.WrittenBytes != 8192+4096 || s.Errors != 1 {
		t.Errorf("counters %+v", s)
	}
	q.share(0, false)
	q.dispatch(3, read)
	q.dispatch(1, read)
	q.Poll()
	q.share(0, true)
	q.dispatch(2, read)
	got := q.ring.take()
	if len(got) != 3 || len(q.held) != 0 {
		t.Fatalf("refused %+v, %d are held", got, len(q.held))
	}
	for i, tag := range []uint16{3, 1, 2} {
		if got[i].tag != tag || got[i].result != -int32(unix.EIO) {
			t.Errorf("refused %+v, want tag %d", got[i], tag)
		}
	}
}

// TestHeldAtTheEnd: requests that wait for shared memory do not keep the device.
func TestHeldAtTheEnd(t *testing.T) {
	q := newTestQueue(t, 2)
	q.sharing = true
	q.run()
	q.ring.take()
	q.dispatch(0, ioDesc{opFlags: opRead | flagShmem, nrSectors: 8})
	q.Complete(1, -int32(unix.ENODEV), 0)
	if got := q.ring.take(); len(got) != 1 || got[0].tag != 0 || got[0].result != -int32(unix.EIO) || q.ends != 0 {
		t.Fatalf("committed %+v, ended %d times", got, q.ends)
	}
	q.Complete(0, -int32(unix.ENODEV), 0)
	if q.ends != 1 {
		t.Errorf("ended %d times", q.ends)
	}
}
