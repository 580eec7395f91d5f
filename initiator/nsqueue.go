package initiator

import (
	"fmt"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/poller"
)

// nsQueue is the block.Queue, and block.Gatherer, of a namespace on one lane. Only the lane uses its fields.
type nsQueue struct {
	lane         *lane
	ns           *Namespace
	writeThrough bool // the front end's device has no volatile cache
	buffers      buffers
	requests     []request // by tag
	tables       []table   // by tag; nil: the front end has not asked for them
	times        *opHistograms
	done         fifo
	refused      []block.Result // results for tags that do not name a request
	closed       bool           // guarded by memory.mu
}

// OpenQueue implements block.Device. The error is a *MemoryError if the queue would
// exceed Config.MaxMemory.
func (ns *Namespace) OpenQueue(i int, cfg block.QueueConfig) (block.Queue, error) {
	if i < 0 || i >= len(ns.sub.lanes) {
		return nil, fmt.Errorf("open queue %d: the subsystem has %d loops", i, len(ns.sub.lanes))
	}
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("open queue %d: %w", i, err)
	}
	q := &nsQueue{
		lane: ns.sub.lanes[i], ns: ns, writeThrough: cfg.WriteThrough,
		requests: make([]request, cfg.Depth), times: ns.timesOn(i),
	}
	if err := q.buffers.open(&ns.sub.mem, cfg.Depth, cfg.MaxIO); err != nil {
		return nil, fmt.Errorf("open queue %d: register %d buffers of %d bytes: %w", i, cfg.Depth, cfg.MaxIO, err)
	}
	ns.open.Add(1)
	for i := range q.requests {
		q.requests[i].home = q
	}
	return q, nil
}

// Loops implements poller.Looper. The loops are those of Config.Loops that the subsystem uses.
func (ns *Namespace) Loops() []*poller.Loop { return ns.sub.cfg.Loops }

// Buffer implements block.Queue.
func (q *nsQueue) Buffer(tag uint16) []byte { return q.buffers.of(tag) }

// Submit implements block.Queue.
func (q *nsQueue) Submit(reqs []block.Request) {
	l := q.lane
	l.submitted.Store(l.submitted.Load() + uint64(len(reqs)))
	sectors, second := q.ns.sectors.Load(), l.sub.clock.Load()
	for i := range reqs {
		io := &reqs[i]
		if int(io.Tag) >= len(q.requests) || q.requests[io.Tag].submitted {
			q.refused = append(q.refused, block.Result{Tag: io.Tag, Errno: uint16(unix.EINVAL)})
			continue
		}
		r := &q.requests[io.Tag]
		r.submitted = true
		r.begin(*io)
		room, e := q.buffers.size, unix.Errno(0)
		if io.InRegion() {
			room, e = q.locate(r)
		}
		if e == 0 {
			e = io.Check(sectors, block.SectorSize<<q.ns.sectorShift, room)
		}
		if e != 0 {
			l.finish(r, uint16(e))
			continue
		}
		if l.sampler.sample(second) {
			r.timed, r.timing = true, timing{began: l.stamp()}
		}
		r.class = l.sub.classOf(io)
		if r.data.ready || q.equip(r) {
			l.dispatch(r)
		}
	}
}

// Reap implements block.Queue.
func (q *nsQueue) Reap(done []block.Result) int {
	n := 0
	if len(q.refused) > 0 {
		n = copy(done, q.refused)
		q.refused = q.refused[n:]
	}
	for n < len(done) {
		r := q.done.pop()
		if r == nil {
			break
		}
		r.submitted = false
		if r.inRegion {
			q.leave(r)
		}
		if r == q.buffers.user {
			q.takeBack(r)
		}
		if r.timed {
			q.lane.record(r)
		}
		done[n] = block.Result{Tag: r.io.Tag, Errno: r.errno, Status: uint16(r.status)}
		n++
	}
	if n > 0 {
		q.lane.completed.Store(q.lane.completed.Load() + uint64(n))
	}
	return n
}

// Close implements block.Queue. The memory is freed in the background.
func (q *nsQueue) Close() error {
	s := q.ns.sub
	if err := s.mem.shut(q); err != nil {
		return err
	}
	q.ns.open.Add(-1)
	s.settling.Go(func() {
		s.settle()
		if err := q.buffers.free(&s.mem); err != nil {
			s.cfg.Log.Warn("free I/O buffers", "error", err)
		}
	})
	return nil
}

// classOf returns the queue class of a request. ublk does not tell whether an application
// polls, so the size decides which requests are polled.
func (s *Subsystem) classOf(io *block.Request) poller.Class {
	switch io.Op {
	case block.OpRead, block.OpWrite:
		if s.cfg.Queues.Poll > 0 && io.Sectors<<block.SectorShift <= s.pollMax {
			return poller.Poll
		}
		if io.Op == block.OpRead {
			return poller.Read
		}
	}
	return poller.Default
}
