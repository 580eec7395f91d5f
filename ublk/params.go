package ublk

import (
	"math/bits"
	"unsafe"

	"ublk-nvmeof/block"
)

// maxShift is log2 of the largest physical block, io_min and io_opt that the
// driver takes (ublk_validate_params).
const maxShift = 28

const paramsSize = uint32(unsafe.Sizeof(params{}))

// paramsOf turns a geometry into the driver's parameters. maxIO is what ADD_DEV
// granted, in bytes, a multiple of the page size.
//
// Segment and DMA limits are left alone: the driver copies between the
// request's pages and the buffer, so any page layout will do.
func paramsOf(g block.Geometry, maxIO uint32) params {
	logical := shift(g.LogicalBlock)
	p := params{
		len:   paramsSize,
		types: paramTypeBasic,
		basic: paramBasic{
			logicalBlockShift:  logical,
			physicalBlockShift: max(logical, shift(g.PhysicalBlock)),
			ioMinShift:         max(logical, shift(g.IOMin)),
			// The driver has no "none"; 1 byte is rounded down to none by
			// blk_validate_limits.
			ioOptShift:   shift(g.IOOpt),
			maxSectors:   maxIO >> block.SectorShift,
			chunkSectors: g.ChunkSectors,
			devSectors:   g.Sectors,
		},
	}
	if g.ReadOnly {
		p.basic.attrs |= attrReadOnly
	}
	if g.VolatileCache {
		p.basic.attrs |= attrVolatileCache | attrFUA
	}
	if g.MaxDiscardSectors == 0 && g.MaxZeroesSectors == 0 {
		return p
	}
	p.types |= paramTypeDiscard
	p.discard = paramDiscard{
		alignment:        g.DiscardAlignment,
		granularity:      max(g.DiscardGranularity, g.LogicalBlock),
		maxSectors:       g.MaxDiscardSectors,
		maxZeroesSectors: g.MaxZeroesSectors,
	}
	if g.MaxDiscardSectors > 0 {
		p.discard.maxSegments = 1 // all that the driver can do
	}
	return p
}

// shift is log2 of a size, rounded down to what the driver takes; 0 of 0.
func shift(size uint32) uint8 {
	if size == 0 {
		return 0
	}
	return uint8(min(bits.Len32(size)-1, maxShift))
}
