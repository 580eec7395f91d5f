package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma/roce"
	"ublk-nvmeof/target"
)

// These tests run servers as processes of their own, with a socket for NBD clients in
// front and RoCEv2 to a target in this process, and kill them.

// disk is a store in memory that can keep a write waiting.
type disk struct {
	mu       sync.Mutex // guards what follows
	data     []byte
	holds    string        // the first write that begins with it is held; empty: none
	held     chan struct{} // closed when a write is held
	released chan struct{} // closed when the write may go on
	finished bool          // the write that was held is done
}

func newDisk(text string) *disk {
	d := &disk{data: make([]byte, 1<<20)}
	copy(d.data, text)
	return d
}

// hold makes the disk hold the next write that begins with a text, until release. The channel is
// closed when the write is there.
func (d *disk) hold(text string) (held <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.holds, d.held, d.released, d.finished = text, make(chan struct{}), make(chan struct{}), false
	return d.held
}

// release lets the write that is held, or would be, go on. It may be called at any time.
func (d *disk) release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.holds = ""
	if d.released != nil {
		close(d.released)
		d.released = nil
	}
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	held, released := d.holds != "" && bytes.HasPrefix(p, []byte(d.holds)), d.released
	if held {
		d.holds = ""
		close(d.held)
	}
	d.mu.Unlock()
	if held {
		<-released
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.finished = d.finished || held
	return copy(d.data[off:], p), nil
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(p, d.data[off:]), nil
}

func (d *disk) text(n int) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return string(d.data[:n])
}

func (d *disk) Flush() error                        { return nil }
func (d *disk) Discard(int64, int64) error          { return nil }
func (d *disk) WriteZeroes(off, length int64) error { return nil }
func (d *disk) Size() int64                         { return int64(len(d.data)) }

// site is a target and a run directory.
type site struct {
	t        *testing.T
	dir      string
	addr     netip.Addr
	provider *roce.Provider
	target   *target.Target
	subs     map[string]*target.Subsystem
	close    func()
}

// newSite makes a target with a subsystem for each NQN, which have no namespaces yet.
func newSite(t *testing.T, nqns ...string) *site {
	t.Helper()
	s := &site{t: t, dir: runDir(t), addr: anotherLoopback()}
	s.open(nqns...)
	t.Cleanup(func() { s.close() })
	t.Cleanup(s.endServers)
	return s
}

