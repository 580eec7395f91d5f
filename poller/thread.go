package poller

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// onThread runs fn on a goroutine that is locked to a thread. The thread ends with the
// goroutine. It is never the main thread: the runtime parks that thread forever, with
// everything that is tied to it.
func onThread(fn func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		fn()
		return
	}
	// As long as this goroutine holds the main thread, another goroutine is on
	// another thread.
	locked := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		close(locked)
		fn()
	}()
	<-locked
	runtime.UnlockOSThread()
}

func threadID() int { return unix.Gettid() }

// nameThread names the calling thread, as PR_SET_NAME does. Without /proc, the thread
// keeps its name.
func nameThread(name string) {
	_ = os.WriteFile("/proc/thread-self/comm", []byte(name), 0)
}

// SetAffinity moves the loop's thread to the given CPUs. An empty list changes nothing.
// The error is EINVAL if none of them is usable, and ErrStopped if the loop has ended.
// Any goroutine may call it.
func (l *Loop) SetAffinity(cpus []int) error {
	if len(cpus) == 0 {
		return nil
	}
	var set unix.CPUSet
	for _, c := range cpus {
		set.Set(c)
		if !set.IsSet(c) {
			return fmt.Errorf("set affinity of %s: no CPU %d: %w", l.cfg.Name, c, unix.EINVAL)
		}
	}
	l.mu.Lock() // so that the thread does not end
	defer l.mu.Unlock()
	if l.tid == 0 {
		return fmt.Errorf("set affinity of %s: %w", l.cfg.Name, ErrStopped)
	}
	if err := unix.SchedSetaffinity(l.tid, &set); err != nil {
		return fmt.Errorf("set affinity of %s to CPUs %v: %w", l.cfg.Name, cpus, err)
	}
	return nil
}

func newEventfd() (int, error) { return unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK) }

var one = binary.NativeEndian.AppendUint64(nil, 1)

// signalEventfd adds 1 to the count of an eventfd. It cannot fail for want of room: the
// count is read after every wake-up, and has room for 2^64-2 of them.
func signalEventfd(fd int) { _, _ = unix.Write(fd, one) }

// closeEventfd closes fd as soon as no goroutine can be about to write to it.
func closeEventfd(fd int, writers *atomic.Int32) {
	for writers.Load() != 0 {
		runtime.Gosched()
	}
	if fd >= 0 {
		_ = unix.Close(fd)
	}
}
