package ublk

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/diskuse"
)

// claim looks for users of a block device, for kernels that have no TRY_STOP_DEV. See
// diskuse.Claim.
func claim(id int) (fd int, err error) {
	fd, err = diskuse.Claim(strings.TrimPrefix(blockPath(id), "/dev/"))
	var used *diskuse.Error
	if errors.As(err, &used) {
		err = fmt.Errorf("%w: %s", ErrBusy, used.User)
	}
	return fd, err
}

// InUse returns ErrBusy if the block device is in use, as far as diskuse.Claim can tell,
// and nil if it is not in use or if there is no disk. It waits half a second for openers
// that close the device soon, as udev does. Stop without force checks this itself. Callers
// that check several devices before they stop the first one need InUse.
func (d *Device) InUse() error {
	for patience := time.Now().Add(busyPatience); ; time.Sleep(busyBackoff) { //nolint:forbidigo // the kernel has no event for it
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
