package null

import (
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
)

func TestQueue(t *testing.T) {
	d, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	const depth, maxIO = 8, 8 << 10
	q, err := d.OpenQueue(0, block.QueueConfig{Depth: depth, MaxIO: maxIO})
	if err != nil {
		t.Fatal(err)
	}
	for tag := range uint16(depth) {
		b := q.Buffer(tag)
		if len(b) != maxIO || cap(b) != maxIO || b[0] != 0 || b[maxIO-1] != 0 {
			t.Fatalf("tag %d: buffer of %d bytes, or not its own", tag, len(b))
		}
		b[0], b[maxIO-1] = 1, 1
	}
	reqs := make([]block.Request, depth)
	for i := range reqs {
		reqs[i] = block.Request{Op: block.OpRead, Tag: uint16(depth - 1 - i), Sectors: 1}
	}
	var done [5]block.Result
	if n := testing.AllocsPerRun(100, func() {
		q.Submit(reqs)
		if a, b, c := q.Reap(done[:]), q.Reap(done[:]), q.Reap(done[:]); a != 5 || b != 3 || c != 0 {
			t.Fatalf("reaped %d, %d, %d", a, b, c)
		}
		if done[0] != (block.Result{Tag: 2}) || done[2] != (block.Result{Tag: 0}) {
			t.Fatalf("results %+v", done)
		}
	}); n != 0 {
		t.Fatalf("%v allocations", n)
	}
	q.Submit(reqs[:1])
	if q.Close() == nil {
		t.Fatal("closed with a request in flight")
	}
	q.Reap(done[:])
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestErrors checks that requests that no device may execute fail here, too.
func TestErrors(t *testing.T) {
	d, err := New(Config{Geometry: block.Geometry{Sectors: 1024, LogicalBlock: 4096}})
	if err != nil {
		t.Fatal(err)
	}
	const maxIO = 8 << 10
	q, err := d.OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: maxIO})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		r    block.Request
		want unix.Errno
	}{
		{"last block", block.Request{Op: block.OpWrite, Sector: 1016, Sectors: 8}, 0},
		{"flush", block.Request{Op: block.OpFlush}, 0},
		{"beyond the end", block.Request{Op: block.OpRead, Sector: 1024, Sectors: 8}, unix.EIO},
		{"beyond the buffer", block.Request{Op: block.OpRead, Sectors: maxIO>>9 + 8}, unix.EINVAL},
		{"part of a block", block.Request{Op: block.OpDiscard, Sectors: 1}, unix.EINVAL},
		{"no sector", block.Request{Op: block.OpWriteZeroes}, unix.EINVAL},
		{"unset", block.Request{Sectors: 8}, unix.EOPNOTSUPP},
	} {
		q.Submit([]block.Request{c.r})
		var done [1]block.Result
		if n := q.Reap(done[:]); n != 1 || unix.Errno(done[0].Errno) != c.want {
			t.Errorf("%s: %d results, %v, want %v", c.name, n, unix.Errno(done[0].Errno), c.want)
		}
	}
	if err := q.Close(); err != nil {
		t.Error(err)
	}
}

func TestGeometry(t *testing.T) {
	d, err := New(Config{Geometry: block.Geometry{LogicalBlock: 4096}})
	if g := d.Geometry(); err != nil || g.PhysicalBlock != 4096 || g.Validate() != nil {
		t.Fatalf("%+v, %v", g, err)
	}
	if _, err := New(Config{Geometry: block.Geometry{LogicalBlock: 4096, Sectors: 9}}); err == nil {
		t.Fatal("took 9 sectors of 4096-byte blocks")
	}
}
