package poller

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/cpu"

	"ublk-nvmeof/internal/spin"
	"ublk-nvmeof/internal/uring"
)

// ErrStopped means that the loop has ended.
var ErrStopped = errors.New("loop stopped")

// Config configures a Loop. The zero value is usable.
type Config struct {
	// Name is used in errors and as the name of the thread, of which the kernel keeps
	// 15 bytes. "" means "loop".
	Name string
	// CPUs are the CPUs on which the thread may run. nil means all CPUs of the
	// process.
	CPUs []int
	// Entries is the size of the ring's submission queue. Zero means 512. The
	// completion queue is 4 times as large.
	Entries int
	// Spin is the number of polls without a result before the loop waits in the kernel,
	// while something is in flight that causes no event. Zero means 2048, and a negative
	// value means none. For what causes one (Flight) there are at most spin.Polls.
	Spin int

	pollAdd bool // watch files as on a kernel without READ_MULTISHOT
}

const (
	defaultEntries = 512
	cqPerSQ        = 4
	defaultSpin    = 2048

	// dispatchBudget limits the completions of one pass, so that sources get their
	// turn.
	dispatchBudget = 256

	// boundedWait is the time of a wait that keeps the scheduler's P. It is longer
	// than the gaps in traffic, and so short that the scheduler does not miss the P.
	boundedWait = 2 * time.Millisecond
	// backoffMin and backoffMax limit the waits between polls for work that causes no
	// event and did not arrive during the spin.
	backoffMin = 50 * time.Microsecond
	backoffMax = 200 * time.Microsecond

	// maxHandlers is the size of the handler table. Slots are used in turn, so that a
	// late completion finds an empty slot.
	maxHandlers = 1 << 10

	dataBits = 48
	dataMask = 1<<dataBits - 1
)

// Loop is a goroutine locked to a thread, with one ring. It serves sources, watchers and
// handlers. See the package documentation.
type Loop struct {
	cfg  Config
	done chan struct{}
	err  error // why the loop ended; written before done is closed
	wake int   // eventfd; closed after the end, when waking is 0

	// Shared with other goroutines
	_       cpu.CacheLinePad
	asleep  atomic.Bool  // the loop is about to wait, so Wake must write
	queued  atomic.Bool  // calls is not empty
	waking  atomic.Int32 // goroutines that may write to wake
	wakes   atomic.Uint64
	mu      sync.Mutex // guards calls and tid
	calls   []*call
	tid     int // id of the thread; 0 after the end, when another thread may have it
	_       cpu.CacheLinePad
	publics publicStats
	_       cpu.CacheLinePad
	times   times
	born    time.Time

	// Only the loop uses these.
	ring     *uring.Ring
	bufs     *uring.BufRing // nil: no READ_MULTISHOT
	quarter  int            // a quarter of the size of the submission queue
	sources  []Source
	flushers []Flusher // the sources that implement Flusher
	flights  []Flight  // the sources that implement Flight
	handlers [maxHandlers]Handler
	last     int // slot that was assigned last
	handled  int // number of handlers, without watches
	watches  []*watch
	stats    Stats
	spinner  spin.Spinner
	spins    spinClock
	thread   int // the value of tid while the loop runs
	backoff  time.Duration
	stopping bool
	sink     uring.SQE // receives commands after the ring has failed
	readBuf  [watchBufferSize]byte
	failure  error // error of the ring; ends the loop
}

// call is a function to run on the loop.
type call struct {
	fn   func()
	done chan struct{}
}

// New starts a loop and returns when it runs. Any goroutine may call it.
//
// The error is that of making the ring (see uring.New), or of setting the affinity:
// EINVAL if none of the CPUs is usable.
func New(cfg Config) (*Loop, error) {
	if cfg.Name == "" {
		cfg.Name = "loop"
	}
	if cfg.Entries == 0 {
		cfg.Entries = defaultEntries
	}
	if cfg.Spin == 0 {
		cfg.Spin = defaultSpin
	}
	l := &Loop{cfg: cfg, done: make(chan struct{}), wake: -1, backoff: backoffMin, born: time.Now(), spinner: spin.New()}
	up := make(chan error, 1)
	go onThread(func() { l.main(up) })
	if err := <-up; err != nil {
		<-l.done
		return nil, fmt.Errorf("start %s: %w", cfg.Name, err)
	}
	return l, nil
}

