// Package block is the interface between front ends (ublk, nbd, vhost, disk) and back ends
// (the initiator, a RAM device). A Device has a Geometry, and for each loop a Queue that
// takes requests and returns results, both in batches.
//
// # Ownership
//
// I/O memory belongs to the back end, because the back end must register it with
// the RDMA device. A front end borrows the buffer of a tag by Queue.Buffer and may
// touch it only while it owns the tag. Submit passes the tag and its buffer to the
// back end. The Result that Reap returns passes them back.
//
// A front end can also have memory of its own registered, if the device is a Registrar. A read or
// write can then name a part of such a region (Request.Region), and its data is not copied. If the
// queue is a Gatherer, the data can also be in several parts of regions, which are called segments
// (Request.Segments). The queue has a table of MaxSegments segments for each tag. The front end fills
// in the first entries of it before Submit. Until the Result of the request, the table and the parts
// of regions belong to the back end.
//
// # Completion
//
// Every request that Submit takes has exactly one Result, whatever it asks for. A tag is in
// flight from Submit until Reap returns its result. Requests in flight are executed in any
// order, and end in any order. A request that is submitted after the result of another one
// was reaped, on any queue, finds its effect.
//
// # Wake-ups
//
// A queue belongs to a loop (poller.Loop), and the front end has a source on it. In each
// pass the source submits what it has, and then reaps. A result that is there when Submit
// returns causes no event: the front end must reap it before it lets the loop sleep. A
// result that comes later makes the loop poll all of its sources again after the result can
// be reaped. So a front end needs neither a timer nor an event of its own to find results,
// and a back end need not know which front ends it has. A result that Reap had no room for
// causes no further event.
//
// # Errors
//
// Errors are Linux errnos, as of the block layer:
//
//   - EINVAL: the fields of the request or its segments contradict each other, or its tag is out
//     of range or in flight. It had no effect.
//   - EOPNOTSUPP: the operation is unknown, or the device does not have it.
//   - EFAULT: the request names a region that is not registered, or is not registered any more.
//     Whether it had an effect is unknown.
//   - EIO: the request reaches beyond the end of the device, or the device failed.
//   - EROFS or EPERM: the device is write-protected. ENODEV: it is gone. ENOLINK: it
//     cannot be reached. ENOSPC, EBADE, ETIMEDOUT and others are of the device.
//
// EAGAIN does not occur, because users would try again forever.
//
// # Limits
//
// A read or write may be as large as the buffer of its tag, as the rest of its region, or as its
// segments together, and a discard or write zeroes of
// any length, even if the limits of the geometry have become smaller since the queue was
// opened. A read or write may have MaxSegments segments, even if the device takes fewer at a time.
// A back end splits what its device cannot do at once. For that each segment has whole logical
// blocks. A device whose geometry says
// that it has no discard or write zeroes may refuse them with EOPNOTSUPP, or execute them.
//
// # Closing
//
// Close is called when no request is in flight, on the loop or after it has ended. Then the
// buffers are gone. The loop may open a queue of the device again. Closing twice is an error
// without effect.
//
// Package block/blocktest tests a back end for all of this.
//
// # Concurrency
//
// All methods of a Queue are called from the one loop that serves it. The methods
// of a Device may be called from any goroutine.
package block

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// SectorShift is log2 of SectorSize. All sectors, as in Request.Sector and
// Request.Sectors, are 512 bytes, whatever the logical block size, as in the Linux block
// layer.
const (
	SectorShift = 9
	SectorSize  = 1 << SectorShift
)

// Op is the operation of a request. The zero value is not an operation and is refused.
type Op uint8

// Operations that the Linux block layer passes to a driver
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

// Request flags
const (
	FUA     Flags = 1 << iota // REQ_FUA: the data must be on stable media before the request completes
	NoUnmap                   // REQ_NOUNMAP: write zeroes must not deallocate
)

// Request is an I/O request. It has no pointers: the data of a read or write is
// Queue.Buffer(Tag)[:Sectors<<SectorShift], or as many bytes at Offset of a region, or the first
// Segments entries of Gatherer.Segments(Tag), in their order.
type Request struct {
	Sector   uint64 // first 512-byte sector
	Offset   uint64 // in the region, a multiple of 4
	Sectors  uint32 // length in 512-byte sectors
	Region   uint16 // number of the region with the data of a read or write; 0: the buffer, or segments
	Tag      uint16 // 0 ≤ Tag < depth, unique among the requests in flight
	Op       Op
	Flags    Flags
	Segments uint8 // number of segments with the data of a read or write, up to MaxSegments; 0: none
}

