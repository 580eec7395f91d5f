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

// run returns the region and the guest address of the data from the byte at on, and how many
// bytes, up to most, are contiguous there. The region is nil if the back end does not have it.
func (t *task) run(m *memory, at, most uint64) (r *region, guest, n uint64) {
	segments := t.segments[t.nOut:t.n]
	if t.op == block.OpWrite {
		segments, at = t.segments[:t.nOut], at+blkHeaderSize
	}
	for _, s := range segments {
		length := uint64(s.length)
		switch {
		case r != nil && s.guest != guest+n:
			return r, guest, n
		case r == nil && at >= length:
			at -= length
			continue
		case r == nil:
			guest, length = s.guest+at, length-at
			if r = m.find(guest); r == nil || r.lent == nil {
				return nil, 0, 0
			}
			most = min(most, r.guest+r.size-guest)
		}
		if n = min(n+length, most); n == most {
			break
		}
	}
	return r, guest, n
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
