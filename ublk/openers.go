package ublk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// claim looks for users of a block device on kernels that cannot do it
// themselves (TRY_STOP_DEV): it opens the device with O_EXCL, which file
// systems, swap, device mapper and md exclude, and looks through the open files
// of all processes. The caller keeps the descriptor while it stops the device,
// so that no exclusive user comes in between.
//
// What it cannot see: users inside the kernel that open without a claim (a loop
// device, an nvmet namespace), io_uring's fixed files, and who opens the device
// without O_EXCL after the look.
func claim(id int) (fd int, err error) {
	path := blockPath(id)
	fd, err = unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return -1, fmt.Errorf("%w: %s is mounted or held by another driver", ErrBusy, path)
	case err != nil:
		return -1, fmt.Errorf("open %s: %w", path, err)
	}
	if pid, err := opener(id, fd); err != nil || pid != 0 {
		_ = unix.Close(fd)
		if err == nil {
			err = fmt.Errorf("%w: process %d has it open", ErrBusy, pid)
		}
		return -1, err
	}
	return fd, nil
}

// InUse is ErrBusy if somebody uses the block device, as far as claim can see;
// nil if nobody does, or if the disk is gone. Stop without force looks itself.
// This is for who has to know it of several devices before stopping the first.
// Openers that are about to go, as udev's do, are waited for, for half a second.
func (d *Device) InUse() error {
	for patience := time.Now().Add(busyPatience); ; time.Sleep(busyBackoff) {
		fd, err := claim(d.info.ID)
		switch {
		case err == nil:
			return unix.Close(fd)
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
			return nil
		case !errors.Is(err, ErrBusy) || time.Now().After(patience):
			return fmt.Errorf("look for users of %s: %w", d.Path(), err)
		}
	}
}

// opener is the first process that has the device or a partition of it open,
// but for descriptor own of this process; 0 if there is none. Processes that
// end meanwhile are none.
func opener(id, own int) (pid int, err error) {
	numbers, err := diskNumbers(id)
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
func diskNumbers(id int) (map[uint64]bool, error) {
	disk := fmt.Sprintf("/sys/block/ublkb%d", id)
	files, err := filepath.Glob(disk + "/ublkb*/dev")
	if err != nil {
		return nil, err
	}
	numbers := make(map[uint64]bool)
	for _, file := range append(files, disk+"/dev") {
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
