package server

import (
	"context"
	"slices"
	"sync"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
)

// leaveTime is what a server gets to hand its devices over and to end. Their
// users wait meanwhile.
const leaveTime = 10 * time.Second

// HandOver implements control.Controlled.
func (s *server) HandOver(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	if s.opts.OnCrash != options.Requeue {
		return exit.Errorf(exit.Other, "its devices would not wait for another server: it runs with --on-crash %s", s.opts.OnCrash)
	}
	s.mu.Lock()
	front := s.front.name
	s.mu.Unlock()
	if front != options.Ublk {
		return exit.Errorf(exit.Other, "its front end is %s, whose clients stay with their server", front)
	}
	var err error
	if !s.exclusively(ctx, func() { err = s.handOver(ctx) }) {
		return exit.Errorf(exit.Other, "the server ends, or is busy with its devices")
	}
	return err
}

// handOver leaves the devices to another server. The caller holds changes.
func (s *server) handOver(ctx context.Context) error {
	all := slices.DeleteFunc(s.devices(), func(v *serving) bool { return ended(v.dev) })
	if len(all) == 0 {
		return exit.Errorf(exit.Other, "it has no device")
	}
	s.log.Info("hands its devices over", "devices", len(all))
	var wg sync.WaitGroup
	for _, v := range all {
		wg.Go(func() {
			if err := v.dev.HandOver(ctx); err != nil {
				s.log.Error("device is not handed over in order", "error", err)
			}
		})
	}
	wg.Wait()
	s.finish(nil)
	return nil
}
