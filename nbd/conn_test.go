package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/null"
	"ublk-nvmeof/poller"
)

// testDepth and testMaxIO configure the server of TestRequests. testMost is the size of
// the largest read that is not streamed there, and testSize the size of its exports.
const (
	testDepth, testMaxIO = 16, 16 << 10
	testMost             = testDepth * 3 / 4 * testMaxIO
	testSize             = 1 << 20
)

// inOneChunk is 0 if the client accepts structured replies, and otherwise codeInval.
const inOneChunk = ^code(0)

// requests holds all kinds of requests, right and wrong. rw has blocks of 1024 bytes,
// aware is a client of rw that knows the block size, ro is read-only, and plain has no
// trim and write zeroes.
var requests = []struct {
	name   string
	client string
	r      request
	want   code
}{
	{"write", "rw", request{kind: cmdWrite, offset: 1024, length: 2048}, 0},
	{"write of the largest size", "rw", request{kind: cmdWrite, offset: 3072, length: testMost}, 0},
	{"write to the end", "rw", request{kind: cmdWrite, offset: testSize - 1024, length: 1024}, 0},
	{"FUA", "rw", request{kind: cmdWrite, flags: cmdFlagFUA, length: 1024}, 0},
	{"write beyond the end", "rw", request{kind: cmdWrite, offset: testSize - 1024, length: 2048}, codeNoSpace},
	{"write far beyond", "rw", request{kind: cmdWrite, offset: ^uint64(0) - 1023, length: 1024}, codeNoSpace},
	{"write of more than all buffers", "rw", request{kind: cmdWrite, length: testDepth*testMaxIO + 1024}, 0},
	{"write not aligned", "rw", request{kind: cmdWrite, offset: 512, length: 1024}, 0},
	{"write of half a block", "rw", request{kind: cmdWrite, length: 512}, 0},
	{"write not aligned, though the client knows the block size", "aware", request{kind: cmdWrite, offset: 512, length: 1024}, codeInval},
	{"write of nothing", "rw", request{kind: cmdWrite}, codeInval},
	{"write with unknown flag", "rw", request{kind: cmdWrite, flags: 1 << 9, length: 1024}, codeInval},
	{"write to read-only", "ro", request{kind: cmdWrite, length: 1024}, codePerm},
	{"read", "rw", request{kind: cmdRead, length: 4096}, 0},
	{"read of the largest size", "rw", request{kind: cmdRead, offset: testSize - testMost, length: testMost}, 0},
	{"read of read-only", "ro", request{kind: cmdRead, offset: 512, length: 512}, 0},
	{"read beyond the end", "rw", request{kind: cmdRead, offset: testSize, length: 1024}, codeInval},
	{"read over the end of the address space", "rw", request{kind: cmdRead, offset: ^uint64(0) - 1023, length: 2048}, codeInval},
	{"read of more than all buffers", "rw", request{kind: cmdRead, length: testDepth*testMaxIO + 1024}, 0},
	{"read of 4 GiB", "rw", request{kind: cmdRead, length: ^uint32(1023)}, codeInval},
	{"read not aligned", "rw", request{kind: cmdRead, offset: 1, length: 1024}, 0},
	{"read not aligned, though the client knows the block size", "aware", request{kind: cmdRead, offset: 1, length: 1024}, codeInval},
	{"read in one chunk", "rw", request{kind: cmdRead, flags: cmdFlagDF, length: 1024}, inOneChunk},
	{"flush", "rw", request{kind: cmdFlush}, 0},
	{"flush of read-only", "ro", request{kind: cmdFlush}, 0},
	{"flush of a range", "rw", request{kind: cmdFlush, length: 1024}, codeInval},
	{"trim", "rw", request{kind: cmdTrim, offset: 4096, length: 64 << 10}, 0},
	{"trim with FUA", "rw", request{kind: cmdTrim, flags: cmdFlagFUA, length: 1024}, 0},
	{"trim beyond the end", "rw", request{kind: cmdTrim, offset: testSize, length: 1024}, codeInval},
	{"trim of read-only", "ro", request{kind: cmdTrim, length: 1024}, codePerm},
	{"trim that is not offered", "plain", request{kind: cmdTrim, length: 1024}, codeInval},
	{"zeroes", "rw", request{kind: cmdZeroes, flags: cmdFlagNoHole | cmdFlagFUA, length: testSize}, 0},
	{"zeroes beyond the end", "rw", request{kind: cmdZeroes, offset: 1024, length: testSize}, codeNoSpace},
	{"zeroes that are not offered", "plain", request{kind: cmdZeroes, length: 1024}, codeInval},
	{"fast zeroes", "rw", request{kind: cmdZeroes, flags: 1 << 4, length: 1024}, codeInval},
	{"cache", "rw", request{kind: 5, length: 1024}, codeInval},
	{"block status", "rw", request{kind: 7, length: 1024}, codeInval},
	{"unknown kind", "rw", request{kind: 1000, length: 1024}, codeInval},
}

