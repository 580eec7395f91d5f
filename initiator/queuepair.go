package initiator

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
)

// queuePair is an I/O queue pair. Only its lane uses its fields, except inflight and oldest.
type queuePair struct {
	*connection
	assoc *association
	slot  int // of the path
	lane  *lane
	class poller.Class

	inCapsule uint32 // bytes of data that a capsule may carry
	checkHead bool   // SQ flow control is on, so responses carry SQHD
	proved    bool   // the target has asked for authentication of this queue
	// descriptors is in how many places the data of a command may be, at least 1.
	descriptors int
	requests    []*request    // by slot: the request of the command in flight
	waiting     fifo          // requests without a slot
	inflight    atomic.Uint32 // number of requests in both; any goroutine may read it
	oldest      atomic.Uint32 // age in seconds of the oldest command in flight, as of the last tend
	receiver    rdma.Receiver // nil: the provider takes the packets
	armed       bool          // the next response causes an event
	lost        bool          // the queue pair failed and is not used any more
	abandoned   bool          // the changes in flight hold those to the same blocks
	gone        bool          // the lane has released the queue pair
	unacked     int
}

func newQueuePair(a *association, conn *connection, l *lane, class poller.Class, inCapsule uint32, checkHead bool) *queuePair {
	return &queuePair{
		connection: conn, assoc: a, slot: a.ctrl.slot, lane: l, class: class, inCapsule: inCapsule, checkHead: checkHead,
		requests: make([]*request, conn.sq.Slots()),
	}
}

// attach makes the loop watch the events and packets of the queue pair. Only the loop may
// call it.
func (p *queuePair) attach() error {
	l := p.lane.loop
	fd := p.cq.FD()
	if fd >= 0 {
		if err := l.Watch(fd, p); err != nil {
			return err
		}
	}
	r, ok := p.cq.CQ().(rdma.Receiver)
	if !ok || r.PacketFD() < 0 {
		return nil
	}
	if fd >= 0 { // otherwise the loop polls, and a poll looks for packets
		if err := l.WatchReadable(r.PacketFD(), packets{r}); err != nil {
			return err
		}
	}
	p.receiver = r
	r.Receiving(true)
	return nil
}

// detach undoes attach. Any goroutine except the loop may call it.
func (p *queuePair) detach() error {
	l := p.lane.loop
	var errs []error
	if p.receiver != nil {
		if p.cq.FD() >= 0 {
			errs = append(errs, l.Unwatch(p.receiver.PacketFD()))
		}
		p.receiver.Receiving(false)
	}
	if fd := p.cq.FD(); fd >= 0 {
		errs = append(errs, l.Unwatch(fd))
	}
	p.ack()
	return errors.Join(errs...)
}

// packets is the Watcher for the packets of a queue pair.
type packets struct{ rdma.Receiver }

// Event implements poller.Watcher.
func (r packets) Event(int) { r.Receive() }

// start sends a request with the next flush, or queues it for a slot.
func (p *queuePair) start(r *request) {
	p.inflight.Store(p.inflight.Load() + 1)
	p.enter(r)
}

// enter is like start, for a request that the queue pair has already counted.
func (p *queuePair) enter(r *request) {
	if p.lost || p.gone || p.waiting.head != nil || !p.push(r) {
		p.waiting.push(r)
	}
}

// giveBack has the lane dispatch a request again that must not be sent over this path.
func (p *queuePair) giveBack(r *request) {
	p.inflight.Store(p.inflight.Load() - 1)
	p.lane.dispatch(r)
}

// finish ends a request of this queue pair.
func (p *queuePair) finish(r *request, errno uint16) {
	p.inflight.Store(p.inflight.Load() - 1)
	p.lane.finish(r, errno)
}

