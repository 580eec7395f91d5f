package ublk

import (
	"errors"
	"fmt"
	"log/slog"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/frontend"
	"ublk-nvmeof/poller"
)

// Config configures Start and Recover.
type Config struct {
	// ID is the device number N of /dev/ublkbN, or -1 for the next free number.
	ID int
	// Device is the back end.
	Device block.Device
	// Loops serve the hardware queues: Loops[i] serves queue i. The driver makes
	// as many queues as there are loops, but not more than there are CPUs. Several
	// devices may share the loops. The loops must run until Stop has returned. If it is
	// empty, the loops are those of the device (poller.Looper).
	Loops []*poller.Loop
	// Depth is the largest number of requests in flight per queue, 1..4096. Zero
	// means 128.
	Depth int
	// MaxIO is the size of the buffer of a request, in bytes, from one page to
	// 1 GiB. It is rounded down to pages and limited to the geometry's MaxIO. Zero
	// means 256 KiB. The back end allocates Loops × Depth × MaxIO bytes.
	MaxIO int
	// Recovery says what the driver does with the device if this process dies.
	Recovery RecoveryPolicy
	// ShareMemory lets users do I/O from memory that they share with the driver and the back
	// end, which must be a block.Registrar (Device.Share). It needs Linux 7.1. Recover ignores
	// it: the device has the feature or not.
	ShareMemory bool
	// Shared is what a device had as shared memory when its server died, for Recover. Requests
	// with this memory wait until Share or Unshare.
	Shared SharedMemory
	// KeepAffinity leaves the CPU affinity of the loops as it is. Otherwise each
	// loop is pinned to one of the CPUs that submit to its queue. Set it for the
	// second device on the same loops, whose queues have the same CPUs.
	KeepAffinity bool
	// Log receives changes of state. Nothing is logged if it is nil.
	Log *slog.Logger
}

// setDefaults fills in defaults and checks the configuration.
func (c *Config) setDefaults() error {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.ID < -1 || c.ID >= maxID:
		return fmt.Errorf("device number %d is not in -1..%d", c.ID, maxID-1)
	case c.Device == nil:
		return errors.New("no block device to serve")
	case c.Recovery > RecoveryFail:
		return fmt.Errorf("recovery policy %d is unknown", c.Recovery)
	}
	if _, ok := c.Device.(block.Registrar); c.ShareMemory && !ok {
		return errors.New("the block device cannot register memory of users")
	}
	if err := frontend.SizeQueues(&c.Depth, &c.MaxIO, 1); err != nil {
		return err
	}
	var err error
	if c.Loops, err = frontend.Loops(c.Loops, c.Device); err != nil {
		return err
	}
	if len(c.Loops) > maxQueues {
		return fmt.Errorf("%d loops are more than %d", len(c.Loops), maxQueues)
	}
	return nil
}