// main runs the loop on its own thread.
func (l *Loop) main(up chan<- error) {
	ended := errors.New("a function called on it ended the goroutine")
	defer func() { l.finish(ended) }()
	if err := l.setUp(); err != nil {
		ended = err
		up <- err
		return
	}
	up <- nil
	for l.failure == nil && !l.drained() {
		if l.pass() == 0 {
			l.idle()
		}
	}
	ended = l.failure
}

// setUp makes the resources of the loop.
func (l *Loop) setUp() error {
	l.mu.Lock()
	l.tid = threadID()
	l.thread = l.tid
	l.mu.Unlock()
	nameThread(l.cfg.Name)
	if err := l.SetAffinity(l.cfg.CPUs); err != nil {
		return err
	}
	var err error
	l.ring, err = uring.New(uring.Config{
		Entries: uint32(l.cfg.Entries), CQEntries: uint32(cqPerSQ * l.cfg.Entries), Loop: true,
	})
	if err != nil {
		return err
	}
	l.quarter = l.ring.Entries() / 4
	if l.ring.Supports(uring.OpReadMultishot) && !l.cfg.pollAdd {
		if l.bufs, err = l.ring.RegisterBufRing(watchGroup, watchBuffers, watchBufferSize); err != nil {
			return err
		}
	}
	if l.wake, err = newEventfd(); err != nil {
		return fmt.Errorf("make eventfd: %w", err)
	}
	return l.Watch(l.wake, awake{})
}

// awake is the Watcher of the eventfd of Wake. It does nothing, because the wake-up is
// enough.
type awake struct{}

func (awake) Event(int) {}

// finish ends the loop on its thread. It releases waiting goroutines after it has freed
// everything.
func (l *Loop) finish(err error) {
	if err != nil {
		l.err = fmt.Errorf("%s: %w", l.cfg.Name, err)
	}
	if l.ring != nil {
		if err := l.ring.Close(); err != nil && l.err == nil {
			l.err = fmt.Errorf("%s: %w", l.cfg.Name, err)
		}
	}
	for _, w := range l.watches { // after a failure
		w.close()
	}
	l.addTimes(new(Stats))
	l.mu.Lock()
	l.tid = 0
	l.mu.Unlock()
	l.asleep.Store(false)
	closeEventfd(l.wake, &l.waking)
	l.publics.publish(&l.stats)
	close(l.done)
}

// drained reports whether a stopping loop has nothing left to serve. Watches are canceled
// last, because handlers may need their events to finish.
func (l *Loop) drained() bool {
	if !l.stopping || l.handled > 0 {
		return false
	}
	for _, w := range slices.Clone(l.watches) { // cancel may remove one
		l.cancel(w)
	}
	return len(l.watches) == 0
}

// Done returns a channel that is closed when the loop has ended. Any goroutine may call
// it.
func (l *Loop) Done() <-chan struct{} { return l.done }

// Err returns the reason why the loop ended. It returns nil while the loop runs, and
// after Stop. Any goroutine may call it.
func (l *Loop) Err() error {
	if l.hasEnded() {
		return l.err
	}
	return nil
}

func (l *Loop) hasEnded() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// Stop ends the loop. The loop runs until no Handler is left (Unhandle), ends the
// remaining watches, closes the ring, and ends its thread. Stop then returns Err. Any
// goroutine except the loop may call it, also repeatedly.
func (l *Loop) Stop() error {
	// ErrStopped means that the loop has ended already.
	_ = l.Call(func() { l.stopping = true })
	<-l.done
	return l.err
}

// Call runs fn on the loop and waits for it. ErrStopped means that fn did not run, or not
// to its end. Any goroutine may call it except the loop, which would wait for itself.
func (l *Loop) Call(fn func()) error {
	c := &call{fn: fn, done: make(chan struct{})}
	l.mu.Lock()
	l.calls = append(l.calls, c)
	l.queued.Store(true)
	l.mu.Unlock()
	l.Wake()
	select {
	case <-c.done:
		return nil
	case <-l.done:
	}
	select {
	case <-c.done:
		return nil
	default:
		return fmt.Errorf("call on %s: %w", l.cfg.Name, ErrStopped)
	}
}

// runCalls runs the functions of pending Calls.
func (l *Loop) runCalls() int {
	l.mu.Lock()
	calls := l.calls
	l.calls = nil
	l.queued.Store(false)
	l.mu.Unlock()
	for _, c := range calls {
		c.fn()
		close(c.done)
	}
	return len(calls)
}

