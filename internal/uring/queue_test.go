package uring

import (
	"sync/atomic"
	"testing"
	"unsafe"
)

// queues is both queues of a ring. The test plays the kernel.
type queues struct {
	t                                       *testing.T
	entries                                 uint32
	stride                                  uintptr
	wide                                    bool
	sqHead, sqTail, sqFlags, cqHead, cqTail atomic.Uint32
	sqes                                    []SQE
	cqes                                    []CQE
	sq                                      submission
	cq                                      completion
	queued, visible, completed              []uint64 // user data, oldest first
	serial                                  uint64
}

func newQueues(t *testing.T, start, entries uint32, wide bool) *queues {
	q := &queues{t: t, entries: entries, stride: unsafe.Sizeof(SQE{}), wide: wide}
	if wide {
		q.stride *= 2
	}
	for _, w := range []*atomic.Uint32{&q.sqHead, &q.sqTail, &q.cqHead, &q.cqTail} {
		w.Store(start)
	}
	q.sqes = make([]SQE, uintptr(entries)*q.stride/unsafe.Sizeof(SQE{}))
	q.cqes = make([]CQE, entries)
	q.sq = submission{khead: &q.sqHead, ktail: &q.sqTail, kflags: &q.sqFlags, tail: start, mask: entries - 1, stride: q.stride, sqes: unsafe.Pointer(&q.sqes[0])}
	q.cq = completion{khead: &q.cqHead, ktail: &q.cqTail, head: start, tail: start, mask: entries - 1, cqes: unsafe.Pointer(&q.cqes[0])}
	return q
}

// queue adds an entry.
func (q *queues) queue() {
	s := q.sq.next()
	if full := uint32(len(q.queued)+len(q.visible)) == q.entries; (s == nil) != full {
		q.t.Fatalf("entry %v of a queue with %d of %d", s, len(q.queued)+len(q.visible), q.entries)
	}
	if s == nil {
		return
	}
	if *s != (SQE{}) || q.wide && *s.Cmd80() != [80]byte{} {
		q.t.Fatal("entry is not zeroed")
	}
	q.serial++
	*s = SQE{Opcode: 1, UserData: q.serial, Cmd: [16]byte{1}}
	if q.wide {
		s.Cmd80()[79] = 1
	}
	q.queued = append(q.queued, q.serial)
}

// complete plays the kernel: it takes up to n entries and completes them.
func (q *queues) complete(n uint32) {
	for range n {
		if q.sqTail.Load()-q.sqHead.Load() != uint32(len(q.visible)) {
			q.t.Fatalf("the kernel sees %d, want %d", q.sqTail.Load()-q.sqHead.Load(), len(q.visible))
		}
		if len(q.visible) == 0 || q.cqTail.Load()-q.cqHead.Load() == q.entries {
			break
		}
		got := q.sqes[uintptr(q.sqHead.Load()&(q.entries-1))*q.stride/unsafe.Sizeof(SQE{})].UserData
		if got != q.visible[0] {
			q.t.Fatalf("the kernel takes %d, want %d", got, q.visible[0])
		}
		q.visible = q.visible[1:]
		q.sqHead.Add(1)
		q.cqes[q.cqTail.Load()&(q.entries-1)] = CQE{UserData: got}
		q.cqTail.Add(1)
		q.completed = append(q.completed, got)
	}
}

// take consumes a completion.
func (q *queues) take() {
	if q.cq.ready() != (len(q.completed) > 0) {
		q.t.Fatalf("ready %v with %d", q.cq.ready(), len(q.completed))
	}
	c := q.cq.next()
	if (c == nil) != (len(q.completed) == 0) {
		q.t.Fatalf("completion %v with %d", c, len(q.completed))
	}
	if c == nil {
		if q.cqHead.Load() != q.cqTail.Load() {
			q.t.Fatal("an empty queue was not given back")
		}
		return
	}
	if same := q.cq.next(); same != c || c.UserData != q.completed[0] {
		q.t.Fatalf("completion %d, want %d", c.UserData, q.completed[0])
	}
	q.cq.seen()
	q.completed = q.completed[1:]
}

// FuzzQueues plays the kernel on queues in plain memory, from any position of head and
// tail, and compares them with slices: no entry is lost, duplicated, out of order, or
// visible too early.
func FuzzQueues(f *testing.F) {
	f.Add(uint32(0), uint8(0), false, []byte{0, 0, 1, 2, 0x83, 0x83, 4, 4, 5})
	f.Add(^uint32(0), uint8(2), true, []byte{0, 0, 0, 0, 0, 1, 0xf2, 0xf3, 4, 4, 4, 4, 5, 0, 1, 2, 3, 4})
	f.Add(^uint32(2), uint8(3), false, []byte{0, 0, 0, 1, 0x12, 0, 1, 0x72, 0xf3, 4, 0, 0, 5, 4, 4, 4, 0xf2})
	f.Fuzz(func(t *testing.T, start uint32, bits uint8, wide bool, ops []byte) {
		q := newQueues(t, start, uint32(1)<<(bits%6), wide)
		for _, op := range ops {
			switch op & 0xf % 6 {
			case 0:
				q.queue()
			case 1:
				q.sq.publish()
				q.visible, q.queued = append(q.visible, q.queued...), nil
			case 2:
				q.complete(uint32(op >> 4))
			case 3, 4:
				q.take()
			case 5:
				q.cq.publish()
				if held := q.cqTail.Load() - q.cqHead.Load(); held != uint32(len(q.completed)) {
					t.Fatalf("%d slots held for %d completions", held, len(q.completed))
				}
			}
			if got := q.sq.pending(); got != uint32(len(q.queued)+len(q.visible)) {
				t.Fatalf("%d pending, want %d", got, len(q.queued)+len(q.visible))
			}
		}
	})
}