// TestRequests sends all requests, right and wrong, on one connection after the other. No
// request may end a connection.
func TestRequests(t *testing.T) {
	s, path := newServer(t, Config{
		Depth: testDepth, MaxIO: testMaxIO,
		Exports: []Export{
			{Name: "rw", Device: newRAM(t, block.Geometry{Sectors: 2048, LogicalBlock: 1024, VolatileCache: true, MaxDiscardSectors: 10, MaxZeroesSectors: 10})},
			{Name: "ro", Device: newRAM(t, block.Geometry{Sectors: 2048}), ReadOnly: true},
			{Name: "plain", Device: must(null.New(null.Config{Geometry: block.Geometry{Sectors: 2048}}))},
		},
	})
	for _, structured := range []bool{false, true} {
		clients := map[string]*client{"aware": connect(t, path, "rw", structured, infoBlockSize)}
		for _, name := range []string{"rw", "ro", "plain"} {
			clients[name] = connect(t, path, name, structured)
		}
		for i, tt := range requests {
			tt.r.cookie = uint64(i) << 40
			if tt.want == inOneChunk && structured {
				tt.want = 0
			} else if tt.want == inOneChunk {
				tt.want = codeInval
			}
			if got := clients[tt.client].answer(tt.r, structured); got != tt.want {
				t.Errorf("%s: error %d, want %d", tt.name, got, tt.want)
			}
		}
		for _, c := range clients {
			c.ask(request{kind: cmdDisc}, nil)
			c.closed()
		}
	}
	want := block.Stats{Reads: 18, Writes: 24, Flushes: 4, Discards: 6, WriteZeroes: 6}
	got := s.Snapshot("rw")
	if got.Reads != want.Reads || got.Writes != want.Writes || got.Flushes != want.Flushes || got.Discards != want.Discards || got.WriteZeroes != want.WriteZeroes {
		t.Errorf("counted %+v, want %+v", got, want)
	}
}

