package initiator

import (
	"context"
	"errors"
	"fmt"

	"ublk-nvmeof/nvme"
)

// ErrNotConnected is a subsystem without any association at present. It may have one again
// later.
var ErrNotConnected = errors.New("controller is not connected")

// ReadLog reads len(out) bytes of a log page, a multiple of 4, by commands of at most
// 4 KiB. If r.Retain is false, only the last of them re-enables the event of the page. The
// parts may be of different states of the page: the discovery log has a counter that
// tells. Bytes that the target does not write are 0. Errors: an nvme.Status,
// ErrNotConnected, why the association was lost, or a context error. Any goroutine.
func (s *Subsystem) ReadLog(ctx context.Context, r LogRequest, out []byte) error {
	if len(out) == 0 || len(out)%4 != 0 || r.Offset%4 != 0 {
		return fmt.Errorf("read log page %02xh: %d bytes at %d are no whole dwords", r.Page, len(out), r.Offset)
	}
	a, err := s.current()
	if err != nil {
		return err
	}
	for at := 0; at < len(out); at += adminPage {
		part := r
		part.Offset += uint64(at)
		end := min(at+adminPage, len(out))
		part.Retain = r.Retain || end < len(out)
		if err := a.admin.logPage(ctx, part, out[at:end]); err != nil {
			return fmt.Errorf("read log page %02xh: %w", r.Page, err)
		}
	}
	return nil
}

// Identify is what a controller of the subsystem said of itself when it was connected the last
// time. It is that of the first path that is connected.
func (s *Subsystem) Identify() (nvme.IdentifyController, error) {
	a, err := s.current()
	if err != nil {
		return nvme.IdentifyController{}, err
	}
	return a.identify, nil
}

// current returns the association of the first path that has one.
func (s *Subsystem) current() (*association, error) {
	var errs []error
	for _, c := range s.paths() {
		if a := c.current(); a != nil {
			return a, nil
		}
		errs = append(errs, c.lossReason())
	}
	if reason := errors.Join(errs...); reason != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotConnected, reason)
	}
	return nil, ErrNotConnected
}

// lossReason returns why the last association was lost.
func (c *Controller) lossReason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reason
}
