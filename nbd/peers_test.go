package nbd

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/block"
)

// connectFrom connects to the server's TCP socket from an address of this host.
func connectFrom(t testing.TB, l net.Listener, from string) *client {
	t.Helper()
	c := dialFrom(t, l, from)
	c.hello()
	c.option(optGo, infoData(""))
	if a := c.answers(optGo); a[len(a)-1].rep != repAck {
		t.Fatalf("a client of %s: %+v", from, a)
	}
	return c
}

func dialFrom(t testing.TB, l net.Listener, from string) *client {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience}
	nc, err := d.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return &client{t, nc}
}

// listenTCP adds a TCP socket to a server, which Stop closes.
func listenTCP(t testing.TB, s *Server) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = s.Serve(l) }()
	return l
}

// pass lets time pass for the clients that the server serves, by the server's own clock.
func (s *Server) pass(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.peers.looked = s.peers.looked.Add(-d)
	for x := range s.peers.served {
		x.quiet = x.quiet.Add(-d)
	}
}

// TestIdleClients checks that others can connect although clients of two sources have
// taken all places and send no requests. Clients that work keep their places, however
// many they are.
func TestIdleClients(t *testing.T) {
	const places = 128
	s, _ := newServer(t, Config{Exports: twoExports(t), MaxConns: places})
	l := listenTCP(t, s)
	var working []*client
	for range 16 { // as many as nbdcopy opens
		c := connectFrom(t, l, "127.0.0.10")
		exchangeSmall(t, c)
		working = append(working, c)
	}
	for range 3 * places / 4 {
		connectFrom(t, l, "127.0.0.11")
	}
	for len(s.connected()) < places {
		connectFrom(t, l, "127.0.0.12")
	}
	for range 16 {
		c := connectFrom(t, l, "127.0.0.13")
		exchangeSmall(t, c)
		working = append(working, c)
	}
	for _, c := range working {
		exchangeSmall(t, c)
	}
	if n := len(s.connected()); n > places {
		t.Errorf("%d clients are served", n)
	}
}

// connected returns the sources of the served clients.
func (s *Server) connected() (sources []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for x := range s.peers.served {
		sources = append(sources, x.holder.source)
	}
	return sources
}

// TestIdleOfOneSource checks that a client can connect although others of its user have
// all places of that user, and have sent no request for a while.
func TestIdleOfOneSource(t *testing.T) {
	s, path := newServer(t, Config{Exports: twoExports(t), MaxConns: 16})
	used := connect(t, path, "", false)
	exchangeSmall(t, used)
	first := connect(t, path, "", false)
	awaitService(t, s, 2) // the time of the first one counts from here
	for range 10 {
		connect(t, path, "", false)
	}
	awaitService(t, s, 12)
	late := dial(t, path)
	late.hello()
	late.option(optGo, infoData("first"))
	if a := late.answers(optGo); a[0].rep != repErrPolicy {
		t.Errorf("others must give way at once: %+v", a)
	}
	s.pass(unusedTime)
	late.option(optGo, infoData("first"))
	if a := late.answers(optGo); a[len(a)-1].rep != repAck {
		t.Errorf("refused after a while: %+v", a)
	}
	exchangeSmall(t, late)
	first.closed() // it has been there longest
	exchangeSmall(t, used)
}

