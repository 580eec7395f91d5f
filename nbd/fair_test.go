package nbd

import (
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
)

// hogs are clients that take as much as they can and never return it. The first kind
// requests more replies than it may have, and reads none. The second kind announces a
// large write, and sends a part of it.
func hogs(t testing.TB, path string, n int) (readers, writers []*client) {
	t.Helper()
	for range n {
		c := connect(t, path, "", false)
		var b []byte
		for range 200 {
			b = append(b, requestBytes(request{magic: magicRequest, kind: cmdRead, length: 1 << 20})...)
		}
		c.send(b)
		readers = append(readers, c)
		c = connect(t, path, "", false)
		c.send(requestBytes(request{magic: magicRequest, kind: cmdWrite, length: 4 << 20}), make([]byte, 1000))
		writers = append(writers, c)
	}
	return readers, writers
}

// exchange does the work of an honest client.
func exchange(t testing.TB, c *client, structured bool) {
	t.Helper()
	data := randomBytes(1 << 20)
	c.write(1<<20, data)
	if got := c.load(request{offset: 1 << 20, length: 1 << 20}, structured); !slices.Equal(got, data) {
		t.Error("other data")
	}
	c.do(request{kind: cmdFlush}, nil)
	c.do(request{kind: cmdZeroes, offset: 4 << 20, length: 1 << 20}, nil)
	c.write(5<<20+100, data[:1000])
}

// TestHogs checks that others are served while clients keep what they have for as long as
// possible.
func TestHogs(t *testing.T) {
	for _, depth := range []int{16, 128} {
		s, path := newServer(t, Config{
			Exports: []Export{{Device: newRAM(t, block.Geometry{LogicalBlock: 4096})}},
			Depth:   depth, MaxIO: 64 << 10, Loops: newLoops(t, 1), StallTimeout: time.Hour,
		})
		early := connect(t, path, "", false)
		hogs(t, path, 2)
		for _, structured := range []bool{false, true} {
			exchange(t, connect(t, path, "", structured), structured)
		}
		exchange(t, early, false)
		if n := s.Connections()[0]; n != 7 {
			t.Errorf("%d connections", n)
		}
	}
}

// TestPatientReads checks that reads of clients that are never disconnected, such as the
// kernel, wait for each other and are not streamed, so that the one that fails gets its
// error.
func TestPatientReads(t *testing.T) {
	g := &gate{Device: &badBlock{Device: newRAM(t, block.Geometry{}), sector: 1000}, loops: newLoops(t, 1)}
	g.shut.Store(true)
	s, _ := newServer(t, Config{Exports: []Export{{Device: g}}, Depth: 16, MaxIO: 64 << 10, Loops: g.loops})
	t.Cleanup(g.open)
	var clients []*client
	for i := range 2 {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		gone := make(chan error, 1)
		go func() { gone <- s.transmit(nil, fds[0], s.find("").offer(false), 0) }()
		file := os.NewFile(uintptr(fds[1]), "client")
		nc, err := net.FileConn(file)
		_ = file.Close()
		if err != nil {
			t.Fatal(err)
		}
		if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = nc.Close()
			if err := <-gone; err != nil {
				t.Error(err)
			}
		})
		c := &client{t, nc}
		clients = append(clients, c)
		c.ask(request{kind: cmdRead, offset: uint64(1-i) << 20, length: 12 * 64 << 10}, nil)
		await(t, "the client's turn", func() (handled bool) {
			_ = g.loops[0].Call(func() { handled = g.inside.Load() == 12 && (i == 0 || s.exports[0].shards[0].waiting.head != nil) })
			return handled
		})
	}
	g.open()
	for i, want := range []code{0, codeIO} {
		if e := clients[i].simple(0); e != want {
			t.Errorf("client %d: error %d", i, e)
		}
	}
	clients[0].read(12 * 64 << 10)
	clients[1].do(request{kind: cmdFlush}, nil)
}

