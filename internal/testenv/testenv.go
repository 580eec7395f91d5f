// Package testenv lets a test say what it needs of the machine it runs on.
package testenv

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
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

// Rounds returns how often a test repeats what it does: few times, or as often as the
// environment variable UN_SOAK says.
func Rounds(few int) int {
	n, err := strconv.Atoi(os.Getenv("UN_SOAK"))
	if err != nil || n < 1 {
		return few
	}
	return n
}
