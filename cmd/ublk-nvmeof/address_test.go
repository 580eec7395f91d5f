package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/internal/testenv"
)

// A name whose first address is not the target's connects to the next one.
func TestConnectToASecondAddress(t *testing.T) {
	if os.Geteuid() != 0 {
		testenv.Need(t, "root", errors.New("only root can have other host names"))
	}
	dir := runDir(t)
	hosts := filepath.Join(dir, "hosts")
	if err := os.WriteFile(hosts, []byte("::1 two-addresses\n"+loopback()+" two-addresses\n127.66.66.66 one-address\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	un := func(args ...string) (string, string, exit.Code) {
		return execProgram(t, append([]string{"--run-dir", dir}, args...)...)
	}
	if _, stderr, code := un("target", "--background", "-a", loopback(), "--provider", "roce", "-n", "nqn.a", "--namespace", "ram=1MiB"); code != exit.OK {
		t.Fatal(stderr)
	}
	defer un("target", "stop")
	defer un("disconnect", "--force", "-n", "nqn.a")
	connect := func(name string) (string, exit.Code) {
		cmd := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-c", `mount --bind "$0" /etc/hosts && exec "$@"`, hosts,
			self(), "--run-dir", dir, "connect", "-a", name, "-n", "nqn.a", "-i", "1", "--provider", "roce", "--frontend", "nbd-socket")
		cmd.Env = append(os.Environ(), "UBLK_NVMEOF_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0")
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return string(out), exit.Code(cmd.ProcessState.ExitCode())
	}
	if out, code := connect("one-address"); code != exit.Rejected && code != exit.Timeout || !strings.Contains(out, "one-address:4420") {
		t.Errorf("a name without a target: exit code %d, %s", code, out)
	}
	out, code := connect("two-addresses")
	if code != exit.OK || !strings.Contains(out, "connected nqn.a at "+loopback()+":4420: ") {
		t.Errorf("exit code %d, %s", code, out)
	}
}
