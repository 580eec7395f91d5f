package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/frontend"
	"ublk-nvmeof/internal/loglimit"
	"ublk-nvmeof/internal/uring"
	"ublk-nvmeof/poller"
)

// ErrBusy means that clients are connected.
var ErrBusy = frontend.NewError(block.ErrBusy, "NBD export is in use")

// ErrStopped means that the server has ended.
var ErrStopped = frontend.NewError(block.ErrStopped, "NBD server has ended")

// Server serves exports to clients. Its methods may be called in any order, from any
// goroutine except those of the loops.
type Server struct {
	cfg     Config
	loops   []*loop
	stopped chan struct{} // closed when no more clients are accepted

	changing sync.Mutex // held while queues are opened or closed; taken before mu
	closed   bool       // the memory of the back ends was freed; guarded by changing

	// mu guards the fields below. Loops take it, so nothing that holds it may wait for
	// a loop.
	mu        sync.Mutex
	ended     bool      // stopped is closed
	exports   []*export // the first is the default; changed with both locks held
	listeners []net.Listener
	peers     peers
	conns     map[*conn]*loop // connections in the transmission phase
	ending    sync.WaitGroup  // the goroutines of the clients

	refusals, events *slog.Logger // each has its own rate limit
}

// loop is a poller.Loop and the server's worker on it.
type loop struct {
	*poller.Loop
	worker *worker
	conns  int // guarded by Server.mu
}

// New opens the queues of all exports. The error is about the configuration, or an error
// of a back end, or of a loop that has ended.
func New(cfg Config) (*Server, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, fmt.Errorf("make NBD server: %w", err)
	}
	s := &Server{
		cfg: cfg, stopped: make(chan struct{}), conns: map[*conn]*loop{},
		refusals: loglimit.New(cfg.Log), events: loglimit.New(cfg.Log),
	}
	s.peers.init(cfg.MaxConns, cfg.MaxHandshakes)
	for i, l := range cfg.Loops {
		w := newWorker(uring.OfLoop(l), i, cfg.StallTimeout)
		s.loops = append(s.loops, &loop{Loop: l, worker: w})
		err := l.Call(func() {
			w.base = l.Handle(w)
			w.attached = true
			l.Attach(w)
		})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("make NBD server: %w", err), s.close())
		}
	}
	for _, e := range cfg.Exports {
		if err := s.Add(e); err != nil {
			return nil, errors.Join(fmt.Errorf("make NBD server: %w", err), s.close())
		}
	}
	return s, nil
}

func (s *Server) isEnded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ended
}

// transmit serves a client in the transmission phase, on the loop with the fewest
// connections, and closes its socket. A client that stalls for patience ticks is
// disconnected. 0 means never. x is nil for the kernel's client.
func (s *Server) transmit(x *peer, fd int, o offer, patience int) error {
	defer unix.Close(fd)
	if err := unix.SetNonblock(fd, false); err != nil {
		return fmt.Errorf("make socket blocking: %w", err)
	}
	c, err := newConn(fd, o)
	if err != nil {
		return err
	}
	c.patience = patience
	l, err := s.begin(x, c)
	if err != nil {
		return errors.Join(err, c.unmap())
	}
	defer s.finish(c)
	if lost := l.Call(func() { err = s.admit(c, l) }); lost != nil || err != nil {
		return errors.Join(err, lost, c.unmap())
	}
	select {
	case <-c.done:
		return errors.Join(c.err, c.unmap())
	case <-l.Done():
		// The kernel may still use the connection's memory, so it is not unmapped.
		return fmt.Errorf("serve NBD client: %w", ErrStopped)
	}
}

// begin assigns a connection to a loop.
func (s *Server) begin(x *peer, c *conn) (*loop, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || c.offer.export.removed {
		return nil, ErrStopped
	}
	c.offer.export.ending.Add(1)
	l := slices.MinFunc(s.loops, func(a, b *loop) int { return a.conns - b.conns })
	l.conns++
	s.conns[c] = l
	if x != nil {
		x.served = c
	}
	return l, nil
}

