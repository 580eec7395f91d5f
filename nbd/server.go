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
	loops   []*loop
	stopped chan struct{} // closed when no client is taken any more

	changing sync.Mutex // one at a time opens and closes queues; before mu
	closed   bool       // the back ends' memory is given back; guarded by changing

	// mu guards what follows. Loops take it, so who holds it must not wait for a loop.
	mu        sync.Mutex
	over      bool      // stopped is closed
	exports   []*export // the first is the default; changed with both locks held
	listeners []net.Listener
	clients   map[net.Conn]bool // true: the negotiation is over
	conns     map[*conn]*loop   // in transmission
	total     int               // clients in all
	ending    sync.WaitGroup    // of those
}

// loop is a poller.Loop with what the server does there.
type loop struct {
	*poller.Loop
	worker *worker
	conns  int // guarded by Server.mu
}

// export is an Export while it is served.
type export struct {
	Export
	limits  limits
	queues  []*queue       // by loop
	removed bool           // guarded by Server.mu: no client gets it any more
	ending  sync.WaitGroup // of connections in transmission
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
	for i, l := range cfg.Loops {
		w := &worker{ring: l, index: i}
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

// Add offers another export, from now on. Errors are as those of New.
func (s *Server) Add(x Export) error {
	if err := x.check(); err != nil {
		return fmt.Errorf("export %q: %w", x.Name, err)
	}
	g := x.Device.Geometry()
	e := &export{Export: x, limits: s.cfg.limitsOf(g)}
	s.changing.Lock()
	defer s.changing.Unlock()
	switch {
	case s.isOver():
		return ErrStopped
	case slices.ContainsFunc(s.exports, func(have *export) bool { return have.Name == x.Name }):
		return fmt.Errorf("export %q: there is one already", x.Name)
	}
	for i := range s.loops {
		back, err := x.Device.OpenQueue(i, block.QueueConfig{Depth: s.cfg.Depth, MaxIO: e.limits.maxIO})
		if err != nil {
			return errors.Join(fmt.Errorf("export %q: open queue %d: %w", x.Name, i, err), s.closeQueues(e))
		}
		e.queues = append(e.queues, newQueue(back, g, e.limits, s.cfg.Depth))
	}
	for i, l := range s.loops {
		if err := l.Call(func() { l.worker.queues = append(l.worker.queues, e.queues[i]) }); err != nil {
			return errors.Join(fmt.Errorf("export %q: %w", x.Name, err), s.closeQueues(e))
		}
	}
	s.mu.Lock()
	s.exports = append(s.exports, e)
	s.mu.Unlock()
	return nil
}

// closeQueues gives an export's memory back. No request is in flight.
func (s *Server) closeQueues(e *export) error {
	var errs []error
	for i, q := range e.queues {
		l := s.loops[i]
		remove := func() {
			w := l.worker
			w.queues = slices.DeleteFunc(w.queues, func(have *queue) bool { return have == q })
			errs = append(errs, q.back.Close())
		}
		if l.Call(remove) != nil { // the loop is no more
			remove()
		}
	}
	return errors.Join(errs...)
}

// Remove ends an export, as Stop ends all. There is no error if there is none of that
// name.
func (s *Server) Remove(ctx context.Context, name string, force bool) error {
	s.mu.Lock()
	i := slices.IndexFunc(s.exports, func(e *export) bool { return e.Name == name })
	if i < 0 {
		s.mu.Unlock()
		return nil
	}
	e := s.exports[i]
	if n := s.users(e); n > 0 && !force {
		s.mu.Unlock()
		return fmt.Errorf("remove export %q: %w: %d connections", name, ErrBusy, n)
	}
	e.removed = true
	s.mu.Unlock()
	if err := s.await(ctx, &e.ending, e); err != nil {
		return fmt.Errorf("remove export %q: %w", name, err)
	}
	s.changing.Lock()
	defer s.changing.Unlock()
	s.mu.Lock()
	i = slices.Index(s.exports, e)
	if i >= 0 {
		s.exports = slices.Delete(s.exports, i, i+1)
	}
	s.mu.Unlock()
	if i < 0 || s.closed {
		return nil // somebody was faster
	}
	return s.closeQueues(e)
}

// users counts the connections of an export, or of all (nil). The caller holds mu.
func (s *Server) users(e *export) int {
	n := 0
	for c := range s.conns {
		if e == nil || c.offer.export == e {
			n++
		}
	}
	return n
}

// Users is how many connections use an export.
func (s *Server) Users(name string) int {
	e := s.find(name)
	if e == nil {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.users(e)
}

// find is the export of a name, or nil.
func (s *Server) find(name string) *export {
	for _, e := range s.list() {
		if e.Name == name || name == "" {
			return e
		}
	}
	return nil
}

// list is all exports that clients can choose from.
func (s *Server) list() []*export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.exports), func(e *export) bool { return e.removed })
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
		name := o.export.Name
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
	c, err := newConn(fd, o, structured, o.export.limits)
	if err != nil {
		return err
	}
	l, err := s.begin(c)
	if err != nil {
		return errors.Join(err, c.free())
	}
	defer s.finish(c)
	if lost := l.Call(func() { err = s.admit(c, l) }); lost != nil || err != nil {
		return errors.Join(err, lost, c.free())
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
	if s.over || c.offer.export.removed {
		return nil, ErrStopped
	}
	c.offer.export.ending.Add(1)
	l := slices.MinFunc(s.loops, func(a, b *loop) int { return a.conns - b.conns })
	l.conns++
	s.conns[c] = l
	return l, nil
}

// admit begins to serve, on the loop: who finds the connection admitted and calls the
// loop finds it with its worker; who ends the server or the export before that, here.
func (s *Server) admit(c *conn, l *loop) error {
	s.mu.Lock()
	refused := s.over || c.offer.export.removed
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
	if err := s.await(ctx, &s.ending, nil); err != nil {
		return fmt.Errorf("stop NBD server: %w", err)
	}
	return s.close()
}

// await ends the connections of an export, or all (nil), and waits for that.
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
	if s.over {
		s.hangUp(true)
	}
	s.mu.Unlock()
	select {
	case <-gone:
		return nil
	case <-time.After(cutPatience):
		return fmt.Errorf("wait for requests in flight: %w", context.Cause(ctx))
	}
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

// onConns calls fn for the admitted connections of an export, or all (nil), each on its loop.
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

// close gives the back ends' memory back. No connection is left.
func (s *Server) close() error {
	s.changing.Lock()
	defer s.changing.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	var errs []error
	for _, e := range s.exports {
		errs = append(errs, s.closeQueues(e))
	}
	for _, l := range s.loops {
		_ = l.Call(func() { // it may be no more
			if w := l.worker; w.attached {
				l.Detach(w)
				l.Unhandle(w.base)
			}
		})
	}
	return errors.Join(errs...)
}

// Snapshot is what was counted for an export, on all loops, to the last batch of
// each.
func (s *Server) Snapshot(name string) Stats {
	var total Stats
	if e := s.find(name); e != nil {
		for _, q := range e.queues {
			total.add(q.snapshot())
		}
	}
	return total
}
