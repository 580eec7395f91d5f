package nbd

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
)

func randomBytes(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{7})
	_, _ = r.Read(b)
	return b
}

// write writes all of data in one request.
func (c *client) write(offset uint64, data []byte) {
	c.t.Helper()
	c.do(request{kind: cmdWrite, offset: offset, length: uint32(len(data))}, data)
}

// do executes a request that has no data in its reply.
func (c *client) do(r request, data []byte) {
	c.t.Helper()
	r.cookie = 77
	c.ask(r, data)
	if e := c.simple(77); e != 0 {
		c.t.Fatalf("request %d of %d bytes at %d: error %d", r.kind, r.length, r.offset, e)
	}
}

// load reads in one request.
func (c *client) load(r request, structured bool) []byte {
	c.t.Helper()
	r.kind, r.cookie = cmdRead, 78
	c.ask(r, nil)
	if structured {
		data, e := c.chunks(r)
		if e != 0 {
			c.t.Fatalf("read of %d bytes at %d: error %d", r.length, r.offset, e)
		}
		return data
	}
	if e := c.simple(78); e != 0 {
		c.t.Fatalf("read of %d bytes at %d: error %d", r.length, r.offset, e)
	}
	return c.read(int(r.length))
}

// TestLargeRequests serves the largest requests of the protocol, and some larger ones,
// with much less memory than their size.
func TestLargeRequests(t *testing.T) {
	const size = 64 << 20
	for _, cfg := range []Config{
		{Depth: 16, MaxIO: 4096}, {Depth: 16, MaxIO: 64 << 10}, {Depth: 128}, {Depth: 4096, MaxIO: 4096},
	} {
		t.Run(fmt.Sprintf("%d of %d", cfg.Depth, cfg.MaxIO), func(t *testing.T) {
			dev := newRAM(t, block.Geometry{Sectors: size >> 9, LogicalBlock: 4096, MaxIO: 256 << 10, MaxDiscardSectors: 64, MaxZeroesSectors: 24})
			cfg.Exports = []Export{{Device: dev}}
			cfg.Loops = newLoops(t, 1)
			s, path := newServer(t, cfg)
			for _, structured := range []bool{false, true} {
				c := connect(t, path, "", structured)
				for _, length := range []int{4 << 20, 32 << 20, 33<<20 + 4096} {
					data := randomBytes(length)
					c.write(8<<20, data)
					if got := c.load(request{offset: 8 << 20, length: uint32(length)}, structured); !bytes.Equal(got, data) {
						t.Errorf("%d bytes: other data", length)
					}
				}
				if structured {
					if got := c.load(request{offset: 8 << 20, length: 32 << 20, flags: cmdFlagDF}, true); len(got) != 32<<20 {
						t.Errorf("%d bytes in one chunk", len(got))
					}
				}
				c.do(request{kind: cmdTrim, length: size}, nil)
				c.write(0, randomBytes(1<<20))
				c.do(request{kind: cmdZeroes, length: size, flags: cmdFlagFUA}, nil)
				if got := c.load(request{length: 40 << 20}, structured); !bytes.Equal(got, make([]byte, 40<<20)) {
					t.Error("not all zeroes")
				}
			}
			if st := s.Snapshot(""); st.Errors != 0 || st.ReadBytes == 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// shrinking is a device whose limits become smaller, and that then refuses larger
// requests, like a target that was restarted.
type shrinking struct {
	block.Device
	now     atomic.Pointer[block.Geometry]
	refused atomic.Int32
	flushes atomic.Int32
	fua     atomic.Int32
}

func newShrinking(d block.Device) *shrinking {
	s := &shrinking{Device: d}
	g := d.Geometry()
	s.now.Store(&g)
	return s
}

func (s *shrinking) Geometry() block.Geometry { return *s.now.Load() }

func (s *shrinking) change(fn func(*block.Geometry)) {
	g := s.Geometry()
	fn(&g)
	s.now.Store(&g)
}

func (s *shrinking) OpenQueue(i int, cfg block.QueueConfig) (block.Queue, error) {
	q, err := s.Device.OpenQueue(i, cfg)
	return &shrinkingQueue{Queue: q, dev: s}, err
}

type shrinkingQueue struct {
	block.Queue
	dev     *shrinking
	refused []block.Result
}

func (q *shrinkingQueue) Submit(reqs []block.Request) {
	g := q.dev.Geometry()
	for _, r := range reqs {
		most := ^uint32(0)
		switch r.Op {
		case block.OpRead, block.OpWrite:
			most = g.MaxIO >> 9
		case block.OpDiscard:
			most = g.MaxDiscardSectors
		case block.OpWriteZeroes:
			most = g.MaxZeroesSectors
		case block.OpFlush:
			q.dev.flushes.Add(1)
		}
		if r.Flags&block.FUA != 0 {
			q.dev.fua.Add(1)
		}
		if r.Sectors > most {
			q.dev.refused.Add(1)
			q.refused = append(q.refused, block.Result{Tag: r.Tag, Errno: uint16(unix.EOPNOTSUPP)})
			continue
		}
		q.Queue.Submit([]block.Request{r})
	}
}

func (q *shrinkingQueue) Reap(done []block.Result) int {
	n := copy(done, q.refused)
	q.refused = q.refused[n:]
	return n + q.Queue.Reap(done[n:])
}

// TestShrinkingLimits makes all limits of a device smaller while clients are connected.
func TestShrinkingLimits(t *testing.T) {
	dev := newShrinking(newRAM(t, block.Geometry{LogicalBlock: 4096}))
	_, path := newServer(t, Config{Exports: []Export{{Device: dev}}, Depth: 16, Loops: newLoops(t, 1)})
	for _, structured := range []bool{false, true} {
		dev.change(func(g *block.Geometry) { *g = dev.Device.Geometry() })
		c := connect(t, path, "", structured)
		for _, most := range []uint32{1 << 20, 100 << 10, 64 << 10, 12 << 10, 4096} {
			dev.change(func(g *block.Geometry) {
				g.MaxIO, g.MaxDiscardSectors, g.MaxZeroesSectors = most&^4095, most>>9, most>>9
			})
			data := randomBytes(3 << 20)
			c.write(1<<20, data)
			if got := c.load(request{offset: 1 << 20, length: 3 << 20}, structured); !bytes.Equal(got, data) {
				t.Errorf("other data at a limit of %d", most)
			}
			c.do(request{kind: cmdZeroes, offset: 1 << 20, length: 1 << 20}, nil)
			c.do(request{kind: cmdTrim, offset: 2 << 20, length: 1 << 20}, nil)
			clear(data[:2<<20])
			if got := c.load(request{offset: 1 << 20, length: 3 << 20}, structured); !bytes.Equal(got, data) {
				t.Errorf("other data after zeroes and trim at a limit of %d", most)
			}
		}
		// The device may stop supporting the operations.
		dev.change(func(g *block.Geometry) { g.MaxDiscardSectors, g.MaxZeroesSectors = 0, 0 })
		c.write(0, randomBytes(1<<20))
		c.do(request{kind: cmdZeroes, offset: 0, length: 1 << 20}, nil)
		c.do(request{kind: cmdTrim, offset: 0, length: 1 << 20}, nil)
		if got := c.load(request{length: 1 << 20}, structured); !bytes.Equal(got, make([]byte, 1<<20)) {
			t.Error("zeroes by writes: other data")
		}
	}
	if dev.refused.Load() == 0 {
		t.Error("nothing was refused: the test tests nothing")
	}
}

// TestNoGeometry checks a device that returns no geometry any more, as one that is gone
// may do.
func TestNoGeometry(t *testing.T) {
	dev := newShrinking(&badBlock{Device: newRAM(t, block.Geometry{LogicalBlock: 4096}), sector: 1000})
	_, path := newServer(t, Config{Exports: []Export{{Device: dev}}, Depth: 16, MaxIO: 64 << 10, Loops: newLoops(t, 1)})
	c := connect(t, path, "", false)
	dev.change(func(g *block.Geometry) { *g = block.Geometry{} })
	for _, r := range []request{
		{kind: cmdRead, length: 1 << 20}, {kind: cmdWrite, length: 1 << 20}, {kind: cmdTrim, length: 1 << 20}, {kind: cmdZeroes, length: 1 << 20},
	} {
		if e := c.answer(r, false); e == 0 && r.kind != cmdTrim { // that is advice
			t.Errorf("request %d is done", r.kind)
		}
	}
	late := dial(t, path)
	late.hello()
	late.option(optGo, infoData(""))
	late.answers(optGo)
	if e := late.answer(request{kind: cmdRead, length: 512}, false); e != codeInval {
		t.Errorf("error %d", e)
	}
}

// TestShrunkReadError checks that the error of a read up to the size that the server
// announced is reported without hanging up, however small the limit is now.
func TestShrunkReadError(t *testing.T) {
	dev := newShrinking(&badBlock{Device: newRAM(t, block.Geometry{LogicalBlock: 4096}), sector: 1000})
	s, path := newServer(t, Config{Exports: []Export{{Device: dev}}, Depth: 16, MaxIO: 64 << 10, Loops: newLoops(t, 1)})
	r := request{magic: magicRequest, kind: cmdRead, length: s.exports[0].atOnce()}
	if r.length != 12*64<<10 {
		t.Errorf("%d bytes at once", r.length)
	}
	c := connect(t, path, "", false)
	dev.change(func(g *block.Geometry) { g.MaxIO = 4096 })
	for range 2 { // the second time, the limit is known
		c.ask(r, nil)
		if e := c.simple(0); e != codeIO {
			t.Errorf("error %d", e)
		}
	}
	data := randomBytes(768 << 10)
	c.write(1<<20, data)
	if got := c.load(request{offset: 1 << 20, length: 768 << 10}, false); !bytes.Equal(got, data) {
		t.Error("other data")
	}
}

// TestShrinkInFlight makes the limit smaller between the submission and the end of
// requests.
func TestShrinkInFlight(t *testing.T) {
	dev := newShrinking(newRAM(t, block.Geometry{}))
	_, path := newServer(t, Config{Exports: []Export{{Device: dev}}, Depth: 64, Loops: newLoops(t, 1)})
	c := connect(t, path, "", false)
	data := randomBytes(16 << 20)
	for range 10 {
		var changes sync.WaitGroup
		dev.change(func(g *block.Geometry) { g.MaxIO = 1 << 20 })
		changes.Go(func() {
			for most := uint32(1 << 20); most >= 4096; most /= 2 {
				dev.change(func(g *block.Geometry) { g.MaxIO = most })
				time.Sleep(2 * time.Millisecond) // at any time of the transfer
			}
		})
		c.write(0, data)
		if got := c.load(request{length: 16 << 20}, false); !bytes.Equal(got, data) {
			t.Error("other data")
		}
		changes.Wait()
	}
}

// TestVolatileCacheLater checks that flush and FUA are passed on, whatever the device
// said about its cache when the client connected.
func TestVolatileCacheLater(t *testing.T) {
	dev := newShrinking(newRAM(t, block.Geometry{}))
	_, path := newServer(t, Config{Exports: []Export{{Device: dev}}, Loops: newLoops(t, 1)})
	c := connect(t, path, "", false)
	for _, volatile := range []bool{false, true, false} {
		dev.change(func(g *block.Geometry) { g.VolatileCache = volatile })
		for i, r := range []request{
			{kind: cmdFlush}, {kind: cmdWrite, flags: cmdFlagFUA, length: 512},
			{kind: cmdTrim, flags: cmdFlagFUA, length: 512}, {kind: cmdZeroes, flags: cmdFlagFUA, length: 512},
		} {
			dev.flushes.Store(0)
			dev.fua.Store(0)
			c.do(r, make([]byte, r.length)[:map[bool]uint32{true: r.length}[r.kind == cmdWrite]])
			flushes, fua := int32(1), int32(0)
			if r.kind == cmdWrite || r.kind == cmdZeroes { // a flush would not know of a cache that was lost since
				flushes, fua = 0, 1
			}
			if dev.flushes.Load() != flushes || dev.fua.Load() != fua {
				t.Errorf("volatile %t, request %d: %d flushes, %d FUA", volatile, i, dev.flushes.Load(), dev.fua.Load())
			}
		}
	}
}

// TestReadErrorInPart checks failing reads that are sent in parts.
func TestReadErrorInPart(t *testing.T) {
	dev := &badBlock{Device: newRAM(t, block.Geometry{}), sector: 8 << 20 >> 9}
	_, path := newServer(t, Config{Exports: []Export{{Device: dev}}, Depth: 16, MaxIO: 64 << 10, Loops: newLoops(t, 1)})
	r := request{magic: magicRequest, kind: cmdRead, cookie: 5, length: 32 << 20}

	c := connect(t, path, "", true)
	c.ask(r, nil)
	if _, e := c.chunks(r); e != codeIO {
		t.Errorf("error %d in a structured reply", e)
	}
	// A read for which there are enough tags at once has an ordinary error, in both
	// kinds of replies.
	r.offset, r.length = 8<<20-64<<10, 256<<10
	c.ask(r, nil)
	if data, e := c.chunks(r); e != codeIO || len(data) != 0 {
		t.Errorf("error %d after %d bytes", e, len(data))
	}
	c.do(request{kind: cmdFlush}, nil)

	c = connect(t, path, "", false)
	c.ask(r, nil)
	if e := c.simple(5); e != codeIO {
		t.Errorf("error %d", e)
	}
	// An error that can only be reported by hanging up is reported in that way, and
	// never by wrong data.
	r.offset, r.length = 0, 32<<20
	c.ask(r, nil)
	if e := c.simple(5); e != 0 {
		t.Fatalf("error %d", e)
	}
	n, buf := 0, make([]byte, 1<<20)
	for {
		k, err := c.Read(buf)
		if n += k; err != nil {
			break
		}
	}
	if n > 8<<20 {
		t.Errorf("%d bytes came", n)
	}
}

// badBlock is a device with a sector that cannot be read or written.
type badBlock struct {
	block.Device
	sector uint64
}

func (b *badBlock) OpenQueue(i int, cfg block.QueueConfig) (block.Queue, error) {
	q, err := b.Device.OpenQueue(i, cfg)
	return &badQueue{Queue: q, dev: b, bad: map[uint16]bool{}}, err
}

type badQueue struct {
	block.Queue
	dev *badBlock
	bad map[uint16]bool
}

func (q *badQueue) Submit(reqs []block.Request) {
	for _, r := range reqs {
		q.bad[r.Tag] = r.Op != block.OpFlush && r.Sector <= q.dev.sector && q.dev.sector < r.Sector+uint64(r.Sectors)
	}
	q.Queue.Submit(reqs)
}

func (q *badQueue) Reap(done []block.Result) int {
	n := q.Queue.Reap(done)
	for i := range done[:n] {
		if q.bad[done[i].Tag] {
			done[i].Errno = uint16(unix.EIO)
		}
	}
	return n
}

// TestWriteErrorInPart checks large writes that fail. Their data is received
// nevertheless.
func TestWriteErrorInPart(t *testing.T) {
	dev := &badBlock{Device: newRAM(t, block.Geometry{}), sector: 8 << 20 >> 9}
	_, path := newServer(t, Config{Exports: []Export{{Device: dev}}, Depth: 16, MaxIO: 64 << 10, Loops: newLoops(t, 1)})
	c := connect(t, path, "", false)
	for _, length := range []uint32{32 << 20, 9 << 20, 8<<20 + 512} {
		c.ask(request{kind: cmdWrite, cookie: 3, length: length}, make([]byte, length))
		if e := c.simple(3); e != codeIO {
			t.Errorf("write of %d bytes: error %d", length, e)
		}
		c.do(request{kind: cmdFlush}, nil)
	}
}
