package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/internal/testenv"
)

// confined is the variable that makes the program confine itself before it
// begins: to a limit of locked memory in bytes, or by a seccomp filter that
// answers the system calls of io_uring with an errno.
const confined = "UBLK_NVMEOF_TEST_CONFINED"

func init() {
	kind, value, _ := strings.Cut(os.Getenv(confined), "=")
	var n uint64
	if kind == "" {
		return
	}
	if _, err := fmt.Sscan(value, &n); err != nil {
		panic(err)
	}
	os.Unsetenv(confined)
	var err error
	switch kind {
	case "memlock":
		err = syscall.Setrlimit(unix.RLIMIT_MEMLOCK, &syscall.Rlimit{Cur: n, Max: n})
	case "seccomp":
		err = denyIOUring(uint32(n))
	}
	if err != nil {
		panic(err)
	}
}

// denyIOUring answers io_uring_setup, _enter and _register with an errno, in all
// threads and in what they execute, as the profiles of container engines do.
func denyIOUring(errno uint32) error {
	stmt := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	jump := func(code uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: code, K: k, Jt: yes, Jf: no}
	}
	program := []unix.SockFilter{
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, 0), // the number in struct seccomp_data
		jump(unix.BPF_JMP|unix.BPF_JGE|unix.BPF_K, unix.SYS_IO_URING_SETUP, 0, 2),
		jump(unix.BPF_JMP|unix.BPF_JGT|unix.BPF_K, unix.SYS_IO_URING_REGISTER, 1, 0),
		stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ERRNO|errno),
		stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW),
	}
	// The mark belongs to the thread that installs the filter for all of them.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	_, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(program)
	if e != 0 {
		return e
	}
	return nil
}

// execConfined runs connect as a user who is confined.
func execConfined(t *testing.T, tmp, how string, args ...string) (string, exit.Code) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", append([]string{"connect", "-a", "127.66.66.66", "-n", "nqn.a", "--provider", "roce"}, args...)...)
	cmd.Env = []string{"UBLK_NVMEOF_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0", "TMPDIR=" + tmp, "HOME=" + tmp, confined + "=" + how}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: victim, Gid: victim}}
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return string(out), exit.Code(cmd.ProcessState.ExitCode())
}

// A container whose seccomp profile denies io_uring is told so, and not that it
// had to be root, whatever the front end.
func TestSeccompDeniesIOUring(t *testing.T) {
	tmp := stickyDir(t)
	for how, code := range map[string]exit.Code{"seccomp=1": exit.Permission, "seccomp=38": exit.Other} {
		for _, frontend := range []string{"auto", "ublk", "nbd", "nbd-socket"} {
			for _, more := range []string{"--foreground=false", "--foreground"} {
				out, got := execConfined(t, tmp, how, "--frontend", frontend, more)
				if got != code || !strings.Contains(out, "a seccomp filter, as containers have, refuses the system call; allow io_uring_setup") ||
					strings.Contains(out, "root") || strings.Count(out, "\n") != 1 {
					t.Errorf("%s, %s, %s: exit code %d, %s", how, frontend, more, got, out)
				}
			}
		}
	}
}

// A user with a low limit of locked memory is told of it in figures.
func TestMemlockLimit(t *testing.T) {
	tmp := stickyDir(t)
	for _, limit := range []int{0, 64 << 10} {
		out, code := execConfined(t, tmp, fmt.Sprintf("memlock=%d", limit), "--frontend", "nbd-socket")
		if strings.Contains(out, "nobody listens") {
			testenv.Need(t, "kernel that counts io_uring as locked memory", errors.New(out))
		}
		if want := fmt.Sprintf("may lock %d KiB of memory (RLIMIT_MEMLOCK)", limit>>10); code != exit.Other || !strings.Contains(out, want) || !strings.Contains(out, "ulimit -l") {
			t.Errorf("%d bytes: exit code %d, %s", limit, code, out)
		}
	}
}
