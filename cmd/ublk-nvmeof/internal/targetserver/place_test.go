package targetserver

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestPlaceOfOthers: a target keeps nothing where others could have put something.
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
		want    string // empty: it is taken
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
			p, err := takePlace(run)
			if err == nil {
				if info, err := os.Stat(p.dir); err != nil || info.Mode().Perm()&0o022 != 0 {
					t.Errorf("mode %v, %v", info.Mode(), err)
				}
				if err := p.leave(); err != nil {
					t.Error(err)
				}
			}
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}
