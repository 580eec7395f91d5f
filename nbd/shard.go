package nbd

import (
	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/iostats"
)

// reapBatch is the number of results that are reaped from the back end at once.
const reapBatch = 64

// none is a value that is not a tag.
const none = ^uint16(0)

// shard is the part of an export on one loop. It has a queue of the back end. The
// connections to the export on that loop share the tags of the queue. Only the loop uses
// its fields.
//
// A tag is free, or it belongs to a task. A tag of a task is being filled with data of
// the client, waits for stripes, is at the back end (from Submit to Reap), or its data is
// being sent.
type shard struct {
	back    block.Queue
	device  block.Device
	stripes *stripes
	bounds  bounds

	tags    []tag
	free    uint16 // head of the list of free tags
	nFree   int
	reserve int // number of tags that only connections without a tag may take
	share   int // number of tags that a connection may hold

	waiting  connList // connections that wait for tags, in order
	resuming *conn    // the connection that resume is continuing
	freed    bool     // tags were released since the last resume
	starved  bool     // at the last tick, a connection without any tag was waiting

	parked   []uint16 // tags that wait for stripes; see stripes.go
	reqs     []block.Request
	done     [reapBatch]block.Result
	inflight int // number of requests at the back end

	iostats.Counters
}

// tag is a tag of the back end's queue, with its buffer and the piece of a task that uses
// it.
type tag struct {
	piece
	task   *task
	next   uint16   // in the data of a read, or in the list of free tags
	op     block.Op // operation at the back end, or the next one
	ready  bool     // the data of a read is complete
	moved  uint32   // number of sectors that op has completed
	active uint32   // number of sectors that are at the back end
	header [dataHeader]byte
}

// bounds are the limits of requests to the back end. They may change.
type bounds struct {
	block   uint32 // bytes of a logical block; does not change
	buffer  uint32 // bytes of a tag's buffer, whole blocks; does not change
	piece   uint32 // bytes of a read or write, whole blocks, at most buffer
	chunk   uint64 // reads and writes do not cross a multiple of it, in bytes; 0: no limit
	discard uint32 // sectors of a discard, whole blocks; 0: not supported
	zeroes  uint32 // sectors of a write zeroes, whole blocks; 0: not supported
}

func boundsOf(g block.Geometry, buffer int) bounds {
	b := bounds{block: g.LogicalBlock, chunk: uint64(g.ChunkSectors) << block.SectorShift}
	whole := ^(g.LogicalBlock - 1)
	b.buffer = uint32(buffer) & whole
	b.piece = max(min(b.buffer, g.MaxIO&whole), b.block)
	if b.chunk%uint64(b.block) != 0 {
		b.chunk = 0
	}
	sectors := g.LogicalBlock >> block.SectorShift
	b.discard, b.zeroes = g.MaxDiscardSectors/sectors*sectors, g.MaxZeroesSectors/sectors*sectors
	return b
}

// split divides the tags of a queue. A connection may hold up to share tags. The last
// reserve free tags are for connections that hold none.
func split(depth int) (share, reserve int) {
	reserve = depth / 4
	return depth - reserve, reserve
}

func newShard(back block.Queue, d block.Device, buffer, depth int, st *stripes) *shard {
	s := &shard{
		back: back, device: d, stripes: st, bounds: boundsOf(d.Geometry(), buffer), free: none,
		tags: make([]tag, depth), parked: make([]uint16, 0, depth), reqs: make([]block.Request, 0, depth), nFree: depth,
	}
	s.share, s.reserve = split(depth)
	for i := depth - 1; i >= 0; i-- {
		s.tags[i].next, s.free = s.free, uint16(i)
	}
	return s
}

// refresh updates the bounds from the device.
func (s *shard) refresh() {
	g := s.device.Geometry()
	g.LogicalBlock = s.bounds.block
	s.bounds = boundsOf(g, int(s.bounds.buffer))
}

