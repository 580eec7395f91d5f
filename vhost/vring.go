package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
)

// vring is a split ring (virtio 1.2 section 2.7) that is being served. Only its loop uses
// it, except for done. The guest may change the ring at any time. So each field is read
// once and then checked.
type vring struct {
	index    int
	num      uint16
	addr     vringAddr
	eventIdx bool // VIRTIO_F_EVENT_IDX
	indirect bool // VIRTIO_F_INDIRECT_DESC
	enabled  bool
	polled   bool // there is no kick
	stopping bool // no more requests are taken

	desc, avail, used []byte // in guest memory
	log               *dirtyLog
	lastAvail         uint16 // next entry of the available ring
	usedIdx           uint16 // next entry of the used ring
	published         uint16 // usedIdx as the guest knows it
	armed             uint16 // avail_event as the guest knows it
	noNotify          bool   // used.flags asks the guest not to kick

	track    *track
	counter  uint64
	resubmit []uint16 // requests in flight of an earlier server, oldest first
	batch    []uint16 // requests completed since the last publish

	call    int  // eventfd, or -1
	calling bool // the kernel has a write to call
	again   bool // another write must follow
	tasks   int  // number of requests in flight

	quiet chan struct{} // not nil: closed when the kernel has no write to call
	done  chan struct{} // closed when the ring is not served any more
}

const maxBatch = 256

// locate finds the parts of the ring in the guest's memory. After an error the ring is as
// it was.
func (r *vring) locate(m *memory, a vringAddr) error {
	n := uint64(r.num)
	var at [3][]byte
	for i, part := range []struct {
		name        string
		addr        uint64
		size, align uint64
	}{
		{"descriptor table", a.desc, n * descSize, descSize},
		{"available ring", a.avail, 6 + 2*n, 2},
		// Whole words, because avail_event is written as a part of one.
		{"used ring", a.used, (6 + usedSize*n + 3) &^ 3, 4},
	} {
		if part.addr&(part.align-1) != 0 {
			return fmt.Errorf("ring %d: the %s at %#x is not aligned to %d", r.index, part.name, part.addr, part.align)
		}
		if at[i] = m.user(part.addr, part.size); at[i] == nil {
			return fmt.Errorf("ring %d: the %s at %#x is not within a memory region", r.index, part.name, part.addr)
		}
	}
	r.addr, r.desc, r.avail, r.used, r.log = a, at[0], at[1], at[2], nil
	if a.flags&vringLog != 0 {
		r.log = m.log
	}
	return nil
}

// begin reads the state of the ring. base is the next entry of the available ring, if no
// record of requests in flight tells it.
func (r *vring) begin(base uint16) error {
	w := atomic.LoadUint32(word(r.used, 0))
	r.usedIdx = uint16(w >> 16)
	r.published, r.lastAvail = r.usedIdx, base
	r.noNotify = w&usedNoNotify != 0 // a dead server may have left that
	r.armed = r.lastAvail - 1
	if r.track == nil {
		return nil
	}
	heads, counter, err := r.track.restore(r.usedIdx)
	if err != nil {
		return fmt.Errorf("ring %d: %w", r.index, err)
	}
	// The base of the front end is wrong if the last server died.
	r.resubmit, r.counter = heads, counter
	r.lastAvail = r.usedIdx + uint16(len(heads))
	r.armed = r.lastAvail - 1
	return nil
}

// half returns 16 bits of shared memory. The load is atomic, and later loads are not done
// before it.
func half(b []byte, off uint64) uint16 {
	w := atomic.LoadUint32(word(b, off))
	if aligned(b, off) {
		return uint16(w)
	}
	return uint16(w >> 16)
}

func (r *vring) availIdx() uint16 { return half(r.avail, 2) }

// available returns the number of requests that can be taken.
func (r *vring) available() (uint16, error) {
	n := r.availIdx() - r.lastAvail
	if n > r.num {
		return 0, fmt.Errorf("ring %d: the index of the available ring is %d ahead, and the ring has %d entries", r.index, n, r.num)
	}
	return n, nil
}

// next takes the next request from the available ring, which has one. It returns its first
// descriptor.
func (r *vring) next() (uint16, error) {
	slot := uint64(r.lastAvail & (r.num - 1))
	head := binary.LittleEndian.Uint16(r.avail[4+2*slot:])
	if head >= r.num {
		return 0, fmt.Errorf("ring %d: the available ring names descriptor %d of %d", r.index, head, r.num)
	}
	r.lastAvail++
	if r.track != nil {
		r.track.take(head, r.counter)
		r.counter++
	}
	return head, nil
}

// descriptor is struct virtq_desc.
type descriptor struct {
	segment
	flags, next uint16
}

