package blocktest

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
)

const regionSize = 1 << 20

// mapRegion maps memory of a front end, and registers it. The device must be a block.Registrar.
func mapRegion(t *testing.T, b Backend) ([]byte, block.Region) {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, regionSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	r, err := b.Device.(block.Registrar).Register(mem)
	if err != nil {
		t.Fatal(err)
	}
	if n := r.Number(); n == 0 || n > block.MaxRegions {
		t.Errorf("the number of a region is %d", n)
	}
	t.Cleanup(func() {
		_ = r.Close() // most tests have closed it
		if err := unix.Munmap(mem); err != nil {
			t.Error(err)
		}
	})
	return mem, r
}

// testRegions reads and writes regions, and buffers between them.
func testRegions(t *testing.T, b Backend) {
	if _, ok := b.Device.(block.Registrar); !ok {
		t.Log("the device has no regions")
		return
	}
	one, first := mapRegion(t, b)
	other, second := mapRegion(t, b)
	cfg := block.QueueConfig{Depth: depth, MaxIO: maxIO}
	u := open(t, b, 0, cfg)
	to := u
	if last := len(b.Loops) - 1; last > 0 {
		to = open(t, b, last, cfg)
	}
	if writable(b) && !b.Forgets {
		testRegionData(t, u, to, [2]block.Region{first, second}, one, other)
	}
	read := func(number uint16, offset uint64, sectors uint32) unix.Errno {
		return u.do(block.Request{Op: block.OpRead, Region: number, Offset: offset, Sectors: sectors})
	}
	block4k := uint32(8)
	for _, c := range []struct {
		name   string
		number uint16
		offset uint64
		want   unix.Errno
	}{
		{"last bytes", first.Number(), regionSize - 4096, 0},
		{"across the end", first.Number(), regionSize - 2048, unix.EINVAL},
		{"beyond the end", first.Number(), regionSize, unix.EINVAL},
		{"far beyond the end", first.Number(), ^uint64(3), unix.EINVAL},
		{"not a multiple of 4", first.Number(), 2, unix.EINVAL},
		{"no region", max(first.Number(), second.Number()) + 1, 0, unix.EFAULT},
		{"no number of a region", 65535, 0, unix.EFAULT},
	} {
		if got := read(c.number, c.offset, block4k); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	u.must(block.Request{Op: block.OpFlush, Region: 65535, Offset: 3}) // ignored, as it has no data
	for _, r := range []block.Region{first, second} {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if r.Close() == nil {
			t.Error("closed twice without an error")
		}
		if got := read(r.Number(), 0, block4k); got != unix.EFAULT {
			t.Errorf("read to a closed region: %v, want EFAULT", got)
		}
	}
	u.must(block.Request{Op: block.OpRead, Sectors: block4k})
}

// testRegionData writes from a region, and reads by another queue to another region and to a
// buffer.
func testRegionData(t *testing.T, from, to *user, regions [2]block.Region, one, other []byte) {
	most := uint32(maxIO >> block.SectorShift)
	for i, sectors := range []uint32{8, most, 2 * most} { // a region may be larger than buffers
		key, size := uint32(i)+50, int(sectors)<<block.SectorShift
		at, back := uint64(4096*i+512), uint64(2048)
		from.onLoop(func() { fill(one[at:][:size], key) })
		from.must(block.Request{Op: block.OpWrite, Tag: 1, Region: regions[0].Number(), Offset: at, Sectors: sectors})
		to.must(block.Request{Op: block.OpRead, Tag: 2, Region: regions[1].Number(), Offset: back, Sectors: sectors})
		to.onLoop(func() {
			if !holds(other[back:][:size], key) {
				t.Errorf("%d sectors of a region do not read what was written", sectors)
			}
			if !bytes.Equal(other[back-4:back], make([]byte, 4)) {
				t.Error("a read changed what is before its data")
			}
		})
		to.must(block.Request{Op: block.OpRead, Tag: 2, Sectors: 8})
		to.onLoop(func() {
			if !holds(to.queue.Buffer(2)[:4096], key) {
				t.Errorf("%d sectors of a region do not read to a buffer", sectors)
			}
		})
	}
}

// testCloseRegion closes a region while requests use it, and unmaps its memory at once.
func testCloseRegion(t *testing.T, b Backend) {
	registrar, ok := b.Device.(block.Registrar)
	if !ok {
		t.Log("the device has no regions")
		return
	}
	u := open(t, b, 0, block.QueueConfig{Depth: depth, MaxIO: maxIO})
	for range 50 {
		mem, err := unix.Mmap(-1, 0, regionSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
		if err != nil {
			t.Fatal(err)
		}
		r, err := registrar.Register(mem)
		if err != nil {
			t.Fatal(err)
		}
		var reqs []block.Request
		for tag := range uint16(depth) {
			reqs = append(reqs, block.Request{Op: block.OpRead, Tag: tag, Region: r.Number(), Offset: uint64(tag) * maxIO, Sectors: maxIO >> block.SectorShift})
		}
		u.submit(reqs...)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if err := unix.Munmap(mem); err != nil {
			t.Fatal(err)
		}
		for _, got := range u.await(depth) {
			if got.Errno != 0 && unix.Errno(got.Errno) != unix.EFAULT {
				t.Errorf("tag %d: %v, want success or EFAULT", got.Tag, unix.Errno(got.Errno))
			}
		}
	}
}
