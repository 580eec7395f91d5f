package process

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// RingError is an io_uring that cannot be had, with the cause and the remedy.
type RingError struct {
	Why    string
	Remedy string // empty: none is known
	Err    error
}

func (e *RingError) Error() string {
	text := fmt.Sprintf("io_uring cannot be used (%v): %s", e.Err, e.Why)
	if e.Remedy != "" {
		text += "; " + e.Remedy
	}
	return text
}

func (e *RingError) Unwrap() error { return e.Err }

// CheckIOUring says why this process cannot make an io_uring, without which it
// cannot serve anything, and what would help. nil: it can.
func CheckIOUring() error {
	var params [120]byte // struct io_uring_params of linux/io_uring.h
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	switch errno {
	case 0:
		return unix.Close(int(fd))
	case unix.ENOMEM:
		return ExplainMemlock(fmt.Errorf("set up io_uring: %w", errno))
	}
	disabled, _ := os.ReadFile("/proc/sys/kernel/io_uring_disabled") // since Linux 6.6
	status, _ := os.ReadFile("/proc/self/status")
	return explainRing(errno, strings.TrimSpace(string(disabled)), string(status))
}

// explainRing explains an error of io_uring_setup(2), with what is in
// /proc/sys/kernel/io_uring_disabled and /proc/self/status.
func explainRing(errno unix.Errno, disabled, status string) error {
	const enable = "sysctl kernel.io_uring_disabled=0 enables it"
	filtered := false
	for line := range strings.Lines(status) {
		if mode, ok := strings.CutPrefix(line, "Seccomp:"); ok {
			filtered = strings.TrimSpace(mode) == "2"
		}
	}
	switch {
	case errno == unix.EPERM && disabled == "2":
		return &RingError{"the administrator has disabled it for every process", enable, errno}
	case errno == unix.EPERM && disabled == "1" && !filtered:
		return &RingError{"the administrator has disabled it for users without CAP_SYS_ADMIN that are not in the group kernel.io_uring_group", enable, errno}
	case filtered:
		return &RingError{"a seccomp filter, as containers have, refuses the system call",
			"allow io_uring_setup, io_uring_enter and io_uring_register in its seccomp profile (docs/ci.md)", errno}
	case errno == unix.ENOSYS:
		return &RingError{"this kernel is built without it (CONFIG_IO_URING), or a sandbox hides it", "", errno}
	}
	return &RingError{"the kernel refuses it", "", errno}
}

// LoopMemory is about what a loop locks, in KiB.
const LoopMemory = 100

// ExplainMemlock adds to an error of too little memory that the limit of locked
// memory is the cause, if there is one, and what would help. Other errors, and
// nil, are returned as they are.
func ExplainMemlock(err error) error {
	var limit unix.Rlimit
	if !errors.Is(err, unix.ENOMEM) || MayLock() || unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) != nil {
		return err
	}
	return explainMemlock(err, limit.Cur)
}

// explainMemlock is ExplainMemlock for a limit in bytes.
func explainMemlock(err error, limit uint64) error {
	if limit == unix.RLIM_INFINITY {
		return err
	}
	return fmt.Errorf("%w: the processes of this user may lock %d KiB of memory (RLIMIT_MEMLOCK), and each I/O queue takes about %d KiB, "+
		"with an RDMA device its buffers as well; raise the limit (ulimit -l, LimitMEMLOCK= of a service, --ulimit memlock= of a container), or use fewer I/O queues",
		err, limit>>10, LoopMemory)
}

// MayLock reports whether the process has CAP_IPC_LOCK, for which there is no limit.
func MayLock() bool { return capable(unix.CAP_IPC_LOCK) }

// IsAdmin reports whether the process has CAP_SYS_ADMIN over the machine, and not only in a
// user namespace. The drivers for block devices ask for it.
func IsAdmin() bool {
	ids, err := os.ReadFile("/proc/self/uid_map")
	machine := err != nil || strings.Join(strings.Fields(string(ids)), " ") == "0 0 4294967295" // without the file there are no user namespaces
	return machine && capable(unix.CAP_SYS_ADMIN)
}

// capable reports whether the process has a capability in its user namespace. The number
// of the capability is below 32.
func capable(number int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&header, &data[0])
	return err == nil && data[0].Effective&(1<<number) != 0
}
