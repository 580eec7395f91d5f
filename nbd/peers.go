package nbd

import (
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/acceptor"
)

// peer is an accepted connection.
type peer struct {
	conn   net.Conn // as it was accepted
	name   string   // for the log
	holder holder
	stage  peerStage

	// In the transmission phase; see Server.look.
	served   *conn     // nil before Server.begin
	requests uint64    // as of the last look
	quiet    time.Time // time of the last look that saw a request, or of the beginning
}

// holder identifies the owner of a connection, as far as the server can tell.
type holder struct {
	source  string // a certificate, an IP address or a local user
	process int32  // of a local user, or 0
}

// peerStage is the stage of a peer's life. It only ever increases.
type peerStage uint8

const (
	peerStranger peerStage = iota // negotiates
	peerSecure                    // negotiates within TLS
	peerServed                    // has chosen an export
	peerGone
)

const (
	// unusedTime is the time for which a client may keep a place without a request
	// when others need it. Clients send their first request at once.
	unusedTime = 10 * time.Second
	// idleTime is the idle time after which a connection of a large holder gives way.
	idleTime = time.Minute
	// manyConns is the number of connections that makes a holder a large one. No
	// common client opens more than 16.
	manyConns = 64
	// lookPause is the least time between two looks.
	lookPause = 100 * time.Millisecond
)

// peers holds the peers of a server. The server's mu guards it. There are maxNegotiating
// places for peers that negotiate, and maxServed for peers in the transmission phase.
// When a peer connects and all places for negotiations are taken, the peer that worst
// returns is disconnected. So many silent clients cannot keep out a client that
// negotiates without delay. One source gets at most three quarters of the other places.
// When a peer has chosen an export and finds no place, the peer that idler returns gives
// way.
type peers struct {
	maxServed, maxNegotiating int

	served      map[*peer]bool
	bySource    map[string]int // number of served peers
	negotiating []*peer        // in the order of their arrival
	looked      time.Time      // see Server.look
}

func (c *peers) init(maxServed, maxNegotiating int) {
	c.maxServed, c.maxNegotiating = maxServed, maxNegotiating
	c.served, c.bySource = map[*peer]bool{}, map[string]int{}
}

// enter adds a peer that negotiates. If another peer must be disconnected for it, enter
// returns that peer.
func (c *peers) enter(x *peer) (evicted *peer) {
	if len(c.negotiating) >= c.maxNegotiating {
		evicted = c.worst()
		c.leave(evicted)
	}
	c.negotiating = append(c.negotiating, x)
	return evicted
}

// worst returns the peer to disconnect when too many negotiate. It belongs to the source
// with the most negotiating peers. Of these it is the oldest without TLS, or the oldest
// if all use TLS.
func (c *peers) worst() *peer {
	count := map[string]int{}
	for _, x := range c.negotiating {
		count[x.holder.source]++
	}
	worst := c.negotiating[0]
	for _, x := range c.negotiating {
		n, most := count[x.holder.source], count[worst.holder.source]
		if n > most || n == most && x.stage == peerStranger && worst.stage != peerStranger {
			worst = x
		}
	}
	return worst
}

// serve moves a peer to the transmission phase. If there is no place for it, serve
// returns the reason, and the peer that gives way, or nil if none does.
func (c *peers) serve(x *peer, now time.Time) (idler *peer, err error) {
	own := c.bySource[x.holder.source]
	switch {
	case x.stage == peerGone:
		return nil, errEvicted
	case own >= c.maxServed-c.maxServed/4:
		return c.idler(x, now, true), fmt.Errorf("%d clients of %s are served already", own, x.holder.source)
	case len(c.served) >= c.maxServed:
		return c.idler(x, now, false), fmt.Errorf("%d clients are served already", len(c.served))
	}
	c.leave(x)
	x.stage, x.quiet = peerServed, now
	c.served[x] = true
	c.bySource[x.holder.source]++
	return nil, nil
}

