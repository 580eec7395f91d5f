package initiator

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
)

// presence tells whether the requests of a namespace may be sent.
type presence = uint32

const (
	// held: the namespace has not been found over the present association yet, and its
	// requests wait. A target that restarts may open its port before its namespaces
	// exist.
	held presence = iota
	// served: the namespace is there, and is the same as before.
	served
	// failing: the namespace has been held for longer than requests may wait.
	failing
	// gone: the target removed the namespace or has another one in its place.
	gone
)

// terms are the properties of a namespace that may change while it is in use. A terms value
// is immutable; a change makes a new one.
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

	// The goroutine that looks at namespaces writes these fields; the loops read them.
	presence atomic.Uint32
	terms    atomic.Pointer[terms]
	open     atomic.Int32 // number of open queues

	mu       sync.Mutex // guards the fields below
	geometry block.Geometry
	ids      nvme.NamespaceIDs
	used     uint64          // bytes that are allocated
	since    time.Time       // start of the held state
	times    []*opHistograms // by lane; nil: no queue was opened there
}

// NSID returns the namespace id.
func (ns *Namespace) NSID() uint32 { return ns.id }

// IDs returns the globally unique identifiers of the namespace. Identifiers that it does not
// have are zero.
func (ns *Namespace) IDs() nvme.NamespaceIDs {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	return ns.ids
}

// Used returns how many bytes of the namespace were allocated at the last look (NUSE).
func (ns *Namespace) Used() uint64 {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	return ns.used
}

// Geometry implements block.Device. It returns the geometry of the last look at the
// namespace. Open queues keep the limits and the cache mode with which they were opened.
func (ns *Namespace) Geometry() block.Geometry {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	return ns.geometry
}

// doubt is called when an association is lost. The namespace must be found again over the
// next association.
func (ns *Namespace) doubt(when time.Time) {
	if ns.presence.CompareAndSwap(served, held) {
		ns.mu.Lock()
		ns.since = when
		ns.mu.Unlock()
	}
}

// heldFor returns how long the namespace has been held at the given time.
func (ns *Namespace) heldFor(now time.Time) time.Duration {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	return now.Sub(ns.since)
}

// adopt takes over the properties of found, which is the same namespace, and returns the
// old geometry.
func (ns *Namespace) adopt(found *Namespace) (was block.Geometry) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	was = ns.geometry
	ns.geometry, ns.used = found.geometry, found.used
	ns.ids = union(ns.ids, found.ids)
	ns.terms.Store(found.terms.Load())
	return was
}

// identity is the result of a comparison of two namespaces.
type identity uint8

const (
	unknown identity = iota // they have no identifier in common
	same
	different
)

// compare reports whether found is the same namespace as ns, with a block size that users of
// ns can keep. If it is not the same, compare returns the reason.
func (ns *Namespace) compare(found *Namespace) (identity, string) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	switch compareIDs(ns.ids, found.ids) {
	case different:
		return different, "another namespace has its id"
	case unknown:
		return unknown, "its old and its new identifiers have none in common"
	}
	if was, is := ns.geometry.LogicalBlock, found.geometry.LogicalBlock; was != is {
		return different, fmt.Sprintf("its block size was %d and is %d", was, is)
	}
	return same, ""
}

// compareIDs compares the identifiers that both namespaces have. Namespaces without any
// identifier differ only by number, so they are the same.
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

// union returns a with the identifiers that only b has.
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
	Added                  // the namespace is new, or is back
	Removed                // the namespace is gone or was replaced; requests fail with ENODEV
	Resized                // Geometry has the new size
	WriteProtection        // Geometry has the new write protection
)

var changeNames = [...]string{"unset", "added", "removed", "resized", "write protection changed"}

func (c Change) String() string {
	if int(c) < len(changeNames) {
		return changeNames[c]
	}
	return fmt.Sprintf("change %d", c)
}
