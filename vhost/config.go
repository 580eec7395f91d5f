package vhost

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"math/bits"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/frontend"
	"ublk-nvmeof/poller"
)

// Config configures New.
type Config struct {
	// Device is the back end.
	Device block.Device
	// Loops serve the rings: Loops[i mod len(Loops)] serves ring i. Loop i opens queue i
	// of the device. Several servers may share the loops. The loops must run until Stop
	// has returned. If it is empty, the loops are those of the device (poller.Looper).
	Loops []*poller.Loop
	// Depth is the number of buffers on each loop, 1..4096. Zero means 128.
	Depth int
	// MaxIO is the size of a buffer in bytes, from one page to 1 GiB. It is rounded down
	// to pages and limited to the geometry's MaxIO. Zero means 256 KiB. The back end
	// allocates Loops × Depth × MaxIO. Larger requests are served in pieces.
	MaxIO int
	// ZeroCopy has the guest's memory registered with the device, which must be a
	// block.Registrar. Reads and writes of contiguous memory are not copied then, nor those of
	// memory in several pieces that have 4 KiB on average and whole logical blocks each, as far
	// as the device's queues take them (block.Gatherer). The back end,
	// and for a remote disk its target, may access all of the guest's memory.
	ZeroCopy bool
	// ID is the name of the disk for the guest, of which it sees 20 bytes.
	ID string
	// Log receives changes of state. Nothing is logged if it is nil.
	Log *slog.Logger
}

// setDefaults fills in defaults and checks the configuration.
func (c *Config) setDefaults() error {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if err := frontend.SizeQueues(&c.Depth, &c.MaxIO, 1); err != nil {
		return err
	}
	var err error
	if c.Loops, err = frontend.Loops(c.Loops, c.Device); err != nil {
		return err
	}
	switch {
	case binary.NativeEndian.Uint16([]byte{1, 0}) != 1:
		return errors.New("rings of virtio are little-endian, and this machine is not")
	case c.Device == nil:
		return errors.New("no block device to serve")
	}
	if _, ok := c.Device.(block.Registrar); c.ZeroCopy && !ok {
		return errors.New("the block device cannot register memory of a guest")
	}
	g := c.Device.Geometry()
	if err := g.Validate(); err != nil {
		return err
	}
	c.MaxIO = frontend.BufferSize(c.MaxIO, g, 1)
	return nil
}

// features returns the features to offer for a device.
func features(g block.Geometry) uint64 {
	f := uint64(alwaysOffered)
	if g.ReadOnly {
		f |= featReadOnly
	}
	if g.MaxDiscardSectors > 0 {
		f |= featDiscard
	}
	if g.MaxZeroesSectors > 0 {
		f |= featWriteZeroes
	}
	return f
}

// configSpace returns struct virtio_blk_config. A guest always flushes, because only the
// back end knows at each moment whether that is needed.
func configSpace(g block.Geometry, queues int) [maxConfigSize]byte {
	var p [maxConfigSize]byte
	le := binary.LittleEndian
	perBlock := g.LogicalBlock >> block.SectorShift
	clip16 := func(n uint32) uint16 { return uint16(min(n, 1<<16-1)) }
	le.PutUint64(p[0:], g.Sectors)
	le.PutUint32(p[12:], segMax)
	le.PutUint32(p[20:], g.LogicalBlock)
	p[24] = byte(bits.TrailingZeros32(g.PhysicalBlock / g.LogicalBlock))
	le.PutUint16(p[26:], max(clip16(g.IOMin/g.LogicalBlock), 1))
	le.PutUint32(p[28:], g.IOOpt/g.LogicalBlock)
	p[32] = 1 // write back
	le.PutUint16(p[34:], uint16(queues))
	if g.MaxDiscardSectors > 0 {
		le.PutUint32(p[36:], max(g.MaxDiscardSectors/perBlock, 1)*perBlock)
		le.PutUint32(p[40:], maxDiscardSegments)
		le.PutUint32(p[44:], max(g.DiscardGranularity, g.LogicalBlock)>>block.SectorShift)
	}
	if g.MaxZeroesSectors > 0 {
		le.PutUint32(p[48:], max(g.MaxZeroesSectors/perBlock, 1)*perBlock)
		le.PutUint32(p[52:], maxDiscardSegments)
		p[56] = 1
	}
	return p
}
