package blocktest

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
)

// gatherer returns the queue of a user as a block.Gatherer, or nil. All queues of a block.Registrar
// that is tested here are, or none.
func (u *user) gatherer() block.Gatherer {
	g, _ := u.queue.(block.Gatherer)
	return g
}

// segments fills in the table of a request, and returns it.
func (u *user) segments(r block.Request, list ...block.Segment) block.Request {
	u.onLoop(func() { copy(u.gatherer().Segments(r.Tag)[:], list) })
	r.Segments = uint8(len(list))
	return r
}

// segmentsSetup has two regions, and two users, who may be the same.
type segmentsSetup struct {
	from, to *user
	mem      [2][]byte
	regions  [2]block.Region
}

// newSegmentsSetup returns nil if the device does not have segments.
func newSegmentsSetup(t *testing.T, b Backend) *segmentsSetup {
	t.Helper()
	if _, ok := b.Device.(block.Registrar); !ok {
		t.Log("the device has no regions")
		return nil
	}
	cfg := block.QueueConfig{Depth: depth, MaxIO: maxIO}
	s := &segmentsSetup{from: open(t, b, 0, cfg)}
	if s.from.gatherer() == nil {
		t.Log("the device has no segments")
		return nil
	}
	s.to = s.from
	if last := len(b.Loops) - 1; last > 0 {
		s.to = open(t, b, last, cfg)
	}
	for i := range s.mem {
		s.mem[i], s.regions[i] = mapRegion(t, b)
	}
	return s
}

// scatter returns segments for so many sectors in both regions, in any order and without overlap. Their
// gaps and offsets are no multiples of a block. Each has a number of blocks that differs from that of
// the others, unless there are too many.
func (s *segmentsSetup) scatter(rng *rand.Rand, n int, sectors, unit uint32) (list []block.Segment) {
	at := [2]uint64{uint64(4 * rng.IntN(64)), uint64(4 * rng.IntN(64))}
	for left := n; left > 0; left-- {
		blocks := sectors / unit
		length := blocks
		if left > 1 {
			length = 1 + uint32(rng.IntN(int(min(2*blocks/uint32(left), blocks-uint32(left)+1))))
		}
		i := rng.IntN(2)
		list = append(list, block.Segment{Region: s.regions[i].Number(), Offset: at[i], Length: length * unit << block.SectorShift})
		at[i] += uint64(length*unit<<block.SectorShift) + uint64(4*rng.IntN(200))
		sectors -= length * unit
	}
	rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}

// of returns the memory of a segment.
func (s *segmentsSetup) of(g block.Segment) []byte {
	i := 0
	if g.Region == s.regions[1].Number() {
		i = 1
	}
	return s.mem[i][g.Offset:][:g.Length]
}

// testSegments writes from segments, and reads by another queue to other segments and to a buffer.
func testSegments(t *testing.T, b Backend) {
	s := newSegmentsSetup(t, b)
	if s == nil {
		return
	}
	s.from.onLoop(func() {
		g := s.from.gatherer()
		if n := g.SegmentLimit(); n < 1 || n > block.MaxSegments {
			t.Errorf("the limit is %d segments", n)
		}
		one := g.Segments(1)
		if other := g.Segments(2); other == one || g.Segments(1) != one {
			t.Error("the table of a tag has moved, or is that of another one")
		}
	})
	s.testErrors(t, b)
	if !writable(b) || b.Forgets {
		return
	}
	rng := rand.New(rand.NewPCG(3, 0))
	most := uint32(maxIO >> block.SectorShift)
	for i, c := range []struct {
		segments int
		sectors  uint32
	}{{1, unit(b)}, {1, most}, {2, 2 * unit(b)}, {2, most}, {3, 8 * 3}, {5, 8 * 9}, {16, 16 * unit(b)}, {16, most}, {15, 4 * most}, {16, 7 * most}} {
		key, sector := uint32(i)+200, uint64(8*i)
		want := make([]byte, c.sectors<<block.SectorShift)
		fill(want, key)
		out, in := s.scatter(rng, c.segments, c.sectors, unit(b)), s.scatter(rng, 1+rng.IntN(c.segments), c.sectors, unit(b))
		s.from.onLoop(func() {
			clear(s.mem[0])
			clear(s.mem[1])
			for rest, i := want, 0; len(rest) > 0; i++ {
				rest = rest[copy(s.of(out[i]), rest):]
			}
		})
		s.from.must(s.from.segments(block.Request{Op: block.OpWrite, Tag: 1, Sector: sector, Sectors: c.sectors}, out...))
		expect := s.filled(s.from, in, want)
		s.to.must(s.to.segments(block.Request{Op: block.OpRead, Tag: 2, Sector: sector, Sectors: c.sectors}, in...))
		s.to.onLoop(func() {
			for i := range s.mem {
				if !bytes.Equal(s.mem[i], expect[i]) {
					t.Errorf("%d sectors in %d segments do not read to %d segments what was written", c.sectors, len(out), len(in))
				}
			}
		})
		size := min(c.sectors, most)
		s.to.must(block.Request{Op: block.OpRead, Tag: 2, Sector: sector, Sectors: size})
		s.to.onLoop(func() {
			if !holds(s.to.queue.Buffer(2)[:size<<block.SectorShift], key) {
				t.Errorf("%d sectors in %d segments do not read to a buffer", c.sectors, len(out))
			}
		})
	}
}

