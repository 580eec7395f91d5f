package state

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"sync"
	"testing"
	"time"
)

var (
	lab = Target{Address: netip.MustParseAddrPort("10.0.2.15:4420"), NQN: "nqn.lab", HostNQN: "nqn.host"}
	ctx = context.Background()
)

func nothingLeft(context.Context, Record) bool { return true }

func reserve(t *testing.T, d Dir, target Target) *Entry {
	t.Helper()
	e, err := d.Reserve(ctx, target, []string{"--nqn=" + target.NQN}, false, nothingLeft)
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

// deadProcess is a process that has ended, and was waited for.
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
	if err := e.Remove(); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(string(d), "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestDuplicates(t *testing.T) {
	d := Dir(t.TempDir())
	reserve(t, d, lab)
	var dup *DuplicateError
	if _, err := d.Reserve(ctx, lab, nil, false, nothingLeft); !errors.As(err, &dup) || dup.Record.Name != "ctrl0" {
		t.Errorf("%v, want a duplicate of ctrl0", err)
	}
	if e, err := d.Reserve(ctx, lab, nil, true, nothingLeft); err != nil || e.Name != "ctrl1" {
		t.Errorf("%v, %v", e, err)
	}
	for _, change := range []func(*Target){
		func(x *Target) { x.NQN = "nqn.other" },
		func(x *Target) { x.HostNQN = "nqn.other" },
		func(x *Target) { x.Address = netip.MustParseAddrPort("10.0.2.15:4421") },
		func(x *Target) { x.Address = netip.MustParseAddrPort("10.0.2.16:4420") },
	} {
		other := lab
		change(&other)
		reserve(t, d, other)
	}
	if got := list(t, d); len(got) != 6 || got[5].Name != "ctrl5" {
		t.Errorf("%+v", got)
	}
}

// What a dead server left is shown, passes to the next server of the same
// target, is in nobody else's way, and goes when nothing of it is left.
func TestDeadServer(t *testing.T) {
	d := Dir(t.TempDir())
	e := reserve(t, d, lab)
	e.Process = deadProcess(t)
	e.Devices = []Device{{ID: 0, NSID: 1}}
	if err := e.Save(); err != nil {
		t.Fatal(err)
	}
	if got := list(t, d); len(got) != 1 || got[0].Alive {
		t.Fatalf("%+v", got)
	}
	asked := 0
	devicesLeft := func(_ context.Context, r Record) bool {
		asked++
		if r.Name != "ctrl0" || len(r.Devices) != 1 {
			t.Errorf("asked about %+v", r)
		}
		return false
	}
	other := lab
	other.NQN = "nqn.other"
	for i, c := range []struct {
		target    Target
		duplicate bool
	}{{other, false}, {lab, true}} {
		e, err := d.Reserve(ctx, c.target, nil, c.duplicate, devicesLeft)
		if want := "ctrl1"; err != nil || asked != i+1 || e.Name != want || len(e.Devices) != 0 {
			t.Fatalf("%v, %v, asked %d times, want %s", e, err, asked, want)
		}
		if err := e.Remove(); err != nil {
			t.Fatal(err)
		}
	}
	heir, err := d.Reserve(ctx, lab, []string{"--x"}, false, devicesLeft)
	if err != nil || heir.Name != "ctrl0" || len(heir.Devices) != 1 || heir.Phase != Connecting {
		t.Fatalf("%+v, %v", heir, err)
	}
	if got := list(t, d); len(got) != 1 || !got[0].Alive || len(got[0].Devices) != 1 {
		t.Fatalf("%+v", got)
	}
	heir.Process = deadProcess(t)
	if err := heir.Save(); err != nil {
		t.Fatal(err)
	}
	if third := reserve(t, d, other); third.Name != "ctrl0" {
		t.Errorf("%s, want the name that is free again", third.Name)
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
	if ok, err := d.Clear(ctx, e.Name, func(context.Context, Record) bool { return false }); ok || err != nil || len(list(t, d)) != 1 {
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
	if p.Alive() { // not waited for: a zombie
		t.Error("a zombie is alive")
	}
	cmd.Wait()
	if err := h.Kill(); err != nil {
		t.Errorf("kill again: %v", err)
	}
}

// Two servers that start at the same time do not both get the target.
func TestReserveRace(t *testing.T) {
	d := Dir(t.TempDir())
	var wg sync.WaitGroup
	won := make(chan string, 8)
	for range cap(won) {
		wg.Go(func() {
			e, err := d.Reserve(ctx, lab, nil, false, nothingLeft)
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

func TestLockIsBounded(t *testing.T) {
	d := Dir(t.TempDir())
	unlock, err := d.lock(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := d.Reserve(short, lab, nil, false, nothingLeft); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want a deadline", err)
	}
}

// What nobody can read is shown and left alone; what has no state is taken
// over; what is not ours is not seen.
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
	got := list(t, d)
	if len(got) != 2 || got[0].Name != "ctrl0" || got[0].Err == nil || got[1].Name != "ctrl2" || got[1].Err == nil {
		t.Errorf("%+v", got)
	}
	e, err := d.Reserve(ctx, lab, nil, false, func(_ context.Context, r Record) bool {
		t.Errorf("asked about %s", r.Name)
		return true
	})
	if err != nil || e.Name != "ctrl1" {
		t.Errorf("%v, %v", e, err)
	}
}
