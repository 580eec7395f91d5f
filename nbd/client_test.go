package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/ram"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/poller"
)

// patience limits every step. No step comes near it.
const patience = 60 * time.Second

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// newLoops makes n loops that end with the test.
func newLoops(t testing.TB, n int) []*poller.Loop {
	t.Helper()
	var loops []*poller.Loop
	for i := range n {
		l, err := poller.New(poller.Config{Name: fmt.Sprintf("test%d", i)})
		if err != nil {
			t.Fatal(err)
		}
		loops = append(loops, l)
		t.Cleanup(func() {
			if err := l.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
	return loops
}

func newRAM(t testing.TB, g block.Geometry) *ram.Device {
	t.Helper()
	dev, err := ram.New(ram.Config{Geometry: g})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	})
	return dev
}

// newServer serves cfg on two loops and a unix socket, whose path it returns. At the end
// of the test it checks that nothing is left.
func newServer(t testing.TB, cfg Config) (s *Server, path string) {
	t.Helper()
	if cfg.Loops == nil {
		cfg.Loops = newLoops(t, 2)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "nbd.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		for _, x := range cfg.Exports {
			if g, ok := x.Device.(*gate); ok {
				g.open() // a test that failed may have left it shut, and Stop waits for the requests
			}
		}
		if err := s.Stop(testContext(t), true); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		if n := s.Connections(); slices.Max(n) != 0 || len(s.peers.served) != 0 || len(s.peers.negotiating) != 0 {
			t.Errorf("left: %v connections, %d clients", n, len(s.peers.served)+len(s.peers.negotiating))
		}
		for _, e := range s.exports {
			checkLeft(t, e)
		}
	})
	return s, path
}

// checkLeft checks that no connection has left anything in an export.
func checkLeft(t testing.TB, e *export) {
	t.Helper()
	for i, s := range e.shards {
		if s.nFree != len(s.tags) || s.inflight != 0 || s.waiting.head != nil || len(s.parked) != 0 || len(s.reqs) != 0 {
			t.Errorf("loop %d export %s: %d of %d tags free, %d in flight, %d parked", i, e.Name, s.nFree, len(s.tags), s.inflight, len(s.parked))
		}
		for j := range s.stripes.locks {
			if v := s.stripes.locks[j].Load(); v != 0 {
				t.Errorf("export %s: stripe %d is locked: %#x", e.Name, j, v)
			}
		}
		if n := s.stripes.parked.Load(); n != 0 {
			t.Errorf("export %s: %d parked", e.Name, n)
		}
	}
}

// client speaks the protocol as a test requires, right or wrong.
type client struct {
	t testing.TB
	net.Conn
}

func dial(t testing.TB, path string) *client {
	t.Helper()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return &client{t, nc}
}

func (c *client) send(b ...[]byte) {
	c.t.Helper()
	if _, err := c.Write(bytes.Join(b, nil)); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		c.t.Fatal(err)
	}
	return b
}

// closed checks that the server has hung up without sending anything else.
func (c *client) closed() {
	c.t.Helper()
	if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil || os.IsTimeout(err) {
		c.t.Errorf("connection not closed: %d bytes, %v", n, err)
	}
}

func be(v any) []byte {
	b, err := binary.Append(nil, binary.BigEndian, v)
	if err != nil {
		panic(err)
	}
	return b
}

// hello begins a negotiation.
func (c *client) hello() {
	c.t.Helper()
	if got := c.read(18); !bytes.Equal(got, []byte("NBDMAGICIHAVEOPT\x00\x03")) {
		c.t.Fatalf("greeting %q", got)
	}
	c.send(be(uint32(3)))
}

func (c *client) option(opt option, data []byte) {
	c.t.Helper()
	c.send([]byte("IHAVEOPT"), be(uint32(opt)), be(uint32(len(data))), data)
}

type answer struct {
	rep  optionReply
	data string
}

