package server

import (
	"context"
	"fmt"
	"slices"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
)

// retirePause is the time between two attempts to end a device without a
// namespace, which somebody uses.
const retirePause = time.Second

// change is what happened to a namespace.
type change struct {
	namespace
	what initiator.Change
}

// changed notes a change, for follow. It does not block. Any goroutine.
func (s *server) changed(ns namespace, what initiator.Change) {
	s.mu.Lock()
	s.changes = append(s.changes, change{ns, what})
	s.mu.Unlock()
	select {
	case s.news <- struct{}{}:
	default:
	}
}

// follow lets the devices follow the namespaces, until ctx is done. A new
// namespace gets a device; the device of one that is gone fails its I/O, and goes
// away as soon as nobody has it open; sizes and write protection are passed on.
func (s *server) follow(ctx context.Context) {
	var again <-chan time.Time
	for {
		select {
		case <-s.news:
		case <-again:
		case <-ctx.Done():
			return
		}
		again = nil
		if !s.exclusively(ctx, func() {
			for _, c := range s.takeChanges() {
				if err := s.apply(ctx, c); err != nil {
					s.log.Error("device does not follow its namespace", "nsid", c.nsid, "change", c.what.String(), "error", err)
				}
			}
			if !s.retire(ctx) {
				again = time.After(retirePause)
			}
		}) {
			return
		}
	}
}

// exclusively runs fn while nobody starts or ends; false if all has ended.
func (s *server) exclusively(ctx context.Context, fn func()) bool {
	select {
	case <-s.turn:
	case <-ctx.Done():
		return false
	}
	defer func() { s.turn <- struct{}{} }()
	if s.over {
		return false
	}
	fn()
	return true
}

func (s *server) takeChanges() []change {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.changes
	s.changes = nil
	return all
}

// apply carries a change out. The caller has the turn.
func (s *server) apply(ctx context.Context, c change) error {
	v := s.servingOf(c.device)
	switch c.what {
	case initiator.Added:
		if v != nil {
			v.orphan = false
			return nil
		}
		if len(s.opts.NSIDs) > 0 && !slices.Contains(s.opts.NSIDs, c.nsid) {
			return nil
		}
		ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
		defer cancel()
		return s.startDevice(ctx, c.namespace, options.AutoDevice, true)
	case initiator.Removed:
		if v != nil {
			v.orphan = true
		}
	case initiator.Resized:
		if v == nil {
			return nil
		}
		sectors := c.device.Geometry().Sectors
		if err := v.dev.Resize(ctx, sectors); err != nil {
			return err
		}
		s.log.Info("device resized", "device", v.dev.Record().Path(), "bytes", sectors<<block.SectorShift)
	case initiator.WriteProtection:
		if v != nil {
			return v.dev.SetReadOnly(c.device.Geometry().ReadOnly)
		}
	}
	return nil
}

// servingOf is what serves a namespace; nil if nothing does.
func (s *server) servingOf(ns block.Device) *serving {
	for _, v := range s.devices() {
		if v.device == ns && !ended(v.dev) {
			return v
		}
	}
	return nil
}

// retire ends the devices without a namespace that nobody uses, and says whether
// none is left. The caller has the turn.
func (s *server) retire(ctx context.Context) bool {
	done := true
	for _, v := range s.devices() {
		if !v.orphan {
			continue
		}
		record := v.dev.Record()
		switch err := v.dev.Stop(ctx, false); {
		case isBusy(err):
			done = false
			continue
		case err != nil:
			s.log.Error("device without a namespace does not end", "device", record.Path(), "error", err)
			done = false
			continue
		}
		s.log.Info("device without a namespace has ended", "device", record.Path(), "nsid", v.nsid)
		s.mu.Lock()
		s.serving = slices.DeleteFunc(s.serving, func(w *serving) bool { return w == v })
		s.mu.Unlock()
		if err := s.record(func(r *state.State) {
			r.Devices = slices.DeleteFunc(r.Devices, func(d state.Device) bool { return d.Path() == record.Path() && d.Cookie == record.Cookie })
		}); err != nil {
			s.log.Error("device is still on record", "device", record.Path(), "error", err)
		}
	}
	return done
}

// mind waits for the end of a device. When one ends by itself and none is left,
// so ends the server.
func (s *server) mind(v *serving) {
	<-v.dev.Done()
	if err := v.dev.Err(); err != nil {
		s.log.Error("device has ended", "device", v.dev.Record().Path(), "error", err)
	}
	for _, w := range s.devices() {
		if !ended(w.dev) {
			return
		}
	}
	if v.dev.Err() != nil {
		s.idle.Do(func() { close(s.none) })
	}
}

// errReplaced is a namespace that is not the one that a device was made for.
func errReplaced(d state.Device, now string) error {
	return fmt.Errorf("%s: namespace %d was %s and is %s", d.Path(), d.NSID, d.UUID, now)
}