// answer sends a request, with zeroes to write, and reads the whole reply.
func (c *client) answer(r request, structured bool) code {
	c.t.Helper()
	var data []byte
	if r.kind == cmdWrite {
		data = make([]byte, r.length)
	}
	c.ask(r, data)
	if structured && r.kind == cmdRead {
		data, e := c.chunks(r)
		if e == 0 && len(data) != int(r.length) {
			c.t.Errorf("%d bytes, want %d", len(data), r.length)
		}
		return e
	}
	e := c.simple(r.cookie)
	if e == 0 && r.kind == cmdRead {
		c.read(int(r.length))
	}
	return e
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestBadRequest checks the requests that end a connection.
func TestBadRequest(t *testing.T) {
	_, path := newServer(t, Config{Exports: twoExports(t)})
	t.Run("magic", func(t *testing.T) {
		c := connect(t, path, "", false)
		c.ask(request{magic: 1}, nil)
		c.closed()
	})
	t.Run("write of 4 GiB", func(t *testing.T) {
		c := connect(t, path, "", false)
		c.ask(request{kind: cmdWrite, cookie: 7, length: ^uint32(0)}, nil)
		if e := c.simple(7); e != codeNoSpace && e != codeInval {
			t.Errorf("error %d", e)
		}
		c.closed()
	})
}

// TestData makes several connections write and read all over a device at the same time,
// in requests and pieces of all sizes.
func TestData(t *testing.T) {
	for name, g := range map[string]block.Geometry{
		"plain":  {Sectors: 16384},
		"blocks": {Sectors: 16384, LogicalBlock: 4096, VolatileCache: true},
		"chunks": {Sectors: 16384, ChunkSectors: 24},
	} {
		t.Run(name, func(t *testing.T) {
			_, path := newServer(t, Config{Depth: 16, MaxIO: 8 << 10, Exports: []Export{{Device: newRAM(t, g)}}})
			done := make(chan struct{})
			const clients = 4
			for i := range clients {
				go func() {
					defer func() { done <- struct{}{} }()
					scribble(connect(t, path, "", i%2 == 0), uint64(i), uint64(i)*(8<<20/clients), 8<<20/clients, max(512, int(g.LogicalBlock)))
				}()
			}
			for range clients {
				<-done
			}
		})
	}
}

// scribble writes and reads a part of the device, several requests at a time.
func scribble(c *client, seed, from, size uint64, unit int) {
	r := rand.New(rand.NewPCG(seed, 0))
	content := make([]byte, size)
	structured := seed%2 == 0
	for range 60 {
		for range 1 + r.IntN(8) {
			length := unit * (1 + r.IntN(24<<10/unit))
			at := r.IntN((len(content)-length)/unit) * unit
			data := content[at : at+length]
			for i := range data {
				data[i] = byte(r.Uint32())
			}
			out := append(requestBytes(request{magic: magicRequest, kind: cmdWrite, cookie: 9, offset: from + uint64(at), length: uint32(length)}), data...)
			for len(out) > 0 {
				k := 1 + r.IntN(len(out))
				c.send(out[:k])
				out = out[k:]
			}
			if e := c.simple(9); e != 0 {
				c.t.Errorf("write: error %d", e)
			}
		}
		// Reads may overlap, so all are sent at once.
		type span struct{ at, length, left int }
		spans := map[uint64]span{}
		var reads []byte
		for i := range uint64(1 + r.IntN(20)) {
			length := unit * (1 + r.IntN(24<<10/unit))
			s := span{r.IntN((len(content)-length)/unit) * unit, length, length}
			spans[i] = s
			reads = append(reads, requestBytes(request{magic: magicRequest, kind: cmdRead, cookie: i, offset: from + uint64(s.at), length: uint32(s.length)})...)
		}
		c.send(reads)
		for len(spans) > 0 {
			b := c.read(simpleSize)
			cookie := binary.BigEndian.Uint64(b[8:])
			s, ok := spans[cookie]
			if !ok {
				c.t.Errorf("reply to %d", cookie)
				return
			}
			at, length := s.at, s.length
			if structured {
				b = append(b, c.read(dataHeader-simpleSize)...)
				at, length = int(binary.BigEndian.Uint64(b[structuredSize:])-from), int(binary.BigEndian.Uint32(b[16:])-8)
			}
			if s.left -= length; s.left == 0 != (!structured || b[5]&chunkDone != 0) {
				c.t.Errorf("%d bytes are left of reply %x", s.left, b)
			}
			if spans[cookie] = s; s.left == 0 {
				delete(spans, cookie)
			}
			if !bytes.Equal(c.read(length), content[at:at+length]) {
				c.t.Errorf("other data at %d", at)
				return
			}
		}
	}
}

// gate is a device that holds its requests while it is shut.
type gate struct {
	block.Device
	shut   atomic.Bool
	inside atomic.Int32
	errno  atomic.Uint32 // of the results
	loops  []*poller.Loop
}

func (g *gate) OpenQueue(i int, cfg block.QueueConfig) (block.Queue, error) {
	q, err := g.Device.OpenQueue(i, cfg)
	return &gatedQueue{q, g}, err
}

func (g *gate) open() {
	g.shut.Store(false)
	for _, l := range g.loops {
		l.Wake()
	}
}

type gatedQueue struct {
	block.Queue
	gate *gate
}

func (q *gatedQueue) Submit(reqs []block.Request) {
	q.gate.inside.Add(int32(len(reqs)))
	q.Queue.Submit(reqs)
}

func (q *gatedQueue) Reap(done []block.Result) int {
	if q.gate.shut.Load() {
		return 0
	}
	n := q.Queue.Reap(done)
	q.gate.inside.Add(-int32(n))
	for i := range done[:n] {
		done[i].Errno |= uint16(q.gate.errno.Load())
	}
	return n
}

func newGate(t testing.TB, g block.Geometry) *gate {
	return &gate{Device: newRAM(t, g), loops: newLoops(t, 2)}
}

// await waits for a condition that another thread makes true.
func await(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); {
		if time.Now().After(end) {
			t.Fatalf("%s does not come about", what)
		}
		time.Sleep(time.Millisecond) // there is no event
	}
}

