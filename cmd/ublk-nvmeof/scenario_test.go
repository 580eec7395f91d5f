package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// TestScenarios runs the scripts of testdata, one after the other. They use the program as a
// user without privileges does: with our own target, over RoCEv2 on the loopback interface,
// and with NBD sockets. Those that need a kernel module are in e2e.
func TestScenarios(t *testing.T) {
	bin := t.TempDir()
	wrapper := fmt.Sprintf("#!/bin/sh\nexec '%s' --run-dir=\"$RUN\" \"$@\"\n", self())
	if err := os.WriteFile(filepath.Join(bin, programName), []byte(wrapper), 0o755); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d scenarios, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			dir := runDir(t)
			t.Cleanup(func() { endScenario(t, dir) })
			testscript.RunT(scenarioT{t}, testscript.Params{
				Files:               []string{file},
				RequireExplicitExec: true,
				Cmds:                map[string]func(*testscript.TestScript, bool, []string){"refuses": refuses, "until": until},
				Setup: func(env *testscript.Env) error {
					for _, name := range []string{"UBLK_NVMEOF_TEST_SHARED", "LIBNVME_HOSTNQN", "LIBNVME_HOSTID"} {
						env.Setenv(name, os.Getenv(name))
					}
					env.Setenv("UBLK_NVMEOF_TEST_MAIN", "1")
					env.Setenv("GORACE", "atexit_sleep_ms=0")
					env.Setenv("RUN", dir)
					env.Setenv("PATH", bin+":"+env.Getenv("PATH"))
					env.Setenv("ADDR", loopback())
					env.Setenv("ADDR2", netip.MustParseAddr(loopback()).Next().String())
					env.Setenv("NQN", "nqn.2026-01.org.example:scenario")
					return nil
				},
			})
		})
	}
}

// endScenario ends what a scenario that failed has left, and complains about it otherwise.
func endScenario(t *testing.T, dir string) {
	left := visible(t, dir)
	if len(left) > 0 && !t.Failed() {
		t.Errorf("left behind: %q", left)
	}
	for _, name := range left {
		end := []string{"disconnect", "--force", "-d", filepath.Base(name)}
		if strings.HasPrefix(end[3], "target") {
			end = []string{"target", "stop", "--target", end[3]}
		}
		cmd := exec.Command(self(), append([]string{"--run-dir", dir}, end...)...)
		cmd.Env = append(os.Environ(), "UBLK_NVMEOF_TEST_MAIN=1")
		_ = cmd.Run() // the test has failed anyway
	}
}

// scenarioT runs a script within its test, not beside others.
type scenarioT struct{ *testing.T }

func (scenarioT) Parallel()                            {}
func (s scenarioT) Run(_ string, f func(testscript.T)) { f(s) }
func (scenarioT) Verbose() bool                        { return testing.Verbose() }

// refuses CODE PATTERN command…: the command ends with that exit code, and writes one line to
// standard error, which matches.
func refuses(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: refuses code pattern command [argument ...]")
	}
	code, err := strconv.Atoi(args[0])
	ts.Check(err)
	pattern, err := regexp.Compile(args[1])
	ts.Check(err)
	stdout, stderr, got := scenarioProgram(ts, args[2:])
	line, rest, complete := strings.Cut(stderr, "\n")
	if got != exit.Code(code) || stdout != "" || !complete || rest != "" || !pattern.MatchString(line) {
		ts.Fatalf("exit code %d, standard output %q, standard error %q; want code %d and one line like %q", got, stdout, stderr, code, args[1])
	}
}

// until PATTERN command…: the command is repeated until its output matches, for at most 30 s.
func until(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: until pattern command [argument ...]")
	}
	pattern, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	var stdout, stderr string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if stdout, stderr, _ = scenarioProgram(ts, args[1:]); pattern.MatchString(stdout) {
			return
		}
	}
	ts.Fatalf("no match for %s; last:\n%s%s", args[0], stdout, stderr)
}

// scenarioProgram runs a command of a script.
func scenarioProgram(ts *testscript.TestScript, args []string) (stdout, stderr string, code exit.Code) {
	err := ts.Exec(args[0], args[1:]...)
	if failed := (*exec.ExitError)(nil); errors.As(err, &failed) {
		code = exit.Code(failed.ExitCode())
	} else {
		ts.Check(err)
	}
	return ts.ReadFile("stdout"), ts.ReadFile("stderr"), code
}
