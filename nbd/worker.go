package nbd

import (
	"ublk-nvmeof/internal/uring"
	"ublk-nvmeof/poller"
)

// submitter is the part of poller.Loop that the data path uses.
type submitter interface {
	SQE() *uring.SQE // never nil
}

// worker is what a server does on one loop, of which it is a poller.Source and a
// poller.Handler. All of it is the loop's.
type worker struct {
	index    int
	ring     submitter
	base     uint64 // of poller.Loop.Handle
	attached bool
	queues   []*queue
	conns    []*conn // by slot; nil: free
	due      []*conn // those that have replies to send; see conn.dirty
}

// The user data of a command: the slot of its connection, and the direction.
const (
	dirRecv  = 0
	dirSend  = 1
	slotBits = 1
)

// Poll implements poller.Source.
func (w *worker) Poll() int {
	n := 0
	for _, q := range w.queues {
		q.resume()
		n += q.poll()
	}
	n += len(w.due)
	for _, c := range w.due {
		c.dirty = false
		c.send()
	}
	clear(w.due)
	w.due = w.due[:0]
	if n > 0 {
		for _, q := range w.queues {
			q.publish()
		}
	}
	return n
}

// Arm implements poller.Source: sockets and back ends make their own events.
func (w *worker) Arm() poller.Readiness {
	for _, q := range w.queues {
		if len(q.reqs) > 0 {
			return poller.Busy
		}
	}
	if len(w.due) > 0 {
		return poller.Busy
	}
	return poller.Sleep
}

// Complete implements poller.Handler.
func (w *worker) Complete(data uint64, res int32, _ uint32) {
	c := w.conns[data>>slotBits]
	if data&dirSend != 0 {
		c.sent(res)
	} else {
		c.received(res)
	}
}

// add begins a connection.
func (w *worker) add(c *conn) {
	c.worker, c.queue = w, c.offer.export.queues[w.index]
	c.slot = -1
	for i, have := range w.conns {
		if have == nil {
			c.slot = i
			break
		}
	}
	if c.slot < 0 {
		c.slot = len(w.conns)
		w.conns = append(w.conns, nil)
		w.due = append(make([]*conn, 0, len(w.conns)), w.due...)
	}
	w.conns[c.slot] = c
	c.parse()
}

// remove ends a connection, of which nothing is pending.
func (w *worker) remove(c *conn) {
	w.conns[c.slot] = nil
	close(c.done)
}
