package vhost

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"ublk-nvmeof/block"
	"ublk-nvmeof/vhost/vhosttest"
)

// newSegmentServer serves a device that takes requests with segments, without copies.
func newSegmentServer(t *testing.T, d *held, limit int, maxIO int) *served {
	t.Helper()
	loops := newLoops(t, 2)
	d.wake = func() {
		for _, l := range loops {
			l.Wake()
		}
	}
	d.limit.Store(int32(limit))
	return newServer(t, Config{Device: heldRegions{d}, Loops: loops, Depth: 64, MaxIO: maxIO, ZeroCopy: true})
}

// scattered is the data of a request: buffers of a guest.
type scattered struct {
	ring    *vhosttest.Ring
	buffers []vhosttest.Buffer
}

func (s scattered) each(f func(mem []byte)) {
	for _, b := range s.buffers {
		f(s.ring.Memory(b))
	}
}

func (s scattered) bytes() (data []byte) {
	s.each(func(mem []byte) { data = append(data, mem...) })
	return data
}

func (s scattered) do(t *testing.T, kind uint32, sector uint64) {
	t.Helper()
	s.ring.Submit(s.ring.PrepareList(1, kind, sector, s.buffers...))
	if _, status, err := s.ring.Wait(); err != nil || status != vhosttest.OK {
		t.Fatalf("status %d, %v", status, err)
	}
}

// TestSegmentData reads and writes scattered data with any sizes, with limits that change, and compares it
// with what must be there.
func TestSegmentData(t *testing.T) {
	for _, lb := range []uint32{512, 4096} {
		t.Run(fmt.Sprint(lb), func(t *testing.T) {
			d := newHeld(newRAM(t, dataGeometry(lb)))
			s := newSegmentServer(t, d, 16, 64<<10)
			g := connect(t, s, vhosttest.Config{Ack: true, Sealed: true, Data: 256 << 10})
			testSegmentData(t, g, int(lb), func(rnd *rand.Rand) { d.limit.Store(int32([]int{1, 16, 3, 8, 16}[rnd.IntN(5)])) })
			d.mu.Lock()
			defer d.mu.Unlock()
			var copied, single, several int
			for _, r := range d.came {
				switch {
				case r.Segments > 1:
					several++
				case r.InRegion():
					single++
				default:
					copied++
				}
			}
			if copied < 100 || single < 50 || several < 50 {
				t.Errorf("%d requests had a copy, %d one place, %d segments", copied, single, several)
			}
		})
	}
}

// testSegmentData uses a disk of 4 MiB. before is called before each request.
func testSegmentData(t *testing.T, g *vhosttest.Guest, lb int, before func(*rand.Rand)) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(4, uint64(lb)))
	disk := make([]byte, 4<<20)
	for i := range 400 {
		before(rnd)
		data := scatter(rnd, g.Rings[0], lb)
		n := uint64(len(data.bytes()))
		sector := rnd.Uint64N((8192-n>>9)/uint64(lb>>9)) * uint64(lb>>9)
		at := disk[sector<<9:][:n]
		if i%2 == 0 {
			data.each(func(mem []byte) {
				for j := range mem {
					mem[j] = byte(rnd.Uint32())
				}
			})
			copy(at, data.bytes())
			data.do(t, vhosttest.Out, sector)
			continue
		}
		data.each(func(mem []byte) { clear(mem) })
		data.do(t, vhosttest.In, sector)
		if !bytes.Equal(data.bytes(), at) {
			t.Fatalf("request %d: wrong data", i)
		}
	}
}

// TestRemoteSegments is TestSegmentData with a disk of a target, whose commands have lists then.
func TestRemoteSegments(t *testing.T) {
	loops := newLoops(t, 1)
	disk, far := remoteDisk(t, false, loops)
	s := newServer(t, Config{Device: disk, Loops: loops, ZeroCopy: true})
	g := connect(t, s, vhosttest.Config{Ack: true, Sealed: true, Data: 256 << 10})
	testSegmentData(t, g, 512, func(*rand.Rand) {})
	if io := far.Snapshot().IO; io.Lists < 50 {
		t.Errorf("%d commands had lists", io.Lists)
	}
}

// scatter returns buffers with whole blocks together, most of them pages, in any order and with any gaps.
func scatter(rnd *rand.Rand, r *vhosttest.Ring, lb int) scattered {
	s := scattered{ring: r}
	at, left := uint64(4*rnd.IntN(16)), (1+rnd.IntN(64<<10/lb))*lb
	n := 1 + rnd.IntN(24)
	odd := rnd.IntN(2) == 0
	for i := range n {
		size := left
		switch {
		case i == n-1:
		case odd:
			size = 1 + rnd.IntN(left)
		default:
			size = min(left, (1+rnd.IntN(4))*4096)
		}
		_, data := r.Slot(2 + uint16(rnd.IntN(8))) // some are in the other region
		s.buffers = append(s.buffers, vhosttest.Buffer{Addr: vhosttest.GuestBase + data + at, Length: uint32(size)})
		at += uint64(size)
		if odd {
			at += uint64(rnd.IntN(100))
		}
		if left -= size; left == 0 {
			break
		}
	}
	return s
}