// InRegion reports whether the request has its data in regions.
func (r *Request) InRegion() bool {
	return (r.Region != 0 || r.Segments != 0) && (r.Op == OpRead || r.Op == OpWrite)
}

// Check returns 0 if the request can be executed on a device with the given capacity in
// sectors and logical block size in bytes, with room for maxIO bytes in its buffer, from its
// offset in its region on, or in its segments. Otherwise it returns the errno for the request. A back
// end calls it once for each request, and need
// not check the fields again. Check does not check the tag and the segments.
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
		return unix.EIO // as in the Linux block layer for requests beyond the end
	}
	return 0
}

// Result is the end of a request. There are no short transfers: a request succeeds
// completely, or fails.
type Result struct {
	Tag    uint16
	Errno  uint16 // 0, or a Linux errno as a positive number; never EAGAIN
	Status uint16 // of a request that failed: what the device said, as an nvme.Status; 0: nothing
}

// Queue is the access of one loop to a Device.
type Queue interface {
	// Buffer returns the memory of a tag. It has QueueConfig.MaxIO bytes, is page
	// aligned, and has the same address for the life of the Queue.
	Buffer(tag uint16) []byte
	// Submit passes requests to the back end, in order. It does not block, and it
	// cannot fail: a request that cannot be executed comes back from Reap with an
	// errno. The errno is EINVAL if its fields contradict each other, or if its tag
	// is out of range or in flight. After Submit, the caller may use the slice again.
	// The back end may overwrite the buffer of a request that is not a read or write.
	Submit(reqs []Request)
	// Reap stores at most len(done) results in done and returns their number. Results
	// come in any order.
	Reap(done []Result) int
	// Close frees the memory of the queue. No request may be in flight. The error of a
	// second Close is without effect.
	Close() error
}

// MaxDepth is the largest number of tags of a queue.
const MaxDepth = 4096

// QueueConfig holds the requirements of a front end for a Queue.
type QueueConfig struct {
	Depth int // number of tags, 1..MaxDepth
	MaxIO int // bytes per tag, a multiple of the page size

	// WriteThrough means that the front end promises its users a device without a
	// volatile cache, so it sends no Flush. A write must then be on stable media when
	// it completes, even if the back end has a cache, now or later.
	WriteThrough bool
}

// Validate returns an error about the first field that violates these rules. Back ends call
// it when they open a queue.
func (c QueueConfig) Validate() error {
	switch page := os.Getpagesize(); {
	case c.Depth < 1 || c.Depth > MaxDepth:
		return fmt.Errorf("queue: depth %d is not 1..%d", c.Depth, MaxDepth)
	case c.MaxIO < page || c.MaxIO%page != 0:
		return fmt.Errorf("queue: maximum I/O of %d bytes is no multiple of the page size", c.MaxIO)
	}
	return nil
}

// Device is a block device that a back end offers.
type Device interface {
	// Geometry returns the present geometry of the device.
	Geometry() Geometry
	// OpenQueue makes the queue for loop i. i is at least 0, and less than the number
	// of loops of the back end. Several front ends may have a queue on the same loop.
	// Several goroutines may call it at the same time.
	OpenQueue(i int, cfg QueueConfig) (Queue, error)
}

// Geometry holds the size, the limits and the properties of a device. Sizes are in bytes,
// except those in sectors.
type Geometry struct {
	Sectors            uint64 // capacity, 512-byte sectors
	LogicalBlock       uint32 // 512..4096, a power of two
	PhysicalBlock      uint32 // ≥ LogicalBlock, a power of two
	IOMin, IOOpt       uint32 // preferred sizes; IOMin 0: LogicalBlock; IOOpt 0: none
	MaxIO              uint32 // largest read or write; a multiple of LogicalBlock
	ChunkSectors       uint32 // requests do not cross a multiple of it; 0: no boundary
	VolatileCache      bool   // a completed write may be lost unless flushed or FUA
	ReadOnly           bool
	MaxDiscardSectors  uint32 // 0: no discard
	DiscardGranularity uint32 // used if MaxDiscardSectors is not 0; 0: LogicalBlock
	DiscardAlignment   uint32
	MaxZeroesSectors   uint32 // 0: no write zeroes
}

// Validate returns an error about the first field that violates these rules.
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