// idler returns the peer that gives way to x, which finds no place: a peer that has not
// sent a request within unusedTime. If a large holder has more connections than the
// holder of x, a connection of the large holder is also a candidate if it has sent no
// request at all, or none within idleTime. Peers without any request come first, then
// those of the holder with the most connections, then those that have been quiet longest.
// If within is true, only peers of the source of x are candidates.
func (c *peers) idler(x *peer, now time.Time, within bool) *peer {
	count := map[holder]int{}
	for y := range c.served {
		count[y.holder]++
	}
	many := min(manyConns, max(1, c.maxServed/8))
	var idlest *peer
	for y := range c.served {
		n, quiet := count[y.holder], now.Sub(y.quiet)
		large := n >= many && n > count[x.holder]+1
		switch {
		case within && y.holder.source != x.holder.source, y.served == nil || !y.served.admitted:
			continue
		case y.requests == 0 && (large || quiet >= unusedTime), large && quiet >= idleTime:
			if idlest == nil || y.idlerThan(idlest, count) {
				idlest = y
			}
		}
	}
	return idlest
}

func (x *peer) idlerThan(y *peer, count map[holder]int) bool {
	switch {
	case (x.requests == 0) != (y.requests == 0):
		return x.requests == 0
	case count[x.holder] != count[y.holder]:
		return count[x.holder] > count[y.holder]
	}
	return x.quiet.Before(y.quiet)
}

// leave removes a peer.
func (c *peers) leave(x *peer) {
	if i := slices.Index(c.negotiating, x); i >= 0 {
		c.negotiating = slices.Delete(c.negotiating, i, i+1)
	}
	if c.served[x] {
		delete(c.served, x)
		if c.bySource[x.holder.source]--; c.bySource[x.holder.source] == 0 {
			delete(c.bySource, x.holder.source)
		}
	}
	x.stage = peerGone
}

// hangUp closes the connections of peers that negotiate, or of all peers. A peer in the
// transmission phase has passed its socket to a loop, unless it uses TLS.
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

var (
	errEvicted = errors.New("too many clients negotiate, and this one has taken longest")
	errGaveWay = errors.New("another client needs the place of this idle client")
)

// Serve accepts clients from l, a listener for unix or TCP sockets. It returns the error
// when l fails. Stop closes l, and Serve then returns nil.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return errors.Join(ErrStopped, l.Close())
	}
	s.listeners = append(s.listeners, l)
	s.mu.Unlock()
	err := acceptor.Run(l.Accept, s.accept, func(err error) {
		s.refusals.Warn("NBD client not accepted", "error", err)
	}, s.stopped)
	if err != nil {
		return fmt.Errorf("accept NBD client: %w", err)
	}
	return nil
}

// accept serves a client in a new goroutine.
func (s *Server) accept(nc net.Conn) {
	x := &peer{conn: nc, name: printable(nc.RemoteAddr().String()), holder: holderOf(nc)}
	evicted, ok := s.enter(x)
	if evicted != nil {
		_ = evicted.conn.Close()
		s.turnedAway(evicted, errEvicted)
	}
	if !ok {
		_ = nc.Close()
		return
	}
	go func() {
		defer s.ending.Done()
		defer s.leave(x)
		n, o, err := s.greet(x)
		if err != nil {
			s.notServed(x, n, err)
			return
		}
		log := s.events.With("client", x.name)
		log.Info("NBD client connected", "export", o.export.Name)
		err = s.serve(x, n, o)
		log.Info("NBD client gone", "export", o.export.Name, "error", err)
	}()
}

// turnedAway logs that a client was refused or disconnected.
func (s *Server) turnedAway(x *peer, reason error) {
	s.refusals.Warn("NBD client turned away", "client", x.name, "reason", printable(reason.Error()))
}

// notServed logs why a negotiation has ended without an export. A client that only looks
// around is not logged as an event.
func (s *Server) notServed(x *peer, n *negotiation, err error) {
	s.mu.Lock()
	known := x.stage == peerGone || s.ended
	s.mu.Unlock()
	left := errors.Is(err, errAborted) || errors.Is(err, io.EOF)
	switch {
	case known:
	case left && n.refused != nil:
		s.turnedAway(x, n.refused)
	case left:
		s.cfg.Log.Debug("NBD client not served", "client", x.name, "reason", printable(err.Error()))
	default:
		s.turnedAway(x, err)
	}
}

// enter adds a client, unless the server has ended. If another client must be
// disconnected for it, enter returns that client.
func (s *Server) enter(x *peer) (evicted *peer, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil, false
	}
	s.ending.Add(1)
	return s.peers.enter(x), true
}

