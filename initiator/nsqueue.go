package initiator

import (
	"fmt"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
)

// queue is a namespace on one lane: the block.Queue that a front end uses. All
// of it is the lane's.
type queue struct {
	lane     *lane
	ns       *Namespace
	mr       rdma.MR
	slab     []byte
	base     uint64
	rkey     uint32 // keys change with the device, between associations
	lkey     uint32
	maxIO    int
	requests []request // by tag
	done     fifo
}

// OpenQueue implements block.Device.
func (ns *Namespace) OpenQueue(i int, cfg block.QueueConfig) (block.Queue, error) {
	switch {
	case i < 0 || i >= len(ns.ctrl.lanes):
		return nil, fmt.Errorf("open queue %d: the controller has %d loops", i, len(ns.ctrl.lanes))
	case cfg.Depth < 1 || cfg.Depth > 4096:
		return nil, fmt.Errorf("open queue %d: depth %d is not 1..4096", i, cfg.Depth)
	case cfg.MaxIO < unix.Getpagesize() || cfg.MaxIO%unix.Getpagesize() != 0:
		return nil, fmt.Errorf("open queue %d: maximum I/O of %d bytes is no multiple of the page size", i, cfg.MaxIO)
	}
	q := &queue{lane: ns.ctrl.lanes[i], ns: ns, maxIO: cfg.MaxIO, requests: make([]request, cfg.Depth)}
	if err := ns.ctrl.mem.open(q, cfg.Depth*cfg.MaxIO); err != nil {
		return nil, fmt.Errorf("open queue %d: register %d buffers of %d bytes: %w", i, cfg.Depth, cfg.MaxIO, err)
	}
	for i := range q.requests {
		q.requests[i].home = q
	}
	return q, nil
}

// Buffer implements block.Queue.
func (q *queue) Buffer(tag uint16) []byte {
	at := int(tag) * q.maxIO
	return q.slab[at : at+q.maxIO : at+q.maxIO]
}

// addr is the address of a tag's buffer for the target and in an SGE.
func (q *queue) addr(tag uint16) uint64 { return q.base + uint64(tag)*uint64(q.maxIO) }

// Submit implements block.Queue.
func (q *queue) Submit(reqs []block.Request) {
	l := q.lane
	l.submitted.Store(l.submitted.Load() + uint64(len(reqs)))
	for i := range reqs {
		r := &q.requests[reqs[i].Tag]
		r.io = reqs[i]
		r.tries = 0
		if e := q.check(&r.io); e != 0 {
			l.finish(r, e)
			continue
		}
		r.class = l.ctrl.classOf(&r.io)
		l.dispatch(r)
	}
}

// check refuses what must not be sent: above all a transfer longer than the
// buffer, whose key would let the target reach beyond it.
func (q *queue) check(io *block.Request) uint16 {
	mask := uint64(1)<<q.ns.sectorShift - 1
	switch io.Op {
	case block.OpRead, block.OpWrite:
		if io.Sectors == 0 || uint64(io.Sectors)<<block.SectorShift > uint64(q.maxIO) {
			return uint16(unix.EINVAL)
		}
	case block.OpDiscard, block.OpWriteZeroes:
		if io.Sectors == 0 {
			return uint16(unix.EINVAL)
		}
	case block.OpFlush:
		return 0
	default:
		return uint16(unix.EOPNOTSUPP)
	}
	if (io.Sector|uint64(io.Sectors))&mask != 0 {
		return uint16(unix.EINVAL)
	}
	return 0
}

// Reap implements block.Queue.
func (q *queue) Reap(done []block.Result) int {
	n := 0
	for n < len(done) {
		r := q.done.pop()
		if r == nil {
			break
		}
		done[n] = block.Result{Tag: r.io.Tag, Errno: r.errno}
		n++
	}
	if n > 0 {
		q.lane.completed.Store(q.lane.completed.Load() + uint64(n))
	}
	return n
}

// Close implements block.Queue.
func (q *queue) Close() error { return q.ns.ctrl.mem.shut(q) }

// classOf is the queue class of a request: ublk passes no hint that an
// application polls, so size decides what is polled.
func (c *Controller) classOf(io *block.Request) poller.Class {
	switch io.Op {
	case block.OpRead, block.OpWrite:
		if c.cfg.Queues.Poll > 0 && io.Sectors<<block.SectorShift <= c.pollMax {
			return poller.Poll
		}
		if io.Op == block.OpRead {
			return poller.Read
		}
	}
	return poller.Default
}
