package server

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

// manager is a service manager that hears what a server tells it.
type manager struct {
	t     *testing.T
	mu    sync.Mutex // guards lines
	lines []string
	news  chan struct{}
}

// newManager makes this process a service for the rest of the test.
func newManager(t *testing.T, watchdog time.Duration) *manager {
	t.Helper()
	path := filepath.Join(runDir(t), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{t: t, news: make(chan struct{}, 1)}
	var done sync.WaitGroup
	done.Go(func() {
		b := make([]byte, 4096)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			m.mu.Lock()
			m.lines = append(m.lines, strings.Split(string(b[:n]), "\n")...)
			m.mu.Unlock()
			select {
			case m.news <- struct{}{}:
			default:
			}
		}
	})
	t.Cleanup(func() {
		c.Close()
		done.Wait()
	})
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "")
	t.Setenv("WATCHDOG_PID", "")
	if watchdog > 0 {
		t.Setenv("WATCHDOG_USEC", strconv.FormatInt(watchdog.Microseconds(), 10))
	}
	return m
}

// mark returns how much has been heard so far.
func (m *manager) mark() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.lines)
}

// await waits for a line that begins like this, after the first lines, and returns it.
func (m *manager) await(after int, prefix string) string {
	m.t.Helper()
	limit := time.After(30 * time.Second)
	for {
		m.mu.Lock()
		for _, l := range m.lines[after:] {
			if strings.HasPrefix(l, prefix) {
				m.mu.Unlock()
				return l
			}
		}
		m.mu.Unlock()
		select {
		case <-m.news:
		case <-limit:
			m.t.Fatalf("not told %q; told %q", prefix, m.lines)
		}
	}
}

func (m *manager) heard(after int, prefix string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.lines[after:] {
		if strings.HasPrefix(l, prefix) {
			return true
		}
	}
	return false
}

// The service manager hears of the start, the state and the end.
func TestServiceIsTold(t *testing.T) {
	m := newManager(t, 0)
	r := begin(t, newWorld(), lab(), runDir(t))
	r.waitReady()
	if m.await(0, "EXTEND_TIMEOUT_USEC="); !m.heard(0, "STATUS=connecting to nqn.lab") {
		t.Errorf("told %q", m.lines)
	}
	m.await(0, "READY=1")
	if got := m.await(0, "STATUS=live"); got != "STATUS=live: nqn.lab at 127.0.0.1:4420, ublkb0" {
		t.Error(got)
	}
	if m.heard(0, "WATCHDOG=1") {
		t.Error("a watchdog is fed that there is not")
	}
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	m.await(0, "STOPPING=1")
}

// The watchdog is fed while all loops answer, and not while one hangs.
func TestWatchdog(t *testing.T) {
	m := newManager(t, 400*time.Millisecond)
	w := newWorld()
	said := make(chan struct{}, 1)
	r := beginWith(t, w, lab(), runDir(t), func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(writerFunc(func(b []byte) {
			if bytes.Contains(b, []byte("the watchdog is not fed")) {
				select {
				case said <- struct{}{}:
				default:
				}
			}
		}), nil))
	})
	r.waitReady()
	m.await(0, "WATCHDOG=1")
	hang, hung, called := make(chan struct{}), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(called)
		_ = w.connected.Loops[0].Call(func() {
			close(hung)
			<-hang
		})
	}()
	<-hung
	<-said // of a question that may have been asked before
	<-said
	before := m.mark()
	<-said
	if m.heard(before, "WATCHDOG=1") {
		t.Error("the watchdog is fed although a loop hangs")
	}
	close(hang)
	<-called
	m.await(m.mark(), "WATCHDOG=1")
}

type writerFunc func([]byte)

func (f writerFunc) Write(b []byte) (int, error) {
	f(b)
	return len(b), nil
}

// A patient server that is asked to end serves its device as long as that is in use.
func TestPatientEnd(t *testing.T) {
	unusedPoll = 10 * time.Millisecond
	for _, hurry := range []bool{false, true} {
		m := newManager(t, 0)
		w := newWorld()
		w.setBusy(0, true)
		r := beginWith(t, w, lab(), runDir(t), func(c *Config) { c.Patient = true })
		r.waitReady()
		r.stop()
		m.await(0, "STATUS=waiting until no device is in use")
		select {
		case err := <-r.result:
			t.Fatalf("ended: %v", err)
		default:
		}
		if s, err := control.NewClient(r.socket).Status(t.Context()); err != nil || len(s.Devices) != 1 {
			t.Errorf("%+v, %v", s, err)
		}
		if hurry {
			close(r.hurry)
		} else {
			w.setBusy(0, false)
		}
		if err := <-r.result; err != nil {
			t.Errorf("hurry %t: %v", hurry, err)
		}
	}
}

