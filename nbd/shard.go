package nbd

import (
	"os"

	"ublk-nvmeof/block"
)

// reapBatch is how many results are taken from the back end at once.
const reapBatch = 64

// none is no tag.
const none = ^uint16(0)

// shard is an export on one loop: the back end's queue there, and the queue's tags,
// which all connections of that loop to the export share. All of it is the loop's.
//
// A tag is free, or belongs to a task: it is filled with data of the client, or waits
// for stripes, or is at the back end (from Submit to Reap), or its data is sent.
type shard struct {
	back    block.Queue
	device  block.Device
	stripes *stripes
	buffer  int // bytes of a tag's buffer
	bounds  bounds

	tags    []tag
	free    uint16 // head of the list of free tags
	nFree   int
	reserve int // tags that only connections without a tag may take
	share   int // tags that a connection may hold

	waiting  connList // connections that want tags, in order
	resuming *conn    // the one whose turn it is
	freed    bool     // tags were released since resume looked
	starved  bool     // at the last tick, a connection without a tag waited

	parked   []uint16 // tags that wait for stripes
	reqs     []block.Request
	done     [reapBatch]block.Result
	inflight int // at the back end

	counters
}

// tag is a buffer of the back end, and the part of a task that is done with it.
type tag struct {
	piece
	task   *task
	next   uint16   // of the data of a read, or of the list of free tags
	op     block.Op // what the back end does, or did last
	ready  bool     // the data of a read is there
	moved  uint32   // sectors that are done
	active uint32   // sectors at the back end
	header [dataHeader]byte
}

// bounds are how large a request to the back end may be. They may change.
type bounds struct {
	block   uint32 // bytes of a logical block; does not change
	buffer  uint32 // bytes of a tag's buffer, whole blocks; does not change
	piece   uint32 // bytes of a read or write, whole blocks, at most buffer
	chunk   uint64 // bytes; a read or write does not cross a multiple; 0: no such rule
	discard uint32 // sectors, whole blocks; 0: the device has no discard
	zeroes  uint32 // the same of write zeroes
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

// bufferSize is the size of a tag's buffer in bytes: a multiple of the page size, and
// room for two logical blocks; see merge.
func bufferSize(maxIO int, g block.Geometry) int {
	page := os.Getpagesize()
	n := min(maxIO, int(g.MaxIO)) / page * page
	least := (2*int(g.LogicalBlock) + page - 1) / page * page
	return max(n, least)
}

// split is how the tags of a queue are given out: share is how many a connection may
// hold, reserve how many are kept for connections that hold none.
func split(depth int) (share, reserve int) {
	reserve = depth / 4
	return depth - reserve, reserve
}

func newShard(back block.Queue, d block.Device, buffer, depth int, st *stripes) *shard {
	s := &shard{
		back: back, device: d, stripes: st, buffer: buffer, bounds: boundsOf(d.Geometry(), buffer), free: none,
		tags: make([]tag, depth), parked: make([]uint16, 0, depth), reqs: make([]block.Request, 0, depth), nFree: depth,
	}
	s.share, s.reserve = split(depth)
	for i := depth - 1; i >= 0; i-- {
		s.tags[i].next, s.free = s.free, uint16(i)
	}
	return s
}

// refresh learns what the device's limits are now.
func (s *shard) refresh() {
	now := boundsOf(s.device.Geometry(), s.buffer)
	now.block = s.bounds.block
	s.bounds = now
}

// allow says how many tags a connection may take now that can use from least to most:
// 0 if it has to wait. A connection without a tag gets one as long as there are any,
// even if it asked for more: it can always go on, however slowly.
func (s *shard) allow(c *conn, least, most int) int {
	n := min(s.nFree-s.reserve, s.share-c.held)
	if s.waiting.head != nil && s.resuming != c {
		n = 0 // others wait
	}
	s.resuming = nil
	switch {
	case n >= least:
		return min(n, most)
	case c.held == 0 && s.nFree > 0:
		return max(n, 1)
	}
	return 0
}

// take gives a free tag, of which there is one, to a task.
func (s *shard) take(t *task, p piece) uint16 {
	i := s.free
	g := &s.tags[i]
	s.free = g.next
	s.nFree--
	t.conn.held++
	g.piece, g.task, g.next, g.ready, g.moved, g.active = p, t, none, false, 0, 0
	return i
}

// release makes a tag free.
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

// enqueue has a connection wait until it may take n tags.
func (s *shard) enqueue(c *conn, n int) {
	c.want = n
	if s.share-c.held < n {
		c.wait = waitShare
		return
	}
	c.wait = waitTags
	s.waiting.push(c)
}

// resume lets connections go on that wait for tags. One that wants more than there are
// is not overtaken, except by those that hold none.
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
		case own >= c.want && pool >= c.want && !blocked, c.held == 0 && s.nFree > 0:
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

// tick looks at the device, and at those who wait.
func (s *shard) tick() {
	s.refresh()
	s.starved = false
	for c := s.waiting.head; c != nil; c = c.after {
		if c.held == 0 {
			s.starved = true
		}
	}
}

// poll hands the new requests to the back end, takes its results, and says how many
// things it did.
func (s *shard) poll() int {
	n := len(s.reqs)
	if n > 0 {
		s.inflight += n
		s.back.Submit(s.reqs)
		s.reqs = s.reqs[:0]
		s.now[nBatches]++
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
