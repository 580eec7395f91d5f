package ublk

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Resize changes the size of the device to sectors of 512 bytes. Its users see the new
// size at once. The error is errors.ErrUnsupported if the driver cannot do this (before
// Linux 6.16), and ErrStopped if the device has ended. After an error the size is
// unchanged.
func (d *Device) Resize(ctx context.Context, sectors uint64) error {
	select {
	case <-d.idle:
	case <-ctx.Done():
		return fmt.Errorf("resize %s: %w", d.Path(), context.Cause(ctx))
	}
	defer func() { d.idle <- struct{}{} }()
	if d.ctl == nil {
		return fmt.Errorf("resize %s: %w", d.Path(), ErrStopped)
	}
	if err := d.resize(ctx, sectors); err != nil {
		return fmt.Errorf("resize %s: %w", d.Path(), err)
	}
	return nil
}

func (d *Device) resize(ctx context.Context, sectors uint64) error {
	if !d.info.Features.Has(UpdateSize) {
		return fmt.Errorf("the ublk driver lacks %v: %w", UpdateSize, errors.ErrUnsupported)
	}
	return d.command(ctx, call{cmd: updateSize, data: sectors})
}

// SetReadOnly makes the device refuse writes, or accept them again. A device that was
// started read-only stays read-only.
func (d *Device) SetReadOnly(readOnly bool) error {
	fd, err := unix.Open(d.Path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", d.Path(), err)
	}
	value := 0
	if readOnly {
		value = 1
	}
	err = unix.IoctlSetPointerInt(fd, unix.BLKROSET, value)
	if err = errors.Join(err, unix.Close(fd)); err != nil {
		return fmt.Errorf("set %s read-only %t: %w", d.Path(), readOnly, err)
	}
	return nil
}
