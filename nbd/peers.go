package nbd

import (
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// acceptRetry is the pause after a temporary error, such as too many open files.
const acceptRetry = 100 * time.Millisecond

// peer is an accepted connection.
type peer struct {
	conn   net.Conn // as it was accepted
	name   string   // for the log
	source string   // see sourceOf
	stage  peerStage
}

// peerStage is the stage of a peer's life. It only ever increases.
type peerStage uint8

const (
	peerStranger peerStage = iota // negotiates
	peerSecure                    // negotiates within TLS
	peerServed                    // has chosen an export
	peerGone
)

// peers are the peers of a server, guarded by its mu. There are maxNegotiating places for
// peers that negotiate, and maxServed for those in the transmission phase. When a peer
// connects and all places for negotiations are taken, the peer that worst returns is
// disconnected. So a client that negotiates without delay is not shut out by many that
// are silent. One source gets at most three quarters of the other places.
type peers struct {
	maxServed, maxNegotiating int

	served      map[*peer]bool
	bySource    map[string]int // number of those served
	negotiating []*peer        // in the order of their arrival
}

func (c *peers) init(maxServed, maxNegotiating int) {
	c.maxServed, c.maxNegotiating = maxServed, maxNegotiating
	c.served, c.bySource = map[*peer]bool{}, map[string]int{}
}

// enter adds a peer that negotiates. If another one must be disconnected for it, enter
// returns that.
func (c *peers) enter(x *peer) (evicted *peer, err error) {
	if err := c.full(); err != nil {
		return nil, err
	}
	if len(c.negotiating) >= c.maxNegotiating {
		evicted = c.worst()
		c.leave(evicted)
	}
	c.negotiating = append(c.negotiating, x)
	return evicted, nil
}

// worst is the peer to disconnect when too many negotiate: of those without TLS the
// oldest of the source that has most of them, or else the oldest of all.
func (c *peers) worst() *peer {
	count := map[string]int{}
	for _, x := range c.negotiating {
		if x.stage == peerStranger {
			count[x.source]++
		}
	}
	worst := c.negotiating[0]
	for _, x := range c.negotiating {
		if x.stage == peerStranger && (worst.stage != peerStranger || count[x.source] > count[worst.source]) {
			worst = x
		}
	}
	return worst
}

func (c *peers) full() error {
	if len(c.served) >= c.maxServed {
		return fmt.Errorf("%d clients are served already", len(c.served))
	}
	return nil
}

// serve moves a peer to the transmission phase.
func (c *peers) serve(x *peer) error {
	if x.stage == peerGone {
		return errEvicted
	}
	if err := c.full(); err != nil {
		return err
	}
	if n := c.bySource[x.source]; n >= c.maxServed-c.maxServed/4 {
		return fmt.Errorf("%d clients of %s are served already", n, x.source)
	}
	c.leave(x)
	x.stage = peerServed
	c.served[x] = true
	c.bySource[x.source]++
	return nil
}

// leave removes a peer.
func (c *peers) leave(x *peer) {
	if i := slices.Index(c.negotiating, x); i >= 0 {
		c.negotiating = slices.Delete(c.negotiating, i, i+1)
	}
	if c.served[x] {
		delete(c.served, x)
		if c.bySource[x.source]--; c.bySource[x.source] == 0 {
			delete(c.bySource, x.source)
		}
	}
	x.stage = peerGone
}

// hangUp closes the connections of peers that negotiate, or of all. Those in the
// transmission phase have given their socket to a loop unless they use TLS.
func (c *peers) hangUp(all bool) {
	for _, x := range c.negotiating {
		_ = x.conn.Close()
	}
	if all {
		for x := range c.served {
			_ = x.conn.Close()
		}
	}
}

var errEvicted = errors.New("others negotiate, and this client has taken longest")

// Serve accepts clients from l, a listener for unix or TCP sockets, until l fails, or
// until Stop, which closes l. After Stop it returns nil.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return errors.Join(ErrStopped, l.Close())
	}
	s.listeners = append(s.listeners, l)
	s.mu.Unlock()
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
			s.accept(nc)
		case s.isEnded():
			return nil
		case passes(err):
			s.refusals.warn(s.cfg.Log, "NBD client not accepted", "error", err)
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

