package poller

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/spin"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/internal/uring"
)

// newLoop starts a loop that is stopped at the end of the test.
func newLoop(t testing.TB, cfg Config) *Loop {
	t.Helper()
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Stop(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// on runs fn on the loop.
func on(t testing.TB, l *Loop, fn func()) {
	t.Helper()
	if err := l.Call(fn); err != nil {
		t.Fatal(err)
	}
}

// eventually waits for a condition that other threads make true without an event.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !cond(); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("does not happen: %s", what)
		}
	}
}

// settle waits until the loop has fallen asleep and returns its counters.
func settle(t testing.TB, l *Loop) Stats {
	t.Helper()
	var n uint64
	on(t, l, func() { n = l.stats.BlockingWaits })
	eventually(t, "the loop sleeps", func() bool { return l.Snapshot().BlockingWaits > n })
	return l.Snapshot()
}

// source is a Source made of functions. A nil function finds no work.
type source struct {
	poll func() int
	arm  func() Readiness
}

func (s *source) Poll() int {
	if s.poll == nil {
		return 0
	}
	return s.poll()
}

func (s *source) Arm() Readiness {
	if s.arm == nil {
		return Sleep
	}
	return s.arm()
}

// flight is a source with something in flight.
type flight struct {
	source
	inFlight bool
}

func (f *flight) InFlight() bool { return f.inFlight }

type handler func(data uint64, res int32, flags uint32)

func (h handler) Complete(data uint64, res int32, flags uint32) { h(data, res, flags) }

func TestCall(t *testing.T) {
	l := newLoop(t, Config{Name: "call"})
	n := 0
	for range 100 {
		on(t, l, func() { n++ })
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				if err := l.Call(func() { n++ }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n != 1700 {
		t.Fatalf("%d calls ran", n)
	}
	if l.Err() != nil {
		t.Fatal(l.Err())
	}
	if err := l.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := l.Call(func() { n++ }); !errors.Is(err, ErrStopped) || n != 1700 {
		t.Fatalf("call after stop: %v, %d calls ran", err, n)
	}
	if err := l.Unwatch(0); err != nil {
		t.Fatalf("unwatch after stop: %v", err)
	}
	l.Wake()
}

// TestCallsAtStop checks that each of many calls that race with Stop either runs or
// returns that it did not.
func TestCallsAtStop(t *testing.T) {
	for range 50 {
		l := newLoop(t, Config{})
		var ran, said atomic.Int64
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for {
					err := l.Call(func() { ran.Add(1) })
					if err != nil {
						if !errors.Is(err, ErrStopped) {
							t.Error(err)
						}
						return
					}
					said.Add(1)
				}
			})
		}
		wg.Go(func() { _ = l.Stop() })
		wg.Wait()
		if ran.Load() != said.Load() {
			t.Fatalf("%d calls ran, %d said so", ran.Load(), said.Load())
		}
	}
}

func TestGoexit(t *testing.T) {
	l, err := New(Config{Name: "goexit"})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Call(runtime.Goexit); !errors.Is(err, ErrStopped) {
		t.Fatalf("call of Goexit: %v", err)
	}
	<-l.Done()
	if l.Err() == nil || l.Stop() == nil || !strings.Contains(l.Err().Error(), "goexit") {
		t.Fatalf("the loop does not say why it ended: %v", l.Err())
	}
}

func TestRingFailure(t *testing.T) {
	l, err := New(Config{Name: "broken", Entries: 8})
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Call(func() {
		l.check(fmt.Errorf("enter io_uring: %w", unix.EBADF))
		for range 20 { // more than the queue has
			if l.sqe() == nil {
				t.Error("no entry")
			}
		}
	})
	<-l.Done()
	if err := l.Err(); !errors.Is(err, unix.EBADF) {
		t.Fatalf("the loop ended: %v", err)
	}
}

