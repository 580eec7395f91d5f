package main

import (
	"strings"
	"testing"
)

// content is a block as the client writes it; version 0 is zeroes.
func content(d *disk, block int, version uint64) []byte {
	b := make([]byte, blockSize)
	if version > 0 {
		d.fill(b, block, version)
	}
	return b
}

// writeNext writes the next version of a block, confirmed or not.
func (d *disk) writeNext(t *testing.T, zeroes, confirmed, durable bool) {
	t.Helper()
	first, versions, epoch := d.beginWrite(1, zeroes)
	if confirmed {
		d.endWrite(first, versions, epoch, durable)
	}
}

// TestDiskCatches reads blocks that a faulty server could return.
func TestDiskCatches(t *testing.T) {
	flush := func(d *disk) {
		acked, epoch := d.beginFlush()
		d.endFlush(acked, epoch)
	}
	read := func(d *disk, data []byte) error {
		oldest, epoch := d.beginRead(0, 1)
		return d.endRead(data, 0, oldest, epoch)
	}
	for _, c := range []struct {
		name    string
		prepare func(*testing.T, *disk)
		version uint64
		want    string // of the error; empty if it is allowed
	}{
		{"never written", func(*testing.T, *disk) {}, 0, ""},
		{"not written yet", func(*testing.T, *disk) {}, 1, "version 1, want 0 to 0"},
		{"newest", func(t *testing.T, d *disk) { d.writeNext(t, false, true, false); d.writeNext(t, false, true, false) }, 2, ""},
		{"old", func(t *testing.T, d *disk) { d.writeNext(t, false, true, false); d.writeNext(t, false, true, false) }, 1, "version 1, want 2 to 2"},
		{"lost", func(t *testing.T, d *disk) { d.writeNext(t, false, true, false) }, 0, "zeroes, want version 1"},
		{"in flight", func(t *testing.T, d *disk) { d.writeNext(t, false, true, false); d.writeNext(t, false, false, false) }, 1, ""},
		{"in flight, done", func(t *testing.T, d *disk) { d.writeNext(t, false, true, false); d.writeNext(t, false, false, false) }, 2, ""},
		{"going back", func(t *testing.T, d *disk) {
			d.writeNext(t, false, true, false)
			d.writeNext(t, false, false, false)
			if err := read(d, content(d, 0, 2)); err != nil {
				t.Error(err)
			}
		}, 1, "version 1, want 2 to 2"},
		{"zeroes", func(t *testing.T, d *disk) { d.writeNext(t, false, true, false); d.writeNext(t, true, true, false) }, 0, ""},
		{"over zeroes", func(t *testing.T, d *disk) { d.writeNext(t, true, true, false); d.writeNext(t, false, true, false) }, 0, "zeroes, want version 2"},
		{"lost with its target", func(t *testing.T, d *disk) { d.writeNext(t, false, true, false); d.targetDied() }, 0, ""},
		{"lost although durable", func(t *testing.T, d *disk) { d.writeNext(t, false, true, true); d.targetDied() }, 0, "zeroes, want version 1"},
		{"lost although flushed", func(t *testing.T, d *disk) { d.writeNext(t, false, true, false); flush(d); d.targetDied() }, 0, "zeroes, want version 1"},
		{"flush of another target", func(t *testing.T, d *disk) {
			d.writeNext(t, false, true, false)
			acked, epoch := d.beginFlush()
			d.targetDied()
			d.endFlush(acked, epoch)
		}, 0, ""},
	} {
		d := newDisk(7, 1, true)
		c.prepare(t, d)
		err := read(d, content(d, 0, c.version))
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	d := newDisk(7, 2, false)
	d.writeNext(t, false, true, false)
	for what, data := range map[string][]byte{
		"another block":     content(d, 1, 1),
		"another namespace": content(newDisk(8, 1, false), 0, 1),
		"torn":              append(content(d, 0, 1)[:blockSize/2:blockSize/2], content(d, 0, 2)[blockSize/2:]...),
	} {
		oldest, epoch := d.beginRead(0, 1)
		if err := d.endRead(data, 0, oldest, epoch); err == nil {
			t.Errorf("%s is taken for the block", what)
		}
	}
	d.writeNext(t, false, true, false)
	d.targetDied()
	d.mu.Lock()
	defer d.mu.Unlock()
	for block := range d.state {
		if s := d.state[block]; s.oldest() != s.issued {
			t.Errorf("block %d: the death of a target without a cache lost something", block)
		}
	}
}