// TestManyHogs checks that the server does not wait for the whole StallTimeout if no tag
// is left.
func TestManyHogs(t *testing.T) {
	const stall = 8 * time.Second
	_, path := newServer(t, Config{Exports: []Export{{Device: newRAM(t, block.Geometry{})}}, Depth: 16, MaxIO: 64 << 10, Loops: newLoops(t, 1), StallTimeout: stall})
	start := time.Now()
	hogs(t, path, 8)
	exchange(t, connect(t, path, "", false), false)
	if d := time.Since(start); d > stall*3/4 {
		t.Errorf("%v of a time-out of %v", d, stall)
	}
}

// TestStall checks that clients that stall are disconnected, and no others.
func TestStall(t *testing.T) {
	s, path := newServer(t, Config{
		Exports: []Export{{Device: newRAM(t, block.Geometry{})}}, Depth: 32, MaxIO: 64 << 10, Loops: newLoops(t, 1), StallTimeout: 2 * time.Second,
	})
	idle, half := connect(t, path, "", false), connect(t, path, "", false)
	half.send(requestBytes(request{magic: magicRequest, kind: cmdFlush})[:10])
	slow := connect(t, path, "", false)
	slow.ask(request{kind: cmdRead, length: 16 << 20}, nil)
	slowly := make(chan error, 1)
	go func() { // 128 KiB in an eighth of the time, and for longer than that
		var err error
		buf := make([]byte, 128<<10)
		for range 12 {
			time.Sleep(250 * time.Millisecond)
			if _, err = io.ReadFull(slow, buf); err != nil {
				break
			}
		}
		slowly <- err
	}()
	readers, writers := hogs(t, path, 3)
	for _, c := range writers {
		c.closed()
	}
	if err := <-slowly; err != nil {
		t.Errorf("a slow client: %v", err)
	}
	_ = slow.Close()
	// Nothing may be read before all of them are gone, because that would let a
	// client stay.
	await(t, "the end of those that do not read", func() bool { return s.Users("") == 2 })
	for _, c := range readers {
		_, _ = io.Copy(io.Discard, c) // it ends
	}
	half.send(requestBytes(request{magic: magicRequest, kind: cmdFlush})[10:])
	for _, c := range []*client{idle, half} {
		if c == idle {
			c.ask(request{kind: cmdFlush}, nil)
		}
		if e := c.simple(0); e != 0 {
			t.Errorf("error %d", e)
		}
	}
}

// TestStallTLS checks that a client that reads nothing through TLS is also disconnected,
// and that everything that serves it ends.
func TestStallTLS(t *testing.T) {
	server, peer := testTLS(t)
	s, path := newServer(t, Config{Exports: twoExports(t), TLS: server, StallTimeout: 200 * time.Millisecond})
	c := secure(t, path, peer)
	c.option(optGo, infoData(""))
	c.answers(optGo)
	for range 100 {
		c.ask(request{kind: cmdRead, length: 1 << 20}, nil)
	}
	await(t, "the end of the client", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.peers.served) == 0
	})
}

