// Package diskuse finds the users of a disk, for drivers that cannot tell.
package diskuse

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Error says who uses a disk.
type Error struct{ User string }

func (e *Error) Error() string { return "disk is in use: " + e.User }

// Claim looks for users of a disk, named as in /dev: it opens it with O_EXCL, which
// file systems, swap, device mapper and md exclude, and looks through the open files
// of all processes. The caller keeps the descriptor while it ends the disk, so that no
// exclusive user comes in between. Errors are *Error, and those of open(2).
//
// What it cannot see: users inside the kernel that open without a claim (a loop
// device, an nvmet namespace), io_uring's fixed files, and who opens the device
// without O_EXCL after the look.
func Claim(disk string) (fd int, err error) {
	path := "/dev/" + disk
	fd, err = unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	switch {
	case err == unix.EBUSY:
		return -1, &Error{path + " is mounted or held by another driver"}
	case err != nil:
		return -1, fmt.Errorf("open %s: %w", path, err)
	}
	if pid, err := opener(disk, fd); err != nil || pid != 0 {
		_ = unix.Close(fd)
		if err == nil {
			err = &Error{fmt.Sprintf("process %d has %s open", pid, path)}
		}
		return -1, err
	}
	return fd, nil
}

// opener is the first process that has the device or a partition of it open,
// but for descriptor own of this process; 0 if there is none. Processes that
// end meanwhile are none.
func opener(disk string, own int) (pid int, err error) {
	numbers, err := diskNumbers(disk)
	if err != nil {
		return 0, err
	}
	fds, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return 0, err
	}
	self := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), own)
	for _, path := range fds {
		var st unix.Stat_t
		if path == self || unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || !numbers[st.Rdev] {
			continue
		}
		return strconv.Atoi(strings.Split(path, "/")[2])
	}
	return 0, nil
}

// diskNumbers are the device numbers of the disk and its partitions.
func diskNumbers(disk string) (map[uint64]bool, error) {
	dir := "/sys/block/" + disk
	files, err := filepath.Glob(dir + "/" + disk + "*/dev")
	if err != nil {
		return nil, err
	}
	numbers := make(map[uint64]bool)
	for _, file := range append(files, dir+"/dev") {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("look for openers: %w", err)
		}
		var major, minor uint32
		if _, err := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err != nil {
			return nil, fmt.Errorf("look for openers: %s: %w", file, err)
		}
		numbers[unix.Mkdev(major, minor)] = true
	}
	return numbers, nil
}
