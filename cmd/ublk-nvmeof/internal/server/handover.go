package server

import (
	"context"
	"slices"
	"sync"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
)

// leaveTime is the time limit for a server to hand over its devices and end. Users of
// the devices wait meanwhile.
const leaveTime = 10 * time.Second

// HandOver implements control.Controlled.
func (s *server) HandOver(ctx context.Context, sessions string) error {
	ctx, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	if s.opts.OnCrash != options.Requeue {
		return exit.Errorf(exit.Other, "the server runs with --on-crash %s, so its devices would not wait for another server", s.opts.OnCrash)
	}
	s.mu.Lock()
	front := s.front.name
	s.mu.Unlock()
	if front != options.Ublk && front != options.VhostUserBlk {
		return exit.Errorf(exit.Other, "the front end is %s, which cannot hand over its clients", front)
	}
	var err error
	if !s.exclusively(ctx, func() { err = s.handOver(ctx, sessions) }) {
		return exit.Errorf(exit.Other, "the server is ending, or is busy with its devices")
	}
	return err
}

// handOver leaves the devices for another server. The caller holds changes.
func (s *server) handOver(ctx context.Context, sessions string) error {
	all := slices.DeleteFunc(s.devices(), func(v *serving) bool { return ended(v.dev) })
	if len(all) == 0 {
		return exit.Errorf(exit.Other, "the server has no device")
	}
	s.log.Info("handing over devices", "devices", len(all))
	var wg sync.WaitGroup
	for _, v := range all {
		wg.Go(func() {
			if err := v.dev.HandOver(ctx, sessions); err != nil {
				s.log.Error("device was not handed over cleanly", "error", err)
			}
		})
	}
	wg.Wait()
	s.leaveInOrder(ctx, all)
	s.heir.takesOver(s)
	s.finish(nil)
	return nil
}

// leaveInOrder shuts down the controller, so that the next server need not wait until the
// target has ended it. It does nothing if a device still has requests in flight. A block
// device stays in use until the process ends, so only servers of sockets leave in order.
func (s *server) leaveInOrder(ctx context.Context, all []*serving) {
	if slices.ContainsFunc(all, func(v *serving) bool { return !ended(v.dev) }) {
		return
	}
	err := s.endBelow(ctx, hurried)
	if err == nil {
		err = s.record.left()
	}
	if err != nil {
		s.log.Warn("devices were handed over, but the server has not left the target", "error", err)
	}
}
