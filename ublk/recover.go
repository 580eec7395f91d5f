package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
)

// Recover serves a device of ours whose server died, in its place: the block
// device never went away, and with RecoveryRequeue its users only waited. info
// is what List or Get said of it; number of queues, depth, size of the buffers
// and policy are the device's, not cfg's. Whether cfg.Device holds the same data is the
// caller's to know; a back end of another block size is refused. If the users of the
// device were told that it has no volatile cache, the queues of the back end are opened
// write-through. Whatever the dead server had sent
// must have no effect any more when Recover is called, because the driver sends
// the requests that were in flight again.
//
// Errors (errors.Is): ErrNotOurs, ErrNoDevice, ErrBusy if the device has a
// server, ErrStopped if it does not wait for one, ErrNoDriver, ErrPermission,
// ctx' error, and what the back end and the system say. After an error the
// device waits on; if it had come as far as fetching requests, then only when
// this process has ended.
func Recover(ctx context.Context, info Info, cfg Config) (*Device, error) {
	d := newDevice()
	if err := d.recover(ctx, info, cfg); err != nil {
		if d.ctl != nil && d.char < 0 {
			err = errors.Join(err, d.ctl.close())
		}
		return nil, fmt.Errorf("recover ublk device %d: %w", info.ID, err)
	}
	d.log.Info("ublk device recovered", "device", d.Path(), "queues", d.info.Queues, "depth", d.info.Depth, "max_io", d.info.MaxIO)
	d.run()
	return d, nil
}

func (d *Device) recover(ctx context.Context, info Info, cfg Config) error {
	cfg.ID, cfg.Depth, cfg.MaxIO = info.ID, info.Depth, info.MaxIO
	if err := cfg.setDefaults(); err != nil {
		return err
	}
	d.log = cfg.Log.With("ublk", info.ID)
	if len(cfg.Loops) < info.Queues {
		return fmt.Errorf("%d loops for a device of %d queues", len(cfg.Loops), info.Queues)
	}
	var err error
	if d.ctl, err = openControl(); err != nil {
		return err
	}
	d.info = info
	geometry := cfg.Device.Geometry()
	told, err := d.takeOver(ctx, geometry)
	if err != nil {
		return err
	}
	d.writeThrough = told.attrs&attrVolatileCache == 0
	d.added = true
	if d.char, err = openChar(ctx, info.ID); err != nil {
		return err
	}
	if err := d.begin(ctx, cfg); err != nil {
		return err
	}
	// As START_DEV, it waits for the fetches of all queues.
	ctx, cancel := d.untilBroken(ctx)
	defer cancel()
	if err := d.command(ctx, call{cmd: endRecovery, data: uint64(os.Getpid())}); err != nil {
		return err
	}
	if told.devSectors == geometry.Sectors {
		return nil
	}
	// It was resized while nobody served it. I/O beyond its end fails anyway.
	if err := d.resize(ctx, geometry.Sectors); err != nil {
		d.log.Warn("size of the device is not that of its back end", "device", d.Path(), "sectors", told.devSectors, "back_end", geometry.Sectors, "err", err)
	}
	return nil
}

// takeOver waits until the driver has noticed that the server died, and begins
// the recovery if the back end can be what the device is. It returns what the driver was
// told of the device.
func (d *Device) takeOver(ctx context.Context, g block.Geometry) (told paramBasic, err error) {
	pause := time.Millisecond
	for {
		var now Info
		now, err = d.ctl.info(ctx, d.info.ID)
		switch {
		case err != nil:
			return told, err
		case !now.Ours() || now.Cookie != d.info.Cookie:
			return told, ErrNotOurs
		case now.State == Dead:
			return told, fmt.Errorf("%w: nothing waits for a server", ErrStopped)
		case now.State == Live && served(now.PID):
			return told, fmt.Errorf("%w: process %d serves it", ErrBusy, now.PID)
		case now.State != Live:
			if told, err = d.compare(ctx, g); err != nil {
				return told, err
			}
			err = d.command(ctx, call{cmd: startRecovery})
			switch {
			case errors.Is(err, unix.EBUSY):
				// The dead server's files are not all closed yet.
			case errors.Is(err, unix.EINVAL) && now.Features.Has(UserRecovery):
				// A server has begun a recovery and died before it fetched; older
				// drivers (6.12) do not begin it twice.
				return told, nil
			default:
				return told, err
			}
		}
		select {
		case <-time.After(pause): // the driver makes no event of it
			pause = min(2*pause, openBackoff)
		case <-ctx.Done():
			return told, errors.Join(context.Cause(ctx), err)
		}
	}
}

// served reports whether a process exists and is more than a zombie: one that
// ended has closed its files, or is about to.
func served(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	// "PID (NAME) STATE …", with anything in NAME.
	for i := len(stat) - 1; i > 1; i-- {
		if stat[i-2] == ')' {
			return stat[i] != 'Z' && stat[i] != 'X'
		}
	}
	return true
}

// compare makes sure that the back end can still be what the users of the
// device have seen: what the driver was told, which it returns, cannot be changed any
// more, but for the size.
func (d *Device) compare(ctx context.Context, g block.Geometry) (told paramBasic, err error) {
	if err := g.Validate(); err != nil {
		return told, err
	}
	p := params{len: paramsSize}
	if err := d.command(ctx, call{cmd: getParams, buf: bytesOf(&p)}); err != nil {
		return told, err
	}
	return p.basic, mismatch(&p.basic, g)
}

// mismatch says why a back end cannot be what the driver was told; nil if it can. A
// back end serves requests up to the size that its queues were opened with, whatever its
// limits have become, and without a volatile cache if it is asked for that
// (block.QueueConfig). What else it can do less well costs users only time.
func mismatch(told *paramBasic, g block.Geometry) error {
	if shift(g.LogicalBlock) != told.logicalBlockShift {
		return fmt.Errorf("block size is %d, the device has %d", g.LogicalBlock, 1<<told.logicalBlockShift)
	}
	return nil
}

// Abandon deletes a device of ours that waits for a server and will not get
// one: what its users wait for fails. Without force, a device that somebody
// uses is left alone. info is what List or Get said of it.
//
// Errors (errors.Is): ErrNotOurs, ErrNoDevice, ErrBusy if it is in use or if
// it has a server.
func Abandon(ctx context.Context, info Info, force bool) error {
	c, err := openControl()
	if err != nil {
		return err
	}
	return errors.Join(c.abandon(ctx, info, force), c.close())
}

func (c *control) abandon(ctx context.Context, info Info, force bool) error {
	now, err := c.info(ctx, info.ID)
	switch {
	case err != nil:
		return err
	case !now.Ours() || now.Cookie != info.Cookie:
		return fmt.Errorf("abandon ublk device %d: %w", info.ID, ErrNotOurs)
	case now.State == Live:
		return fmt.Errorf("abandon ublk device %d: %w: it is %v", info.ID, ErrBusy, now.State)
	}
	if !force {
		fd, err := claim(info.ID)
		if err != nil {
			return fmt.Errorf("abandon ublk device %d: %w", info.ID, err)
		}
		defer unix.Close(fd)
	}
	if err := c.do(ctx, call{cmd: stopDev, id: uint32(info.ID)}); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("abandon ublk device %d: %w", info.ID, err)
	}
	return c.remove(ctx, now)
}
