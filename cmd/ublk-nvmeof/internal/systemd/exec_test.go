package systemd

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func closeOnExec(t *testing.T, fd int) {
	t.Helper()
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
		t.Fatal(err)
	}
}

// execSelf executes this test again, in this process. It returns only an error.
func execSelf() error {
	return unix.Exec("/proc/self/exe", []string{os.Args[0], "-test.run=^TestListener$"}, os.Environ())
}
