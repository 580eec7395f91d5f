package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// takeSlot waits until fewer VMs run on this cache than the machine has CPUs,
// and counts this one in until the returned file is closed: emulated VMs that
// share a CPU are so slow that what runs in them times out.
func takeSlot(cache string) (*os.File, error) {
	for told := false; ; {
		for i := range runtime.NumCPU() {
			f, err := os.OpenFile(filepath.Join(cache, fmt.Sprintf("slot%d.lock", i)), os.O_CREATE|os.O_RDWR, 0o644)
			if err != nil {
				return nil, fmt.Errorf("take a slot: %w", err)
			}
			if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
				return f, nil
			}
			f.Close()
		}
		if !told {
			told = true
			fmt.Fprintf(os.Stderr, "vm: %d VMs are running, waiting for one to end\n", runtime.NumCPU())
		}
		time.Sleep(200 * time.Millisecond) // a lock on any of several files makes no event
	}
}
