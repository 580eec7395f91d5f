package process

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestExplainRing(t *testing.T) {
	const free, filtered = "Name:\tx\nSeccomp:\t0\nSeccomp_filters:\t0\n", "Seccomp:\t2\n"
	for _, tt := range []struct {
		errno            unix.Errno
		disabled, status string
		want             string
	}{
		{unix.EPERM, "2", free, "for every process; sysctl kernel.io_uring_disabled=0"},
		{unix.EPERM, "2", filtered, "for every process; sysctl kernel.io_uring_disabled=0"},
		{unix.EPERM, "1", free, "not in the group kernel.io_uring_group"},
		{unix.EPERM, "1", filtered, "a seccomp filter, as containers have"},
		{unix.EPERM, "0", filtered, "a seccomp filter, as containers have"},
		{unix.ENOSYS, "", filtered, "a seccomp filter, as containers have"},
		{unix.ENOSYS, "", free, "CONFIG_IO_URING"},
		{unix.EPERM, "0", free, "the kernel refuses it"},
		{unix.EINVAL, "", "", "the kernel refuses it"},
	} {
		err := explainRing(tt.errno, tt.disabled, tt.status)
		if !errors.Is(err, tt.errno) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "root") {
			t.Errorf("%v %q %q: %v, want %q", tt.errno, tt.disabled, tt.status, err, tt.want)
		}
	}
}

func TestExplainMemlock(t *testing.T) {
	if err := ExplainMemlock(nil); err != nil {
		t.Error(err)
	}
	other := errors.New("other")
	if err := ExplainMemlock(other); !errors.Is(err, other) || err.Error() != "other" {
		t.Error(err)
	}
	full := fmt.Errorf("map: %w", unix.ENOMEM)
	if err := explainMemlock(full, unix.RLIM_INFINITY); err.Error() != full.Error() {
		t.Error(err)
	}
	err := explainMemlock(full, 64<<10)
	if !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "may lock 64 KiB of memory (RLIMIT_MEMLOCK)") {
		t.Error(err)
	}
	if strings.Contains(err.Error(), "--nr-io-queues") {
		t.Errorf("the library names a flag of the program: %v", err)
	}
}

func TestIsAdmin(t *testing.T) {
	runtime.LockOSThread() // the thread ends with the test, and so do its rights
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		t.Fatal(err)
	}
	const admin = 1 << unix.CAP_SYS_ADMIN
	if data[0].Effective&admin == 0 && IsAdmin() {
		t.Error("an administrator without CAP_SYS_ADMIN")
	}
	data[0].Effective &^= admin
	if err := unix.Capset(&header, &data[0]); err != nil {
		t.Fatal(err)
	}
	if IsAdmin() {
		t.Error("still an administrator")
	}
}
