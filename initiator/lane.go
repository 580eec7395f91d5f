package initiator

import (
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"

	"ublk-nvmeof/poller"
)

// nClasses is the number of queue classes.
const nClasses = len(poller.Classes)

// lane is the part of a subsystem on one loop. Only the loop uses its fields, unless a
// comment says otherwise.
//
// A request that has left its namespace queue is in one of five places: in flight or
// waiting for a slot in a queue pair, in the inbox of a lane, parked on a lane, or
// finished. The end of an association, a namespace or the subsystem visits all places.
type lane struct {
	sub   *Subsystem
	loop  *poller.Loop
	index int

	pairs  []*queuePair    // queue pairs of this lane
	routes [MaxPaths]route // of the paths with an association, by slot
	slots  int             // number of slots that may have a route

	policy    Policy
	preferred int // slot of the policy Preferred
	last      int // slot of the last request
	turn      int // slot before the one that pick looks at first

	parked fifo          // requests that cannot be sent now
	barred *Namespace    // whose barrier has parked a request last; nil: none
	alarm  *time.Timer   // runs redispatch for parked requests with a due time
	ring   time.Duration // time of the alarm, on Subsystem.now's clock
	fast   bool          // without an association, requests fail instead of waiting

	sampler sampler // of the requests that front ends submit here
	stamps  uint64  // number of times that stamp has read the clock

	_ cpu.CacheLinePad
	// inbox is a stack of requests from other lanes. A queue pair of this lane must send
	// them, or they are done and return to their home lane. Its length is limited because
	// each request is in it at most once. Any goroutine may use it.
	inbox atomic.Pointer[request]
	_     cpu.CacheLinePad
	// The lane writes these counters; any goroutine may read them.
	submitted, completed, handedOver, retried atomic.Uint64
	held                                      atomic.Int64 // length of parked
	stages                                    [nStages]opHistograms
	_                                         cpu.CacheLinePad
}

// route has the queue pair of a path that serves each class; nil without an association.
type route [nClasses]*queuePair

// Poll implements poller.Source.
func (l *lane) Poll() int {
	n := 0
	if l.inbox.Load() != nil {
		n = l.receive()
	}
	for _, p := range l.pairs {
		n += p.poll()
	}
	return n
}

// Flush implements poller.Flusher.
func (l *lane) Flush() int {
	n := 0
	for _, p := range l.pairs {
		n += p.flush()
	}
	return n
}

// Arm implements poller.Source.
func (l *lane) Arm() poller.Readiness {
	answer := poller.Sleep
	for _, p := range l.pairs {
		switch p.arm() {
		case poller.Busy:
			return poller.Busy
		case poller.Spin:
			answer = poller.Spin
		}
	}
	if l.inbox.Load() != nil {
		return poller.Busy
	}
	return answer
}

// InFlight implements poller.Flight. It is for queue pairs whose packets the loop takes.
func (l *lane) InFlight() bool {
	for _, p := range l.pairs {
		if p.receiver != nil && p.sq.Outstanding() > 0 {
			return true
		}
	}
	return false
}

// send puts a request into this lane's inbox. Any goroutine may call it.
func (l *lane) send(r *request) {
	for {
		head := l.inbox.Load()
		r.next = head
		if l.inbox.CompareAndSwap(head, r) {
			break
		}
	}
	l.loop.Wake()
}

func (l *lane) receive() int {
	// The newest request is on top of the stack. Reverse it to the order of arrival.
	var inOrder *request
	n := 0
	for r := l.inbox.Swap(nil); r != nil; n++ {
		next := r.next
		r.next = inOrder
		inOrder, r = r, next
	}
	for r := inOrder; r != nil; {
		next := r.next
		switch {
		case r.done:
			r.done = false
			r.home.done.push(r)
		case !r.via.gone:
			r.via.start(r)
		default: // its association has ended meanwhile
			l.dispatch(r)
		}
		r = next
	}
	return n
}

// dispatch gives a request to a queue pair that serves its class, or finishes or parks it.
func (l *lane) dispatch(r *request) {
	ns := r.home.ns
	if r.inRegion && r.withdrawn() {
		l.finish(r, uint16(unix.EFAULT))
		return
	}
	if l.barred == ns && ns.barrier.Load() == nil {
		l.barred = nil
		l.redispatch() // the changes that waited come first
	}
	if (r.troubled || ns.presence.Load() != served || ns.barrier.Load() != nil) && !l.admit(r) {
		return
	}
	p := l.pick(r)
	switch {
	case p == nil:
		l.strand(r)
	case p.lane == l:
		l.took(p.slot)
		p.start(r)
	default:
		l.took(p.slot)
		l.handedOver.Store(l.handedOver.Load() + 1)
		r.via = p
		p.lane.send(r)
	}
}

// connected reports whether any path has an association.
func (l *lane) connected() bool {
	for slot := range l.routes {
		if l.routes[slot][poller.Default] != nil {
			return true
		}
	}
	return false
}

