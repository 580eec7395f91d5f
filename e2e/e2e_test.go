// Package e2e runs the program against the kernel's NVMe-oF target in the VM. The
// scenarios are the txtar files in testdata; README.md says how to write one.
package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// scenarioLimit is the longest time for one script, but for a soak that was asked
// for.
func scenarioLimit() time.Duration {
	if os.Getenv("UN_SOAK") != "" {
		return 2 * time.Hour
	}
	return 4 * time.Minute
}

// The target that lab.sh makes unless told otherwise.
const (
	labAddr = "10.0.2.15"
	labNQN  = "nqn.2026-01.org.example:lab"
)

// labMTU is the MTU of eth0 unless a script chooses another. RDMA takes 4096 bytes
// of it, which makes fewer packets, and the emulated CPU spends its time on
// those.
const labMTU = "4200"

// Where things are; the tests run in the directory of this file.
var (
	e2eDir = must(os.Getwd())
	root   = filepath.Dir(e2eDir)
	build  = filepath.Join(root, "build")
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestMain(m *testing.M) {
	if os.Getenv("UN_VM") == "" {
		fmt.Fprintln(os.Stderr, "e2e: these tests change the machine's devices and run in the VM only: make test-vm")
		os.Exit(1)
	}
	// "lab" for the scripts, beside the program itself.
	bin := must(os.MkdirTemp("", "e2e-bin"))
	err := errors.Join(
		os.Symlink(filepath.Join(e2eDir, "lab.sh"), filepath.Join(bin, "lab")),
		os.Setenv("PATH", strings.Join([]string{bin, build, os.Getenv("PATH")}, ":")))
	if err != nil {
		panic(err)
	}
	holdClock()
	os.Exit(m.Run())
}

// run runs a command that must not fail, and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// shared are the scenarios that depend little on the kernel: they are about this program
// and its own target, about packets on the wire, or about what the program prints. (Linux 6.1
// runs nbd as well.) With several kernels, each one runs its
// share of the groups (UN_SHARE), which take about the same time.
var shared = [...][]string{
	{"discovery", "hostile", "interface", "metrics", "roce-loss", "soak", "soak-grants"},
	{"combined", "doctor", "errors-flags", "errors-host", "errors-target", "force", "in-capsule", "kernel-multipath", "lost-acks", "mtu", "multipath-ports", "nbd", "nvme-cli", "roce-reorder", "soak-frozen"},
}

// long are the scenarios that make soak runs, and make test does not.
var long = []string{"soak-multipath"}

// anothers returns the scenarios that other kernels run, or make soak.
func anothers(t *testing.T) (names []string) {
	t.Helper()
	if os.Getenv("UN_SOAK") == "" {
		names = slices.Clone(long)
	}
	mine, shares := share(t)
	for i, group := range shared {
		if i%shares != mine {
			names = append(names, group...)
		}
	}
	return names
}

// TestScenarios runs the scripts under testdata, one after the other.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("find scripts: %d found, %v", len(files), err)
	}
	others := anothers(t)
	for _, name := range slices.Concat(append(shared[:], long)...) {
		if !slices.Contains(files, filepath.Join("testdata", name+".txtar")) {
			t.Errorf("there is no scenario %s", name)
		}
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".txtar")
		if slices.Contains(others, name) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			leavesNothing(t)
			explainHang(t, scenarioLimit()-20*time.Second)
			run(t, "lab", "rxe", labMTU)
			testscript.RunT(scriptT{t}, testscript.Params{
				Files:               []string{filepath.Join(e2eDir, file)},
				Deadline:            time.Now().Add(scenarioLimit()),
				Cmds:                commands,
				Condition:           condition,
				RequireExplicitExec: true,
				Setup: func(env *testscript.Env) error {
					env.Setenv("ADDR", labAddr)
					env.Setenv("NQN", labNQN)
					env.Setenv("ROOT", root)
					env.Setenv("UN_KERNEL", os.Getenv("UN_KERNEL"))
					env.Setenv("UN_SOAK", os.Getenv("UN_SOAK"))
					env.Setenv("UN_AWAY", os.Getenv("UN_AWAY"))
					goesOn, held := failoverLimits()
					env.Setenv("GOES_ON", goesOn)
					env.Setenv("HELD", held)
					return nil
				},
			})
		})
	}
}

// condition is [kernel:6.12] and the like, for what kernels' targets do
// differently.
func condition(name string) (bool, error) {
	series, ok := strings.CutPrefix(name, "kernel:")
	if !ok {
		return false, fmt.Errorf("unknown condition %q", name)
	}
	return series == os.Getenv("UN_KERNEL"), nil
}

// scriptT runs a script within its test, not beside others, and takes a skip for
// what it is here: a test that did not test.
type scriptT struct{ *testing.T }

func (scriptT) Parallel()                            {}
func (s scriptT) Run(_ string, f func(testscript.T)) { f(s) }
func (s scriptT) Skip(args ...any)                   { s.Fatal(append([]any{"skip:"}, args...)...) }
func (scriptT) Verbose() bool                        { return false } // the phases, and all of what failed

// capabilities are what the VM offers to the tests of packages: without one of
// them a test fails instead of being skipped.
const capabilities = "root,io_uring,read-multishot,ipv6,ublk,rxe,target,nbd,nbd-clients,promtool"

// TestPackages runs the packages' own tests that need such a kernel. UN_PACKAGES
// lists the packages by their directories, each with an optional :PATTERN of
// tests, and UN_SKIP is the pattern of those that are not for the VM; make test-vm
// has built each package as build/test/DIRECTORY.test. For the tests, UN_TARGET is
// the address and the NQN of a target.
func TestPackages(t *testing.T) {
	packages := strings.Fields(os.Getenv("UN_PACKAGES"))
	if len(packages) == 0 {
		t.Fatal("UN_PACKAGES names no package")
	}
	leavesNothing(t)
	for _, args := range [][]string{{"lab", "target"}, {"modprobe", "ublk_drv"}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("lab", "clean").CombinedOutput(); err != nil {
			t.Errorf("lab clean: %v\n%s", err, out)
		}
	})
	for _, p := range packages {
		dir, pattern, _ := strings.Cut(p, ":")
		t.Run(dir, func(t *testing.T) {
			leavesNothing(t)
			cmd := exec.Command(filepath.Join(build, "test", dir+".test"), "-test.v",
				"-test.timeout=5m", "-test.count=1", "-test.run="+pattern, "-test.skip="+os.Getenv("UN_SKIP"))
			cmd.Dir = filepath.Join(root, dir)
			cmd.Env = append(os.Environ(), "UN_REQUIRE="+capabilities, "UN_TARGET="+labAddr+":4420,"+labNQN)
			out, err := cmd.CombinedOutput()
			switch {
			case err != nil:
				t.Fatalf("%v\n%s", err, out)
			case bytes.Contains(out, []byte("--- SKIP")):
				t.Fatalf("a test was skipped\n%s", out)
			case !bytes.Contains(out, []byte("--- PASS")):
				t.Fatalf("no test was run\n%s", out)
			}
			t.Logf("%d tests passed", bytes.Count(out, []byte("--- PASS")))
		})
	}
}
