package nbd

import (
	"sync/atomic"

	"ublk-nvmeof/block"
	"ublk-nvmeof/poller"
)

// A write to a part of a logical block reads the block, merges the new bytes and writes
// the block back. Meanwhile no loop may change the block in another way. So the range of
// an export is divided into stripes with a lock each. A change of whole blocks takes
// shared locks, and a change of a part of a block takes an exclusive lock. No thread ever
// waits for a lock: a change that does not get its locks is parked, and its loop tries
// again when locks are released.

const (
	stripeShift = 16 // log2 of the bytes of a stripe
	nStripes    = 1 << 10

	stripeExclusive uint32 = 1 << 31 // locked exclusively
	stripeWanted    uint32 = 1 << 30 // a change waits for an exclusive lock, so no new shared locks are granted
	// The other bits are the number of shared locks.
)

// stripes holds the locks of an export. All loops use them. Stripes that are nStripes
// apart have the same lock.
type stripes struct {
	locks  [nStripes]atomic.Uint32
	parked atomic.Int32 // number of parked changes, on all loops
	loops  []*poller.Loop
}

// stripeRange returns the first stripe of a range and the number of locks to take.
func stripeRange(sector uint64, sectors uint32) (first, n uint64) {
	first = sector << block.SectorShift >> stripeShift
	last := ((sector+uint64(sectors))<<block.SectorShift - 1) >> stripeShift
	return first, min(last-first+1, nStripes)
}

func (s *stripes) at(i uint64) *atomic.Uint32 { return &s.locks[i%nStripes] }

// share takes the shared locks of a range. It returns false, without any lock, if one is
// not free.
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

// unshare releases the locks that share took.
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

// exclude takes the exclusive lock of a block. It returns false if the lock is not free.
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

// include releases the lock that exclude took.
func (s *stripes) include(sector uint64) {
	first, _ := stripeRange(sector, 1)
	s.at(first).And(^stripeExclusive)
	s.wake()
}

// wake makes all loops try their parked changes again.
func (s *stripes) wake() {
	if s.parked.Load() == 0 {
		return
	}
	for _, l := range s.loops {
		l.Wake()
	}
}
