package block

import "golang.org/x/sys/unix"

// MaxRegions is the largest number of regions of a device at the same time.
const MaxRegions = 1024

// Registrar is a Device whose requests can have their data in memory of the front end.
type Registrar interface {
	Device
	// Register makes memory a region for the requests of all queues. The memory is off the Go
	// heap, starts at a page, and stays mapped until Close of the region has succeeded. An
	// access to it must not fault: a file that it maps must not shrink. What can access the
	// region until then, beyond what the requests name, is up to the back end, which says so in
	// its documentation. Register must not be called on a loop. After an error the front end
	// can use buffers.
	Register(mem []byte) (Region, error)
}

// Region is memory of a front end that a back end has registered. Its methods may be called from
// any goroutine, but Close not on a loop.
type Region interface {
	// Number is what requests name. It is 1..MaxRegions.
	Number() uint16
	// Close ends the region. Requests that name it and have not begun fail with EFAULT. Close
	// waits until the front end has reaped all requests that name it, and until nothing
	// accesses the memory any more, also not on behalf of requests that have ended. After an
	// error, the memory must stay mapped. Another Close tries again.
	Close() error
}

// MaxSegments is the largest number of segments of a request.
const MaxSegments = 16

// Segment is a part of a region, with a part of the data of a read or write.
type Segment struct {
	Offset uint64 // in the region, a multiple of 4
	Length uint32 // in bytes, whole logical blocks, at least one
	Region uint16 // number of the region
}

// Gatherer is a Queue of a Registrar whose reads and writes can have their data in several parts of
// regions.
type Gatherer interface {
	Queue
	// Segments returns the table of a tag. The front end may touch it only while it owns the tag.
	// The table has the same address for the life of the Queue. The first call allocates memory
	// for all tags.
	Segments(tag uint16) *[MaxSegments]Segment
	// SegmentLimit returns how many segments a request should have at most at present,
	// 1..MaxSegments. It may change at any time, as devices with several paths do. Requests with more
	// segments are executed, but take longer than with a copy, because the device does not
	// take so many at a time, or because each costs more than its copy.
	SegmentLimit() int
}

// CheckSegments returns 0 if the request can have its data in the first segments of a table, on a
// device with the given logical block size in bytes, or EINVAL: they have whole blocks, their lengths
// add up to that of the request, and it does not name a region itself. It does not check whether
// the regions exist and are large enough. A back end calls it for a request with segments, beside
// Check.
func (r *Request) CheckSegments(table *[MaxSegments]Segment, logicalBlock uint32) unix.Errno {
	if r.Segments > MaxSegments || r.Region != 0 {
		return unix.EINVAL
	}
	var sum uint64
	for i := range table[:r.Segments] {
		s := &table[i]
		if s.Length == 0 || s.Length&(logicalBlock-1) != 0 || s.Offset&3 != 0 {
			return unix.EINVAL
		}
		sum += uint64(s.Length)
	}
	if sum != uint64(r.Sectors)<<SectorShift {
		return unix.EINVAL
	}
	return 0
}
