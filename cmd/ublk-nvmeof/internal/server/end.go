package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/poller"
)

// pace holds the time limits of the steps in which a server ends.
type pace struct {
	grace time.Duration // requests in flight complete
	abort time.Duration // aborted requests fail
	leave time.Duration // the controller leaves the target
	loops time.Duration // the loops end
}

var (
	orderly = pace{grace: 10 * time.Second, abort: 3 * time.Second, leave: 5 * time.Second, loops: 2 * time.Second}
	// hurried is short enough for disconnect --force, which has more to do within
	// its own time limit.
	hurried = pace{grace: 1200 * time.Millisecond, abort: 500 * time.Millisecond, leave: 500 * time.Millisecond, loops: 200 * time.Millisecond}
)

// errEnding is the reason to abort requests that do not complete in time.
var errEnding = errors.New("the device is ending and requests were not answered in time")

// Disconnect implements control.Controlled.
func (s *server) Disconnect(ctx context.Context, force bool) error {
	s.cancel(exit.Errorf(exit.Other, "disconnected while connecting"))
	p := orderly
	if force {
		p = hurried
	}
	return s.end(ctx, force, p)
}

// end ends all parts, top down. Without force, if a device is in use, it changes
// nothing and returns an error for which isBusy is true. After any other error, parts
// remain that only the end of the process can remove, or that outlive the process.
func (s *server) end(ctx context.Context, force bool, p pace) error {
	select {
	case <-s.changes:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { s.changes <- struct{}{} }()
	if s.closed {
		return nil
	}
	if !force {
		if err := s.inUse(); err != nil {
			return err
		}
	}
	if err := s.endDevices(ctx, force, p); err != nil {
		if !force && isBusy(err) {
			return err
		}
		// The lower parts still serve the devices that remain. Do not wait for them.
		s.finish(err)
		return err
	}
	err := s.endBelow(ctx, p)
	s.finish(err)
	return err
}

// endBelow ends the parts below the devices, top down. A part that does not end still
// uses the parts below it, so those stay.
func (s *server) endBelow(ctx context.Context, p pace) error {
	s.ending.Store(true)
	for _, step := range []func() error{
		func() error { return s.endNBD(p) },
		func() error { return s.endController(ctx, p) },
		func() error { return s.endLoops(p) },
		func() error { return bounded(p.loops, s.closeProviders) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// finish makes run return. The caller holds changes.
func (s *server) finish(left error) {
	if left != nil {
		s.log.Error("server ended, but not all its parts did", "error", left)
	}
	s.closed = true
	s.ending.Store(true)
	close(s.ended)
}

// inUse checks all devices before any of them is ended.
func (s *server) inUse() error {
	all := s.devices()
	if len(all) < 2 {
		return nil
	}
	for _, v := range all {
		if err := v.dev.InUse(); err != nil {
			return err
		}
	}
	return nil
}

// endDevices stops all devices. It removes those that stopped from the record.
func (s *server) endDevices(ctx context.Context, force bool, p pace) error {
	limit, cancel := context.WithTimeout(ctx, p.grace)
	defer cancel()
	release := s.hurry(cancel)
	err := s.stopAll(limit, force)
	release()
	if err == nil || !force && isBusy(err) {
		return err
	}
	if s.sub == nil {
		return err
	}
	s.log.Warn("aborting requests in flight", "error", err)
	s.aborted = true
	s.sub.Abort(errEnding)
	limit, cancel = context.WithTimeout(ctx, p.abort)
	defer cancel()
	return s.stopAll(limit, true)
}

// hurry calls cancel when Config.Hurry is closed, unless release is called first.
func (s *server) hurry(cancel func()) (release func()) {
	done := make(chan struct{})
	go func() {
		select {
		case <-s.cfg.Hurry:
			cancel()
		case <-done:
		}
	}()
	return func() { close(done) }
}

func (s *server) stopAll(ctx context.Context, force bool) error {
	all := s.devices()
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, v := range all {
		wg.Go(func() { errs[i] = v.dev.Stop(ctx, force) })
	}
	wg.Wait()
	var left []*serving
	for i, v := range all {
		if errs[i] != nil {
			left = append(left, v)
		}
	}
	s.mu.Lock()
	s.serving = left
	s.mu.Unlock()
	errs = append(errs, s.record.update(func(r *state.State) {
		r.Devices = slices.DeleteFunc(slices.Clone(r.Devices), func(d state.Device) bool {
			return !slices.ContainsFunc(left, func(v *serving) bool { return sameDevice(d, v.dev.Record()) })
		})
	}))
	return errors.Join(errs...)
}

func (s *server) endController(ctx context.Context, p pace) error {
	if s.sub == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, p.leave)
	defer cancel()
	live := s.sub.Info().State == initiator.StateLive
	err := bounded(p.leave+p.abort, func() error { return s.sub.Close(ctx) })
	// Only then have all commands been answered, and the target executes none.
	s.record.finish(err == nil && live && !s.aborted)
	if err != nil {
		// A target that does not answer must not delay the end.
		s.log.Warn("cannot leave the subsystem", "error", err)
		if errors.Is(err, errStuck) {
			return fmt.Errorf("leave the subsystem: %w", err)
		}
	}
	return nil
}

func (s *server) endLoops(p pace) error {
	var errs []error
	for _, l := range s.loops {
		if err := bounded(p.loops, l.Stop); err != nil && !errors.Is(err, poller.ErrStopped) {
			errs = append(errs, fmt.Errorf("stop loops: %w", err))
		}
	}
	return errors.Join(errs...)
}

var errStuck = errors.New("did not end in time")

// bounded runs fn and waits for it for at most limit. Then it returns errStuck, and fn
// continues until the process ends.
func bounded(limit time.Duration, fn func() error) error {
	result := make(chan error, 1)
	go func() { result <- fn() }()
	select {
	case err := <-result:
		return err
	case <-time.After(limit):
		return errStuck
	}
}