// open starts the target.
func (s *site) open(nqns ...string) {
	s.t.Helper()
	provider, err := roce.New(roce.Config{Addrs: []netip.Addr{s.addr}})
	if err != nil {
		s.t.Fatal(err)
	}
	s.provider = provider
	s.target, err = target.New(target.Config{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		s.t.Fatal(errors.Join(err, provider.Close()))
	}
	if _, err := s.target.AddPorts(target.PortConfig{Provider: provider, Addr: netip.AddrPortFrom(s.addr, 4420)}); err != nil {
		s.t.Fatal(errors.Join(err, provider.Close()))
	}
	s.subs = map[string]*target.Subsystem{}
	for _, nqn := range nqns {
		sub, err := s.target.AddSubsystem(target.SubsystemConfig{NQN: nqn, AllowAny: true})
		if err != nil {
			s.t.Fatal(err)
		}
		s.subs[nqn] = sub
	}
	s.close = sync.OnceFunc(func() {
		if err := errors.Join(s.target.Close(), provider.Close()); err != nil {
			s.t.Errorf("close target: %v", err)
		}
	})
}

// put makes a disk namespace 1 of a subsystem. When the test ends, the disk holds nothing any
// more, because the target waits for its stores when it is closed.
func (s *site) put(nqn string, d *disk) {
	s.t.Helper()
	s.t.Cleanup(d.release)
	if _, err := s.subs[nqn].AddNamespace(target.NamespaceConfig{NSID: 1, Store: d}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) program(args ...string) (stdout, stderr string, code exit.Code) {
	s.t.Helper()
	return execProgram(s.t, append([]string{"--run-dir", s.dir}, args...)...)
}

func (s *site) connectArgs(nqn string, more ...string) []string {
	return append([]string{"connect", "-a", s.addr.String(), "-n", nqn, "-q", "nqn.2026-01.org.example:host", "-i", "1",
		"--provider", "roce", "--frontend", "nbd-socket", "-k", "2", "-c", "1"}, more...)
}

// connect starts a server and returns its record.
func (s *site) connect(nqn string, more ...string) state.Record {
	s.t.Helper()
	if _, stderr, code := s.program(s.connectArgs(nqn, more...)...); code != exit.OK {
		s.t.Fatalf("connect %s: exit code %d, %s", nqn, code, stderr)
	}
	return s.record(nqn)
}

// record is the record of the server of a subsystem; of the last one if there are
// several.
func (s *site) record(nqn string) state.Record {
	s.t.Helper()
	records, err := state.Dir(s.dir).List()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, r := range slices.Backward(records) {
		if r.Target.NQN == nqn && r.Err == nil {
			return r
		}
	}
	s.t.Fatalf("no record of %s: %+v", nqn, records)
	panic("unreachable")
}

// kill ends a server as a crash does.
func (s *site) kill(r state.Record) {
	s.t.Helper()
	h, err := r.Process.Open()
	if err != nil {
		s.t.Fatal(err)
	}
	defer h.Close()
	if err := h.Kill(); err != nil {
		s.t.Fatal(err)
	}
	if err := h.Wait(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) endServers() {
	records, err := state.Dir(s.dir).List()
	if err != nil {
		s.t.Error(err)
	}
	for _, r := range records {
		if s.t.Failed() {
			text, _ := os.ReadFile(filepath.Join(s.dir, r.Name, "log"))
			s.t.Logf("log of %s:\n%s", r.Name, text)
		}
		if h, err := r.Process.Open(); err == nil {
			_ = h.Kill()
			_ = h.Wait(s.t.Context())
			h.Close()
		}
	}
}

// socketOf is where the clients of a server find it.
func socketOf(t *testing.T, r state.Record) string {
	t.Helper()
	if len(r.Devices) == 0 {
		t.Fatalf("%s has no device", r.Name)
	}
	_, path, ok := strings.Cut(r.Devices[0].URI, "?socket=")
	if !ok {
		t.Fatalf("no socket in %q", r.Devices[0].URI)
	}
	return path
}

func (s *site) client(r state.Record) *nbdClient {
	s.t.Helper()
	c, err := dialNBD("unix", socketOf(s.t, r), "1")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.close)
	return c
}

// TestOldWriteOfDeadServer: a write that the target still works on when its server
// dies does not land over a newer one, whichever way the next server is started.
func TestOldWriteOfDeadServer(t *testing.T) {
	// Each calls last before it starts the command that has to wait for the write.
	for name, next := range map[string]func(s *site, r state.Record, last func()) error{
		"recover": func(s *site, r state.Record, last func()) error {
			last()
			return s.run("recover", r.Name)
		},
		"recover all": func(s *site, r state.Record, last func()) error {
			last()
			return s.run("recover", "--all")
		},
		"connect": func(s *site, r state.Record, last func()) error {
			last()
			return s.run(s.connectArgs(r.Target.NQN)...)
		},
		"duplicate": func(s *site, r state.Record, last func()) error {
			last()
			return s.run(s.connectArgs(r.Target.NQN, "--duplicate-connect", "--nbd-socket", filepath.Join(s.dir, "second.sock"))...)
		},
		"gc and connect": func(s *site, r state.Record, last func()) error {
			err := s.run("gc")
			last()
			return errors.Join(err, s.run(s.connectArgs(r.Target.NQN)...))
		},
		"disconnect and connect": func(s *site, r state.Record, last func()) error {
			err := s.run("disconnect", r.Name)
			last()
			return errors.Join(err, s.run(s.connectArgs(r.Target.NQN)...))
		},
		"disconnect and two of which one waits": func(s *site, r state.Record, last func()) error {
			if err := s.run("disconnect", r.Name); err != nil {
				return err
			}
			first := make(chan error, 1)
			go func() { first <- s.run(s.connectArgs(r.Target.NQN)...) }()
			eventually(s.t, "the first of them waits", func() bool { return s.waitsFor(r) })
			s.t.Cleanup(func() { testenv.Receive(s.t, first, "the end of the first") }) // which the end of the test may cut short
			last()
			return s.run(s.connectArgs(r.Target.NQN, "--duplicate-connect", "--nbd-socket", filepath.Join(s.dir, "second.sock"))...)
		},
		"killed while it recovers": func(s *site, r state.Record, last func()) error {
			cut := make(chan error, 1)
			go func() { cut <- s.run("recover", r.Name) }()
			var now state.Record
			eventually(s.t, "the next server has connected", func() bool {
				now = s.record(r.Target.NQN)
				return now.Alive && len(now.Controllers) > len(r.Controllers)
			})
			s.kill(now)
			if err := testenv.Receive(s.t, cut, "the end of recover"); err == nil {
				return errors.New("recovered by a server that was killed")
			}
			last()
			return s.run("recover", r.Name)
		},
		"command killed while it recovers": func(s *site, r state.Record, last func()) error {
			cmd := exec.CommandContext(s.t.Context(), self(), "--run-dir", s.dir, "recover", r.Name)
			cmd.Env = append(os.Environ(), "UBLK_NVMEOF_TEST_MAIN=1")
			if err := cmd.Start(); err != nil {
				return err
			}
			eventually(s.t, "the next server waits", func() bool { return s.waitsFor(r) })
			if err := cmd.Process.Kill(); err != nil {
				return err
			}
			_ = cmd.Wait() // it was killed
			eventually(s.t, "the server has given itself up", func() bool { return !s.record(r.Target.NQN).Alive })
			last()
			return s.run("recover", "--all")
		},
		"failed recover and connect": func(s *site, r state.Record, last func()) error {
			if err := s.run("recover", r.Name, "--output-format=json", "--run-dir", s.dir+"/none"); err == nil {
				return errors.New("recovered from a run directory that does not exist")
			}
			last()
			return s.run(s.connectArgs(r.Target.NQN)...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nqn := "nqn.2026-01.org.example:" + strings.ReplaceAll(name, " ", "-")
			s := newSite(t, nqn)
			d := newDisk("nothing")
			s.put(nqn, d)
			r := s.connect(nqn)
			c := s.client(r)
			held := d.hold("old")
			go c.do(nbdWrite, 0, block("old"), nbdPatience) // its server will not answer
			testenv.Receive(t, held, "the write at the target")
			s.kill(r)

			var timer *time.Timer
			err := next(s, r, func() { timer = time.AfterFunc(4*time.Second, d.release) })
			if err != nil {
				t.Fatal(err)
			}
			if timer.Stop() {
				t.Error("the next server is ready while the target works on the dead one's write")
			}
			if err := s.client(s.record(nqn)).write("new"); err != nil {
				t.Fatal(err)
			}
			d.release()
			time.Sleep(200 * time.Millisecond) // for the old write, if it is still to come
			if got := d.text(3); got != "new" {
				t.Errorf("the disk has the %q write", got)
			}
		})
	}
}

// waitsFor reports whether a live server has inherited the controllers of a dead one.
func (s *site) waitsFor(dead state.Record) bool {
	records, err := state.Dir(s.dir).List()
	if err != nil {
		s.t.Fatal(err)
	}
	return slices.ContainsFunc(records, func(r state.Record) bool {
		return r.Alive && slices.Contains(r.Controllers, dead.Controllers[0])
	})
}

// run runs the program.
func (s *site) run(args ...string) error {
	_, stderr, code := s.program(args...)
	if code != exit.OK {
		return fmt.Errorf("%q: exit code %d, %s", args, code, stderr)
	}
	return nil
}

// TestDeadServerLeaves: the next server tells the target that the last one has died. Otherwise the
// target would notice it after the keep alive timeout, which is longer here than a test may take.
func TestDeadServerLeaves(t *testing.T) {
	const nqn = "nqn.2026-01.org.example:a"
	l := newLate(t, nqn)
	first := l.connect(nqn, "-k", "300", "--path", l.second.String())
	eventually(t, "both paths are live", func() bool { return len(l.record(nqn).Controllers) == 2 })
	l.kill(first)
	if err := l.run("recover", first.Name); err != nil {
		t.Fatal(err)
	}
	// The last server of a chain of dead ones leaves for all of them.
	second := l.record(nqn)
	l.kill(second)
	if err := l.run("recover", first.Name); err != nil {
		t.Fatal(err)
	}
	c := l.client(l.record(nqn))
	if err := c.write("data"); err != nil {
		t.Error(err)
	}
}

// TestClientsStayWithTheirDisk: the client of a server that died never comes to
// another subsystem, whatever is done meanwhile.
func TestClientsStayWithTheirDisk(t *testing.T) {
	t.Parallel()
	const a, b = "nqn.2026-01.org.example:a", "nqn.2026-01.org.example:b"
	s := newSite(t, a, b)
	s.put(a, newDisk("disk a"))
	s.put(b, newDisk("disk b"))
	first := s.connect(a)
	path := socketOf(t, first)
	// again is what a client does that waits for its server.
	again := func(after, want string) {
		t.Helper()
		c, err := dialNBD("unix", path, "1")
		if err != nil {
			if want != "" {
				t.Errorf("after %s: %v", after, err)
			}
			return
		}
		defer c.close()
		if got, err := c.read(6); got != want || err != nil {
			t.Errorf("after %s the client reads %q, %v, want %q", after, got, err, want)
		}
	}
	again("connect a", "disk a")
	s.kill(first)
	second := s.connect(b)
	again("connect b", "")
	if second.Name == first.Name {
		t.Errorf("b got the name %s", second.Name)
	}
	if _, stderr, code := s.program(s.connectArgs(b, "--duplicate-connect", "--nbd-socket", path)...); code != exit.DeviceTaken || !strings.Contains(stderr, a) {
		t.Errorf("b at the address of a: exit code %d, %s", code, stderr)
	}
	again("connect b there", "")
	if err := s.run("gc"); err != nil {
		t.Error(err)
	}
	again("gc", "")
	if err := s.run("recover", first.Devices[0].URI); err != nil {
		t.Error(err)
	}
	again("recover a", "disk a")
	// The server may take a moment to see that its client has left.
	eventually(t, "a is disconnected", func() bool { return s.run("disconnect", "-d", first.Name) == nil })
	if err := errors.Join(s.run("disconnect", b), s.run(s.connectArgs(b)...)); err != nil {
		t.Error(err)
	}
	again("disconnect a, connect b", "")
}

// TestRecoverAnotherNamespace: a namespace that took the id of another one is not
// served to the clients of that.
func TestRecoverAnotherNamespace(t *testing.T) {
	t.Parallel()
	const nqn = "nqn.2026-01.org.example:a"
	s := newSite(t, nqn)
	s.put(nqn, newDisk("disk a"))
	r := s.connect(nqn)
	s.kill(r)
	if err := s.subs[nqn].RemoveNamespace(1); err != nil {
		t.Fatal(err)
	}
	s.put(nqn, newDisk("disk b"))
	for _, args := range [][]string{{"recover", "--all"}, {"recover", nqn}, s.connectArgs(nqn)} {
		if _, stderr, code := s.program(args...); code == exit.OK || !strings.Contains(stderr, "had UUID "+r.Devices[0].UUID) {
			t.Errorf("%q: exit code %d, %s", args, code, stderr)
		}
		if c, err := dialNBD("unix", socketOf(t, r), "1"); err == nil {
			c.close()
			t.Errorf("%q: a client is served", args)
		}
		if now := s.record(nqn); now.Name != r.Name || now.Alive || !slices.Equal(now.Devices, r.Devices) || !slices.Equal(now.Args, r.Args) {
			t.Errorf("%q: on record %+v", args, now)
		}
	}
	if err := s.run("disconnect", nqn); err != nil {
		t.Error(err)
	}
	if c := s.client(s.connect(nqn)); c != nil {
		if got, err := c.read(6); got != "disk b" || err != nil {
			t.Errorf("connected anew: %q, %v", got, err)
		}
	}
}

// TestRecordsStay: what a dead server left is there until it is recovered or given up,
// and a recovery that fails says so.
func TestRecordsStay(t *testing.T) {
	t.Parallel()
	const a, b = "nqn.2026-01.org.example:a", "nqn.2026-01.org.example:b"
	s := newSite(t, a, b)
	disks := map[string]*disk{a: newDisk("disk a"), b: newDisk("disk b")}
	s.put(a, disks[a])
	s.put(b, disks[b])
	first := s.connect(a)
	s.kill(first)
	stays := func(after string) {
		t.Helper()
		records, err := state.Dir(s.dir).List()
		if err != nil || len(records) == 0 || records[0].Name != first.Name || records[0].Alive ||
			!slices.Equal(records[0].Devices, first.Devices) || !slices.Equal(records[0].Args, first.Args) {
			t.Fatalf("after %s: %+v, %v", after, records, err)
		}
	}
	stays("its death")
	second := s.connect(b)
	stays("connect b")
	if out, _, code := s.program("gc"); code != exit.OK || !strings.Contains(out, "kept "+first.Name) {
		t.Errorf("gc: exit code %d, %s", code, out)
	}
	stays("gc")
	if err := s.run("disconnect", b); err != nil {
		t.Error(err)
	}
	_ = second
	stays("disconnect b")
	s.close()
	for range 2 {
		if _, stderr, code := s.program("recover", "--all"); code == exit.OK || !strings.Contains(stderr, first.Name) {
			t.Errorf("recover without a target: exit code %d, %s", code, stderr)
		}
		stays("recover without a target")
	}
	s.open(a)
	if _, stderr, code := s.program("recover", "--all"); code == exit.OK {
		t.Errorf("recover without a namespace: exit code %d, %s", code, stderr)
	}
	stays("recover without a namespace")
	bad := filepath.Join(s.dir, "ctrl7")
	if err := os.Mkdir(bad, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bad, "state.json"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	uuid := parseUUID(t, first.Devices[0].UUID)
	late := make(chan error, 1)
	go func() { // the port is there first
		time.Sleep(time.Second)
		_, err := s.subs[a].AddNamespace(target.NamespaceConfig{NSID: 1, Store: disks[a], UUID: uuid})
		late <- err
	}()
	if _, stderr, code := s.program("recover", "--all"); code == exit.OK || !strings.Contains(stderr, filepath.Join(bad, "state.json")) || strings.Contains(stderr, first.Name+":") {
		t.Errorf("recover, and a record cannot be read: exit code %d, %s", code, stderr)
	}
	if err := testenv.Receive(t, late, "the namespace"); err != nil {
		t.Fatal(err)
	}
	if got, err := s.client(s.record(a)).read(6); got != "disk a" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// TestNamespaceReplacedUnderClient: an export stays with its namespace while a client
// uses it; when the client has left, the namespace that took its place is offered.
func TestNamespaceReplacedUnderClient(t *testing.T) {
	const nqn = "nqn.2026-01.org.example:a"
	s := newSite(t, nqn)
	s.put(nqn, newDisk("disk a"))
	r := s.connect(nqn)
	c := s.client(r)
	if err := s.subs[nqn].RemoveNamespace(1); err != nil {
		t.Fatal(err)
	}
	eventually(t, "I/O fails", func() bool { _, err := c.read(6); return err != nil })
	s.put(nqn, newDisk("disk b"))
	time.Sleep(1500 * time.Millisecond) // for the server to take notice
	if got, err := c.read(6); err == nil {
		t.Errorf("the client reads %q of a namespace that is not its own", got)
	}
	c.close()
	eventually(t, "the new namespace is offered", func() bool {
		c, err := dialNBD("unix", socketOf(t, r), "1")
		if err != nil {
			return false
		}
		defer c.close()
		got, err := c.read(6)
		return err == nil && got == "disk b"
	})
	if now := s.record(nqn); len(now.Devices) != 1 || now.Devices[0].UUID == r.Devices[0].UUID {
		t.Errorf("on record %+v, was %+v", now.Devices, r.Devices)
	}
}

func parseUUID(t *testing.T, text string) nvme.UUID {
	t.Helper()
	id, err := nvme.ParseUUID(text)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in vain waited until %s", what)
		}
	}
}

// TestFullRunDirectory: a controller that cannot be put on record gets no I/O.
func TestFullRunDirectory(t *testing.T) {
	const nqn = "nqn.2026-01.org.example:a"
	s := newSite(t, nqn)
	d := newDisk("disk a")
	s.put(nqn, d)
	r := s.connect(nqn)
	c := s.client(r)
	// As a full file system does, this keeps the record from being written.
	blocked := filepath.Join(s.dir, r.Name, "state.json.new")
	if err := os.MkdirAll(filepath.Join(blocked, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.subs[nqn].DropControllers()
	answered := make(chan error, 1)
	go func() { answered <- c.write("new") }()
	select {
	case err := <-answered:
		t.Errorf("written over a controller that is not on record: %v", err)
		answered <- err
	case <-time.After(3 * time.Second):
	}
	if now := s.record(nqn); !slices.Equal(now.Controllers, r.Controllers) {
		t.Errorf("on record %v, was %v", now.Controllers, r.Controllers)
	}
	if err := os.RemoveAll(blocked); err != nil {
		t.Fatal(err)
	}
	if err := testenv.Receive(t, answered, "the answer"); err != nil {
		t.Error(err)
	}
	// While there is no association, list shows the last controller that it has seen.
	eventually(t, "the controller in use is on record", func() bool {
		status, _, _ := s.program("list", "-o", "json")
		var l struct {
			Controllers []struct {
				State  string
				CNTLID uint16
			}
		}
		err := json.Unmarshal([]byte(status), &l)
		return err == nil && len(l.Controllers) == 1 && l.Controllers[0].State == "live" &&
			slices.ContainsFunc(s.record(nqn).Controllers, func(c state.Controller) bool { return c.CNTLID == l.Controllers[0].CNTLID })
	})
}

// TestHangup: the end of a terminal or of a session does not end a server, whose
// descriptors are its own.
func TestHangup(t *testing.T) {
	const nqn = "nqn.2026-01.org.example:a"
	s := newSite(t, nqn)
	s.put(nqn, newDisk("disk a"))
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	cmd := exec.CommandContext(t.Context(), self(), append([]string{"--run-dir", s.dir}, s.connectArgs(nqn)...)...)
	cmd.Env = append(os.Environ(), "UBLK_NVMEOF_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0")
	cmd.ExtraFiles = []*os.File{write}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	write.Close()
	if err := read.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := read.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the server has a descriptor of its caller: %v", err)
	}
	r := s.record(nqn)
	c := s.client(r)
	text, err := os.ReadFile("/proc/" + strconv.Itoa(r.Process.PID) + "/stat")
	if fields := strings.Fields(string(text)); err != nil || fields[5] != fields[0] {
		t.Errorf("session of the server: %s, %v", text, err)
	}
	for range 3 {
		if err := syscall.Kill(r.Process.PID, syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	log := func() string {
		text, _ := os.ReadFile(filepath.Join(s.dir, r.Name, "log"))
		return string(text)
	}
	eventually(t, "SIGHUP is in the log", func() bool { return strings.Contains(log(), "SIGHUP is ignored") })
	if got, err := c.read(6); got != "disk a" || err != nil {
		t.Errorf("after SIGHUP: %q, %v", got, err)
	}
	kept, err := os.Open(filepath.Join(s.dir, r.Name, "log")) // it goes with the server
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	if err := syscall.Kill(r.Process.PID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it has ended", func() bool { return !r.Process.Alive() })
	if said, err := io.ReadAll(kept); err != nil || !strings.Contains(string(said), "interrupted by terminated") {
		t.Errorf("the log does not say what ended it: %v\n%s", err, said)
	}
}

// A process that keeps the set of records locked is named by a disconnect that waits for it.
func TestDisconnectNamesLockHolder(t *testing.T) {
	const nqn = "nqn.2026-01.org.example:a"
	s := newSite(t, nqn)
	s.put(nqn, newDisk("disk a"))
	s.connect(nqn)
	lock, err := os.OpenFile(filepath.Join(s.dir, ".lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close() // before the site disconnects what is left
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	err = s.run("disconnect", nqn)
	if want := fmt.Sprintf("does not end: process %d (", os.Getpid()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
}

// TestLockedRunDirectory: whoever can only read the run directory cannot keep the
// verbs from it.
func TestLockedRunDirectory(t *testing.T) {
	const nqn = "nqn.2026-01.org.example:a"
	s := newSite(t, nqn)
	s.put(nqn, newDisk("disk a"))
	r := s.connect(nqn)
	s.kill(r)
	dir, err := os.Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for _, args := range [][]string{{"recover", "--all"}, {"gc"}, {"disconnect", "--force", nqn}} {
		if err := s.run(args...); err != nil {
			t.Error(err)
		}
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("it took %v", took)
	}
}
