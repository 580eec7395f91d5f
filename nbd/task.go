package nbd

import "ublk-nvmeof/block"

// task is a request in progress. Each connection has tasks of its own, so replies without
// data that a client does not read cost other clients nothing.
//
// A read is laid out: its pieces get tags and go to the back end. If all pieces get a tag
// at once, the reply is sent when all data is there, and an error is an ordinary reply.
// Otherwise the read is streamed: each piece is sent when it is ready, and its tag is
// used for a later piece.
//
// Each piece of a write gets a tag when its data arrives, and releases it when the back
// end is done. Other requests have one tag, and are done in steps; see advance.
type task struct {
	conn   *conn
	next   *task // in the list of free tasks, or of replies
	cookie uint64
	offset uint64 // offset of the request in bytes
	length uint32
	kind   command
	flags  block.Flags
	code   code // the first error

	at, end  uint64 // the bytes that have no tag yet; for a trim or write zeroes, those not done yet
	busy     int    // number of tags at the back end or parked
	sync     bool   // a flush follows the other steps
	size     uint32 // size of the pieces of a read
	streamed bool
	whole    bool // the data of a read may not be sent in several chunks
	state    replyState
	head     uint16 // tags with data to send, in order
	tail     uint16
	header   [dataHeader]byte
}

// replyState is the state of the reply to a task.
type replyState uint8

const (
	replyNone    replyState = iota // not due
	replyDue                       // in conn.replies
	replyOpen                      // in conn.replies; its beginning has been sent
	replyDropped                   // no reply is sent; the task ends with its last tag
)

// fail records the first error of a task.
func (t *task) fail(c code) {
	if t.code == 0 {
		t.code = c
	}
}

// takeTask assigns a free task to a request. There must be one.
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

// freeTask ends a task that has no tag.
func (c *conn) freeTask(t *task) {
	t.next, c.freeTasks = c.freeTasks, t
	c.tasks--
}

// dropTask ends a task without a reply. None of its tags is at the back end.
func (c *conn) dropTask(t *task) {
	c.dropData(t)
	c.freeTask(t)
}

// dropData releases the tags of a read whose data will not be sent.
func (c *conn) dropData(t *task) {
	for t.head != none {
		i := t.head
		t.head = c.shard.tags[i].next
		c.shard.release(i)
	}
	t.tail = none
}

// lay assigns a tag to each of the next n pieces of a read, and starts them. n tags must
// be free.
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

// layMore continues a streamed read. It returns false if the read must wait for tags.
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

// readDone handles a piece of a read that the back end has completed.
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
		if c.current != t { // otherwise layMore answers
			c.answer(t)
		}
	case t.streamed:
		c.due(t)
	case t.busy == 0:
		c.answer(t)
	}
}

// fill copies received data of a write into its buffers. It returns false if more must be
// received, or if the write must wait for a tag.
func (c *conn) fill(t *task) bool {
	if c.recv != opIdle {
		return false
	}
	if t.code != 0 { // the rest of the data is not needed
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

// room returns the memory for the next data of a write.
func (c *conn) room() []byte { return c.shard.data(c.filling)[c.filled:] }

// fillBy records that n bytes were written to room, and starts the piece if it is
// complete.
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

// writeDone answers a write if its last piece is done.
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

// giveUpWrite ends a write whose data has not arrived completely. If the write has
// failed, it is answered with the error, otherwise not at all.
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

// opOf holds the operations by command. Other commands are unset.
var opOf = [...]block.Op{
	cmdRead: block.OpRead, cmdWrite: block.OpWrite, cmdFlush: block.OpFlush,
	cmdTrim: block.OpDiscard, cmdZeroes: block.OpWriteZeroes,
}

// count counts a request that is answered.
func (s *shard) count(t *task) {
	op := block.OpUnset
	if int(t.kind) < len(opOf) {
		op = opOf[t.kind]
	}
	s.Count(op, t.code != 0, uint64(t.length))
}