// allow returns the number of tags that a connection may take now, or 0 if it must wait.
// The connection needs least tags and can use up to most. If it holds no tag, it gets one
// whenever one is free, even if that is less than least.
func (s *shard) allow(c *conn, least, most int) int {
	n := min(s.nFree-s.reserve, s.share-c.held)
	if s.waiting.head != nil && s.resuming != c {
		n = 0 // it is not its turn
	}
	s.resuming = nil
	switch {
	case n >= least:
		return min(n, most)
	case s.entitled(c, least):
		return max(n, 1)
	}
	return 0
}

// entitled reports whether a connection gets a tag in any case. The kernel's client
// instead waits for all tags that it needs, because an error in a streamed read would
// cost its connection.
func (s *shard) entitled(c *conn, least int) bool {
	return c.held == 0 && s.nFree > 0 && (least == 1 || c.patience > 0)
}

// take assigns a free tag to a task. There must be one.
func (s *shard) take(t *task, p piece) uint16 {
	i := s.free
	g := &s.tags[i]
	s.free = g.next
	s.nFree--
	t.conn.held++
	g.piece, g.task, g.next, g.ready, g.moved, g.active = p, t, none, false, 0, 0
	return i
}

// release frees a tag.
func (s *shard) release(i uint16) {
	g := &s.tags[i]
	c := g.task.conn
	g.task, g.next, s.free = nil, s.free, i
	s.nFree++
	s.freed = true
	if c.held--; c.wait == waitShare {
		c.wait = waitNone
		s.enqueue(c, c.want)
	}
}

// enqueue makes a connection wait until it may take n tags.
func (s *shard) enqueue(c *conn, n int) {
	c.want = n
	if s.share-c.held < n {
		c.wait = waitShare
		return
	}
	c.wait = waitTags
	s.waiting.push(c)
}

// resume continues connections that wait for tags, in order. Only connections that hold
// no tag may overtake a connection that cannot continue yet.
func (s *shard) resume() {
	if !s.freed || s.waiting.head == nil {
		return
	}
	s.freed = false
	blocked := false
	for c := s.waiting.head; c != nil; {
		next := c.after
		own, pool := s.share-c.held, s.nFree-s.reserve
		switch {
		case own >= c.want && pool >= c.want && !blocked, s.entitled(c, c.want):
			s.waiting.remove(c)
			c.wait, s.resuming = waitNone, c
			c.parse()
			s.resuming = nil
		case own >= c.want:
			blocked = true
		}
		c = next
	}
}

// tick updates the bounds and starved.
func (s *shard) tick() {
	s.refresh()
	s.starved = false
	for c := s.waiting.head; c != nil; c = c.after {
		if c.held == 0 {
			s.starved = true
		}
	}
}

// poll passes new requests to the back end and reaps its results. It returns the number
// of both.
func (s *shard) poll() int {
	n := len(s.reqs)
	if n > 0 {
		s.inflight += n
		s.back.Submit(s.reqs)
		s.reqs = s.reqs[:0]
		s.CountBatch()
	}
	for s.inflight > 0 {
		k := s.back.Reap(s.done[:])
		s.inflight -= k
		for i := range s.done[:k] {
			s.finish(s.done[i].Tag, s.done[i].Errno)
		}
		n += k
		if k < len(s.done) {
			break
		}
	}
	return n + s.unpark()
}

// connList is an intrusive list of connections.
type connList struct{ head, tail *conn }

func (l *connList) push(c *conn) {
	c.before, c.after = l.tail, nil
	if l.tail == nil {
		l.head = c
	} else {
		l.tail.after = c
	}
	l.tail = c
}

func (l *connList) remove(c *conn) {
	if c.before == nil {
		l.head = c.after
	} else {
		c.before.after = c.after
	}
	if c.after == nil {
		l.tail = c.before
	} else {
		c.after.before = c.before
	}
	c.before, c.after = nil, nil
}
