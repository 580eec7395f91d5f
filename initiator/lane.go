package initiator

import (
	"sync/atomic"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/poller"
)

// nClasses is the number of queue classes.
const nClasses = len(poller.Classes)

// request is one I/O on its way. Its owner is the lane that works on it; the
// inbox passes it from one to the other. A queue has one per tag, for ever.
type request struct {
	next   *request // in a fifo or an inbox
	home   *queue
	io     block.Request
	class  poller.Class
	errno  uint16
	tries  uint8
	done   bool   // on its way home
	posted uint32 // Controller.clock when it was last sent
}

// fifo is an intrusive list of requests.
type fifo struct{ head, tail *request }

func (f *fifo) push(r *request) {
	r.next = nil
	if f.tail == nil {
		f.head = r
	} else {
		f.tail.next = r
	}
	f.tail = r
}

func (f *fifo) pop() *request {
	r := f.head
	if r == nil {
		return nil
	}
	if f.head = r.next; f.head == nil {
		f.tail = nil
	}
	return r
}

// take empties the list and gives what was in it.
func (f *fifo) take() fifo {
	all := *f
	*f = fifo{}
	return all
}

// lane is what a controller does on one loop. Its fields are the loop's, except
// those that say otherwise.
type lane struct {
	ctrl  *Controller
	loop  *poller.Loop
	index int

	pairs []*pair         // those that this lane drives
	route [nClasses]*pair // who serves a class; nil without an association
	held  fifo            // requests that wait for an association
	fast  bool            // without an association requests fail, and do not wait

	_ cpu.CacheLinePad
	// inbox is a stack of requests from other lanes: to be sent by a pair of
	// this lane, or coming home. It needs no bound of its own, as each request
	// is in it at most once. Any goroutine.
	inbox atomic.Pointer[request]
	_     cpu.CacheLinePad
	// Counters, written by the lane and read by anyone.
	submitted, completed, handedOver, retried atomic.Uint64
	_                                         cpu.CacheLinePad
}

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

// send puts a request into another lane's inbox. Any goroutine.
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
	// The stack has the newest on top; work in the order of arrival.
	var inOrder *request
	n := 0
	for r := l.inbox.Swap(nil); r != nil; n++ {
		next := r.next
		r.next = inOrder
		inOrder, r = r, next
	}
	for r := inOrder; r != nil; {
		next := r.next
		if r.done {
			r.done = false
			r.home.done.push(r)
		} else {
			l.dispatch(r)
		}
		r = next
	}
	return n
}

// dispatch gives a request to the pair that serves its class.
func (l *lane) dispatch(r *request) {
	p := l.route[r.class]
	switch {
	case r.home.ns.gone.Load():
		l.finish(r, uint16(unix.ENODEV))
	case p != nil && p.lane == l:
		p.start(r)
	case p != nil:
		l.handedOver.Store(l.handedOver.Load() + 1)
		p.lane.send(r)
	case l.fast:
		l.finish(r, uint16(unix.ENOLINK))
	default:
		l.held.push(r)
	}
}

// finish ends a request and brings it home.
func (l *lane) finish(r *request, errno uint16) {
	r.errno = errno
	if r.home.lane == l {
		r.home.done.push(r)
		return
	}
	r.done = true
	r.home.lane.send(r)
}

// connect gives the lane its part of an association, and starts what was held.
// Other lanes may still be without theirs, so requests are only dispatched to
// pairs of this lane or handed over to lanes that hold them until then.
func (l *lane) connect(pairs []*pair, route [nClasses]*pair) {
	l.pairs, l.route, l.fast = pairs, route, false
	l.again()
}

// again dispatches what is held.
func (l *lane) again() {
	held := l.held.take()
	for r := held.pop(); r != nil; r = held.pop() {
		l.dispatch(r)
	}
}

// disconnect takes the association away. Requests in flight stay with their
// pairs until recover.
func (l *lane) disconnect() {
	l.pairs, l.route = nil, [nClasses]*pair{}
}

// recover holds the requests of a pair that is in the error state, so that the
// next association sends them again.
func (l *lane) recover(p *pair) {
	for slot, r := range p.requests {
		if r != nil {
			p.requests[slot] = nil
			l.dispatch(r)
		}
	}
	waiting := p.waiting.take()
	for r := waiting.pop(); r != nil; r = waiting.pop() {
		l.dispatch(r)
	}
}

// failFast fails what is held, and what comes until there is an association.
func (l *lane) failFast() {
	l.fast = true
	l.again()
}
