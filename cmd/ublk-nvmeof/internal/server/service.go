package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/systemd"
	"ublk-nvmeof/initiator"
)

// stopTime is longer than an orderly end takes if no device is in use.
const stopTime = 40 * time.Second

// statusInterval is how often the service manager is told of a new state.
const statusInterval = 5 * time.Second

// unusedPoll is how often a patient server looks whether its devices are in use.
var unusedPoll = 500 * time.Millisecond

// notify tells the service manager, if there is one.
func (s *server) notify(assignments ...string) {
	if err := systemd.Notify(assignments...); err != nil {
		s.log.Warn("cannot notify the service manager", "error", err)
	}
}

// sayStopping tells the service manager that the end has begun, unless a successor goes
// on with the service.
func (s *server) sayStopping() {
	if s.heir.hasTakenOver() {
		return
	}
	s.notify(systemd.Stopping, systemd.Status("ending"), systemd.ExtendTimeout(stopTime))
}

// summary describes the connection in a line.
func (s *server) summary() string {
	st := s.Status()
	var names []string
	for _, d := range st.Devices {
		names = append(names, d.Device)
	}
	text := fmt.Sprintf("%s: %s at %s", st.State, st.NQN, s.opts.Peer())
	if len(names) > 0 {
		text += ", " + strings.Join(names, " ")
	}
	if st.State != "live" && st.Reason != "" {
		text += fmt.Sprintf(" (%s)", st.Reason)
	}
	return text
}

// keepWatch tells the service manager of each new state, and feeds its watchdog as long as
// the server is alive, until the function that it returns is called.
func (s *server) keepWatch(ctx context.Context) (stop func()) {
	if !systemd.Managed() {
		return func() {}
	}
	timeout, err := systemd.WatchdogTimeout()
	if err != nil {
		s.log.Warn("the watchdog is not fed", "error", err)
	}
	interval := statusInterval
	if timeout > 0 {
		interval = min(interval, timeout/2)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var done sync.WaitGroup
	done.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		told := ""
		for {
			if timeout > 0 {
				s.feed(ctx, timeout)
			}
			if now := s.summary(); now != told && !s.ending.Load() && !s.leaving.Load() {
				s.notify(systemd.Status(now))
				told = now
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	})
	return func() {
		cancel()
		done.Wait()
	}
}

// feed feeds the watchdog if the server is alive.
func (s *server) feed(ctx context.Context, timeout time.Duration) {
	limit, cancel := context.WithTimeout(ctx, timeout/2)
	defer cancel()
	switch err := s.alive(limit); {
	case err == nil:
		s.notify(systemd.Watchdog)
	case ctx.Err() == nil:
		s.log.Error("the watchdog is not fed", "reason", err)
	}
}

// alive returns an error if a loop or the control socket does not answer. A loop that has
// not answered by the end of ctx keeps a goroutine until it does.
func (s *server) alive(ctx context.Context) error {
	s.mu.Lock()
	loops := s.loops
	s.mu.Unlock()
	type answer struct {
		of  string
		err error
	}
	answers := make(chan answer, len(loops)+1)
	silent := map[string]bool{"the control socket": true}
	go func() {
		_, err := control.NewClient(s.record.socket()).Status(ctx)
		answers <- answer{"the control socket", err}
	}()
	for i, l := range loops {
		name := fmt.Sprintf("loop %d", i)
		silent[name] = true
		go func() { answers <- answer{name, l.Call(func() {})} }()
	}
	for len(silent) > 0 {
		select {
		case a := <-answers:
			if a.err != nil && !s.ending.Load() {
				return fmt.Errorf("%s: %w", a.of, a.err)
			}
			delete(silent, a.of)
		case <-ctx.Done():
			for name := range silent {
				return fmt.Errorf("%s does not answer: %w", name, context.Cause(ctx))
			}
		}
	}
	return nil
}

// awaitUnused ends the server as soon as no device is in use. It gives up when it has to
// hurry, or when the server cannot be ended for another reason.
func (s *server) awaitUnused(ctx context.Context) {
	ctx = context.WithoutCancel(ctx)
	for said := false; ; said = true {
		err := s.end(ctx, false, orderly)
		if err == nil || !isBusy(err) {
			return // run ends what is left
		}
		if !said {
			s.leaving.Store(true)
			s.log.Warn("waiting until no device is in use; SIGINT ends the wait", "error", err)
			s.notify(systemd.Stopping, systemd.Status("waiting until no device is in use: "+err.Error()))
		}
		select {
		case <-time.After(unusedPoll):
		case <-s.cfg.Hurry:
			return
		case <-s.ended:
			return
		}
	}
}

// While the machine is shut down, a target may be away for as long as shutdownGrace. Tests
// have shorter times.
var shutdownGrace, shutdownPoll = 5 * time.Second, 2 * time.Second

// errShutdown is the reason to give up the target.
var errShutdown = errors.New("the machine is being shut down, and the target is away")

// watchShutdown gives up a target that is away while the machine is shut down, until the
// function that it returns is called. Otherwise file systems could not be unmounted as
// long as requests wait, and the shutdown would wait for them.
func (s *server) watchShutdown(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var done sync.WaitGroup
	done.Go(func() {
		tick := time.NewTicker(shutdownPoll)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			if now := s.sub.Info(); now.State != initiator.StateConnecting || time.Since(now.Since) < shutdownGrace {
				continue
			}
			switch stopping, err := s.back.stopping(ctx); {
			case err != nil:
				s.log.Debug("cannot ask whether the machine is being shut down", "error", err)
			case stopping:
				s.log.Error("requests are not kept any longer", "reason", errShutdown)
				s.sub.Abort(errShutdown)
				return
			}
		}
	})
	return func() {
		cancel()
		done.Wait()
	}
}

