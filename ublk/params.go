package ublk

import (
	"math/bits"
	"unsafe"

	"ublk-nvmeof/block"
)

// maxShift is log2 of the largest physical block size, io_min and io_opt that the driver
// accepts (ublk_validate_params).
const maxShift = 28

const paramsSize = uint32(unsafe.Sizeof(params{}))

// paramsOf returns the driver's parameters for a geometry. maxIO is the buffer size that
// ADD_DEV granted, in bytes, a multiple of the page size.
//
// Segment and DMA limits are not set. The driver copies between the pages of the request
// and the buffer, so every page layout is fine.
func paramsOf(g block.Geometry, maxIO uint32) params {
	logical := shift(g.LogicalBlock)
	p := params{
		len:   paramsSize,
		types: paramTypeBasic,
		basic: paramBasic{
			logicalBlockShift:  logical,
			physicalBlockShift: max(logical, shift(g.PhysicalBlock)),
			ioMinShift:         max(logical, shift(g.IOMin)),
			// The driver has no value for "none", but blk_validate_limits rounds
			// 1 byte down to none.
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
		p.discard.maxSegments = 1 // the driver supports no more
	}
	return p
}

// shift returns log2 of a size, at most maxShift, and 0 for a size of 0.
func shift(size uint32) uint8 {
	if size == 0 {
		return 0
	}
	return uint8(min(bits.Len32(size)-1, maxShift))
}