func TestThread(t *testing.T) {
	l := newLoop(t, Config{Name: "a-name-longer-than-15", CPUs: []int{0}})
	var tid int
	on(t, l, func() { tid = unix.Gettid() })
	if tid != l.tid {
		t.Fatalf("thread %d, the loop says %d", tid, l.tid)
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/comm", tid))
	if err != nil || strings.TrimSpace(string(comm)) != "a-name-longer-t" {
		t.Fatalf("thread's name is %q, %v", comm, err)
	}
	cpus := func() (list []int) {
		var set unix.CPUSet
		if err := unix.SchedGetaffinity(tid, &set); err != nil {
			t.Fatal(err)
		}
		for c := range 1024 {
			if set.IsSet(c) {
				list = append(list, c)
			}
		}
		return list
	}
	if got := cpus(); !reflect.DeepEqual(got, []int{0}) {
		t.Fatalf("affinity %v", got)
	}
	if n := runtime.NumCPU(); n > 1 {
		if err := l.SetAffinity([]int{n - 1}); err != nil {
			t.Fatal(err)
		}
		if got := cpus(); !reflect.DeepEqual(got, []int{n - 1}) {
			t.Fatalf("affinity %v", got)
		}
	}
	for _, c := range []int{-1, 1000, 1 << 20} {
		if err := l.SetAffinity([]int{c}); !errors.Is(err, unix.EINVAL) {
			t.Fatalf("affinity to CPU %d: %v", c, err)
		}
	}
	if _, err := New(Config{CPUs: []int{1 << 20}}); !errors.Is(err, unix.EINVAL) {
		t.Fatalf("loop on no CPU: %v", err)
	}
}

func init() { runtime.LockOSThread() } // so that TestMain has the main thread

// fromMain is the thread of a loop whose goroutine started on the main thread.
var fromMain int

func TestMain(m *testing.M) {
	tid := make(chan int)
	onThread(func() { go func(own int) { tid <- own }(threadID()) })
	fromMain = <-tid
	runtime.UnlockOSThread()
	os.Exit(m.Run())
}

// TestNotOnMainThread checks that no loop runs on the main thread, even if its goroutine
// starts there.
func TestNotOnMainThread(t *testing.T) {
	if fromMain == os.Getpid() {
		t.Fatal("from the main thread, a loop stays there")
	}
	for range 40 {
		l := newLoop(t, Config{Entries: 8})
		if l.tid == os.Getpid() {
			t.Fatal("a loop runs on the main thread")
		}
	}
}

// TestWake checks that everything published before a Wake is seen, even if the loop is
// falling asleep at that moment. Each producer waits until its item was taken, so a lost
// wake-up hangs it.
func TestWake(t *testing.T) {
	const producers = 4
	l := newLoop(t, Config{})
	var published [producers]atomic.Uint64
	var taken [producers]uint64
	var acks [producers]chan struct{}
	for i := range acks {
		acks[i] = make(chan struct{}, 1)
	}
	src := &source{poll: func() (n int) {
		for i := range published {
			if p := published[i].Load(); p != taken[i] {
				taken[i] = p
				acks[i] <- struct{}{}
				n++
			}
		}
		return n
	}}
	on(t, l, func() { l.Attach(src) })
	var wg sync.WaitGroup
	for i := range producers {
		wg.Go(func() {
			for range rounds() {
				published[i].Add(1)
				l.Wake()
				<-acks[i]
			}
		})
	}
	wg.Wait()
	on(t, l, func() { l.Detach(src) })
	if s := l.Snapshot(); s.Wakes == 0 {
		t.Fatalf("no wake-up met a sleeping loop, so nothing was shown: %+v", s)
	}
}

// collector is a source that posts what other sources hand to it.
type collector struct {
	source
	collected, posted int
}

func (c *collector) Flush() int {
	n := c.collected
	c.collected = 0
	c.posted += n
	return n
}

// TestFlush hands work to a source that was attached before: it is posted in the same pass.
func TestFlush(t *testing.T) {
	l := newLoop(t, Config{})
	on(t, l, func() {
		c := &collector{}
		work := 0
		s := &source{poll: func() int {
			n := work
			c.collected += n
			work = 0
			return n
		}}
		l.Attach(c)
		l.Attach(s)
		work = 3
		if l.Step(); c.posted != 3 {
			t.Errorf("posted %d after one pass, want 3", c.posted)
		}
		l.Detach(c)
		work = 2
		if l.Step(); c.posted != 3 {
			t.Errorf("posted %d, want 3: a detached source was flushed", c.posted)
		}
		l.Detach(s)
	})
}

// TestWakeWindows publishes and wakes at each point where the loop has just looked in
// vain: after every Poll that found no work, in Arm, and before. The loop waits
// meanwhile, so the test does not depend on chance.
func TestWakeWindows(t *testing.T) {
	l := newLoop(t, Config{Spin: -1})
	var published atomic.Uint64
	var taken uint64
	ask, told := make(chan struct{}), make(chan struct{})
	most := rounds()
	publish := func() { // once for each item taken
		if p := published.Load(); p == taken && p < most {
			ask <- struct{}{}
			<-told
		}
	}
	for _, window := range []string{"poll", "last poll", "arm", "in flight"} {
		done := make(chan struct{})
		f := &flight{inFlight: false}
		f.poll = func() int {
			if published.Load() != taken {
				if taken++; taken == most {
					close(done)
				}
				return 1
			}
			// The last look before a sleep is the one with asleep set.
			if window == "poll" || window == "last poll" && l.asleep.Load() {
				publish()
			}
			return 0
		}
		f.arm = func() Readiness {
			if window == "arm" {
				publish()
			}
			return Sleep
		}
		asked := &asking{flight: f, ask: func() {
			if window == "in flight" {
				publish()
			}
		}}
		taken = 0
		published.Store(0)
		finished := make(chan struct{})
		go func() {
			defer close(finished)
			for range most {
				<-ask
				published.Add(1)
				l.Wake()
				told <- struct{}{}
			}
		}()
		on(t, l, func() { l.Attach(asked) })
		<-done
		<-finished
		on(t, l, func() { l.Detach(asked) })
	}
}

// asking is a flight that calls a function when InFlight is called.
type asking struct {
	*flight
	ask func()
}

func (a *asking) InFlight() bool { a.ask(); return false }

// TestCallWindow queues a call after a pass has looked for calls and before the loop
// falls asleep.
func TestCallWindow(t *testing.T) {
	l := newLoop(t, Config{Spin: -1})
	const calls = 100
	called := make(chan error)
	asks := 0
	on(t, l, func() {
		l.Attach(&asking{flight: &flight{}, ask: func() {
			if asks++; asks > calls {
				return
			}
			go func() { called <- l.Call(func() {}) }()
			for !l.queued.Load() {
				runtime.Gosched()
			}
		}})
	})
	for range calls {
		if err := <-called; err != nil {
			t.Fatal(err)
		}
	}
}

// rounds is the number of repetitions of a stress test.
func rounds() uint64 {
	if testing.Short() {
		return 200
	}
	return 4000
}

// TestWakeBetweenLoops makes two loops wake each other in turn.
func TestWakeBetweenLoops(t *testing.T) {
	a, b := newLoop(t, Config{Name: "a"}), newLoop(t, Config{Name: "b"})
	most := rounds()
	done := pingPong(t, a, b, func(n uint64) bool { return n < most })
	<-done
}

// pingPong makes two loops answer each other through memory and Wake as long as more
// returns true. It closes the channel at the end.
func pingPong(t testing.TB, a, b *Loop, more func(n uint64) bool) chan struct{} {
	var toA, toB atomic.Uint64
	var atA, atB uint64
	done := make(chan struct{})
	on(t, a, func() {
		a.Attach(&source{poll: func() int {
			if toA.Load() == atA {
				return 0
			}
			atA++
			if !more(atA) {
				close(done)
				return 1
			}
			toB.Add(1)
			b.Wake()
			return 1
		}})
	})
	on(t, b, func() {
		b.Attach(&source{poll: func() int {
			if toB.Load() == atB {
				return 0
			}
			atB++
			toA.Add(1)
			a.Wake()
			return 1
		}})
	})
	toB.Add(1)
	b.Wake()
	return done
}

func TestHandlers(t *testing.T) {
	l := newLoop(t, Config{Entries: 8})
	const n = 500 // many times the submission queue
	got := make([]uint64, 2)
	done := make(chan struct{})
	var bases [2]uint64
	on(t, l, func() {
		for i := range bases {
			bases[i] = l.Handle(handler(func(data uint64, res int32, _ uint32) {
				if data != got[i]|1<<47 || res != 0 {
					t.Errorf("handler %d: data %#x result %d, want data %#x", i, data, res, got[i]|1<<47)
				}
				if got[i]++; got[0] == n && got[1] == n {
					close(done)
				}
			}))
		}
		for d := range uint64(n) {
			for _, base := range bases {
				l.sqe().UserData = base | d | 1<<47
			}
		}
	})
	<-done
	before := l.Snapshot().Strays
	on(t, l, func() {
		l.Unhandle(bases[0])
		l.sqe().UserData = bases[0]
		l.sqe().UserData = ^uint64(0)
		l.sqe().UserData = bases[1]
		got[1] = 1 << 47
		l.Unhandle(bases[1])
	})
	eventually(t, "stray completions are counted", func() bool { return l.Snapshot().Strays == before+3 })
}

// TestHandlerSlots checks that a slot is assigned again only after all others were.
func TestHandlerSlots(t *testing.T) {
	l := newLoop(t, Config{})
	on(t, l, func() {
		seen := make(map[uint64]bool)
		h := handler(func(uint64, int32, uint32) {})
		for range maxHandlers - 2 { // without the loop's own and its eventfd
			base := l.Handle(h)
			if base == 0 || base&dataMask != 0 || seen[base] {
				t.Errorf("base %#x", base)
			}
			seen[base] = true
			l.Unhandle(base)
		}
		for range maxHandlers - 2 {
			l.Handle(h)
		}
		if err := l.Watch(eventfd(t), awake{}); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("watch without a slot: %v", err)
		}
		func() {
			defer func() {
				if recover() == nil {
					t.Error("one handler too many")
				}
			}()
			l.Handle(h)
		}()
		for base := range seen {
			l.Unhandle(base)
		}
	})
}

