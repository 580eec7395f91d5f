package initiator

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
)

// When a path is lost, the changes that were in flight over it have an unknown outcome. Its
// controller may still execute them. If they were sent over another path at once, and the
// application then wrote to the same blocks again, the first copy could overwrite the newer
// write. So such changes, and new ones to the same blocks, wait until the controller is known
// to be gone. Reads and all other changes go on over the other paths.
//
// A remnant is what is left of a controller whose association is lost. It ends
//
//   - when another path says that the controller does not exist. This is proof only if the
//     other path knew the controller when it existed (vouching): the targets of a subsystem
//     can be separate processes that know nothing of each other;
//   - when the next association of the path itself says so (Controller.fence);
//   - otherwise when the time has passed within which a target ends a controller whose host
//     fell silent (Controller.patience), since the loss, or since any path has last said that
//     the controller exists.
//
// The next association of the path is used only when the remnant has ended.

// remnant is a controller without an association that may still execute commands.
type remnant struct {
	ctrl      *Controller
	assoc     *association // which was lost; nil: of an earlier process
	id        ControllerID
	keepAlive time.Duration
	patience  time.Duration
	lost      time.Time
	over      chan struct{} // closed when the controller is known to be gone

	mu    sync.Mutex // guards what follows
	alive time.Time  // when a path last said that the controller exists; at first the loss
	waits string     // what the remnant waits for
	held  int        // changes with unknown outcome
	done  bool       // over is closed
}

// FenceInfo describes an old controller for whose end changes wait.
type FenceInfo struct {
	Address  netip.AddrPort // of the lost path
	CNTLID   uint16
	Since    time.Time // of the loss
	Changes  int       // changes with unknown outcome, which wait with those that overlap them
	WaitsFor string
}

// extent is a range of sectors that a change with unknown outcome covers.
type extent struct {
	remnant    *remnant
	first, end uint64
	direct     bool // a reservation command, which covers none
}

// changesData reports whether an operation changes blocks.
func changesData(op block.Op) bool {
	return op == block.OpWrite || op == block.OpWriteZeroes || op == block.OpDiscard
}

// changes reports whether a request may change blocks or reservations.
func (r *request) changes() bool { return r.direct != nil || changesData(r.io.Op) }

// bar makes the changes to the blocks of a request wait for the end of a remnant, if the
// request is a change. Its outcome is unknown.
func (ns *Namespace) bar(rem *remnant, r *request) {
	e := extent{remnant: rem, first: r.io.Sector, end: r.io.Sector + uint64(r.io.Sectors)}
	switch {
	case rem == nil, r.direct != nil && r.direct.mr != nil:
		return
	case r.direct != nil:
		if !nvme.IsWrite(&r.direct.cmd) {
			return
		}
		e = extent{remnant: rem, direct: true}
	case !changesData(r.io.Op):
		return
	}
	// end sets done before it calls unbar, so an extent that is added here is also removed.
	ns.mu.Lock()
	defer ns.mu.Unlock()
	if rem.hold() {
		return
	}
	var all []extent
	if old := ns.barrier.Load(); old != nil {
		all = slices.Clone(*old)
	}
	all = append(all, e)
	ns.barrier.Store(&all)
}

// hold counts one more change with unknown outcome. It reports whether the controller is
// already known to be gone.
func (rem *remnant) hold() (over bool) {
	rem.mu.Lock()
	defer rem.mu.Unlock()
	rem.held++
	return rem.done
}

// unbar removes the extents of a remnant that has ended.
func (ns *Namespace) unbar(rem *remnant) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	old := ns.barrier.Load()
	if old == nil {
		return
	}
	left := slices.DeleteFunc(slices.Clone(*old), func(e extent) bool { return e.remnant == rem })
	if len(left) == 0 {
		ns.barrier.Store(nil)
		return
	}
	ns.barrier.Store(&left)
}

// barred reports whether a request must wait for the end of a remnant.
func (ns *Namespace) barred(r *request) bool { return ns.barrierOf(r) != nil }

