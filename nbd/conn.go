package nbd

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/internal/uring"
)

const (
	// inputSize is how much is received ahead of what is known to be data: several
	// small requests, and of a large one not so much that copying it matters.
	inputSize = 32 << 10
	// sendBatch is how many replies go out in one message, and sendPieces of how many
	// pieces that may be. The reply with the most has one piece for each tag that a
	// connection may hold, and a header.
	sendBatch  = 64
	sendPieces = 2 * sendBatch
	// sendBuffer is how much of the replies waits in a unix socket.
	sendBuffer = 1 << 20
	// maxSkip is the data of a refused write that is read and dropped. A client that
	// announces more is disconnected.
	maxSkip = 64 << 20
)

// conn is a connection in the transmission phase. All of it is its loop's, but done
// and, once that is closed, err.
//
// It ends in steps. ending: no request is taken any more; what is in flight is
// answered. broken: nothing is sent any more either. When no command is pending on
// the socket and no tag is held, it is done.
type conn struct {
	admitted   bool // see Server.admit; guarded by the server's mu
	worker     *worker
	queue      *queue
	slot       int
	fd         int
	offer      offer
	structured bool
	readOnly   bool
	client     bool // a request to disconnect was received

	// Receiving. If data is expected, the next bytes belong into a buffer, or are
	// skipped; else they are a header.
	input     []byte
	from, to  int // what of input is not looked at
	incoming  *uring.Message
	receiving bool
	write     uint16 // request whose data is being received, or none
	fill      uint16 // its tag that is next
	filled    uint32 // bytes of that
	skip      uint32

	// Requests.
	held      int  // tags
	need      int  // tags that the next request wants, if it waits
	throttled bool // it waits for tags of this connection
	queued    bool // it waits for anybody's: in queue.waiting, linked by next
	turn      bool // it has waited long enough
	next      *conn

	// Replies that are due, and those that are being sent.
	first, last uint16 // tasks, linked by next
	dirty       bool   // in worker.due
	outgoing    *uring.Message
	sending     bool
	batch       [sendBatch]uint16
	nBatch      int

	ending, broken bool
	err            error // why it ended, if not in order
	done           chan struct{}
}

// newConn prepares a connection over a stream socket that is not O_NONBLOCK, and is
// the caller's to close after done. Any goroutine.
func newConn(fd int, o offer, structured bool, l limits) (*conn, error) {
	input, err := hostmem.Map(inputSize)
	if err != nil {
		return nil, fmt.Errorf("make input buffer: %w", err)
	}
	widen(fd)
	return &conn{
		fd: fd, offer: o, structured: structured, readOnly: o.flags&flagReadOnly != 0, input: input,
		incoming: uring.NewMessage(2), outgoing: uring.NewMessage(max(sendPieces, 1+l.tags)),
		write: none, first: none, last: none, done: make(chan struct{}),
	}, nil
}

// widen makes room for replies to large reads in a unix socket, so that they are sent
// with fewer interruptions. TCP sees to that itself.
func widen(fd int) {
	if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_UNIX {
		return
	}
	for _, option := range []int{unix.SO_SNDBUF, unix.SO_SNDBUFFORCE} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, sendBuffer) // forcing needs CAP_NET_ADMIN; the rest is clipped
	}
}

// free gives memory back, after done. Any goroutine.
func (c *conn) free() error { return hostmem.Unmap(c.input) }

// parse works on what was received, as far as that is possible, and asks for more.
func (c *conn) parse() {
	for !c.ending {
		have := c.input[c.from:c.to]
		switch {
		case c.skip > 0:
			n := min(c.skip, uint32(len(have)))
			c.from += int(n)
			if c.skip -= n; c.skip > 0 {
				c.receive()
				return
			}
		case c.write != none:
			if len(have) == 0 {
				c.receive()
				return
			}
			n := copy(c.target(), have)
			c.from += n
			c.take(n)
		case len(have) < requestSize:
			c.receive()
			return
		default:
			if !c.begin(decodeRequest(have)) {
				return
			}
			c.from += requestSize
		}
	}
	c.settle()
}

// target is where the next data of a write belongs.
func (c *conn) target() []byte { return c.queue.buffer(c.fill)[c.filled:] }

// take takes note of n bytes that were put into target.
func (c *conn) take(n int) {
	c.filled += uint32(n)
	if c.filled < c.queue.tags[c.fill].length {
		return
	}
	c.fill, c.filled = c.queue.tags[c.fill].next, 0
	if c.fill == none {
		c.queue.transfer(c.write, block.OpWrite)
		c.write = none
	}
}

// receive asks for what is needed next: the rest of a buffer, and after the last one,
// or else, the input.
func (c *conn) receive() {
	if c.receiving {
		return
	}
	c.incoming.Reset()
	if c.write != none {
		c.incoming.Add(c.target())
	}
	if c.write == none || c.queue.tags[c.fill].next == none {
		// What is left is the beginning of a header.
		c.to = copy(c.input, c.input[c.from:c.to])
		c.from = 0
		c.incoming.Add(c.input[c.to:])
	}
	s := c.worker.ring.SQE()
	s.SetRecv(c.fd, c.incoming)
	s.UserData = c.data(dirRecv)
	c.receiving = true
}

