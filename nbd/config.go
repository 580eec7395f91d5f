package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"
	"unicode/utf8"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/frontend"
	"ublk-nvmeof/poller"
)

// Export is a block device under a name.
type Export struct {
	// Name is the name that clients ask for, at most 4096 bytes. The first export is
	// also the export with the empty name.
	Name string
	// Description is free text for people, at most 4096 bytes.
	Description string
	// Device is the back end.
	Device block.Device
	// ReadOnly makes the export refuse changes. An export of a read-only device
	// always does.
	ReadOnly bool
}

// Config configures New.
type Config struct {
	// Exports are the first exports. Add and Remove change them later.
	Exports []Export
	// Loops serve the connections. Loop i opens queue i of every export's device. The
	// loops must run until Stop has returned. If it is empty, the loops are those of the
	// device of the first export (poller.Looper).
	Loops []*poller.Loop
	// Depth is the number of buffers of an export on each loop, 16..4096. Zero means
	// 128. A connection may use three quarters of them; see Fairness in the package
	// documentation.
	Depth int
	// MaxIO is the size of a buffer in bytes, from one page to 1 GiB. Zero means 256 KiB.
	// It is limited to the geometry's MaxIO and rounded down to pages, but is at
	// least two logical blocks. The back end allocates Loops × Depth × MaxIO for each
	// export. Larger requests are served in pieces.
	MaxIO int
	// TLS is the configuration for clients that ask for TLS. If it is nil, the server
	// refuses TLS. With RequireTLS, a client must ask for TLS. Only TLS.VerifyConnection
	// gets the ConnectionState.VerifiedChains of client certificates.
	TLS        *tls.Config
	RequireTLS bool
	// HandshakeTimeout is the time within which a client must choose an export. Zero
	// means one minute.
	HandshakeTimeout time.Duration
	// StallTimeout limits the time for which a client may stall while it has replies
	// to read, or after it has announced the data of a write. If it transfers less
	// than 64 KiB in that time, and not all, it is disconnected. A quarter of the
	// time applies while another connection is blocked because no buffer is free. At
	// least 8 ms. Zero means 30 s. The kernel's client (Start) is never disconnected
	// for this reason.
	StallTimeout time.Duration
	// MaxConns is the largest number of clients in the transmission phase. Zero means
	// 1024. Clients of one source get at most three quarters of these places. A
	// source is a client certificate, or, without one, an IP address or a local user.
	// Further clients are refused, unless an idle one gives way; see Fairness in the
	// package documentation. A client takes about 100 KiB of memory.
	MaxConns int
	// MaxHandshakes is the largest number of clients that negotiate at the same time.
	// Zero means 256. When another client connects, the server disconnects a client
	// of the source with the most negotiating clients: of those without TLS the one
	// that has negotiated longest, or, if all use TLS, of all of them. A client takes
	// up to 200 KiB of memory.
	MaxHandshakes int
	// Log receives changes of state. Nothing is logged if it is nil.
	Log *slog.Logger
}

const (
	minDepth         = 16
	minStall         = stallTicks * time.Millisecond
	defaultHandshake = time.Minute
	defaultStall     = 30 * time.Second
	defaultMaxConns  = 1024
	defaultMaxShakes = 256
	maxName          = 4096 // the longest string in proto.md
	// largestRequest is the largest read or write that a client may send if it does
	// not know the server's limit. leastRequest is the least limit that a server
	// should advertise (proto.md: maximum payload size).
	largestRequest = 32 << 20
	leastRequest   = 1 << 20
	// maxSize is the largest export, in bytes. Offsets are signed in most clients.
	maxSize = 1<<63 - 1
)

// setDefaults fills in defaults and checks the configuration.
func (c *Config) setDefaults() error {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if err := frontend.SizeQueues(&c.Depth, &c.MaxIO, minDepth); err != nil {
		return err
	}
	var first block.Device
	if len(c.Exports) > 0 {
		first = c.Exports[0].Device
	}
	var err error
	if c.Loops, err = frontend.Loops(c.Loops, first); err != nil {
		return err
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
	case c.HandshakeTimeout < 0:
		return fmt.Errorf("HandshakeTimeout of %v is negative", c.HandshakeTimeout)
	case c.StallTimeout < minStall:
		return fmt.Errorf("StallTimeout of %v is below %v", c.StallTimeout, minStall)
	case c.MaxConns < 1 || c.MaxHandshakes < 1:
		return fmt.Errorf("MaxConns %d or MaxHandshakes %d is below 1", c.MaxConns, c.MaxHandshakes)
	case c.RequireTLS && c.TLS == nil:
		return errors.New("TLS is required but not configured")
	}
	if c.TLS != nil {
		c.TLS = askAnyCertificate(c.TLS)
	}
	return nil
}

// check checks the fields of an export.
func (e *Export) check() error {
	if e.Device == nil {
		return errors.New("it has no device")
	}
	for _, text := range []string{e.Name, e.Description} {
		if len(text) > maxName || !utf8.ValidString(text) || strings.ContainsRune(text, 0) {
			return fmt.Errorf("its name or description is longer than %d bytes, is not UTF-8, or contains a NUL", maxName)
		}
	}
	g := e.Device.Geometry()
	if g.Sectors > maxSize>>block.SectorShift {
		return fmt.Errorf("its %d sectors are more than 2^63 - 1 bytes", g.Sectors)
	}
	return g.Validate()
}

// offer describes an export at the moment when a client asks for it.
type offer struct {
	export     *export
	size       uint64 // bytes
	flags      uint16
	minBlock   uint32
	preferred  uint32
	maxRequest uint32
	structured bool // the client accepts structured replies
	aligned    bool // the client knows minBlock
}

// offer describes the export. structured reports whether the client has negotiated
// structured replies.
func (e *export) offer(structured bool) offer {
	g := e.geometry()
	o := offer{
		export: e, size: g.Sectors << block.SectorShift,
		flags:    flagHasFlags | flagSendFlush | flagSendFUA | flagCanMultiConn,
		minBlock: g.LogicalBlock, preferred: max(g.PhysicalBlock, 4096),
		structured: structured,
	}
	o.maxRequest = max(e.atOnce(), leastRequest)
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

// atOnce returns the size in bytes of the largest read for which a connection can hold
// all tags at once. It is at most largestRequest.
func (e *export) atOnce() uint32 {
	b := boundsOf(e.geometry(), e.buffer)
	most := uint64(b.buffer) * uint64(e.share)
	if b.chunk > 0 { // every boundary may cost one more tag
		most = min(uint64(b.buffer), b.chunk) * uint64(e.share-2) / 2
	}
	return max(uint32(min(most, largestRequest))&^(b.block-1), b.block)
}