// barrierOf returns the oldest remnant that a request must wait for, or nil.
func (ns *Namespace) barrierOf(r *request) *remnant {
	all := ns.barrier.Load()
	if all == nil || r.direct == nil && !changesData(r.io.Op) {
		return nil
	}
	first, end := r.io.Sector, r.io.Sector+uint64(r.io.Sectors)
	for i := range *all {
		e := &(*all)[i]
		if r.direct != nil && e.direct || r.direct == nil && !e.direct && first < e.end && e.first < end {
			return e.remnant
		}
	}
	return nil
}

// heldTooLong reports whether a request that waits for a remnant has waited for as long as
// requests may wait for a path. It fails then; later changes still wait for the remnant.
func (s *Subsystem) heldTooLong(r *request) bool {
	rem := r.home.ns.barrierOf(r)
	limit, bounded := s.lossTime()
	return bounded && rem != nil && time.Since(rem.lost) >= limit
}

// leaveBehind makes the remnant of a lost association. The remnant ends at once if changes are
// not fenced.
func (c *Controller) leaveBehind(a *association, lost time.Time) {
	if c.cfg.Discovery || c.cfg.NoFence {
		return
	}
	s := c.sub
	rem := &remnant{
		ctrl: c, assoc: a, id: ControllerID{a.remote, a.cntlid}, keepAlive: c.cfg.KeepAlive,
		patience: c.patience(a, c.cfg.KeepAlive), lost: lost, alive: lost, over: make(chan struct{}),
		waits: "the next association of its path",
	}
	a.remnant = rem
	c.unfenced = append(c.unfenced, rem)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remnants = append(s.remnants, rem)
}

// follow waits in the background for the end of a remnant, if there is one. The requests of its
// association are parked by then, so that they are sent before later changes to their blocks.
func (s *Subsystem) follow(rem *remnant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if rem != nil && !s.closing && s.err == nil {
		s.running.Go(func() { s.fence(rem) })
	}
}

// end records that the controller is gone, and sends what waited for that. It must not be
// called on a loop.
func (rem *remnant) end(how string) {
	s := rem.ctrl.sub
	rem.mu.Lock()
	done, held := rem.done, rem.held
	rem.done = true
	rem.mu.Unlock()
	if done {
		return
	}
	s.cfg.Log.Info("old controller has ended", "controller", rem.id.CNTLID, "address", rem.id.Address.String(),
		"after", time.Since(rem.lost).Round(time.Millisecond), "because", how, "changes", held)
	s.recording.Lock()
	if rem.ctrl.announced == rem.id {
		rem.ctrl.announced = ControllerID{}
	}
	s.mu.Lock()
	s.remnants = slices.DeleteFunc(s.remnants, func(r *remnant) bool { return r == rem })
	s.mu.Unlock()
	s.recording.Unlock()
	for _, ns := range s.Namespaces() {
		ns.unbar(rem)
	}
	close(rem.over)
	if held > 0 {
		s.redispatch()
	}
}

// exists records that a path has said that the controller exists.
func (rem *remnant) exists(waits string) {
	rem.mu.Lock()
	defer rem.mu.Unlock()
	rem.alive, rem.waits = time.Now(), waits
}

// left returns how long the controller may still exist if no path says more.
func (rem *remnant) left() time.Duration {
	rem.mu.Lock()
	defer rem.mu.Unlock()
	return time.Until(rem.alive.Add(rem.patience))
}

func (rem *remnant) setWaits(format string, args ...any) {
	rem.mu.Lock()
	defer rem.mu.Unlock()
	rem.waits = fmt.Sprintf(format, args...)
}