// answers reads replies to an option up to the last.
func (c *client) answers(opt option) (all []answer) {
	c.t.Helper()
	for {
		head := c.read(20)
		if binary.BigEndian.Uint64(head) != magicOptionReply || option(binary.BigEndian.Uint32(head[8:])) != opt {
			c.t.Fatalf("reply %x to option %d", head, opt)
		}
		a := answer{optionReply(binary.BigEndian.Uint32(head[12:])), string(c.read(int(binary.BigEndian.Uint32(head[16:]))))}
		all = append(all, a)
		if a.rep == repAck || a.rep&repError != 0 {
			return all
		}
	}
}

func infoData(name string, infos ...infoType) []byte {
	b := append(be(uint32(len(name))), name...)
	return append(append(b, be(uint16(len(infos)))...), be(infos)...)
}

// connect performs the negotiation.
func connect(t testing.TB, path, export string, structured bool, asked ...infoType) *client {
	t.Helper()
	c := dial(t, path)
	c.hello()
	if structured {
		c.option(optStructuredReply, nil)
		if a := c.answers(optStructuredReply); a[0].rep != repAck {
			t.Fatalf("structured replies: %+v", a)
		}
	}
	c.option(optGo, infoData(export, asked...))
	if a := c.answers(optGo); a[len(a)-1].rep != repAck {
		t.Fatalf("go: %+v", a)
	}
	return c
}

func requestBytes(r request) []byte {
	return bytes.Join([][]byte{be(r.magic), be(r.flags), be(r.kind), be(r.cookie), be(r.offset), be(r.length)}, nil)
}

// ask sends a request with its data.
func (c *client) ask(r request, data []byte) {
	c.t.Helper()
	if r.magic == 0 {
		r.magic = magicRequest
	}
	c.send(requestBytes(r), data)
}

// simple reads a simple reply.
func (c *client) simple(cookie uint64) code {
	c.t.Helper()
	b := c.read(simpleSize)
	if binary.BigEndian.Uint32(b) != magicSimple || binary.BigEndian.Uint64(b[8:]) != cookie {
		c.t.Fatalf("reply %x to %d", b, cookie)
	}
	return code(binary.BigEndian.Uint32(b[4:]))
}

// chunk reads a structured reply that has one chunk.
func (c *client) chunk(cookie uint64) (kind uint16, data []byte) {
	c.t.Helper()
	b := c.read(structuredSize)
	if binary.BigEndian.Uint32(b) != magicStructured || binary.BigEndian.Uint64(b[8:]) != cookie || b[5] != chunkDone {
		c.t.Fatalf("reply %x to %d", b, cookie)
	}
	return binary.BigEndian.Uint16(b[6:]), c.read(int(binary.BigEndian.Uint32(b[16:])))
}

// chunks reads a structured reply to a read, of one or more chunks, in order.
func (c *client) chunks(r request) (data []byte, err code) {
	c.t.Helper()
	for {
		b := c.read(structuredSize)
		if binary.BigEndian.Uint32(b) != magicStructured || binary.BigEndian.Uint64(b[8:]) != r.cookie {
			c.t.Fatalf("reply %x to %d", b, r.cookie)
		}
		content := c.read(int(binary.BigEndian.Uint32(b[16:])))
		switch kind := binary.BigEndian.Uint16(b[6:]); {
		case kind == chunkError:
			err = code(binary.BigEndian.Uint32(content))
		case kind != chunkOffsetData || binary.BigEndian.Uint64(content) != r.offset+uint64(len(data)):
			c.t.Fatalf("chunk %d at %d, after %d bytes", kind, binary.BigEndian.Uint64(content), len(data))
		default:
			data = append(data, content[8:]...)
		}
		if b[5]&chunkDone != 0 {
			return data, err
		}
	}
}

// tool returns the path of a client program that the test needs.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	testenv.Need(t, "nbd-clients", err)
	return path
}

// run runs a client program, which must succeed.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(testContext(t), tool(t, name), args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}
