package process

import (
	"errors"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// TestHugePages: the setting is that of the process, and a program that it executes inherits it.
func TestHugePages(t *testing.T) {
	setting := func() int {
		t.Helper()
		n, err := unix.PrctlRetInt(unix.PR_GET_THP_DISABLE, 0, 0, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	const small = 1 | exceptAdvised
	if os.Getenv("UN_CHILD") != "" {
		if n := setting(); n != small {
			t.Errorf("the setting of the program that was executed is %d, want %d", n, small)
		}
		return
	}
	switch err := UseSmallPages(); {
	case errors.Is(err, unix.EINVAL):
		t.Skip(err) // Linux before 6.18
	case err != nil:
		t.Fatal(err)
	}
	if n := setting(); n != small {
		t.Errorf("the setting is %d, want %d", n, small)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	child := exec.CommandContext(t.Context(), self, "-test.run=^TestHugePages$")
	child.Env = append(os.Environ(), "UN_CHILD=1")
	if out, err := child.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if err := UseHugePages(); err != nil || setting() != 0 {
		t.Errorf("the setting is %d, want 0; %v", setting(), err)
	}
}
