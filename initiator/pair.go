package initiator

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
)

// maxRetries bounds how often a command is sent again after an error status
// without Do Not Retry (nvme_core.max_retries).
const maxRetries = 5

// pathRetryDelay is the time until a command is sent again that failed for a
// reason on the way to the namespace.
const pathRetryDelay = 200 * time.Millisecond

// pair is an I/O queue pair on the lane that drives it. All of it is the
// lane's.
type pair struct {
	*connection
	assoc *association
	lane  *lane
	class poller.Class

	inCapsule uint32 // bytes of data that a capsule may carry
	checkHead bool   // SQ flow control is on, so responses carry SQHD
	requests  []*request
	waiting   fifo // requests without a slot
	reaped    []uint16
	receiver  rdma.Receiver // nil: the provider takes the packets
	armed     bool          // an event will come for the next response
	lost      bool          // the queue pair failed; it is left alone
	unacked   int
}

func newPair(a *association, conn *connection, l *lane, class poller.Class, inCapsule uint32, checkHead bool) *pair {
	return &pair{
		connection: conn, assoc: a, lane: l, class: class, inCapsule: inCapsule, checkHead: checkHead,
		requests: make([]*request, conn.sq.Slots()),
		reaped:   make([]uint16, conn.sq.Slots()),
	}
}

// attach makes the loop hear of what comes for the pair. Loop only.
func (p *pair) attach() error {
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
	if fd >= 0 { // else the loop polls, which looks for packets
		if err := l.WatchReadable(r.PacketFD(), packets{r}); err != nil {
			return err
		}
	}
	p.receiver = r
	r.Receiving(true)
	return nil
}

