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
	// inputSize is the number of bytes that are received before their destination is
	// known. It is enough for several small requests, and so small that copying the
	// beginning of a large request does not matter.
	inputSize = 32 << 10
	// maxTasks is the number of requests of a connection that are executed at the
	// same time. The kernel's client sends 128. Further requests are read later.
	maxTasks = 256
	// sendBuffer is the size of a unix socket's send buffer in bytes.
	sendBuffer = 1 << 20
	// maxSkip limits the data of a refused write that is read and dropped. A client
	// that announces more is disconnected. No honest client sends more than
	// largestRequest.
	maxSkip = 2 * largestRequest
)

// phase is the phase of a connection's life. It only ever increases.
type phase uint8

const (
	phaseNew      phase = iota // not on a loop yet
	phaseServing               // requests are accepted
	phaseDraining              // no more requests are accepted; those that were begun are answered
	phaseBroken                // nothing is sent any more; the connection ends when the back end has returned its tags
	phaseClosed                // done is closed
)

// wait is the reason why the next request, or the rest of the current one, waits.
type wait uint8

const (
	waitNone  wait = iota
	waitTask       // a free task of this connection
	waitShare      // tags that this connection holds itself, because it has its share
	waitTags       // any free tags: the connection is in shard.waiting
)

// operation is the state of the ring's command on the socket, in one direction.
type operation uint8

const (
	opIdle      operation = iota
	opPending             // the kernel has it
	opCancelled           // the kernel has it, and was asked to cancel it
)

// conn is a connection in the transmission phase. All of it belongs to its loop, except
// admitted, done and, once done is closed, err.
//
// A connection is closed when it takes no more requests, has no operation pending on its
// socket, and has no task left.
type conn struct {
	worker *worker
	shard  *shard
	slot   int
	fd     int
	offer  offer
	phase  phase
	err    error // why the connection ended; nil if the client has disconnected in order
	done   chan struct{}

	admitted bool // see Server.admit; guarded by the server's mu

	// Receiving. The next bytes are data to skip, data of the current write, or a
	// header.
	input    []byte
	from, to int // the part of input that is not parsed yet
	incoming *uring.Message
	recv     operation
	skip     uint32
	filling  uint16 // tag whose buffer receives data, or none
	filled   uint32 // number of bytes of data in that buffer

	// Requests.
	requests      uint64 // number of those begun
	current       *task  // write that lacks data, or read that lacks tags
	freeTasks     *task
	tasks         int // number of tasks in use
	held          int // number of tags that the connection holds
	wait          wait
	want          int   // number of tags for which it waits
	before, after *conn // in shard.waiting

	// Sending.
	replies  taskList // due replies that were not sent yet
	outgoing *uring.Message
	send     operation
	listed   bool     // in worker.due
	tags     []uint16 // tags whose data is in outgoing
	answered []*task  // tasks whose replies end in outgoing

	patience int // number of ticks for which the client may stall; 0: no limit
	progress [2]progress
}

// newConn makes a connection over a stream socket, which must not be O_NONBLOCK. The
// caller closes the socket after done. Any goroutine may call newConn.
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

// widen enlarges the send buffer of a unix socket, so that replies to large reads are
// sent in fewer steps. The kernel adapts the buffers of TCP sockets itself.
func widen(fd int) {
	if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_UNIX {
		return
	}
	for _, option := range []int{unix.SO_SNDBUF, unix.SO_SNDBUFFORCE} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, sendBuffer) // the FORCE option needs CAP_NET_ADMIN; the kernel limits the other
	}
}

// unmap frees the connection's memory. It is called after done, from any goroutine.
func (c *conn) unmap() error { return hostmem.Unmap(c.input) }

// parse handles as much of the input as possible, and receives more. It may be called at
// any time.
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

// skipData drops data of a refused write. It returns false if more must be received.
func (c *conn) skipData() bool {
	n := min(c.skip, uint32(c.to-c.from))
	c.from += int(n)
	if c.skip -= n; c.skip > 0 {
		c.receive()
		return false
	}
	return true
}