// TestStopTLS checks that a TLS client gets the reply to a request that is in flight when
// the server is stopped.
func TestStopTLS(t *testing.T) {
	server, peer := testTLS(t)
	g := newGate(t, block.Geometry{})
	g.shut.Store(true)
	s, path := newServer(t, Config{Exports: []Export{{Device: g}}, Loops: g.loops, TLS: server})
	c := secure(t, path, peer)
	c.option(optGo, infoData(""))
	c.answers(optGo)
	c.ask(request{kind: cmdRead, length: 1 << 20}, nil)
	await(t, "the request", func() bool { return g.inside.Load() > 0 })
	stopped := make(chan error)
	go func() { stopped <- s.Stop(testContext(t), true) }()
	<-s.stopped
	g.open()
	if e := c.simple(0); e != 0 {
		t.Errorf("error %d", e)
	}
	c.read(1 << 20)
	c.closed()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// secure begins a negotiation within TLS.
func secure(t testing.TB, path string, peer *tls.Config) *client {
	t.Helper()
	c := dial(t, path)
	c.hello()
	c.option(optStartTLS, nil)
	if a := c.answers(optStartTLS); a[0].rep != repAck {
		t.Fatalf("%+v", a)
	}
	c.Conn = tls.Client(c.Conn, peer)
	return c
}

// TestStrangers checks that clients can connect while a thousand others are silent.
func TestStrangers(t *testing.T) {
	server, peer := testTLS(t)
	s, path := newServer(t, Config{Exports: twoExports(t), TLS: server, RequireTLS: true, MaxHandshakes: 20})
	for range 1000 {
		nc, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
	}
	first := secure(t, path, peer)
	first.option(optInfo, infoData("first")) // it is within TLS, and takes its time
	first.answers(optInfo)
	for range 100 {
		nc, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
	}
	for _, c := range []*client{first, secure(t, path, peer)} {
		c.option(optGo, infoData("first"))
		if a := c.answers(optGo); a[len(a)-1].rep != repAck {
			t.Fatalf("%+v", a)
		}
		exchangeSmall(t, c)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.peers.negotiating); n > 20 {
		t.Errorf("%d clients negotiate", n)
	}
}

func exchangeSmall(t testing.TB, c *client) {
	t.Helper()
	c.write(512, randomBytes(4096))
	c.do(request{kind: cmdFlush}, nil)
}

// TestFlood checks that a client can connect while another one connects again and again
// as fast as it can.
func TestFlood(t *testing.T) {
	server, peer := testTLS(t)
	s, _ := newServer(t, Config{Exports: twoExports(t), TLS: server, RequireTLS: true, MaxHandshakes: 64})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = s.Serve(l) }() // Stop ends it
	stop := make(chan struct{})
	var attack sync.WaitGroup
	for range 4 {
		attack.Go(func() {
			var held []net.Conn
			for {
				select {
				case <-stop:
					for _, nc := range held {
						_ = nc.Close()
					}
					return
				default:
				}
				nc, err := net.Dial("tcp", l.Addr().String())
				if err != nil {
					continue
				}
				if held = append(held, nc); len(held) > 200 {
					_ = held[0].Close()
					held = held[1:]
				}
			}
		})
	}
	for range 5 {
		// Another address is another source.
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}, Timeout: patience}
		nc, err := d.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		c := &client{t, nc}
		c.hello()
		c.option(optStartTLS, nil)
		c.answers(optStartTLS)
		c.Conn = tls.Client(nc, peer)
		c.option(optGo, infoData("first"))
		if a := c.answers(optGo); a[len(a)-1].rep != repAck {
			t.Fatalf("%+v", a)
		}
		exchangeSmall(t, c)
	}
	close(stop)
	attack.Wait()
}

// TestSources checks that places are kept for other sources.
func TestSources(t *testing.T) {
	server, peer := testTLS(t)
	a := newAuthority(t, "ECDSA")
	server.ClientAuth, server.ClientCAs = tls.VerifyClientCertIfGiven, a.pool()
	_, path := newServer(t, Config{Exports: twoExports(t), TLS: server, MaxConns: 8})
	for range 6 {
		exchangeSmall(t, connect(t, path, "", false))
	}
	c := dial(t, path)
	c.hello()
	c.option(optGo, infoData("first"))
	if got := c.answers(optGo); got[0].rep != repErrPolicy {
		t.Errorf("a client too many of one source: %+v", got)
	}
	peer.Certificates = []tls.Certificate{a.pair("client")}
	for range 2 {
		c := secure(t, path, peer)
		c.option(optGo, infoData("first"))
		if got := c.answers(optGo); got[len(got)-1].rep != repAck {
			t.Errorf("a client of another source: %+v", got)
		}
		exchangeSmall(t, c)
	}
	c = secure(t, path, peer)
	c.option(optGo, infoData("first"))
	if got := c.answers(optGo); got[0] != (answer{repErrPolicy, "8 clients are served already"}) {
		t.Errorf("a client too many: %+v", got)
	}
}

