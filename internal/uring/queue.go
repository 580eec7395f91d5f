package uring

import (
	"sync/atomic"
	"unsafe"
)

// submission is the application's side of the submission queue. The application produces
// entries and moves the tail, and the kernel moves the head. Positions are not masked,
// and wrap around at 2^32. The slot of a position is position & mask.
type submission struct {
	khead  *atomic.Uint32 // the kernel's head
	ktail  *atomic.Uint32 // our tail as published to the kernel
	kflags *atomic.Uint32
	tail   uint32 // our tail; entries from ktail on are not yet published
	mask   uint32
	stride uintptr // 64 or 128
	sqes   unsafe.Pointer
}

// next returns the next free entry, zeroed and counted as pending, or nil.
func (q *submission) next() *SQE {
	if q.tail-q.khead.Load() > q.mask {
		return nil
	}
	s := (*SQE)(unsafe.Add(q.sqes, uintptr(q.tail&q.mask)*q.stride))
	if q.stride == 2*unsafe.Sizeof(SQE{}) {
		*(*[2]SQE)(unsafe.Pointer(s)) = [2]SQE{}
	} else {
		*s = SQE{}
	}
	q.tail++
	return s
}

// pending returns the number of entries that the kernel has not consumed.
func (q *submission) pending() uint32 { return q.tail - q.khead.Load() }

// publish makes the entries visible to the kernel.
func (q *submission) publish() { q.ktail.Store(q.tail) }

// completion is the application's side of the completion queue. The kernel moves the
// tail, and the application consumes entries and moves the head. Tail and head are read
// and published once per batch.
type completion struct {
	khead *atomic.Uint32 // our head as published to the kernel
	ktail *atomic.Uint32 // the kernel's tail
	head  uint32         // our head
	tail  uint32         // the kernel's tail as of the last look
	mask  uint32
	cqes  unsafe.Pointer
}

// next returns the oldest entry that was not consumed, or nil.
func (q *completion) next() *CQE {
	if q.head == q.tail {
		q.publish()
		q.tail = q.ktail.Load()
		if q.head == q.tail {
			return nil
		}
	}
	return (*CQE)(unsafe.Add(q.cqes, uintptr(q.head&q.mask)*unsafe.Sizeof(CQE{})))
}

// seen consumes the entry that next returned.
func (q *completion) seen() { q.head++ }

// ready reports whether next would return an entry.
func (q *completion) ready() bool { return q.head != q.ktail.Load() }

// publish returns the slots of consumed entries to the kernel.
func (q *completion) publish() {
	if q.khead.Load() != q.head {
		q.khead.Store(q.head)
	}
}