// TestPassOrder checks that completions come first, then sources in the order in which
// they were attached, and that sources may be attached and detached meanwhile.
func TestPassOrder(t *testing.T) {
	l := newLoop(t, Config{})
	on(t, l, func() {
		var order []string
		base := l.Handle(handler(func(uint64, int32, uint32) { order = append(order, "cqe") }))
		named := func(name string) *source {
			return &source{poll: func() int { order = append(order, name); return 0 }}
		}
		a, b, c := named("a"), named("b"), named("c")
		var once *source
		once = &source{poll: func() int {
			order = append(order, "once")
			l.Detach(once)
			l.Attach(c)
			return 1
		}}
		l.Attach(a)
		l.Attach(once)
		l.Attach(b)
		l.sqe().UserData = base
		l.submit()
		if !l.Step() {
			t.Error("a pass with a completion found nothing")
		}
		want := "cqe a once c" // b moved up into the place of the one that left
		if got := strings.Join(order, " "); got != want {
			t.Errorf("first pass %q, want %q", got, want)
		}
		order = nil
		if l.Step() {
			t.Error("a pass without work found some")
		}
		if got := strings.Join(order, " "); got != "a b c" {
			t.Errorf("second pass %q", got)
		}
		l.Detach(b)
		order = nil
		l.Step()
		if got := strings.Join(order, " "); got != "a c" {
			t.Errorf("third pass %q", got)
		}
		l.Detach(a)
		l.Detach(c)
		l.Unhandle(base)
	})
}

