package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Process names a process so that another one, which gets its number later, is
// not taken for it.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after boot
	Boot  string `json:"boot"`  // of which boot
}

// boot is the identifier of this boot.
var boot = sync.OnceValues(func() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text)), err
})

// Of returns the process that has the given number now.
func Of(pid int) (Process, error) {
	b, err := boot()
	if err != nil {
		return Process{}, fmt.Errorf("identify this boot: %w", err)
	}
	start, _, err := stat(pid)
	if err != nil {
		return Process{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return Process{PID: pid, Start: start, Boot: b}, nil
}

// Alive reports whether the process still runs. A zombie does not.
func (p Process) Alive() bool {
	if b, err := boot(); err != nil || b != p.Boot {
		return false
	}
	start, state, err := stat(p.PID)
	return err == nil && start == p.Start && state != 'Z' && state != 'X'
}

// stat reads what tells processes apart (proc_pid_stat(5), fields 22 and 3).
func stat(pid int) (start uint64, state byte, err error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, err
	}
	// The name, field 2, may contain anything.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 || len(fields[0]) != 1 {
		return 0, 0, fmt.Errorf("%d fields in /proc/%d/stat", len(fields)+2, pid)
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return start, fields[0][0], err
}

// Handle is a process that cannot become another one.
type Handle struct{ fd int }

// Open returns a handle of the process. The error is os.ErrProcessDone if the process has
// ended.
func (p Process) Open() (*Handle, error) {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, os.ErrProcessDone
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", p.PID, err)
	}
	if !p.Alive() {
		unix.Close(fd)
		return nil, os.ErrProcessDone
	}
	return &Handle{fd}, nil
}

// Kill ends the process at once.
func (h *Handle) Kill() error { return h.signal(unix.SIGKILL) }

// Terminate asks the process to end.
func (h *Handle) Terminate() error { return h.signal(unix.SIGTERM) }

func (h *Handle) signal(s unix.Signal) error {
	err := unix.PidfdSendSignal(h.fd, s, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// Wait waits until the process has ended.
func (h *Handle) Wait(ctx context.Context) error {
	const slice = 50 // milliseconds between two looks at ctx
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(h.fd), Events: unix.POLLIN}}, slice)
		switch {
		case n > 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("wait for process: %w", err)
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
	}
}

// Close releases the handle.
func (h *Handle) Close() error { return unix.Close(h.fd) }