// Wake makes the loop poll its sources soon. A Poll after Wake sees everything that the
// caller published before Wake. Wake costs an atomic load while the loop is awake, and a
// write to an eventfd if the loop sleeps. Any goroutine may call it. After the end of the
// loop it does nothing.
func (l *Loop) Wake() {
	// The loop sets asleep and then polls. The caller has published its work and now
	// reads asleep. At least one of them sees the other.
	if !l.asleep.Load() {
		return
	}
	l.waking.Add(1)
	if l.asleep.CompareAndSwap(true, false) {
		l.wakes.Add(1)
		signalEventfd(l.wake)
	}
	l.waking.Add(-1)
}

// Attach adds a source. Sources are polled in the order in which they were attached, and
// those that are Flushers then flushed in that order. Only the loop may call it; a source
// may attach others.
func (l *Loop) Attach(s Source) {
	l.sources = append(l.sources, s)
	if f, ok := s.(Flusher); ok {
		l.flushers = append(l.flushers, f)
	}
	if f, ok := s.(Flight); ok {
		l.flights = append(l.flights, f)
	}
}

// Detach removes a source, which is then not polled any more. Only the loop may call it;
// a source may detach itself.
func (l *Loop) Detach(s Source) {
	l.sources = slices.DeleteFunc(l.sources, func(have Source) bool { return have == s })
	l.flushers = slices.DeleteFunc(l.flushers, func(have Flusher) bool { return have == s })
	l.flights = slices.DeleteFunc(l.flights, func(have Flight) bool { return have == s })
}

// Handle makes h the handler of commands with the user data base | data, where data is
// below 2^48. It panics if the loop has more than a thousand handlers and watches. Only
// the loop may call it.
func (l *Loop) Handle(h Handler) (base uint64) {
	base, ok := l.slot(h)
	if !ok {
		panic(fmt.Sprintf("poller: %s has %d handlers", l.cfg.Name, maxHandlers))
	}
	l.handled++
	return base
}

// Unhandle removes a handler. Completions of commands that are still pending are dropped.
// The commands are canceled when the loop stops. Only the loop may call it.
func (l *Loop) Unhandle(base uint64) {
	if l.handlers[base>>dataBits] != nil {
		l.release(base)
		l.handled--
	}
}

// slot assigns an entry of the handler table. Entry 0 belongs to the loop itself.
func (l *Loop) slot(h Handler) (base uint64, ok bool) {
	for range maxHandlers {
		l.last = (l.last + 1) % maxHandlers
		if l.last != 0 && l.handlers[l.last] == nil {
			l.handlers[l.last] = h
			return uint64(l.last) << dataBits, true
		}
	}
	return 0, false
}

func (l *Loop) release(base uint64) { l.handlers[base>>dataBits] = nil }

// entries is what the front ends of this module see of a loop besides its exported methods.
type entries struct{ l *Loop }

func init() {
	uring.OfLoop = func(loop any) uring.Entries { return entries{loop.(*Loop)} }
}

// SQE implements uring.Entries.
func (e entries) SQE() *uring.SQE { return e.l.sqe() }

// Submit implements uring.Entries.
func (e entries) Submit() error { return e.l.ring.Submit() }

// sqe returns a free submission entry, which is zeroed and queued. The caller must fill
// it in before the next call of a method of the loop. If the queue is full, its entries
// are submitted first. After the end of the loop, or of its ring, the entry has no
// effect. Only the loop may call it.
func (l *Loop) sqe() *uring.SQE {
	for {
		if s := l.ring.SQE(); s != nil {
			return s
		}
		l.submit()
		if l.failure != nil {
			l.sink = uring.SQE{}
			return &l.sink
		}
	}
}

// Step makes one pass and submits due entries, but does not wait. It reports whether the
// pass found work. Only the loop may call it. Tests use it, within Call, to drive a loop.
func (l *Loop) Step() bool {
	if l.hasEnded() {
		return false
	}
	if l.pass() > 0 {
		return true
	}
	if l.ring.Pending() > 0 || l.ring.TaskRun() {
		l.submit()
	}
	return false
}

// pass dispatches completions, polls the sources and runs calls. It returns the number of
// things done. After a pass that found no work, pending entries are left to the wait that
// follows.
func (l *Loop) pass() int {
	left := l.ring.Pending() > 0
	n := l.dispatch()
	n += l.poll()
	if l.queued.Load() {
		n += l.runCalls()
	}
	l.stats.Passes++
	if n == 0 {
		return 0
	}
	l.backoff = backoffMin
	if left || l.ring.Pending() > l.quarter || l.ring.TaskRun() {
		l.submit()
	}
	if l.stats.Passes%256 == 0 { // a busy loop publishes its counters, too
		l.publics.publish(&l.stats)
	}
	return n
}

