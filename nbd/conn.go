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
	// maxTasks is how many requests of a connection are carried out at the same time.
	// More than that are read later. The kernel's client sends 128.
	maxTasks = 256
	// sendBuffer is how much of the replies waits in a unix socket.
	sendBuffer = 1 << 20
	// maxSkip is the data of a refused write that is read and dropped. A client that
	// announces more is disconnected: none sends more than largestRequest.
	maxSkip = 2 * largestRequest
)

// phase is how far a connection has come. It only ever increases.
type phase uint8

const (
	phaseNew      phase = iota // no loop has it yet
	phaseServing               // requests are taken
	phaseDraining              // no more requests are taken; those that were begun are answered
	phaseBroken                // nothing is sent any more; it ends with what the back end has of it
	phaseClosed                // done is closed
)

// wait is why the next request, or the rest of one, waits.
type wait uint8

const (
	waitNone  wait = iota
	waitTask       // for a task of this connection
	waitShare      // for tags of this connection, which has its share
	waitTags       // for any tags: it is in shard.waiting
)

// operation is a command of the loop's ring on the socket, in one direction.
type operation uint8

const (
	opIdle      operation = iota
	opPending             // its completion is to come
	opCancelled           // the same, and it was asked to end soon
)

// conn is a connection in the transmission phase. All of it is its loop's, but admitted,
// done and, once that is closed, err.
//
// It is done when it takes no more requests, no operation is pending on its socket, and
// no task is left.
type conn struct {
	worker *worker
	shard  *shard
	slot   int
	fd     int
	offer  offer
	phase  phase
	err    error // why it ended, if not in order
	done   chan struct{}

	admitted bool // see Server.admit; guarded by the server's mu

	// Receiving. What comes next is data to skip, or data of the write that is
	// current, or a header.
	input    []byte
	from, to int // what of input is not looked at
	incoming *uring.Message
	recv     operation
	skip     uint32
	filling  uint16 // tag that gets the data, or none
	filled   uint32 // bytes of it

	// Requests.
	current       *task // write whose data, or read whose pieces, are not all there
	freeTasks     *task
	tasks         int // that are not free
	held          int // tags
	wait          wait
	want          int   // tags that it waits for
	before, after *conn // in shard.waiting

	// Sending.
	replies  taskList // those that are due
	outgoing *uring.Message
	send     operation
	listed   bool     // in worker.due
	tags     []uint16 // whose data is in outgoing
	answered []*task  // whose reply ends in outgoing

	patience int // ticks that the client may stand still; 0: for ever
	progress [2]progress
}