// TestMaxConns refuses one client too many, before and after it has chosen an export.
func TestMaxConns(t *testing.T) {
	_, path := newServer(t, Config{Exports: twoExports(t), MaxConns: 3})
	late := dial(t, path)
	late.hello()
	old := dial(t, path)
	old.read(18)
	for range 3 {
		exchangeSmall(t, connect(t, path, "", false))
	}
	late.option(optGo, infoData("first"))
	if a := late.answers(optGo); a[0].rep != repErrPolicy || !strings.HasPrefix(a[0].data, "3 clients of user ") {
		t.Errorf("%+v", a)
	}
	late.option(optInfo, infoData("first")) // it may go on asking
	late.answers(optInfo)
	old.send(be(uint32(3)))
	old.option(optExportName, []byte("first"))
	old.closed()
}

// TestManyOptions checks that a client may send any number of options within its time.
func TestManyOptions(t *testing.T) {
	var exports []Export
	dev := newNull(t, block.Geometry{})
	for i := range 300 {
		exports = append(exports, Export{Name: strings.Repeat("x", i+1), Device: dev})
	}
	_, path := newServer(t, Config{Exports: exports, Depth: 16, MaxIO: 4096, Loops: newLoops(t, 1)})
	c := dial(t, path)
	c.hello()
	for range 4 {
		for _, e := range exports {
			c.option(optInfo, infoData(e.Name))
			if a := c.answers(optInfo); a[len(a)-1].rep != repAck {
				t.Fatalf("%+v", a)
			}
		}
	}
	// A request for all kinds of information is not too long, either.
	all := make([]infoType, 1<<16-1)
	c.option(optInfo, infoData("x", all...))
	if a := c.answers(optInfo); a[len(a)-1].rep != repAck {
		t.Errorf("%+v", a)
	}
	if out := run(t, "nbdinfo", "--list", "nbd+unix:///?socket="+path); strings.Count(out, "export-size:") != len(exports) {
		t.Errorf("nbdinfo lists %d", strings.Count(out, "export-size:"))
	}
	c.option(optGo, infoData("x"))
	c.answers(optGo)
	c.do(request{kind: cmdFlush}, nil)
}

// TestUnreadFlood checks that the server continues although a client sends requests
// without end and reads nothing.
func TestUnreadFlood(t *testing.T) {
	_, path := newServer(t, Config{Exports: []Export{{Device: newRAM(t, block.Geometry{})}}, Loops: newLoops(t, 1), StallTimeout: time.Hour})
	for _, r := range []request{{kind: cmdFlush}, {kind: 99}, {kind: cmdTrim, length: 1 << 20}, {kind: cmdWrite, offset: 1 << 60}} {
		c := connect(t, path, "", false)
		r.magic = magicRequest
		flood := slices.Repeat(requestBytes(r), 1000)
		if err := c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		for { // until nothing more goes into the socket
			if _, err := c.Write(flood); err != nil {
				break
			}
		}
		exchange(t, connect(t, path, "", false), false)
	}
}

// TestSlowConsumerOrder reads the replies to many requests late, and finds all of them.
func TestSlowConsumerOrder(t *testing.T) {
	_, path := newServer(t, Config{Exports: []Export{{Device: newRAM(t, block.Geometry{})}}, Depth: 16, MaxIO: 16 << 10, Loops: newLoops(t, 1)})
	c := connect(t, path, "", false)
	want := map[uint64]uint32{}
	var b []byte
	for i := range uint64(300) {
		r := request{magic: magicRequest, kind: cmdRead, cookie: i, length: uint32(512 * (1 + i*37%900))}
		want[i] = r.length
		b = append(b, requestBytes(r)...)
	}
	c.send(b)
	for len(want) > 0 {
		h := c.read(simpleSize)
		cookie := binary.BigEndian.Uint64(h[8:])
		length, ok := want[cookie]
		if !ok || binary.BigEndian.Uint32(h[4:]) != 0 {
			t.Fatalf("reply %x", h)
		}
		delete(want, cookie)
		c.read(int(length))
	}
}
