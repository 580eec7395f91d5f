package vhost

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/acceptor"
	"ublk-nvmeof/internal/frontend"
	"ublk-nvmeof/internal/loglimit"
	"ublk-nvmeof/internal/uring"
	"ublk-nvmeof/poller"
)

// ErrBusy means that a front end is connected.
var ErrBusy = frontend.NewError(block.ErrBusy, "vhost-user-blk device is in use")

// ErrStopped means that the server has ended.
var ErrStopped = frontend.NewError(block.ErrStopped, "vhost-user-blk server has ended")

// Server serves a block device to one front end at a time. Its methods may be called in any
// order, from any goroutine except those of the loops.
type Server struct {
	cfg     Config
	id      [idSize]byte
	workers []*worker
	stopped chan struct{} // closed when no front end is served any more

	// orphans is the number of requests at the back end whose session has ended. The
	// next session must not send any request before they have ended, because it could
	// overtake one of them.
	orphans atomic.Int64

	mu        sync.Mutex // guards the fields below
	ended     bool       // stopped is closed
	listeners []net.Listener
	session   *session
	idle      chan struct{} // not nil: closed when there is no orphan

	closing sync.Mutex // held by close
	closed  bool       // the memory of the back end was freed

	events *slog.Logger // what front ends cause
}

// New opens the queues of the device. The error is about the configuration, or an error of
// the back end, or of a loop that has ended.
func New(cfg Config) (*Server, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, fmt.Errorf("make vhost-user-blk server: %w", err)
	}
	s := &Server{cfg: cfg, stopped: make(chan struct{}), events: loglimit.New(cfg.Log)}
	copy(s.id[:], cfg.ID)
	for i, l := range cfg.Loops {
		if err := s.open(i, l); err != nil {
			return nil, errors.Join(fmt.Errorf("make vhost-user-blk server: %w", err), s.close())
		}
	}
	return s, nil
}

// open makes the worker of loop i.
func (s *Server) open(i int, l *poller.Loop) error {
	var err error
	lost := l.Call(func() {
		var back block.Queue
		back, err = s.cfg.Device.OpenQueue(i, block.QueueConfig{Depth: s.cfg.Depth, MaxIO: s.cfg.MaxIO})
		if err != nil {
			return
		}
		w := newWorker(s, uring.OfLoop(l), back, s.cfg.Depth, boundsOf(s.cfg.Device.Geometry(), s.cfg.MaxIO))
		w.base = l.Handle(w)
		l.Attach(w)
		debug.SetPanicOnFault(true) // see guard
		s.workers = append(s.workers, w)
	})
	return errors.Join(err, lost)
}

// Serve accepts front ends from l, a listener for unix sockets. It returns the error when
// l fails. Stop closes l, and Serve then returns nil.
func (s *Server) Serve(l *net.UnixListener) error {
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return errors.Join(ErrStopped, l.Close())
	}
	s.listeners = append(s.listeners, l)
	s.mu.Unlock()
	err := acceptor.Run(l.AcceptUnix, s.accept, func(err error) {
		s.events.Warn("vhost-user-blk front end not accepted", "error", err)
	}, s.stopped)
	if err != nil {
		return fmt.Errorf("accept vhost-user-blk front end: %w", err)
	}
	return nil
}

// accept begins a session. If another front end is still connected, the new one is refused.
// If the other one has just gone, accept waits for the end of its session.
func (s *Server) accept(c *net.UnixConn) { s.begin(newSession(s, c), nil) }

// begin begins a session with what an earlier server was told.
func (s *Server) begin(n *session, setup []*message) {
	c := n.conn
	defer func() {
		for _, m := range setup { // those that were not used
			m.close()
		}
	}()
	for {
		s.mu.Lock()
		old := s.session
		if old == nil && !s.ended {
			s.session = n
		}
		ended := s.ended
		s.mu.Unlock()
		switch {
		case ended:
			_ = c.Close()
			return
		case old == nil:
			go s.run(n, setup)
			setup = nil
			return
		case !old.hasGone():
			s.events.Warn("vhost-user-blk front end refused, because another one is connected", "front_end", n.peer, "connected", old.peer)
			_ = c.Close()
			return
		}
		<-old.ended
	}
}

// run runs a session.
func (s *Server) run(n *session, setup []*message) {
	s.events.Info("vhost-user-blk front end connected", "front_end", n.peer, "handed_over", setup != nil)
	err := n.run(setup)
	s.mu.Lock()
	s.session = nil
	s.mu.Unlock()
	close(n.ended)
	if err != nil {
		s.events.Warn("vhost-user-blk session ended", "front_end", n.peer, "reason", err)
		return
	}
	s.events.Info("vhost-user-blk front end gone", "front_end", n.peer)
}

// orphanEnded is called on a loop when a request of an earlier session has ended.
func (s *Server) orphanEnded() {
	if s.orphans.Add(-1) > 0 {
		return
	}
	for _, l := range s.cfg.Loops {
		l.Wake()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.idle != nil {
		close(s.idle)
		s.idle = nil
	}
}

// Front returns a description of the connected front end, or "".
func (s *Server) Front() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.session == nil {
		return ""
	}
	return s.session.peer
}