func (c *conn) data(dir uint64) uint64 {
	return c.worker.base | uint64(c.slot)<<slotBits | dir
}

// received is the completion of receive.
func (c *conn) received(res int32) {
	c.receiving = false
	switch {
	case res > 0 && !c.ending:
		n := int(res)
		if c.write != none {
			k := min(n, len(c.target()))
			c.take(k)
			n -= k
		}
		c.to += n
	case res > 0, res == -int32(unix.ECANCELED):
	case res == -int32(unix.EAGAIN), res == -int32(unix.EINTR):
	case res == 0:
		err := error(nil)
		if c.write != none || c.skip > 0 || c.from < c.to {
			err = io.ErrUnexpectedEOF
		}
		c.end(err)
	default:
		c.end(fmt.Errorf("receive: %w", unix.Errno(-res)))
	}
	if c.ending {
		c.dropWrite()
	}
	c.parse()
}

// begin starts a request. It says false if the request has to wait for tags, or if
// none follows it.
func (c *conn) begin(r request) bool {
	if r.magic != magicRequest {
		c.end(errors.New("request has a wrong magic number"))
		c.settle()
		return false
	}
	if r.kind == cmdDisc {
		c.client = true
		c.end(nil)
		c.settle()
		return false
	}
	refusal := c.check(r)
	c.need = 1
	if refusal == 0 && (r.kind == cmdRead || r.kind == cmdWrite) {
		c.need = c.queue.pieces(r.offset>>block.SectorShift, r.length>>block.SectorShift)
	}
	switch {
	case c.held+c.need > c.queue.limits.tags:
		c.throttled = true
		return false
	case c.need > c.queue.nFree || c.queue.waiting.head != nil && !c.turn:
		c.queue.waiting.push(c)
		return false
	}
	c.turn = false
	q := c.queue
	first := q.take(c.need)
	t := &q.tasks[first]
	*t = task{
		conn: c, cookie: r.cookie, offset: r.offset, length: r.length, kind: r.kind, code: refusal,
		tags: uint16(c.need), next: none,
	}
	c.held += c.need
	c.start(first, r.flags)
	return true
}

// start carries a request out, or refuses it.
func (c *conn) start(first uint16, flags uint16) {
	q := c.queue
	t := &q.tasks[first]
	if flags&cmdFlagNoHole != 0 {
		t.flags |= block.NoUnmap
	}
	fua := flags&cmdFlagFUA != 0 && q.geometry.VolatileCache
	switch {
	case t.code != 0:
		if t.kind == cmdWrite {
			c.skip = t.length
		}
		c.answer(first)
	case t.kind == cmdRead:
		q.lay(first)
		q.transfer(first, block.OpRead)
	case t.kind == cmdWrite:
		if fua {
			t.flags |= block.FUA
		}
		q.lay(first)
		c.write, c.fill, c.filled = first, first, 0
	default: // flush, trim, write zeroes
		if t.kind == cmdFlush {
			t.sync = q.geometry.VolatileCache
		} else {
			t.at, t.left, t.sync = t.offset>>block.SectorShift, t.length>>block.SectorShift, fua
		}
		if !q.advance(first) {
			c.answer(first)
		}
	}
}

// flagsOf are the flags that a request may have, by kind.
var flagsOf = [...]uint16{
	cmdRead: cmdFlagFUA | cmdFlagDF, cmdWrite: cmdFlagFUA, cmdFlush: cmdFlagFUA,
	cmdTrim: cmdFlagFUA, cmdZeroes: cmdFlagFUA | cmdFlagNoHole,
}

// check says why a request is refused; 0: it is not.
func (c *conn) check(r request) code {
	o := &c.offer
	switch {
	case int(r.kind) >= len(flagsOf), r.kind == 5: // no such kind; 5 is CACHE
		return codeInval
	case r.flags&^flagsOf[r.kind] != 0, r.flags&cmdFlagDF != 0 && !c.structured:
		return codeInval
	case r.kind == cmdFlush:
		if r.offset != 0 || r.length != 0 {
			return codeInval
		}
		return 0
	case r.kind != cmdRead && c.readOnly:
		return codePerm
	case r.kind == cmdTrim && o.flags&flagSendTrim == 0, r.kind == cmdZeroes && o.flags&flagSendZeroes == 0:
		return codeInval
	case r.length == 0, (r.offset|uint64(r.length))&uint64(o.minBlock-1) != 0:
		return codeInval
	case r.offset > o.size || uint64(r.length) > o.size-r.offset:
		if r.kind == cmdWrite || r.kind == cmdZeroes {
			return codeNoSpace
		}
		return codeInval
	case (r.kind == cmdRead || r.kind == cmdWrite) && r.length > o.maxRequest:
		return codeInval
	}
	return 0
}