// pages returns n buffers of one page each, with gaps, in two regions.
func pages(r *vhosttest.Ring, n int) (all []vhosttest.Buffer) {
	for i := range n {
		_, at := r.Slot(uint16(20 - 19*(i%2)))
		all = append(all, vhosttest.Buffer{Addr: vhosttest.GuestBase + at + uint64(8192*i), Length: 4096})
	}
	return all
}

// TestSegmentLimits checks how 128 KiB in 32 pages are passed on.
func TestSegmentLimits(t *testing.T) {
	d := newHeld(newRAM(t, block.Geometry{}))
	s := newSegmentServer(t, d, 16, 128<<10)
	g := connect(t, s, vhosttest.Config{Ack: true, Sealed: true, Data: 256 << 10})
	for _, c := range []struct {
		limit, pages int
		want         []uint8 // segments of each request; 0: copied
	}{
		{16, 32, []uint8{16, 16}}, {16, 16, []uint8{16}}, {16, 20, []uint8{16, 4}}, {16, 17, []uint8{16, 0xFF}}, {16, 2, []uint8{2}},
		{8, 32, []uint8{8, 8, 8, 8}}, {7, 32, []uint8{0}}, {7, 7, []uint8{7}}, {1, 32, []uint8{0}}, {1, 1, []uint8{0xFF}},
	} {
		d.mu.Lock()
		d.came = nil
		d.mu.Unlock()
		d.limit.Store(int32(c.limit))
		before := s.Snapshot()
		data := scattered{g.Rings[0], pages(g.Rings[0], c.pages)}
		data.do(t, vhosttest.In, 0)
		var got []uint8
		d.mu.Lock()
		for _, r := range d.came {
			if r.Region > 0 {
				r.Segments = 0xFF
			}
			got = append(got, r.Segments)
		}
		d.mu.Unlock()
		if !slices.Equal(got, c.want) {
			t.Errorf("limit %d, %d pages: requests of %v segments, want %v", c.limit, c.pages, got, c.want)
		}
		after, want := s.Snapshot(), uint64(4096*c.pages)
		if slices.Contains(c.want, 0) {
			want = 0
		}
		if after.ReadBytes-before.ReadBytes != uint64(4096*c.pages) || after.DirectBytes-before.DirectBytes != want {
			t.Errorf("limit %d, %d pages: counters %+v, before %+v", c.limit, c.pages, after, before)
		}
	}
}

// TestSmallSegments: small pieces are copied, because that is cheaper.
func TestSmallSegments(t *testing.T) {
	d := newHeld(newRAM(t, block.Geometry{}))
	s := newSegmentServer(t, d, 16, 128<<10)
	g := connect(t, s, vhosttest.Config{Ack: true, Sealed: true, Data: 256 << 10})
	all := pages(g.Rings[0], 4)
	for i := range all {
		all[i].Length = 2048
	}
	scattered{g.Rings[0], all}.do(t, vhosttest.In, 0)
	if regions, all := d.direct(); regions != 0 || all != 1 {
		t.Errorf("%d of %d requests had no copy", regions, all)
	}
}

// TestReplacedSegments has the front end replace the memory while requests with segments are at the back
// end. They are executed again with the new mapping, with segments or, if the device takes fewer of them
// now, with a copy.
func TestReplacedSegments(t *testing.T) {
	for _, later := range []int32{16, 8, 1} { // with 8, only half of each request fits
		d := newHeld(newRAM(t, block.Geometry{}))
		s := newSegmentServer(t, d, 16, 128<<10)
		g := connect(t, s, vhosttest.Config{Ack: true, Sealed: true, NoTrack: true, Data: 256 << 10})
		r := g.Rings[0]
		data := scattered{r, pages(r, 32)}
		pattern := bytes.Repeat([]byte("written!"), 128<<10/8)
		copyTo := func(s scattered, from []byte) { s.each(func(mem []byte) { from = from[copy(mem, from):] }) }
		copyTo(data, pattern)
		data.do(t, vhosttest.Out, 0)
		d.hold()
		// A write from some pages, and a read to others.
		out, in := scattered{r, data.buffers[:16]}, scattered{r, data.buffers[16:]}
		another := bytes.Repeat([]byte("another!"), 64<<10/8)
		copyTo(out, another)
		in.each(func(mem []byte) { clear(mem) })
		r.Submit(r.PrepareList(6, vhosttest.Out, 256, out.buffers...), r.PrepareList(7, vhosttest.In, 0, in.buffers...))
		d.await(t, 2)
		d.limit.Store(later)
		if err := g.SendMemory(); err != nil { // the server answers when the old mapping is gone
			t.Fatal(err)
		}
		d.release()
		for range 2 {
			if slot, status, err := r.Wait(); err != nil || status != vhosttest.OK {
				t.Fatalf("slot %d: status %d, %v", slot, status, err)
			}
		}
		if !bytes.Equal(in.bytes(), pattern[:64<<10]) {
			t.Error("the read has wrong data")
		}
		in.do(t, vhosttest.In, 256)
		if !bytes.Equal(in.bytes(), another) {
			t.Error("the write has written something else")
		}
		if regions, all := d.direct(); (regions == all) != (later == 16) {
			t.Errorf("%d of %d requests had no copy", regions, all)
		}
	}
}

