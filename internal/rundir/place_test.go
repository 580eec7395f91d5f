package rundir

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestPlaceOfOthers: a target uses no directory that other users could have prepared.
func TestPlaceOfOthers(t *testing.T) {
	mode := func(t *testing.T, dir string, m os.FileMode) {
		t.Helper()
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, m); err != nil {
			t.Fatal(err)
		}
	}
	group := func(t *testing.T, dir string, gid int) {
		t.Helper()
		if err := os.Chown(dir, -1, gid); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		prepare func(t *testing.T, run string)
		want    string // empty: the place can be taken
	}{
		"new":                  {func(*testing.T, string) {}, ""},
		"left by a target":     {func(t *testing.T, run string) { mode(t, filepath.Join(run, "target0"), 0o755) }, ""},
		"sticky":               {func(t *testing.T, run string) { mode(t, run, 0o777|os.ModeSticky) }, ""},
		"writable by all":      {func(t *testing.T, run string) { mode(t, run, 0o777) }, "everybody can write"},
		"writable by a group":  {func(t *testing.T, run string) { mode(t, run, 0o770); group(t, run, 12) }, "group 12 can write"},
		"its place is for all": {func(t *testing.T, run string) { mode(t, filepath.Join(run, "target0"), 0o777|os.ModeSticky) }, "others can write"},
		"a link": {func(t *testing.T, run string) {
			mode(t, run, 0o755)
			if err := os.Symlink(t.TempDir(), filepath.Join(run, "target0")); err != nil {
				t.Fatal(err)
			}
		}, "target0"},
	} {
		t.Run(name, func(t *testing.T) {
			run := filepath.Join(t.TempDir(), "run")
			c.prepare(t, run)
			p, err := TakePlace(run, "target")
			if err == nil {
				if info, err := os.Stat(p.Dir); err != nil || info.Mode().Perm()&0o022 != 0 {
					t.Errorf("mode %v, %v", info.Mode(), err)
				}
				if err := p.Leave(); err != nil {
					t.Error(err)
				}
			}
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

// TestPlaceLeft: when a target is not listed any more, its directory is gone. A target
// that takes the place at that moment keeps it.
func TestPlaceLeft(t *testing.T) {
	run := filepath.Join(t.TempDir(), "run")
	for range 200 {
		p, err := TakePlace(run, "target")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(p.Dir, "log"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		left := make(chan error, 1)
		go func() { left <- p.Leave() }()
		for {
			names, err := Places(run, "target")
			if err != nil {
				t.Fatal(err)
			}
			if len(names) == 0 {
				break
			}
		}
		if entries, err := os.ReadDir(run); err != nil || len(entries) > 0 {
			t.Fatalf("left behind: %v, %v", entries, err)
		}
		if err := <-left; err != nil {
			t.Fatal(err)
		}
	}
}

// TestPlaceTakenAtOnce: a target that takes a place while another target leaves it has
// a complete directory.
func TestPlaceTakenAtOnce(t *testing.T) {
	run := filepath.Join(t.TempDir(), "run")
	p, err := TakePlace(run, "target")
	if err != nil {
		t.Fatal(err)
	}
	for range 200 {
		left := make(chan error, 1)
		go func() { left <- p.Leave() }()
		next := &Place{Name: p.Name, Dir: p.Dir}
		for {
			if err = next.take(); !errors.Is(err, unix.EWOULDBLOCK) {
				break
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(p.Dir, "log"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := <-left; err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"log", lockFile} {
			if _, err := os.Stat(filepath.Join(p.Dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		p = next
	}
	if err := p.Leave(); err != nil {
		t.Fatal(err)
	}
}
