package main

import (
	"bufio"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/target"
)

// service is connect --foreground, under a service manager or in a terminal.
type service struct {
	t        *testing.T
	cmd      *exec.Cmd
	log      chan string
	notified chan string
}

// startService starts a connection of the site as a service manager does.
func startService(t *testing.T, s *site, args ...string) *service {
	t.Helper()
	path := filepath.Join(s.dir, "notify")
	_ = os.Remove(path) // of an earlier service
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	notified := make(chan string, 1000)
	go func() {
		b := make([]byte, 4096)
		for n, err := c.Read(b); err == nil; n, err = c.Read(b) {
			for line := range strings.SplitSeq(string(b[:n]), "\n") {
				notified <- line
			}
		}
	}()
	x := startForeground(t, s, []string{"NOTIFY_SOCKET=" + path}, args...)
	x.notified = notified
	return x
}

// startForeground starts a connection of the site with more variables in its environment.
func startForeground(t *testing.T, s *site, env []string, args ...string) *service {
	t.Helper()
	x := &service{t: t, log: make(chan string, 1000)}
	x.cmd = exec.CommandContext(t.Context(), self(), append([]string{"--run-dir", s.dir}, args...)...)
	x.cmd.Env = append(append(os.Environ(), "UBLK_NVMEOF_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0"), env...)
	errs, err := x.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := x.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(x.log)
		for lines := bufio.NewScanner(errs); lines.Scan(); {
			x.log <- lines.Text() + "\n" // so that an empty line is not the end
		}
	}()
	return x
}

// awaitLog waits for a line of the log that contains text.
func (x *service) awaitLog(text string) {
	x.t.Helper()
	for line := x.line(text); line != ""; line = x.line(text) {
		if strings.Contains(line, text) {
			return
		}
	}
	x.t.Fatalf("ended without %q in the log: %v", text, x.cmd.Wait())
}

// line returns the next line of the log, or the empty string when the service has ended. what says
// what the test waits for.
func (x *service) line(what string) string {
	x.t.Helper()
	return testenv.Receive(x.t, x.log, what)
}

// awaitNotified waits until the service manager is told a line that begins so.
func (x *service) awaitNotified(prefix string) {
	x.t.Helper()
	limit := time.After(30 * time.Second)
	var told []string
	for {
		select {
		case line := <-x.notified:
			if strings.HasPrefix(line, prefix) {
				return
			}
			told = append(told, line)
		case <-limit:
			x.t.Fatalf("not told %q, but %q; the log goes on with %q", prefix, told, x.rest())
		}
	}
}

// rest returns what is in the log and has not been read yet.
func (x *service) rest() (lines []string) {
	for {
		select {
		case line, ok := <-x.log:
			if !ok {
				return lines
			}
			lines = append(lines, line)
		default:
			return lines
		}
	}
}

// end asks the service to end, and waits until it has.
func (x *service) end() {
	x.t.Helper()
	if err := x.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		x.t.Fatal(err)
	}
	for line := x.line("the end of the service"); line != ""; line = x.line("the end of the service") {
		if strings.Contains(line, "another signal") {
			x.t.Errorf("it hurries: %s", line)
		}
	}
	if err := x.cmd.Wait(); err != nil {
		x.t.Errorf("it ended with %v", err)
	}
}

// A service that finds no subsystem tries again, is not ended by SIGHUP, and ends in order.
func TestServiceRetries(t *testing.T) {
	const nqn = "nqn.2026-01.org.example:a"
	s := newSite(t, "nqn.2026-01.org.example:other")
	if _, _, code := s.program(s.connectArgs(nqn)...); code != exit.UnknownSubsys {
		t.Errorf("without --retry: exit code %d", code)
	}
	x := startService(t, s, s.connectArgs(nqn, "--foreground", "--retry=5m")...)
	x.awaitLog("cannot connect yet")
	x.awaitNotified("STATUS=cannot connect yet")
	sub, err := s.target.AddSubsystem(target.SubsystemConfig{NQN: nqn, AllowAny: true})
	if err != nil {
		t.Fatal(err)
	}
	s.subs[nqn] = sub
	s.put(nqn, newDisk("disk a"))
	x.awaitNotified("READY=1")
	x.awaitNotified("STATUS=live")
	if err := x.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	x.awaitNotified("RELOADING=1")
	x.awaitNotified("READY=1")
	c := s.client(s.record(nqn))
	if got, err := c.read(6); got != "disk a" || err != nil {
		t.Errorf("after SIGHUP: %q, %v", got, err)
	}
	if err := x.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	x.awaitNotified("STATUS=waiting until no device is in use")
	if got, err := c.read(6); got != "disk a" || err != nil {
		t.Errorf("after SIGTERM: %q, %v", got, err)
	}
	c.close()
	x.end() // by the second SIGTERM
}

