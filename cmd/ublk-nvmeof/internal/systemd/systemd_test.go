package systemd

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
)

func TestNotify(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Notify(Ready); err != nil {
		t.Errorf("without a service manager: %v", err)
	}
	dir, err := os.MkdirTemp("", "notify") // t.TempDir may be longer than a socket's name
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for _, name := range []string{filepath.Join(dir, "s"), "@" + filepath.Base(dir)} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("NOTIFY_SOCKET", name)
		if err := Notify(Ready, Status("a\nMAINPID=1")); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		n, err := l.Read(b)
		if err != nil || string(b[:n]) != "READY=1\nSTATUS=a MAINPID=1" {
			t.Errorf("%s: %q, %v", name, b[:n], err)
		}
		l.Close()
		if err := Notify(Stopping); err == nil {
			t.Errorf("%s: nobody listens, no error", name)
		}
	}
}

func TestEnvironment(t *testing.T) {
	env := []string{"A=1", "NOTIFY_SOCKET=/x", "WATCHDOG_USEC=1", "WATCHDOG_PID=7", "LISTEN_PID=7", "LISTEN_FDS=1", "LISTEN_FDNAMES=a", "NOTIFY_SOCKETS=/y"}
	if got := Outside(env); !slices.Equal(got, []string{"A=1", "NOTIFY_SOCKETS=/y"}) {
		t.Errorf("outside: %q", got)
	}
	if got := Successor(env); !slices.Equal(got, []string{"A=1", "NOTIFY_SOCKET=/x", "WATCHDOG_USEC=1", "NOTIFY_SOCKETS=/y"}) {
		t.Errorf("successor: %q", got)
	}
	if env[1] != "NOTIFY_SOCKET=/x" {
		t.Error("the environment itself has changed")
	}
}

func TestWatchdogTimeout(t *testing.T) {
	for _, tt := range []struct {
		usec, pid string
		want      time.Duration
		fails     bool
	}{
		{"", "", 0, false},
		{"30000000", "", 30 * time.Second, false},
		{"30000000", strconv.Itoa(os.Getpid()), 30 * time.Second, false},
		{"30000000", "1", 0, false}, // another process is watched
		{"x", "", 0, true},
	} {
		t.Setenv("WATCHDOG_USEC", tt.usec)
		t.Setenv("WATCHDOG_PID", tt.pid)
		if d, err := WatchdogTimeout(); d != tt.want || (err != nil) != tt.fails {
			t.Errorf("%+v: %v, %v", tt, d, err)
		}
	}
}

// A socket of systemd survives the execution of another program by the same process, and
// its path remains when the listener is closed.
func TestListener(t *testing.T) {
	const child = "UN_TEST_LISTENER"
	switch os.Getenv(child) {
	case "before": // as connect --foreground does
		t.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
		t.Setenv(child, "after")
		if _, err := exec.LookPath("sh"); err != nil {
			t.Fatal(err)
		}
		closeOnExec(t, firstListener)
		if err := KeepListeners(); err != nil {
			t.Fatal(err)
		}
		t.Fatal(execSelf())
	case "after":
		l, err := Listener()
		if err != nil || l == nil {
			t.Fatalf("%v, %v", l, err)
		}
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte("hello"))
		c.Close()
		l.Close()
		return
	}
	if l, err := Listener(); l != nil || err != nil {
		t.Errorf("without systemd: %v, %v", l, err)
	}
	dir, err := os.MkdirTemp("", "listen")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestListener$")
	cmd.Env = append(os.Environ(), child+"=before", "LISTEN_FDS=1")
	cmd.ExtraFiles = []*os.File{f}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	defer func() {
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, &out)
		}
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b := make([]byte, 100)
	if n, err := c.Read(b); err != nil || string(b[:n]) != "hello" {
		t.Errorf("%q, %v", b[:n], err)
	}
}

func TestJournalHandler(t *testing.T) {
	type entry struct {
		message  string
		priority journal.Priority
		fields   map[string]string
	}
	var got []entry
	var failure error
	var backup bytes.Buffer
	h := NewJournalHandler(&backup, slog.LevelInfo, "x")
	h.(*journalHandler).send = func(m string, p journal.Priority, f map[string]string) error {
		got = append(got, entry{m, p, f})
		return failure
	}
	log := slog.New(h)
	log.Debug("not this")
	log.Info("one", "nsid", 1, "next_in", time.Second)
	log.With("server", "ctrl0").WithGroup("g").Warn("two words", "a b", "c d") //nolint:sloglint // a name that the journal does not take
	failure = errors.New("no journal")
	log.Error("three")
	want := []entry{
		{"one nsid=1 next_in=1s", journal.PriInfo, map[string]string{"SYSLOG_IDENTIFIER": "x", "NVMEOF_NSID": "1", "NVMEOF_NEXT_IN": "1s"}},
		{`two words server=ctrl0 "g.a b"="c d"`, journal.PriWarning, map[string]string{"SYSLOG_IDENTIFIER": "x", "NVMEOF_SERVER": "ctrl0", "NVMEOF_G_A_B": "c d"}},
		{"three", journal.PriErr, map[string]string{"SYSLOG_IDENTIFIER": "x"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if backup.String() != "<3>three\n" {
		t.Errorf("backup: %q", &backup)
	}
}

func TestInOwnScope(t *testing.T) {
	for text, want := range map[string]bool{
		"0::/system.slice/ublk-nvmeof-42.scope\n":                               true,
		"1:name=systemd:/system.slice/ublk-nvmeof-42.scope\n0::/\n":             true,
		"0::/user.slice/user-0.slice/session-1.scope\n":                         false,
		"0::/system.slice/ublk-nvmeof-4.scope\n":                                false, // that of the process that started this one
		"0::/system.slice/system-ublk\\x2dnvmeof.slice/ublk-nvmeof@a.service\n": false,
	} {
		if got := inOwnScope(text, 42); got != want {
			t.Errorf("%q: %t", text, got)
		}
	}
}
