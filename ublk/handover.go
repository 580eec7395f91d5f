package ublk

import (
	"context"
	"fmt"
	"time"
)

// drainTime is the time that requests in flight have to end before HandOver returns. The
// next server sends the other requests again.
const drainTime = 500 * time.Millisecond

// HandOver prepares the device for another process that calls Recover. New requests wait,
// and requests in flight have half a second to end. If the driver cannot quiesce a device
// (before Linux 6.16), HandOver does nothing, and requests in flight are sent again. In
// either case the process must end soon and must not call Stop, which blocks from now on.
func (d *Device) HandOver(ctx context.Context) error {
	select {
	case <-d.idle: // never released, so that nobody frees the device
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
	// QUIESCE_DEV waits until each queue has an idle tag and then takes the idle
	// tags back. Requests wait from now on, even if the command fails.
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
