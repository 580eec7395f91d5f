package ublk

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// pin pins each loop to one of the CPUs that submit to its queue. If this process may
// use none of them, the loop stays where it is.
func (d *Device) pin(ctx context.Context) error {
	var allowed unix.CPUSet
	// The affinity of the main thread counts, because other threads may be pinned.
	if err := unix.SchedGetaffinity(os.Getpid(), &allowed); err != nil {
		return fmt.Errorf("get CPU affinity: %w", err)
	}
	for i, s := range d.serves {
		mask := make([]byte, 8*len(allowed)) // one bit for each CPU in allowed
		if err := d.command(ctx, call{cmd: getQueueAffinity, data: uint64(i), buf: mask}); err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
		cpu := firstCPU(mask, &allowed)
		if cpu < 0 {
			continue
		}
		if err := s.loop.SetAffinity([]int{cpu}); err != nil {
			return fmt.Errorf("pin loop of queue %d to CPU %d: %w", i, cpu, err)
		}
		d.log.Debug("queue pinned", "queue", i, "cpu", cpu)
	}
	return nil
}

// firstCPU returns the first CPU that is in both sets, or -1. The mask is an array of
// the kernel's unsigned longs.
func firstCPU(mask []byte, allowed *unix.CPUSet) int {
	for i := 0; i+8 <= len(mask); i += 8 {
		word := binary.NativeEndian.Uint64(mask[i:])
		for bit := range 64 {
			if cpu := i*8 + bit; word>>bit&1 != 0 && allowed.IsSet(cpu) {
				return cpu
			}
		}
	}
	return -1
}