// newConn prepares a connection over a stream socket that is not O_NONBLOCK, and is
// the caller's to close after done. Any goroutine.
func newConn(fd int, o offer) (*conn, error) {
	input, err := hostmem.Map(inputSize)
	if err != nil {
		return nil, fmt.Errorf("make input buffer: %w", err)
	}
	widen(fd)
	c := &conn{
		fd: fd, offer: o, input: input, filling: none, done: make(chan struct{}),
		incoming: uring.NewMessage(2), outgoing: uring.NewMessage(sendPieces),
		tags: make([]uint16, 0, sendPieces), answered: make([]*task, 0, sendPieces),
	}
	tasks := make([]task, min(maxTasks, len(o.export.shards[0].tags)))
	for i := range tasks {
		tasks[i].next, c.freeTasks = c.freeTasks, &tasks[i]
	}
	return c, nil
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

// unmap gives memory back, after done. Any goroutine.
func (c *conn) unmap() error { return hostmem.Unmap(c.input) }

// parse works on what was received, as far as that is possible, and asks for more. It
// does no harm if there is nothing to do.
func (c *conn) parse() {
	for c.wait == waitNone {
		t := c.current
		switch {
		case t != nil && t.kind == cmdRead:
			if !c.layMore(t) {
				return
			}
		case c.phase != phaseServing:
			c.settle()
			return
		case c.skip > 0:
			if !c.skipData() {
				return
			}
		case t != nil:
			if !c.fill(t) {
				return
			}
		default:
			if !c.nextRequest() {
				return
			}
		}
	}
}

// skipData drops the data of a write that was refused. It says false if there is none.
func (c *conn) skipData() bool {
	n := min(c.skip, uint32(c.to-c.from))
	c.from += int(n)
	if c.skip -= n; c.skip > 0 {
		c.receive()
		return false
	}
	return true
}

// receive asks for what is needed next: the rest of a buffer, and after the last one,
// or else, the input.
func (c *conn) receive() {
	if c.recv != opIdle {
		return
	}
	c.incoming.Reset()
	more := uint64(0) // data that comes before the next header, without that for a buffer
	if c.filling != none {
		room := c.room()
		c.incoming.Add(room)
		more = c.current.end - c.current.at - uint64(len(room))
		c.worker.watch()
	}
	if more == 0 {
		// What is left is the beginning of a header.
		c.to = copy(c.input, c.input[c.from:c.to])
		c.from = 0
		c.incoming.Add(c.input[c.to:])
	}
	s := c.worker.ring.SQE()
	s.SetRecv(c.fd, c.incoming)
	s.UserData = c.data(dirRecv)
	c.recv = opPending
}

func (c *conn) data(dir uint64) uint64 {
	return c.worker.base | uint64(c.slot)<<slotBits | dir
}

// received is the completion of receive.
func (c *conn) received(res int32) {
	c.recv = opIdle
	switch {
	case res > 0 && c.phase == phaseServing:
		n := int(res)
		c.progress[dirRecv].moved += uint64(n)
		if c.filling != none {
			k := min(n, len(c.room()))
			c.fillBy(k)
			n -= k
		}
		c.to += n
	case res > 0, res == -int32(unix.ECANCELED):
	case res == -int32(unix.EAGAIN), res == -int32(unix.EINTR):
	case res == 0:
		err := error(nil)
		if c.current != nil && c.current.kind == cmdWrite || c.skip > 0 || c.from < c.to {
			err = io.ErrUnexpectedEOF
		}
		c.end(err)
	default:
		c.end(fmt.Errorf("receive: %w", unix.Errno(-res)))
	}
	if c.phase != phaseServing {
		c.dropWrite()
	}
	c.parse()
}

// nextRequest begins the next request. It says false if there is none, or if it has to
// wait.
func (c *conn) nextRequest() bool {
	have := c.input[c.from:c.to]
	if len(have) < requestSize {
		c.receive()
		return false
	}
	r := decodeRequest(have)
	switch {
	case r.magic != magicRequest:
		c.end(errors.New("request has a wrong magic number"))
		return true
	case r.kind == cmdDisc:
		c.end(nil)
		return true
	case c.freeTasks == nil:
		c.wait = waitTask
		return false
	}
	if !c.begin(r) {
		return false
	}
	c.from += requestSize
	return true
}

// begin starts a request, or refuses it. It says false if it has to wait for tags.
func (c *conn) begin(r request) bool {
	s := c.shard
	if e := c.check(r); e != 0 {
		t := c.takeTask(r)
		t.code = e
		if r.kind == cmdWrite {
			c.skip = r.length
		}
		c.answer(t)
		if c.skip > maxSkip {
			c.end(fmt.Errorf("write of %d bytes", r.length))
		}
		return true
	}
	least, most, size := 1, 1, uint32(0)
	switch r.kind {
	case cmdWrite:
		t := c.takeTask(r)
		if r.flags&cmdFlagFUA != 0 {
			t.flags |= block.FUA
		}
		c.current = t
		return true
	case cmdRead:
		size, most = s.cut(r.offset, r.offset+uint64(r.length))
		if most <= s.share {
			least = most
		}
	}
	n := s.allow(c, least, most)
	if n == 0 {
		s.enqueue(c, least)
		return false
	}
	t := c.takeTask(r)
	if r.kind == cmdRead {
		t.whole = r.flags&cmdFlagDF != 0 || !c.offer.structured
		t.size, t.streamed = size, n < most
		c.lay(t, n)
		if t.streamed {
			c.current = t
		}
		return true
	}
	c.beginSteps(t, r.flags)
	return true
}

// beginSteps starts a flush, trim or write zeroes, for which there is a tag. A flush is
// always passed on: only the back end knows whether it is needed, from one to the next.
func (c *conn) beginSteps(t *task, flags uint16) {
	s := c.shard
	t.sync = t.kind == cmdFlush || flags&cmdFlagFUA != 0
	if flags&cmdFlagNoHole != 0 {
		t.flags |= block.NoUnmap
	}
	if t.kind == cmdTrim { // of a block in part, nothing can be said
		unit := uint64(s.bounds.block)
		t.at, t.end = (t.at+unit-1)&^(unit-1), t.end&^(unit-1)
	}
	i := s.take(t, piece{})
	if !s.advance(i) {
		s.release(i)
		c.answer(t)
	}
}

// flagsOf are the flags that a request may have, by kind.
var flagsOf = [...]uint16{
	cmdRead: cmdFlagFUA | cmdFlagDF, cmdWrite: cmdFlagFUA, cmdFlush: cmdFlagFUA,
	cmdTrim: cmdFlagFUA, cmdZeroes: cmdFlagFUA | cmdFlagNoHole,
}

// check says why a request is refused; 0: it is not. A client that was told of the block
// size keeps to it, as the specification demands; any other need not.
func (c *conn) check(r request) code {
	o := &c.offer
	switch {
	case int(r.kind) >= len(flagsOf), r.kind == 5: // no such kind; 5 is CACHE
		return codeInval
	case r.flags&^flagsOf[r.kind] != 0, r.flags&cmdFlagDF != 0 && !o.structured:
		return codeInval
	case r.kind == cmdFlush:
		if r.offset != 0 || r.length != 0 {
			return codeInval
		}
		return 0
	case r.kind != cmdRead && o.flags&flagReadOnly != 0:
		return codePerm
	case r.kind == cmdTrim && o.flags&flagSendTrim == 0, r.kind == cmdZeroes && o.flags&flagSendZeroes == 0:
		return codeInval
	case r.length == 0, o.aligned && (r.offset|uint64(r.length))&uint64(o.minBlock-1) != 0:
		return codeInval
	case r.offset > o.size || uint64(r.length) > o.size-r.offset:
		if r.kind == cmdWrite || r.kind == cmdZeroes {
			return codeNoSpace
		}
		return codeInval
	case r.flags&cmdFlagDF != 0 && r.length > largestRequest: // its length may not fit into a chunk
		return codeOverflow
	}
	return 0
}

// end lets no request follow. What was begun is finished, but for a write whose data
// is not all there.
func (c *conn) end(err error) {
	if c.phase != phaseServing {
		return
	}
	c.phase, c.err = phaseDraining, err
	if c.current == nil || c.current.kind != cmdRead {
		c.stopWaiting()
	}
	if c.recv == opIdle {
		c.dropWrite()
		return
	}
	c.cancel(&c.recv, dirRecv) // its buffer is the kernel's until then
}

// stopWaiting takes a connection out of the queue for tags.
func (c *conn) stopWaiting() {
	if c.wait == waitTags {
		c.shard.waiting.remove(c)
		c.shard.freed = true // what it would not take is for the next
	}
	c.wait = waitNone
}

// dropWrite gives up a write whose data is not all there.
func (c *conn) dropWrite() {
	if t := c.current; t != nil && t.kind == cmdWrite {
		c.giveUpWrite(t)
	}
}

// cut ends the connection without more replies.
func (c *conn) cut(err error) {
	c.end(err)
	if c.phase >= phaseBroken {
		return
	}
	c.phase = phaseBroken
	c.stopWaiting()
	if t := c.current; t != nil && t.kind == cmdRead {
		c.current = nil
		if t.state == replyNone {
			c.dropReply(t)
		}
	}
	if c.send != opIdle {
		c.cancel(&c.send, dirSend)
		return
	}
	c.dropReplies()
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

// cancel ends an operation that is pending.
func (c *conn) cancel(op *operation, dir uint64) {
	if *op != opPending {
		return
	}
	*op = opCancelled
	s := c.worker.ring.SQE()
	s.Opcode, s.Addr = uring.OpAsyncCancel, c.data(dir)
}

// settle ends the connection when there is nothing left to wait for.
func (c *conn) settle() {
	if (c.phase == phaseDraining || c.phase == phaseBroken) && c.recv == opIdle && c.send == opIdle && c.tasks == 0 {
		c.phase = phaseClosed
		c.worker.remove(c)
	}
}

// progress is what a client did lately in one direction.
type progress struct {
	moved uint64 // bytes
	seen  uint64 // of those, when the count of ticks began
	ticks int
}

// errStalled says that a client stood still.
var errStalled = errors.New("client neither reads its replies nor sends what it announced")

// tick looks whether the client stands still, and says whether it has to be looked at
// again.
func (c *conn) tick() (busy bool) {
	patience := c.patience
	if c.shard.starved {
		patience = min(patience, 1)
	}
	waits := [2]bool{dirRecv: c.recv == opPending && c.filling != none, dirSend: c.send == opPending}
	for dir, waiting := range waits {
		p := &c.progress[dir]
		if !waiting || p.moved-p.seen >= leastProgress {
			p.seen, p.ticks = p.moved, 0
		}
		if !waiting {
			continue
		}
		busy = true
		if p.ticks++; patience > 0 && p.ticks > patience {
			c.cut(errStalled)
			c.settle()
			return false
		}
	}
	return busy
}