// push builds the next command of a request. It returns false if no slot is free. A request
// needs more than one command if a limit of the target has shrunk since the front end
// learned it.
func (p *queuePair) push(r *request) bool {
	ns := r.home.ns
	terms := ns.views[p.slot].Load()
	if terms == nil || terms.access == noAccess {
		p.giveBack(r)
		return true
	}
	if r.inRegion && r.withdrawn() {
		p.finish(r, uint16(unix.EFAULT))
		return true
	}
	if r.io.Op == block.OpDiscard && terms.discard == 0 {
		p.finish(r, uint16(unix.EOPNOTSUPP))
		return true
	}
	slot, cmd, ok := p.sq.Get()
	if !ok {
		return false
	}
	if r.assoc != p.assoc {
		// Data of an earlier association may be lost with the target's cache.
		r.assoc, r.progress = p.assoc, 0
	}
	p.requests[slot] = r
	r.posted = p.lane.sub.clock.Load()
	if r.timed {
		r.timing.pushed, r.timing.answered = p.lane.stamp(), 0
	}
	if r.inRegion && r.io.Segments > 0 {
		p.pushSegments(r, slot, cmd, terms)
		return true
	}
	var capsule rdma.SGE
	switch r.io.Op {
	case block.OpRead:
		lba, blocks, length := r.piece(terms.transfer)
		cmd.SetRead(ns.id, lba, blocks, false)
		cmd.SetKeyedSGL(r.addr()+r.offset(), length, r.data.keys[p.slot].remote, false)
	case block.OpWrite:
		lba, blocks, length := r.piece(terms.transfer)
		cmd.SetWrite(ns.id, lba, blocks, r.durable(terms))
		capsule = p.inline(cmd, r.data, r.addr()+r.offset(), length)
	case block.OpFlush:
		cmd.SetFlush(ns.id)
	case opDirect:
		*cmd = r.direct.cmd
		switch {
		case r.direct.mr != nil: // the command names memory of its own
		case nvme.IsWrite(cmd):
			capsule = p.inline(cmd, r.data, r.addr(), r.direct.length)
		default:
			cmd.SetKeyedSGL(r.addr(), r.direct.length, r.data.keys[p.slot].remote, false)
		}
	case block.OpDiscard:
		lba, blocks, _ := r.piece(terms.discard)
		cmd.SetDSM(ns.id, 1)
		capsule = p.inline(cmd, r.data, r.addr(), putRange(r.memory(), blocks, lba))
	case block.OpWriteZeroes:
		if terms.zeroes == 0 {
			// The target does not support Write Zeroes any more. Write zeroes from the
			// request's buffer.
			lba, blocks, length := r.piece(min(terms.transfer, uint32(r.home.buffers.size)>>block.SectorShift))
			clear(r.memory()[:length])
			cmd.SetWrite(ns.id, lba, blocks, r.durable(terms))
			capsule = p.inline(cmd, r.data, r.addr(), length)
			break
		}
		lba, blocks, _ := r.piece(terms.zeroes)
		cmd.SetWriteZeroes(ns.id, lba, blocks, r.durable(terms), terms.deallocateZeroes && r.io.Flags&block.NoUnmap == 0)
	}
	p.sq.Push(slot, capsule)
	return true
}

// piece returns the range of the next command of a request: at most limit of the remaining
// sectors, in logical blocks and in bytes.
func (r *request) piece(limit uint32) (lba uint64, blocks, length uint32) {
	shift := r.home.ns.sectorShift
	r.sent = min(r.io.Sectors-r.progress, limit)
	return (r.io.Sector + uint64(r.progress)) >> shift, r.sent >> shift, r.sent << block.SectorShift
}

// addr returns the address of the request's data, for the target and for an SGE.
func (r *request) addr() uint64 { return r.data.base + r.at }

// memory returns the buffer in which the request has its data, for a request that is not in a
// region.
func (r *request) memory() []byte { return r.data.mem[r.at : r.at+uint64(r.home.buffers.size)] }

// offset returns the offset of the next command's data in the request's data.
func (r *request) offset() uint64 { return uint64(r.progress) << block.SectorShift }

// durable reports whether the data must be on stable media when the command completes. A
// front end without a volatile cache sends no flush.
func (r *request) durable(t *view) bool {
	return r.io.Flags&block.FUA != 0 || t.volatileCache && r.home.writeThrough
}

