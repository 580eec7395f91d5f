package poller

import "sync/atomic"

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
}

// publicStats is the copy of a loop's Stats that other goroutines read. Only the loop
// writes it.
type publicStats struct {
	passes, cqes, strays, enters, waits, blockingWaits, spins, watchFailures atomic.Uint64
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
}

// set avoids the store, which is a locked instruction, if the value is unchanged.
func set(p *atomic.Uint64, v uint64) {
	if p.Load() != v {
		p.Store(v)
	}
}

// Snapshot reads the counters. They are up to date when the loop waits, and up
// to 256 passes old when it is busy. Any goroutine.
func (l *Loop) Snapshot() Stats {
	p := &l.publics
	return Stats{
		Passes: p.passes.Load(), CQEs: p.cqes.Load(), Strays: p.strays.Load(),
		Enters: p.enters.Load(), Waits: p.waits.Load(), BlockingWaits: p.blockingWaits.Load(),
		Spins: p.spins.Load(), Wakes: l.wakes.Load(), WatchFailures: p.watchFailures.Load(),
	}
}
