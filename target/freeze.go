package target

import (
	"context"
	"time"
)

// freeze is a time during which a target does nothing.
type freeze struct {
	timer  *time.Timer
	thawed chan struct{}
}

// afterThaw is the time after a freeze during which the target does not react to the
// end of connections. Meanwhile it executes the commands that have waited, like a
// process that was stopped and continues.
const afterThaw = 50 * time.Millisecond

// Freeze makes the target do nothing for the time d, as if its machine were paused:
// commands and connect requests wait, timers stop, and no controller ends. After that
// the target continues where it stopped, and keep alive timers restart. Store
// operations that have begun are not stopped. If d is 0, Freeze ends a freeze at once.
// The methods of this package still work during a freeze.
func (f *Faults) Freeze(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.frozen.Load()
	if old != nil {
		old.timer.Stop()
	}
	if d > 0 {
		next := &freeze{thawed: make(chan struct{})}
		if old != nil {
			next.thawed = old.thawed
		}
		next.timer = time.AfterFunc(d, func() { f.thaw(next) })
		f.frozen.Store(next)
		return
	}
	if old != nil {
		f.end(old)
	}
}

// thaw ends a freeze, unless another one has replaced it.
func (f *Faults) thaw(z *freeze) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.frozen.Load() == z {
		f.end(z)
	}
}

// end ends a freeze. The caller holds the lock.
func (f *Faults) end(z *freeze) {
	for _, c := range f.target.controllers.of(nil) {
		c.restartKeepAlive()
	}
	f.frozen.Store(nil)
	close(z.thawed)
}

// Frozen reports whether the target is frozen.
func (f *Faults) Frozen() bool { return f.frozen.Load() != nil }

// awaitThaw waits until the target is not frozen. It returns false if ctx ends first.
func (f *Faults) awaitThaw(ctx context.Context) bool {
	for z := f.frozen.Load(); z != nil; z = f.frozen.Load() {
		select {
		case <-z.thawed:
		case <-ctx.Done():
			return false
		}
	}
	return true
}
