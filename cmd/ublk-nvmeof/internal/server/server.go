package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/systemd"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/internal/loglimit"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/process"
	"ublk-nvmeof/rdma/provider"
	"ublk-nvmeof/vhost"
)

// Config configures Run.
type Config struct {
	Options *options.Connect // complete
	Args    []string         // flags that give Options again
	Dir     state.Dir
	Host    state.Host
	Log     *slog.Logger
	// Succeeds is the name of a running server. Once this server is connected, it
	// takes over that server's devices. It may be empty.
	Succeeds string
	// Recovers is the name of a dead server that this server replaces. If it is empty,
	// Run looks for a dead server with the same target.
	Recovers string
	// Again says that an earlier run of this process inherited the record Recovers, and
	// could not take over the devices.
	Again bool
	// Within is the time limit for everything until the devices are usable. If it is zero,
	// only Options.Timeout and the times within which the target ends the controllers of
	// earlier servers are limits.
	Within time.Duration
	// Waiting, if not nil, is called when the server begins a wait that may take
	// long, and when that wait ends.
	Waiting func(Wait)
	// Reserved, if not nil, is called once the server has its state directory, where a
	// log may be kept.
	Reserved func(*state.Entry) error
	// Ready is called when the devices are usable. An error ends the server, unless it has
	// taken over devices, whose users know them.
	Ready func(control.Status) error
	// Abandoned is closed if nobody wants the server any more. One that is ready stays.
	Abandoned <-chan struct{}
	// Hurry is closed to shorten the end of the server.
	Hurry <-chan struct{}
	// Patient makes a server that is asked to end by ctx wait until no device is in use,
	// or until Hurry is closed.
	Patient bool
	// Reload has the server read its certificates again each time that it delivers.
	Reload <-chan os.Signal
	// Listener, if not nil, is the socket for NBD clients.
	Listener net.Listener
	// Launch, if not nil, starts another build of the program with these arguments as the
	// successor of this process, and returns its process id and a channel that delivers
	// if it ends without having taken over.
	Launch func(program string, succeeds string, args []string) (pid int, failed <-chan error, err error)
}

// Wait is a wait before the devices are usable. The zero value is the end of a wait.
type Wait struct {
	For     string `json:"for"`     // the predicate of a sentence about the server
	Seconds int    `json:"seconds"` // at most
}

// Limit returns the longest time that the wait may take.
func (w Wait) Limit() time.Duration { return time.Duration(w.Seconds) * time.Second }

// Run serves until ctx is done, a control request ends it, or no device is left. It
// returns nil after an orderly end, for which ctx may be canceled. Errors have an
// exit.Code; on an error Run has undone what it made.
func Run(ctx context.Context, cfg Config) error { return run(ctx, cfg, actual) }

// server is a running server. The goroutine of run builds it. The same goroutine or a
// control request ends it.
type server struct {
	cfg      Config
	opts     *options.Connect
	log      *slog.Logger
	events   *slog.Logger // of what a target causes at any rate; it has a limit
	back     backend
	remote   netip.AddrPort
	record   *record
	sock     *socket
	notified atomic.Bool // other servers were told of the controllers of this one
	depth    int         // of the devices
	nbd      *nbdServer  // of the front ends nbd and nbd-socket; nil: not open
	certs    atomic.Pointer[tls.Config]
	heir     heir

	replacing sync.Mutex  // held while a successor is started
	leaving   atomic.Bool // the server waits until no device is in use, and then ends

	// waiting holds the devices of another server that this server takes over.
	// Until all of them are served, none is ended, so that they can wait for the
	// next server.
	waiting []state.Device
	// handed holds the sessions of front ends of these devices, by socket.
	handed map[string]*vhost.Session
	// recovering is set when the takeover of the first of these devices begins, and tookOver
	// when that of the last one has ended.
	recovering, tookOver bool

	cancel  context.CancelCauseFunc // cancels start
	changes chan struct{}           // a lock: holds a token while nobody starts, ends or changes devices
	closed  bool                    // guarded by changes: everything has ended
	aborted bool                    // guarded by changes: requests in flight were aborted
	ending  atomic.Bool             // the parts below the devices are ending
	ended   chan struct{}           // closed when closed is set
	linked  chan struct{}           // closed when sub is set
	pending []*pending              // pending changes of namespaces; guarded by changes

	mu        sync.Mutex // guards what follows
	front     frontEnd
	provider  provider.Choice
	providers map[string]opened        // by name
	packets   func() provider.Counters // nil if the hardware counts packets
	loops     []*poller.Loop
	sub       subsystem
	policy    initiator.Policy
	preferred options.Path       // of the policy initiator.Preferred; zero: the first
	keys      state.Secrets      // that paths are connected with
	unready   map[string]string  // why a path that was never connected is not, by path
	path      initiator.PathInfo // when it was last seen connected
	serving   []*serving
	reported  []change // changes of namespaces that follow has not handled

	news     chan struct{} // wakes follow: something was reported
	idle     sync.Once     // closes noDevice
	noDevice chan struct{} // closed when a device ended by itself and none is left
}