func readDescriptor(table []byte, i uint32) descriptor {
	p := table[uint64(i)*descSize:][:descSize]
	le := binary.LittleEndian
	addr, rest := le.Uint64(p), le.Uint64(p[8:])
	return descriptor{segment{addr, uint32(rest)}, uint16(rest >> 32), uint16(rest >> 48)}
}

// Errors about chains of descriptors
var (
	errNested    = errors.New("a table of descriptors contains a reference to another table")
	errIndirect  = errors.New("a descriptor refers to a table, which was not negotiated")
	errTableNext = errors.New("a descriptor refers to a table and to a next descriptor")
	errEmpty     = errors.New("a descriptor has length 0")
	errOrder     = errors.New("a descriptor that the device may only read follows one that it may write")
	errLong      = fmt.Errorf("a chain has more than %d descriptors, or is a loop", maxSegments)
	errHuge      = errors.New("a chain has 4 GiB or more")
)

// errAddress returns an error about a buffer that is not in the guest's memory.
func errAddress(s segment) error {
	return fmt.Errorf("%d bytes at %#x are not in a memory region", s.length, s.guest)
}

// chain reads the descriptors of a request into t.
func (r *vring) chain(m *memory, head uint16, t *task) error {
	table, size, i := r.desc, uint32(r.num), uint32(head)
	indirect := false
	for {
		if i >= size {
			return fmt.Errorf("descriptor %d of %d", i, size)
		}
		d := readDescriptor(table, i)
		if d.flags&descIndirect != 0 {
			switch {
			case indirect:
				return errNested
			case !r.indirect:
				return errIndirect
			case d.flags&descNext != 0:
				return errTableNext
			case d.length == 0 || d.length%descSize != 0:
				return fmt.Errorf("a table of descriptors has %d bytes", d.length)
			}
			table = m.at(d.guest, d.length)
			if uint32(len(table)) < d.length {
				return errAddress(d.segment)
			}
			size, i, indirect = d.length/descSize, 0, true
			continue
		}
		if err := t.add(m, d); err != nil {
			return err
		}
		if d.flags&descNext == 0 {
			return nil
		}
		i = uint32(d.next)
	}
}

// push returns a request to the guest, which learns of it by publish. length is the number
// of bytes that were written to its buffers.
func (r *vring) push(head uint16, length uint32) {
	at := 4 + usedSize*uint64(r.usedIdx&(r.num-1))
	le := binary.LittleEndian
	le.PutUint32(r.used[at:], uint32(head))
	le.PutUint32(r.used[at+4:], length)
	if r.log != nil {
		r.log.mark(r.addr.log+at, usedSize)
	}
	r.usedIdx++
	if r.track != nil {
		r.track.link(head)
	}
	r.batch = append(r.batch, head)
}

// publish shows the guest the requests that were pushed. It reports whether the guest wants
// a call.
func (r *vring) publish() (call bool) {
	was := r.published
	if r.usedIdx == was {
		return false
	}
	r.published = r.usedIdx
	r.storeUsed()
	if r.track != nil {
		r.track.complete(r.batch, r.usedIdx)
	}
	r.batch = r.batch[:0]
	// The loads below are not done before the store above, because both are atomic.
	if r.eventIdx {
		event := half(r.avail, 4+2*uint64(r.num))
		return r.usedIdx-event-1 < r.usedIdx-was
	}
	return half(r.avail, 0)&availNoInterrupt == 0
}

// storeUsed stores flags and index of the used ring.
func (r *vring) storeUsed() {
	w := uint32(r.published) << 16
	if r.noNotify {
		w |= usedNoNotify
	}
	atomic.StoreUint32(word(r.used, 0), w)
	if r.log != nil {
		r.log.mark(r.addr.log, 4)
	}
}

// askForKick makes the guest kick for the next request. The caller looks for requests once
// more afterwards.
func (r *vring) askForKick() {
	switch {
	case r.eventIdx && r.armed != r.lastAvail:
		r.armed = r.lastAvail
		r.storeAvailEvent()
	case !r.eventIdx && r.noNotify:
		r.noNotify = false
		r.storeUsed()
	}
}

// forbidKicks makes the guest not kick while the ring is being served. With event index,
// the guest does not kick until askForKick.
func (r *vring) forbidKicks() {
	if !r.eventIdx && !r.noNotify {
		r.noNotify = true
		r.storeUsed()
	}
}

// storeAvailEvent stores avail_event, which follows the elements of the used ring. The
// other half of its word may belong to somebody else.
func (r *vring) storeAvailEvent() {
	at := 4 + usedSize*uint64(r.num)
	w := word(r.used, at)
	for {
		was := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, was, was&^0xFFFF|uint32(r.armed)) {
			break
		}
	}
	if r.log != nil {
		r.log.mark(r.addr.log+at, 2)
	}
}
