//go:build linux && cgo && !noverbs

package prepare

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	_ "ublk-nvmeof/rdma/verbs" // a change of it is one of the probe
)

// Package verbs does not change the process of an embedding program. Package prepare
// does.
func TestOnlyPrepareChangesTheProcess(t *testing.T) {
	path, err := exec.LookPath("go")
	if err != nil {
		t.Fatal(err)
	}
	probe := func(tags string, env ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), path, "run", "-tags="+tags, "./testdata/probe")
		cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "RDMAV_") }), env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	if got := probe(""); got != `"" 1` {
		t.Errorf("with package verbs alone: %s", got)
	}
	if got := probe("prepared"); got != `"1" 0` {
		t.Errorf("with package prepare: %s", got)
	}
	if got := probe("prepared", "RDMAV_ALLOW_DISASSOC_DESTROY=0"); got != `"0" 0` {
		t.Errorf("with package prepare and a variable that is set: %s", got)
	}
}
