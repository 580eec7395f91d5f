// Package block is the interface between front ends (ublk, nbd) and back ends (the
// initiator, a RAM device). A Device has a Geometry, and for each loop a Queue that
// takes requests and returns results, both in batches.
//
// # Ownership
//
// I/O memory belongs to the back end, because the back end must register it with
// the RDMA device. A front end borrows the buffer of a tag by Queue.Buffer and may
// touch it only while it owns the tag. Submit passes the tag and its buffer to the
// back end. The Result that Reap returns passes them back.
//
// # Concurrency
//
// All methods of a Queue are called from the one loop that serves it. The methods
// of a Device may be called from any goroutine.
package block

import (
	"errors"

	"golang.org/x/sys/unix"
)

// SectorShift is log2 of the unit that Request.Sector and Request.Sectors
// count in: 512 bytes, whatever the logical block size, as in the Linux block
// layer.
const (
	SectorShift = 9
	SectorSize  = 1 << SectorShift
)

// Op is the kind of a request. The zero value is no operation and is refused.
type Op uint8

// Operations, as far as the Linux block layer hands them to a driver.
const (
	OpUnset       Op = iota
	OpRead           // REQ_OP_READ
	OpWrite          // REQ_OP_WRITE
	OpFlush          // REQ_OP_FLUSH; Sector and Sectors are ignored
	OpDiscard        // REQ_OP_DISCARD
	OpWriteZeroes    // REQ_OP_WRITE_ZEROES
)

var opNames = [...]string{"unset", "read", "write", "flush", "discard", "write-zeroes"}

func (o Op) String() string {
	if int(o) < len(opNames) {
		return opNames[o]
	}
	return "invalid"
}

// Flags modify a request.
type Flags uint8

// Request flags.
const (
	FUA     Flags = 1 << iota // REQ_FUA: on stable media before it completes
	NoUnmap                   // REQ_NOUNMAP: write zeroes must not deallocate
)

// Request is one I/O. It holds no pointers: the data of a read or write is
// Queue.Buffer(Tag)[:Sectors<<SectorShift].
type Request struct {
	Sector  uint64 // first 512-byte sector
	Sectors uint32 // length in 512-byte sectors
	Tag     uint16 // 0 ≤ Tag < depth, unique among the requests in flight
	Op      Op
	Flags   Flags
}

// Check finds what must not be carried out on a device of the given capacity in
// sectors and logical block size in bytes, with buffers of maxIO bytes: 0, or the errno
// for it. A back end calls it once for each request, and need not look at the fields
// again. It does not look at the tag.
func (r *Request) Check(capacity uint64, logicalBlock uint32, maxIO int) unix.Errno {
	switch r.Op {
	case OpFlush:
		return 0
	case OpRead, OpWrite:
		if uint64(r.Sectors)<<SectorShift > uint64(maxIO) {
			return unix.EINVAL
		}
	case OpDiscard, OpWriteZeroes:
	default:
		return unix.EOPNOTSUPP
	}
	perBlock := uint64(logicalBlock >> SectorShift)
	switch {
	case r.Sectors == 0, r.Flags&^(FUA|NoUnmap) != 0, (r.Sector|uint64(r.Sectors))&(perBlock-1) != 0:
		return unix.EINVAL
	case r.Sector > capacity, uint64(r.Sectors) > capacity-r.Sector:
		return unix.EIO // as the Linux block layer says beyond the end
	}
	return 0
}

// Result ends a request. There are no short transfers: a request is done in
// its whole length, or not.
type Result struct {
	Tag   uint16
	Errno uint16 // 0, or a Linux errno as a positive number; never EAGAIN
}

// Queue is one loop's way into a Device.
type Queue interface {
	// Buffer is the memory of one tag, QueueConfig.MaxIO bytes long, page
	// aligned, at the same address for the life of the Queue.
	Buffer(tag uint16) []byte
	// Submit takes the requests, in order. It does not block, and it cannot
	// refuse: a request that cannot be carried out comes back from Reap with
	// an errno: EINVAL for one whose fields contradict each other or whose tag is
	// out of range or in flight. The slice itself is the caller's again when Submit
	// returns. The buffer of a request that is no read or write may be overwritten.
	Submit(reqs []Request)
	// Reap fills done with results, at most len(done), and says how many.
	// Results come in any order.
	Reap(done []Result) int
	// Close gives the queue's memory back. No request may be in flight.
	Close() error
}

// QueueConfig is what a front end asks of a Queue.
type QueueConfig struct {
	Depth int // number of tags, 1..4096
	MaxIO int // bytes per tag, a multiple of the page size

	// WriteThrough says that the front end promises its users a device without a
	// volatile cache, so that no Flush will come. Whatever cache the back end has, or
	// comes to have, a write is on stable media when it ends.
	WriteThrough bool
}

// Device is a block device that a back end offers.
type Device interface {
	// Geometry is what the device is at this moment.
	Geometry() Geometry
	// OpenQueue makes the queue that loop number i serves, 0 ≤ i < number of
	// loops the back end was given. A loop opens at most one queue of a device.
	OpenQueue(i int, cfg QueueConfig) (Queue, error)
}

// Geometry says what a device is and what it can do. Sizes are in bytes unless
// they say sectors.
type Geometry struct {
	Sectors            uint64 // capacity, 512-byte sectors
	LogicalBlock       uint32 // 512..4096, a power of two
	PhysicalBlock      uint32 // ≥ LogicalBlock, a power of two
	IOMin, IOOpt       uint32 // preferred sizes; 0 = LogicalBlock, none
	MaxIO              uint32 // largest read or write; a multiple of LogicalBlock
	ChunkSectors       uint32 // requests do not cross a multiple of it; 0 = no such boundary
	VolatileCache      bool   // a completed write may be lost unless flushed or FUA
	ReadOnly           bool
	MaxDiscardSectors  uint32 // 0 = no discard
	DiscardGranularity uint32 // with MaxDiscardSectors; 0 = LogicalBlock
	DiscardAlignment   uint32
	MaxZeroesSectors   uint32 // 0 = no write zeroes
}

// Validate reports the first field that contradicts the rules above.
func (g Geometry) Validate() error {
	switch {
	case g.LogicalBlock < 512 || g.LogicalBlock > 4096 || g.LogicalBlock&(g.LogicalBlock-1) != 0:
		return errors.New("geometry: logical block size is not 512, 1024, 2048 or 4096")
	case g.PhysicalBlock < g.LogicalBlock || g.PhysicalBlock&(g.PhysicalBlock-1) != 0:
		return errors.New("geometry: physical block size is below the logical block size or no power of two")
	case g.Sectors == 0 || g.Sectors%uint64(g.LogicalBlock>>SectorShift) != 0:
		return errors.New("geometry: capacity is zero or no multiple of the logical block size")
	case g.MaxIO < 4096 || g.MaxIO%g.LogicalBlock != 0:
		return errors.New("geometry: largest I/O is below 4096 or no multiple of the logical block size")
	}
	return nil
}