// filled clears the regions, and returns what they have when data is in the segments.
func (s *segmentsSetup) filled(u *user, list []block.Segment, data []byte) (expect [2][]byte) {
	u.onLoop(func() {
		for i := range s.mem {
			clear(s.mem[i])
		}
		for _, g := range list {
			data = data[copy(s.of(g), data):]
		}
		for i := range s.mem {
			expect[i] = bytes.Clone(s.mem[i])
			clear(s.mem[i])
		}
	})
	return expect
}

// testErrors submits segments that contradict each other, the device or the request.
func (s *segmentsSetup) testErrors(t *testing.T, b Backend) {
	size := uint32(4096)
	one, other := s.regions[0].Number(), s.regions[1].Number()
	good := block.Segment{Region: other, Length: size}
	for _, c := range []struct {
		name    string
		sectors uint32
		region  uint16
		list    []block.Segment
		want    unix.Errno
	}{
		{"last bytes", 16, 0, []block.Segment{good, {Region: one, Offset: regionSize - 4096, Length: size}}, 0},
		{"one region twice", 16, 0, []block.Segment{good, {Region: other, Offset: 8, Length: size}}, 0},
		{"across the end", 16, 0, []block.Segment{good, {Region: one, Offset: regionSize - 2048, Length: size}}, unix.EINVAL},
		{"far beyond the end", 16, 0, []block.Segment{good, {Region: one, Offset: ^uint64(3), Length: size}}, unix.EINVAL},
		{"overflow", 16, 0, []block.Segment{good, {Region: one, Offset: ^uint64(4095), Length: size}}, unix.EINVAL},
		{"not a multiple of 4", 16, 0, []block.Segment{good, {Region: one, Offset: 2, Length: size}}, unix.EINVAL},
		{"not whole blocks", 16, 0, []block.Segment{{Region: one, Length: size - 256}, {Region: one, Length: size + 256}}, unix.EINVAL},
		{"empty segment", 8, 0, []block.Segment{good, {Region: one}}, unix.EINVAL},
		{"too short", 24, 0, []block.Segment{good, good}, unix.EINVAL},
		{"too long", 8, 0, []block.Segment{good, good}, unix.EINVAL},
		{"overflow of the sum", 8, 0, []block.Segment{{Region: one, Length: 1<<32 - 4096}, {Region: one, Length: 8192}}, unix.EINVAL},
		{"a region, too", 16, one, []block.Segment{good, good}, unix.EINVAL},
		{"no region", 16, 0, []block.Segment{good, {Region: max(one, other) + 1, Length: size}}, unix.EFAULT},
		{"no number of a region", 16, 0, []block.Segment{{Region: 65535, Length: size}, good}, unix.EFAULT},
		{"the buffer", 16, 0, []block.Segment{good, {Length: size}}, unix.EFAULT},
	} {
		r := s.from.segments(block.Request{Op: block.OpRead, Sectors: c.sectors, Region: c.region}, c.list...)
		if got := s.from.do(r); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	for n := block.MaxSegments + 1; n < 256; n += 50 {
		if got := s.from.do(block.Request{Op: block.OpRead, Sectors: 8, Segments: uint8(n)}); got != unix.EINVAL {
			t.Errorf("%d segments: %v, want EINVAL", n, got)
		}
	}
	end := b.Device.Geometry().Sectors
	if got := s.from.do(s.from.segments(block.Request{Op: block.OpRead, Sector: end - 8, Sectors: 16}, good, good)); got != unix.EIO {
		t.Errorf("across the end of the device: %v, want EIO", got)
	}
	s.from.must(block.Request{Op: block.OpFlush, Segments: 255}) // ignored, as it has no data
	for i, r := range s.regions[:1] {
		if err := r.Close(); err != nil { // no request that was refused counts as its user
			t.Error(err)
		}
		gone := s.from.segments(block.Request{Op: block.OpRead, Sectors: 16}, good, block.Segment{Region: r.Number(), Length: size})
		if got := s.from.do(gone); got != unix.EFAULT {
			t.Errorf("read to a closed region: %v, want EFAULT", got)
		}
		s.mem[i], s.regions[i] = mapRegion(t, b)
	}
}

// testCloseSegments closes one of two regions while requests use both, and unmaps its memory at once.
func testCloseSegments(t *testing.T, b Backend) {
	s := newSegmentsSetup(t, b)
	if s == nil {
		return
	}
	for range 50 {
		mem, err := unix.Mmap(-1, 0, regionSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
		if err != nil {
			t.Fatal(err)
		}
		r, err := b.Device.(block.Registrar).Register(mem)
		if err != nil {
			t.Fatal(err)
		}
		var reqs []block.Request
		for tag := range uint16(depth) {
			var list []block.Segment
			for i := range 8 {
				region := r.Number()
				if i%2 == 0 {
					region = s.regions[0].Number()
				}
				list = append(list, block.Segment{Region: region, Offset: uint64(tag)*maxIO + uint64(8192*i), Length: 4096})
			}
			reqs = append(reqs, s.from.segments(block.Request{Op: block.OpRead, Tag: tag, Sectors: 64}, list...))
		}
		s.from.submit(reqs...)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if err := unix.Munmap(mem); err != nil {
			t.Fatal(err)
		}
		for _, got := range s.from.await(depth) {
			if got.Errno != 0 && unix.Errno(got.Errno) != unix.EFAULT {
				t.Errorf("tag %d: %v, want success or EFAULT", got.Tag, unix.Errno(got.Errno))
			}
		}
	}
}