// TestLargeHolder checks that connections of the largest holder that have been idle for
// long give way, and not those that are in use, nor those of smaller holders.
func TestLargeHolder(t *testing.T) {
	g := newGate(t, block.Geometry{})
	s, _ := newServer(t, Config{Exports: []Export{{Device: g}}, Loops: g.loops, MaxConns: 64})
	t.Cleanup(g.open)
	l := listenTCP(t, s)
	small := connectFrom(t, l, "127.0.0.10")
	exchangeSmall(t, small)
	var large []*client
	for range 48 {
		c := connectFrom(t, l, "127.0.0.11")
		exchangeSmall(t, c)
		large = append(large, c)
	}
	for i := range 15 {
		exchangeSmall(t, connectFrom(t, l, fmt.Sprintf("127.0.0.%d", 20+i)))
	}
	refused := func(why string) {
		t.Helper()
		c := dialFrom(t, l, "127.0.0.12")
		c.hello()
		c.option(optGo, infoData(""))
		if a := c.answers(optGo); a[0] != (answer{repErrPolicy, "64 clients are served already"}) {
			t.Errorf("%s: %+v", why, a)
		}
	}
	refused("all were in use a moment ago")
	s.pass(idleTime / 2)
	g.shut.Store(true)
	large[0].ask(request{kind: cmdRead, length: 4096}, nil) // at work, for as long as it takes
	await(t, "the request", func() bool { return g.inside.Load() > 0 })
	for _, c := range large[2:] {
		c.ask(request{kind: 99}, nil) // refused at once, but a request
		c.simple(0)
	}
	refused("no idle time is over")
	s.pass(idleTime - idleTime/2)
	c := connectFrom(t, l, "127.0.0.12")
	large[1].closed()
	g.open()
	exchangeSmall(t, c)
	exchangeSmall(t, small)
	if e := large[0].simple(0); e != 0 {
		t.Errorf("error %d", e)
	}
	large[0].read(4096)
	exchangeSmall(t, large[2])
}

// TestSilentTLS checks that a client can negotiate while one source has many negotiations
// within TLS that make no progress, and begins more.
func TestSilentTLS(t *testing.T) {
	server, peer := testTLS(t)
	s, _ := newServer(t, Config{Exports: twoExports(t), TLS: server, RequireTLS: true, MaxHandshakes: 4})
	l := listenTCP(t, s)
	startTLS := func(c *client) {
		c.send(be(uint32(3)))
		c.option(optStartTLS, nil)
		c.answers(optStartTLS)
		c.Conn = tls.Client(c.Conn, peer)
	}
	for range 4 {
		c := dialFrom(t, l, "127.0.0.11")
		c.read(18)
		startTLS(c)
		c.option(optInfo, infoData("first"))
		c.answers(optInfo)
	}
	c := dialFrom(t, l, "127.0.0.12")
	c.read(18)
	for range 2 {
		dialFrom(t, l, "127.0.0.11").read(18)
	}
	startTLS(c)
	c.option(optGo, infoData("first"))
	if a := c.answers(optGo); a[len(a)-1].rep != repAck {
		t.Fatalf("%+v", a)
	}
	exchangeSmall(t, c)
}

// TestRefusalsAreLogged checks that the log says which clients were not served, and why.
func TestRefusalsAreLogged(t *testing.T) {
	server, peer := testTLS(t)
	rec := &recorder{}
	_, path := newServer(t, Config{Exports: twoExports(t), TLS: server, RequireTLS: true, MaxConns: 1, Log: slog.New(rec)})
	logged := func(reason string) {
		t.Helper()
		await(t, reason, func() bool {
			rec.mu.Lock()
			defer rec.mu.Unlock()
			for i, text := range rec.text {
				if text == "NBD client turned away" && strings.Contains(strings.Join(rec.text[i:min(len(rec.text), i+3)], " "), reason) {
					return true
				}
			}
			return false
		})
	}
	c := dial(t, path)
	c.hello()
	c.option(optStartTLS, nil)
	c.answers(optStartTLS)
	_ = tls.Client(c.Conn, &tls.Config{ServerName: "nobody", MinVersion: tls.VersionTLS13}).Handshake()
	_ = c.Close()
	logged("TLS handshake")
	c = dial(t, path)
	c.hello()
	c.option(optGo, infoData("first"))
	c.answers(optGo)
	c.option(optAbort, nil)
	logged("this server requires TLS")
	c = dial(t, path)
	c.read(18)
	c.send(be(uint32(99)))
	logged("client flags 0x63 are unknown")
	c = dial(t, path)
	c.hello()
	c.send([]byte("not an option..."))
	logged("wrong magic number")
	for i := range 2 {
		c = secure(t, path, peer)
		c.option(optGo, infoData("first"))
		c.answers(optGo)
		if i == 0 {
			exchangeSmall(t, c)
			continue
		}
		_ = c.Close()
	}
	logged("served already")
}
