package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
)

const (
	// retirePause is the time between two attempts to end a device without a
	// namespace that is still in use.
	retirePause = time.Second
	// A change that fails is retried after retryPause, which doubles up to
	// retryPauseMax, until the change succeeds or is obsolete, or the server ends.
	retryPause    = time.Second
	retryPauseMax = 30 * time.Second
)

// change is a change of a namespace.
type change struct {
	namespace
	what initiator.Change
}

// pending is a change that has not been carried out yet.
type pending struct {
	change
	due   time.Time     // zero means now
	pause time.Duration // before the next attempt
}

// changed reports a change to follow. It does not block. Any goroutine may call it.
func (s *server) changed(ns namespace, what initiator.Change) {
	s.mu.Lock()
	s.reported = append(s.reported, change{ns, what})
	s.mu.Unlock()
	s.tell()
}

// tell makes follow look for reported changes.
func (s *server) tell() {
	select {
	case s.news <- struct{}{}:
	default:
	}
}

// follow applies changes of namespaces to the devices until ctx is done. A new namespace
// gets a device. When a namespace is removed, its device fails its I/O and ends as soon
// as it is not open any more. Sizes and write protection are passed on.
func (s *server) follow(ctx context.Context) {
	var timer <-chan time.Time
	for {
		select {
		case <-s.news:
		case <-timer:
		case <-ctx.Done():
			return
		}
		var next time.Time
		if !s.exclusively(ctx, func() { next = s.keepUp(ctx) }) {
			return
		}
		timer = nil
		if !next.IsZero() {
			timer = time.After(time.Until(next))
		}
	}
}

// keepUp carries out the changes that are due. It returns the time of the next one, or
// zero if there is none. The caller holds changes.
func (s *server) keepUp(ctx context.Context) (next time.Time) {
	for _, c := range s.takeReported() {
		s.note(c)
	}
	if !s.retire(ctx) {
		next = time.Now().Add(retirePause)
	}
	var left []*pending
	for _, p := range s.pending {
		if time.Now().Before(p.due) || !s.attempt(ctx, p) {
			left = append(left, p)
			if next.IsZero() || p.due.Before(next) {
				next = p.due
			}
		}
	}
	s.pending = left
	return next
}

func (s *server) takeReported() []change {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.reported
	s.reported = nil
	return all
}

// note adds a change to the pending ones, in place of an older one of the same kind. A
// removed namespace has no pending changes.
func (s *server) note(c change) {
	v := s.servingOf(c.device)
	s.pending = slices.DeleteFunc(s.pending, func(p *pending) bool {
		return p.device == c.device && (p.what == c.what || c.what == initiator.Removed)
	})
	switch {
	case c.what == initiator.Removed:
		if v != nil {
			v.orphan = true
		}
	case c.what == initiator.Added && v != nil:
		v.orphan = false
	case c.what == initiator.Added && len(s.opts.NSIDs) > 0 && !slices.Contains(s.opts.NSIDs, c.nsid):
	default:
		s.pending = append(s.pending, &pending{change: c, pause: retryPause})
	}
}

// errHeld means that the device of an earlier namespace with the same number is still
// in use.
var errHeld = errors.New("its predecessor is in use")

// attempt tries to carry out a change, and reports whether the change is settled. The
// caller holds changes.
func (s *server) attempt(ctx context.Context, p *pending) bool {
	switch err := s.apply(ctx, p.change); {
	case err == nil:
		return true
	case errors.Is(err, errHeld):
		p.due = time.Now().Add(retirePause)
		return false
	case errors.Is(err, errors.ErrUnsupported):
		s.events.Error("device cannot follow a change of its namespace", "nsid", p.nsid, "change", p.what.String(), "error", err)
		return true
	default:
		s.events.Error("device cannot follow a change of its namespace yet", "nsid", p.nsid, "change", p.what.String(), "again_in", p.pause, "error", err)
		p.due = time.Now().Add(p.pause)
		p.pause = min(2*p.pause, retryPauseMax)
		return false
	}
}

// apply carries out a change. The caller holds changes.
func (s *server) apply(ctx context.Context, c change) error {
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	v := s.servingOf(c.device)
	switch {
	case c.what == initiator.Added && v == nil:
		return s.offer(ctx, c.namespace)
	case v == nil:
		return nil
	case c.what == initiator.Resized:
		return s.resize(ctx, v)
	case c.what == initiator.WriteProtection:
		return v.dev.SetReadOnly(c.device.Geometry().ReadOnly)
	}
	return nil
}

// offer makes the device of an added namespace. An export, or the socket of a namespace, is
// named by the number of the namespace, so an earlier one with this number must end first.
func (s *server) offer(ctx context.Context, ns namespace) error {
	if s.front.name != options.Ublk && slices.ContainsFunc(s.devices(), func(v *serving) bool { return v.nsid == ns.nsid && v.orphan }) {
		return errHeld
	}
	if err := s.startDevice(ctx, ns, options.AutoDevice, true); err != nil {
		return err
	}
	s.acceptClients()
	return nil
}

// resize gives a device the size of its namespace.
func (s *server) resize(ctx context.Context, v *serving) error {
	sectors := v.device.Geometry().Sectors
	if err := v.dev.Resize(ctx, sectors); err != nil {
		return err
	}
	record := v.dev.Record()
	s.events.Info("device resized", "device", record.Path(), "bytes", sectors<<block.SectorShift)
	return s.record.update(func(r *state.State) {
		r.Devices = slices.Clone(r.Devices)
		for i := range r.Devices {
			if sameDevice(r.Devices[i], record) {
				r.Devices[i].Told.Size = sectors << block.SectorShift
			}
		}
	})
}

// servingOf returns the serving of a namespace, or nil.
func (s *server) servingOf(ns block.Device) *serving {
	for _, v := range s.devices() {
		if v.device == ns && !ended(v.dev) {
			return v
		}
	}
	return nil
}

// retire ends the unused devices without a namespace, and reports whether none is left.
// The caller holds changes.
func (s *server) retire(ctx context.Context) bool {
	done := true
	for _, v := range s.devices() {
		if !v.orphan {
			continue
		}
		if err := s.retireDevice(ctx, v); err != nil {
			done = false
			if !isBusy(err) {
				s.events.Error("cannot end a device without a namespace", "device", v.dev.Record().Path(), "error", err)
			}
		}
	}
	return done
}

// retireDevice ends a device, unless it is in use.
func (s *server) retireDevice(ctx context.Context, v *serving) error {
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	record := v.dev.Record()
	if err := v.dev.Stop(ctx, false); err != nil {
		return err
	}
	s.events.Info("device without a namespace has ended", "device", record.Path(), "nsid", v.nsid)
	s.mu.Lock()
	s.serving = slices.DeleteFunc(s.serving, func(w *serving) bool { return w == v })
	s.mu.Unlock()
	if err := s.record.removeDevices(record); err != nil {
		// The next change of the record removes the device.
		return fmt.Errorf("remove the device from the record: %w", err)
	}
	return nil
}
