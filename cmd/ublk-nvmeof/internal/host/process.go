package host

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// SetName sets the name of the process that ps shows.
func SetName(name string) error { return os.WriteFile("/proc/self/comm", []byte(name), 0) }

// CloseOnExec keeps all descriptors but standard input, output and error from
// programs that this process starts or becomes: they may be of the caller's
// locks, pipes or devices. Those that exec.Cmd.ExtraFiles names are passed on.
func CloseOnExec() error {
	err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	if err == nil {
		return nil
	}
	// A container may refuse the system call.
	entries, rerr := os.ReadDir("/proc/self/fd")
	if rerr != nil {
		return fmt.Errorf("keep descriptors from a child: %w", errors.Join(err, rerr))
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// OOMKills is how many processes the kernel has killed since its start because
// memory ran out, of the machine or of a control group.
func OOMKills() (uint64, error) {
	text, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strconv.ParseUint(strings.TrimSpace(n), 10, 64)
		}
	}
	return 0, errors.New("/proc/vmstat has no oom_kill")
}

// Command is what a process was started as, at most 80 bytes of it, on one line.
func Command(pid int) string {
	const enough = 80
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil || len(text) == 0 {
		return "its command is unknown"
	}
	words := strings.ReplaceAll(strings.TrimRight(string(text), "\x00"), "\x00", " ")
	if len(words) > enough {
		words = words[:enough] + "…"
	}
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, words)
}
