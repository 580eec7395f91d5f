package initiator

import (
	"encoding/hex"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
)

// presence tells whether the requests of a namespace may be sent.
type presence = uint32

const (
	// held: the namespace has not been found over any present association yet, and its
	// requests wait. A target that restarts may open its port before its namespaces
	// exist.
	held presence = iota
	// served: the namespace is there, and is the same as before.
	served
	// failing: the namespace has been held for longer than requests may wait.
	failing
	// inaccessible: the namespace is there, and no path has given access to it for longer than
	// requests may wait.
	inaccessible
	// gone: the target has removed the namespace or has another one in its place.
	gone
)

// view is a namespace as one path sees it. A view is immutable; a change makes a new one.
type view struct {
	transfer         uint32 // sectors of the largest read or write command
	discard          uint32 // sectors of the largest DSM command; 0: none
	zeroes           uint32 // sectors of the largest Write Zeroes command; 0: none
	volatileCache    bool
	deallocateZeroes bool // Write Zeroes may deallocate and still read zeroes
	access           access
	ana              nvme.ANAState // 0: the controller does not report it
}

// finding is what a path says of a namespace.
type finding struct {
	id               uint32
	ids              nvme.NamespaceIDs
	geometry         block.Geometry
	used             uint64 // bytes that are allocated
	deallocateZeroes bool   // Write Zeroes may deallocate and still read zeroes
	shared           bool   // several controllers may have it (NMIC)
	group            uint32 // ANA group
	segments         int    // in how many places the data of a request should be at most
}

func (f *finding) view(a *anaStates) *view {
	g := &f.geometry
	got, state := a.accessOf(f.group)
	return &view{
		access: got, ana: state,
		transfer: g.MaxIO >> block.SectorShift, discard: g.MaxDiscardSectors, zeroes: g.MaxZeroesSectors,
		volatileCache: g.VolatileCache, deallocateZeroes: f.deallocateZeroes,
	}
}

// Namespace is a namespace of the subsystem: a block.Device.
type Namespace struct {
	sub         *Subsystem
	id          uint32
	sectorShift uint8 // log2 of 512-byte sectors per logical block

	// The goroutines that look at namespaces write these fields; the loops read them.
	presence atomic.Uint32
	sectors  atomic.Uint64                  // capacity
	segments atomic.Int32                   // that a request should have at most, for each path
	views    [MaxPaths]atomic.Pointer[view] // by slot; nil: not found over the present association of the path
	barrier  atomic.Pointer[[]extent]       // what changes must not overlap at present; nil: nothing
	open     atomic.Int32                   // number of open queues
	regions  regions                        // memory of front ends

	mu       sync.Mutex         // guards the fields below
	findings [MaxPaths]*finding // by slot; what the views were made of
	geometry block.Geometry
	ids      nvme.NamespaceIDs
	used     uint64          // bytes that are allocated
	since    time.Time       // start of the held state
	blocked  time.Time       // since when no path has given access; zero: one does
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

// doubt is called when the association of a path is lost. The namespace must be found again
// over the next one. Its requests wait if no other path has it.
func (ns *Namespace) doubt(slot int, when time.Time) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	ns.views[slot].Store(nil)
	ns.findings[slot] = nil
	ns.settle(when)
}

// settle holds the requests of a namespace that no path has found, and recomputes its geometry
// otherwise. The caller holds the lock.
func (ns *Namespace) settle(when time.Time) {
	if ns.seen() {
		ns.merge()
	} else if ns.presence.CompareAndSwap(served, held) || ns.presence.CompareAndSwap(inaccessible, held) {
		ns.since, ns.blocked = when, time.Time{}
	}
}

// withdraw is called when a path does not have the namespace any more. It reports whether no
// path has it.
func (ns *Namespace) withdraw(slot int) bool {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	ns.views[slot].Store(nil)
	ns.findings[slot] = nil
	return !ns.seen()
}

// hold makes the requests wait until a path finds the namespace again.
func (ns *Namespace) hold(when time.Time) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	ns.settle(when)
}

// seen reports whether a path has found the namespace. The caller holds the lock.
func (ns *Namespace) seen() bool {
	for _, f := range ns.findings {
		if f != nil {
			return true
		}
	}
	return false
}

// Wait says why the requests of a namespace are not sent at present.
type Wait struct {
	Since  time.Time
	Reason string
	Left   time.Duration // until they fail; 0: they fail; Forever: they wait until the subsystem is given up
}

// Wait returns why the requests of the namespace are not sent at present. It returns false if they
// are sent, or if the namespace is gone. Any goroutine may call it.
func (ns *Namespace) Wait() (Wait, bool) {
	limit, bounded := ns.sub.lossTime()
	transition := ns.sub.transitionTime()
	w := Wait{Reason: "no path has found the namespace again"}
	ns.mu.Lock()
	defer ns.mu.Unlock()
	w.Since = ns.since
	presence := ns.presence.Load()
	switch {
	case presence == gone, presence == served && ns.blocked.IsZero():
		return Wait{}, false
	case presence == served, presence == inaccessible:
		w.Since, w.Reason = ns.blocked, "no path gives access to the namespace (ANA)"
		limit += transition
	}
	switch {
	case presence == failing, presence == inaccessible:
	case !bounded:
		w.Left = Forever
	default:
		w.Left = max(time.Until(w.Since.Add(limit)), 1)
	}
	return w, true
}

// heldFor returns how long the namespace has been held at the given time.
func (ns *Namespace) heldFor(now time.Time) time.Duration {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	return now.Sub(ns.since)
}

