package nbd

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
)

// sendPieces is the largest number of pieces of memory in a message with replies. The
// system's limit is 1024 (IOV_MAX).
const sendPieces = 128

// taskList is an intrusive list of tasks.
type taskList struct{ head, tail *task }

func (l *taskList) push(t *task) {
	t.next = nil
	if l.tail == nil {
		l.head = t
	} else {
		l.tail.next = t
	}
	l.tail = t
}

func (l *taskList) pop() {
	if l.head = l.head.next; l.head == nil {
		l.tail = nil
	}
}

// answer makes the reply to a request due. None of its tags is at the back end.
func (c *conn) answer(t *task) {
	c.shard.count(t)
	if c.phase == phaseBroken && t.state == replyNone {
		c.dropTask(t)
		c.settle()
		return
	}
	c.due(t)
}

// due makes the reply to a request, or its beginning, due. The worker sends it in the
// same pass.
func (c *conn) due(t *task) {
	if t.state == replyNone {
		t.state = replyDue
		c.replies.push(t)
	}
	if !c.listed {
		c.listed = true
		c.worker.due = append(c.worker.due, c)
	}
}

// errPart ends the connection of a client that cannot be told about an error in another
// way: a part of the data of a read was sent, in a reply that cannot end with an error.
var errPart = errors.New("a read failed after a part of its data was sent")

// sendDue sends as many of the due replies as fit into a message.
func (c *conn) sendDue() {
	if c.send != opIdle || c.phase >= phaseBroken {
		return
	}
	c.outgoing.Reset()
	for t := c.replies.head; t != nil && c.outgoing.Room() > 0; t = c.replies.head {
		if t.code != 0 && t.state == replyOpen && t.whole {
			if c.outgoing.Len() == 0 {
				c.cut(errPart)
				c.settle()
				return
			}
			break // the replies before it are sent first
		}
		if !c.compose(t) {
			break
		}
		c.replies.pop()
		c.answered = append(c.answered, t)
	}
	if c.outgoing.Len() > 0 {
		c.submit()
	}
}

// compose adds a reply to the message, as far as it is ready and fits. It returns true if
// the reply is then complete.
func (c *conn) compose(t *task) bool {
	if t.kind != cmdRead || t.code != 0 {
		if t.busy > 0 || c.current == t {
			return false // the read is streamed, and has not ended
		}
		if t.kind == cmdRead && c.offer.structured {
			c.outgoing.Add(putError(t.header[:], t.cookie, t.code))
		} else {
			c.outgoing.Add(putSimple(t.header[:], t.cookie, t.code))
		}
		return true
	}
	s := c.shard
	for t.head != none {
		i := t.head
		g := &s.tags[i]
		if !g.ready || c.outgoing.Room() < 2 {
			return false
		}
		c.composeHeader(t, g)
		c.outgoing.Add(s.data(i))
		c.tags = append(c.tags, i)
		if t.head = g.next; t.head == none {
			t.tail = none
		}
	}
	if t.at < t.end {
		return false
	}
	if t.streamed {
		s.count(t)
	}
	return true
}

// composeHeader adds the header before the data of a tag, if there is one. A streamed
// structured reply has a header before each tag, and other replies only before the first.
func (c *conn) composeHeader(t *task, g *tag) {
	first := t.state != replyOpen
	t.state = replyOpen
	switch {
	case t.streamed && !t.whole:
		at, last := g.sector<<block.SectorShift+uint64(g.skip), g.next == none && t.at == t.end
		c.outgoing.Add(putData(g.header[:], t.cookie, at, g.length, last))
	case !first:
	case c.offer.structured:
		c.outgoing.Add(putData(t.header[:], t.cookie, t.offset, t.length, true))
	default:
		c.outgoing.Add(putSimple(t.header[:], t.cookie, 0))
	}
}

func (c *conn) submit() {
	s := c.worker.ring.SQE()
	s.SetSend(c.fd, c.outgoing)
	s.UserData = c.data(dirSend)
	c.send = opPending
	c.worker.watch()
}

// sent handles the completion of submit.
func (c *conn) sent(res int32) {
	c.send = opIdle
	switch {
	case c.phase == phaseBroken:
	case res > 0:
		c.progress[dirSend].moved += uint64(res)
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
	for _, i := range c.tags {
		c.shard.release(i)
	}
	for _, t := range c.answered {
		c.freeTask(t)
	}
	c.tags, c.answered = c.tags[:0], c.answered[:0]
	if c.phase == phaseBroken {
		c.dropReplies()
	} else {
		c.sendDue()
	}
	if c.wait == waitTask {
		c.wait = waitNone
		c.parse()
	}
	c.settle()
}

// dropReplies drops the due replies.
func (c *conn) dropReplies() {
	for c.replies.head != nil {
		t := c.replies.head
		c.replies.pop()
		c.dropReply(t)
	}
}

// dropReply drops the reply to a task that is in no list.
func (c *conn) dropReply(t *task) {
	if t.busy > 0 {
		t.state = replyDropped // the task ends when its last tag has returned
		return
	}
	c.dropTask(t)
}
