package ublk

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestIdentify checks which files are taken for shared memory.
func TestIdentify(t *testing.T) {
	const good = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
	for _, c := range []struct {
		name  string
		size  int64
		seals int
		want  string // in the error; empty: none
	}{
		{"good", 1 << 20, good, ""},
		{"sealed seals", 1 << 20, good | unix.F_SEAL_SEAL, ""},
		{"unsealed", 1 << 20, 0, "F_SEAL_SHRINK and F_SEAL_GROW"},
		{"may grow", 1 << 20, unix.F_SEAL_SHRINK, "F_SEAL_SHRINK and F_SEAL_GROW"},
		{"may shrink", 1 << 20, unix.F_SEAL_GROW, "F_SEAL_SHRINK and F_SEAL_GROW"},
		{"not writable", 1 << 20, good | unix.F_SEAL_WRITE, "sealed against writes"},
		{"not writable in the future", 1 << 20, good | unix.F_SEAL_FUTURE_WRITE, "sealed against writes"},
		{"empty", 0, good, "0 bytes, want a multiple of 4096"},
		{"part of a page", 8191, good, "8191 bytes, want a multiple of 4096"},
		{"largest", maxShared, good, ""},
		{"too large", maxShared + 4096, good, "want up to 4294967296"},
	} {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "test")
		if err := f.Truncate(c.size); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, c.seals); err != nil {
			t.Fatal(err)
		}
		m, err := identify(f)
		switch {
		case c.want == "" && (err != nil || m.Size != c.size || m.Inode == 0):
			t.Errorf("%s: %+v, %v", c.name, m, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		f.Close()
	}
	f, err := os.CreateTemp(t.TempDir(), "file")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := identify(f); !errors.Is(err, ErrUnsealed) {
		t.Errorf("a file of a disk: %v", err)
	}
}