// Changed tells the guest that the geometry of the device has changed. A front end that
// has no channel for that learns it when it connects again.
func (s *Server) Changed() error {
	b := boundsOf(s.cfg.Device.Geometry(), s.cfg.MaxIO)
	for i, w := range s.workers {
		if err := s.cfg.Loops[i].Call(func() { w.bounds = b }); err != nil {
			return err
		}
	}
	s.mu.Lock()
	n := s.session
	s.mu.Unlock()
	if n == nil {
		return nil
	}
	return n.notify()
}

// drainTime is the time that requests in flight have to end before HandOver returns, if
// the front end has a record of them. The next server executes the others again.
const drainTime = 500 * time.Millisecond

// HandOver leaves the front end to another server: it takes no more requests, and waits for
// those in flight. Then it hands the session over on the connection to, for the other server's
// Receive, and the front end stays connected. If to is nil, or requests are still in flight,
// HandOver hangs up, and the front end connects again. If the front end has a record of the
// requests in flight for the next server, they have half a second to end, and otherwise until ctx
// is done. An error says that requests are still in flight. Stop must follow.
func (s *Server) HandOver(ctx context.Context, to *net.UnixConn) error {
	s.refuse()
	s.mu.Lock()
	n := s.session
	s.mu.Unlock()
	limit := ctx
	if n != nil && n.recorded.Load() {
		var cancel context.CancelFunc
		limit, cancel = context.WithTimeout(ctx, drainTime)
		defer cancel()
	}
	return s.endSession(ctx, limit, to)
}

// Stop ends the server. It refuses new requests, waits until the requests in flight are
// done, hangs up, and frees memory. Without force, Stop of a server with a front end
// changes nothing and returns ErrBusy. When ctx is done, Stop hangs up at once, with
// Config.ZeroCopy as soon as no request is in flight. If requests are still in flight then, it returns an error and may be called again. Stop
// of a server that has ended returns nil.
func (s *Server) Stop(ctx context.Context, force bool) error {
	if front := s.Front(); front != "" && !force {
		return fmt.Errorf("stop vhost-user-blk server: %w: by %s", ErrBusy, front)
	}
	s.refuse()
	switch err := s.endSession(ctx, ctx, nil); {
	case errors.Is(err, errMemoryInUse):
		return fmt.Errorf("stop vhost-user-blk server: %w", err)
	case err != nil:
		s.cfg.Log.Debug("vhost-user-blk session cut off", "error", err)
	}
	if err := s.awaitOrphans(ctx); err != nil {
		return fmt.Errorf("stop vhost-user-blk server: %w", err)
	}
	return s.close()
}

// refuse closes the listeners.
func (s *Server) refuse() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	s.ended = true
	close(s.stopped)
	for _, l := range s.listeners {
		_ = l.Close()
	}
}

var errMemoryInUse = errors.New("the back end still accesses the guest's memory")

// endSession ends the session after its requests, and hands it over if to is not nil, or when limit
// is done. A session whose requests
// access the guest's memory itself ends after them in any case, unless ctx is done before; the
// error is errMemoryInUse then.
func (s *Server) endSession(ctx, limit context.Context, to *net.UnixConn) error {
	s.mu.Lock()
	n := s.session
	s.mu.Unlock()
	if n == nil {
		return nil
	}
	err := n.drain(limit)
	if err == nil && to != nil {
		n.leaving <- to
		select {
		case <-n.ended:
			return nil
		case <-ctx.Done():
		}
	}
	n.fail(ErrStopped)
	if err == nil || !s.cfg.ZeroCopy {
		<-n.ended
		return err
	}
	select {
	case <-n.ended:
		return err
	case <-ctx.Done():
		return errMemoryInUse
	}
}

// awaitOrphans waits until no request of an earlier session is at the back end.
func (s *Server) awaitOrphans(ctx context.Context) error {
	s.mu.Lock()
	if s.orphans.Load() == 0 {
		s.mu.Unlock()
		return nil
	}
	if s.idle == nil {
		s.idle = make(chan struct{})
	}
	idle := s.idle
	s.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for requests in flight: %w", context.Cause(ctx))
	}
}

// close frees the memory of the back end. No session is left, and no request. It waits for the loops,
// so it does not hold the lock, for which the loop with the last orphan may wait.
func (s *Server) close() error {
	s.closing.Lock()
	defer s.closing.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	var errs []error
	for i, w := range s.workers {
		l := s.cfg.Loops[i]
		// If the loop has ended, its requests may still use the memory.
		_ = l.Call(func() {
			l.Detach(w)
			l.Unhandle(w.base)
			errs = append(errs, w.back.Close())
		})
	}
	return errors.Join(errs...)
}

// Snapshot returns the counters, summed over all loops. The counters of each loop are those
// of its last batch.
func (s *Server) Snapshot() block.Stats {
	var total block.Stats
	for _, w := range s.workers {
		total.Add(w.Snapshot())
	}
	return total
}