// TestLoggedSegments: a log has the pages of all segments of a read.
func TestLoggedSegments(t *testing.T) {
	d := newHeld(newRAM(t, block.Geometry{}))
	s := newSegmentServer(t, d, 16, 128<<10)
	g := connect(t, s, vhosttest.Config{Ack: true, Sealed: true, Data: 256 << 10})
	log, err := g.StartLog(0)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	data := scattered{g.Rings[0], pages(g.Rings[0], 16)}
	data.do(t, vhosttest.Out, 0)
	written := log.Take()
	data.do(t, vhosttest.In, 0)
	read := log.Take()
	for _, b := range data.buffers {
		for _, page := range []uint64{b.Addr / 4096, (b.Addr + 4095) / 4096} {
			if !slices.Contains(read, page) || slices.Contains(written, page) {
				t.Fatalf("page %#x of a read is not in the log, or one of a write is", page)
			}
		}
	}
	if regions, all := d.direct(); regions != all {
		t.Errorf("%d of %d requests had no copy", regions, all)
	}
}

// TestRemovedSegments has the front end remove one of the memory regions of a request for good. The
// session ends.
func TestRemovedSegments(t *testing.T) {
	d := newHeld(newRAM(t, block.Geometry{}))
	s := newSegmentServer(t, d, 16, 128<<10)
	g := connect(t, s, vhosttest.Config{Ack: true, Slots: true, Sealed: true, Data: 256 << 10})
	r := g.Rings[0]
	m, err := vhosttest.NewModule(0, 1<<20, false)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := g.Plug(m); err != nil {
		t.Fatal(err)
	}
	d.hold()
	r.Submit(r.PrepareList(1, vhosttest.In, 0, append(pages(r, 3), vhosttest.Buffer{Addr: m.Base, Length: 4096})...))
	d.await(t, 1)
	if err := g.Unplug(m); err != nil {
		t.Fatal(err)
	}
	d.release()
	s.log.await(t, errRemoved.Error())
}

// TestReplacedUnnoticed: a read that has succeeded is executed again if the memory of one of its
// segments is another mapping by now, because the back end has read to the old one.
func TestReplacedUnnoticed(t *testing.T) {
	at := func(guest uint64) *region { return &region{area: area{guest: guest, size: 1 << 20}} }
	first, second, third := at(1<<20), at(2<<20), at(3<<20)
	of := func(regions ...*region) *memory {
		m, err := newMemory(regions, nil)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	before := of(first, second, third)
	read := &task{op: block.OpRead, nOut: 1, n: 4, segments: [maxSegments]segment{
		{0, 16}, {1<<20 + 512, 4096}, {3<<20 - 4096, 8192}, {0, 1}, // the second one is in two regions
	}}
	for _, c := range []struct {
		name  string
		now   *memory
		bytes uint32
		errno uint16
		want  bool
	}{
		{"the same", before, 12 << 10, 0, false},
		{"the same regions", of(first, second, third), 12 << 10, 0, false},
		{"another first region", of(at(1<<20), second, third), 12 << 10, 0, true},
		{"another second region", of(first, at(2<<20), third), 12 << 10, 0, true},
		{"another third region", of(first, second, at(3<<20)), 12 << 10, 0, true},
		{"no third region", of(first, second), 12 << 10, 0, true},
		{"another third region, which is not used", of(first, second, at(3<<20)), 8 << 10, 0, false},
		{"it has failed", of(first, second, at(3<<20)), 12 << 10, 5, false},
		{"no access", before, 12 << 10, 14, true},
	} {
		w := &worker{mem: c.now}
		if got := w.replaced(read, &tag{direct: before, bytes: c.bytes}, c.errno); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	if (&worker{mem: of()}).replaced(read, &tag{bytes: 512}, 14) {
		t.Error("a piece with a copy was taken for one without")
	}
}
