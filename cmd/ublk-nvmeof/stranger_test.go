package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/internal/testenv"
)

// Users who have nothing here.
const (
	victim   = 61234
	attacker = 61235
)

// execAs runs the program as another user, with a directory for temporary files
// and without one for what is at run time.
func execAs(t *testing.T, uid uint32, tmp string, args ...string) (stdout, stderr string, code exit.Code) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = []string{"UBLK_NVMEOF_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0", "TMPDIR=" + tmp, "HOME=" + tmp, "PATH=" + os.Getenv("PATH"),
		"LIBNVME_HOSTNQN=" + os.Getenv("LIBNVME_HOSTNQN"), "LIBNVME_HOSTID=" + os.Getenv("LIBNVME_HOSTID"),
		testSystemDir + "=" + os.Getenv(testSystemDir)}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), exit.Code(cmd.ProcessState.ExitCode())
}

// stickyDir is a directory like /tmp.
func stickyDir(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		testenv.Need(t, "root", errors.New("only root can be another user"))
	}
	dir := runDir(t)
	if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	return dir
}

// An attacker makes the victim's run directory first, with a log that is a link
// to a file of the victim, and what is logged would be executed there.
func TestRunDirectoryOfAStranger(t *testing.T) {
	tmp := stickyDir(t)
	profile := filepath.Join(tmp, "profile")
	dir := filepath.Join(tmp, fmt.Sprintf("%s-%d", programName, victim))
	for _, server := range []string{"target0", "ctrl0"} {
		place := filepath.Join(dir, server)
		err := errors.Join(os.MkdirAll(place, 0o755), os.Symlink(profile, filepath.Join(place, "log")),
			os.Chmod(place, 0o777), os.Chown(place, attacker, attacker))
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Chmod(dir, 0o777), os.Chown(dir, attacker, attacker)); err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{
		"target --background -a " + loopback() + " --provider roce -n nqn.a --namespace ram=1MiB",
		"target list",
		"target stop",
		"connect -a " + loopback() + " --provider roce --frontend nbd-socket -n nqn.a",
		"connect --foreground -a " + loopback() + " --provider roce --frontend nbd-socket -n nqn.a",
		"recover --all", "disconnect nqn.a", "gc", "list",
	} {
		stdout, stderr, code := execAs(t, victim, tmp, strings.Fields(args)...)
		want := fmt.Sprintf("run directory %s: it belongs to user %d, not to user %d", dir, attacker, victim)
		if code != exit.Other || stdout != "" || !strings.Contains(stderr, want) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit code %d, %q %q", args, code, stdout, stderr)
		}
	}
	if text, err := os.ReadFile(profile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("written through the link: %q, %v", text, err)
	}
}

// A user without XDG_RUNTIME_DIR and without a stranger gets a directory of his own.
func TestRunDirectoryOfAUser(t *testing.T) {
	tmp := stickyDir(t)
	un := func(args ...string) string {
		t.Helper()
		stdout, stderr, code := execAs(t, victim, tmp, args...)
		if code != exit.OK {
			t.Errorf("%q: exit code %d, %s", args, code, stderr)
		}
		return stdout
	}
	un("target", "--background", "-a", loopback(), "--provider", "roce", "-n", "nqn.a", "--namespace", "ram=1MiB")
	defer un("target", "stop")
	if out := un("target", "list"); !strings.Contains(out, "target0") {
		t.Errorf("%q", out)
	}
	for path, want := range map[string]os.FileMode{
		"": os.ModeDir | 0o755, "target0": os.ModeDir | 0o755, "target0/log": 0o600, "target0/lock": 0o600, "target0/control.sock": os.ModeSocket | 0o600,
	} {
		path = filepath.Join(tmp, fmt.Sprintf("%s-%d", programName, victim), path)
		if info, err := os.Stat(path); err != nil || info.Mode() != want || info.Sys().(*syscall.Stat_t).Uid != victim {
			t.Errorf("%s: %v, %v, want %v", path, info, err, want)
		}
	}
}

// testSystemDir is the variable with the run directory of root.
const testSystemDir = "UBLK_NVMEOF_TEST_SYSTEM_DIR"

func init() {
	if dir := os.Getenv(testSystemDir); dir != "" {
		systemDir = dir
	}
}

// A user who has no servers sees those of root, and may not end them.
func TestUserSeesServersOfRoot(t *testing.T) {
	tmp := stickyDir(t)
	system, own := filepath.Join(tmp, "system"), filepath.Join(tmp, fmt.Sprintf("%s-%d", programName, victim))
	t.Setenv(testSystemDir, system)
	p, _ := startProcess(t)
	record(t, system, "nqn.root", p, state.Device{ID: 3, NSID: 1})
	if stdout, stderr, code := execAs(t, victim, tmp, "list"); code != exit.OK || !strings.Contains(stdout, "nqn.root") {
		t.Errorf("exit code %d, %q %q", code, stdout, stderr)
	}
	if stdout, stderr, code := execAs(t, victim, tmp, "disconnect", "nqn.root"); code == exit.OK || !strings.Contains(stderr, "ctrl0") {
		t.Errorf("exit code %d, %q %q", code, stdout, stderr)
	}
	record(t, own, "nqn.own", p)
	if err := os.Chown(own, victim, victim); err != nil {
		t.Fatal(err)
	}
	if stdout, stderr, code := execAs(t, victim, tmp, "list"); code != exit.OK || !strings.Contains(stdout, "nqn.own") || strings.Contains(stdout, "nqn.root") {
		t.Errorf("exit code %d, %q %q", code, stdout, stderr)
	}
}

// A run directory with a name so long that its sockets could not be connected to
// is refused with the limit.
func TestLongRunDirectory(t *testing.T) {
	long := filepath.Join(runDir(t), strings.Repeat("x", maxRunDir))
	for _, args := range []string{"list", "target list", "connect -a 127.0.0.1 -n nqn.x"} {
		_, stderr, code := program(t, append(strings.Fields(args), "--run-dir", long)...)
		want := fmt.Sprintf("it has %d bytes; want at most %d, because the path of a socket in it has at most 107", len(long), maxRunDir)
		if code != exit.Other || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit code %d, %q", args, code, stderr)
		}
	}
}

// The error of an unsafe run directory names the directory that is not safe, what is
// wrong with it, and the command that mends it. Nobody is told to remove it.
func TestUnsafeRunDirectory(t *testing.T) {
	parent := runDir(t)
	dir := filepath.Join(parent, "run")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		parent, dir os.FileMode
		want        string
	}{
		{0o777, 0o755, fmt.Sprintf("run directory %s is not safe from other users because of %s: everybody can write to it and replace what is in it (mode 0777); "+
			"chmod o-w %s prevents that; --run-dir chooses another directory", dir, parent, parent)},
		{0o755, 0o775, fmt.Sprintf("run directory %s: others can write to it (mode 0775); chmod go-w %s prevents that; --run-dir chooses another directory", dir, dir)},
	} {
		if err := errors.Join(os.Chmod(parent, tt.parent), os.Chmod(dir, tt.dir)); err != nil {
			t.Fatal(err)
		}
		if _, stderr, code := program(t, "list", "--run-dir", dir); code != exit.Other || stderr != "ublk-nvmeof: list: "+tt.want+"\n" {
			t.Errorf("exit code %d, %q, want %q", code, stderr, tt.want)
		}
	}
}
