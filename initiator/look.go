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

// What a controller knows of its namespaces is made by looks: one before each
// association is used, one after each event, and further ones, at intervals, as long as
// something is not known.
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
// A look that fails changes nothing: a namespace that could not be identified is
// neither another one nor gone, and does not keep the others from being served. Only a
// namespace that was found over the present association can be missed.

// Looks that are repeated because something is not known begin with lookPause between
// them, which doubles up to lookPauseMax. After an event, too, looks are lookPause
// apart, so that a flood of events does not make a flood of commands.
const (
	lookPause    = 100 * time.Millisecond
	lookPauseMax = 5 * time.Second
)

// firstLookTime is how long Connect waits for namespaces that cannot be identified.
// Those that are still unknown then are added when they are known.
const firstLookTime = 2 * time.Second

// maxNamespaces bounds what a target can make the host remember.
const maxNamespaces = 4096

// firstLook identifies the namespaces of a controller that connects. It is an error if
// nothing can be learned about any of them.
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

// watchNamespaces looks at the namespaces of an association when something about them
// changes, and again while something is not known, until ctx is done.
func (c *Controller) watchNamespaces(ctx context.Context, a *association) {
	complete := c.allKnown(a)
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

// allKnown says whether the last look over an association left nothing to be found.
func (c *Controller) allKnown(a *association) bool {
	return a.known && !slices.ContainsFunc(c.Namespaces(), (*Namespace).isHeld)
}

func (ns *Namespace) isHeld() bool {
	p := ns.presence.Load()
	return p == held || p == failing
}

// presences is what is known of all namespaces, to be compared.
func (c *Controller) presences() (all []presence) {
	for _, ns := range c.Namespaces() {
		all = append(all, ns.presence.Load())
	}
	return all
}

// untilNextLook is pause, or the time until the requests of a held namespace have
// waited for long enough.
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

// expireHeld ends the patience for namespaces that have not come back.
func (c *Controller) expireHeld(now time.Time) {
	for _, ns := range c.Namespaces() {
		if !ns.isHeld() {
			continue
		}
		waited := ns.heldFor(now)
		switch {
		case c.cfg.CtrlLoss > 0 && waited >= c.cfg.CtrlLoss:
			c.remove(ns, fmt.Sprintf("it has not come back within %v", c.cfg.CtrlLoss))
		case c.cfg.FastIOFail > 0 && waited >= c.cfg.FastIOFail && ns.presence.CompareAndSwap(held, failing):
			c.cfg.Log.Warn("requests to a namespace that has not come back fail", "nsid", ns.id, "after", c.cfg.FastIOFail)
		}
	}
}

// look finds out what the namespaces are now. complete is false if it has to be
// repeated. An error other than a status is one of the association.
func (c *Controller) look(ctx context.Context, a *association) (complete bool, err error) {
	defer func() { a.known = complete }()
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
			c.remove(ns, "it is not there any more")
		case ns.isHeld():
			complete = false
		}
	}
	c.forget()
	return complete, nil
}

// tolerate logs an error that leaves something unknown for now, once for each
// association, and returns one that ends the association.
func (c *Controller) tolerate(a *association, step string, err error) error {
	var bad *badDataError
	if errors.As(err, new(nvme.Status)) || errors.As(err, &bad) {
		level := slog.LevelWarn
		if a.reported[step] {
			level = slog.LevelDebug
		}
		a.reported[step], a.unknown = true, fmt.Errorf("%s: %w", step, err)
		c.cfg.Log.Log(context.Background(), level, "something about namespaces is not known; it is asked once more", "step", step, "error", err)
		return nil
	}
	return fmt.Errorf("%s: %w", step, err)
}

// place finds the namespace that found is, or makes it a new one. It returns false if
// that cannot be told.
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

// confirm serves a namespace that is the same as before, with what has changed of it.
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

// reportLimits logs what a queue has to make up for.
func (c *Controller) reportLimits(ns *Namespace, was, now block.Geometry) {
	if now.VolatileCache && !was.VolatileCache {
		c.cfg.Log.Warn("namespace has a volatile cache now; writes of devices that were told otherwise bypass it", "nsid", ns.id)
	}
	if now.MaxIO < was.MaxIO || now.MaxDiscardSectors < was.MaxDiscardSectors || now.MaxZeroesSectors < was.MaxZeroesSectors {
		c.cfg.Log.Warn("limits of namespace have shrunk; larger requests are split", "nsid", ns.id, "max_io", now.MaxIO,
			"max_discard_sectors", now.MaxDiscardSectors, "max_zeroes_sectors", now.MaxZeroesSectors)
	}
}

// remove fails the requests of a namespace from now on: what they were meant for is
// gone, and what stands in its place must not be written to.
func (c *Controller) remove(ns *Namespace, reason string) {
	if ns.presence.Swap(gone) != gone {
		c.changed(ns, Removed, reason)
	}
}

// removeOthers removes the namespaces with an id, but for one of them.
func (c *Controller) removeOthers(id uint32, but *Namespace, reason string) {
	for _, ns := range c.Namespaces() {
		if ns.id == id && ns != but {
			c.remove(ns, reason)
		}
	}
}

// maxGone is how many namespaces are remembered that are gone and that no front end
// has open. One of them may come back.
const maxGone = 64

// forget drops the oldest of those beyond maxGone.
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

// changed tells the embedder.
func (c *Controller) changed(ns *Namespace, what Change, detail string) {
	if c.Info().State == StateNew {
		return // Connect returns what there is
	}
	c.cfg.Log.Warn("namespace "+what.String(), "nsid", ns.id, "detail", detail) //nolint:sloglint // one of a few
	if c.cfg.Changed != nil {
		c.cfg.Changed(ns, what)
	}
}