// admit reports whether a request may be sent now, if there is a path. If not, admit finishes
// or parks it.
func (l *lane) admit(r *request) bool {
	if r.direct != nil {
		return l.admitDirect(r)
	}
	switch presence := r.home.ns.presence.Load(); {
	case presence == gone:
		l.finish(r, uint16(unix.ENODEV))
		return false
	case presence == failing, presence == inaccessible:
		l.finish(r, uint16(unix.ENOLINK))
		return false
	case l.pick(r) == nil:
		l.strand(r)
		return false
	case r.home.ns.barred(r):
		if l.sub.heldTooLong(r) {
			l.finish(r, uint16(unix.ENOLINK))
		} else {
			l.barred = r.home.ns
			l.park(r)
		}
		return false
	}
	if r.due > l.sub.now() {
		l.parkUntil(r)
		return false
	}
	r.due = 0
	if r.suspect() && l.sub.suspect.Load() != r && !l.sub.suspect.CompareAndSwap(nil, r) {
		l.park(r)
		return false
	}
	return true
}

// strand parks a request for which there is no path, or fails it if such requests fail.
func (l *lane) strand(r *request) {
	if l.fast && !l.connected() {
		l.finish(r, uint16(unix.ENOLINK))
		return
	}
	l.park(r)
}

// park keeps a request that cannot be sent now.
func (l *lane) park(r *request) {
	l.parked.push(r)
	l.held.Store(l.held.Load() + 1)
}

// delay parks a request for some time.
func (l *lane) delay(r *request, d time.Duration) {
	r.troubled, r.due = true, l.sub.now()+d
	l.parkUntil(r)
}

// parkUntil parks a request until its due time. Only requests in trouble need a timer; the
// hot path needs none.
func (l *lane) parkUntil(r *request) {
	l.park(r)
	if l.alarm != nil {
		if l.ring <= r.due {
			return
		}
		l.alarm.Stop()
	}
	l.ring = r.due
	// Call fails only if the loop has ended, and such a loop holds no requests.
	l.alarm = time.AfterFunc(r.due-l.sub.now(), func() { _ = l.loop.Call(l.redispatch) })
}

// redispatch dispatches every parked request again.
func (l *lane) redispatch() {
	if l.alarm != nil {
		l.alarm.Stop()
		l.alarm = nil
	}
	parked := l.parked.take()
	l.held.Store(0)
	for r := parked.pop(); r != nil; r = parked.pop() {
		l.dispatch(r)
	}
}

// finish ends a request and returns it to its home lane.
func (l *lane) finish(r *request, errno uint16) {
	r.errno = errno
	if r.troubled {
		if r.direct != nil {
			close(r.direct.done)
			return
		}
		if l.sub.suspect.CompareAndSwap(r, nil) {
			// Other requests may wait to be the suspect. This needs a goroutine, because
			// redispatch waits for this loop.
			go l.sub.redispatch()
		}
	}
	if r.home.lane == l {
		r.home.done.push(r)
		return
	}
	r.done = true
	r.home.lane.send(r)
}

// connect gives the lane its part of an association, and dispatches the parked requests.
// Other lanes may not have their part yet. A queue pair that is not polled yet keeps the
// requests that are handed over to it until then.
func (l *lane) connect(slot int, pairs []*queuePair, r route) {
	l.pairs = append(l.pairs, pairs...)
	l.routes[slot], l.fast = r, false
	l.slots = max(l.slots, slot+1)
	l.redispatch()
}

// disconnect removes the association of a path from the lane. Requests in flight stay with
// their queue pairs until recover.
func (l *lane) disconnect(slot int) {
	l.routes[slot] = route{}
	l.pairs = slices.DeleteFunc(l.pairs, func(p *queuePair) bool {
		p.gone = p.gone || p.slot == slot
		return p.gone
	})
}

// recover dispatches the requests of a queue pair in the error state, so that another path or
// the next association sends them again. They come before those that were parked meanwhile,
// because these may be later changes to the same blocks.
func (l *lane) recover(p *queuePair) {
	later := l.parked.take()
	for slot, r := range p.requests {
		if r == nil {
			continue
		}
		p.requests[slot] = nil
		r.status = 0 // if it was answered, it is sent again
		p.assoc.ctrl.failovers.Add(1)
		if r.direct != nil {
			r.direct.err = ErrUncertain
			l.finish(r, uint16(unix.ENOLINK))
			continue
		}
		if p.assoc.ctrl.blame(r) {
			l.sub.reportBlame(r)
			l.finish(r, uint16(unix.EIO))
			continue
		}
		l.dispatch(r)
	}
	waiting := p.waiting.take()
	for r := waiting.pop(); r != nil; r = waiting.pop() {
		l.dispatch(r)
	}
	p.inflight.Store(0)
	for r := later.pop(); r != nil; r = later.pop() {
		l.parked.push(r)
	}
	l.redispatch()
}

// failFast fails the parked requests, and all requests until there is an association.
func (l *lane) failFast() {
	l.fast = true
	l.redispatch()
}
