package poller

import (
	"testing"
	"time"
)

// poll is a source that answers every n-th poll, without an event.
type everyNth struct{ n, polls int }

func (s *everyNth) Poll() int {
	if s.polls++; s.polls%s.n == 0 {
		return 1
	}
	return 0
}

func (s *everyNth) Arm() Readiness { return Spin }

// TestTimes: a loop that has nothing to do sleeps, one whose source asks for it spins, and
// one that is kept busy is busy. The times of a loop never decrease, and add up to its life.
func TestTimes(t *testing.T) {
	l := newLoop(t, Config{Spin: 1000})
	var last Stats
	look := func() Stats {
		t.Helper()
		s := l.Snapshot()
		if s.Busy < last.Busy || s.Spin < last.Spin || s.Sleep < last.Sleep {
			t.Fatalf("%v busy, %v spinning, %v asleep after %v, %v, %v", s.Busy, s.Spin, s.Sleep, last.Busy, last.Spin, last.Sleep)
		}
		last = s
		return s
	}
	// until returns how the time was spent until a time has grown by 50 ms.
	until := func(what string, of func(Stats) time.Duration) (grown Stats) {
		t.Helper()
		began := look()
		for deadline := time.Now().Add(30 * time.Second); ; {
			s := look()
			if of(s)-of(began) > 50*time.Millisecond {
				return Stats{Busy: s.Busy - began.Busy, Spin: s.Spin - began.Spin, Sleep: s.Sleep - began.Sleep}
			}
			if time.Now().After(deadline) {
				t.Fatalf("the loop is not %s: %+v", what, s)
			}
			time.Sleep(time.Millisecond)
		}
	}
	// spent waits until a time has grown and ok holds for how the time was spent meanwhile.
	// A loop comes to rest a moment after its start, and to the kernel a thread whose
	// virtual CPU does not run is running. So one look may not be enough.
	spent := func(what string, of func(Stats) time.Duration, ok func(Stats) bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); ; {
			got := until(what, of)
			if ok(got) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("the loop is not only %s: %+v", what, got)
			}
		}
	}
	spent("asleep", func(s Stats) time.Duration { return s.Sleep }, func(got Stats) bool { return got.Busy+got.Spin <= 10*time.Millisecond })
	s := &everyNth{n: 500}
	on(t, l, func() { l.Attach(s) })
	spent("spinning", func(s Stats) time.Duration { return s.Spin }, func(got Stats) bool { return got.Busy <= got.Spin })
	on(t, l, func() { l.Detach(s) })
	// The time of the spins is an estimate. If the machine stood still in one that was timed, it is too
	// much, and a part of what is done then is taken for it.
	before := look().Busy
	for deadline := time.Now().Add(30 * time.Second); look().Busy-before < 50*time.Millisecond; {
		if time.Now().After(deadline) {
			t.Fatalf("functions of 100 ms do not count: %v before, %+v", before, last)
		}
		on(t, l, func() {
			for began, _ := threadTime(l.thread); ; {
				if now, err := threadTime(l.thread); err != nil || now-began > 100*time.Millisecond {
					break
				}
			}
		})
	}
	if life := time.Since(l.born); last.Busy+last.Spin+last.Sleep > life {
		t.Errorf("%+v is more than the life of the loop, %v", last, life)
	}
	if err := l.Stop(); err != nil {
		t.Fatal(err)
	}
	look()
	ended := look()
	if again := look(); again != ended {
		t.Errorf("the times of a loop that has ended go on: %+v, then %+v", ended, again)
	}
}

// TestClockReads: a loop reads a clock for one spin in spinInterval only, and never for a
// pass or a sleep.
func TestClockReads(t *testing.T) {
	l := newLoop(t, Config{Spin: 10})
	on(t, l, func() {
		l.Attach(&everyNth{n: 1 << 30})
		timed := 0
		for range 10 * spinInterval {
			before := l.spins.started
			l.spin(10)
			if l.spins.started != before {
				timed++
			}
		}
		if timed != 10 {
			t.Errorf("%d spins of %d were timed, want 10", timed, 10*spinInterval)
		}
		started, rounds := l.spins.started, l.spins.rounds
		for range 1000 {
			l.Step()
		}
		if l.spins.started != started || l.spins.rounds != rounds {
			t.Error("a pass was timed")
		}
	})
}
