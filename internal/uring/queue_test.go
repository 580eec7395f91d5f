package uring

import (
	"sync/atomic"
	"testing"
	"unsafe"
)

// FuzzQueues plays the kernel on queues in plain memory, from any position of
// head and tail, and compares them with slices: nothing is lost, doubled, out
// of order, or visible too early.
func FuzzQueues(f *testing.F) {
	f.Add(uint32(0), uint8(0), false, []byte{0, 0, 1, 2, 0x83, 0x83, 4, 4, 5})
	f.Add(^uint32(0), uint8(2), true, []byte{0, 0, 0, 0, 0, 1, 0xf2, 0xf3, 4, 4, 4, 4, 5, 0, 1, 2, 3, 4})
	f.Add(^uint32(2), uint8(3), false, []byte{0, 0, 0, 1, 0x12, 0, 1, 0x72, 0xf3, 4, 0, 0, 5, 4, 4, 4, 0xf2})
	f.Fuzz(func(t *testing.T, start uint32, bits uint8, wide bool, ops []byte) {
		entries := uint32(1) << (bits % 6)
		stride := unsafe.Sizeof(SQE{})
		if wide {
			stride *= 2
		}
		var sqHead, sqTail, sqFlags, cqHead, cqTail atomic.Uint32
		for _, w := range []*atomic.Uint32{&sqHead, &sqTail, &cqHead, &cqTail} {
			w.Store(start)
		}
		sqes := make([]SQE, uintptr(entries)*stride/unsafe.Sizeof(SQE{}))
		cqes := make([]CQE, entries)
		sq := submission{khead: &sqHead, ktail: &sqTail, kflags: &sqFlags, tail: start, mask: entries - 1, stride: stride, sqes: unsafe.Pointer(&sqes[0])}
		cq := completion{khead: &cqHead, ktail: &cqTail, head: start, tail: start, mask: entries - 1, cqes: unsafe.Pointer(&cqes[0])}
		var queued, visible, completed []uint64 // user data, oldest first
		var serial uint64
		for _, op := range ops {
			n := uint32(op >> 4)
			switch op & 0xf % 6 {
			case 0: // queue an entry
				s := sq.next()
				if full := uint32(len(queued)+len(visible)) == entries; (s == nil) != full {
					t.Fatalf("entry %v of a queue with %d of %d", s, len(queued)+len(visible), entries)
				}
				if s == nil {
					continue
				}
				if *s != (SQE{}) || wide && *s.Cmd80() != [80]byte{} {
					t.Fatal("entry is not zeroed")
				}
				serial++
				*s = SQE{Opcode: 1, UserData: serial, Cmd: [16]byte{1}}
				if wide {
					s.Cmd80()[79] = 1
				}
				queued = append(queued, serial)
			case 1:
				sq.publish()
				visible, queued = append(visible, queued...), nil
			case 2: // the kernel takes some and completes them
				for range n {
					if sqTail.Load()-sqHead.Load() != uint32(len(visible)) {
						t.Fatalf("the kernel sees %d, want %d", sqTail.Load()-sqHead.Load(), len(visible))
					}
					if len(visible) == 0 || cqTail.Load()-cqHead.Load() == entries {
						break
					}
					got := sqes[uintptr(sqHead.Load()&(entries-1))*stride/unsafe.Sizeof(SQE{})].UserData
					if got != visible[0] {
						t.Fatalf("the kernel takes %d, want %d", got, visible[0])
					}
					visible = visible[1:]
					sqHead.Add(1)
					cqes[cqTail.Load()&(entries-1)] = CQE{UserData: got}
					cqTail.Add(1)
					completed = append(completed, got)
				}
			case 3, 4: // take a completion
				if cq.ready() != (len(completed) > 0) {
					t.Fatalf("ready %v with %d", cq.ready(), len(completed))
				}
				c := cq.next()
				if (c == nil) != (len(completed) == 0) {
					t.Fatalf("completion %v with %d", c, len(completed))
				}
				if c == nil {
					if cqHead.Load() != cqTail.Load() {
						t.Fatal("an empty queue was not given back")
					}
					continue
				}
				if again := cq.next(); again != c || c.UserData != completed[0] {
					t.Fatalf("completion %d, want %d", c.UserData, completed[0])
				}
				cq.seen()
				completed = completed[1:]
			case 5:
				cq.publish()
				if held := cqTail.Load() - cqHead.Load(); held != uint32(len(completed)) {
					t.Fatalf("%d slots held for %d completions", held, len(completed))
				}
			}
			if got := sq.pending(); got != uint32(len(queued)+len(visible)) {
				t.Fatalf("%d pending, want %d", got, len(queued)+len(visible))
			}
		}
	})
}
