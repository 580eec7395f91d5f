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
	// undoTimeout bounds the undoing of a failed Start, and the clearing up
	// after a device that ended by itself.
	undoTimeout = 10 * time.Second
	// busyPatience is what a short-lived opener, such as udev's, gets.
	busyPatience = 500 * time.Millisecond
	busyBackoff  = 20 * time.Millisecond
)

// Stop ends the device in order: no new request, requests in flight done, the
// block device gone, memory and number given back.
//
// Without force a device in use is left alone, with ErrBusy. The driver looks
// for openers itself (Linux 7.0); before that, see claim for what is found. An
// opener that goes away within half a second, as udev's do, is waited for.
//
// With force users get I/O errors, and the device number is free only when the
// last of them has closed the block device. In either case requests in flight are
// waited for, so a back end that does not answer must fail its requests
// first.
//
// When ctx is done Stop gives up, with an error that names the step; whatever
// it asked of the driver may still happen, and once it has, the device is
// cleared up in the background. It can be called again. Stop of a device that
// is over returns nil.
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
	asked := d.asked
	d.asked = true
	if !force {
		if err := d.stopUnused(ctx); err != nil {
			d.asked = asked
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
			return nil // no disk, nobody to use it
		}
		return err
	}
	fd, err := claim(d.info.ID)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return nil // no disk
	case err != nil:
		return err
	}
	return errors.Join(d.command(ctx, call{cmd: stopDev}), unix.Close(fd))
}

// clear undoes what start did, in reverse, from wherever things stand. The
// order matters: see the package documentation. The caller has taken the token of idle.
func (d *Device) clear(ctx context.Context) error {
	if d.ctl == nil {
		return nil
	}
	if d.char >= 0 {
		// The driver keeps the number while we have ublkcN open, so this is
		// our device.
		if err := d.command(ctx, call{cmd: stopDev}); err != nil && !errors.Is(err, unix.ENODEV) {
			return err
		}
		if err := d.finish(ctx); err != nil {
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

// finish waits for the end of all queues and gives their memory back.
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

// delete removes the device, unless it is gone or its number has passed to
// somebody else's.
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

// watch waits for the end of the device, and clears up if nobody else does.
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
	if d.ctl == nil { // Stop did it
		d.log.Info("ublk device stopped")
		close(d.done)
		return
	}
	if !d.asked {
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

// linger clears up for as long as it takes. The caller has taken the token of idle.
func (d *Device) linger() {
	d.log.Error("ublk device hangs", "device", d.Path())
	if err := d.clear(context.Background()); err != nil {
		d.log.Error("ublk device not cleared up", "err", err)
		return
	}
	d.log.Info("ublk device cleared up")
}