// fence waits until the other paths show that the controller of a remnant is gone. While there
// is no other path, this is left to the next association of its own.
func (s *Subsystem) fence(rem *remnant) {
	for pause := fencePause; ; pause = min(2*pause, fencePauseMax) {
		switch b := s.witness(rem); {
		case b != nil:
			rem.setWaits("path %v, which knows the controller, to say that it is gone", b.remote)
			presence, err := b.ctrl.ask(b.life, b, rem.id.CNTLID)
			switch {
			case presence == ended:
				rem.end(fmt.Sprintf("path %v, which knew it, says so", b.remote))
				return
			case presence != unclear && (s.inherited(rem, b) || b.ctrl.superseded(b.life, b, rem.id)):
				rem.end("its id belongs to another association by now")
				return
			case presence != unclear:
				rem.exists(fmt.Sprintf("path %v, which says that the controller exists, to say that it is gone", b.remote))
			case rem.left() <= 0:
				rem.end(fmt.Sprintf("path %v does not answer, and the target must have ended it by now (%v)", b.remote, err))
				return
			}
		case s.others(rem.ctrl):
			left := rem.left()
			if left <= 0 {
				rem.end("no path can tell, and the target must have ended it by now")
				return
			}
			rem.setWaits("%v since the loss, because no other path knows the controller", rem.patience)
		}
		select {
		case <-time.After(pause):
		case <-rem.over:
			return
		case <-s.life.Done():
			return
		}
	}
}

// inherited reports whether the target has given the id of a remnant to another path since, so
// that the old controller has ended: some targets always give the lowest free id. The other
// path must be to the same target: at the same address, or one of them must know the
// controllers of the other. by is the association that asks.
func (s *Subsystem) inherited(rem *remnant, by *association) bool {
	for _, c := range s.paths() {
		d := c.current()
		if d == nil || d == by || d.cntlid != rem.id.CNTLID || d.asked.Before(rem.lost) {
			continue
		}
		if d.remote == rem.id.Address || rem.assoc != nil && rem.assoc.knownAt(d.remote) || d.vouchesFor(by) {
			return true
		}
	}
	return false
}

// witness returns an association of another path whose target knew the controller of a
// remnant, or nil.
func (s *Subsystem) witness(rem *remnant) *association {
	for _, c := range s.paths() {
		if b := c.current(); c != rem.ctrl && b != nil && b.vouchesFor(rem.assoc) {
			return b
		}
	}
	return nil
}

// others reports whether another path has an association.
func (s *Subsystem) others(c *Controller) bool {
	for _, other := range s.paths() {
		if other != c && other.current() != nil {
			return true
		}
	}
	return false
}

// vouching holds the associations of other paths whose controllers are known to the target of
// an association.
type vouching struct {
	mu    sync.Mutex
	knows map[*association]bool
	known []netip.AddrPort // addresses whose targets know the controller of this one
}

func (v *vouching) vouchesFor(a *association) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return a != nil && v.knows[a]
}

func (v *vouching) knew(a *association) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.knows == nil {
		v.knows = make(map[*association]bool)
	}
	v.knows[a] = true
}

// isKnown records that the target at an address knows the controller of this association.
func (v *vouching) isKnown(at netip.AddrPort) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.known = append(v.known, at)
}

// knownAt reports whether the target at an address knew the controller of this association.
func (v *vouching) knownAt(at netip.AddrPort) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Contains(v.known, at)
}

// question is whether the target of an association knows the controller of another one. It is
// asked by a path for all others, in both directions.
type question struct{ by, of *association }

// vouch asks over each of two paths whether its target knows the controller of the other, for
// all other paths. A target that does not know a controller while it exists cannot say later
// that it is gone. What is not answered clearly is asked again, up to vouchPauseMax.
func (c *Controller) vouch(a *association) {
	if c.cfg.Discovery || c.cfg.NoFence {
		return
	}
	open := c.questions(a)
	for pause := fencePauseMax; pause <= vouchPauseMax; pause *= 2 {
		open = slices.DeleteFunc(open, func(q question) bool { return c.inquire(a, q) })
		if len(open) == 0 {
			return
		}
		select {
		case <-time.After(pause):
		case <-a.life.Done():
			return
		}
	}
}

// vouchPauseMax limits the pause between two questions: a target that has given no clear answer
// for about a minute will give none.
const vouchPauseMax = 32 * time.Second

