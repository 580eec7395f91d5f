// Package testenv lets a test say what it needs of the machine it runs on.
package testenv

import (
	"os"
	"slices"
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
