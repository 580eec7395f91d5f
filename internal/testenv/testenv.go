// Package testenv lets a test say what it needs of the machine it runs on, and tells it what
// its process has open.
package testenv

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Need ends a test that cannot run: missing, unless nil, says what the machine
// lacks. The test is skipped, or fails where the environment variable UN_REQUIRE,
// a comma-separated list, names the capability as one that must be there.
func Need(t testing.TB, capability string, missing error) {
	t.Helper()
	switch {
	case missing == nil:
	case slices.Contains(strings.Split(os.Getenv("UN_REQUIRE"), ","), capability):
		t.Fatalf("UN_REQUIRE asks for %s: %v", capability, missing)
	default:
		t.Skip(missing)
	}
}

// Receive returns what comes from a channel, or the zero value when it is closed. A test waits for
// nothing without a limit: it would hang, and nobody would know in which of its waits.
func Receive[T any](t testing.TB, from <-chan T, what string) (v T) {
	t.Helper()
	const limit = 2 * time.Minute
	select {
	case v = <-from:
	case <-time.After(limit):
		t.Fatalf("in vain waited %v for %s", limit, what)
	}
	return v
}

// Rounds returns how often a test repeats what it does: few times, or as often as the
// environment variable UN_SOAK says.
func Rounds(few int) int {
	n, err := strconv.Atoi(os.Getenv("UN_SOAK"))
	if err != nil || n < 1 {
		return few
	}
	return n
}

// OpenFiles returns the open descriptors of the process and what they lead to. It leaves out the
// files in which the Go runtime looks up the CPU limit of its control group, which it opens by
// itself at any time.
func OpenFiles(t testing.TB) map[int]string {
	t.Helper()
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	open := make(map[int]string)
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || strings.HasPrefix(to, "/sys/fs/cgroup/") {
			continue // it was the descriptor of ReadDir, or it is the runtime's
		}
		open[fd] = to
	}
	return open
}
