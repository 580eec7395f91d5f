package initiator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/bits"
	"slices"
	"strings"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
)

// A controller learns about the namespaces of its subsystem by looks. It looks before it uses
// an association, after each event, and repeatedly while anything is unknown.
//
//	         found, the same                  found, the same
//	 (new) ──────────────────► served ◄──────────────────────┐
//	                             │ association lost           │
//	                             ▼                            │
//	                            held ── fast_io_fail_tmo ─► failing
//	                             │
//	  served: not listed,        │ ctrl_loss_tmo, or
//	  another one in its place   │ another one in its place
//	             │               ▼
//	             └────────────► gone ── found, the same ─► served
//
// A namespace that is served and to which no path has given access for longer than requests may
// wait (ANA) is inaccessible: its requests fail, and it stays. The first access makes it served.
//
// A look that fails changes nothing: a namespace that could not be identified counts
// neither as replaced nor as gone, and does not delay the others. Only a namespace that was
// found over the present association can turn out to be missing.

// While anything is unknown, the pause between looks is lookPause at first and doubles up to
// lookPauseMax. Looks after events are also at least lookPause apart, so that a flood of
// events does not cause a flood of commands.
const (
	lookPause    = 100 * time.Millisecond
	lookPauseMax = 5 * time.Second
)

// firstLookTime is how long Connect waits for namespaces that cannot be identified. Those
// that are still unknown are added later, when they have been identified.
const firstLookTime = 2 * time.Second

// maxNamespaces is the largest number of namespaces that a subsystem keeps. It limits the
// memory that a target can use up.
const maxNamespaces = 4096