// receive starts to receive the next bytes. If a tag's buffer is being filled, data goes
// there first. Unless another buffer follows, headers then go into the input.
func (c *conn) receive() {
	if c.recv != opIdle {
		return
	}
	c.incoming.Reset()
	more := uint64(0) // data of the write that belongs in further buffers
	if c.filling != none {
		room := c.room()
		c.incoming.Add(room)
		more = c.current.end - c.current.at - uint64(len(room))
		c.worker.watch()
	}
	if more == 0 {
		// The rest of the input is the beginning of a header.
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

// received handles the completion of receive.
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

// nextRequest starts the next request. It returns false if there is none yet, or if it
// must wait.
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
	c.requests++
	c.from += requestSize
	return true
}

// begin starts or refuses a request. It returns false if the request must wait for tags.
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
		size, most = s.pieceSize(r.offset, r.offset+uint64(r.length))
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

// beginSteps starts a flush, trim or write zeroes. A tag is free. Flushes are always
// passed on, because only the back end knows at each moment whether they are needed.
func (c *conn) beginSteps(t *task, flags uint16) {
	s := c.shard
	switch fua := flags&cmdFlagFUA != 0; {
	case t.kind == cmdZeroes && fua:
		// Each step must be durable by itself: the target can lose its cache between
		// the steps and a flush.
		t.flags |= block.FUA
	case t.kind == cmdFlush, fua:
		t.sync = true
	}
	if flags&cmdFlagNoHole != 0 {
		t.flags |= block.NoUnmap
	}
	if t.kind == cmdTrim { // whole blocks only
		unit := uint64(s.bounds.block)
		t.at, t.end = (t.at+unit-1)&^(unit-1), t.end&^(unit-1)
	}
	i := s.take(t, piece{})
	if !s.advance(i) {
		s.release(i)
		c.answer(t)
	}
}

// flagsOf holds the flags that a request may have, by kind.
var flagsOf = [...]uint16{
	cmdRead: cmdFlagFUA | cmdFlagDF, cmdWrite: cmdFlagFUA, cmdFlush: cmdFlagFUA,
	cmdTrim: cmdFlagFUA, cmdZeroes: cmdFlagFUA | cmdFlagNoHole,
}

// check returns the error of a request that is refused, or 0. A client that has asked for
// the block size must align its requests to it, as the specification demands.
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
	case r.flags&cmdFlagDF != 0 && r.length > largestRequest: // the length may not fit into a chunk
		return codeOverflow
	}
	return 0
}

// end stops accepting requests. Requests that were started are finished and answered,
// except a write whose data has not arrived completely.
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
	c.cancel(&c.recv, dirRecv) // until the operation has ended, the kernel may use the buffer
}

// stopWaiting ends a wait.
func (c *conn) stopWaiting() {
	if c.wait == waitTags {
		c.shard.waiting.remove(c)
		c.shard.freed = true // the next connection may be able to continue
	}
	c.wait = waitNone
}

// dropWrite ends a write whose data has not arrived completely.
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

// leave ends the connection after its replies; see Server.Stop.
func (c *conn) leave() {
	c.end(ErrStopped)
	c.settle()
}

// abandon ends the connection without more replies.
func (c *conn) abandon() {
	c.cut(ErrStopped)
	c.settle()
}

// cancel asks the kernel to end an operation.
func (c *conn) cancel(op *operation, dir uint64) {
	if *op != opPending {
		return
	}
	*op = opCancelled
	s := c.worker.ring.SQE()
	s.Opcode, s.Addr = uring.OpAsyncCancel, c.data(dir)
}

// settle closes the connection if it has ended and nothing is left to wait for.
func (c *conn) settle() {
	if (c.phase == phaseDraining || c.phase == phaseBroken) && c.recv == opIdle && c.send == opIdle && c.tasks == 0 {
		c.phase = phaseClosed
		c.worker.remove(c)
	}
}

// progress measures how much a client transfers in one direction.
type progress struct {
	moved uint64 // bytes
	seen  uint64 // moved at tick 0
	ticks int    // since the client has moved leastProgress bytes
}

// errStalled ends the connection of a client that stalls.
var errStalled = errors.New("client neither reads its replies nor sends what it announced")

// tick ends the connection if the client has stalled for too long. It returns true if
// there must be another tick.
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
