package ram

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
)

const depth, maxIO = 4, 64 << 10

func open(t testing.TB, g block.Geometry) block.Queue {
	t.Helper()
	d, err := New(Config{Geometry: g})
	if err != nil {
		t.Fatal(err)
	}
	q, err := d.OpenQueue(0, block.QueueConfig{Depth: depth, MaxIO: maxIO})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return q
}

// do executes one request and returns its errno.
func do(t testing.TB, q block.Queue, r block.Request) unix.Errno {
	t.Helper()
	q.Submit([]block.Request{r})
	var done [2]block.Result
	if n := q.Reap(done[:]); n != 1 || done[0].Tag != r.Tag {
		t.Fatalf("%v: %d results, first %+v", r.Op, n, done[0])
	}
	return unix.Errno(done[0].Errno)
}

func TestData(t *testing.T) {
	q := open(t, block.Geometry{})
	fill := bytes.Repeat([]byte{1, 2, 3, 4}, 1024)
	copy(q.Buffer(1), fill)
	read := func(sector uint64, want []byte) {
		t.Helper()
		if e := do(t, q, block.Request{Op: block.OpRead, Sector: sector, Sectors: uint32(len(want) >> 9), Tag: 2}); e != 0 {
			t.Fatal(e)
		}
		if !bytes.Equal(q.Buffer(2)[:len(want)], want) {
			t.Fatalf("sector %d: wrong data", sector)
		}
	}
	if e := do(t, q, block.Request{Op: block.OpWrite, Sector: 80, Sectors: 8, Tag: 1}); e != 0 {
		t.Fatal(e)
	}
	read(80, fill)
	read(72, make([]byte, 4096))
	if e := do(t, q, block.Request{Op: block.OpFlush, Sector: 1 << 60}); e != 0 {
		t.Fatal(e)
	}
	for i, op := range []block.Op{block.OpDiscard, block.OpWriteZeroes} {
		if e := do(t, q, block.Request{Op: op, Sector: 80 + uint64(i), Sectors: 1}); e != 0 {
			t.Fatal(e)
		}
		clear(fill[i*512 : (i+1)*512])
		read(80, fill)
	}
}

func TestErrors(t *testing.T) {
	large := open(t, block.Geometry{Sectors: 1024, LogicalBlock: 4096})
	rw, ro := open(t, block.Geometry{Sectors: 1024}), open(t, block.Geometry{Sectors: 1024, ReadOnly: true})
	for _, c := range []struct {
		name string
		q    block.Queue
		r    block.Request
		want unix.Errno
	}{
		{"last sector", rw, block.Request{Op: block.OpRead, Sector: 1023, Sectors: 1}, 0},
		{"across the end", rw, block.Request{Op: block.OpRead, Sector: 1023, Sectors: 2}, unix.EIO},
		{"beyond the end", rw, block.Request{Op: block.OpWrite, Sector: 1 << 63, Sectors: 1}, unix.EIO},
		{"overflow", rw, block.Request{Op: block.OpDiscard, Sector: ^uint64(0), Sectors: 2}, unix.EIO},
		{"beyond the buffer", rw, block.Request{Op: block.OpRead, Sectors: maxIO>>9 + 1}, unix.EINVAL},
		{"no sector", rw, block.Request{Op: block.OpWrite}, unix.EINVAL},
		{"unknown flag", rw, block.Request{Op: block.OpWrite, Sectors: 1, Flags: 1 << 7}, unix.EINVAL},
		{"part of a block", large, block.Request{Op: block.OpWrite, Sectors: 1}, unix.EINVAL},
		{"within a block", large, block.Request{Op: block.OpRead, Sector: 1, Sectors: 8}, unix.EINVAL},
		{"a block", large, block.Request{Op: block.OpWrite, Sector: 8, Sectors: 8, Flags: block.FUA}, 0},
		{"unset", rw, block.Request{Sectors: 1}, unix.EOPNOTSUPP},
		{"read only read", ro, block.Request{Op: block.OpRead, Sectors: 1}, 0},
		{"read only write", ro, block.Request{Op: block.OpWrite, Sectors: 1}, unix.EROFS},
		{"read only discard", ro, block.Request{Op: block.OpDiscard, Sectors: 1}, unix.EROFS},
	} {
		if got := do(t, c.q, c.r); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestReapInParts(t *testing.T) {
	q := open(t, block.Geometry{})
	var reqs []block.Request
	for tag := range uint16(depth) {
		reqs = append(reqs, block.Request{Op: block.OpFlush, Tag: tag})
	}
	var done [3]block.Result
	if n := testing.AllocsPerRun(100, func() {
		q.Submit(reqs)
		if a, b := q.Reap(done[:]), q.Reap(done[:]); a != 3 || b != 1 || done[0].Tag != 3 {
			t.Fatalf("reaped %d and %d, last tag %d", a, b, done[0].Tag)
		}
	}); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}

func TestBadGeometry(t *testing.T) {
	if _, err := New(Config{Geometry: block.Geometry{LogicalBlock: 1000}}); err == nil {
		t.Fatal("took a block size of 1000")
	}
}
