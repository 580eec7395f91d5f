package host

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// gcPercent lets the heap, which is small and grows by control commands only,
// triple before it is collected: collections disturb the loops.
const gcPercent = 200

// SetIOFlusher marks the calling thread as one that block I/O depends on: the
// kernel then does not wait for block I/O when it needs memory for it
// (PR_SET_IO_FLUSHER). Threads and programs that it starts inherit the mark; a
// running program's other threads do not get it. So a server is started, or
// replaced by exec, from a marked thread.
func SetIOFlusher() error {
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become an I/O flusher: %w", err)
	}
	return nil
}

// IsIOFlusher says whether the calling thread is marked.
func IsIOFlusher() bool {
	on, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
	return err == nil && on == 1
}

// SetName is what ps calls the process.
func SetName(name string) error { return os.WriteFile("/proc/self/comm", []byte(name), 0) }

// Prepare makes the process fit to serve a block device with so many loops. It
// does what it can; the error says what it could not.
func Prepare(loops int) error {
	// The loops keep a P each while they wait for the next request.
	if n := loops + 2; runtime.GOMAXPROCS(0) < n {
		runtime.GOMAXPROCS(n)
	}
	debug.SetGCPercent(gcPercent)

	var errs []error
	unlimited := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unlimited); err != nil {
		// Registered memory is locked memory.
		errs = append(errs, fmt.Errorf("raise the limit of locked memory: %w", err))
	} else if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		// Swap may be on our own device.
		errs = append(errs, fmt.Errorf("lock memory: %w", err))
	}
	// The end of the server is the end of its file systems.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		errs = append(errs, fmt.Errorf("protect from the OOM killer: %w", err))
	}
	return errors.Join(errs...)
}