// inline lets a command read n bytes at an address of a slab, in the capsule if they fit,
// and by key otherwise.
func (p *queuePair) inline(cmd *nvme.Command, b *slab, addr uint64, n uint32) rdma.SGE {
	if n <= p.inCapsule {
		cmd.SetInCapsuleSGL(0, n)
		return rdma.SGE{Addr: addr, Length: n, LKey: b.keys[p.slot].local}
	}
	cmd.SetKeyedSGL(addr, n, b.keys[p.slot].remote, false)
	return rdma.SGE{}
}

// rangeListSize is the length of the buffer of a DSM command for any number of ranges,
// because some controllers always read all of it.
const rangeListSize = 4096

func putRange(b []byte, blocks uint32, lba uint64) uint32 {
	b = b[:rangeListSize]
	clear(b)
	nvme.PutDSMRange(b, 0, blocks, lba)
	return rangeListSize
}

// poll handles responses, and sends requests that waited for a slot with the next flush.
func (p *queuePair) poll() int {
	if p.lost {
		return 0
	}
	n := 0
	if p.sq.Outstanding() > 0 {
		n += p.answers()
	}
	if p.sq.Scarce() && !p.lost {
		sends, err := p.sq.Reap()
		if n += sends; err != nil {
			p.fail(err)
		}
	}
	if p.lost {
		return n // abandon or recover takes what waits
	}
	for r := p.waiting.pop(); r != nil; r = p.waiting.pop() {
		if !p.push(r) {
			p.waiting.unpop(r)
			break
		}
		n++
	}
	return n
}

// flush posts the pushed commands.
func (p *queuePair) flush() int {
	if p.lost {
		return 0
	}
	n, err := p.sq.Flush()
	if err != nil {
		p.fail(err)
	}
	return n
}

func (p *queuePair) answers() int {
	events, err := p.cq.Poll()
	for i := range events {
		e := &events[i]
		slot, ok := p.sq.Match(e.Completion.CID())
		switch {
		case !ok:
			p.fail(because(LossProtocol, fmt.Errorf("response to command id %#x, which is not outstanding", e.Completion.CID())))
			return i
		case e.Invalidated:
			p.fail(because(LossProtocol, fmt.Errorf("target invalidated key %#x without being asked to", e.InvalidatedKey)))
			return i
		case p.checkHead && !p.sq.CheckHead(e.Completion.SQHead()):
			p.fail(because(LossProtocol, fmt.Errorf("response with submission queue head %d beyond the queue", e.Completion.SQHead())))
			return i
		}
		p.answer(slot, e.Completion.Status())
	}
	if err != nil {
		p.fail(err)
	}
	return len(events)
}

// answer handles the response to the command in a slot.
func (p *queuePair) answer(slot uint16, status nvme.Status) {
	c, r := p.assoc.ctrl, p.requests[slot]
	p.sq.Answer(slot)
	p.requests[slot] = nil
	errno := uint16(0)
	if r.timed {
		t := &r.timing
		t.answered = p.lane.stamp()
		t.wire += t.answered - t.pushed
	}
	if status.OK() {
		r.progress += r.sent
		if r.progress < r.io.Sectors && r.sent > 0 {
			p.enter(r)
			return
		}
	} else if r.direct != nil {
		r.direct.err = status
	} else {
		switch {
		case p.assoc.life.Err() != nil:
			// A target that goes away may answer with errors. The request is sent again over
			// another path or the next association.
			p.fail(context.Cause(p.assoc.life))
			p.enter(r)
			return
		case status.Code() == nvme.StatusAuthRequired:
			// The next association authenticates, and sends the request again.
			p.fail(because(LossTargetError, errAuthStatus))
			p.enter(r)
			return
		case status.Code() == nvme.StatusInvalidNamespace:
			p.assoc.lookAtNamespaces() // the event may be lost
			if p.elsewhere(r, status) {
				p.giveBack(r) // controllers lose a namespace one after the other
				return
			}
		}
		if c.mayRetry(p.assoc, r, status) {
			p.retry(r, status)
			return
		}
		errno, r.status = errnoOf(status), status
		c.sub.reportStatus(r, status)
	}
	p.finish(r, errno)
}