// TestEnterPolicy checks that a busy loop submits entries that were pending for a whole
// further pass, or that fill a quarter of the queue, and that an idle loop submits with
// its wait.
func TestEnterPolicy(t *testing.T) {
	l := newLoop(t, Config{Entries: 64})
	busy := &source{poll: func() int { return 1 }}
	var base uint64
	seen := 0
	on(t, l, func() {
		l.Attach(busy)
		base = l.Handle(handler(func(uint64, int32, uint32) { seen++ }))
		nops := func(n int) {
			for range n {
				l.sqe().UserData = base
			}
		}
		steps := func(what string, enters ...uint64) {
			for i, want := range enters {
				before := l.stats.Enters
				l.Step()
				if got := l.stats.Enters - before; got != want {
					t.Errorf("%s: %d enters in pass %d, want %d", what, got, i, want)
				}
			}
		}
		l.submit() // the watch of the eventfd
		steps("nothing pending", 0, 0)
		// A few entries that are queued within a pass wait for one more pass.
		l.Attach(&source{poll: func() int { nops(3); return 1 }})
		l.pass()
		if l.ring.Pending() != 3 {
			t.Errorf("%d pending after the pass that queued them", l.ring.Pending())
		}
		l.sources = l.sources[:1]
		steps("left pending", 1, 0, 0)
		if seen != 3 {
			t.Errorf("%d of 3 completions", seen)
		}
		// More than a quarter of the queue does not wait.
		l.Attach(&source{poll: func() int { nops(17); return 1 }})
		steps("a quarter", 1)
		l.sources = l.sources[:1]
		steps("a quarter", 0)
		if seen != 20 {
			t.Errorf("%d of 20 completions", seen)
		}
		l.Detach(busy)
	})
	// When the loop is idle, one enter submits and waits.
	start := settle(t, l)
	done := make(chan struct{})
	on(t, l, func() {
		l.Unhandle(base)
		base = l.Handle(handler(func(uint64, int32, uint32) { close(done) }))
		l.sqe().UserData = base
	})
	<-done
	eventually(t, "the loop sleeps", func() bool { return l.Snapshot().BlockingWaits > start.BlockingWaits })
	// The command was submitted by a wait, not by its own enter.
	submits := func(s Stats) uint64 { return s.Enters - s.Waits - s.BlockingWaits }
	if got := l.Snapshot(); submits(got) != submits(start) {
		t.Errorf("an idle loop submitted without waiting: %+v, before %+v", got, start)
	}
	on(t, l, func() { l.Unhandle(base) })
}