// detach undoes attach. Any goroutine but the loop.
func (p *pair) detach() error {
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

// packets is the Watcher of the packets of a pair.
type packets struct{ rdma.Receiver }

// Event implements poller.Watcher.
func (r packets) Event(int) { r.Receive() }

// start sends a request with the next flush, or queues it for a slot.
func (p *pair) start(r *request) {
	if p.lost || p.waiting.head != nil || !p.push(r) {
		p.waiting.push(r)
	}
}

// push builds the command of a request; false without a free slot.
func (p *pair) push(r *request) bool {
	slot, cmd, ok := p.sq.Get()
	if !ok {
		return false
	}
	p.requests[slot] = r
	r.posted = p.lane.ctrl.clock.Load()
	ns := r.home.ns
	lba := r.io.Sector >> ns.sectorShift
	blocks := r.io.Sectors >> ns.sectorShift
	var capsule rdma.SGE
	switch r.io.Op {
	case block.OpRead:
		cmd.SetRead(ns.id, lba, blocks, false)
		cmd.SetKeyedSGL(r.home.addr(r.io.Tag), r.io.Sectors<<block.SectorShift, r.home.rkey, false)
	case block.OpWrite:
		cmd.SetWrite(ns.id, lba, blocks, r.io.Flags&block.FUA != 0)
		capsule = p.inline(cmd, r, r.io.Sectors<<block.SectorShift)
	case block.OpFlush:
		cmd.SetFlush(ns.id)
	case block.OpDiscard:
		cmd.SetDSM(ns.id, 1)
		capsule = p.inline(cmd, r, putRange(r.home.Buffer(r.io.Tag), blocks, lba))
	case block.OpWriteZeroes:
		cmd.SetWriteZeroes(ns.id, lba, blocks, r.io.Flags&block.FUA != 0, ns.deallocateZeroes && r.io.Flags&block.NoUnmap == 0)
	}
	p.sq.Push(slot, capsule)
	return true
}

// inline gives a command the first n bytes of its request's buffer to read: in
// the capsule if they fit, by key otherwise.
func (p *pair) inline(cmd *nvme.Command, r *request, n uint32) rdma.SGE {
	if n <= p.inCapsule {
		cmd.SetInCapsuleSGL(0, n)
		return rdma.SGE{Addr: r.home.addr(r.io.Tag), Length: n, LKey: r.home.lkey}
	}
	cmd.SetKeyedSGL(r.home.addr(r.io.Tag), n, r.home.rkey, false)
	return rdma.SGE{}
}

// rangeListSize is the length of the buffer of a DSM command whatever the
// number of ranges: there are controllers that always read all of it.
const rangeListSize = 4096

func putRange(b []byte, blocks uint32, lba uint64) uint32 {
	b = b[:rangeListSize]
	clear(b)
	nvme.PutDSMRange(b, 0, blocks, lba)
	return rangeListSize
}

// poll posts what was pushed and takes what was answered.
func (p *pair) poll() int {
	if p.lost {
		return 0
	}
	n, err := p.sq.Flush()
	if err != nil {
		p.fail(err)
		return n
	}
	if p.sq.Outstanding() > 0 {
		n += p.answers()
	}
	if p.sq.Scarce() && !p.lost {
		n += p.sends()
	}
	for p.waiting.head != nil && p.push(p.waiting.head) {
		p.waiting.pop()
		n++
	}
	return n
}

func (p *pair) answers() int {
	events, err := p.cq.Poll()
	for i := range events {
		e := &events[i]
		slot, ok := p.sq.Match(e.Completion.CID())
		switch {
		case !ok:
			p.fail(fmt.Errorf("response to command id %#x, which is not outstanding", e.Completion.CID()))
			return i
		case e.Invalidated:
			p.fail(fmt.Errorf("target invalidated key %#x without being asked to", e.InvalidatedKey))
			return i
		case p.checkHead && !p.sq.CheckHead(e.Completion.SQHead()):
			p.fail(fmt.Errorf("response with submission queue head %d beyond the queue", e.Completion.SQHead()))
			return i
		}
		r := p.requests[slot]
		status := e.Completion.Status()
		r.errno = 0
		if !status.OK() {
			r.errno = errnoOf(status)
			if retryable(status) && r.tries < maxRetries {
				p.retry(slot, r, status)
				continue
			}
			p.lane.ctrl.reportStatus(r, status)
		}
		if p.sq.Answer(slot) {
			p.requests[slot] = nil
			p.lane.finish(r, r.errno)
		}
	}
	if err != nil {
		p.fail(err)
	}
	return len(events)
}

// retryable says that the target may do better next time.
func retryable(s nvme.Status) bool { return !s.DNR() }

// retry sends a command again, after the delay that the target asked for. It
// may allocate: errors are not the hot path.
func (p *pair) retry(slot uint16, r *request, status nvme.Status) {
	r.tries++
	l := p.lane
	l.retried.Store(l.retried.Load() + 1)
	// A retry uses the buffer again, it does not give it back, so the SEND that
	// may still read it does not matter.
	p.sq.Answer(slot)
	p.requests[slot] = nil
	delay := time.Duration(p.assoc.identify.CRDT(status.CRD())) * 100 * time.Millisecond
	if delay == 0 && status.IsPathError() {
		// Of a namespace that is about to go, too; the event may take a moment.
		delay = pathRetryDelay
	}
	if delay == 0 {
		p.start(r)
		return
	}
	time.AfterFunc(delay, func() { l.send(r) })
}

// sends collects completed SENDs.
func (p *pair) sends() int {
	n, err := p.sq.Reap(p.reaped)
	for _, slot := range p.reaped[:n] {
		// A command that is sent again has left its slot already.
		if r := p.requests[slot]; r != nil {
			p.requests[slot] = nil
			p.lane.finish(r, r.errno)
		}
	}
	if err != nil {
		p.fail(err)
	}
	return n
}

// arm implements the pair's part of poller.Source.
func (p *pair) arm() poller.Readiness {
	switch {
	case p.lost:
		return poller.Sleep
	case p.sq.Pending() > 0:
		return poller.Busy
	case p.sq.Held() > 0:
		// The response was faster than the acknowledgement of its SEND, which
		// is on its way.
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
	return poller.Sleep // the loop polls once more before it does
}

// Event implements poller.Watcher.
func (p *pair) Event(n int) {
	p.armed = false
	// Accounting takes a lock in libibverbs.
	if p.unacked += n; p.unacked >= 64 {
		p.ack()
	}
}

func (p *pair) ack() {
	if p.unacked > 0 {
		p.cq.Ack(p.unacked)
		p.unacked = 0
	}
}

// fail leaves the queue pair alone and gives up the association.
func (p *pair) fail(err error) {
	if !p.lost {
		p.lost = true
		p.assoc.fail(fmt.Errorf("I/O queue %d: %w", p.qid, err))
	}
}

// tend looks after the commands in flight, with each tick of the controller's clock.
// One that has waited for more than limit ticks ends the association. Before that the
// target may only be slow; whether its adapter still knows the queue pair is asked.
func (p *pair) tend(now, limit uint32) {
	if p.lost {
		return
	}
	slow := false
	for _, r := range p.requests {
		if r == nil {
			continue
		}
		age := now - r.posted
		if age > limit {
			p.fail(fmt.Errorf("%v at sector %d was not answered within %v", r.io.Op, r.io.Sector, p.lane.ctrl.cfg.IOTimeout))
			return
		}
		slow = slow || age > 1
	}
	if slow {
		if err := p.sq.Probe(); err != nil {
			p.fail(err)
		}
	}
}

// errnoOf keeps what the block layer must never see away from it: EAGAIN makes
// io_uring clients retry for ever.
func errnoOf(s nvme.Status) uint16 {
	if s.Code() == nvme.StatusInvalidNamespace {
		return uint16(unix.ENODEV) // as for a namespace that is known to be gone
	}
	e := s.Errno()
	if e == 0 || e == int(unix.EAGAIN) {
		e = int(unix.EIO)
	}
	return uint16(e)
}