// serving is a namespace with its device.
type serving struct {
	namespace
	dev    device
	orphan bool // its namespace is gone; guarded by server.changes
}

// ErrAbandoned is the error of a server that was given up before it was ready.
var ErrAbandoned = exit.Errorf(exit.Other, "interrupted")

func run(ctx context.Context, cfg Config, back backend) error {
	s := &server{
		cfg: cfg, opts: cfg.Options, log: cfg.Log, events: loglimit.New(cfg.Log), back: back,
		changes: make(chan struct{}, 1), ended: make(chan struct{}), linked: make(chan struct{}),
		news: make(chan struct{}, 1), noDevice: make(chan struct{}),
	}
	starting, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.cancel = cancel
	if cfg.Within != 0 {
		var stop context.CancelFunc
		starting, stop = context.WithTimeout(starting, cfg.Within)
		defer stop()
	}
	connecting, stop := context.WithTimeout(starting, s.opts.Timeout)
	defer stop()
	go func() {
		select {
		case <-cfg.Abandoned:
			cancel(ErrAbandoned)
		case <-starting.Done():
		}
	}()
	s.notify(systemd.Status("connecting to "+s.opts.NQN+" at "+s.opts.Peer()), systemd.ExtendTimeout(s.opts.Timeout+stopTime))

	defer s.withdraw()
	if err := s.reserve(connecting); err != nil {
		return exit.From(err)
	}
	if s.record.isOwn() {
		if err := s.listen(); err != nil {
			return exit.From(errors.Join(err, s.forget(ctx)))
		}
	}
	err := s.start(starting, connecting)
	if err != nil && len(s.waiting) > 0 {
		return exit.From(errors.Join(err, s.leaveWaiting(context.WithoutCancel(ctx)), s.sock.close()))
	}
	s.changes <- struct{}{}
	if err == nil {
		err = s.announce()
		_ = process.UseHugePages() // the start is over; the server works without them
	}
	stopWatching := s.keepWatch(ctx)
	defer stopWatching()
	if err == nil {
		stopWatching := s.watchShutdown(ctx)
		s.serve(ctx)
		if s.cfg.Patient {
			s.awaitUnused(ctx)
		}
		stopWatching()
	}
	s.sayStopping()
	if eerr := s.end(context.WithoutCancel(ctx), true, orderly); err == nil {
		err = eerr
	}
	if cerr := s.sock.close(); cerr != nil {
		s.log.Warn("cannot close the control socket", "error", cerr)
	}
	if ferr := s.forget(ctx); ferr != nil {
		s.log.Error("cannot remove the record", "error", ferr)
	}
	if err != nil {
		return exit.From(err)
	}
	return nil
}

// forget removes the record, unless one of its devices remains.
func (s *server) forget(ctx context.Context) error {
	return s.record.retire(context.WithoutCancel(ctx))
}

// withdraw removes the notice that made published, if it did.
func (s *server) withdraw() {
	if !s.notified.Load() {
		return
	}
	if err := s.cfg.Host.Withdraw(); err != nil {
		s.log.Warn("cannot withdraw the notice to other servers", "error", err)
	}
}

// announce reports that the devices are usable.
func (s *server) announce() error {
	s.notify(systemd.Ready, systemd.Status(s.summary()))
	if s.cfg.Ready == nil {
		return nil
	}
	err := s.cfg.Ready(s.Status())
	switch {
	case err == nil:
		return nil
	case s.tookOver:
		s.log.Warn("cannot report that the devices are usable; they are served all the same", "error", err)
		return nil
	}
	return fmt.Errorf("report that the devices are usable: %w", err)
}

// serve applies changes of namespaces to the devices until the server must end.
func (s *server) serve(ctx context.Context) {
	following, stop := context.WithCancel(ctx)
	var follower sync.WaitGroup
	follower.Go(func() { s.follow(following) })
	follower.Go(func() { s.followReloads(following) })
	s.wait(ctx)
	stop()
	follower.Wait()
}

// wait returns when the server must end.
func (s *server) wait(ctx context.Context) {
	lost := s.sub.Done()
	for {
		select {
		case <-ctx.Done():
			s.log.Info("server was asked to end", "because", context.Cause(ctx))
		case <-s.ended:
		case <-s.noDevice:
			s.log.Info("no device is left")
		case <-lost:
			// The devices stay, and their I/O fails. The status has the reason.
			s.log.Error("controller is lost; I/O fails until the devices are disconnected", "reason", s.sub.Err())
			lost = nil
			continue
		}
		return
	}
}

// exclusively runs fn while no other goroutine starts, ends or changes devices. It
// returns false if the server has ended or ctx is done.
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

// devices returns all served devices, including those that have ended.
func (s *server) devices() []*serving {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.serving)
}
