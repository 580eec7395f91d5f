package nbd

import (
	"ublk-nvmeof/block"
)

// reapBatch is how many results are taken from the back end at once.
const reapBatch = 64

// none is no tag.
const none = ^uint16(0)

// queue is an export on one loop: the back end's queue, and the tags that all
// connections of that loop share. All of it is the loop's.
//
// A tag is free, or belongs to a request: to be filled with its data, at the back end
// (from Submit to Reap), or waiting for its reply to be sent. A request is named by
// the first of its tags.
type queue struct {
	back     block.Queue
	limits   limits
	geometry block.Geometry

	tags     []tag
	tasks    []task // by the first tag
	free     uint16 // head of the list of free tags
	nFree    int
	waiting  connList // connections that want tags, in order
	reqs     []block.Request
	done     [reapBatch]block.Result
	inflight int // at the back end

	counters
}

// tag is a buffer.
type tag struct {
	next   uint16 // of the request, or of the free list
	first  uint16 // names the request
	length uint32 // bytes of data in the buffer
	sector uint64 // where they belong
}

// task is a request that is being carried out.
type task struct {
	conn    *conn
	cookie  uint64
	offset  uint64
	length  uint32
	kind    command
	code    code
	pending uint16 // tags at the back end
	tags    uint16
	next    uint16 // task in the connection's list of replies
	flags   block.Flags
	sync    bool   // a flush follows
	at      uint64 // trim and write zeroes: what is left to do
	left    uint32 // in sectors
	header  [32]byte
}

func newQueue(back block.Queue, g block.Geometry, l limits, depth int) *queue {
	q := &queue{
		back: back, geometry: g, limits: l, free: none,
		tags: make([]tag, depth), tasks: make([]task, depth), reqs: make([]block.Request, 0, depth),
	}
	for i := depth - 1; i >= 0; i-- {
		q.tags[i].next, q.free = q.free, uint16(i)
	}
	q.nFree = depth
	return q
}

// piece is how much of a transfer of left sectors goes into the buffer of one tag.
func (q *queue) piece(sector uint64, left uint32) uint32 {
	n := min(left, uint32(q.limits.maxIO)>>block.SectorShift)
	if c := uint64(q.geometry.ChunkSectors); c > 0 {
		n = uint32(min(uint64(n), c-sector%c))
	}
	return n
}

// pieces is the number of tags that a transfer needs.
func (q *queue) pieces(sector uint64, left uint32) int {
	n := 0
	for left > 0 {
		k := q.piece(sector, left)
		sector, left = sector+uint64(k), left-k
		n++
	}
	return n
}

// take gives out n free tags, of which there are enough, as one list.
func (q *queue) take(n int) (first uint16) {
	first = q.free
	last := first
	for i := 1; ; i++ {
		q.tags[last].first = first
		if i == n {
			break
		}
		last = q.tags[last].next
	}
	q.free = q.tags[last].next
	q.tags[last].next = none
	q.nFree -= n
	return first
}

// release makes the tags of a request free.
func (q *queue) release(first uint16) {
	t := &q.tasks[first]
	q.nFree += int(t.tags)
	t.conn = nil
	for i := first; i != none; {
		next := q.tags[i].next
		q.tags[i].next, q.free = q.free, i
		i = next
	}
}

// lay spreads the data of a read or write over the request's buffers.
func (q *queue) lay(first uint16) {
	t := &q.tasks[first]
	sector, left := t.offset>>block.SectorShift, t.length>>block.SectorShift
	for i := first; i != none; i = q.tags[i].next {
		n := q.piece(sector, left)
		q.tags[i].sector, q.tags[i].length = sector, n<<block.SectorShift
		sector, left = sector+uint64(n), left-n
	}
}

// buffer is the data of a tag.
func (q *queue) buffer(i uint16) []byte { return q.back.Buffer(i)[:q.tags[i].length] }

// transfer hands a read or a write to the back end, with the next Submit.
func (q *queue) transfer(first uint16, op block.Op) {
	t := &q.tasks[first]
	for i := first; i != none; i = q.tags[i].next {
		p := &q.tags[i]
		q.reqs = append(q.reqs, block.Request{
			Sector: p.sector, Sectors: p.length >> block.SectorShift, Tag: i, Op: op, Flags: t.flags,
		})
	}
	t.pending = t.tags
}

// advance hands the next step of any other request to the back end, and says whether
// there was one: a range may be longer than what the back end does at once, and what
// shall be on stable media needs a flush behind it.
func (q *queue) advance(first uint16) bool {
	t := &q.tasks[first]
	r := block.Request{Tag: first, Flags: t.flags}
	switch {
	case t.left > 0 && t.kind == cmdTrim:
		r.Op, r.Sectors = block.OpDiscard, min(t.left, q.geometry.MaxDiscardSectors)
	case t.left > 0:
		r.Op, r.Sectors = block.OpWriteZeroes, min(t.left, q.geometry.MaxZeroesSectors)
	case t.sync:
		t.sync = false
		r.Op, r.Flags = block.OpFlush, 0
	default:
		return false
	}
	if r.Op != block.OpFlush {
		r.Sector = t.at
		t.at, t.left = t.at+uint64(r.Sectors), t.left-r.Sectors
	}
	t.pending = 1
	q.reqs = append(q.reqs, r)
	return true
}

// poll hands the new requests to the back end, takes its results, and says how many
// things it did.
func (q *queue) poll() int {
	n := len(q.reqs)
	if n > 0 {
		q.inflight += n
		q.back.Submit(q.reqs)
		q.reqs = q.reqs[:0]
		q.now[nBatches]++
	}
	for q.inflight > 0 {
		k := q.back.Reap(q.done[:])
		q.inflight -= k
		for i := range q.done[:k] {
			q.finish(q.done[i].Tag, q.done[i].Errno)
		}
		n += k
		if k < len(q.done) {
			break
		}
	}
	return n
}

// finish takes a tag from the back end.
func (q *queue) finish(i uint16, errno uint16) {
	first := q.tags[i].first
	t := &q.tasks[first]
	if errno != 0 && t.code == 0 {
		t.code = codeOf(errno)
	}
	if t.pending--; t.pending > 0 || t.code == 0 && q.advance(first) {
		return
	}
	t.conn.answer(first)
}

// count counts a request that is answered.
func (q *queue) count(t *task) {
	if int(t.kind) < len(counterOf) {
		q.now[counterOf[t.kind]]++
	}
	switch {
	case t.code != 0:
		q.now[nErrors]++
	case t.kind == cmdRead:
		q.now[nReadBytes] += uint64(t.length)
	case t.kind == cmdWrite:
		q.now[nWrittenBytes] += uint64(t.length)
	}
}

// resume lets connections go on that wait for tags, as long as there are enough.
func (q *queue) resume() {
	for c := q.waiting.head; c != nil && (c.ending || c.need <= q.nFree); c = q.waiting.head {
		q.waiting.pop()
		c.turn = true
		c.parse()
		c.turn = false
	}
}

// connList is an intrusive list of connections.
type connList struct{ head, tail *conn }

func (l *connList) push(c *conn) {
	c.queued, c.next = true, nil
	if l.tail == nil {
		l.head = c
	} else {
		l.tail.next = c
	}
	l.tail = c
}

func (l *connList) pop() {
	c := l.head
	if l.head = c.next; l.head == nil {
		l.tail = nil
	}
	c.queued, c.next = false, nil
}