// secure returns the TLS configuration for NBD clients, or nil. A connection uses the
// certificates that were read last.
func (s *server) secure() (*tls.Config, error) {
	now, err := s.opts.TLSConfig()
	if now == nil || err != nil {
		return nil, err
	}
	s.certs.Store(now)
	outer := now.Clone()
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return s.certs.Load(), nil }
	return outer, nil
}

// followReloads reloads whenever it is asked to, until ctx is done.
func (s *server) followReloads(ctx context.Context) {
	for {
		select {
		case <-s.cfg.Reload:
			s.reload()
		case <-ctx.Done():
			return
		}
	}
}

// reload reads the certificates for NBD clients again. On an error the old ones stay.
func (s *server) reload() {
	s.notify(systemd.Reloading())
	defer func() { s.notify(systemd.Ready, systemd.Status(s.summary())) }()
	if s.certs.Load() == nil {
		s.log.Info("SIGHUP is ignored: the server has no certificates to reload; disconnect ends it, upgrade replaces its program")
		return
	}
	now, err := s.opts.TLSConfig()
	if err == nil && now == nil {
		err = errors.New("they are gone")
	}
	if err != nil {
		s.log.Error("certificates not reloaded; the old ones are still used", "error", err)
		return
	}
	s.certs.Store(now)
	s.log.Info("certificates reloaded", "directory", s.opts.TLS)
}

// heir is the process that another build of the program takes over with, if this server
// has started it.
type heir struct {
	mu   sync.Mutex // guards what follows
	pid  int        // 0: there is none
	took chan struct{}
	done bool // it has taken over
}

// start starts the process that is to take over. It cannot take over before it is noted.
// took is closed when it has.
func (h *heir) start(launch func() (int, <-chan error, error)) (pid int, took <-chan struct{}, failed <-chan error, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	pid, failed, err = launch()
	if err != nil {
		return 0, nil, nil, err
	}
	h.pid, h.took = pid, make(chan struct{})
	return pid, h.took, failed, nil
}

// forget forgets a process that has not taken over.
func (h *heir) forget() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.done {
		h.pid = 0
	}
}

// takesOver makes the heir the service, if there is one.
func (h *heir) takesOver(s *server) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pid == 0 || h.done {
		return
	}
	h.done = true
	s.notify(systemd.MainPID(h.pid))
	close(h.took)
}

func (h *heir) hasTakenOver() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.done
}

// Replace implements control.Replaceable.
func (s *server) Replace(_ context.Context, program string) (int, error) {
	if s.cfg.Launch == nil {
		return 0, exit.Errorf(exit.Other, "the server does not run under a service manager")
	}
	if !s.replacing.TryLock() {
		return 0, exit.Errorf(exit.Busy, "the server is being replaced already")
	}
	defer s.replacing.Unlock()
	pid, took, failed, err := s.heir.start(func() (int, <-chan error, error) {
		return s.cfg.Launch(program, s.record.state().Name, s.cfg.Args)
	})
	if err != nil {
		return 0, err
	}
	s.log.Info("started a successor", "process", pid, "program", program)
	select {
	case <-took:
		return pid, nil
	case err := <-failed:
		s.heir.forget()
		return 0, err
	case <-s.ended:
		if s.heir.hasTakenOver() {
			return pid, nil
		}
		return 0, exit.Errorf(exit.Other, "the server is ending")
	}
}