// place moves a client to the transmission phase. If there is no place for it, an idle
// client gives way. If there is none, place returns the reason.
func (s *Server) place(x *peer) error {
	const tries = 3 // others may be faster
	for try := 0; ; try++ {
		s.look(try > 0)
		s.mu.Lock()
		idler, err := s.peers.serve(x, time.Now())
		s.mu.Unlock()
		if err == nil || idler == nil || try == tries {
			return err
		}
		s.giveWay(idler)
	}
}

// look records which clients have sent requests since the last look, if there are so many
// clients that one may have to give way. If again is false, it does nothing within
// lookPause after the last look.
func (s *Server) look(again bool) {
	at := time.Now()
	s.mu.Lock()
	c := &s.peers
	needed := len(c.served) > c.maxServed/2 && (again || at.Sub(c.looked) >= lookPause)
	if needed {
		c.looked = at
	}
	s.mu.Unlock()
	if !needed {
		return
	}
	type state struct {
		requests uint64
		idle     bool
	}
	states := map[*conn]state{}
	s.onConns(nil, func(c *conn) { states[c] = state{c.requests, c.tasks == 0} })
	s.mu.Lock()
	defer s.mu.Unlock()
	for x := range c.served {
		if now := states[x.served]; now != (state{x.requests, true}) {
			x.requests, x.quiet = now.requests, at
		}
	}
}

// giveWay ends the connection of a client, if it is still idle.
func (s *Server) giveWay(x *peer) {
	s.mu.Lock()
	c, requests := x.served, x.requests
	l := s.conns[c]
	s.mu.Unlock()
	if l == nil {
		return // the connection has ended
	}
	gone := false
	_ = l.Call(func() { // a loop that has ended has no connections
		if gone = c.tasks == 0 && c.requests == requests; gone {
			c.end(errGaveWay)
			c.settle()
		}
	})
	if !gone {
		return
	}
	s.mu.Lock()
	s.peers.leave(x)
	s.mu.Unlock()
	s.turnedAway(x, errGaveWay)
}

// leave removes a client.
func (s *Server) leave(x *peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.peers.leave(x)
	_ = x.conn.Close() // it may be closed already
}

// greet negotiates with a client, for at most HandshakeTimeout.
func (s *Server) greet(x *peer) (*negotiation, offer, error) {
	nc := x.conn
	n := &negotiation{srv: s, conn: nc}
	if err := nc.SetDeadline(time.Now().Add(s.cfg.HandshakeTimeout)); err != nil {
		return n, offer{}, err
	}
	n.secured = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if x.stage == peerStranger {
			x.stage = peerSecure
		}
		if certs := n.conn.(*tls.Conn).ConnectionState().PeerCertificates; len(certs) > 0 {
			x.holder.source = fmt.Sprintf("certificate %.8x", sha256.Sum256(certs[0].Raw))
		}
	}
	n.chosen = func() error { return s.place(x) }
	o, err := n.run()
	if err != nil {
		return n, offer{}, err
	}
	return n, o, nc.SetDeadline(time.Time{})
}

// holderOf identifies the owner of a connection: an IP address, or a local user and the
// process.
func holderOf(nc net.Conn) (h holder) {
	if a, ok := nc.RemoteAddr().(*net.TCPAddr); ok {
		return holder{source: a.IP.String()}
	}
	u, ok := nc.(*net.UnixConn)
	if !ok {
		return h
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return h
	}
	_ = raw.Control(func(fd uintptr) { // an error leaves the source empty
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			h = holder{fmt.Sprintf("user %d", cred.Uid), cred.Pid}
		}
	})
	return h
}

// serve serves a client in the transmission phase, and returns when the client is gone.
func (s *Server) serve(x *peer, n *negotiation, o offer) error {
	if secure, ok := n.conn.(*tls.Conn); ok {
		return s.serveTLS(x, secure, o)
	}
	fd, err := takeFile(n.conn)
	if err != nil {
		return err
	}
	return s.transmit(x, fd, o, stallTicks)
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

// printable makes text of a peer safe for terminals and logs. It escapes everything
// except printable ASCII, and cuts off long text.
func printable(s string) string {
	const longest = 500
	if len(s) > longest {
		s = s[:longest] + "..."
	}
	q := strconv.QuoteToASCII(s)
	return q[1 : len(q)-1]
}
