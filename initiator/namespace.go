package initiator

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
)

// presence is whether the requests of a namespace may be sent.
type presence = uint32

const (
	// held: the namespace has not been found over the present association yet.
	// Requests wait. Targets that restart open their port before their namespaces
	// are there.
	held presence = iota
	// served: the namespace is what it was.
	served
	// failing: it has been held for longer than requests may wait.
	failing
	// gone: the target removed it or has another one in its place.
	gone
)

// terms are what may change of a namespace while it is used. They are immutable; a
// change makes new ones.
type terms struct {
	sectors          uint64 // capacity
	transfer         uint32 // sectors of the largest read or write command
	discard          uint32 // sectors of the largest DSM command; 0: none
	zeroes           uint32 // sectors of the largest Write Zeroes command; 0: none
	volatileCache    bool
	deallocateZeroes bool // Write Zeroes may deallocate and still read zeroes
}

func termsOf(g block.Geometry, deallocateZeroes bool) *terms {
	return &terms{
		sectors: g.Sectors, transfer: g.MaxIO >> block.SectorShift,
		discard: g.MaxDiscardSectors, zeroes: g.MaxZeroesSectors,
		volatileCache: g.VolatileCache, deallocateZeroes: deallocateZeroes,
	}
}

// Namespace is a namespace of the subsystem: a block.Device.
type Namespace struct {
	ctrl        *Controller
	id          uint32
	sectorShift uint8 // log2 of 512-byte sectors per logical block

	// Written by the goroutine that looks at namespaces, read by the loops.
	presence atomic.Uint32
	terms    atomic.Pointer[terms]
	open     atomic.Int32 // queues

	mu       sync.Mutex // guards what follows
	geometry block.Geometry
	ids      nvme.NamespaceIDs
	since    time.Time // when it began to be held
}

// NSID is the namespace id.
func (ns *Namespace) NSID() uint32 { return ns.id }

// IDs are the globally unique identifiers of the namespace, as far as it has
// them.
func (ns *Namespace) IDs() nvme.NamespaceIDs {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	return ns.ids
}

// Geometry implements block.Device. It is that of the last look at the namespace.
// Whatever becomes of its limits and its cache, queues that are open go on to do what
// was offered when they were opened.
func (ns *Namespace) Geometry() block.Geometry {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	return ns.geometry
}

// doubt is called when an association is lost: the namespace has to be found again
// over the next.
func (ns *Namespace) doubt(when time.Time) {
	if ns.presence.CompareAndSwap(served, held) {
		ns.mu.Lock()
		ns.since = when
		ns.mu.Unlock()
	}
}

// heldFor is for how long the namespace has been held at the given time.
func (ns *Namespace) heldFor(now time.Time) time.Duration {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	return now.Sub(ns.since)
}

// adopt takes over what was found of the same namespace, and returns what stood
// before.
func (ns *Namespace) adopt(found *Namespace) (was block.Geometry) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	was = ns.geometry
	ns.geometry = found.geometry
	ns.ids = union(ns.ids, found.ids)
	ns.terms.Store(found.terms.Load())
	return was
}

// identity is the answer to whether two looks were at the same namespace.
type identity uint8

const (
	unknown identity = iota // no identifier tells
	same
	different
)

// compare says whether found is the namespace that ns was, in a state that a user of
// ns may go on with. The reason is why not.
func (ns *Namespace) compare(found *Namespace) (identity, string) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	switch compareIDs(ns.ids, found.ids) {
	case different:
		return different, "another namespace has its id"
	case unknown:
		return unknown, "its identifiers cannot be compared with those that it had"
	}
	if was, is := ns.geometry.LogicalBlock, found.geometry.LogicalBlock; was != is {
		return different, fmt.Sprintf("its block size was %d and is %d", was, is)
	}
	return same, ""
}

// compareIDs compares the identifiers that both have. Namespaces without any are
// told apart by nothing but their number, and so are the same.
func compareIDs(a, b nvme.NamespaceIDs) identity {
	if a.CSI != b.CSI {
		return different
	}
	answer := unknown
	for _, equal := range []identity{compareID(a.UUID, b.UUID), compareID(a.NGUID, b.NGUID), compareID(a.EUI64, b.EUI64)} {
		switch equal {
		case different:
			return different
		case same:
			answer = same
		}
	}
	if hasNone(a) && hasNone(b) {
		return same
	}
	return answer
}

func compareID[T comparable](a, b T) identity {
	var zero T
	switch {
	case a == zero || b == zero:
		return unknown
	case a == b:
		return same
	}
	return different
}

func hasNone(ids nvme.NamespaceIDs) bool {
	return ids.UUID.IsZero() && ids.NGUID == [16]byte{} && ids.EUI64 == [8]byte{}
}

// union is a with the identifiers that only b has.
func union(a, b nvme.NamespaceIDs) nvme.NamespaceIDs {
	if a.UUID.IsZero() {
		a.UUID = b.UUID
	}
	if a.NGUID == [16]byte{} {
		a.NGUID = b.NGUID
	}
	if a.EUI64 == [8]byte{} {
		a.EUI64 = b.EUI64
	}
	return a
}

// Change is what happened to a namespace.
type Change uint8

// Changes.
const (
	ChangeUnset     Change = iota
	Added                  // it is new, or it is back
	Removed                // it is not there any more, or not what it was: requests fail with ENODEV
	Resized                // Geometry has the new size
	WriteProtection        // Geometry says whether it may be written to now
)

var changeNames = [...]string{"unset", "added", "removed", "resized", "write protection changed"}

func (c Change) String() string {
	if int(c) < len(changeNames) {
		return changeNames[c]
	}
	return fmt.Sprintf("change %d", c)
}
