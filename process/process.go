// Package process makes a process fit to serve block devices, and says why it is not. Nothing
// happens by importing it. The functions may be called from any goroutine, unless they concern the
// calling thread.
package process

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// gcPercent lets the heap triple before it is collected, because collections disturb
// the loops. The heap is small, and only control commands make it grow.
const gcPercent = 200

// SetIOFlusher marks the calling thread as one that block I/O depends on
// (PR_SET_IO_FLUSHER): when it allocates memory, the kernel does not wait for block
// I/O. Threads and programs that the thread starts inherit the mark, but the other
// running threads of the process do not get it. So a server is executed from a
// marked thread.
func SetIOFlusher() error {
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become an I/O flusher: %w", err)
	}
	return nil
}

// IsIOFlusher reports whether the calling thread is marked.
func IsIOFlusher() bool {
	on, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
	return err == nil && on == 1
}

// Prepare makes the process fit to serve a block device with the given number of
// loops. It does as much as it can; the error says what it could not do.
func Prepare(loops int) error {
	// Each loop keeps a P while it waits for the next request.
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
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(oomScoreAdj), 0); err != nil {
		errs = append(errs, fmt.Errorf("protect from the OOM killer: %w", err))
	}
	return errors.Join(errs...)
}

// oomScoreAdj makes the OOM killer leave half of the machine's memory out of
// account when it looks for the largest process (oom_badness in mm/oom_kill.c).
// That spares a server as long as it behaves. With -1000 the kernel would rather
// kill everything else for a server that has run out of bounds.
const oomScoreAdj = "-500"