// TestIdle checks that a loop without work stays in its blocking wait while another loop
// works.
func TestIdle(t *testing.T) {
	idle, busy := newLoop(t, Config{Name: "idle"}), newLoop(t, Config{Name: "busy"})
	polls := 0
	on(t, idle, func() {
		idle.Attach(&source{poll: func() int { polls++; return 0 }})
		idle.Attach(&flight{})
	})
	before := settle(t, idle)
	for range rounds() {
		on(t, busy, func() {})
	}
	settle(t, busy)
	// The runtime may send a signal to a thread, which ends its wait.
	const signals = 5
	after := idle.Snapshot()
	if after.CQEs != before.CQEs || after.Passes > before.Passes+signals || after.Enters > before.Enters+2*signals {
		t.Fatalf("an idle loop worked: %+v, before %+v", after, before)
	}
	if after.Spins != 0 {
		t.Fatalf("an idle loop spun: %+v", after)
	}
}

// TestSpin checks that a source whose work causes no event is polled without system calls
// for a limited time, and then at intervals, without a Wake.
func TestSpin(t *testing.T) {
	const limit = 100
	l := newLoop(t, Config{Spin: limit})
	var ready, got atomic.Bool
	var inFlight atomic.Bool
	inFlight.Store(true)
	src := &source{
		poll: func() int {
			if ready.Load() && inFlight.Load() {
				inFlight.Store(false)
				got.Store(true)
				return 1
			}
			return 0
		},
		arm: func() Readiness {
			if inFlight.Load() {
				return Spin
			}
			return Sleep
		},
	}
	var before Stats
	on(t, l, func() { l.Attach(src); before = l.stats })
	eventually(t, "bounded waits", func() bool { return l.Snapshot().Waits > before.Waits+10 })
	s := l.Snapshot()
	if spins := s.Spins - before.Spins; spins != limit {
		t.Errorf("%d spins before the waits, want %d", spins, limit)
	}
	if s.BlockingWaits > before.BlockingWaits {
		t.Errorf("slept while something made no event: %+v", s)
	}
	ready.Store(true) // and no Wake
	eventually(t, "the source's work is found", got.Load)
	settle(t, l)
	on(t, l, func() { l.Detach(src) })
}

