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
		messages := log.read(t)
		for _, what := range left {
			t.Errorf("left behind: %s", what)
		}
		for _, line := range complaints(messages, removalWarning, warnings[filepath.Base(t.Name())]) {
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
		"/run/ublk-nvmeof/[^.]*", // the rest is the directory's own
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
	`unable to handle|blocked for more than|lockup|detected stall|refcount_t:|list_(add|del) corruption|` + messagesLost)

// messagesLost stands where the kernel overwrote messages before they were read.
const messagesLost = "messages lost"

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

// read returns all messages, and closes the log.
func (k kernelLog) read(t *testing.T) []string {
	t.Helper()
	defer unix.Close(int(k))
	var messages []string
	buf := make([]byte, 8192) // one record at a time, at most 8 KiB
	for {
		n, err := unix.Read(int(k), buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return messages
		case errors.Is(err, unix.EPIPE): // the rest follows
			messages = append(messages, messagesLost)
			continue
		case err != nil:
			t.Errorf("read /dev/kmsg: %v", err)
			return messages
		}
		// level,sequence,time,flags;text, then lines that begin with a blank
		record, _, _ := strings.Cut(string(buf[:n]), "\n")
		_, line, _ := strings.Cut(record, ";")
		messages = append(messages, line)
	}
}

// complaints are the messages that no test may cause. A warning of the kernel, from "cut
// here" to "end trace", is left out if one of expected, which may be nil, matches it.
func complaints(messages []string, expected ...*regexp.Regexp) []string {
	var found []string
	begin, at := -1, 0 // where in messages and in found the warning begins that goes on
	for i, line := range messages {
		if strings.Contains(line, "cut here") {
			begin, at = i, len(found)
		}
		if complaint.MatchString(line) {
			found = append(found, line)
		}
		if begin < 0 || !strings.Contains(line, "end trace") {
			continue
		}
		text := strings.Join(messages[begin:i], "\n")
		if slices.ContainsFunc(expected, func(e *regexp.Regexp) bool { return e != nil && e.MatchString(text) }) {
			found = found[:at]
		}
		begin = -1
	}
	return found
}

func TestComplaints(t *testing.T) {
	const (
		cut       = "------------[ cut here ]------------"
		removal   = "WARNING: drivers/infiniband/sw/rxe/rxe_verbs.c:1021 at rxe_post_recv+0x103/0x1b0 [rdma_rxe], CPU#1: kworker/u17:0/127"
		removal12 = "WARNING: CPU: 1 PID: 127 at drivers/infiniband/sw/rxe/rxe_verbs.c:1019 rxe_post_recv+0x103/0x1b0 [rdma_rxe]"
		completer = "WARNING: CPU: 3 PID: 80 at drivers/infiniband/sw/rxe/rxe_comp.c:827 rxe_completer+0x12/0x34 [rdma_rxe]"
		call      = "Call Trace:"
		mad       = " ib_mad_recv_done+0x385/0xd50 [ib_core]"
		nvmet     = " nvmet_rdma_recv_done+0x1/0x2 [nvmet_rdma]"
		end       = "---[ end trace 0000000000000000 ]---"
	)
	for _, c := range []struct {
		name     string
		messages []string
		expected *regexp.Regexp
		want     []string
	}{
		{"none", []string{"infiniband rxe0: set active"}, nil, nil},
		{"line", []string{"BUG: kernel NULL pointer dereference"}, nil, []string{"BUG: kernel NULL pointer dereference"}},
		{"lost", []string{messagesLost}, nil, []string{messagesLost}},
		{"removal", []string{"one", cut, removal, call, mad, end, "two"}, nil, nil},
		{"removal, 6.12", []string{cut, removal12, call, mad, end}, nil, nil},
		{"of another queue pair", []string{cut, removal, call, nvmet, end}, nil, []string{cut, removal, call}},
		{"of another place", []string{cut, completer, call, mad, end}, nil, []string{cut, completer, call}},
		{"of a scenario", []string{cut, completer, call, end}, warnings["roce-reorder"], nil},
		{"without an end", []string{cut, removal, call, mad}, nil, []string{cut, removal, call}},
		{"and others", []string{"UBSAN: before", cut, removal, call, mad, end, cut, completer, call, end, mad},
			nil, []string{"UBSAN: before", cut, completer, call}},
	} {
		if got := complaints(c.messages, removalWarning, c.expected); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}
