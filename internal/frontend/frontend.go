// Package frontend has the defaults and limits that the front ends have in common.
package frontend

import (
	"errors"
	"fmt"
	"os"

	"ublk-nvmeof/block"
	"ublk-nvmeof/poller"
)

const (
	defaultDepth = 128
	defaultMaxIO = 256 << 10
	// largestMaxIO is the size of the largest buffer. The results of ublk's driver, which
	// are signed, have room for it.
	largestMaxIO = 1 << 30
)

// SizeQueues fills in the defaults of the number of tags of a queue and of the size of their
// buffers in bytes, and checks them. least is the smallest number of tags.
func SizeQueues(depth, maxIO *int, least int) error {
	if *depth == 0 {
		*depth = defaultDepth
	}
	if *maxIO == 0 {
		*maxIO = defaultMaxIO
	}
	page := os.Getpagesize()
	switch {
	case *depth < least || *depth > block.MaxDepth:
		return fmt.Errorf("depth %d is not in %d..%d", *depth, least, block.MaxDepth)
	case *maxIO < page || *maxIO > largestMaxIO:
		return fmt.Errorf("buffer of %d bytes is not in %d..%d", *maxIO, page, largestMaxIO)
	}
	return nil
}

// BufferSize returns the size of the buffers for a device: whole pages, at most maxIO and the
// largest request of the device, and at least the given number of logical blocks.
func BufferSize(maxIO int, g block.Geometry, blocks int) int {
	page := os.Getpagesize()
	least := (blocks*int(g.LogicalBlock) + page - 1) / page * page
	return max(min(maxIO, int(g.MaxIO))/page*page, least)
}

// Loops returns the loops that serve the devices. If the configuration has none, they are those
// of the back end, if it has loops of its own (poller.Looper).
func Loops(given []*poller.Loop, device block.Device) ([]*poller.Loop, error) {
	if l, ok := device.(poller.Looper); ok && len(given) == 0 {
		given = l.Loops()
	}
	if len(given) == 0 {
		return nil, errors.New("no loop to serve on")
	}
	return given, nil
}