// dispatch passes completions to their handlers.
func (l *Loop) dispatch() int {
	n := 0
	for ; n < dispatchBudget; n++ {
		c := l.ring.Next()
		if c == nil {
			break
		}
		slot, data, res, flags := c.UserData>>dataBits, c.UserData&dataMask, c.Res, c.Flags
		l.ring.Seen()
		if slot == 0 {
			continue // the completion of a cancellation
		}
		if slot >= maxHandlers || l.handlers[slot] == nil {
			l.stats.Strays++
			continue
		}
		l.handlers[slot].Complete(data, res, flags)
	}
	l.stats.CQEs += uint64(n)
	return n
}

// poll polls every source once, and then flushes. A source may attach and detach sources
// meanwhile.
func (l *Loop) poll() int {
	n := 0
	for i := 0; i < len(l.sources); i++ {
		n += l.sources[i].Poll()
	}
	for i := 0; i < len(l.flushers); i++ {
		n += l.flushers[i].Flush()
	}
	return n
}

// submit enters the kernel without waiting.
func (l *Loop) submit() {
	l.stats.Enters++
	l.check(l.ring.Submit())
}

// check ends the loop if the ring cannot be used any more.
func (l *Loop) check(err error) {
	if err != nil && l.failure == nil {
		l.failure = err
	}
}

// idle follows a pass that found no work. It spins if that is likely to find work.
// Otherwise it arms the sources and waits in the kernel.
func (l *Loop) idle() {
	if l.inFlight() && l.cfg.Spin > 0 && l.spinner.Worth() {
		found := l.spin(min(l.cfg.Spin, spin.Polls))
		l.spinner.Record(found)
		if found {
			return
		}
	}
	l.asleep.Store(true)
	switch l.arm() {
	case Sleep:
		if !l.anything() {
			l.sleep()
		}
	case Spin:
		l.asleep.Store(false)
		l.await()
	}
	l.asleep.Store(false)
}

// inFlight reports whether a source expects an answer soon.
func (l *Loop) inFlight() bool {
	for _, f := range l.flights {
		if f.InFlight() {
			return true
		}
	}
	return false
}

// arm asks all sources whether the loop may sleep.
func (l *Loop) arm() Readiness {
	all := Sleep
	for i := 0; i < len(l.sources); i++ {
		switch l.sources[i].Arm() {
		case Sleep:
		case Spin:
			all = Spin
		default:
			return Busy
		}
	}
	return all
}

// anything looks for work a last time before a wait, after asleep was set and the sources
// were armed. Work that arrived before that caused no event.
func (l *Loop) anything() bool {
	if l.ring.CQReady() || l.queued.Load() || l.poll() > 0 {
		l.backoff = backoffMin
		return true
	}
	return false
}

// sleep waits for a completion. The first wait is bounded, and costs little if the
// completion comes soon. The second wait gives up the scheduler's P.
func (l *Loop) sleep() {
	l.wait(boundedWait)
	if l.failure != nil || l.ring.CQReady() {
		return
	}
	l.stats.Enters++
	l.stats.BlockingWaits++
	l.publics.publish(&l.stats)
	l.check(l.ring.WaitBlocking())
}

// wait submits and waits for a completion, at most for the bound.
func (l *Loop) wait(bound time.Duration) {
	l.stats.Enters++
	l.stats.Waits++
	l.publics.publish(&l.stats)
	l.check(l.ring.Wait(bound))
}

// await polls for work that causes no event: without pause until the spin is used up, and
// then at intervals, as long as a source asks for it.
func (l *Loop) await() {
	if l.backoff == backoffMin && l.spin(l.cfg.Spin) {
		return
	}
	l.asleep.Store(true)
	if l.anything() {
		return
	}
	l.wait(l.backoff)
	l.backoff = min(2*l.backoff, backoffMax)
}

// spin polls up to the limit and reports whether it found work.
func (l *Loop) spin(limit int) bool {
	if l.ring.Pending() > 0 {
		l.submit()
	}
	timed := l.spins.begin(l.thread, l.stats.Spins)
	found := l.pollOn(limit)
	if timed {
		l.stats.Spin += l.spins.end(l.thread, l.stats.Spins)
		l.publics.publish(&l.stats) // a loop may spin without ever waiting
	}
	return found
}

// pollOn polls up to the limit of a spin.
func (l *Loop) pollOn(limit int) bool {
	for range limit {
		l.stats.Spins++
		if l.ring.TaskRun() {
			l.submit()
			return true
		}
		if l.anything() {
			return true
		}
	}
	return false
}