// questions returns what must be asked about a new association and the present ones of the
// other paths.
func (c *Controller) questions(a *association) (all []question) {
	for _, other := range c.sub.paths() {
		b := other.current()
		if other == c || b == nil {
			continue
		}
		if a.cntlid == b.cntlid {
			c.cfg.Log.Warn("two paths have the same controller id; none of them can say whether the controller of the other is gone",
				"controller", a.cntlid, "addresses", fmt.Sprint([]netip.AddrPort{a.remote, b.remote}))
			continue
		}
		all = append(all, question{by: b, of: a}, question{by: a, of: b})
	}
	return all
}

// inquire asks a question while a lives. It reports whether it need not be asked again.
func (c *Controller) inquire(a *association, q question) bool {
	ctx, cancel := a.during(q.by.life)
	presence, err := q.by.ctrl.ask(ctx, q.by, q.of.cntlid)
	cancel()
	// An answer counts only if the controller still existed afterwards.
	lives := q.of.life.Err() == nil
	if (presence == present || presence == joined) && lives {
		q.by.knew(q.of)
		q.of.isKnown(q.by.remote)
	}
	c.cfg.Log.Info("path was asked for the controller of another", "asked", q.by.remote.String(), "for", q.of.remote.String(),
		"knows", q.by.vouchesFor(q.of), "error", err)
	return presence != unclear || !lives || q.by.life.Err() != nil
}

// fences describes the remnants that changes wait for.
func (s *Subsystem) fences() []FenceInfo {
	s.mu.Lock()
	remnants := slices.Clone(s.remnants)
	s.mu.Unlock()
	var all []FenceInfo
	for _, rem := range remnants {
		rem.mu.Lock()
		if !rem.done && rem.held > 0 {
			all = append(all, FenceInfo{rem.id.Address, rem.id.CNTLID, rem.lost, rem.held, rem.waits})
		}
		rem.mu.Unlock()
	}
	return all
}

// heldFor returns the number of changes that wait for the end of old controllers of a path.
func (s *Subsystem) heldFor(c *Controller) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, rem := range s.remnants {
		if rem.ctrl == c {
			rem.mu.Lock()
			n += rem.held
			rem.mu.Unlock()
		}
	}
	return n
}

// holders returns all controllers that may have commands of this process. The caller holds
// recording.
func (s *Subsystem) holders() []ControllerID {
	s.mu.Lock()
	remnants, paths := slices.Clone(s.remnants), s.lockedPaths()
	s.mu.Unlock()
	var all []ControllerID
	add := func(id ControllerID) {
		if id.Address.IsValid() && !slices.Contains(all, id) {
			all = append(all, id)
		}
	}
	for _, rem := range remnants {
		add(rem.id)
	}
	for _, c := range paths {
		add(c.announced)
	}
	return all
}

// traces returns the traces of the connections of all paths. The caller holds recording.
func (s *Subsystem) traces() (all []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.lockedPaths() {
		all = append(all, c.traces...)
	}
	return all
}

// errBarred is the error of a reservation command while an earlier one may still be executed.
var errBarred = fmt.Errorf("an earlier reservation command was lost with its path and may still be executed: %w", unix.EBUSY)

// expire fails the requests that have waited for too long for a namespace, for access to it,
// or for a remnant.
func (s *Subsystem) expire(now time.Time) {
	changed := false
	for _, ns := range s.Namespaces() {
		changed = s.expireAccess(ns, now) || changed
	}
	limit, bounded := s.lossTime()
	s.mu.Lock()
	for _, rem := range s.remnants {
		changed = changed || bounded && now.Sub(rem.lost) >= limit
	}
	s.mu.Unlock()
	if changed {
		s.redispatch()
	}
}

// await waits for the end of the remnants of the path. The association a of the path asks for
// them. It returns an error if a fails or ctx is done before.
func (c *Controller) await(ctx context.Context, a *association) error {
	for len(c.unfenced) > 0 {
		rem := c.unfenced[0]
		if err := c.fence(ctx, a, rem); err != nil {
			return err
		}
		rem.end(fmt.Sprintf("path %v says so", a.remote))
		c.unfenced = c.unfenced[1:]
	}
	return nil
}
