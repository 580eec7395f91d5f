package ublk

import (
	"context"
	"fmt"
	"time"
)

// drainTime is the time that requests in flight get to end before the process ends.
// The next server sends the others again.
const drainTime = 500 * time.Millisecond

// HandOver ends the service for another process that Recovers the device: new
// requests wait, requests in flight are done, as far as they are quick. Where the
// driver cannot quiesce a device (before Linux 6.16) it does nothing, and what is
// in flight is sent again when the process has ended. In either case the process
// must end soon, without Stop, which blocks from now on.
func (d *Device) HandOver(ctx context.Context) error {
	select {
	case <-d.idle: // for good: nobody may clear up
	case <-ctx.Done():
		return fmt.Errorf("hand over %s: %w", d.Path(), context.Cause(ctx))
	}
	if d.ctl == nil {
		d.idle <- struct{}{}
		return fmt.Errorf("hand over %s: %w", d.Path(), ErrStopped)
	}
	if !d.info.Features.Has(Quiesce | UserRecovery) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, drainTime)
	defer cancel()
	// It waits until each queue has a tag that is idle, and then takes the idle
	// ones back. Whether it fails or not, requests wait from now on.
	if err := d.command(ctx, call{cmd: quiesceDev, data: uint64(drainTime.Milliseconds())}); err != nil {
		d.log.Warn("quiesce device", "device", d.Path(), "err", err)
		return nil
	}
	for ctx.Err() == nil {
		inflight := 0
		for _, s := range d.serves {
			_ = onLoop(ctx, s.loop, func() error { inflight += s.inflight + len(s.reqs); return nil })
		}
		if inflight == 0 {
			return nil
		}
		time.Sleep(time.Millisecond) //nolint:forbidigo // the loops have no event for it
	}
	return nil
}
