package poller

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Stats holds the counts of a loop since it started.
type Stats struct {
	Passes        uint64 // passes over completions and sources
	CQEs          uint64 // completions of the ring
	Strays        uint64 // completions without a handler
	Enters        uint64 // io_uring_enter calls of any kind
	Waits         uint64 // of these, bounded waits
	BlockingWaits uint64 // of these, waits without a bound
	Spins         uint64 // polls that were made instead of waiting
	Wakes         uint64 // writes to the eventfd by Wake
	WatchFailures uint64 // files that can no longer be read

	// The time since the loop was started is Busy + Spin + Sleep. The kernel's clock of
	// the thread tells how long it ran. Spin is an estimate, see spinClock. Sleep includes
	// the time in which the thread was ready to run and had no CPU.
	Busy, Spin, Sleep time.Duration
}

// publicStats is the copy of a loop's Stats that other goroutines read. Only the loop
// writes it.
type publicStats struct {
	passes, cqes, strays, enters, waits, blockingWaits, spins, watchFailures atomic.Uint64
	spinTime                                                                 atomic.Uint64 // nanoseconds
}

func (p *publicStats) publish(s *Stats) {
	set(&p.passes, s.Passes)
	set(&p.cqes, s.CQEs)
	set(&p.strays, s.Strays)
	set(&p.enters, s.Enters)
	set(&p.waits, s.Waits)
	set(&p.blockingWaits, s.BlockingWaits)
	set(&p.spins, s.Spins)
	set(&p.watchFailures, s.WatchFailures)
	set(&p.spinTime, uint64(s.Spin))
}

// set avoids the store, which is a locked instruction, if the value is unchanged.
func set(p *atomic.Uint64, v uint64) {
	if p.Load() != v {
		p.Store(v)
	}
}

// Snapshot reads the counters. They are up to date when the loop waits, and up
// to 256 passes, or spinInterval spins, old when it is busy. Any goroutine.
func (l *Loop) Snapshot() Stats {
	p := &l.publics
	s := Stats{
		Passes: p.passes.Load(), CQEs: p.cqes.Load(), Strays: p.strays.Load(),
		Enters: p.enters.Load(), Waits: p.waits.Load(), BlockingWaits: p.blockingWaits.Load(),
		Spins: p.spins.Load(), Wakes: l.wakes.Load(), WatchFailures: p.watchFailures.Load(),
	}
	l.addTimes(&s)
	return s
}

// times is how the life of a loop was spent, as of the last look.
type times struct {
	mu                sync.Mutex // guards what follows
	life, sleep, busy time.Duration
}

// addTimes asks the kernel how long the thread ran. It is asked by those who want to know,
// so that the loop need not read a clock when it begins and ends to sleep. No time that was
// once given decreases later, although an estimate is among them.
func (l *Loop) addTimes(s *Stats) {
	t := &l.times
	t.mu.Lock()
	defer t.mu.Unlock()
	l.mu.Lock() // so that the thread stays
	if l.tid != 0 {
		t.life = time.Since(l.born)
		if ran, err := threadTime(l.tid); err == nil {
			t.sleep = max(t.sleep, t.life-ran)
		}
	}
	l.mu.Unlock()
	ran := t.life - t.sleep
	t.busy = max(t.busy, ran-time.Duration(l.publics.spinTime.Load()))
	s.Busy, s.Spin, s.Sleep = t.busy, ran-t.busy, t.sleep
}

// threadTime is how long a thread of this process has run. The clock's id is made as the
// kernel's MAKE_THREAD_CPUCLOCK(tid, CPUCLOCK_SCHED) makes it.
func threadTime(tid int) (time.Duration, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(int32(^tid<<3|4|2), &ts)
	return time.Duration(ts.Nano()), err
}

// spinInterval is the number of spins of which one is timed.
const spinInterval = 64

// spinClock estimates how long a loop has spun. It times one spin in spinInterval, and
// takes the polls of the others to be as long as those of the timed one.
type spinClock struct {
	rounds  uint64
	polls   uint64        // Stats.Spins when the last timed spin ended
	started time.Duration // threadTime at the start of the timed spin
	cost    time.Duration // of reading the clock
	before  uint64        // Stats.Spins then
}

// begin reports whether the spin that begins is timed.
func (c *spinClock) begin(tid int, polls uint64) bool {
	c.rounds++
	if c.rounds%spinInterval != 1 {
		return false
	}
	first, _ := threadTime(tid)
	var err error
	c.started, err = threadTime(tid)
	c.cost, c.before = c.started-first, polls
	return err == nil
}

// end returns the time of the polls since the last timed spin.
func (c *spinClock) end(tid int, polls uint64) time.Duration {
	now, err := threadTime(tid)
	if err != nil || polls == c.before {
		return 0
	}
	d := time.Duration(float64(max(0, now-c.started-c.cost)) * float64(polls-c.polls) / float64(polls-c.before))
	c.polls = polls
	return d
}