// TestDisconnectMidRequest disconnects clients at every stage of a request. The server's
// own clean-up checks that no tag is lost.
func TestDisconnectMidRequest(t *testing.T) {
	g := newGate(t, block.Geometry{})
	s, path := newServer(t, Config{Exports: []Export{{Device: g}}, Loops: g.loops, Depth: 16})
	// A client has the answer to its negotiation before the server serves it.
	served := func(t *testing.T) *client {
		c := connect(t, path, "", false)
		await(t, "the client's service", func() bool { return slices.Max(s.Connections()) == 1 })
		return c
	}
	gone := func(t *testing.T) {
		await(t, "end of all connections", func() bool { return slices.Max(s.Connections()) == 0 })
	}
	write := request{magic: magicRequest, kind: cmdWrite, length: 600 << 10}
	for name, b := range map[string][]byte{
		"between requests": nil,
		"in a header":      requestBytes(write)[:20],
		"before the data":  requestBytes(write),
		"in the data":      append(requestBytes(write), make([]byte, 300<<10)...),
		"in refused data":  append(requestBytes(request{magic: magicRequest, kind: cmdWrite, offset: 1, length: 2048}), make([]byte, 1000)...),
	} {
		t.Run(name, func(t *testing.T) {
			c := served(t)
			c.send(b)
			_ = c.Close()
			gone(t)
		})
	}
	t.Run("in flight", func(t *testing.T) {
		g.shut.Store(true)
		defer g.open() // if it fails
		c := served(t)
		for range 8 {
			c.ask(request{kind: cmdRead, length: 4096}, nil)
		}
		await(t, "8 requests", func() bool { return g.inside.Load() == 8 })
		_ = c.Close()
		g.open()
		gone(t)
	})
	t.Run("in a reply", func(t *testing.T) {
		c := served(t)
		for range 100 {
			c.ask(request{kind: cmdRead, length: 1 << 20}, nil)
		}
		c.read(1 << 20)
		_ = c.Close()
		gone(t)
	})
	t.Run("a request to disconnect is answered last", func(t *testing.T) {
		g.shut.Store(true)
		defer g.open() // if it fails
		c := served(t)
		c.ask(request{kind: cmdRead, length: 512}, nil)
		c.ask(request{kind: cmdDisc}, nil)
		await(t, "the request", func() bool { return g.inside.Load() == 1 })
		g.open()
		if e := c.simple(0); e != 0 {
			t.Errorf("error %d", e)
		}
		c.read(512)
		c.closed()
		gone(t)
	})
}

// TestManyRequests sends more requests than there are tags, from several connections.
func TestManyRequests(t *testing.T) {
	g := newGate(t, block.Geometry{})
	g.shut.Store(true)
	loops := g.loops[:1]
	_, path := newServer(t, Config{Exports: []Export{{Device: g}}, Loops: loops, Depth: 16, MaxIO: 4096})
	var clients []*client
	const requests = 100
	for range 4 {
		c := connect(t, path, "", false)
		var b []byte
		for i := range uint64(requests) {
			b = append(b, requestBytes(request{magic: magicRequest, kind: cmdRead, cookie: i, length: uint32(4096 * (1 + i%8))})...)
		}
		c.send(b)
		clients = append(clients, c)
	}
	await(t, "as many requests as there are tags", func() bool { return g.inside.Load() >= 9 })
	g.open()
	var readers sync.WaitGroup
	for _, c := range clients {
		readers.Go(func() {
			for range requests {
				b := c.read(simpleSize)
				c.read(int(4096 * (1 + binary.BigEndian.Uint64(b[8:])%8)))
			}
		})
	}
	readers.Wait()
}

