package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// settleTime is what the kernel and a leaving process get to finish.
const settleTime = 3 * time.Second

// leavesNothing makes the test fail if, at its end, something is there that was
// not there now, or if the kernel complained in between. What remains is cleared
// away as far as possible, so that the next test has a chance.
func leavesNothing(t *testing.T) {
	t.Helper()
	before := remains(t)
	log := openKernelLog(t)
	t.Cleanup(func() {
		left := remaining(t, before)
		for end := time.Now().Add(settleTime); len(left) > 0 && time.Now().Before(end); left = remaining(t, before) {
			time.Sleep(50 * time.Millisecond)
		}
		messages, complaints := log.read(t, warnings[filepath.Base(t.Name())])
		for _, what := range left {
			t.Errorf("left behind: %s", what)
		}
		for _, line := range complaints {
			t.Errorf("kernel: %s", line)
		}
		if t.Failed() {
			t.Logf("kernel messages:\n%s", strings.Join(messages, "\n"))
			t.Log(serverLogs(100))
			clearAway(t, before)
		}
	})
}

// fataler is a test or a script.
type fataler interface {
	Fatalf(format string, args ...any)
}

func remaining(t fataler, before []string) []string {
	return slices.DeleteFunc(remains(t), func(what string) bool { return slices.Contains(before, what) })
}

// remains lists what a finished scenario must not leave, one line each.
func remains(t fataler) []string {
	var found []string
	for _, pattern := range []string{
		"/dev/ublk[bc]*",
		"/run/ublk-nvmeof/*",
		"/sys/block/nbd*/pid",
		"/sys/class/nvme/nvme*",
		"/sys/kernel/config/nvmet/subsystems/*",
		"/sys/kernel/config/nvmet/ports/*",
		"/sys/kernel/config/nullb/nullb*",
	} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatalf("%v", err)
		}
		found = append(found, names...)
	}
	for pid, name := range processes(t) {
		if name == "ublk-nvmeof" {
			found = append(found, fmt.Sprintf("process %d %s", pid, name))
		}
	}
	return append(found, mounts(t)...)
}

// processes maps ids to names; a zombie has ended and does not count.
func processes(t fataler) map[int]string {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatalf("%v", err)
	}
	names := map[int]string{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // ended since
		}
		// pid (name) state …
		_, rest, _ := strings.Cut(string(text), "(")
		i := strings.LastIndex(rest, ") ")
		if i < 0 || strings.HasPrefix(rest[i+2:], "Z") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
			names[pid] = rest[:i]
		}
	}
	return names
}

func mounts(t fataler) []string {
	text, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Fatalf("%v", err)
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 1 {
			found = append(found, "mount "+f[1])
		}
	}
	return found
}

// clearAway is for after a failure only. A target that was there before stays, if
// there is no other.
func clearAway(t *testing.T, before []string) {
	if out, err := exec.Command("ublk-nvmeof", "disconnect", "--force", "-n", labNQN).CombinedOutput(); err != nil {
		t.Logf("disconnect: %v\n%s", err, out)
	}
	lab := false
	for _, what := range remaining(t, before) {
		kind, rest, _ := strings.Cut(what, " ")
		switch kind {
		case "mount":
			_ = unix.Unmount(rest, unix.MNT_DETACH)
		case "process":
			id, _, _ := strings.Cut(rest, " ")
			if pid, err := strconv.Atoi(id); err == nil {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		default:
			lab = true
		}
	}
	if lab {
		if out, err := exec.Command("lab", "clean").CombinedOutput(); err != nil {
			t.Logf("lab clean: %v\n%s", err, out)
		}
	}
}

// complaint matches the kernel's messages that no test may cause.
var complaint = regexp.MustCompile(`\b(BUG|WARNING|Oops|KASAN|UBSAN)\b|Call Trace:|cut here|general protection|` +
	`unable to handle|blocked for more than|lockup|detected stall|refcount_t:|list_(add|del) corruption`)

// warnings are what a scenario has the kernel warn of, by its name (docs/kernel-bugs.md).
var warnings = map[string]*regexp.Regexp{
	"roce-reorder": regexp.MustCompile(`WARNING: .*rxe_comp\.c:.*rxe_completer`),
}

// removalWarning is what the kernel may warn of wherever an rdma_rxe device is deleted
// (docs/kernel-bugs.md).
var removalWarning = regexp.MustCompile(`(?s)WARNING: [^\n]*rxe_verbs\.c:[^\n]*rxe_post_recv.*\bib_mad_recv_done\+`)

// kernelLog reads the kernel's messages from where it was opened.
type kernelLog int

func openKernelLog(t *testing.T) kernelLog {
	t.Helper()
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open /dev/kmsg: %v", err)
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		t.Fatalf("seek /dev/kmsg: %v", err)
	}
	return kernelLog(fd)
}

// read returns all messages, and those among them that are complaints, but for warnings
// that are expected, and closes the log.
func (k kernelLog) read(t *testing.T, expected *regexp.Regexp) (messages, complaints []string) {
	t.Helper()
	defer unix.Close(int(k))
	buf := make([]byte, 8192) // one record at a time, at most 8 KiB
	warning, at := -1, 0      // where in complaints and messages the one begins that goes on
	for {
		n, err := unix.Read(int(k), buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return messages, complaints
		case errors.Is(err, unix.EPIPE): // records were overwritten; the rest follows
			complaints = append(complaints, "messages lost")
			continue
		case err != nil:
			t.Errorf("read /dev/kmsg: %v", err)
			return messages, complaints
		}
		// level,sequence,time,flags;text, then lines that begin with a blank
		record, _, _ := strings.Cut(string(buf[:n]), "\n")
		_, line, _ := strings.Cut(record, ";")
		messages = append(messages, line)
		if complaint.MatchString(line) {
			complaints = append(complaints, line)
		}
		switch {
		case strings.Contains(line, "cut here"):
			warning, at = len(complaints)-1, len(messages)-1
		case warning >= 0 && strings.Contains(line, "end trace"):
			text := strings.Join(messages[at:], "\n")
			if removalWarning.MatchString(text) || expected != nil && expected.MatchString(text) {
				complaints = complaints[:warning]
			}
			warning = -1
		}
	}
}