// A target that is away is given up while the machine is shut down, and not before.
func TestShutdownWithoutTarget(t *testing.T) {
	shutdownPoll = 2 * time.Millisecond
	w := newWorld()
	asked, stopping := make(chan struct{}), make(chan bool)
	w.stopping = func() bool {
		asked <- struct{}{}
		return <-stopping
	}
	r := begin(t, w, lab(), runDir(t))
	r.waitReady()
	lost := time.Now().Add(-time.Hour)
	w.sub.lost.Store(&lost)
	for _, down := range []bool{false, false, true} {
		<-asked
		if slices.Contains(w.happened(), "abort") {
			t.Error("the target is given up although the machine is not shut down")
		}
		stopping <- down
	}
	<-w.sub.aborted
}

// A server that a service manager runs starts its successor, and makes it the service when
// it takes over. If the successor fails, nothing has changed.
func TestReplace(t *testing.T) {
	m := newManager(t, 0)
	failed := make(chan error, 1)
	var program string
	launched := make(chan struct{}, 2)
	r := beginWith(t, newWorld(), lab(), runDir(t), func(c *Config) {
		c.Launch = func(p, name string, _ []string) (int, <-chan error, error) {
			program = p + " " + name
			launched <- struct{}{}
			return 4242, failed, nil
		}
	})
	r.waitReady()
	c := control.NewClient(r.socket)
	failed <- errors.New("it cannot connect")
	if _, err := c.Replace(t.Context(), "/new/program"); err == nil || err.Error() != "it cannot connect" {
		t.Errorf("failed successor: %v", err)
	}
	if program != "/new/program ctrl0" || m.heard(0, "MAINPID=") {
		t.Errorf("program %q, told %q", program, m.lines)
	}
	if _, err := c.Replace(t.Context(), "relative"); err == nil {
		t.Error("a relative path is accepted")
	}
	<-launched
	go func() {
		<-launched
		if err := c.HandOver(context.WithoutCancel(t.Context()), ""); err != nil {
			t.Errorf("hand over: %v", err)
		}
	}()
	pid, err := c.Replace(t.Context(), "/new/program")
	if pid != 4242 || err != nil {
		t.Errorf("%d, %v", pid, err)
	}
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	m.await(0, "MAINPID=4242")
	if m.heard(0, "STOPPING=1") {
		t.Error("the service is said to end")
	}
}

// A reload reads the certificates again, keeps the old ones if the new ones are wrong, and
// never ends the server.
func TestReload(t *testing.T) {
	m := newManager(t, 0)
	reload := make(chan os.Signal)
	o := lab()
	dir := runDir(t)
	o.Frontend, o.Socket, o.TLS = options.NBDSocket, filepath.Join(dir, "tls.sock"), t.TempDir()
	old := certify(t, o.TLS)
	beginWith(t, newWorld(), o, dir, func(c *Config) { c.Reload = reload }).waitReady()
	hangUp := func() {
		before := m.mark()
		reload <- syscall.SIGHUP
		m.await(before, "RELOADING=1")
		m.await(before, "MONOTONIC_USEC=")
		m.await(before, "READY=1")
	}
	now := certify(t, o.TLS)
	if dialTLS(o.Socket, old) != nil || dialTLS(o.Socket, now) == nil {
		t.Error("the certificate has changed without a reload")
	}
	hangUp()
	if dialTLS(o.Socket, old) == nil || dialTLS(o.Socket, now) != nil {
		t.Error("the certificate is the old one")
	}
	if err := os.WriteFile(filepath.Join(o.TLS, "server-key.pem"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	hangUp()
	if err := dialTLS(o.Socket, now); err != nil {
		t.Errorf("after a reload that failed: %v", err)
	}
}

// A server serves on the socket that systemd has opened.
func TestSocketOfSystemd(t *testing.T) {
	path := filepath.Join(runDir(t), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	o := lab()
	o.Frontend = options.NBDSocket
	dir := runDir(t)
	r := beginWith(t, newWorld(), o, dir, func(c *Config) { c.Listener = l })
	if s := r.waitReady(); !strings.HasSuffix(s.Devices[0].Device, "socket="+path) {
		t.Errorf("device %s", s.Devices[0].Device)
	}
	records, err := state.Dir(dir).List()
	if err != nil || len(records) != 1 || records[0].Listen != path {
		t.Errorf("%+v, %v", records, err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b := make([]byte, 8)
	if _, err := c.Read(b); err != nil || string(b) != "NBDMAGIC" {
		t.Errorf("%q, %v", b, err)
	}
	r.stop()
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error("the socket of systemd is gone")
	}
}
