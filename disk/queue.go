package disk

import (
	"context"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/iostats"
	"ublk-nvmeof/poller"
)

// queue is a block.Queue with its loop. Any goroutine takes a slot, fills it in and starts
// it. The slot goes to the loop through the inbox, and its result comes back in the slot.
type queue struct {
	loop  *poller.Loop
	back  block.Queue
	slots []slot // by tag

	// Any goroutine uses these.
	_     cpu.CacheLinePad
	inbox stack // slots to submit
	_     cpu.CacheLinePad
	pool  pool
	// sleeper is set while the thread of a caller waits in the kernel (slot.sleep).
	sleeper atomic.Bool
	dead    atomic.Bool // the loop has ended
	burying sync.Mutex

	// The loop alone uses these.
	_        cpu.CacheLinePad
	reqs     []block.Request
	done     [32]block.Result
	inflight int
	told     []*Batch // to wake up at the end of a pass
	expects  bool     // a caller that was woken up is likely to come back
	iostats.Counters
}

// slot is a tag with its buffer. It belongs to the goroutine that has taken it, except
// from start until its state is stateDone.
type slot struct {
	next   *slot // in an inbox or in the list of a batch
	queue  *queue
	buf    []byte
	req    block.Request // Tag is constant
	errno  uint16
	status uint16
	state  atomic.Uint32
	parked chan struct{} // has a token if the slot was finished while its owner was parked
	batch  *Batch        // that gets the slot when it is finished; nil: the owner waits for it
}

// States of a slot.
const (
	stateIdle      uint32 = iota
	stateClaimed          // of a batch, and about to be started: bury must not touch it
	stateFlying           // started
	stateParked           // started, and the owner waits for a token
	stateAsleep           // started, and the thread of the owner waits in the kernel
	stateAbandoned        // started, and the owner has left: the loop releases it
	stateDone             // errno and status are valid
)

// start passes a filled-in slot to the loop. Any goroutine but the loop may call it.
func (s *slot) start() {
	s.state.Store(stateFlying)
	s.queue.inbox.push(s, s)
	s.queue.wake()
}

// wake makes the loop look at the inbox.
func (q *queue) wake() {
	q.loop.Wake()
	if q.dead.Load() {
		q.bury()
	}
}

// watch fails all requests if the loop ends before stop is closed.
func (q *queue) watch(stop <-chan struct{}) {
	select {
	case <-q.loop.Done():
	case <-stop:
		return
	}
	q.dead.Store(true)
	q.bury()
	q.pool.closeBecause(poller.ErrStopped)
}

// bury fails the requests of a loop that has ended. The back end may still hold some of them,
// so their memory is not used again.
func (q *queue) bury() {
	q.burying.Lock()
	defer q.burying.Unlock()
	for i := range q.slots {
		s := &q.slots[i]
		if state := s.state.Load(); state != stateIdle && state != stateClaimed && state != stateDone {
			s.finish(block.Result{Errno: uint16(unix.EIO)})
		}
	}
	q.tell()
}

// stack is a list of slots that any goroutine may add to, and one takes as a whole.
type stack struct{ atomic.Pointer[slot] }

// push puts a chain of slots on top, from first to last.
func (t *stack) push(first, last *slot) {
	for {
		head := t.Load()
		last.next = head
		if t.CompareAndSwap(head, first) {
			return
		}
	}
}

// wait waits for a slot that was started. If ctx is done first, the slot is given away, and
// wait returns false.
func (s *slot) wait(ctx context.Context) bool {
	done := ctx.Done()
	if done == nil && s.queue.quiet() && s.queue.sleeper.CompareAndSwap(false, true) {
		s.sleep()
		s.queue.sleeper.Store(false)
		return true
	}
	if !s.state.CompareAndSwap(stateFlying, stateParked) {
		return true
	}
	select {
	case <-s.parked:
	case <-done:
		if s.state.CompareAndSwap(stateParked, stateAbandoned) {
			return false
		}
		<-s.parked
	}
	return true
}

// quiet reports whether hardly anybody else has a slot, apart from buffers and batches.
func (q *queue) quiet() bool {
	return int(q.pool.count.Load()+q.pool.lent.Load()) >= len(q.slots)-1
}

// sleep waits for the slot in the kernel. The wake-up of a goroutine takes a loop several
// times as long as that of a thread: the runtime gives the goroutine to the processor of the
// loop, from where another thread takes it after a pause. A single thread at a time waits
// like this, so that callers do not need a thread each.
func (s *slot) sleep() {
	if !s.state.CompareAndSwap(stateFlying, stateAsleep) {
		return
	}
	for s.state.Load() == stateAsleep {
		futexWait(&s.state, stateAsleep)
	}
}

// finish returns a slot to its owner. Only the loop calls it.
func (s *slot) finish(r block.Result) {
	s.errno, s.status = r.Errno, r.Status
	if b := s.batch; b != nil {
		s.state.Store(stateDone)
		b.done.push(s, s)
		if !b.listed {
			b.listed = true
			s.queue.told = append(s.queue.told, b)
		}
		return
	}
	switch s.state.Swap(stateDone) {
	case stateParked:
		s.parked <- struct{}{}
	case stateAsleep:
		futexWake(&s.state)
		s.queue.expects = true
	case stateAbandoned:
		s.queue.pool.release(s)
	}
}

