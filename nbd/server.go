package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/poller"
)

// ErrBusy says that clients are connected.
var ErrBusy = errors.New("NBD export is in use")

// ErrStopped says that the server has ended.
var ErrStopped = errors.New("NBD server has ended")

// acceptRetry is the pause after an error that passes, as having too many files open.
const acceptRetry = 100 * time.Millisecond

// Server serves exports to clients. Its methods may be called from any goroutine but
// the loops'.
type Server struct {
	cfg     Config
	limits  []limits // by export
	loops   []*loop
	stopped chan struct{} // closed when no client is taken any more

	mu        sync.Mutex // guards what follows
	over      bool       // stopped is closed
	listeners []net.Listener
	clients   map[net.Conn]bool // true: the negotiation is over
	conns     map[*conn]*loop   // in transmission
	total     int               // clients in all
	ending    sync.WaitGroup    // of those
	closed    bool              // the back end's memory is given back
}

// loop is a poller.Loop with what the server does there.
type loop struct {
	*poller.Loop
	worker *worker
	conns  int // guarded by Server.mu
}

// New opens the queues of all exports. Errors are the configuration's, what the back
// ends say, and the end of a loop.
func New(cfg Config) (*Server, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, fmt.Errorf("make NBD server: %w", err)
	}
	s := &Server{
		cfg: cfg, stopped: make(chan struct{}),
		clients: map[net.Conn]bool{}, conns: map[*conn]*loop{},
	}
	for _, e := range cfg.Exports {
		s.limits = append(s.limits, cfg.limitsOf(e.Device.Geometry()))
	}
	for i, l := range cfg.Loops {
		w := &worker{ring: l}
		s.loops = append(s.loops, &loop{Loop: l, worker: w})
		if err := s.open(i, w); err != nil {
			return nil, errors.Join(fmt.Errorf("make NBD server: %w", err), s.close())
		}
	}
	return s, nil
}

// open opens the queues of loop number i, and has it serve them.
func (s *Server) open(i int, w *worker) error {
	for k, e := range s.cfg.Exports {
		back, err := e.Device.OpenQueue(i, block.QueueConfig{Depth: s.cfg.Depth, MaxIO: s.limits[k].maxIO})
		if err != nil {
			return fmt.Errorf("open queue %d of export %q: %w", i, e.Name, err)
		}
		w.queues = append(w.queues, newQueue(back, e.Device.Geometry(), s.limits[k], s.cfg.Depth))
	}
	l := s.cfg.Loops[i]
	return l.Call(func() {
		w.base = l.Handle(w)
		w.attached = true
		l.Attach(w)
	})
}

// export is the number of an export, or -1.
func (s *Server) export(name string) int {
	if name == "" {
		return 0
	}
	return slices.IndexFunc(s.cfg.Exports, func(e Export) bool { return e.Name == name })
}

// Serve takes clients from l, a listener for unix or TCP sockets, until Stop, which
// closes it and is no error, or until it fails.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		return errors.Join(ErrStopped, l.Close())
	}
	s.listeners = append(s.listeners, l)
	s.mu.Unlock()
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
			s.take(nc)
		case s.isOver():
			return nil
		case passes(err):
			s.cfg.Log.Warn("NBD client not accepted", "error", err)
			select {
			case <-time.After(acceptRetry):
			case <-s.stopped:
			}
		default:
			return fmt.Errorf("accept NBD client: %w", err)
		}
	}
}

func passes(err error) bool {
	for _, e := range []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.ECONNABORTED, unix.EPROTO} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (s *Server) isOver() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over
}

// take serves a client from its first word to its last.
func (s *Server) take(nc net.Conn) {
	if err := s.enter(nc); err != nil {
		s.cfg.Log.Warn("NBD client turned away", "client", nc.RemoteAddr().String(), "reason", err)
		_ = nc.Close()
		return
	}
	go func() {
		defer s.ending.Done()
		log := s.cfg.Log.With("client", nc.RemoteAddr().String())
		n, o, err := s.greet(nc)
		if err != nil {
			log.Debug("NBD client not served", "reason", err)
			s.leave(nc)
			return
		}
		name := s.cfg.Exports[o.index].Name
		log.Info("NBD client connected", "export", name)
		err = s.serve(n, o)
		s.leave(nc)
		log.Info("NBD client gone", "export", name, "error", err)
	}()
}

// enter counts a client in.
func (s *Server) enter(nc net.Conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.over:
		return ErrStopped
	case s.total >= s.cfg.MaxConns:
		return fmt.Errorf("there are %d", s.total)
	}
	s.total++
	s.clients[nc] = false
	s.ending.Add(1)
	return nil
}

// leave counts a client out.
func (s *Server) leave(nc net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	delete(s.clients, nc)
	_ = nc.Close() // it may be, already
}

// greet negotiates within the time for that.
func (s *Server) greet(nc net.Conn) (*negotiation, offer, error) {
	if err := nc.SetDeadline(time.Now().Add(s.cfg.HandshakeTimeout)); err != nil {
		return nil, offer{}, err
	}
	n, o, err := s.negotiate(nc)
	if err != nil {
		return nil, offer{}, err
	}
	s.mu.Lock()
	s.clients[nc] = true
	s.mu.Unlock()
	return n, o, nc.SetDeadline(time.Time{})
}

// serve hands a client to a loop, and returns when it has gone.
func (s *Server) serve(n *negotiation, o offer) error {
	if secure, ok := n.conn.(*tls.Conn); ok {
		return s.serveTLS(secure, n, o)
	}
	fd, err := takeFile(n.conn)
	if err != nil {
		return err
	}
	return s.transmit(fd, o, n.structured)
}