// firstLook identifies the namespaces of a controller that connects. It fails if none of
// them can be identified.
func (c *Controller) firstLook(ctx context.Context, a *association) error {
	limit := time.Now().Add(firstLookTime)
	for pause := lookPause; ; pause = min(2*pause, lookPauseMax) {
		complete, err := c.look(ctx, a)
		switch {
		case err != nil, complete:
			return err
		case c.refusedBecause(a) != nil:
			return nil // it is for the caller to decide
		case !time.Now().Add(pause).After(limit):
		case len(c.sub.Namespaces()) == 0:
			return a.unknown
		default:
			return nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// watchNamespaces looks at the namespaces of an association after each change, and
// repeatedly while anything is unknown, until ctx is done.
func (c *Controller) watchNamespaces(ctx context.Context, a *association) {
	complete := a.known && a.settled
	pause := lookPause
	for {
		var repeat <-chan time.Time
		if !complete {
			repeat = time.After(c.sub.untilNextLook(pause))
			pause = min(2*pause, lookPauseMax)
		}
		select {
		case <-a.changed:
			clear(a.found)
			pause = lookPause
		case <-a.reread:
		case <-repeat:
		case <-ctx.Done():
			return
		}
		before := c.sub.presences()
		var err error
		if complete, err = c.look(ctx, a); err != nil && ctx.Err() == nil {
			c.sub.reports.Warn("look at namespaces", "error", err)
		}
		complete = complete && a.settled
		c.sub.expireHeld(time.Now())
		if a.turned || !slices.Equal(before, c.sub.presences()) {
			c.sub.redispatch()
		}
		select {
		case <-time.After(lookPause):
		case <-ctx.Done():
			return
		}
	}
}

func (ns *Namespace) isHeld() bool {
	p := ns.presence.Load()
	return p == held || p == failing
}

// presences returns the presence of each namespace and the paths that have it, for
// comparison.
func (s *Subsystem) presences() (all []presence) {
	for _, ns := range s.Namespaces() {
		all = append(all, ns.presence.Load())
		for slot := range ns.views {
			if ns.views[slot].Load() != nil {
				all = append(all, presence(slot)<<8)
			}
		}
	}
	return all
}

// untilNextLook returns pause, or the time until requests of a held namespace must fail
// if that is less.
func (s *Subsystem) untilNextLook(pause time.Duration) time.Duration {
	now := time.Now()
	for _, ns := range s.Namespaces() {
		if !ns.isHeld() {
			continue
		}
		for _, limit := range []time.Duration{s.cfg.FastIOFail, s.cfg.CtrlLoss} {
			if left := limit - ns.heldFor(now); limit > 0 && left > 0 {
				pause = min(pause, left)
			}
		}
	}
	return pause
}

// expireHeld fails or removes held namespaces that have not come back in time.
func (s *Subsystem) expireHeld(now time.Time) {
	for _, ns := range s.Namespaces() {
		if !ns.isHeld() {
			continue
		}
		waited := ns.heldFor(now)
		switch {
		case s.cfg.CtrlLoss > 0 && waited >= s.cfg.CtrlLoss:
			s.remove(ns, fmt.Sprintf("it did not come back within %v", s.cfg.CtrlLoss))
		case s.cfg.FastIOFail > 0 && waited >= s.cfg.FastIOFail && ns.presence.CompareAndSwap(held, failing):
			s.cfg.Log.Warn("namespace has not come back; its requests fail", "nsid", ns.id, "after", s.cfg.FastIOFail)
		}
	}
}

// look updates the namespaces. It returns false if it must be repeated, and an error if
// the association failed.
func (c *Controller) look(ctx context.Context, a *association) (complete bool, err error) {
	defer func() { a.known = complete }()
	if c.cfg.Discovery {
		return true, nil // it has none
	}
	limits, known, err := c.identifyLimits(ctx, a)
	if err != nil {
		return false, err
	}
	listed, err := c.activeNamespaces(ctx, a)
	if err != nil {
		return false, c.tolerate(a, "list namespaces", err)
	}
	complete = known
	there := make(map[uint32]bool, len(listed))
	for _, id := range listed {
		there[id] = true
		if a.found[id] {
			continue
		}
		found, err := c.identifyNamespace(ctx, a, id, limits)
		var unusable *UnusableError
		switch {
		case err == nil:
			if c.sub.place(c, a, found) {
				a.found[id] = true
				c.sub.takeIn(id)
				c.admit(a, id)
			} else {
				complete = false
			}
		case errors.As(err, &unusable):
			a.found[id] = true
			c.sub.leaveOut(id, unusable.Reason)
			c.sub.reports.Warn("namespace left out", "nsid", id, "reason", unusable.Reason)
			c.sub.lack(c, id, unusable.Error())
		case errors.Is(err, errInactive):
			delete(there, id)
		default:
			complete = false
			if err := c.tolerate(a, fmt.Sprintf("identify namespace %d", id), err); err != nil {
				return false, err
			}
		}
	}
	c.forgetRefusals(a, there)
	for _, ns := range c.sub.Namespaces() {
		switch {
		case there[ns.id]:
		case ns.presence.Load() != gone && ns.views[c.slot].Load() != nil:
			delete(a.found, ns.id)
			c.sub.lack(c, ns.id, "the target does not list it any more")
		case ns.isHeld():
			complete = false
		}
	}
	c.sub.forget()
	if a.settled, a.turned, err = c.updateANA(ctx, a); err != nil {
		return false, err
	}
	return complete, nil
}

// tolerate logs an error that leaves something unknown for now, once per association and
// step, and returns nil. It returns an error that ends the association.
func (c *Controller) tolerate(a *association, step string, err error) error {
	var bad *badDataError
	if errors.As(err, new(nvme.Status)) || errors.As(err, &bad) {
		level := slog.LevelWarn
		if a.reported[step] {
			level = slog.LevelDebug
		}
		a.reported[step], a.unknown = true, fmt.Errorf("%s: %w", step, err)
		c.sub.reports.Log(context.Background(), level, "information about namespaces is missing; asking again", "step", step, "error", err)
		return nil
	}
	return fmt.Errorf("%s: %w", step, err)
}

// place updates the known namespace that a path has found, or adds a new one. It returns
// false if it cannot tell which.
func (s *Subsystem) place(c *Controller, a *association, f *finding) bool {
	s.placing.Lock()
	defer s.placing.Unlock()
	for _, ns := range s.Namespaces() {
		if ns.id != f.id {
			continue
		}
		answer, reason := ns.compare(f)
		if answer == same {
			if differs := ns.unlike(c.slot, f); differs != "" {
				answer, reason = different, differs
			}
		}
		switch {
		case answer != same && ns.presence.Load() != gone && s.keptBy(ns, c):
			ns.withdraw(c.slot)
			c.refuse(a, ns.id, reason)
			return false
		case answer == same:
			s.removeOthers(ns.id, ns, "another namespace has its id")
			s.confirm(c, a, ns, f)
			return true
		case answer == unknown && ns.presence.Load() != gone:
			s.reports.Warn("namespace cannot be recognized", "nsid", ns.id, "reason", reason)
			return false
		case answer == different:
			s.remove(ns, reason)
		}
	}
	if twin, id := s.twinOf(f); twin != nil {
		c.refuse(a, f.id, fmt.Sprintf("it has the %s, as namespace %d has", id, twin.id))
		return false
	}
	if len(s.Namespaces()) >= maxNamespaces {
		s.reports.Warn("namespace left out", "nsid", f.id, "reason", fmt.Sprintf("there are %d already", maxNamespaces))
		return true
	}
	ns := &Namespace{
		sub: s, id: f.id, ids: f.ids,
		sectorShift: uint8(bits.TrailingZeros32(f.geometry.LogicalBlock >> block.SectorShift)),
	}
	ns.adopt(c.slot, f, &a.ana)
	ns.presence.Store(served)
	s.mu.Lock()
	s.namespaces = append(s.namespaces, ns)
	s.mu.Unlock()
	s.changed(ns, Added, "it is new")
	return true
}

// confirm serves a namespace that is the same as before, with its changed properties.
func (s *Subsystem) confirm(c *Controller, a *association, ns *Namespace, f *finding) {
	was, now := ns.adopt(c.slot, f, &a.ana)
	// Only access makes one served that is inaccessible.
	if p := ns.presence.Load(); p != inaccessible && ns.presence.Swap(served) == gone {
		s.changed(ns, Added, "it is back")
	}
	if was.Sectors != now.Sectors {
		s.changed(ns, Resized, fmt.Sprintf("from %d to %d sectors", was.Sectors, now.Sectors))
	}
	if was.ReadOnly != now.ReadOnly {
		s.changed(ns, WriteProtection, fmt.Sprintf("read-only %t", now.ReadOnly))
	}
	s.reportLimits(ns, was, now)
}

// keptBy reports whether another path has a namespace, or may have it: a path that is not
// connected may have it when it is back. Then the namespace is not replaced by what this path
// has in its place.
func (s *Subsystem) keptBy(ns *Namespace, c *Controller) bool {
	for _, other := range s.paths() {
		if other != c && (other.current() == nil || ns.views[other.slot].Load() != nil) {
			return true
		}
	}
	return false
}

// refuse records why a path is not used for a namespace.
func (c *Controller) refuse(a *association, nsid uint32, reason string) {
	err := fmt.Errorf("namespace %d is not used over this path: %s", nsid, reason)
	c.mu.Lock()
	last := a.refused[nsid]
	known := last != nil && last.Error() == err.Error()
	if a.refused == nil {
		a.refused = make(map[uint32]error)
	}
	a.refused[nsid] = err
	c.mu.Unlock()
	if !known {
		c.sub.reports.Warn("namespace refused over a path", "nsid", nsid, "address", a.remote.String(), "reason", reason)
	}
}

// twinOf returns the namespace with another number that has an identifier of a finding, and that
// identifier. An identifier names one namespace only, so one of the two is not what it says. The
// one that came first is kept, unless it is gone.
func (s *Subsystem) twinOf(f *finding) (*Namespace, string) {
	for _, ns := range s.Namespaces() {
		if ns.id == f.id || ns.presence.Load() == gone {
			continue
		}
		ns.mu.Lock()
		id := shared(ns.ids, f.ids)
		ns.mu.Unlock()
		if id != "" {
			return ns, id
		}
	}
	return nil, ""
}

// forgetRefusals forgets the refusals of namespaces that the controller does not list.
func (c *Controller) forgetRefusals(a *association, listed map[uint32]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(a.refused, func(nsid uint32, _ error) bool { return !listed[nsid] })
}

// admit forgets that a namespace was refused over an association.
func (c *Controller) admit(a *association, nsid uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(a.refused, nsid)
}

// refusedBecause returns why namespaces are not used over an association, or nil.
func (c *Controller) refusedBecause(a *association) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return a.refusals()
}

// refusals returns why namespaces are not used over the association, or nil. The caller holds the
// controller's mu.
func (a *association) refusals() error {
	if len(a.refused) == 0 {
		return nil
	}
	var all []string
	for _, nsid := range slices.Sorted(maps.Keys(a.refused)) {
		all = append(all, a.refused[nsid].Error())
	}
	return errors.New(strings.Join(all, "; "))
}

// lack is called when a path does not have a usable namespace with an id. The namespace goes
// with the last path that has it, or may have it.
func (s *Subsystem) lack(c *Controller, id uint32, reason string) {
	s.placing.Lock()
	defer s.placing.Unlock()
	for _, ns := range s.Namespaces() {
		if ns.id != id || ns.presence.Load() == gone {
			continue
		}
		switch last := ns.withdraw(c.slot); {
		case !last:
			s.reports.Warn("a path has lost a namespace", "nsid", id, "slot", c.slot, "reason", reason)
		case s.keptBy(ns, c):
			ns.hold(time.Now())
		default:
			s.remove(ns, reason)
		}
	}
}

// maxLeftOut bounds what is kept of the namespaces that are left out: a target may list any number.
const maxLeftOut = 8

// leaveOut keeps the reason for which a namespace is left out.
func (s *Subsystem) leaveOut(id uint32, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leftOut == nil {
		s.leftOut = make(map[uint32]string)
	}
	if _, known := s.leftOut[id]; known || len(s.leftOut) < maxLeftOut {
		s.leftOut[id] = reason
	}
}

// takeIn forgets that a namespace was left out.
func (s *Subsystem) takeIn(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.leftOut, id)
}

// doubt has the namespaces found again over the next association of a path.
func (s *Subsystem) doubt(c *Controller, when time.Time) {
	s.placing.Lock()
	defer s.placing.Unlock()
	for _, ns := range s.Namespaces() {
		ns.doubt(c.slot, when)
	}
}

// reportLimits logs changes of limits for which open queues must compensate.
func (s *Subsystem) reportLimits(ns *Namespace, was, now block.Geometry) {
	if now.VolatileCache && !was.VolatileCache {
		s.reports.Warn("namespace has a volatile cache now; writes of devices without a cache bypass it", "nsid", ns.id)
	}
	if now.MaxIO < was.MaxIO || now.MaxDiscardSectors < was.MaxDiscardSectors || now.MaxZeroesSectors < was.MaxZeroesSectors {
		s.reports.Warn("limits of namespace have shrunk; larger requests are split", "nsid", ns.id, "max_io", now.MaxIO,
			"max_discard_sectors", now.MaxDiscardSectors, "max_zeroes_sectors", now.MaxZeroesSectors)
	}
}

// remove makes the requests of a namespace fail from now on. The namespace is gone, and the
// one that replaced it must not be written to.
func (s *Subsystem) remove(ns *Namespace, reason string) {
	if ns.presence.Swap(gone) != gone {
		s.changed(ns, Removed, reason)
	}
}

// removeOthers removes all namespaces with an id, except one.
func (s *Subsystem) removeOthers(id uint32, but *Namespace, reason string) {
	for _, ns := range s.Namespaces() {
		if ns.id == id && ns != but {
			s.remove(ns, reason)
		}
	}
}

// maxGone is the number of gone namespaces without an open queue that a controller keeps,
// because they may come back.
const maxGone = 64

// forget drops the oldest such namespaces beyond maxGone.
func (s *Subsystem) forget() {
	unused := func(ns *Namespace) bool { return ns.presence.Load() == gone && ns.open.Load() == 0 }
	s.mu.Lock()
	defer s.mu.Unlock()
	excess := -maxGone
	for _, ns := range s.namespaces {
		if unused(ns) {
			excess++
		}
	}
	s.namespaces = slices.DeleteFunc(slices.Clone(s.namespaces), func(ns *Namespace) bool {
		if excess <= 0 || !unused(ns) {
			return false
		}
		excess--
		return true
	})
}

// changed reports a change to Config.Changed.
func (s *Subsystem) changed(ns *Namespace, what Change, detail string) {
	s.mu.Lock()
	connected := s.connected
	s.mu.Unlock()
	if !connected {
		return // Connect returns all namespaces
	}
	s.reports.Warn("namespace "+what.String(), "nsid", ns.id, "detail", detail) //nolint:sloglint // one of a few
	if s.cfg.Changed != nil {
		s.cfg.Changed(ns, what)
	}
}