// retry sends a command again, after the delay that the target requested. It may allocate,
// because errors are not on the hot path.
func (p *queuePair) retry(r *request, status nvme.Status) {
	l := p.lane
	l.retried.Store(l.retried.Load() + 1)
	r.timing.answered = 0 // the time until the command is sent again is no return
	if status.IsPathError() && p.elsewhere(r, status) {
		p.giveBack(r)
		return
	}
	delay := p.assoc.ctrl.retryDelay(p.assoc, status)
	if delay == 0 {
		p.enter(r)
		return
	}
	p.inflight.Store(p.inflight.Load() - 1)
	l.delay(r, delay)
}

// arm implements the pair's part of poller.Source.
func (p *queuePair) arm() poller.Readiness {
	switch {
	case p.lost:
		return poller.Sleep
	case p.sq.Pending() > 0:
		return poller.Busy
	case p.waiting.head != nil && p.sq.Starved():
		// Completions of SENDs free slots, and cause no event.
		return poller.Spin
	case p.sq.Outstanding() == 0:
		return poller.Sleep
	case p.cq.FD() < 0:
		return poller.Spin
	case p.armed:
		return poller.Sleep
	}
	if err := p.cq.Arm(); err != nil {
		p.fail(fmt.Errorf("arm completion queue: %w", err))
		return poller.Sleep
	}
	p.armed = true
	return poller.Sleep // the loop polls once more before it sleeps
}

// Event implements poller.Watcher.
func (p *queuePair) Event(n int) {
	p.armed = false
	// Ack takes a lock in libibverbs, so acknowledge many events at once.
	if p.unacked += n; p.unacked >= 64 {
		p.ack()
	}
}

func (p *queuePair) ack() {
	if p.unacked > 0 {
		p.cq.Ack(p.unacked)
		p.unacked = 0
	}
}

// fail stops the use of the queue pair and fails the association.
func (p *queuePair) fail(err error) {
	if !p.lost {
		p.lost = true
		p.assoc.fail(because(LossQueuePair, fmt.Errorf("I/O queue %d: %w", p.qid, err)))
	}
}

// abandon ends the use of a queue pair whose association is lost. From then on the changes in
// flight hold those to the same blocks (Namespace.bar). Requests that were not sent take another
// path.
func (p *queuePair) abandon() {
	p.lost, p.abandoned = true, true
	for _, r := range p.requests {
		if r != nil {
			r.home.ns.bar(p.assoc.remnant, r)
		}
	}
	waiting := p.waiting.take()
	for r := waiting.pop(); r != nil; r = waiting.pop() {
		p.giveBack(r)
	}
}

// tend checks the commands in flight at each tick of the controller's clock. A command that
// is older than limit ticks fails the association. Before that the target may only be slow,
// so tend probes whether its adapter still knows the queue pair.
func (p *queuePair) tend(now, limit uint32) {
	if p.lost {
		return
	}
	slow, oldest := false, uint32(0)
	for _, r := range p.requests {
		if r == nil {
			continue
		}
		age := now - r.posted
		if age > limit {
			p.fail(because(LossCommandTimeout, fmt.Errorf("%v at sector %d was not answered within %v", r.io.Op, r.io.Sector, p.lane.sub.cfg.IOTimeout)))
			return
		}
		slow, oldest = slow || age > 1, max(oldest, age)
	}
	p.oldest.Store(oldest)
	if slow {
		if err := p.sq.Probe(); err != nil {
			p.fail(err)
		}
	}
}

// errnoOf returns the errno for a status. It is never EAGAIN, which makes io_uring clients
// retry forever.
func errnoOf(s nvme.Status) uint16 {
	switch s.Code() {
	case nvme.StatusInvalidNamespace:
		return uint16(unix.ENODEV) // as for a namespace that is known to be gone
	case nvme.StatusNamespaceWriteProtected:
		return uint16(unix.EROFS) // as other back ends say it
	}
	e := s.Errno()
	if e == 0 || e == int(unix.EAGAIN) {
		e = int(unix.EIO)
	}
	return uint16(e)
}
