// Package instant is the block.Queue of back ends that execute requests at once, on the loop
// that submits them.
package instant

import (
	"errors"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
)

// Queue executes requests in the order of their submission, and completes them in that order. It is a
// block.Gatherer.
type Queue struct {
	geometry block.Geometry
	execute  func(r *block.Request, data []byte)
	regions  *Regions
	mem      []byte                             // nil after Close
	size     int                                // of a buffer, in bytes
	flying   []bool                             // by tag
	tables   [][block.MaxSegments]block.Segment // by tag; nil: not asked for
	part     block.Request                      // the part that is being executed
	done     []block.Result
	next     int // results from here on are not reaped
}

// Open makes a queue of a device with a geometry. execute carries out a request that was checked, except
// a flush. Of a read or write it gets the data, whose length is that of the request; a request with
// segments comes in one part for each.
func Open(cfg block.QueueConfig, geometry block.Geometry, regions *Regions, execute func(r *block.Request, data []byte)) (*Queue, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	mem, err := hostmem.Map(cfg.Depth * cfg.MaxIO)
	if err != nil {
		return nil, err
	}
	return &Queue{
		geometry: geometry, execute: execute, regions: regions, mem: mem, size: cfg.MaxIO,
		flying: make([]bool, cfg.Depth), done: make([]block.Result, 0, cfg.Depth),
	}, nil
}

// Buffer implements block.Queue.
func (q *Queue) Buffer(tag uint16) []byte {
	off := int(tag) * q.size
	return q.mem[off : off+q.size : off+q.size]
}

// Submit implements block.Queue.
func (q *Queue) Submit(reqs []block.Request) {
	for i := range reqs {
		r := &reqs[i]
		e := unix.EINVAL
		if int(r.Tag) < len(q.flying) && !q.flying[r.Tag] {
			q.flying[r.Tag] = true
			e = q.serve(r)
		}
		q.done = append(q.done, block.Result{Tag: r.Tag, Errno: uint16(e)})
	}
}

// Segments implements block.Gatherer.
func (q *Queue) Segments(tag uint16) *[block.MaxSegments]block.Segment {
	if q.tables == nil {
		q.tables = make([][block.MaxSegments]block.Segment, len(q.flying))
	}
	return &q.tables[tag]
}

// SegmentLimit implements block.Gatherer.
func (q *Queue) SegmentLimit() int { return block.MaxSegments }

// serve executes a request. Errors are those of block.Request.Check, and EROFS for changes of a
// read-only device.
func (q *Queue) serve(r *block.Request) unix.Errno {
	if !r.InRegion() {
		return q.with(r, q.Buffer(r.Tag))
	}
	q.regions.mu.RLock()
	defer q.regions.mu.RUnlock()
	if r.Segments > 0 {
		return q.gather(r)
	}
	data := q.regions.from(r.Region, r.Offset)
	switch {
	case data == nil:
		return unix.EFAULT
	case r.Offset&3 != 0:
		return unix.EINVAL
	}
	return q.with(r, data)
}

// with executes a request whose data has room in a slice.
func (q *Queue) with(r *block.Request, data []byte) unix.Errno {
	if e := q.check(r, len(data)); e != 0 {
		return e
	}
	switch r.Op {
	case block.OpFlush:
	case block.OpRead, block.OpWrite:
		q.execute(r, data[:uint64(r.Sectors)<<block.SectorShift])
	default:
		q.execute(r, nil)
	}
	return 0
}

// gather executes a request with segments. It checks all of them before it executes the first part.
func (q *Queue) gather(r *block.Request) unix.Errno {
	table := q.Segments(r.Tag)
	if e := r.CheckSegments(table, q.geometry.LogicalBlock); e != 0 {
		return e
	}
	var parts [block.MaxSegments][]byte
	for i, s := range table[:r.Segments] {
		data := q.regions.from(s.Region, s.Offset)
		switch {
		case data == nil:
			return unix.EFAULT
		case uint64(s.Length) > uint64(len(data)):
			return unix.EINVAL
		}
		parts[i] = data[:s.Length]
	}
	if e := q.check(r, int(r.Sectors)<<block.SectorShift); e != 0 {
		return e
	}
	q.part = *r
	for _, data := range parts[:r.Segments] {
		q.part.Sectors = uint32(len(data) >> block.SectorShift)
		q.execute(&q.part, data)
		q.part.Sector += uint64(q.part.Sectors)
	}
	return 0
}

// check returns the errno of a request with room for so many bytes, or 0.
func (q *Queue) check(r *block.Request, room int) unix.Errno {
	e := r.Check(q.geometry.Sectors, q.geometry.LogicalBlock, room)
	if e == 0 && q.geometry.ReadOnly && r.Op != block.OpRead && r.Op != block.OpFlush {
		return unix.EROFS
	}
	return e
}

// Reap implements block.Queue.
func (q *Queue) Reap(done []block.Result) int {
	n := copy(done, q.done[q.next:])
	for _, r := range done[:n] {
		if int(r.Tag) < len(q.flying) {
			q.flying[r.Tag] = false // the result of a refused request follows that of the tag
		}
	}
	q.next += n
	if q.next == len(q.done) {
		q.done, q.next = q.done[:0], 0
	}
	return n
}

// Close implements block.Queue. It fails if a request is in flight.
func (q *Queue) Close() error {
	switch {
	case q.mem == nil:
		return errors.New("close queue: it is closed")
	case q.next < len(q.done):
		return errors.New("close queue: requests are in flight")
	}
	mem := q.mem
	q.mem = nil
	return hostmem.Unmap(mem)
}