// The end of a terminal does not end the server in it.
func TestForegroundSurvivesHangup(t *testing.T) {
	const nqn = "nqn.2026-01.org.example:a"
	s := newSite(t, nqn)
	s.put(nqn, newDisk("disk a"))
	x := startForeground(t, s, nil, s.connectArgs(nqn, "--foreground")...)
	x.awaitLog("connected")
	if err := x.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	x.awaitLog("SIGHUP is ignored")
	c := s.client(s.record(nqn))
	if got, err := c.read(6); got != "disk a" || err != nil {
		t.Errorf("after SIGHUP: %q, %v", got, err)
	}
	c.close()
	x.end()
}

// A server that tries again takes over what a dead server left, once the target is back.
func TestRetryTakesOver(t *testing.T) {
	const nqn = "nqn.2026-01.org.example:a"
	s := newSite(t, nqn)
	a := newDisk("disk a")
	s.put(nqn, a)
	old := s.connect(nqn)
	s.kill(old)
	s.close()
	x := startService(t, s, s.connectArgs(nqn, "--foreground", "--retry=5m", "--frontend="+options.NBDSocket)...)
	x.awaitLog("cannot connect yet")
	if r := s.record(nqn); r.Name != old.Name || len(r.Devices) != 1 {
		t.Errorf("the record has changed: %+v", r)
	}
	s.open(nqn)
	t.Cleanup(func() { s.close() })
	if _, err := s.subs[nqn].AddNamespace(target.NamespaceConfig{NSID: 1, Store: a, UUID: parseUUID(t, old.Devices[0].UUID)}); err != nil {
		t.Fatal(err)
	}
	x.awaitNotified("READY=1")
	if r := s.record(nqn); r.Name != old.Name || r.Process.PID != x.cmd.Process.Pid || r.Devices[0].URI != old.Devices[0].URI {
		t.Errorf("taken over: %+v, was %+v", r, old)
	}
	x.end()
}

// connect-all is a service, too. It is ready when everything that is there is connected. Without
// a discovery service to stay connected to, that is all.
func TestConnectAllService(t *testing.T) {
	const nqn = "nqn.2026-01.org.example:a"
	s := newSite(t, nqn)
	s.put(nqn, newDisk("disk a"))
	how := []string{"connect-all", "--persistent", "--foreground", "--provider=roce", "--frontend=nbd-socket", "-i", "1", "-q", "nqn.host", "-I", "12345678-1234-1234-1234-123456789abc"}

	config := filepath.Join(t.TempDir(), "config.json")
	text := `[{"hostnqn": "nqn.host", "subsystems": [{"nqn": "` + nqn + `", "ports": [{"transport": "rdma", "traddr": "` + s.addr.String() + `"}]}]}]`
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	x := startService(t, s, append(how, "-J", config)...)
	x.awaitNotified("READY=1")
	for x.line("the end of the service") != "" {
	}
	if err := x.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	c := s.client(s.record(nqn))
	if got, err := c.read(6); got != "disk a" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	c.close()

	x = startService(t, s, append(how, "-a", s.addr.String())...)
	x.awaitNotified("READY=1")
	x.awaitNotified("STATUS=connected to discovery services")
	x.end()
	if r := s.record(nqn); !r.Alive {
		t.Error("the end of the service ended a server")
	}
}