// accept serves a client in a goroutine of its own.
func (s *Server) accept(nc net.Conn) {
	x := &peer{conn: nc, name: printable(nc.RemoteAddr().String()), source: sourceOf(nc)}
	evicted, err := s.enter(x)
	if evicted != nil {
		_ = evicted.conn.Close()
		s.refusals.warn(s.cfg.Log, "NBD client turned away", "client", evicted.name, "reason", errEvicted)
	}
	if err != nil {
		s.refusals.warn(s.cfg.Log, "NBD client turned away", "client", x.name, "reason", err)
		_ = nc.Close()
		return
	}
	go func() {
		defer s.ending.Done()
		defer s.leave(x)
		log := s.cfg.Log.With("client", x.name)
		n, o, err := s.greet(x)
		if err != nil {
			log.Debug("NBD client not served", "reason", printable(err.Error()))
			return
		}
		s.events.info(log, "NBD client connected", "export", o.export.Name)
		err = s.serve(n, o)
		s.events.info(log, "NBD client gone", "export", o.export.Name, "error", err)
	}()
}

// enter adds a client. If another one must be disconnected for it, enter returns that.
func (s *Server) enter(x *peer) (evicted *peer, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil, ErrStopped
	}
	if evicted, err = s.peers.enter(x); err == nil {
		s.ending.Add(1)
	}
	return evicted, err
}

// leave removes a client.
func (s *Server) leave(x *peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.peers.leave(x)
	_ = x.conn.Close() // it may be closed already
}

// greet negotiates with a client, for HandshakeTimeout at most.
func (s *Server) greet(x *peer) (*negotiation, offer, error) {
	nc := x.conn
	if err := nc.SetDeadline(time.Now().Add(s.cfg.HandshakeTimeout)); err != nil {
		return nil, offer{}, err
	}
	n := &negotiation{srv: s, conn: nc}
	n.secured = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if x.stage == peerStranger {
			x.stage = peerSecure
		}
		if certs := n.conn.(*tls.Conn).ConnectionState().PeerCertificates; len(certs) > 0 {
			x.source = fmt.Sprintf("certificate %.8x", sha256.Sum256(certs[0].Raw))
		}
	}
	n.chosen = func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.peers.serve(x)
	}
	o, err := n.run()
	if err != nil {
		return nil, offer{}, err
	}
	return n, o, nc.SetDeadline(time.Time{})
}

// sourceOf identifies the origin of a connection: an IP address, or a local user.
func sourceOf(nc net.Conn) string {
	if a, ok := nc.RemoteAddr().(*net.TCPAddr); ok {
		return a.IP.String()
	}
	u, ok := nc.(*net.UnixConn)
	if !ok {
		return ""
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ""
	}
	source := ""
	_ = raw.Control(func(fd uintptr) { // an error leaves the source empty
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			source = fmt.Sprintf("user %d", cred.Uid)
		}
	})
	return source
}

// serve serves a client in the transmission phase, and returns when it has gone.
func (s *Server) serve(n *negotiation, o offer) error {
	if secure, ok := n.conn.(*tls.Conn); ok {
		return s.serveTLS(secure, o)
	}
	fd, err := takeFile(n.conn)
	if err != nil {
		return err
	}
	return s.transmit(fd, o, stallTicks)
}

// takeFile duplicates the descriptor of a connection and closes the connection.
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

// printable makes text of a peer safe for terminals and logs: it escapes everything but
// printable ASCII, and cuts long text off.
func printable(s string) string {
	const longest = 500
	if len(s) > longest {
		s = s[:longest] + "..."
	}
	q := strconv.QuoteToASCII(s)
	return q[1 : len(q)-1]
}
