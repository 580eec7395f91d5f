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
	"time"

	"golang.org/x/sys/unix"
)

// Process identifies a process. It does not match another process that gets the same
// number later.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after boot
	Boot  string `json:"boot"`  // identifier of the boot
}

// boot returns the identifier of this boot.
var boot = sync.OnceValues(func() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text)), err
})

// Of returns the process that has this number now.
func Of(pid int) (Process, error) {
	b, err := boot()
	if err != nil {
		return Process{}, fmt.Errorf("identify this boot: %w", err)
	}
	now, err := stat(pid)
	if err != nil {
		return Process{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return Process{PID: pid, Start: now.start, Boot: b}, nil
}

// exitTime is the time that a process which was killed has to end. It has to free its
// memory and files.
const exitTime = 5 * time.Second

// Alive reports whether the process still runs. A zombie does not. If the process was
// killed and is about to end, Alive waits for that, for at most 5 seconds. The first
// thread of a process may be a zombie while others still hold its files.
func (p Process) Alive() bool {
	if b, err := boot(); err != nil || b != p.Boot {
		return false
	}
	now, err := stat(p.PID)
	if err != nil || now.start != p.Start || now.state == 'X' {
		return false
	}
	ending := now.state == 'Z' || now.exiting || killed(p.PID)
	return !ending || !ends(p.PID)
}

// killed reports whether SIGKILL is pending for a process (proc_pid_status(5)).
func killed(pid int) bool {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		name, mask, _ := strings.Cut(line, ":")
		if name != "SigPnd" && name != "ShdPnd" {
			continue
		}
		pending, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
		if err == nil && pending>>(unix.SIGKILL-1)&1 != 0 {
			return true
		}
	}
	return false
}

// ends waits until a process has ended, for at most exitTime, and reports whether it has.
func ends(pid int) bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return errors.Is(err, unix.ESRCH)
	}
	h := Handle{fd}
	defer h.Close()
	ctx, cancel := context.WithTimeout(context.Background(), exitTime)
	defer cancel()
	return h.Wait(ctx) == nil
}

// Stopped reports whether a signal or a debugger has stopped the process.
func (p Process) Stopped() bool {
	now, err := stat(p.PID)
	return err == nil && now.start == p.Start && (now.state == 'T' || now.state == 't')
}

// status is what the kernel says of a process (proc_pid_stat(5)).
type status struct {
	start   uint64 // field 22
	state   byte   // field 3
	exiting bool   // field 9 says that the process was killed or exits
}

// Flags of a process (include/linux/sched.h).
const (
	pfExiting  = 0x4
	pfSignaled = 0x400
)

func stat(pid int) (status, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return status{}, err
	}
	// The name, field 2, may contain anything.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 || len(fields[0]) != 1 {
		return status{}, fmt.Errorf("%d fields in /proc/%d/stat", len(fields)+2, pid)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return status{}, fmt.Errorf("start time in /proc/%d/stat: %w", pid, err)
	}
	flags, err := strconv.ParseUint(fields[6], 10, 32)
	if err != nil {
		return status{}, fmt.Errorf("flags in /proc/%d/stat: %w", pid, err)
	}
	return status{start, fields[0][0], flags&(pfExiting|pfSignaled) != 0}, nil
}

// Handle refers to a process. It never refers to another process that gets the same
// number later.
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

// Wait waits until the process has ended, or returns the cause of ctx.
func (h *Handle) Wait(ctx context.Context) error {
	const slice = 50 // milliseconds between two checks of ctx
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
