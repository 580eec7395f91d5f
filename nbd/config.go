package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/poller"
)

// Export is a block device under a name.
type Export struct {
	// Name is what clients ask for, at most 4096 bytes; the first export is also
	// the one with the empty name.
	Name string
	// Description is for people.
	Description string
	// Device is the back end.
	Device block.Device
	// ReadOnly refuses changes, as a read-only Device does anyway.
	ReadOnly bool
}

// Config says what New serves, and how.
type Config struct {
	// Exports are what clients can choose from, before Add and Remove.
	Exports []Export
	// Loops serve the connections; loop i opens queue i of every export's device.
	// They run until after Stop.
	Loops []*poller.Loop
	// Depth is the number of buffers of an export on each loop, 16..4096; 0 is
	// 128. A connection may use half of them.
	Depth int
	// MaxIO is the size of a buffer in bytes; it is rounded down to pages and
	// clamped to the geometry's MaxIO. 0 is 256 KiB. The back end allocates
	// Loops × Depth × MaxIO for each export.
	MaxIO int
	// TLS lets clients ask for TLS; nil is without. RequireTLS serves nobody else.
	TLS        *tls.Config
	RequireTLS bool
	// HandshakeTimeout is for a client to choose an export; 0 is a minute.
	HandshakeTimeout time.Duration
	// MaxConns is how many clients there may be at the same time; one more is
	// disconnected at once. 0 is 1024.
	MaxConns int
	// Log hears of changes of state; nil is nobody.
	Log *slog.Logger
}

const (
	defaultDepth     = 128
	minDepth         = 16
	maxDepth         = 4096
	defaultMaxIO     = 256 << 10
	defaultHandshake = time.Minute
	defaultMaxConns  = 1024
	maxName          = 4096 // proto.md: the longest string
	// largestRequest is what a client may send that was not told of a limit.
	largestRequest = 32 << 20
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
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = defaultHandshake
	}
	if c.MaxConns == 0 {
		c.MaxConns = defaultMaxConns
	}
	switch {
	case len(c.Loops) == 0:
		return errors.New("no loop to serve on")
	case c.Depth < minDepth || c.Depth > maxDepth:
		return fmt.Errorf("depth %d is not in %d..%d", c.Depth, minDepth, maxDepth)
	case c.MaxIO < os.Getpagesize():
		return fmt.Errorf("buffers of %d bytes are smaller than a page", c.MaxIO)
	case c.RequireTLS && c.TLS == nil:
		return errors.New("TLS is required, and not configured")
	}
	return nil
}

// check says what is wrong with an export.
func (e *Export) check() error {
	switch {
	case e.Device == nil:
		return errors.New("it has no device")
	case len(e.Name) > maxName || len(e.Description) > maxName:
		return fmt.Errorf("its name or description is longer than %d bytes", maxName)
	}
	return e.Device.Geometry().Validate()
}

// offer is an export as a client sees it, at the moment when it asks.
type offer struct {
	export     *export
	size       uint64 // bytes
	flags      uint16
	minBlock   uint32
	preferred  uint32
	maxRequest uint32
}

// offer describes the export. structured says what the client negotiated.
func (e *export) offer(structured bool) offer {
	g := e.Device.Geometry()
	o := offer{
		export: e, size: g.Sectors << block.SectorShift,
		flags:    flagHasFlags | flagSendFlush | flagSendFUA | flagCanMultiConn,
		minBlock: g.LogicalBlock, preferred: max(g.PhysicalBlock, 4096),
		maxRequest: e.limits.maxRequest,
	}
	if e.ReadOnly || g.ReadOnly {
		o.flags |= flagReadOnly
	}
	if g.MaxDiscardSectors > 0 {
		o.flags |= flagSendTrim
	}
	if g.MaxZeroesSectors > 0 {
		o.flags |= flagSendZeroes
	}
	if structured {
		o.flags |= flagSendDF
	}
	return o
}

// limits are how an export's buffers may be used.
type limits struct {
	maxIO      int    // bytes of a buffer
	tags       int    // that a connection may hold
	maxRequest uint32 // bytes of a read or write
}

// limitsOf are those of a device with the given geometry.
func (c *Config) limitsOf(g block.Geometry) limits {
	page := os.Getpagesize()
	l := limits{maxIO: min(c.MaxIO, int(g.MaxIO)) / page * page, tags: c.Depth / 2}
	most := uint64(l.maxIO) * uint64(l.tags)
	if g.ChunkSectors > 0 {
		// Every boundary may cost a tag more.
		unit := min(uint64(l.maxIO), uint64(g.ChunkSectors)<<block.SectorShift)
		most = unit * uint64(l.tags-2) / 2
	}
	l.maxRequest = uint32(min(most, largestRequest)) &^ (g.LogicalBlock - 1)
	return l
}
