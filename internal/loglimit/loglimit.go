// Package loglimit bounds how much is logged of what peers cause, so that they cannot fill a
// disk.
package loglimit

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// After Burst records, a logger passes one in each Interval.
const (
	Burst    = 100
	Interval = time.Second
)

// New returns a logger that passes a part of its records to log. A record that follows others
// that were left out says how many these were. All loggers made from it by With and WithGroup
// share its limit. Any goroutine may use it.
func New(log *slog.Logger) *slog.Logger {
	return slog.New(handler{log.Handler(), &allowance{left: Burst}})
}

// handler is a log handler with a limit.
type handler struct {
	slog.Handler
	*allowance
}

// allowance is what is left of a limit.
type allowance struct {
	mu      sync.Mutex
	left    int
	since   time.Time // of left
	omitted int
}

// Handle implements slog.Handler.
func (h handler) Handle(ctx context.Context, r slog.Record) error {
	omitted, ok := h.take(r.Time)
	if !ok {
		return nil
	}
	if omitted > 0 {
		r.AddAttrs(slog.Int("omitted_before", omitted))
	}
	return h.Handler.Handle(ctx, r)
}

// take takes one record of the allowance, and says how many had none.
func (a *allowance) take(now time.Time) (omitted int, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if n := int(min(now.Sub(a.since)/Interval, Burst)); n > 0 {
		a.left, a.since = min(a.left+n, Burst), now
	}
	if a.left == 0 {
		a.omitted++
		return 0, false
	}
	a.left--
	omitted, a.omitted = a.omitted, 0
	return omitted, true
}

// WithAttrs implements slog.Handler.
func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return handler{h.Handler.WithAttrs(attrs), h.allowance}
}

// WithGroup implements slog.Handler.
func (h handler) WithGroup(name string) slog.Handler {
	return handler{h.Handler.WithGroup(name), h.allowance}
}