// TestErrors checks that errors of the back end are passed on with the numbers of the
// protocol.
func TestErrors(t *testing.T) {
	g := newGate(t, block.Geometry{VolatileCache: true})
	s, path := newServer(t, Config{Exports: []Export{{Device: g}}, Loops: g.loops, MaxIO: 4096})
	c := connect(t, path, "", true)
	errnos := map[unix.Errno]code{
		unix.EIO: codeIO, unix.ENOLINK: codeIO, unix.ENOSPC: codeNoSpace, unix.EROFS: codePerm, unix.EINVAL: codeInval,
		unix.EOPNOTSUPP: codeNotSupp, unix.ENOMEM: codeNoMem, unix.ESHUTDOWN: codeShutdown, unix.EAGAIN: codeIO,
	}
	for errno, want := range errnos {
		g.errno.Store(uint32(errno))
		for _, r := range []request{
			{kind: cmdWrite, length: 16384}, {kind: cmdFlush}, {kind: cmdTrim, length: 4096}, {kind: cmdZeroes, flags: cmdFlagFUA, length: 4096},
		} {
			c.ask(r, make([]byte, r.length)[:map[bool]uint32{true: r.length}[r.kind == cmdWrite]])
			if got := c.simple(0); got != want {
				t.Errorf("%v: request %d has error %d, want %d", errno, r.kind, got, want)
			}
		}
		c.ask(request{kind: cmdRead, length: 16384}, nil)
		if kind, data := c.chunk(0); kind != chunkError || code(binary.BigEndian.Uint32(data)) != want {
			t.Errorf("%v: chunk %d, %x", errno, kind, data)
		}
	}
	n := uint64(len(errnos))
	want := block.Failures{Reads: n, Writes: n, Flushes: n, Discards: n, WriteZeroes: n}
	await(t, "the counters", func() bool { return s.Snapshot("").Errors >= 5*n })
	if got := s.Snapshot(""); got.Failed != want || got.Errors != 5*n {
		t.Errorf("%d errors, of which %+v; want %d, %+v", got.Errors, got.Failed, 5*n, want)
	}
}

// TestStop ends servers that are busy.
func TestStop(t *testing.T) {
	t.Run("in use", func(t *testing.T) {
		s, path := newServer(t, Config{Exports: twoExports(t)})
		connect(t, path, "", false)
		dial(t, path).read(18)                                                                    // a client that has not chosen yet does not count
		await(t, "the client's service", func() bool { return slices.Max(s.Connections()) == 1 }) // it has the answer before
		if err := s.Stop(testContext(t), false); !errors.Is(err, ErrBusy) {
			t.Fatal(err)
		}
		connect(t, path, "", false)
		if err := s.Stop(testContext(t), true); err != nil {
			t.Error(err)
		}
		if err := s.Stop(testContext(t), false); err != nil {
			t.Errorf("again: %v", err)
		}
	})
	t.Run("in flight", func(t *testing.T) {
		g := newGate(t, block.Geometry{})
		g.shut.Store(true)
		s, path := newServer(t, Config{Exports: []Export{{Device: g}}, Loops: g.loops})
		c := connect(t, path, "", false)
		c.ask(request{kind: cmdRead, cookie: 3, length: 512}, nil)
		await(t, "the request", func() bool { return g.inside.Load() == 1 })
		stopped := make(chan error)
		go func() { stopped <- s.Stop(testContext(t), true) }()
		<-s.stopped
		g.open()
		if e := c.simple(3); e != 0 {
			t.Errorf("error %d", e)
		}
		c.read(512)
		c.closed()
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	})
	t.Run("stuck", func(t *testing.T) {
		g := newGate(t, block.Geometry{})
		g.shut.Store(true)
		s, path := newServer(t, Config{Exports: []Export{{Device: g}}, Loops: g.loops})
		c := connect(t, path, "", false)
		c.ask(request{kind: cmdRead, length: 512}, nil)
		await(t, "the request", func() bool { return g.inside.Load() == 1 })
		ctx, cancel := context.WithCancel(testContext(t))
		cancel()
		if err := s.Stop(ctx, true); err == nil {
			t.Error("stopped with a request at the back end")
		}
		g.open()
	})
	t.Run("unread replies", func(t *testing.T) {
		s, path := newServer(t, Config{Exports: twoExports(t)})
		c := connect(t, path, "", false)
		for range 100 {
			c.ask(request{kind: cmdRead, length: 1 << 20}, nil)
		}
		c.read(1)
		ctx, cancel := context.WithCancel(testContext(t))
		cancel()
		if err := s.Stop(ctx, true); err != nil {
			t.Error(err)
		}
		_, _ = io.Copy(io.Discard, c)
	})
}

