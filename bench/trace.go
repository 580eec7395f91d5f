package main

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"strconv"

	"golang.org/x/sys/unix"
)

// The kernel's histogram of system calls by thread and number. Unlike ptrace it
// hardly slows the server down, which would change its batches.
const (
	syscallTrace = "/sys/kernel/tracing/events/raw_syscalls/sys_enter/"
	syscallKeys  = "hist:keys=common_pid,id:size=4096"
)

// traceSyscalls starts the histogram; it counts until the VM ends.
func traceSyscalls() error {
	// Not os.WriteFile: the trigger file drops its triggers when it is truncated.
	f, err := os.OpenFile(syscallTrace+"trigger", os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return fmt.Errorf("trace system calls: %w", err)
	}
	defer f.Close()
	if _, err := f.WriteString(syscallKeys); err != nil {
		return fmt.Errorf("trace system calls: %w", err)
	}
	return nil
}

// readSyscalls gives the counts so far of some threads, by number.
func readSyscalls(threads []int) (map[int]uint64, error) {
	data, err := os.ReadFile(syscallTrace + "hist")
	if err != nil {
		return nil, err
	}
	return parseSyscalls(data, threads)
}

var syscallLine = regexp.MustCompile(`(?m)^\{ common_pid: *(\d+), id: *(\d+) \} hitcount: *(\d+)`)

func parseSyscalls(data []byte, threads []int) (map[int]uint64, error) {
	if i := bytes.LastIndex(data, []byte("Dropped: ")); i >= 0 {
		if rest := bytes.TrimSpace(data[i+len("Dropped: "):]); !bytes.Equal(rest, []byte("0")) {
			return nil, fmt.Errorf("trace system calls: the kernel dropped %s", rest)
		}
	}
	wanted := make(map[int]bool)
	for _, t := range threads {
		wanted[t] = true
	}
	counts := make(map[int]uint64)
	for _, m := range syscallLine.FindAllSubmatch(data, -1) {
		thread, _ := strconv.Atoi(string(m[1])) // digits, by the expression
		number, _ := strconv.Atoi(string(m[2]))
		n, err := strconv.ParseUint(string(m[3]), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("parse system calls: %w", err)
		}
		if wanted[thread] {
			counts[number] += n
		}
	}
	return counts, nil
}

// syscallName names the calls that a server makes.
func syscallName(number int) string {
	if name, ok := syscallNames[number]; ok {
		return name
	}
	return "syscall " + strconv.Itoa(number)
}

var syscallNames = map[int]string{
	unix.SYS_IO_URING_ENTER: "io_uring_enter", unix.SYS_IO_URING_REGISTER: "io_uring_register",
	unix.SYS_READ: "read", unix.SYS_WRITE: "write", unix.SYS_IOCTL: "ioctl", unix.SYS_POLL: "poll",
	unix.SYS_EPOLL_PWAIT: "epoll_pwait", unix.SYS_FUTEX: "futex", unix.SYS_NANOSLEEP: "nanosleep",
	unix.SYS_SCHED_YIELD: "sched_yield", unix.SYS_MADVISE: "madvise", unix.SYS_TGKILL: "tgkill",
	unix.SYS_RT_SIGRETURN: "rt_sigreturn", unix.SYS_GETPID: "getpid", unix.SYS_PREAD64: "pread64",
	unix.SYS_PWRITE64: "pwrite64", unix.SYS_TIMERFD_SETTIME: "timerfd_settime",
}