// TestFlight checks that, when an answer is due, the loop polls before it arms, if that
// pays.
func TestFlight(t *testing.T) {
	const limit = 50
	l := newLoop(t, Config{Spin: limit})
	arms, polls, answerAt := 0, 0, 0
	f := &flight{inFlight: true}
	f.poll = func() int {
		polls++
		if answerAt != 0 && polls >= answerAt {
			answerAt = 0
			return 1
		}
		return 0
	}
	f.arm = func() Readiness { arms++; return Busy }
	on(t, l, func() {
		l.Attach(f)
		spins := func() uint64 {
			before := l.stats.Spins
			l.idle()
			return l.stats.Spins - before
		}
		// It pays: the answer is found at the 10th poll, and nothing is armed.
		answerAt = polls + 10
		if n := spins(); n != 10 || arms != 0 {
			t.Errorf("%d spins, %d arms", n, arms)
		}
		// It does not pay any more: the spin is limited, and then does not happen
		// for a while.
		tries := 0
		for spins() == limit {
			tries++
		}
		if tries != spin.Start+2 {
			t.Errorf("%d fruitless spins, want %d", tries, spin.Start+2)
		}
		for range spin.Retry - 2 {
			if n := spins(); n != 0 {
				t.Fatalf("%d spins without credit", n)
			}
		}
		// One try, which pays and makes it spin again
		answerAt = polls + 5
		if n := spins(); n != 5 {
			t.Errorf("%d spins at the retry", n)
		}
		if n := spins(); n != limit {
			t.Errorf("%d spins after one that paid", n)
		}
		f.inFlight = false
		if n := spins(); n != 0 {
			t.Errorf("%d spins with nothing in flight", n)
		}
		l.Detach(f)
		if len(l.flights) != 0 {
			t.Error("a detached source is asked")
		}
	})
}

// TestTaskRun checks that completions that wait for an enter are fetched by a busy loop,
// and by a spinning loop, which submits before it spins.
func TestTaskRun(t *testing.T) {
	const limit = 50
	l := newLoop(t, Config{Spin: limit})
	efd := eventfd(t)
	on(t, l, func() {
		events := 0
		if err := l.Watch(efd, counter(func(n int) { events += n })); err != nil {
			t.Error(err)
		}
		l.submit()

		busy := &source{poll: func() int { return 1 }}
		l.Attach(busy)
		signalEventfd(efd)
		before := l.stats.Enters
		l.Step()
		l.Step()
		if n := l.stats.Enters - before; n != 1 || events != 1 {
			t.Errorf("busy: %d enters, %d events", n, events)
		}
		l.Detach(busy)

		polls := 0
		f := &flight{inFlight: true}
		f.poll = func() int {
			if polls++; polls == 5 {
				signalEventfd(efd)
			}
			return 0
		}
		l.Attach(f)
		enters, spins := l.stats.Enters, l.stats.Spins
		l.idle()
		if e, s := l.stats.Enters-enters, l.stats.Spins-spins; e != 1 || s != 6 {
			t.Errorf("spinning: %d enters after %d spins", e, s)
		}
		if l.Step(); events != 2 {
			t.Errorf("spinning: %d events", events)
		}

		done := 0
		base := l.Handle(handler(func(uint64, int32, uint32) { done++ }))
		l.sqe().UserData = base
		enters, spins = l.stats.Enters, l.stats.Spins
		l.idle()
		if e, s := l.stats.Enters-enters, l.stats.Spins-spins; e != 1 || s != 1 {
			t.Errorf("pending before the spin: %d enters, %d spins", e, s)
		}
		if l.Step(); done != 1 {
			t.Errorf("pending before the spin: %d completions", done)
		}
		l.Detach(f)
		l.Unhandle(base)
	})
}