// serveTLS puts a socket pair between a client and its loop.
func (s *Server) serveTLS(secure *tls.Conn, n *negotiation, o offer) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make socket pair: %w", err)
	}
	file := os.NewFile(uintptr(fds[1]), "TLS")
	plain, err := net.FileConn(file)
	_ = file.Close()
	if err != nil {
		return errors.Join(fmt.Errorf("use socket pair: %w", err), unix.Close(fds[0]))
	}
	inner := plain.(*net.UnixConn)
	var pumps sync.WaitGroup
	pumps.Go(func() {
		_, _ = io.Copy(inner, secure)
		_ = inner.CloseWrite()
	})
	pumps.Go(func() {
		_, _ = io.Copy(secure, inner)
		_ = secure.CloseWrite()
		_ = secure.NetConn().Close() // ends the other pump
		_ = inner.Close()
	})
	err = s.transmit(fds[0], o, n.structured)
	pumps.Wait()
	return err
}

// takeFile makes a blocking descriptor of a connection, and closes that.
func takeFile(nc net.Conn) (fd int, err error) {
	defer func() { err = errors.Join(err, nc.Close()) }()
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return -1, fmt.Errorf("%T is no socket", nc)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return -1, err
	}
	var dup error
	err = raw.Control(func(p uintptr) { fd, dup = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, dup); err != nil {
		return -1, fmt.Errorf("duplicate socket: %w", err)
	}
	return fd, nil
}

// transmit serves a socket, which it closes, on the loop with the fewest connections.
func (s *Server) transmit(fd int, o offer, structured bool) error {
	defer unix.Close(fd)
	if err := unix.SetNonblock(fd, false); err != nil {
		return fmt.Errorf("make socket blocking: %w", err)
	}
	c, err := newConn(fd, o, structured, s.limits[o.index])
	if err != nil {
		return err
	}
	l, err := s.begin(c)
	if err != nil {
		return errors.Join(err, c.free())
	}
	defer s.finish(c)
	if err := l.Call(func() { l.worker.add(c) }); err != nil {
		return errors.Join(err, c.free())
	}
	select {
	case <-c.done:
		return errors.Join(c.err, c.free())
	case <-l.Done():
		// Its memory may still be the kernel's: it stays.
		return fmt.Errorf("serve NBD client: %w", ErrStopped)
	}
}

// begin chooses a loop.
func (s *Server) begin(c *conn) (*loop, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return nil, ErrStopped
	}
	l := slices.MinFunc(s.loops, func(a, b *loop) int { return a.conns - b.conns })
	l.conns++
	s.conns[c] = l
	return l, nil
}

func (s *Server) finish(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[c].conns--
	delete(s.conns, c)
}

// Connections is how many clients use an export, and how many of them each loop
// serves.
func (s *Server) Connections() (perLoop []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.loops {
		perLoop = append(perLoop, l.conns)
	}
	return perLoop
}

// Stop ends the server: no new client, no new request, requests in flight done and
// answered, all connections closed, memory given back.
//
// Without force, a server with clients is left alone, with ErrBusy. When ctx is done,
// replies that clients do not read are given up, and if there are still requests in
// flight, the error says so; it can be called again. Stop of a server that is over
// returns nil.
func (s *Server) Stop(ctx context.Context, force bool) error {
	if err := s.refuseClients(force); err != nil {
		return fmt.Errorf("stop NBD server: %w", err)
	}
	s.onConns((*conn).leave)
	gone := make(chan struct{})
	go func() {
		s.ending.Wait()
		close(gone)
	}()
	select {
	case <-gone:
	case <-ctx.Done():
		s.onConns((*conn).abandon)
		s.mu.Lock()
		s.hangUp(true)
		s.mu.Unlock()
		select {
		case <-gone:
		case <-time.After(cutPatience):
			return fmt.Errorf("stop NBD server: wait for requests in flight: %w", context.Cause(ctx))
		}
	}
	return s.close()
}

// cutPatience is for the kernel to end what it does on a socket.
const cutPatience = 100 * time.Millisecond

// refuseClients closes the doors, and ends negotiations.
func (s *Server) refuseClients(force bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return nil
	}
	if len(s.conns) > 0 && !force {
		return fmt.Errorf("%w: %d connections", ErrBusy, len(s.conns))
	}
	s.over = true
	close(s.stopped)
	for _, l := range s.listeners {
		_ = l.Close()
	}
	s.hangUp(false)
	return nil
}

// hangUp ends clients in negotiation; or all, of which those that are being served have
// something to close only if they use TLS. The caller holds mu.
func (s *Server) hangUp(all bool) {
	for nc, served := range s.clients {
		if all || !served {
			_ = nc.Close()
		}
	}
}

// onConns calls fn for all connections, each on its loop.
func (s *Server) onConns(fn func(*conn)) {
	s.mu.Lock()
	all := map[*loop][]*conn{}
	for c, l := range s.conns {
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

// close gives the back ends' memory back. No connection is left.
func (s *Server) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	var errs []error
	for _, l := range s.loops {
		w := l.worker
		err := l.Call(func() {
			if w.attached {
				l.Detach(w)
				l.Unhandle(w.base)
			}
			errs = append(errs, w.close())
		})
		if err != nil { // the loop is no more
			errs = append(errs, w.close())
		}
	}
	return errors.Join(errs...)
}

// Snapshot is what was counted for an export, on all loops, to the last batch of
// each.
func (s *Server) Snapshot(export string) Stats {
	var total Stats
	if i := s.export(export); i >= 0 {
		for _, l := range s.loops {
			total.add(l.worker.queues[i].snapshot())
		}
	}
	return total
}
