package ublk

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"ublk-nvmeof/block"
	"ublk-nvmeof/poller"
)

// Config says what Start serves, and how.
type Config struct {
	// ID is the device number N of /dev/ublkbN; -1 is the next free one.
	ID int
	// Device is the back end.
	Device block.Device
	// Loops serve the hardware queues: queue i is Loops[i]'s. There are as
	// many queues as loops, or as CPUs if those are fewer. Several devices may
	// share the loops. They run until after Stop.
	Loops []*poller.Loop
	// Depth is the number of requests in flight per queue, 1..4096; 0 is 128.
	Depth int
	// MaxIO is the size of each request's buffer, in bytes; it is rounded down
	// to pages and clamped to the geometry's MaxIO. 0 is 256 KiB. The back end
	// allocates Loops × Depth × MaxIO.
	MaxIO int
	// Recovery is what happens to the device when this process dies.
	Recovery RecoveryPolicy
	// KeepAffinity leaves the loops on the CPUs where they are. Otherwise each
	// loop is pinned to one of the CPUs whose requests its queue gets. The
	// second device on the same loops wants it set: its queues have the same
	// CPUs anyway.
	KeepAffinity bool
	// Log receives changes of state. If it is nil, nothing is logged.
	Log *slog.Logger
}

const (
	defaultDepth = 128
	defaultMaxIO = 256 << 10
	// largestMaxIO keeps byte counts within the driver's signed results.
	largestMaxIO = 1 << 30
)

// setDefaults checks the configuration and completes it.
func (c *Config) setDefaults() error {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Depth == 0 {
		c.Depth = defaultDepth
	}
	if c.MaxIO == 0 {
		c.MaxIO = defaultMaxIO
	}
	switch {
	case c.ID < -1 || c.ID >= maxID:
		return fmt.Errorf("device number %d is not in -1..%d", c.ID, maxID-1)
	case c.Device == nil:
		return errors.New("no block device to serve")
	case len(c.Loops) == 0 || len(c.Loops) > maxQueues:
		return fmt.Errorf("%d loops are not in 1..%d", len(c.Loops), maxQueues)
	case c.Depth < 1 || c.Depth > maxDepth:
		return fmt.Errorf("depth %d is not in 1..%d", c.Depth, maxDepth)
	case c.MaxIO < os.Getpagesize() || c.MaxIO > largestMaxIO:
		return fmt.Errorf("largest request of %d bytes is not in %d..%d", c.MaxIO, os.Getpagesize(), largestMaxIO)
	case c.Recovery > RecoveryFail:
		return fmt.Errorf("recovery policy %d is unknown", c.Recovery)
	}
	return nil
}
