// Package instant is the block.Queue of back ends that execute requests at once, on the loop
// that submits them.
package instant

import (
	"errors"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
)

// Queue executes requests in the order of their submission, and completes them in that order.
type Queue struct {
	serve   func(r *block.Request, data []byte) unix.Errno
	regions *Regions
	mem     []byte // nil after Close
	size    int    // of a buffer, in bytes
	flying  []bool // by tag
	done    []block.Result
	next    int // results from here on are not reaped
}

// Open makes a queue. serve executes a request with the buffer of its tag, or with the rest of
// its region. It must check everything but the tag and the region.
func Open(cfg block.QueueConfig, regions *Regions, serve func(r *block.Request, data []byte) unix.Errno) (*Queue, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	mem, err := hostmem.Map(cfg.Depth * cfg.MaxIO)
	if err != nil {
		return nil, err
	}
	return &Queue{
		serve: serve, regions: regions, mem: mem, size: cfg.MaxIO,
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
			e = q.execute(r)
		}
		q.done = append(q.done, block.Result{Tag: r.Tag, Errno: uint16(e)})
	}
}

// execute executes a request with its data.
func (q *Queue) execute(r *block.Request) unix.Errno {
	if !r.InRegion() {
		return q.serve(r, q.Buffer(r.Tag))
	}
	q.regions.mu.RLock()
	defer q.regions.mu.RUnlock()
	data := q.regions.from(r.Region, r.Offset)
	switch {
	case data == nil:
		return unix.EFAULT
	case r.Offset&3 != 0:
		return unix.EINVAL
	}
	return q.serve(r, data)
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
