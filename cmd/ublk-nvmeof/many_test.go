package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// tooMuch is the error of a connect whose buffers do not fit: how much they would be
// and how much is available, and the flags that change it.
var tooMuch = regexp.MustCompile(`^ublk-nvmeof: connect: .*[0-9] [KMGT]iB.*[0-9] [KMGT]iB.*available.*\n$`)

// TestManyNamespaces connects to 1024 namespaces. They are all served, or refused
// before memory is taken, with the figures and the flags.
func TestManyNamespaces(t *testing.T) {
	const namespaces = 1024
	dir, nqn := runDir(t), "nqn.2026-01.org.example:many"
	un := func(args ...string) (string, string, exit.Code) {
		t.Helper()
		return execProgram(t, append([]string{"--run-dir", dir}, args...)...)
	}
	target := []string{"target", "-a", loopback(), "-s", "4422", "--provider", "roce", "--queue-size", "1024", "--background", "-n", nqn}
	for range namespaces {
		target = append(target, "--namespace", "ram=1MiB")
	}
	if _, errs, code := un(target...); code != exit.OK {
		t.Fatalf("target: exit code %d, %s", code, errs)
	}
	defer un("target", "stop")
	connect := func(flags ...string) []string {
		return append([]string{"connect", "-a", loopback(), "-s", "4422", "-n", nqn, "--provider", "roce", "--frontend", "nbd-socket"}, flags...)
	}
	served := func() int {
		t.Helper()
		out, _, _ := un("list", "-o", "json")
		var s struct {
			Controllers []struct{ Devices []struct{} }
		}
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			t.Fatalf("list: %v\n%s", err, out)
		}
		n := 0
		for _, c := range s.Controllers {
			n += len(c.Devices)
		}
		return n
	}
	refused := func(errs string, code exit.Code) {
		t.Helper()
		if code == exit.OK || !tooMuch.MatchString(errs) || strings.Count(errs, "\n") != 1 {
			t.Errorf("exit code %d, %q, want a line that matches %v", code, errs, tooMuch)
		}
		for _, flag := range []string{"--queue-size", "--max-io-size", "--namespace"} {
			if !strings.Contains(errs, flag) {
				t.Errorf("%q does not name %s", errs, flag)
			}
		}
		left, err := filepath.Glob(dir + "/*")
		if err != nil {
			t.Fatal(err)
		}
		left = slices.DeleteFunc(left, func(name string) bool { return filepath.Base(name) == "target0" || filepath.Base(name) == ".lock" })
		if n := served(); n > 0 || len(left) > 0 {
			t.Errorf("left behind: %d devices, %q", n, left)
		}
	}

	// What the defaults need depends on the CPUs, and what there is on the machine.
	if _, errs, code := un(connect()...); code != exit.OK {
		refused(errs, code)
	} else {
		if n := served(); n != namespaces {
			t.Errorf("%d of %d namespaces are served", n, namespaces)
		}
		un("disconnect", "-n", nqn)
	}

	// 1 TiB is too much anywhere.
	huge := connect("-i", "1", "-Q", "1024", "--max-io-size", "1MiB")
	began := time.Now()
	_, errs, code := un(huge...)
	refused(errs, code)
	if !strings.Contains(errs, "1.0 TiB") {
		t.Errorf("%q does not say that 1.0 TiB is needed", errs)
	}
	cmd := exec.CommandContext(t.Context(), self(), append([]string{"--run-dir", dir}, append(huge, "--foreground")...)...)
	cmd.Env = append(os.Environ(), "UBLK_NVMEOF_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0")
	if err := cmd.Run(); err == nil {
		t.Error("1 TiB was found")
	}
	if kib := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss; kib > 512<<10 {
		t.Errorf("%d KiB were taken before the refusal", kib)
	}
	t.Logf("refused twice in %v", time.Since(began).Round(time.Millisecond))

	// The flags that it names help.
	if _, errs, code := un(connect("-i", "1", "-Q", "16", "--max-io-size", "16KiB")...); code != exit.OK {
		t.Fatalf("exit code %d, %s", code, errs)
	}
	if n := served(); n != namespaces {
		t.Errorf("%d of %d namespaces are served", n, namespaces)
	}
	if _, errs, code := un("disconnect", "-n", nqn); code != exit.OK {
		t.Errorf("disconnect: exit code %d, %s", code, errs)
	}
}