// TestSpread checks that the loops share the connections.
func TestSpread(t *testing.T) {
	s, path := newServer(t, Config{Exports: twoExports(t)})
	for range 4 {
		connect(t, path, "", false)
	}
	await(t, "two connections on each loop", func() bool { return slices.Equal(s.Connections(), []int{2, 2}) })
}

// TestAddRemove changes the exports while clients are connected.
func TestAddRemove(t *testing.T) {
	s, path := newServer(t, Config{})
	c := dial(t, path)
	c.hello()
	c.option(optGo, infoData(""))
	if a := c.answers(optGo); a[0].rep != repErrUnknown {
		t.Errorf("without an export: %+v", a)
	}
	g := newGate(t, block.Geometry{})
	for _, e := range []Export{{Name: "a", Device: newRAM(t, block.Geometry{})}, {Name: "b", Device: newRAM(t, block.Geometry{})}} {
		if err := s.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Add(Export{Name: "b", Device: g}); err == nil {
		t.Error("added twice")
	}
	a, b := connect(t, path, "a", false), connect(t, path, "b", false)
	await(t, "two users", func() bool { return s.Users("a") == 1 && s.Users("b") == 1 })
	if err := s.Remove(testContext(t), "a", false); !errors.Is(err, ErrBusy) {
		t.Errorf("removed while in use: %v", err)
	}
	if err := s.Remove(testContext(t), "a", true); err != nil {
		t.Error(err)
	}
	a.closed()
	b.ask(request{kind: cmdFlush, cookie: 1}, nil)
	if e := b.simple(1); e != 0 {
		t.Errorf("flush of the other: %d", e)
	}
	c.option(optInfo, infoData("a"))
	if a := c.answers(optInfo); a[0].rep != repErrUnknown {
		t.Errorf("a removed export: %+v", a)
	}
	if err := s.Remove(testContext(t), "a", false); err != nil {
		t.Errorf("again: %v", err)
	}
}

// TestRemoveWhileConnecting removes an export while the same loop is about to serve a
// client of another one.
func TestRemoveWhileConnecting(t *testing.T) {
	loops := newLoops(t, 1)
	s, path := newServer(t, Config{Loops: loops, Exports: []Export{
		{Name: "a", Device: newRAM(t, block.Geometry{})}, {Name: "b", Device: newRAM(t, block.Geometry{})},
	}})
	busy, goOn := make(chan struct{}), make(chan struct{})
	go func() {
		_ = loops[0].Call(func() {
			close(busy)
			<-goOn
		})
	}()
	<-busy
	b := connect(t, path, "b", false)
	await(t, "the client's turn", func() bool { return s.Users("b") == 1 })
	removed := make(chan error)
	go func() { removed <- s.Remove(testContext(t), "a", false) }()
	time.Sleep(20 * time.Millisecond) // for both to wait for the loop: there is no event
	close(goOn)
	if err := <-removed; err != nil {
		t.Error(err)
	}
	b.ask(request{kind: cmdFlush, cookie: 1}, nil)
	if e := b.simple(1); e != 0 {
		t.Errorf("flush: %d", e)
	}
}
