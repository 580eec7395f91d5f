package nbd

import (
	"sync/atomic"

	"ublk-nvmeof/block"
	"ublk-nvmeof/poller"
)

// A write of less than a logical block reads the block, changes a part of it and writes
// it back. No other change of that block may happen in between, on whatever loop. So
// every change of an export locks the stripes that its range is in: shared, if it
// changes whole blocks, or exclusively, if it changes a part of one. Nobody waits for a
// lock. A change that does not get its stripes is parked, and tried again when some are
// released.

const (
	stripeShift = 16 // log2 of the bytes of a range that has one stripe
	nStripes    = 1 << 10

	stripeExclusive uint32 = 1 << 31 // locked exclusively
	stripeWanted    uint32 = 1 << 30 // wanted exclusively: no more shared locks
	// The other bits count the shared locks.
)

// stripes are the locks of an export. Any loop.
type stripes struct {
	locks  [nStripes]atomic.Uint32
	parked atomic.Int32 // changes that wait for a release
	loops  []*poller.Loop
}

// stripeRange is the stripes of a range: n of them from first on, after the last of all
// comes stripe 0.
func stripeRange(sector uint64, sectors uint32) (first, n uint64) {
	first = sector << block.SectorShift >> stripeShift
	last := ((sector+uint64(sectors))<<block.SectorShift - 1) >> stripeShift
	return first, min(last-first+1, nStripes)
}

func (s *stripes) at(i uint64) *atomic.Uint32 { return &s.locks[i%nStripes] }

// share locks the stripes of a range of whole blocks, all or none.
func (s *stripes) share(sector uint64, sectors uint32) bool {
	first, n := stripeRange(sector, sectors)
	for i := range n {
		if !tryShare(s.at(first + i)) {
			for j := range i {
				s.unshareOne(s.at(first + j))
			}
			return false
		}
	}
	return true
}

func tryShare(lock *atomic.Uint32) bool {
	for {
		v := lock.Load()
		if v >= stripeWanted {
			return false
		}
		if lock.CompareAndSwap(v, v+1) {
			return true
		}
	}
}

// unshare releases what share has locked.
func (s *stripes) unshare(sector uint64, sectors uint32) {
	first, n := stripeRange(sector, sectors)
	for i := range n {
		s.unshareOne(s.at(first + i))
	}
}

func (s *stripes) unshareOne(lock *atomic.Uint32) {
	if lock.Add(^uint32(0)) == stripeWanted {
		s.wake()
	}
}

// exclude locks the stripe of a block exclusively.
func (s *stripes) exclude(sector uint64) bool {
	first, _ := stripeRange(sector, 1)
	lock := s.at(first)
	for {
		switch v := lock.Load(); {
		case v&^stripeWanted == 0:
			if lock.CompareAndSwap(v, stripeExclusive) {
				return true
			}
		case v&stripeWanted != 0 || lock.CompareAndSwap(v, v|stripeWanted):
			return false
		}
	}
}

// include releases what exclude has locked.
func (s *stripes) include(sector uint64) {
	first, _ := stripeRange(sector, 1)
	s.at(first).And(^stripeExclusive)
	s.wake()
}

// wake has the loops try what is parked.
func (s *stripes) wake() {
	if s.parked.Load() == 0 {
		return
	}
	for _, l := range s.loops {
		l.Wake()
	}
}
