package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
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
	if s.front.name != options.Ublk {
		return exit.Errorf(exit.Other, "its front end is %s, whose clients stay with their server", s.front.name)
	}
	s.mu.Lock()
	chosen := s.front.name
	s.mu.Unlock()
	if chosen != options.Ublk {
		return exit.Errorf(exit.Other, "devices of the front end %s do not wait for another server", chosen)
	}
	var err error
	if !s.exclusively(ctx, func() { err = s.handOver(ctx) }) {
		return exit.Errorf(exit.Other, "the server ends")
	}
	return err
}

// handOver leaves the devices to another server. The caller has the turn.
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

// succeed prepares the place of a server that runs: it has to be asked to leave.
func (s *server) succeed() error {
	r, err := s.cfg.Dir.Find(s.cfg.Succeeds)
	switch {
	case errors.Is(err, os.ErrNotExist), err == nil && !r.Alive:
		return exit.Errorf(exit.NotFound, "%s does not run", s.cfg.Succeeds)
	case err != nil:
		return err
	}
	s.entry, s.predecessor = &state.Entry{Record: r}, &r
	s.waiting, s.before = r.Devices, r.Controllers
	return nil
}

// relieve has the predecessor leave, and takes its place.
func (s *server) relieve(ctx context.Context) error {
	r := s.predecessor
	p, err := r.Process.Open()
	if err == nil {
		defer p.Close()
		limit, cancel := context.WithTimeout(ctx, leaveTime)
		defer cancel()
		s.log.Info("takes over from a server", "server", r.Name, "process", r.Process.PID)
		refused := control.NewClient(r.Socket()).HandOver(limit)
		if e := (*exit.Error)(nil); errors.As(refused, &e) {
			return fmt.Errorf("%s does not hand over: %w", r.Name, refused)
		}
		if err := p.Wait(limit); err != nil {
			return errors.Join(fmt.Errorf("wait for the end of process %d: %w", r.Process.PID, err), refused)
		}
	} else if !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	e, err := s.cfg.Dir.Adopt(ctx, r.Name, s.cfg.Args)
	if err != nil {
		return err
	}
	s.recording.Lock()
	mine := s.entry.Controllers[len(s.before):]
	s.before, s.waiting = e.Controllers, e.Devices
	e.Controllers = append(slices.Clone(e.Controllers), mine...)
	s.entry, s.predecessor = e, nil
	err = e.Save()
	s.recording.Unlock()
	if err != nil {
		return err
	}
	return s.listen()
}
