package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"
	"unicode/utf8"

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
	// 128. A connection may use three quarters of them; see Fairness in the package
	// documentation.
	Depth int
	// MaxIO is the size of a buffer in bytes, at least a page; 0 is 256 KiB. It is
	// clamped to the geometry's MaxIO and rounded down to pages, but is at least two
	// logical blocks. The back end allocates Loops × Depth × MaxIO for each export.
	// Larger requests are served in pieces.
	MaxIO int
	// TLS lets clients ask for TLS; nil is without. RequireTLS serves nobody else.
	// ConnectionState.VerifiedChains of its client certificates is known to its own
	// VerifyConnection only.
	TLS        *tls.Config
	RequireTLS bool
	// HandshakeTimeout is for a client to choose an export; 0 is a minute.
	HandshakeTimeout time.Duration
	// StallTimeout is how long a client may take nothing of its replies, or send
	// nothing of the data of a write, before it is disconnected: less than 64 KiB
	// in that time, if as much is due. While another connection can do nothing for
	// want of buffers, a quarter of that time is enough. At least 8 ms; 0 is 30
	// seconds. The kernel's client of Start is never disconnected for that.
	StallTimeout time.Duration
	// MaxConns is how many clients are served at the same time, and three quarters
	// of that how many of one source: a certificate, or else an address or a local
	// user. One more is refused. Each takes some 100 KiB. 0 is 1024.
	MaxConns int
	// MaxHandshakes is how many clients may be choosing an export at the same time.
	// For one more, one of the source that has most of them is disconnected, the one
	// that has taken longest; clients within TLS come last. Each takes up to 200 KiB.
	// 0 is 256.
	MaxHandshakes int
	// Log hears of changes of state; nil is nobody.
	Log *slog.Logger
}

const (
	defaultDepth     = 128
	minDepth         = 16
	minStall         = stallTicks * time.Millisecond
	maxDepth         = 4096
	defaultMaxIO     = 256 << 10
	defaultHandshake = time.Minute
	defaultStall     = 30 * time.Second
	defaultMaxConns  = 1024
	defaultMaxShakes = 256
	maxName          = 4096 // proto.md: the longest string
	// largestRequest is what a client may send that was not told of a limit, and
	// leastRequest what every server should take (proto.md: maximum payload size).
	largestRequest = 32 << 20
	leastRequest   = 1 << 20
	// maxSize is the largest export, in bytes: offsets are signed in most clients.
	maxSize = 1<<63 - 1
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
	if c.StallTimeout == 0 {
		c.StallTimeout = defaultStall
	}
	if c.MaxConns == 0 {
		c.MaxConns = defaultMaxConns
	}
	if c.MaxHandshakes == 0 {
		c.MaxHandshakes = defaultMaxShakes
	}
	switch {
	case len(c.Loops) == 0:
		return errors.New("no loop to serve on")
	case c.Depth < minDepth || c.Depth > maxDepth:
		return fmt.Errorf("depth %d is not in %d..%d", c.Depth, minDepth, maxDepth)
	case c.MaxIO < os.Getpagesize():
		return fmt.Errorf("MaxIO of %d bytes is below a page, %d bytes", c.MaxIO, os.Getpagesize())
	case c.HandshakeTimeout < 0:
		return fmt.Errorf("HandshakeTimeout of %v is negative", c.HandshakeTimeout)
	case c.StallTimeout < minStall:
		return fmt.Errorf("StallTimeout of %v is below %v", c.StallTimeout, minStall)
	case c.MaxConns < 1 || c.MaxHandshakes < 1:
		return fmt.Errorf("MaxConns %d or MaxHandshakes %d is below 1", c.MaxConns, c.MaxHandshakes)
	case c.RequireTLS && c.TLS == nil:
		return errors.New("TLS is required, and not configured")
	}
	if c.TLS != nil {
		c.TLS = askAnyCertificate(c.TLS)
	}
	return nil
}

// check says what is wrong with an export.
func (e *Export) check() error {
	if e.Device == nil {
		return errors.New("it has no device")
	}
	for _, text := range []string{e.Name, e.Description} {
		if len(text) > maxName || !utf8.ValidString(text) || strings.ContainsRune(text, 0) {
			return fmt.Errorf("its name or description is longer than %d bytes, or no UTF-8, or has a NUL", maxName)
		}
	}
	g := e.Device.Geometry()
	if g.Sectors > maxSize>>block.SectorShift {
		return fmt.Errorf("its %d sectors are more than 2^63 - 1 bytes", g.Sectors)
	}
	return g.Validate()
}

// offer is an export as a client sees it, at the moment when it asks.
type offer struct {
	export     *export
	size       uint64 // bytes
	flags      uint16
	minBlock   uint32
	preferred  uint32
	maxRequest uint32
	structured bool // the client takes structured replies
	aligned    bool // the client knows minBlock
}

// offer describes the export. structured says what the client negotiated.
func (e *export) offer(structured bool) offer {
	g := e.Device.Geometry()
	o := offer{
		export: e, size: min(g.Sectors, maxSize>>block.SectorShift) << block.SectorShift,
		flags:    flagHasFlags | flagSendFlush | flagSendFUA | flagCanMultiConn,
		minBlock: g.LogicalBlock, preferred: max(g.PhysicalBlock, 4096),
		structured: structured,
	}
	o.maxRequest = max(e.atOnce(g), leastRequest)
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

// atOnce is the largest read, in bytes, that a connection has enough tags for at the
// same time, at most largestRequest.
func (e *export) atOnce(g block.Geometry) uint32 {
	b := boundsOf(g, e.buffer)
	most := uint64(b.buffer) * uint64(e.share)
	if b.chunk > 0 { // every boundary may cost a tag more
		most = min(uint64(b.buffer), b.chunk) * uint64(e.share-2) / 2
	}
	return max(uint32(min(most, largestRequest))&^(g.LogicalBlock-1), b.block)
}
