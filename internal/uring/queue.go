package uring

import (
	"sync/atomic"
	"unsafe"
)

// submission is the application's side of the submission queue: it produces
// entries and moves the tail, the kernel moves the head. All positions run
// freely and wrap at 2^32; a slot is position & mask.
type submission struct {
	khead  *atomic.Uint32 // the kernel's head
	ktail  *atomic.Uint32 // our tail as the kernel sees it
	kflags *atomic.Uint32
	tail   uint32 // our tail; entries from ktail on are not published
	mask   uint32
	stride uintptr // 64 or 128
	sqes   unsafe.Pointer
}

// next is the next free entry, zeroed and counted as pending, or nil.
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

// pending is the number of entries that the kernel has not taken.
func (q *submission) pending() uint32 { return q.tail - q.khead.Load() }

// publish lets the kernel see the entries.
func (q *submission) publish() { q.ktail.Store(q.tail) }

// completion is the application's side of the completion queue: the kernel
// moves the tail, the application consumes and moves the head. Tail and head
// are read and published once per batch.
type completion struct {
	khead *atomic.Uint32 // our head as the kernel sees it
	ktail *atomic.Uint32 // the kernel's tail
	head  uint32         // our head
	tail  uint32         // the kernel's tail when we last looked
	mask  uint32
	cqes  unsafe.Pointer
}

// next is the oldest entry that was not consumed, or nil.
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

// publish gives the slots of consumed entries back to the kernel.
func (q *completion) publish() {
	if q.khead.Load() != q.head {
		q.khead.Store(q.head)
	}
}
