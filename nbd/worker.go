package nbd

import (
	"encoding/binary"
	"time"

	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/internal/uring"
	"ublk-nvmeof/poller"
)

// submitter is the part of poller.Loop that the data path uses.
type submitter interface {
	SQE() *uring.SQE // never nil
}

// worker is the part of a server on one loop. It is a poller.Source and a poller.Handler.
// Only the loop uses its fields.
type worker struct {
	index    int
	ring     submitter
	base     uint64 // what poller.Loop.Handle returned
	attached bool
	shards   []*shard
	conns    []*conn // by slot; nil: the slot is free
	due      []*conn // connections with replies to send; see conn.listed

	watching bool   // the timer runs
	interval []byte // time between ticks, struct __kernel_timespec
}

// The user data of a command is the slot of its connection and the direction, or
// dataTick.
const (
	dirRecv  = 0
	dirSend  = 1
	slotBits = 1
	dataTick = 1 << 40
)

// stallTicks is the number of ticks in Config.StallTimeout. leastProgress is the number
// of bytes that a client must transfer in that time, unless less is left.
const (
	stallTicks    = 8
	leastProgress = 64 << 10
)

func newWorker(ring submitter, index int, stall time.Duration) *worker {
	tick := max(stall/stallTicks, time.Millisecond)
	ne := binary.NativeEndian
	interval := ne.AppendUint64(nil, uint64(tick/time.Second))
	interval = ne.AppendUint64(interval, uint64(tick%time.Second))
	return &worker{ring: ring, index: index, interval: interval}
}

// Poll implements poller.Source.
func (w *worker) Poll() int {
	n := 0
	for _, s := range w.shards {
		s.resume()
		n += s.poll()
	}
	n += len(w.due)
	for _, c := range w.due {
		c.listed = false
		c.sendDue()
	}
	clear(w.due)
	w.due = w.due[:0]
	if n > 0 {
		for _, s := range w.shards {
			s.Publish()
		}
	}
	return n
}

// Arm implements poller.Source. Sockets and back ends cause their own events.
func (w *worker) Arm() poller.Readiness {
	for _, s := range w.shards {
		if len(s.reqs) > 0 {
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
	if data == dataTick {
		w.tick()
		return
	}
	c := w.conns[data>>slotBits]
	if data&dirSend != 0 {
		c.sent(res)
	} else {
		c.received(res)
	}
}

// watch starts the timer for the next tick. While no client has anything to read or send,
// there are no ticks, and the loop can sleep.
func (w *worker) watch() {
	if w.watching {
		return
	}
	w.watching = true
	s := w.ring.SQE()
	s.Opcode, s.Addr, s.Len = uring.OpTimeout, hostmem.Addr(w.interval), 1
	s.UserData = w.base | dataTick
}

// tick checks for clients that stall, and for changed limits of the devices.
func (w *worker) tick() {
	w.watching = false
	for _, s := range w.shards {
		s.tick()
	}
	busy := false
	for _, c := range w.conns {
		if c != nil && c.tick() {
			busy = true
		}
	}
	if busy {
		w.watch()
	}
}

// add starts a connection.
func (w *worker) add(c *conn) {
	c.worker, c.shard, c.phase = w, c.offer.export.shards[w.index], phaseServing
	c.shard.refresh()
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

// remove removes a connection that has no operation pending and no task left.
func (w *worker) remove(c *conn) {
	w.conns[c.slot] = nil
	close(c.done)
}