// adopt takes over what a path says, which is about the same namespace, and returns the old
// geometry and the new one.
func (ns *Namespace) adopt(slot int, f *finding, a *anaStates) (was, is block.Geometry) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	was = ns.geometry
	ns.findings[slot] = f
	ns.ids, ns.used = union(ns.ids, f.ids), f.used
	ns.merge()
	ns.views[slot].Store(f.view(a))
	ns.noteAccess(time.Now())
	return was, ns.geometry
}

// merge computes the geometry from what the paths say. A path must be able to carry out every
// request, so the smallest size and limits count. The caller holds the lock.
func (ns *Namespace) merge() {
	first, segments := true, block.MaxSegments
	for _, f := range ns.findings {
		switch {
		case f == nil:
			continue
		case first:
			ns.geometry, first = f.geometry, false
		default:
			ns.geometry = narrower(ns.geometry, f.geometry)
		}
		segments = min(segments, f.segments)
	}
	ns.sectors.Store(ns.geometry.Sectors)
	ns.segments.Store(int32(segments))
}

// narrower returns a geometry that two paths can serve.
func narrower(a, b block.Geometry) block.Geometry {
	a.Sectors = min(a.Sectors, b.Sectors)
	a.PhysicalBlock = min(a.PhysicalBlock, b.PhysicalBlock)
	a.MaxIO = min(a.MaxIO, b.MaxIO)
	a.VolatileCache = a.VolatileCache || b.VolatileCache
	a.ReadOnly = a.ReadOnly || b.ReadOnly
	a.MaxDiscardSectors = min(a.MaxDiscardSectors, b.MaxDiscardSectors)
	a.DiscardGranularity = max(a.DiscardGranularity, b.DiscardGranularity)
	a.MaxZeroesSectors = min(a.MaxZeroesSectors, b.MaxZeroesSectors)
	return a
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
func (ns *Namespace) compare(found *finding) (identity, string) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	switch compareIDs(ns.ids, found.ids) {
	case different:
		return different, "another namespace has its id: " + difference(ns.ids, found.ids)
	case unknown:
		return unknown, "its old and its new identifiers have none in common"
	}
	if was, is := ns.geometry.LogicalBlock, found.geometry.LogicalBlock; was != is {
		return different, fmt.Sprintf("its block size was %d and is %d", was, is)
	}
	return same, ""
}

// unlike returns how a finding differs from what the other paths say of the namespace, or "".
// All identifiers must be equal here. A size may differ over a path that has found the
// namespace before, because a new size becomes known over one path after the other.
func (ns *Namespace) unlike(slot int, f *finding) string {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	for other, g := range ns.findings {
		if g == nil || other == slot {
			continue
		}
		differs := func(what string, is, was any) string {
			return fmt.Sprintf("its %s is %v, over another path it is %v", what, is, was)
		}
		switch {
		case !f.shared || !g.shared:
			return "it is not shared between controllers (NMIC)"
		case hasNone(f.ids):
			return "it has no identifier, so nothing says that it is the same over two paths"
		case f.ids.UUID != g.ids.UUID:
			return differs("UUID", f.ids.UUID, g.ids.UUID)
		case f.ids.NGUID != g.ids.NGUID:
			return differs("NGUID", hex.EncodeToString(f.ids.NGUID[:]), hex.EncodeToString(g.ids.NGUID[:]))
		case f.ids.EUI64 != g.ids.EUI64:
			return differs("EUI-64", hex.EncodeToString(f.ids.EUI64[:]), hex.EncodeToString(g.ids.EUI64[:]))
		case f.ids.CSI != g.ids.CSI:
			return differs("command set", f.ids.CSI, g.ids.CSI)
		case f.geometry.LogicalBlock != g.geometry.LogicalBlock:
			return differs("block size", f.geometry.LogicalBlock, g.geometry.LogicalBlock)
		case f.geometry.Sectors != g.geometry.Sectors && ns.findings[slot] == nil:
			return differs("size in sectors", f.geometry.Sectors, g.geometry.Sectors)
		}
	}
	return ""
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

// difference says in words which identifiers of two namespaces differ.
func difference(was, is nvme.NamespaceIDs) string {
	var all []string
	differs := func(what string, was, is any) {
		all = append(all, fmt.Sprintf("its %s was %v and is %v", what, was, is))
	}
	if was.CSI != is.CSI {
		differs("command set", was.CSI, is.CSI)
	}
	if compareID(was.UUID, is.UUID) == different {
		differs("UUID", was.UUID, is.UUID)
	}
	if compareID(was.NGUID, is.NGUID) == different {
		differs("NGUID", hex.EncodeToString(was.NGUID[:]), hex.EncodeToString(is.NGUID[:]))
	}
	if compareID(was.EUI64, is.EUI64) == different {
		differs("EUI-64", hex.EncodeToString(was.EUI64[:]), hex.EncodeToString(is.EUI64[:]))
	}
	return strings.Join(all, ", ")
}

// shared returns an identifier that two namespaces have in common, in words, or "".
func shared(a, b nvme.NamespaceIDs) string {
	switch {
	case compareID(a.UUID, b.UUID) == same:
		return fmt.Sprintf("UUID %v", a.UUID)
	case compareID(a.NGUID, b.NGUID) == same:
		return "NGUID " + hex.EncodeToString(a.NGUID[:])
	case compareID(a.EUI64, b.EUI64) == same:
		return "EUI-64 " + hex.EncodeToString(a.EUI64[:])
	}
	return ""
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
