package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// TestSharedDir: servers tell each other of their controllers in a directory that does not
// depend on the run directory, and leave nothing there.
func TestSharedDir(t *testing.T) {
	notices := func(pattern string) []string {
		t.Helper()
		found, err := filepath.Glob(filepath.Join(sharedDirs()[0], ".made", pattern))
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	s := newSite(t, "nqn.a")
	s.put("nqn.a", newDisk(""))
	r := s.connect("nqn.a")
	if strings.HasPrefix(sharedDirs()[0], s.dir) {
		t.Fatalf("%s is in the run directory", sharedDirs()[0])
	}
	own := fmt.Sprintf("%d-*.json", r.Process.PID)
	if found := notices(own); len(found) != 1 {
		t.Errorf("while the server runs: %q", found)
	}
	if _, stderr, code := s.program("disconnect", "-n", "nqn.a"); code != exit.OK {
		t.Fatalf("disconnect: %s", stderr)
	}
	if found := notices(own); len(found) != 0 {
		t.Errorf("after the server: %q", found)
	}
}