// answer has the reply to a request sent, soon.
func (c *conn) answer(first uint16) {
	q := c.queue
	t := &q.tasks[first]
	q.count(t)
	if t.kind == cmdWrite && t.code != 0 && c.skip > maxSkip {
		c.end(fmt.Errorf("write of %d bytes", t.length))
	}
	if c.broken {
		c.drop(first)
		c.settle()
		return
	}
	if c.last == none {
		c.first = first
	} else {
		q.tasks[c.last].next = first
	}
	c.last = first
	c.touch()
}

func (c *conn) touch() {
	if !c.dirty {
		c.dirty = true
		c.worker.due = append(c.worker.due, c)
	}
}

// drop is the end of a request.
func (c *conn) drop(first uint16) {
	c.held -= int(c.queue.tasks[first].tags)
	c.queue.release(first)
}

// send sends the replies that are due, as many as go into a message.
func (c *conn) send() {
	if c.sending || c.first == none {
		return
	}
	q := c.queue
	c.outgoing.Reset()
	for c.nBatch = 0; c.first != none && c.nBatch < sendBatch; c.nBatch++ {
		t := &q.tasks[c.first]
		if c.outgoing.Room() < 1+int(t.tags) {
			break
		}
		c.compose(c.first, t)
		c.batch[c.nBatch] = c.first
		if c.first = t.next; c.first == none {
			c.last = none
		}
	}
	c.submit()
}

// compose adds a reply to the message.
func (c *conn) compose(first uint16, t *task) {
	switch {
	case c.structured && t.kind == cmdRead && t.code != 0:
		c.outgoing.Add(putError(t.header[:], t.cookie, t.code))
		return
	case c.structured && t.kind == cmdRead:
		c.outgoing.Add(putData(t.header[:], t.cookie, t.offset, t.length))
	default:
		c.outgoing.Add(putSimple(t.header[:], t.cookie, t.code))
	}
	if t.kind != cmdRead || t.code != 0 {
		return
	}
	for i := first; i != none; i = c.queue.tags[i].next {
		c.outgoing.Add(c.queue.buffer(i))
	}
}

func (c *conn) submit() {
	s := c.worker.ring.SQE()
	s.SetSend(c.fd, c.outgoing)
	s.UserData = c.data(dirSend)
	c.sending = true
}

// sent is the completion of submit.
func (c *conn) sent(res int32) {
	c.sending = false
	switch {
	case c.broken:
	case res > 0:
		if c.outgoing.Advance(int(res)); c.outgoing.Len() > 0 {
			c.submit()
			return
		}
	case res == -int32(unix.EAGAIN), res == -int32(unix.EINTR):
		c.submit()
		return
	default:
		c.cut(fmt.Errorf("send: %w", unix.Errno(-res)))
	}
	for _, first := range c.batch[:c.nBatch] {
		c.drop(first)
	}
	c.nBatch = 0
	if c.broken {
		c.dropDue()
	} else {
		c.send()
	}
	if c.throttled && (c.ending || c.held+c.need <= c.queue.limits.tags) {
		c.throttled = false
		c.parse()
	}
	c.settle()
}

// dropDue gives up the replies that are due.
func (c *conn) dropDue() {
	for c.first != none {
		next := c.queue.tasks[c.first].next
		c.drop(c.first)
		c.first = next
	}
	c.last = none
}

// end lets no request follow. What was begun is finished, but for a write whose data
// is not all there.
func (c *conn) end(err error) {
	if c.ending {
		return
	}
	c.ending, c.err, c.throttled = true, err, false
	if c.receiving {
		c.cancel(dirRecv) // its buffer is the kernel's until then
	} else {
		c.dropWrite()
	}
}

// dropWrite gives up a write whose data is not all there.
func (c *conn) dropWrite() {
	if c.write != none {
		c.drop(c.write)
		c.write = none
	}
}

// cut ends the connection without more replies.
func (c *conn) cut(err error) {
	c.end(err)
	if c.broken {
		return
	}
	c.broken = true
	if c.sending {
		c.cancel(dirSend)
		return
	}
	c.dropDue()
}

// leave ends the connection in order; see Server.Stop.
func (c *conn) leave() {
	c.end(ErrStopped)
	c.settle()
}

// abandon ends it without looking after the client.
func (c *conn) abandon() {
	c.cut(ErrStopped)
	c.settle()
}

// cancel ends a command that is pending.
func (c *conn) cancel(dir uint64) {
	s := c.worker.ring.SQE()
	s.Opcode, s.Addr = uring.OpAsyncCancel, c.data(dir)
}

// settle ends the connection when there is nothing left to wait for.
func (c *conn) settle() {
	if c.ending && !c.receiving && !c.sending && c.held == 0 && !c.queued && c.worker.conns[c.slot] == c {
		c.worker.remove(c)
	}
}
