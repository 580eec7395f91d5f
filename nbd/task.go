package nbd

import "ublk-nvmeof/block"

// task is a request that is being carried out. Each connection has its own, so that
// requests without data, and replies that are not read, are at nobody else's expense.
//
// A read is laid: its pieces get tags, and go to the back end. If it has got tags for
// all of it at once, nothing is sent before all of its data is there, and an error is a
// reply like any other. Otherwise it is streamed: pieces are sent as they come, and
// their tags used again for the next.
//
// The pieces of a write get a tag each, as the data comes, and release it when the back
// end is done. All else has one tag, and goes on step by step; see advance.
type task struct {
	conn   *conn
	next   *task // of those that are free, or of the replies
	cookie uint64
	offset uint64 // of the request, bytes
	length uint32
	kind   command
	flags  block.Flags
	code   code // the first error

	at, end  uint64 // bytes that no tag is for yet; for a trim or write zeroes: not done yet
	busy     int    // tags at the back end, or parked
	sync     bool   // a flush follows
	size     uint32 // of the pieces of a read
	streamed bool
	whole    bool // a read whose data may not be sent in several chunks
	state    replyState
	head     uint16 // tags with data to send, in order
	tail     uint16
	header   [dataHeader]byte
}

// replyState is how far the reply of a task has come.
type replyState uint8

const (
	replyNone    replyState = iota // no reply is due
	replyDue                       // in the list of replies
	replyOpen                      // in the list, and its beginning has been sent
	replyDropped                   // there will be none: the task ends with its last tag
)

// fail notes an error, if it is the first.
func (t *task) fail(c code) {
	if t.code == 0 {
		t.code = c
	}
}

// takeTask takes a free task, of which there is one, for a request.
func (c *conn) takeTask(r request) *task {
	t := c.freeTasks
	c.freeTasks = t.next
	c.tasks++
	*t = task{
		conn: c, cookie: r.cookie, offset: r.offset, length: r.length, kind: r.kind,
		at: r.offset, end: r.offset + uint64(r.length), head: none, tail: none,
	}
	return t
}

// freeTask ends a task, which has no tag.
func (c *conn) freeTask(t *task) {
	t.next, c.freeTasks = c.freeTasks, t
	c.tasks--
}

// dropTask ends a task that has no tag at the back end, and no reply.
func (c *conn) dropTask(t *task) {
	c.dropData(t)
	c.freeTask(t)
}

// dropData releases the tags of a read whose data is not sent.
func (c *conn) dropData(t *task) {
	for t.head != none {
		i := t.head
		t.head = c.shard.tags[i].next
		c.shard.release(i)
	}
	t.tail = none
}

// lay gives the next n pieces of a read a tag each, of which there are enough.
func (c *conn) lay(t *task, n int) {
	s := c.shard
	for ; n > 0 && t.at < t.end; n-- {
		p := s.readPiece(t.at, t.end, t.size)
		i := s.take(t, p)
		t.at += uint64(p.length)
		if t.tail == none {
			t.head = i
		} else {
			s.tags[t.tail].next = i
		}
		t.tail = i
		s.tags[i].op = block.OpRead
		s.start(i)
	}
}

// layMore goes on with a streamed read. It says false if it has to wait for tags.
func (c *conn) layMore(t *task) bool {
	for t.code == 0 && t.at < t.end {
		left := c.shard.pieces(t.at, t.end, t.size, c.shard.share)
		n := c.shard.allow(c, 1, left)
		if n == 0 {
			c.shard.enqueue(c, 1)
			return false
		}
		c.lay(t, n)
	}
	c.current = nil
	if t.code != 0 && t.busy == 0 {
		c.answer(t)
	}
	return true
}

// readDone is the end of a piece of a read.
func (c *conn) readDone(i uint16) {
	g := &c.shard.tags[i]
	t := g.task
	g.ready = true
	switch {
	case t.state == replyDropped:
		if t.busy == 0 {
			c.dropTask(t)
			c.settle()
		}
	case t.code != 0:
		if t.busy > 0 {
			return
		}
		c.dropData(t)
		if c.current != t { // else layMore answers
			c.answer(t)
		}
	case t.streamed:
		c.due(t)
	case t.busy == 0:
		c.answer(t)
	}
}

// fill receives the next data of a write. It says false if there is none, or if it has
// to wait for a tag.
func (c *conn) fill(t *task) bool {
	if c.recv != opIdle {
		return false
	}
	if t.code != 0 { // the rest would be in vain
		c.skip = uint32(t.end - t.at)
		c.giveUpWrite(t)
		return true
	}
	s := c.shard
	if c.filling == none {
		if s.allow(c, 1, 1) == 0 {
			s.enqueue(c, 1)
			return false
		}
		c.filling, c.filled = s.take(t, s.writePiece(t.at, t.end)), 0
	}
	have := c.input[c.from:c.to]
	if len(have) == 0 {
		c.receive()
		return false
	}
	n := copy(c.room(), have)
	c.from += n
	c.fillBy(n)
	return true
}

// room is where the next data of a write belongs.
func (c *conn) room() []byte { return c.shard.data(c.filling)[c.filled:] }

// fillBy takes note of n bytes that were put into room.
func (c *conn) fillBy(n int) {
	s, i := c.shard, c.filling
	g := &s.tags[i]
	t := g.task
	c.filled += uint32(n)
	t.at += uint64(n)
	if c.filled < g.length {
		return
	}
	c.filling = none
	if t.at == t.end {
		c.current = nil
	}
	g.op = block.OpWrite
	if g.partial() {
		g.op = block.OpRead
	}
	s.start(i)
}

// writeDone is the end of a piece of a write.
func (c *conn) writeDone(t *task) {
	if t.busy > 0 || c.current == t {
		return
	}
	if t.state == replyDropped {
		c.dropTask(t)
		c.settle()
		return
	}
	c.answer(t)
}

// giveUpWrite ends a write whose data is not all there, and that is answered with its
// error, or not at all if it has none.
func (c *conn) giveUpWrite(t *task) {
	if c.filling != none {
		c.shard.release(c.filling)
		c.filling = none
	}
	c.current = nil
	if t.code == 0 {
		t.state = replyDropped
	}
	c.writeDone(t)
}
