package ublk

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// undoTimeout limits the time to remove a device after Start failed, and to free
	// a device that ended by itself.
	undoTimeout = 10 * time.Second
	// busyPatience is the time that a short-lived opener, such as udev, has to close
	// the device.
	busyPatience = 500 * time.Millisecond
	busyBackoff  = 20 * time.Millisecond
)

// Stop ends the device: it waits for the requests in flight, removes the block device, and
// frees memory and device number. A back end that does not answer must fail its requests
// first.
//
// Without force, Stop returns ErrBusy and changes nothing if the device is in use. It waits
// half a second for openers that close the device soon, as udev does. Since Linux 7.0 the
// driver looks for openers. Before that, Stop finds those that diskuse.Claim can find.
//
// With force, users of the device get I/O errors, and the device number becomes free when
// the last of them has closed the block device.
//
// When ctx is done, Stop returns an error that names the step. The driver may still execute
// the last command. If it does, the device is freed in the background. Stop may be called
// again. It returns nil if the device has ended.
func (d *Device) Stop(ctx context.Context, force bool) error {
	if err := d.stop(ctx, force); err != nil {
		return fmt.Errorf("stop %s: %w", d.Path(), err)
	}
	<-d.done
	return nil
}

func (d *Device) stop(ctx context.Context, force bool) error {
	select {
	case <-d.idle:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { d.idle <- struct{}{} }()
	if d.ctl == nil {
		return nil
	}
	before := d.stopping
	d.stopping = true
	if !force {
		if err := d.stopUnused(ctx); err != nil {
			d.stopping = before
			return err
		}
	}
	return d.clear(ctx)
}

// stopUnused stops the disk unless it is in use.
func (d *Device) stopUnused(ctx context.Context) error {
	patience := time.After(busyPatience)
	for {
		err := d.tryStop(ctx)
		if !errors.Is(err, ErrBusy) {
			return err
		}
		select {
		case <-time.After(busyBackoff):
		case <-patience:
			return err
		case <-ctx.Done():
			return err
		}
	}
}

func (d *Device) tryStop(ctx context.Context) error {
	if d.info.Features.Has(SafeStop) {
		err := d.command(ctx, call{cmd: tryStopDev})
		switch {
		case errors.Is(err, unix.EBUSY):
			return fmt.Errorf("%w: %w", ErrBusy, err)
		case errors.Is(err, unix.ENODEV):
			return nil // there is no disk
		}
		return err
	}
	fd, err := claim(d.info.ID)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return nil // there is no disk
	case err != nil:
		return err
	}
	return errors.Join(d.command(ctx, call{cmd: stopDev}), unix.Close(fd))
}

// clear undoes what start did, in reverse order, whatever start has reached. The package
// documentation explains the order. The caller holds the token of idle.
func (d *Device) clear(ctx context.Context) error {
	if d.ctl == nil {
		return nil
	}
	if d.char >= 0 {
		if err := d.refuseShared(ctx); err != nil {
			return err
		}
		// The number is ours while we have ublkcN open.
		if err := d.command(ctx, call{cmd: stopDev}); err != nil && !errors.Is(err, unix.ENODEV) {
			return err
		}
		if err := d.finish(ctx); err != nil {
			return err
		}
		if err := d.endSharing(); err != nil {
			return err
		}
		err := unix.Close(d.char)
		d.char = -1
		if err != nil {
			return fmt.Errorf("close %s: %w", charPath(d.info.ID), err)
		}
	}
	if d.added {
		if err := d.delete(ctx); err != nil {
			return err
		}
		d.added = false
	}
	err := d.ctl.close()
	d.ctl = nil
	return err
}

// finish waits until all queues have ended and frees their memory.
func (d *Device) finish(ctx context.Context) error {
	for _, s := range d.serves {
		err := onLoop(ctx, s.loop, func() error { s.retire(); return nil })
		if err != nil && !s.dead() {
			return fmt.Errorf("end queue %d: %w", s.index, err)
		}
	}
	for _, s := range d.serves {
		select {
		case <-s.ended:
		case <-s.loop.Done():
		case <-ctx.Done():
			return fmt.Errorf("wait for queue %d: %w", s.index, context.Cause(ctx))
		}
	}
	var errs []error
	for _, s := range d.serves {
		err := onLoop(ctx, s.loop, s.finish)
		if s.dead() {
			err = s.free()
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("end queue %d: %w", s.index, err))
		}
	}
	return errors.Join(errs...)
}

// dead reports whether the queue's loop has ended.
func (s *serving) dead() bool {
	select {
	case <-s.loop.Done():
		return true
	default:
		return false
	}
}

// delete removes the device, unless it is gone or its number belongs to another device.
func (d *Device) delete(ctx context.Context) error {
	now, err := d.ctl.info(ctx, d.info.ID)
	switch {
	case errors.Is(err, ErrNoDevice):
		return nil
	case err != nil:
		return err
	case now.Cookie != d.info.Cookie:
		return nil
	}
	free, err := d.ctl.delete(ctx, d.info.ID)
	if err == nil && !free {
		d.log.Warn("ublk device number stays in use until the last user closes the block device", "device", d.Path())
	}
	return err
}

// watch waits for the end of the device, and frees it if Stop does not.
func (d *Device) watch() {
	var queues sync.WaitGroup
	for _, s := range d.serves {
		queues.Go(func() {
			select {
			case <-s.ended:
			case <-s.loop.Done():
				d.fail(fmt.Errorf("loop of queue %d ended: %w", s.index, s.loop.Err()))
			}
		})
	}
	idle := make(chan struct{})
	go func() {
		queues.Wait()
		close(idle)
	}()
	select {
	case <-idle:
	case <-d.broken:
	}

	<-d.idle
	defer func() { d.idle <- struct{}{} }()
	if d.ctl == nil { // Stop has freed it
		d.log.Info("ublk device stopped")
		close(d.done)
		return
	}
	if !d.stopping {
		d.err = ErrStopped
		select {
		case <-d.broken:
			d.err = d.cause
		default:
		}
		d.log.Error("ublk device ended", "err", d.err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	err := d.clear(ctx)
	if err != nil {
		d.err = errors.Join(d.err, fmt.Errorf("clear up %s: %w", d.Path(), err))
	}
	close(d.done)
	if err != nil {
		d.linger()
	}
}

// linger frees the device without a time limit. The caller holds the token of idle.
func (d *Device) linger() {
	d.log.Error("ublk device hangs", "device", d.Path())
	if err := d.clear(context.Background()); err != nil {
		d.log.Error("ublk device not cleared up", "err", err)
		return
	}
	d.log.Info("ublk device cleared up")
}