// TestCloseEventfd checks that the descriptor is not closed while a goroutine may be
// about to write to it.
func TestCloseEventfd(t *testing.T) {
	fd, err := newEventfd()
	if err != nil {
		t.Fatal(err)
	}
	var writers atomic.Int32
	writers.Store(1)
	closed := make(chan struct{})
	go func() {
		closeEventfd(fd, &writers)
		close(closed)
	}()
	for range 1000 {
		runtime.Gosched()
	}
	if _, err := unix.Write(fd, one); err != nil {
		t.Fatalf("write before the last writer is gone: %v", err)
	}
	writers.Store(0)
	<-closed
	if _, err := unix.Write(fd, one); err != unix.EBADF {
		t.Fatalf("write after close: %v", err)
	}
}

// TestStopOrder checks that Stop waits for the handlers, and that events are delivered
// until the handlers have ended.
func TestStopOrder(t *testing.T) {
	l := newLoop(t, Config{})
	efd := eventfd(t)
	var base uint64
	events := make(chan int, 1)
	on(t, l, func() {
		base = l.Handle(handler(func(uint64, int32, uint32) {}))
		if err := l.Watch(efd, counter(func(n int) { events <- n })); err != nil {
			t.Error(err)
		}
	})
	stopped := make(chan error)
	go func() { stopped <- l.Stop() }()
	stopping := false
	for !stopping {
		on(t, l, func() { stopping = l.stopping })
	}
	signalEventfd(efd)
	if n := <-events; n != 1 {
		t.Fatalf("%d events", n)
	}
	select {
	case err := <-stopped:
		t.Fatalf("stopped with a handler: %v", err)
	default:
	}
	on(t, l, func() { l.Unhandle(base) })
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
}

// TestLeaks checks that no file, mapping or thread of a loop is left after its end.
func TestLeaks(t *testing.T) {
	r, w := pipe(t)
	life := func() {
		l, err := New(Config{})
		if err != nil {
			t.Fatal(err)
		}
		on(t, l, func() {
			if err := l.Watch(r, counter(func(int) {})); err != nil {
				t.Error(err)
			}
			// Left pending by a handler that gave up
			base := l.Handle(handler(func(uint64, int32, uint32) {}))
			s := l.sqe()
			s.Opcode, s.FD, s.OpFlags, s.UserData = uring.OpPollAdd, int32(w), uring.PollMask(unix.POLLPRI), base
			l.Unhandle(base)
		})
		tid := l.tid
		if err := l.Stop(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the thread ends", func() bool {
			return unix.Tgkill(os.Getpid(), tid, 0) == unix.ESRCH
		})
	}
	life() // whatever the runtime makes once
	fds, maps := len(testenv.OpenFiles(t)), ringMappings(t)
	for range 20 {
		life()
	}
	if got := len(testenv.OpenFiles(t)); got != fds {
		t.Errorf("%d open files, before %d", got, fds)
	}
	if got := ringMappings(t); got != maps {
		t.Errorf("%d mappings of rings, before %d", got, maps)
	}
	// Nothing keeps the files open: after our ends are closed, the other end notices
	// it.
	_ = unix.Close(w)
	pfd := []unix.PollFd{{Fd: int32(r)}}
	if n, err := unix.Poll(pfd, 10000); n != 1 || err != nil {
		t.Errorf("something holds the file of a pending command: %d, %v", n, err)
	}
}

