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
// and counts this one in until the process ends: emulated VMs that share a CPU
// are so slow that what runs in them times out. The descriptor is not closed on
// purpose, it holds the lock.
func takeSlot(cache string) error {
	told := false
	for {
		for i := range runtime.NumCPU() {
			f, err := os.OpenFile(filepath.Join(cache, fmt.Sprintf("slot%d.lock", i)), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
			if err != nil {
				return fmt.Errorf("take a slot: %w", err)
			}
			if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
				heldSlot = f
				return nil
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

var heldSlot *os.File
