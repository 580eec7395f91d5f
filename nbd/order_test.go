package nbd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/loglimit"
	"ublk-nvmeof/poller"
)

// plainServer returns a server with its own loops and without a clean-up, because these
// tests end things in their own order.
func plainServer(t testing.TB, dev block.Device) (*Server, *poller.Loop, string) {
	t.Helper()
	l, err := poller.New(poller.Config{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Loops: []*poller.Loop{l}, Exports: []Export{{Name: "a", Device: dev}}})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "nbd.sock")
	nl, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = s.Serve(nl) }()
	return s, l, path
}

// die ends a loop as an accident would. Stop alone waits for its handlers.
func die(l *poller.Loop) {
	go func() { _ = l.Call(runtime.Goexit) }()
	<-l.Done()
}

// TestStopTwice stops a server from several goroutines, and uses it afterwards.
func TestStopTwice(t *testing.T) {
	dev := newRAM(t, block.Geometry{})
	s, l, path := plainServer(t, dev)
	c := connect(t, path, "", false)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if err := s.Stop(testContext(t), true); err != nil {
				t.Error(err)
			}
		})
		all.Go(func() {
			if err := s.Remove(testContext(t), "a", true); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	c.closed()
	if err := s.Add(Export{Name: "b", Device: dev}); !errors.Is(err, ErrStopped) {
		t.Errorf("add: %v", err)
	}
	if err := s.Remove(testContext(t), "a", true); err != nil {
		t.Errorf("remove: %v", err)
	}
	nl, err := net.Listen("unix", filepath.Join(t.TempDir(), "late"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(nl); !errors.Is(err, ErrStopped) {
		t.Errorf("serve: %v", err)
	}
	if _, err := Start(testContext(t), DeviceConfig{Server: s, Index: -1}); err == nil {
		t.Error("start: no error")
	}
	if st := s.Snapshot("a"); st != (block.Stats{}) {
		t.Errorf("%+v", st)
	}
	if err := l.Stop(); err != nil {
		t.Error(err)
	}
	if err := s.Stop(testContext(t), true); err != nil {
		t.Errorf("after the loop: %v", err)
	}
}

// TestLoopEndsFirst ends a loop before its server, with clients and with requests at the
// back end. Their memory must then stay.
func TestLoopEndsFirst(t *testing.T) {
	for _, inFlight := range []bool{false, true} {
		g := &gate{Device: newRAM(t, block.Geometry{})}
		s, l, path := plainServer(t, g)
		c := connect(t, path, "", false)
		if g.shut.Store(inFlight); inFlight {
			c.ask(request{kind: cmdRead, length: 512}, nil)
			await(t, "the request", func() bool { return g.inside.Load() == 1 })
		} else {
			c.do(request{kind: cmdFlush}, nil)
		}
		die(l)
		_, _ = io.Copy(io.Discard, c) // it ends
		err := s.Stop(testContext(t), true)
		if inFlight != (err != nil) || inFlight && !errors.Is(err, poller.ErrStopped) {
			t.Errorf("in flight %t: %v", inFlight, err)
		}
		if err := s.Add(Export{Name: "b", Device: g}); !errors.Is(err, ErrStopped) {
			t.Errorf("add: %v", err)
		}
		if err := s.Stop(testContext(t), true); err != nil {
			t.Errorf("again: %v", err)
		}
	}
}

// TestEndedDevice makes a device lose all its connections, at once and while more are
// made, and requests new ones.
func TestEndedDevice(t *testing.T) {
	s, _ := newServer(t, Config{Exports: []Export{{Device: newRAM(t, block.Geometry{})}}})
	for range 50 {
		d := &Device{srv: s, cfg: DeviceConfig{Connections: 2}, offer: s.find("").offer(false), done: make(chan struct{}), log: s.cfg.Log}
		if err := d.hold(); err != nil {
			t.Fatal(err)
		}
		for range 2 { // as connect does, and each ends at once
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.serve(fds[0]); err != nil {
				t.Fatal(err)
			}
			_ = unix.Close(fds[1])
			time.Sleep(100 * time.Microsecond) // or not yet
		}
		var all sync.WaitGroup
		all.Go(func() { d.drop(nil) })
		for range 3 {
			all.Go(func() { _ = d.Reconfigure(testContext(t), 0, 0) }) // there may be no kernel for it
		}
		all.Wait()
		<-d.Done()
		if err := d.Err(); !errors.Is(err, ErrDisconnected) {
			t.Error(err)
		}
		if err := d.Reconfigure(testContext(t), 0, 0); !errors.Is(err, ErrNoDevice) {
			t.Errorf("a device that has ended: %v", err)
		}
	}
}

// TestReplaced adds an export with the name of one that is being removed.
func TestReplaced(t *testing.T) {
	s, path := newServer(t, Config{Exports: []Export{{Name: "1", Device: newRAM(t, block.Geometry{})}}})
	c := connect(t, path, "1", false)
	await(t, "the client's service", func() bool { return s.Users("1") == 1 })
	next := Export{Name: "1", Device: newRAM(t, block.Geometry{Sectors: 4096})}
	for range 2 {
		if err := s.Remove(testContext(t), "1", false); !errors.Is(err, ErrBusy) {
			t.Errorf("removed in use: %v", err)
		}
		if err := s.Add(next); !errors.Is(err, ErrExists) {
			t.Errorf("added while the other is there: %v", err)
		}
	}
	c.ask(request{kind: cmdDisc}, nil)
	await(t, "the end of the old one", func() bool { return s.Remove(testContext(t), "1", false) == nil })
	if err := s.Add(next); err != nil {
		t.Error(err)
	}
	c = connect(t, path, "1", false)
	c.ask(request{kind: cmdRead, offset: 4096 << 9, length: 512}, nil)
	if e := c.simple(0); e != codeInval {
		t.Errorf("error %d beyond the end of the new one", e)
	}
}

// recorder keeps the logged messages.
type recorder struct {
	slog.Handler
	mu   sync.Mutex
	text []string
}

func (r *recorder) Enabled(context.Context, slog.Level) bool { return true }
func (r *recorder) WithGroup(string) slog.Handler            { return r }
func (r *recorder) WithAttrs(attrs []slog.Attr) slog.Handler {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range attrs {
		r.text = append(r.text, a.Value.String())
	}
	return r
}

func (r *recorder) Handle(_ context.Context, rec slog.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.text = append(r.text, rec.Message)
	rec.Attrs(func(a slog.Attr) bool {
		r.text = append(r.text, a.Value.String())
		return true
	})
	return nil
}

// TestLog checks that text of a client is logged only in printable form and with limited
// length.
func TestLog(t *testing.T) {
	rec := &recorder{}
	_, path := newServer(t, Config{Exports: twoExports(t), Log: slog.New(rec)})
	for range 5 * loglimit.Burst {
		_ = connect(t, path, "", false).Close()
	}
	evil := "\x1b[2J\nlevel=ERROR msg=\"all is lost\"\r\x00\u202e"
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: "@" + evil + t.Name()}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	c := dial(t, path)
	c.read(18)
	c.send(be(uint32(3)))
	c.option(optExportName, []byte(evil))
	c.closed()
	_, _ = unix.Write(fd, append(append(be(uint32(3)), "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x05"...), "\x1b[2J\n"...))
	await(t, "both refusals", func() bool {
		rec.mu.Lock()
		defer rec.mu.Unlock()
		n := 0
		for _, text := range rec.text {
			if strings.Contains(text, "no export") {
				n++
			}
		}
		return n == 2
	})
	rec.mu.Lock()
	defer rec.mu.Unlock()
	connected := 0
	for _, text := range rec.text {
		if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsGraphic(r) }) {
			t.Errorf("logged: %q", text)
		}
		if text == "NBD client connected" {
			connected++
		}
	}
	if connected == 0 || connected > 2*loglimit.Burst {
		t.Errorf("%d of %d connections were logged", connected, 5*loglimit.Burst)
	}
}