func ringMappings(t *testing.T) int {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(maps), "io_uring")
}

// TestAllocs checks that a loop does not allocate in its steady state.
func TestAllocs(t *testing.T) {
	l := newLoop(t, Config{Spin: 10})
	efd := eventfd(t)
	on(t, l, func() {
		done := 0
		base := l.Handle(handler(func(uint64, int32, uint32) { done++ }))
		f := &flight{inFlight: true}
		f.poll = func() int { return 0 }
		l.Attach(f)
		events := 0
		if err := l.Watch(efd, counter(func(n int) { events += n })); err != nil {
			t.Fatal(err)
		}
		round := func() {
			for range 3 {
				l.sqe().UserData = base
			}
			signalEventfd(efd)
			want := done + 3
			for seen := events; done < want || events == seen; {
				l.Step()
			}
			l.sqe().UserData = base // something ends the sleep
			l.idle()
			for done == want {
				l.Step()
			}
			l.Wake()
		}
		round()
		if n := testing.AllocsPerRun(500, round); n != 0 {
			t.Errorf("%v allocations in a round", n)
		}
		l.Detach(f)
		l.Unhandle(base)
	})
}

func BenchmarkStep(b *testing.B) {
	for _, sources := range []int{0, 1, 4} {
		b.Run(fmt.Sprint(sources), func(b *testing.B) {
			l := newLoop(b, Config{})
			on(b, l, func() {
				l.submit()
				for range sources {
					l.Attach(&source{})
				}
				for b.Loop() {
					l.Step()
				}
			})
		})
	}
}

// BenchmarkNop measures a command through the loop: one enter to submit and complete it.
func BenchmarkNop(b *testing.B) {
	l := newLoop(b, Config{})
	on(b, l, func() {
		done := 0
		base := l.Handle(handler(func(uint64, int32, uint32) { done++ }))
		for b.Loop() {
			l.sqe().UserData = base
			for want := done + 1; done < want; {
				l.Step()
			}
		}
		l.Unhandle(base)
	})
}

// BenchmarkNop32 measures a batch of 32 commands, per command.
func BenchmarkNop32(b *testing.B) {
	l := newLoop(b, Config{})
	on(b, l, func() {
		done := 0
		base := l.Handle(handler(func(uint64, int32, uint32) { done++ }))
		for b.Loop() {
			for range 32 {
				l.sqe().UserData = base
			}
			for want := done + 32; done < want; {
				l.Step()
			}
		}
		l.Unhandle(base)
	})
}

// BenchmarkWakeAwake measures a Wake of a loop that is awake.
func BenchmarkWakeAwake(b *testing.B) {
	l := newLoop(b, Config{})
	on(b, l, func() {
		for b.Loop() {
			l.Wake()
		}
	})
}

// BenchmarkWakePing measures the time from a publication and Wake on one loop to the Poll
// on another loop that sleeps, and back.
func BenchmarkWakePing(b *testing.B) {
	x, y := newLoop(b, Config{Name: "x"}), newLoop(b, Config{Name: "y"})
	n := uint64(b.N)
	b.ResetTimer()
	<-pingPong(b, x, y, func(i uint64) bool { return i < n })
	b.StopTimer()
	sx, sy := x.Snapshot(), y.Snapshot()
	b.ReportMetric(float64(sx.Wakes+sy.Wakes)/float64(n), "wakes/op")
	b.ReportMetric(float64(sx.BlockingWaits+sy.BlockingWaits)/float64(n), "blocking/op")
}

// BenchmarkCall measures a Call on a loop that sleeps.
func BenchmarkCall(b *testing.B) {
	l := newLoop(b, Config{})
	for b.Loop() {
		if err := l.Call(func() {}); err != nil {
			b.Fatal(err)
		}
	}
}
