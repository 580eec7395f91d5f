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

// Recover serves a device whose server died. The block device never went away, and with
// RecoveryRequeue the I/O of its users has only waited. info is what List or Get returned.
// The number of queues, the depth, the buffer size and the policy are those of the device,
// and cfg's are ignored.
//
// The caller must know that cfg.Device holds the same data. Recover refuses a back end with
// another block size. If the users of the device were told that it has no volatile cache,
// Recover opens the queues of the back end write-through. The driver sends the requests
// that were in flight again, so the requests that the dead server had sent must not take
// effect any more when Recover is called.
//
// Errors (errors.Is): ErrNotOurs, ErrNoDevice, ErrBusy if the device has a server,
// ErrStopped if it does not wait for one, ErrNoDriver, ErrPermission, the cause of ctx, and
// errors of the back end and of the system. After an error the device still waits for a
// server. If Recover had begun to fetch requests, it does so only after this process has
// ended.
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
	if info.Features.Has(ShmemZeroCopy) {
		d.registrar, _ = cfg.Device.(block.Registrar)
		d.shared = cfg.Shared
	}
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
	// Like START_DEV, END_USER_RECOVERY waits until all queues have fetched their tags.
	ctx, cancel := d.untilBroken(ctx)
	defer cancel()
	if err := d.command(ctx, call{cmd: endRecovery, data: uint64(os.Getpid())}); err != nil {
		return err
	}
	if told.devSectors == geometry.Sectors {
		return nil
	}
	// The back end may have been resized while nobody served the device. I/O beyond
	// its end fails.
	if err := d.resize(ctx, geometry.Sectors); err != nil {
		d.log.Warn("size of the device is not that of its back end", "device", d.Path(), "sectors", told.devSectors, "back_end", geometry.Sectors, "err", err)
	}
	return nil
}

// takeOver waits until the driver has noticed that the server died, and begins the recovery
// if the back end fits the device. It returns the parameters of the device.
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
				// The files of the dead server are not all closed yet.
			case errors.Is(err, unix.EINVAL) && now.Features.Has(UserRecovery):
				// Another server has begun a recovery and died before it fetched. Older
				// drivers (6.12) do not begin a recovery twice.
				return told, nil
			default:
				return told, err
			}
		}
		select {
		case <-time.After(pause): // the driver has no event for it
			pause = min(2*pause, openBackoff)
		case <-ctx.Done():
			return told, errors.Join(context.Cause(ctx), err)
		}
	}
}

// served reports whether a process exists and is not a zombie. A zombie has closed its
// files, or is about to close them.
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

// compare checks that the back end fits the parameters of the device, and returns these.
// Except for the size, they cannot be changed any more.
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

// mismatch returns why a back end does not fit the parameters of the device, or nil if it
// does. Only the block size matters: a back end serves requests up to the size that its
// queues were opened with, even if its limits are lower now, and works without a volatile
// cache if it is asked to (block.QueueConfig). Everything else costs only time.
func mismatch(told *paramBasic, g block.Geometry) error {
	if shift(g.LogicalBlock) != told.logicalBlockShift {
		return fmt.Errorf("block size is %d, the device has %d", g.LogicalBlock, 1<<told.logicalBlockShift)
	}
	return nil
}

// Abandon deletes a device that waits for a server. The I/O that waits fails. info is what
// List or Get returned. Without force, a device that is in use is not deleted.
//
// Errors (errors.Is): ErrNotOurs, ErrNoDevice, and ErrBusy if the device is in use or has a
// server.
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
