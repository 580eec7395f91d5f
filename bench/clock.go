package main

import (
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// clockHolder keeps the guest's clock from leaping. In mode icount a machine
// whose CPUs are all idle leaps to its next timer at once, so that a wait for
// the host (a page of a program that comes from its file system) can last
// minutes, which no deadline survives. While the clock is held, a timer is never
// further away than heldLeap. (A thread that spins instead would hold up the
// others: the CPUs take turns of a timer tick.)
type clockHolder struct {
	use  bool // false: hold and release do nothing, outside of icount
	stop *atomic.Bool
	done chan struct{}
}

const heldLeap = 100 * time.Microsecond

// hold begins holding the clock, unless it is held. One goroutine may call hold
// and release.
func (c *clockHolder) hold() {
	if !c.use || c.stop != nil {
		return
	}
	stop, done := new(atomic.Bool), make(chan struct{})
	c.stop, c.done = stop, done
	go func() {
		defer close(done)
		runtime.LockOSThread() // which ends with the goroutine
		leap := unix.NsecToTimespec(int64(heldLeap))
		for !stop.Load() {
			_ = unix.Nanosleep(&leap, nil) // cut short by a signal, it is called again
		}
	}()
}

// release lets the clock go.
func (c *clockHolder) release() {
	if c.stop == nil {
		return
	}
	c.stop.Store(true)
	<-c.done
	c.stop = nil
}
