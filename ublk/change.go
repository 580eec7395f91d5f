package ublk

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Resize gives the device another size, in 512-byte sectors; its users see it at
// once. errors.ErrUnsupported where the driver cannot (before Linux 6.16): then
// the size is what it was.
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

// SetReadOnly makes the device refuse writes, or not any more. A device that was
// read-only when it was started stays so.
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
