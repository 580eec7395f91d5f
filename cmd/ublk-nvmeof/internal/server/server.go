package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"sync"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/provider"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/poller"
)

// Config is what to serve, and who hears of it.
type Config struct {
	Options *options.Connect // complete
	Args    []string         // flags that give Options again
	Dir     state.Dir
	Log     *slog.Logger
	// Succeeds is the name of a server that runs, whose devices this one takes
	// over once it is connected. Empty: none.
	Succeeds string
	// Recovers is the name of a dead server, in whose place this one serves. Empty:
	// that of a dead server with the same target, if there is one.
	Recovers string
	// Reserved is called once the server has its state directory, where it may
	// keep a log. nil: nobody wants to know.
	Reserved func(*state.Entry) error
	// Ready is called once the devices are usable. An error ends the server.
	Ready func(control.Status) error
	// Hurry, when closed, shortens an end that is under way.
	Hurry <-chan struct{}
}

// Run serves until ctx is done (which is an orderly end, and no error), a
// control request ends it, or nothing is left to serve. Errors have an
// exit.Code; whatever was made until then has been undone.
func Run(ctx context.Context, cfg Config) error { return run(ctx, cfg, actual) }

// server is a running server. The goroutine of run builds it and takes it
// apart, or a control request does the latter.
type server struct {
	cfg    Config
	opts   *options.Connect
	log    *slog.Logger
	back   backend
	remote netip.AddrPort
	record *record
	sock   *socket
	depth  int        // of the devices
	nbd    *nbdServer // of the front ends nbd and nbd-socket; nil: not open

	// waiting are the devices of another server that this one takes over. Until
	// all of them are served, nothing is ended: they wait on, for the next.
	waiting []state.Device
	// recovering says that one of them was begun to be taken over.
	recovering bool

	cancel  context.CancelCauseFunc // ends start
	changes chan struct{}           // holds a token while nobody starts, ends or changes devices
	closed  bool                    // guarded by changes: everything has ended
	aborted bool                    // guarded by changes: requests in flight were given up
	ended   chan struct{}           // closed when closed is set
	pending []*pending              // changes of namespaces to be carried out; guarded by changes

	mu       sync.Mutex // guards what follows
	front    frontEnd
	provider provider.Choice
	closer   io.Closer                // the provider, if it has to be closed
	packets  func() provider.Counters // nil: hardware has them
	loops    []*poller.Loop
	ctrl     controller
	info     initiator.Info // when it was last seen connected
	serving  []*serving
	reported []change // changes of namespaces that follow has not seen

	news     chan struct{} // something was reported
	idle     sync.Once     // of noDevice
	noDevice chan struct{} // closed when a device ended by itself and none is left
}

// serving is a namespace with the device that makes it visible.
type serving struct {
	namespace
	dev    device
	orphan bool // its namespace is gone; guarded by server.changes
}

func run(ctx context.Context, cfg Config, back backend) error {
	s := &server{
		cfg: cfg, opts: cfg.Options, log: cfg.Log, back: back,
		changes: make(chan struct{}, 1), ended: make(chan struct{}),
		news: make(chan struct{}, 1), noDevice: make(chan struct{}),
	}
	starting, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.cancel = cancel
	starting, stop := context.WithTimeout(starting, s.opts.Timeout)
	defer stop()

	if err := s.reserve(starting); err != nil {
		return exit.From(err)
	}
	if s.record.isOwn() {
		if err := s.listen(); err != nil {
			return exit.From(errors.Join(err, s.forget(ctx)))
		}
	}
	err := s.start(starting)
	if err != nil && len(s.waiting) > 0 {
		return exit.From(errors.Join(err, s.leaveWaiting(context.WithoutCancel(ctx)), s.sock.close()))
	}
	s.changes <- struct{}{}
	if err == nil {
		err = s.announce()
	}
	if err == nil {
		s.serve(ctx)
	}
	if nerr := host.Notify("STOPPING=1"); nerr != nil {
		s.log.Warn("service manager not told", "error", nerr)
	}
	if eerr := s.end(context.WithoutCancel(ctx), true, orderly); err == nil {
		err = eerr
	}
	if cerr := s.sock.close(); cerr != nil {
		s.log.Warn("close control socket", "error", cerr)
	}
	if ferr := s.forget(ctx); ferr != nil {
		s.log.Error("remove state", "error", ferr)
	}
	if err != nil {
		return exit.From(err)
	}
	return nil
}

// forget removes the record, unless something on it is still there.
func (s *server) forget(ctx context.Context) error {
	return s.record.retire(context.WithoutCancel(ctx))
}

// announce tells everybody that the devices are usable.
func (s *server) announce() error {
	if err := host.Notify("READY=1", "STATUS=serving "+s.opts.NQN); err != nil {
		s.log.Warn("service manager not told", "error", err)
	}
	if s.cfg.Ready == nil {
		return nil
	}
	if err := s.cfg.Ready(s.Status()); err != nil {
		return fmt.Errorf("report that the devices are usable: %w", err)
	}
	return nil
}

// serve lets the devices follow their namespaces until something ends the server.
func (s *server) serve(ctx context.Context) {
	following, stop := context.WithCancel(ctx)
	var follower sync.WaitGroup
	follower.Go(func() { s.follow(following) })
	s.wait(ctx)
	stop()
	follower.Wait()
}

// wait returns when something ends the server.
func (s *server) wait(ctx context.Context) {
	lost := s.ctrl.Done()
	for {
		select {
		case <-ctx.Done():
			s.log.Info("told to end", "because", context.Cause(ctx))
		case <-s.ended:
		case <-s.noDevice:
			s.log.Info("no device is left")
		case <-lost:
			// The devices stay, their I/O fails, and the status says why.
			s.log.Error("controller is lost; I/O fails until the devices are disconnected", "reason", s.ctrl.Err())
			lost = nil
			continue
		}
		return
	}
}

// exclusively runs fn while nobody else starts, ends or changes devices; false if
// all has ended, or ctx is done.
func (s *server) exclusively(ctx context.Context, fn func()) bool {
	select {
	case <-s.changes:
	case <-ctx.Done():
		return false
	}
	defer func() { s.changes <- struct{}{} }()
	if s.closed {
		return false
	}
	fn()
	return true
}

// devices are what is served, ended ones too.
func (s *server) devices() []*serving {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.serving)
}
