package initiator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
)

// A controller learns about its namespaces by looks. It looks before it uses an
// association, after each event, and repeatedly while anything is unknown.
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

// maxNamespaces is the largest number of namespaces that a controller keeps. It limits the
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
		case !time.Now().Add(pause).After(limit):
		case len(c.Namespaces()) == 0:
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
	complete := a.known
	pause := lookPause
	for {
		var repeat <-chan time.Time
		if !complete {
			repeat = time.After(c.untilNextLook(pause))
			pause = min(2*pause, lookPauseMax)
		}
		select {
		case <-a.changed:
			clear(a.found)
			pause = lookPause
		case <-repeat:
		case <-ctx.Done():
			return
		}
		before := c.presences()
		var err error
		if complete, err = c.look(ctx, a); err != nil && ctx.Err() == nil {
			c.cfg.Log.Warn("look at namespaces", "error", err)
		}
		c.expireHeld(time.Now())
		if !slices.Equal(before, c.presences()) {
			c.redispatch()
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

// presences returns the presence of each namespace, for comparison.
func (c *Controller) presences() (all []presence) {
	for _, ns := range c.Namespaces() {
		all = append(all, ns.presence.Load())
	}
	return all
}

// untilNextLook returns pause, or the time until requests of a held namespace must fail
// if that is less.
func (c *Controller) untilNextLook(pause time.Duration) time.Duration {
	now := time.Now()
	for _, ns := range c.Namespaces() {
		if !ns.isHeld() {
			continue
		}
		for _, limit := range []time.Duration{c.cfg.FastIOFail, c.cfg.CtrlLoss} {
			if left := limit - ns.heldFor(now); limit > 0 && left > 0 {
				pause = min(pause, left)
			}
		}
	}
	return pause
}

// expireHeld fails or removes held namespaces that have not come back in time.
func (c *Controller) expireHeld(now time.Time) {
	for _, ns := range c.Namespaces() {
		if !ns.isHeld() {
			continue
		}
		waited := ns.heldFor(now)
		switch {
		case c.cfg.CtrlLoss > 0 && waited >= c.cfg.CtrlLoss:
			c.remove(ns, fmt.Sprintf("it did not come back within %v", c.cfg.CtrlLoss))
		case c.cfg.FastIOFail > 0 && waited >= c.cfg.FastIOFail && ns.presence.CompareAndSwap(held, failing):
			c.cfg.Log.Warn("namespace has not come back; its requests fail", "nsid", ns.id, "after", c.cfg.FastIOFail)
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
			if c.place(found) {
				a.found[id] = true
			} else {
				complete = false
			}
		case errors.As(err, &unusable):
			a.found[id] = true
			c.cfg.Log.Warn("namespace left out", "nsid", id, "reason", unusable.Reason)
			c.removeOthers(id, nil, unusable.Error())
		case errors.Is(err, errInactive):
			delete(there, id)
		default:
			complete = false
			if err := c.tolerate(a, fmt.Sprintf("identify namespace %d", id), err); err != nil {
				return false, err
			}
		}
	}
	for _, ns := range c.Namespaces() {
		switch {
		case there[ns.id]:
		case ns.presence.Load() == served:
			delete(a.found, ns.id)
			c.remove(ns, "the target does not list it any more")
		case ns.isHeld():
			complete = false
		}
	}
	c.forget()
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
		c.cfg.Log.Log(context.Background(), level, "information about namespaces is missing; asking again", "step", step, "error", err)
		return nil
	}
	return fmt.Errorf("%s: %w", step, err)
}

// place updates the known namespace that found is, or adds found as a new one. It returns
// false if it cannot tell which.
func (c *Controller) place(found *Namespace) bool {
	for _, ns := range c.Namespaces() {
		if ns.id != found.id {
			continue
		}
		answer, reason := ns.compare(found)
		switch {
		case answer == same:
			c.removeOthers(ns.id, ns, "another namespace has its id")
			c.confirm(ns, found)
			return true
		case answer == unknown && ns.presence.Load() != gone:
			c.cfg.Log.Warn("namespace cannot be recognized", "nsid", ns.id, "reason", reason)
			return false
		case answer == different:
			c.remove(ns, reason)
		}
	}
	if len(c.Namespaces()) >= maxNamespaces {
		c.cfg.Log.Warn("namespace left out", "nsid", found.id, "reason", fmt.Sprintf("there are %d already", maxNamespaces))
		return true
	}
	found.presence.Store(served)
	c.mu.Lock()
	c.namespaces = append(c.namespaces, found)
	c.mu.Unlock()
	c.changed(found, Added, "it is new")
	return true
}

// confirm serves a namespace that is the same as before, with its changed properties.
func (c *Controller) confirm(ns, found *Namespace) {
	now := found.geometry
	was := ns.adopt(found)
	if ns.presence.Swap(served) == gone {
		c.changed(ns, Added, "it is back")
	}
	if was.Sectors != now.Sectors {
		c.changed(ns, Resized, fmt.Sprintf("from %d to %d sectors", was.Sectors, now.Sectors))
	}
	if was.ReadOnly != now.ReadOnly {
		c.changed(ns, WriteProtection, fmt.Sprintf("read-only %t", now.ReadOnly))
	}
	c.reportLimits(ns, was, now)
}

// reportLimits logs changes of limits for which open queues must compensate.
func (c *Controller) reportLimits(ns *Namespace, was, now block.Geometry) {
	if now.VolatileCache && !was.VolatileCache {
		c.cfg.Log.Warn("namespace has a volatile cache now; writes of devices without a cache bypass it", "nsid", ns.id)
	}
	if now.MaxIO < was.MaxIO || now.MaxDiscardSectors < was.MaxDiscardSectors || now.MaxZeroesSectors < was.MaxZeroesSectors {
		c.cfg.Log.Warn("limits of namespace have shrunk; larger requests are split", "nsid", ns.id, "max_io", now.MaxIO,
			"max_discard_sectors", now.MaxDiscardSectors, "max_zeroes_sectors", now.MaxZeroesSectors)
	}
}

// remove makes the requests of a namespace fail from now on. The namespace is gone, and the
// one that replaced it must not be written to.
func (c *Controller) remove(ns *Namespace, reason string) {
	if ns.presence.Swap(gone) != gone {
		c.changed(ns, Removed, reason)
	}
}

// removeOthers removes all namespaces with an id, except one.
func (c *Controller) removeOthers(id uint32, but *Namespace, reason string) {
	for _, ns := range c.Namespaces() {
		if ns.id == id && ns != but {
			c.remove(ns, reason)
		}
	}
}

// maxGone is the number of gone namespaces without an open queue that a controller keeps,
// because they may come back.
const maxGone = 64

// forget drops the oldest such namespaces beyond maxGone.
func (c *Controller) forget() {
	unused := func(ns *Namespace) bool { return ns.presence.Load() == gone && ns.open.Load() == 0 }
	c.mu.Lock()
	defer c.mu.Unlock()
	excess := -maxGone
	for _, ns := range c.namespaces {
		if unused(ns) {
			excess++
		}
	}
	c.namespaces = slices.DeleteFunc(slices.Clone(c.namespaces), func(ns *Namespace) bool {
		if excess <= 0 || !unused(ns) {
			return false
		}
		excess--
		return true
	})
}

// changed reports a change to Config.Changed.
func (c *Controller) changed(ns *Namespace, what Change, detail string) {
	if c.Info().State == StateNew {
		return // Connect returns all namespaces
	}
	c.cfg.Log.Warn("namespace "+what.String(), "nsid", ns.id, "detail", detail) //nolint:sloglint // one of a few
	if c.cfg.Changed != nil {
		c.cfg.Changed(ns, what)
	}
}
