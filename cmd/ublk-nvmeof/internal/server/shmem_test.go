package server

import (
	"bufio"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/ublk"
)

// fakeSharer is a device whose shared memory is a file of any kind.
type fakeSharer struct {
	done   chan struct{}
	events chan string
	refuse error
	slow   chan struct{} // Unshare waits for it
	shared ublk.SharedMemory
}

func (d *fakeSharer) Share(_ context.Context, f *os.File, record func(ublk.SharedMemory) error) error {
	if d.refuse != nil {
		return d.refuse
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	d.shared = ublk.SharedMemory{Inode: st.Ino, Size: st.Size}
	d.events <- "share"
	return record(d.shared)
}

func (d *fakeSharer) Shared() (ublk.SharedMemory, bool) {
	return d.shared, d.shared != ublk.SharedMemory{}
}

func (d *fakeSharer) Unshare(context.Context) error {
	<-d.slow
	d.shared = ublk.SharedMemory{}
	d.events <- "unshare"
	return nil
}

func (d *fakeSharer) Done() <-chan struct{} { return d.done }
func (d *fakeSharer) Path() string          { return "/dev/ublkb0" }

// sharedSite is a socket for shared memory of a fakeSharer.
type sharedSite struct {
	t      *testing.T
	dev    *fakeSharer
	socket *shareSocket
}

func newSharedSite(t *testing.T) *sharedSite {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	d := &fakeSharer{done: make(chan struct{}), events: make(chan string, 8), slow: make(chan struct{})}
	record := func(m *state.SharedMemory) error {
		if m == nil {
			d.events <- "record none"
		} else {
			d.events <- "record"
		}
		return nil
	}
	s := &sharedSite{t, d, newShareSocket(d, l, slog.New(slog.DiscardHandler), record)}
	go s.socket.accept()
	t.Cleanup(func() { close(d.done) })
	return s
}

// client connects and sends what it has. It returns the answer without its end.
func (s *sharedSite) client(oob []byte) (*net.UnixConn, string) {
	s.t.Helper()
	c, err := net.DialUnix("unix", nil, s.socket.listener.Addr().(*net.UnixAddr))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	if _, _, err := c.WriteMsgUnix([]byte{0}, oob, nil); err != nil {
		s.t.Fatal(err)
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		s.t.Fatal(err)
	}
	return c, strings.TrimSpace(answer)
}

func (s *sharedSite) memory() []byte {
	s.t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, 8192); err != nil {
		s.t.Fatal(err)
	}
	return unix.UnixRights(fd)
}

func (s *sharedSite) want(events ...string) {
	s.t.Helper()
	for _, want := range events {
		if got := <-s.dev.events; got != want {
			s.t.Errorf("%s, want %s", got, want)
		}
	}
}

// TestShareSocket shares the memory of one client at a time, until it hangs up.
func TestShareSocket(t *testing.T) {
	s := newSharedSite(t)
	if _, answer := s.client(nil); !strings.HasPrefix(answer, "error want one memfd") {
		t.Errorf("without memory: %q", answer)
	}
	c, answer := s.client(s.memory())
	if answer != "ok 8192" {
		t.Fatalf("answer %q", answer)
	}
	s.want("share", "record")
	if _, answer := s.client(s.memory()); answer != "error another client has its memory shared" {
		t.Errorf("a second client: %q", answer)
	}
	c.Close()
	for s.socket.taken.Load() { // until the server has seen the end
		runtime.Gosched()
	}
	go func() { s.dev.slow <- struct{}{} }() // the next client waits for the end of the first one's memory
	c, answer = s.client(s.memory())
	if answer != "ok 8192" {
		t.Errorf("a client that follows: %q", answer)
	}
	s.want("unshare", "record none", "share", "record")
	go func() { s.dev.slow <- struct{}{} }()
	c.Close()
	s.want("unshare", "record none")
	s.socket.busy.Lock() // the client is served no more
	s.dev.refuse = errors.New("no such memory")
	s.socket.busy.Unlock()
	if _, answer := s.client(s.memory()); answer != "error no such memory" {
		t.Errorf("memory that is refused: %q", answer)
	}
}

// TestShareSocketHandOver leaves the memory to the next server, and hangs up, so that the client
// comes back.
func TestShareSocketHandOver(t *testing.T) {
	s := newSharedSite(t)
	c, _ := s.client(s.memory())
	s.want("share", "record")
	s.socket.end()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("the client read %d bytes, %v", n, err)
	}
	s.socket.busy.Lock() // the client is served no more
	defer s.socket.busy.Unlock()
	if len(s.dev.events) != 0 {
		t.Errorf("the memory does not stay shared: %s", <-s.dev.events)
	}
	if _, err := os.Stat(s.socket.listener.Addr().String()); err == nil {
		t.Error("the socket is in the way of the next server")
	}
}
