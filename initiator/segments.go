package initiator

import (
	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// table has the segments of a tag, and the slabs that they are in.
type table struct {
	segments [block.MaxSegments]block.Segment
	slabs    [block.MaxSegments]*slab
}

// Segments implements block.Gatherer.
func (q *nsQueue) Segments(tag uint16) *[block.MaxSegments]block.Segment {
	if q.tables == nil {
		q.tables = make([]table, len(q.requests))
	}
	return &q.tables[tag].segments
}

// SegmentLimit implements block.Gatherer. Over each present path one command can have as many
// segments, and that is cheaper than copies.
func (q *nsQueue) SegmentLimit() int { return int(q.ns.segments.Load()) }

// locateSegments is locate for a request with segments.
func (q *nsQueue) locateSegments(r *request) (room int, errno unix.Errno) {
	segments := q.Segments(r.io.Tag)
	if e := r.io.CheckSegments(segments, block.SectorSize<<q.ns.sectorShift); e != 0 {
		return 0, e
	}
	t := &q.tables[r.io.Tag]
	for i := range segments[:r.io.Segments] {
		s := &segments[i]
		b := q.ns.regions.find(s.Region)
		switch {
		case b == nil || b.gone.Load():
			return 0, unix.EFAULT
		case s.Offset > uint64(len(b.mem)) || uint64(s.Length) > uint64(len(b.mem))-s.Offset:
			return 0, unix.EINVAL
		}
		t.slabs[i] = b
	}
	for _, b := range t.slabs[:r.io.Segments] {
		b.users[q.lane.index].n++
	}
	r.data, r.inRegion = t.slabs[0], true
	return int(r.io.Sectors) << block.SectorShift, 0
}

// leave ends the use of the regions of a request.
func (q *nsQueue) leave(r *request) {
	r.inRegion = false
	if r.io.Segments == 0 {
		r.data.users[q.lane.index].n--
		return
	}
	for _, b := range q.tables[r.io.Tag].slabs[:r.io.Segments] {
		b.users[q.lane.index].n--
	}
}

// withdrawn reports whether no command may name a region of the request any more.
func (r *request) withdrawn() bool {
	if r.io.Segments == 0 {
		return r.data.gone.Load()
	}
	for _, b := range r.home.tables[r.io.Tag].slabs[:r.io.Segments] {
		if b.gone.Load() {
			return true
		}
	}
	return false
}

// find returns the segment with the byte at of the data, and where the byte is in it.
func (t *table) find(at uint64) (i int, skip uint32) {
	for ; at >= uint64(t.segments[i].Length); i++ {
		at -= uint64(t.segments[i].Length)
	}
	return i, uint32(at)
}

// reach returns how many sectors of a request a command can transfer whose data is in up to n segments,
// from the byte at on. It is at most limit.
func (r *request) reach(t *table, at uint64, n int, limit uint32) uint32 {
	i, skip := t.find(at)
	bytes := -uint64(skip)
	for _, s := range t.segments[i:min(i+n, int(r.io.Segments))] {
		bytes += uint64(s.Length)
	}
	return uint32(min(bytes>>block.SectorShift, uint64(limit)))
}

// pushSegments pushes the next command of a read or write with segments. It covers as many segments
// as a command over this path may have descriptors, and needs no list for one.
func (p *queuePair) pushSegments(r *request, slot uint16, cmd *nvme.Command, terms *view) {
	t, at := &r.home.tables[r.io.Tag], r.offset()
	lba, blocks, length := r.piece(r.reach(t, at, p.descriptors, terms.transfer))
	if r.io.Op == block.OpRead {
		cmd.SetRead(r.home.ns.id, lba, blocks, false)
	} else {
		cmd.SetWrite(r.home.ns.id, lba, blocks, r.durable(terms))
	}
	i, skip := t.find(at)
	b, addr := t.slabs[i], t.addr(i, skip)
	switch {
	case length > t.segments[i].Length-skip:
		n := p.list(p.sq.Descriptors(slot), t, i, skip, length)
		cmd.SetLastSegmentSGL(0, n)
		p.sq.PushList(slot, n)
	case r.io.Op == block.OpRead:
		cmd.SetKeyedSGL(addr, length, b.keys[p.slot].remote, false)
		p.sq.Push(slot, rdma.SGE{})
	default:
		p.sq.Push(slot, p.inline(cmd, b, addr, length))
	}
}

// addr returns the address of a byte of a segment, for the target and for an SGE.
func (t *table) addr(i int, skip uint32) uint64 {
	return t.slabs[i].base + t.segments[i].Offset + uint64(skip)
}

// list writes the descriptors of length bytes from a byte of segment i on, and returns their number.
func (p *queuePair) list(room []byte, t *table, i int, skip, length uint32) (n int) {
	for ; length > 0; n++ {
		part := min(t.segments[i].Length-skip, length)
		nvme.SGLAt(room[n*nvme.SGLSize:]).SetKeyed(t.addr(i, skip), part, t.slabs[i].keys[p.slot].remote)
		length -= part
		i, skip = i+1, 0
	}
	return n
}