// admit starts a connection on its loop, unless the server or the export has ended
// meanwhile. As soon as the connection is marked as admitted, onConns finds it on the
// loop.
func (s *Server) admit(c *conn, l *loop) error {
	s.mu.Lock()
	refused := s.ended || c.offer.export.removed
	c.admitted = !refused
	s.mu.Unlock()
	if refused {
		return ErrStopped
	}
	l.worker.add(c)
	return nil
}

func (s *Server) finish(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[c].conns--
	delete(s.conns, c)
	c.offer.export.ending.Done()
}

// Connections returns the number of clients in the transmission phase on each loop.
func (s *Server) Connections() (perLoop []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.loops {
		perLoop = append(perLoop, l.conns)
	}
	return perLoop
}

// Stop ends the server. It refuses new clients and new requests, waits until the requests
// in flight are done and answered, closes all connections, and frees memory.
//
// Without force, Stop of a server with clients changes nothing and returns ErrBusy. When
// ctx is done, Stop no longer waits for clients to read their replies. If requests are
// still in flight then, it returns an error and may be called again. Stop of a server
// that has ended returns nil.
func (s *Server) Stop(ctx context.Context, force bool) error {
	if err := s.refuseClients(force); err != nil {
		return fmt.Errorf("stop NBD server: %w", err)
	}
	if err := s.await(ctx, &s.ending, nil); err != nil {
		return fmt.Errorf("stop NBD server: %w", err)
	}
	return s.close()
}

// await ends the connections of an export, or of all exports if e is nil, and waits for
// their end.
func (s *Server) await(ctx context.Context, ending *sync.WaitGroup, e *export) error {
	s.onConns(e, (*conn).leave)
	gone := make(chan struct{})
	go func() {
		ending.Wait()
		close(gone)
	}()
	select {
	case <-gone:
		return nil
	case <-ctx.Done():
	}
	s.onConns(e, (*conn).abandon)
	s.mu.Lock()
	if s.ended {
		s.peers.hangUp(true)
	}
	s.mu.Unlock()
	select {
	case <-gone:
		return nil
	case <-time.After(cutPatience):
		return fmt.Errorf("wait for requests in flight: %w", context.Cause(ctx))
	}
}

// cutPatience is the time that await waits for the kernel to cancel operations on
// sockets.
const cutPatience = 100 * time.Millisecond

// refuseClients closes the listeners and ends negotiations.
func (s *Server) refuseClients(force bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil
	}
	if len(s.conns) > 0 && !force {
		return fmt.Errorf("%w: %d connections", ErrBusy, len(s.conns))
	}
	s.ended = true
	close(s.stopped)
	for _, l := range s.listeners {
		_ = l.Close()
	}
	s.peers.hangUp(false)
	return nil
}

// onConns calls fn for the admitted connections of an export, or of all exports if e is
// nil. Each call is on the loop of the connection.
func (s *Server) onConns(e *export, fn func(*conn)) {
	s.mu.Lock()
	all := map[*loop][]*conn{}
	for c, l := range s.conns {
		if !c.admitted || e != nil && c.offer.export != e {
			continue
		}
		all[l] = append(all[l], c)
	}
	s.mu.Unlock()
	for l, conns := range all {
		// A loop that has ended has no connections.
		_ = l.Call(func() {
			for _, c := range conns {
				fn(c)
			}
		})
	}
}

// close frees the memory of the back ends. No connection is left.
func (s *Server) close() error {
	s.changing.Lock()
	defer s.changing.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	var errs []error
	for _, e := range s.exports {
		errs = append(errs, s.closeShards(e))
	}
	for _, l := range s.loops {
		_ = l.Call(func() { // the loop may have ended
			if w := l.worker; w.attached {
				l.Detach(w)
				l.Unhandle(w.base)
			}
		})
	}
	return errors.Join(errs...)
}
