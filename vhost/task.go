package vhost

import (
	"encoding/binary"
	"math"

	"ublk-nvmeof/block"
)

// task is a request of the guest in progress. It transfers its data in pieces of the size
// of a buffer. Each piece has a tag of the back end.
type task struct {
	ring  *vring
	head  uint16
	op    block.Op
	flags block.Flags

	// The buffers. The first nOut are read by the device, the others written.
	segments  [maxSegments]segment
	nOut, n   int
	out, in   uint64 // bytes
	sector    uint64 // of the next piece
	at, total uint64 // bytes of data that have a piece, and all; of a discard: bytes of ranges
	left      uint64 // sectors of the present range of a discard
	direct    uint64 // bytes that were not copied
	failed    bool
	busy      int // number of pieces at the back end
	next      *task
}

// add appends a buffer to the request.
func (t *task) add(m *memory, d descriptor) error {
	write := d.flags&descWrite != 0
	switch {
	case d.length == 0:
		return errEmpty
	case t.n == maxSegments:
		return errLong
	case !write && t.n > t.nOut:
		return errOrder
	case !m.has(d.segment):
		return errAddress(d.segment)
	}
	t.segments[t.n] = d.segment
	t.n++
	if write {
		t.in += uint64(d.length)
	} else {
		t.nOut++
		t.out += uint64(d.length)
	}
	if t.in > math.MaxUint32 || t.out > math.MaxUint32 {
		return errHuge
	}
	return nil
}

// read copies dst from the buffers that the device may read, from the byte at on. It
// returns false if a memory region is missing.
func (t *task) read(m *memory, at uint64, dst []byte) bool {
	for _, s := range t.segments[:t.nOut] {
		n := uint64(s.length)
		if at >= n {
			at -= n
			continue
		}
		n = min(n-at, uint64(len(dst)))
		if !m.copyIn(dst[:n], s.guest+at) {
			return false
		}
		if dst = dst[n:]; len(dst) == 0 {
			return true
		}
		at = 0
	}
	return len(dst) == 0
}

// cursor is a place in the data of a read or write.
type cursor struct {
	segments []segment // from there on
	at       uint64    // in the first of them
}

// data returns the place of the byte at of a read's or write's data.
func (t *task) data(at uint64) cursor {
	c := cursor{t.segments[t.nOut:t.n], at}
	if t.op == block.OpWrite {
		c = cursor{t.segments[:t.nOut], at + blkHeaderSize}
	}
	for c.at >= uint64(c.segments[0].length) {
		c.at -= uint64(c.segments[0].length)
		c.segments = c.segments[1:]
	}
	return c
}

// run returns the region and the guest address of the data at the cursor, and how many bytes of it,
// up to most, are contiguous there, and moves behind them. There are most bytes. If there is no
// region, it returns nil and 0 bytes.
func (c *cursor) run(m *memory, most uint64) (r *region, guest, n uint64) {
	guest = c.segments[0].guest + c.at
	if r = m.find(guest); r == nil {
		return nil, 0, 0
	}
	most = min(most, r.guest+r.size-guest)
	for {
		k := min(uint64(c.segments[0].length)-c.at, most-n)
		n += k
		if c.at += k; c.at < uint64(c.segments[0].length) {
			return r, guest, n
		}
		c.segments, c.at = c.segments[1:], 0
		if n == most || c.segments[0].guest != guest+n {
			return r, guest, n
		}
	}
}

// write copies src to the buffers that the device may write, from the byte at on.
func (t *task) write(m *memory, at uint64, src []byte) bool {
	for _, s := range t.segments[t.nOut:t.n] {
		n := uint64(s.length)
		if at >= n {
			at -= n
			continue
		}
		n = min(n-at, uint64(len(src)))
		if !m.copyOut(s.guest+at, src[:n]) {
			return false
		}
		if src = src[n:]; len(src) == 0 {
			return true
		}
		at = 0
	}
	return len(src) == 0
}

// blkHeader is struct virtio_blk_req up to its data.
type blkHeader struct {
	kind   uint32
	sector uint64
}

func decodeBlkHeader(p *[blkHeaderSize]byte) blkHeader {
	return blkHeader{binary.LittleEndian.Uint32(p[:]), binary.LittleEndian.Uint64(p[8:])}
}

// diskRange is struct virtio_blk_discard_write_zeroes.
type diskRange struct {
	sector  uint64
	sectors uint32
	flags   uint32
}

func decodeRange(p *[rangeSize]byte) diskRange {
	le := binary.LittleEndian
	return diskRange{le.Uint64(p[:]), le.Uint32(p[8:]), le.Uint32(p[12:])}
}
