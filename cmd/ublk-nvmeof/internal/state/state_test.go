package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var (
	lab = Target{Address: netip.MustParseAddrPort("10.0.2.15:4420"), NQN: "nqn.lab", HostNQN: "nqn.host"}
	ctx = context.Background()
)

func nothingLeft(context.Context, Record) (bool, error) { return true, nil }

func reserve(t *testing.T, d Dir, target Target) *Entry {
	t.Helper()
	e, err := d.Reserve(ctx, target, []string{"--nqn=" + target.NQN}, false)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func list(t *testing.T, d Dir) []Record {
	t.Helper()
	r, err := d.List()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// deadProcess returns a process that has ended and was waited for.
func deadProcess(t *testing.T) Process {
	t.Helper()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := Of(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if !p.Alive() {
		t.Error("a running process is not alive")
	}
	cmd.Process.Kill()
	cmd.Wait()
	return p
}

// TestOthers: a server that looks for others does not read its own record.
func TestOthers(t *testing.T) {
	d := Dir(filepath.Join(t.TempDir(), "run"))
	own, other := reserve(t, d, lab), reserve(t, d, Target{Address: lab.Address, NQN: "nqn.other", HostNQN: lab.HostNQN})
	if err := os.WriteFile(filepath.Join(own.dir, stateFile), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := d.Others(own.Name)
	if err != nil || len(got) != 1 || got[0].Name != other.Name || got[0].Err != nil {
		t.Errorf("%v, %v; want %s", got, err, other.Name)
	}
}

func TestLife(t *testing.T) {
	d := Dir(filepath.Join(t.TempDir(), "run"))
	if got := list(t, d); got != nil {
		t.Fatalf("a run directory that does not exist has %v", got)
	}
	e := reserve(t, d, lab)
	got := list(t, d)
	if len(got) != 1 || !got[0].Alive || got[0].Name != "ctrl0" || got[0].Phase != Connecting || got[0].Target != lab {
		t.Fatalf("%+v", got)
	}
	e.Phase = Live
	e.Devices = []Device{{ID: 3, Cookie: 1<<63 + 1, NSID: 7}}
	if err := e.Save(); err != nil {
		t.Fatal(err)
	}
	if got := list(t, d)[0]; !reflect.DeepEqual(got.State, e.State) {
		t.Errorf("got %+v, want %+v", got.State, e.State)
	}
	if st, err := os.Stat(filepath.Join(string(d), "ctrl0")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", st, err)
	}
	if files, _ := filepath.Glob(filepath.Join(string(d), "ctrl0", "*")); len(files) != 1 {
		t.Errorf("beside the state there is %v", files)
	}
	if err := e.Retire(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(string(d), "[^.]*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestDuplicates(t *testing.T) {
	d := Dir(t.TempDir())
	reserve(t, d, lab)
	changed := func(change func(*Target)) Target {
		other := lab
		change(&other)
		return other
	}
	for _, same := range []Target{
		lab,
		changed(func(x *Target) { x.Address = netip.MustParseAddrPort("10.0.2.15:4421") }),
		changed(func(x *Target) { x.Address = netip.MustParseAddrPort("10.0.2.16:4420") }),
	} {
		var dup *DuplicateError
		if _, err := d.Reserve(ctx, same, nil, false); !errors.As(err, &dup) || dup.Record.Name != "ctrl0" {
			t.Errorf("%v: %v, want a duplicate of ctrl0", same, err)
		}
	}
	if e, err := d.Reserve(ctx, lab, nil, true); err != nil || e.Name != "ctrl1" {
		t.Errorf("%v, %v", e, err)
	}
	reserve(t, d, changed(func(x *Target) { x.NQN = "nqn.other" }))
	reserve(t, d, changed(func(x *Target) { x.HostNQN = "nqn.other" }))
	if got := list(t, d); len(got) != 4 || got[3].Name != "ctrl3" {
		t.Errorf("%+v", got)
	}
}

// die makes the process of the record a dead one.
func die(t *testing.T, e *Entry) {
	t.Helper()
	e.Process = deadProcess(t)
	if err := e.Save(); err != nil {
		t.Fatal(err)
	}
}

// The record of a dead server is listed and passes to the next server of the same
// target. It does not disturb other servers, and their start does not remove it.
func TestDeadServer(t *testing.T) {
	d := Dir(t.TempDir())
	e := reserve(t, d, lab)
	e.Devices = []Device{{Kind: NBDSocket, URI: "nbd+unix:///1?socket=/x", NSID: 1}}
	e.Listen = "/x"
	die(t, e)
	if got := list(t, d); len(got) != 1 || got[0].Alive {
		t.Fatalf("%+v", got)
	}
	other := lab
	other.NQN = "nqn.other"
	for _, c := range []struct {
		target    Target
		duplicate bool
	}{{other, false}, {lab, true}} {
		e, err := d.Reserve(ctx, c.target, nil, c.duplicate)
		if err != nil || e.Name != "ctrl1" || e.Inherited || len(e.Devices) != 0 {
			t.Fatalf("%+v, %v", e, err)
		}
		if err := e.Retire(ctx, nil); err != nil {
			t.Fatal(err)
		}
	}
	elsewhere := lab
	elsewhere.Address = netip.MustParseAddrPort("10.0.2.16:4420")
	heir, err := d.Reserve(ctx, elsewhere, []string{"--x"}, false)
	if err != nil || heir.Name != "ctrl0" || !heir.Inherited || len(heir.Devices) != 1 || heir.Listen != "/x" || heir.Phase != Connecting {
		t.Fatalf("%+v, %v", heir, err)
	}
	// Until the new server has taken over everything, the record is as the dead
	// server left it.
	if got := list(t, d); len(got) != 1 || !got[0].Alive || len(got[0].Devices) != 1 || !slices.Equal(got[0].Args, []string{"--nqn=nqn.lab"}) {
		t.Fatalf("%+v", got)
	}
	die(t, heir)
	if third := reserve(t, d, other); third.Name != "ctrl1" {
		t.Errorf("%s, and ctrl0 is a dead server's", third.Name)
	}
	again, err := d.Adopt(ctx, "ctrl0")
	if err != nil || again.Name != "ctrl0" || len(again.Devices) != 1 {
		t.Errorf("%+v, %v", again, err)
	}
	if _, err := d.Adopt(ctx, "ctrl0"); err == nil {
		t.Error("a live server's record was given away")
	}
	if _, err := d.Adopt(ctx, "ctrl9"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("adopt what is not there: %v", err)
	}
}

// The next server of a subsystem gets the controllers of all its dead servers, however
// their records ended, until it is known that they have ended.
func TestControllersAreKept(t *testing.T) {
	elsewhere, stranger, host := lab, lab, lab
	elsewhere.Address = netip.MustParseAddrPort("10.0.2.16:4420")
	stranger.NQN = "nqn.other"
	host.HostNQN = "nqn.host2"
	dies := func(t *testing.T, d Dir, ids ...uint16) *Entry {
		t.Helper()
		e := reserve(t, d, lab)
		e.Controllers = Distinct(append(e.Controllers, controllers(ids...)...))
		e.KeepAlive = max(e.KeepAlive, 7*len(ids))
		die(t, e)
		return e
	}
	cleared := func(t *testing.T, d Dir, e *Entry) {
		t.Helper()
		if ok, err := d.Clear(ctx, e.Name, nothingLeft); !ok || err != nil {
			t.Fatalf("%t, %v", ok, err)
		}
	}
	for _, tt := range []struct {
		name      string
		before    func(t *testing.T, d Dir)
		target    Target
		duplicate bool
		want      []Controller
	}{
		{"connect again", func(t *testing.T, d Dir) { dies(t, d, 3, 4) }, lab, false, controllers(3, 4)},
		{"duplicate", func(t *testing.T, d Dir) { dies(t, d, 3, 4) }, lab, true, controllers(3, 4)},
		{"by another address", func(t *testing.T, d Dir) { dies(t, d, 3, 4) }, elsewhere, false, controllers(3, 4)},
		{"another subsystem", func(t *testing.T, d Dir) { dies(t, d, 3, 4) }, stranger, false, nil},
		{"another host", func(t *testing.T, d Dir) { dies(t, d, 3, 4) }, host, false, nil},
		{"cleared", func(t *testing.T, d Dir) { cleared(t, d, dies(t, d, 3, 4)) }, lab, false, controllers(3, 4)},
		{"cleared twice", func(t *testing.T, d Dir) {
			cleared(t, d, dies(t, d, 3, 4))
			cleared(t, d, dies(t, d, 4, 5))
		}, elsewhere, false, controllers(3, 4, 5)},
		{"ended in disorder", func(t *testing.T, d Dir) {
			if err := reserve(t, d, lab).Retire(ctx, controllers(7)); err != nil {
				t.Fatal(err)
			}
		}, lab, false, controllers(7)},
		{"ended in order", func(t *testing.T, d Dir) {
			if err := reserve(t, d, lab).Retire(ctx, nil); err != nil {
				t.Fatal(err)
			}
		}, lab, false, nil},
		{"cleared, and the next one died before it asked", func(t *testing.T, d Dir) {
			cleared(t, d, dies(t, d, 3, 4))
			die(t, reserve(t, d, lab))
		}, lab, false, controllers(3, 4)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := Dir(filepath.Join(t.TempDir(), "run"))
			tt.before(t, d)
			e, err := d.Reserve(ctx, tt.target, nil, tt.duplicate)
			if err != nil || !slices.Equal(e.Controllers, tt.want) {
				t.Fatalf("%v, %v, want %v", e, err, tt.want)
			}
			saved, err := d.Find(e.Name)
			if err != nil || !slices.Equal(saved.Controllers, tt.want) {
				t.Errorf("on record %v, %v", saved.Controllers, err)
			}
			if slices.Contains(tt.want, atLab(4)) != (saved.KeepAlive == 14) {
				t.Errorf("keep alive timeout %d on record", saved.KeepAlive)
			}
		})
	}
}

// What has ended is asked for no more, by nobody: its id may be another controller's.
// TestInheritedByLiveServer starts two servers after a dead one was given up. The first
// takes over its controllers, and both must wait for them.
func TestInheritedByLiveServer(t *testing.T) {
	d := Dir(filepath.Join(t.TempDir(), "run"))
	dead := reserve(t, d, lab)
	dead.Process, dead.Controllers, dead.KeepAlive = deadProcess(t), controllers(7), 9
	if err := dead.Save(); err != nil {
		t.Fatal(err)
	}
	if done, err := d.Clear(ctx, dead.Name, nothingLeft); !done || err != nil {
		t.Fatal(done, err)
	}
	first := reserve(t, d, lab)
	first.Controllers = append(first.Controllers, atLab(8)) // its own
	if err := first.Save(); err != nil {
		t.Fatal(err)
	}
	second, err := d.Reserve(ctx, lab, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(second.Controllers, controllers(7)) || second.KeepAlive != 9 {
		t.Errorf("the second server waits for %v, keep alive timeout %d", second.Controllers, second.KeepAlive)
	}
}

func TestForget(t *testing.T) {
	d := Dir(t.TempDir())
	first := reserve(t, d, lab)
	first.Controllers = controllers(3, 4)
	die(t, first)
	other := lab
	other.NQN = "nqn.other"
	stranger := reserve(t, d, other)
	stranger.Controllers = controllers(3)
	die(t, stranger)
	e, err := d.Reserve(ctx, lab, nil, true)
	if err != nil || !slices.Equal(e.Controllers, controllers(3, 4)) {
		t.Fatalf("%+v, %v", e, err)
	}
	if err := e.Forget(ctx, controllers(3)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]Controller{first.Name: controllers(4), stranger.Name: controllers(3), e.Name: controllers(3, 4)} {
		if r, err := d.Find(name); err != nil || !slices.Equal(r.Controllers, want) {
			t.Errorf("%s has %v, %v, want %v", name, r.Controllers, err, want)
		}
	}
}

// A subsystem may have several targets that share its disks, each with controllers of its
// own. A target says only of its own controllers that they have ended.
func TestForgetByAddress(t *testing.T) {
	d := Dir(t.TempDir())
	other := lab
	other.Address = netip.MustParseAddrPort("10.0.2.16:4420")
	dead := reserve(t, d, lab)
	dead.Controllers = controllers(3, 4)
	die(t, dead)
	e, err := d.Reserve(ctx, other, nil, true)
	if err != nil || !slices.Equal(e.Controllers, controllers(3, 4)) {
		t.Errorf("at the other address: %+v, %v", e, err)
	}
	if err := e.Forget(ctx, e.Controllers); err != nil {
		t.Fatal(err)
	}
	if err := e.Retire(ctx, nil); err != nil {
		t.Fatal(err)
	}
	again, err := d.Adopt(ctx, dead.Name)
	if err != nil || !slices.Equal(again.Controllers, controllers(3, 4)) {
		t.Errorf("at the same address: %+v, %v", again, err)
	}
}

// If a record cannot be written, the old one remains.
func TestSaveFails(t *testing.T) {
	d := Dir(t.TempDir())
	e := reserve(t, d, lab)
	blocked := filepath.Join(string(d), "ctrl0", "state.json.new")
	if err := os.MkdirAll(filepath.Join(blocked, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	e.Controllers = controllers(9)
	if err := e.Save(); err == nil || !strings.Contains(err.Error(), "state.json") {
		t.Errorf("%v", err)
	}
	if got := list(t, d); len(got) != 1 || got[0].Err != nil || len(got[0].Controllers) != 0 {
		t.Errorf("%+v", got)
	}
	if err := os.RemoveAll(blocked); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(blocked, []byte("left by a process that died"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := e.Save(); err != nil || len(list(t, d)[0].Controllers) != 1 {
		t.Errorf("%v", err)
	}
}

// TestRemovedDirectory removes the run directory of a server, and another server gets the name
// of its record. The first one does not touch that record.
func TestRemovedDirectory(t *testing.T) {
	d := Dir(filepath.Join(t.TempDir(), "run"))
	first := reserve(t, d, lab)
	if err := os.RemoveAll(string(d)); err != nil {
		t.Fatal(err)
	}
	other := lab
	other.NQN = "nqn.other"
	second := reserve(t, d, other)
	if err := second.SaveSecrets(Secrets{Host: "key"}); err != nil || second.Name != first.Name {
		t.Fatalf("%s and %s, %v", first.Name, second.Name, err)
	}
	for what, save := range map[string]func() error{
		"state":   first.Save,
		"keys":    func() error { return first.SaveSecrets(Secrets{Host: "mine"}) },
		"no keys": func() error { return first.SaveSecrets(Secrets{}) },
	} {
		if err := save(); err == nil && what != "no keys" {
			t.Errorf("%s saved", what)
		}
	}
	if err := first.Retire(ctx, controllers(3)); err != nil {
		t.Error(err)
	}
	got := list(t, d)
	if len(got) != 1 || got[0].Target != other {
		t.Fatalf("%+v", got)
	}
	if s, err := got[0].Secrets(); err != nil || s.Host != "key" {
		t.Errorf("%+v, %v", s, err)
	}
	if next := reserve(t, d, lab); !slices.Equal(next.Controllers, controllers(3)) {
		t.Errorf("the next server of the subsystem waits for %v", next.Controllers)
	}
}

func TestClear(t *testing.T) {
	d := Dir(filepath.Join(t.TempDir(), "run"))
	if ok, err := d.Clear(ctx, "ctrl0", nothingLeft); !ok || err != nil {
		t.Errorf("nothing there: %v, %v", ok, err)
	}
	e := reserve(t, d, lab)
	if ok, err := d.Clear(ctx, e.Name, nothingLeft); ok || err == nil {
		t.Errorf("alive: %v, %v", ok, err)
	}
	e.Process = deadProcess(t)
	if err := e.Save(); err != nil {
		t.Fatal(err)
	}
	if ok, err := d.Clear(ctx, e.Name, func(context.Context, Record) (bool, error) { return false, nil }); ok || err != nil || len(list(t, d)) != 1 {
		t.Errorf("something left: %v, %v, %v", ok, err, list(t, d))
	}
	if ok, err := d.Clear(ctx, e.Name, nothingLeft); !ok || err != nil || len(list(t, d)) != 0 {
		t.Errorf("nothing left: %v, %v, %v", ok, err, list(t, d))
	}
}

// A process with the same number is not the same process.
func TestProcess(t *testing.T) {
	self, err := Of(os.Getpid())
	if err != nil || !self.Alive() {
		t.Fatalf("%+v, %v", self, err)
	}
	for _, p := range []Process{
		{self.PID, self.Start + 1, self.Boot},
		{self.PID, self.Start, "another boot"},
		deadProcess(t),
	} {
		if p.Alive() {
			t.Errorf("%+v is alive", p)
		}
		if h, err := p.Open(); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("open %+v: %v, %v", p, h, err)
		}
	}
}

// kill kills a process, which must not be alive from then on.
func kill(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	p, err := Of(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if p.Alive() {
		t.Error("alive after it was killed")
	}
}

// A process that was killed needs some time to end. It is not alive meanwhile.
func TestKilledProcess(t *testing.T) {
	for range 50 {
		cmd := exec.Command("sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill(t, cmd)
		_ = cmd.Wait() // its status is that of the signal
	}
}

// TestListener is the process that TestKilledListener kills.
func TestListener(t *testing.T) {
	if os.Getenv("STATE_TEST_LISTENER") == "" {
		return
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	for range 64 {
		go func() {
			runtime.LockOSThread()
			select {}
		}()
	}
	memory := make([]byte, 64<<20)
	for i := 0; i < len(memory); i += 4096 {
		memory[i] = 1
	}
	fmt.Println("listens at", l.Addr())
	_, _ = io.Copy(io.Discard, os.Stdin)
	runtime.KeepAlive(memory)
}

// A process that is not alive holds no address any more, even if it had many threads.
func TestKilledListener(t *testing.T) {
	for range 10 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestListener$")
		cmd.Env = append(os.Environ(), "STATE_TEST_LISTENER=1")
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer stdin.Close()
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var address string
		if _, err := fmt.Fscanf(out, "listens at %s\n", &address); err != nil {
			t.Fatal(err)
		}
		kill(t, cmd)
		if l, err := net.Listen("tcp4", address); err != nil {
			t.Error(err)
		} else {
			l.Close()
		}
		_ = cmd.Wait() // its status is that of the signal
	}
}

func TestKillAndWait(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := Of(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	h, err := p.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if err := h.Wait(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait for a running process: %v", err)
	}
	if err := h.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := h.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if p.Alive() { // a zombie, because it was not waited for
		t.Error("a zombie is alive")
	}
	cmd.Wait()
	if err := h.Kill(); err != nil {
		t.Errorf("kill again: %v", err)
	}
}

// If two servers start at the same time, only one gets the target.
func TestReserveRace(t *testing.T) {
	d := Dir(t.TempDir())
	var wg sync.WaitGroup
	won := make(chan string, 8)
	for range cap(won) {
		wg.Go(func() {
			e, err := d.Reserve(ctx, lab, nil, false)
			var dup *DuplicateError
			switch {
			case err == nil:
				won <- e.Name
			case !errors.As(err, &dup):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Errorf("%d servers got the target", len(won))
	}
}

// The wait for a lock that another process holds has a limit, and the error names that
// process.
func TestLockIsBounded(t *testing.T) {
	d := Dir(t.TempDir())
	unlock, err := d.lock(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	_, err = d.Reserve(short, lab, nil, false)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), fmt.Sprintf("process %d (%s", os.Getpid(), os.Args[0])) {
		t.Errorf("%v, want a deadline, and this process", err)
	}
	if _, err := d.Clear(short, "ctrl0", nothingLeft); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("clear: %v", err)
	}
}

// A user who may read the run directory, and locks it, does not keep servers from it.
func TestLockOfTheDirectory(t *testing.T) {
	d := Dir(t.TempDir())
	fd, err := unix.Open(string(d), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Flock(fd, unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if _, err := d.Reserve(short, lab, nil, false); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(filepath.Join(string(d), lockFile)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
}

// A lock file that others could replace or lock is refused.
func TestUnsafeDirectory(t *testing.T) {
	refused := func(name string, d Dir, want string) {
		t.Helper()
		if _, err := d.Reserve(ctx, lab, nil, false); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	root := t.TempDir()
	open := filepath.Join(root, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	refused("writable by all", Dir(open), "mode 0777")
	link := filepath.Join(root, "link")
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	refused("a link", Dir(link), "symbolic link")
	planted := Dir(t.TempDir())
	victim := filepath.Join(root, "victim")
	if err := os.Symlink(victim, filepath.Join(string(planted), lockFile)); err != nil {
		t.Fatal(err)
	}
	refused("a lock that is a link", planted, "symbolic link")
	if _, err := os.Stat(victim); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link was followed: %v", err)
	}
	shared := Dir(t.TempDir())
	if err := os.WriteFile(filepath.Join(string(shared), lockFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(string(shared), lockFile), 0o644); err != nil {
		t.Fatal(err)
	}
	refused("a lock that all may open", shared, "mode 0644")
}

func TestFindHolder(t *testing.T) {
	locks := "1: POSIX  ADVISORY  WRITE 5 08:01:77 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 6 00:19:77 0 EOF\nnonsense\n" +
		"2: FLOCK  ADVISORY  WRITE 7 00:19:177 0 EOF\n3: FLOCK  ADVISORY  WRITE 8 00:19:77 0 EOF\n"
	if got := findHolder([]byte(locks), 77); got != 8 {
		t.Errorf("%d", got)
	}
	if got := findHolder([]byte(locks), 7); got != 0 {
		t.Errorf("%d", got)
	}
}

// An unreadable record is listed and left alone. A directory without a state is taken
// over. Other directories are ignored.
func TestStrangeContents(t *testing.T) {
	d := Dir(t.TempDir())
	write := func(name, text string) {
		t.Helper()
		file := filepath.Join(string(d), name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("ctrl0/state.json", "{")
	write("ctrl1/log", "")
	write("ctrl2/state.json", `{"schema_version": 99}`)
	write("other/state.json", "{}")
	write("ctrlx", "")
	if err := unix.Mkfifo(filepath.Join(string(d), "ctrl1", "state.json.new"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := list(t, d)
	if len(got) != 2 || got[0].Name != "ctrl0" || got[0].Err == nil || got[1].Name != "ctrl2" || got[1].Err == nil {
		t.Errorf("%+v", got)
	}
	e, err := d.Reserve(ctx, lab, nil, false)
	if err != nil || e.Name != "ctrl1" || len(e.Unreadable) != 2 {
		t.Errorf("%v, %v", e, err)
	}
}

// A damaged record, or one of another version, is named and never removed. A damaged
// record of the same subsystem is not ignored.
func TestDamaged(t *testing.T) {
	good := func(change func(map[string]any)) string {
		m := map[string]any{
			"schema_version": 1, "process": map[string]any{"pid": 1, "start": 2, "boot": "b"}, "phase": "live",
			"target":  map[string]any{"address": "10.0.2.15:4420", "nqn": lab.NQN, "hostnqn": lab.HostNQN},
			"devices": []any{map[string]any{"id": 0, "nsid": 1}},
		}
		change(m)
		text, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	device := func(d map[string]any) string {
		return good(func(m map[string]any) { m["devices"] = []any{d} })
	}
	for _, tt := range []struct {
		name, text, want string
		refused          bool
	}{
		{"good", good(func(map[string]any) {}), "", false},
		{"empty", "", "unexpected end", false},
		{"cut off", good(func(map[string]any) {})[:100], "unexpected end", false},
		{"something after it", good(func(map[string]any) {}) + "x", "after top-level value", false},
		{"newer", good(func(m map[string]any) { m["schema_version"] = 2 }), "schema version 2 is not 1", true},
		{"no process", good(func(m map[string]any) { delete(m, "process") }), "process: pid 0", true},
		{"no NQN", good(func(m map[string]any) { m["target"] = map[string]any{} }), "target: nqn is empty", false},
		{"kind", device(map[string]any{"kind": "floppy", "nsid": 1}), `devices[0]: kind "floppy" is unknown`, true},
		{"id", device(map[string]any{"id": -1, "nsid": 1}), "devices[0]: id -1 is negative", true},
		{"nsid", device(map[string]any{"id": 1}), "devices[0]: nsid is 0", true},
		{"socket", device(map[string]any{"kind": "nbd-socket", "nsid": 1}), "devices[0]: uri is empty", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := Dir(t.TempDir())
			file := filepath.Join(string(d), "ctrl0", "state.json")
			if err := os.Mkdir(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(tt.text), 0o644); err != nil {
				t.Fatal(err)
			}
			r := list(t, d)[0]
			if tt.want == "" {
				if r.Err != nil {
					t.Error(r.Err)
				}
				return
			}
			if r.Err == nil || !strings.Contains(r.Err.Error(), tt.want) || !strings.Contains(r.Err.Error(), file) || r.Name != "ctrl0" {
				t.Errorf("%q: %v, want %q and the file", r.Name, r.Err, tt.want)
			}
			if done, err := d.Clear(ctx, "ctrl0", nothingLeft); done || err == nil {
				t.Errorf("clear: %t, %v", done, err)
			}
			e, err := d.Reserve(ctx, lab, nil, false)
			if tt.refused && (err == nil || !strings.Contains(err.Error(), file)) || !tt.refused && (err != nil || e.Name != "ctrl1") {
				t.Errorf("reserve: %+v, %v", e, err)
			}
			if now, err := os.ReadFile(file); err != nil || string(now) != tt.text {
				t.Errorf("the file is %q, %v", now, err)
			}
		})
	}
	// The file of controllers is not ignored either if it is damaged.
	d := Dir(t.TempDir())
	file := filepath.Join(string(d), controllersFile)
	if err := os.WriteFile(file, []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Reserve(ctx, lab, nil, false); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("%v", err)
	}
	if left := list(t, d); len(left) != 0 {
		t.Errorf("left: %+v", left)
	}
}

// FuzzState parses any text. A state that was parsed can be written and parsed again.
func FuzzState(f *testing.F) {
	f.Add([]byte(`{"schema_version":1,"process":{"pid":1},"target":{"address":"1.2.3.4:5","nqn":"n"},"devices":[{"kind":"nbd","id":1,"nsid":1,"told":{"size":1}}],"controllers":[1]}`))
	f.Add([]byte(`{"schema_version":2}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := parse(text)
		if err != nil {
			return
		}
		for _, d := range s.Devices {
			if d.Path() == "" || d.NSID == 0 {
				t.Errorf("%+v", d)
			}
		}
		again, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := parse(again); err != nil || !reflect.DeepEqual(back, s) {
			t.Errorf("%+v, then %+v, %v", s, back, err)
		}
	})
}