// Poll implements poller.Source.
func (q *queue) Poll() int {
	n := 0
	if q.inbox.Load() != nil {
		n = q.submit()
	}
	for q.inflight > 0 {
		k := q.back.Reap(q.done[:])
		for i := range q.done[:k] {
			r := &q.done[i]
			s := &q.slots[r.Tag]
			q.Count(s.req.Op, r.Errno != 0, uint64(s.req.Sectors)<<block.SectorShift)
			s.finish(*r)
		}
		q.inflight -= k
		n += k
		if k < len(q.done) {
			break
		}
	}
	q.tell()
	if n > 0 {
		q.Publish()
	}
	return n
}

// tell wakes up the owners of the batches that have got slots, once for all slots of a pass.
func (q *queue) tell() {
	for i, b := range q.told {
		b.listed, q.told[i] = false, nil
		if b.tell() {
			q.expects = true
		}
	}
	q.told = q.told[:0]
}

// submit submits what is in the inbox, in the order of arrival.
func (q *queue) submit() int {
	var inOrder *slot
	for s := q.inbox.Swap(nil); s != nil; {
		next := s.next
		s.next = inOrder
		inOrder, s = s, next
	}
	q.reqs = q.reqs[:0]
	for s := inOrder; s != nil; s = s.next {
		q.reqs = append(q.reqs, s.req)
	}
	q.inflight += len(q.reqs)
	q.CountBatch()
	q.back.Submit(q.reqs)
	return len(q.reqs)
}

// InFlight implements poller.Flight. The loop spins for a caller that does one request after
// the other, as long as that pays.
func (q *queue) InFlight() bool { return q.expects }

// Arm implements poller.Source.
func (q *queue) Arm() poller.Readiness {
	q.expects = false
	if q.inbox.Load() != nil {
		return poller.Busy
	}
	return poller.Sleep
}

// pool has the slots of a queue that nobody has taken.
type pool struct {
	count   atomic.Int32  // of free slots, less those that are waited for
	lent    atomic.Int32  // slots of buffers and batches
	mu      sync.Mutex    // guards what follows
	free    []*slot       // the last one is used first, because its memory is warm
	waiters []*waiter     // in the order of their arrival; none if a slot is free
	taken   int           // slots that are out
	closed  error         // not nil: why no slot can be taken
	idle    chan struct{} // not nil: closed when no slot is out
}

// waiter is a goroutine that waits for a slot. It gets nil if the pool is closed.
type waiter struct{ slot chan *slot }

var waiters = sync.Pool{New: func() any { return &waiter{make(chan *slot, 1)} }}

// tryTake takes a free slot, or returns nil.
func (p *pool) tryTake() *slot {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lockedTake()
}

func (p *pool) lockedTake() *slot {
	n := len(p.free)
	if n == 0 || p.closed != nil {
		return nil
	}
	s := p.free[n-1]
	p.free = p.free[:n-1]
	p.taken++
	p.count.Add(-1)
	return s
}

// take takes a slot, and waits for one.
func (p *pool) take(ctx context.Context) (*slot, error) {
	p.mu.Lock()
	if err := p.closed; err != nil {
		p.mu.Unlock()
		return nil, err
	}
	if s := p.lockedTake(); s != nil {
		p.mu.Unlock()
		return s, nil
	}
	w := waiters.Get().(*waiter)
	p.waiters = append(p.waiters, w)
	p.count.Add(-1)
	p.mu.Unlock()
	defer waiters.Put(w)
	select {
	case s := <-w.slot:
		return p.got(s)
	case <-ctx.Done():
	}
	if p.leave(w) {
		return nil, context.Cause(ctx)
	}
	return p.got(<-w.slot)
}

// got returns what a waiter has got.
func (p *pool) got(s *slot) (*slot, error) {
	if s == nil {
		return nil, p.reason()
	}
	return s, nil
}

// reason returns why no slot can be taken, or nil.
func (p *pool) reason() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closed
}

// leave removes a waiter. It returns false if the waiter gets a slot.
func (p *pool) leave(w *waiter) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, x := range p.waiters {
		if x == w {
			p.waiters = append(p.waiters[:i], p.waiters[i+1:]...)
			p.count.Add(1)
			return true
		}
	}
	return false
}

// release gives a slot back. Any goroutine may call it.
func (p *pool) release(s *slot) {
	s.batch = nil
	s.state.Store(stateIdle)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count.Add(1)
	if len(p.waiters) > 0 {
		w := p.waiters[0]
		copy(p.waiters, p.waiters[1:])
		p.waiters = p.waiters[:len(p.waiters)-1]
		w.slot <- s
		return
	}
	p.free = append(p.free, s)
	if p.taken--; p.taken == 0 && p.idle != nil {
		close(p.idle)
		p.idle = nil
	}
}

// close refuses further slots, and returns a channel that is closed when none is out.
func (p *pool) close() <-chan struct{} {
	p.closeBecause(ErrClosed)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.idle == nil {
		p.idle = make(chan struct{})
	}
	idle := p.idle
	if p.taken == 0 {
		close(p.idle)
		p.idle = nil
	}
	return idle
}

// closeBecause refuses further slots. Only the first reason counts.
func (p *pool) closeBecause(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed == nil {
		p.closed = err
	}
	for _, w := range p.waiters {
		w.slot <- nil
	}
	p.waiters = nil
}
