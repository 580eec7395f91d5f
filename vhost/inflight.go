package vhost

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The area of requests in flight, which the front end keeps over a reconnection. For each
// ring it has a header and one entry for each descriptor: QueueRegionSplit and
// DescStateSplit of vhost-user.rst, section "Inflight I/O tracking".

const (
	inflightHeader = 16
	inflightEntry  = 16
	inflightAlign  = 64
)

// trackSize returns the size of the part of a ring.
func trackSize(ringSize int) uint64 {
	return uint64(inflightHeader+inflightEntry*ringSize+inflightAlign-1) &^ (inflightAlign - 1)
}

// inflightArea is the mapped area.
type inflightArea struct {
	raw      []byte
	mem      []byte
	queues   int
	ringSize int
	desc     inflightDesc
	file     int // what is mapped, for the next server
}

// newInflight makes the file of an area for the front end. The file cannot be made
// smaller.
func newInflight(queues, ringSize uint16) (fd int, d inflightDesc, err error) {
	d = inflightDesc{queues: queues, ringSize: ringSize}
	if err := d.check(); err != nil {
		return -1, d, err
	}
	d.size = uint64(queues) * trackSize(int(ringSize))
	fd, err = unix.MemfdCreate("vhost-inflight", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, d, fmt.Errorf("make the area: %w", err)
	}
	if err = unix.Ftruncate(fd, int64(d.size)); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return -1, d, errors.Join(fmt.Errorf("make the area: %w", err), unix.Close(fd))
	}
	return fd, d, nil
}

func (d inflightDesc) check() error {
	if d.queues == 0 || d.queues > maxRings || d.ringSize == 0 || d.ringSize > maxRingSize {
		return fmt.Errorf("%d queues of %d entries, want up to %d of up to %d", d.queues, d.ringSize, maxRings, maxRingSize)
	}
	return nil
}

// mapInflight maps the area that the front end has kept.
func mapInflight(fd int, d inflightDesc) (*inflightArea, error) {
	if err := d.check(); err != nil {
		return nil, err
	}
	need := uint64(d.queues) * trackSize(int(d.ringSize))
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat the file: %w", err)
	}
	page := uint64(os.Getpagesize())
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, errors.New("the file is not a memfd or another regular file")
	case d.size < need || d.offset > maxArea || d.offset&(inflightAlign-1) != 0:
		return nil, fmt.Errorf("size %d or offset %d is not possible; %d queues of %d entries need %d bytes", d.size, d.offset, d.queues, d.ringSize, need)
	case d.offset+need > uint64(st.Size):
		return nil, fmt.Errorf("%d bytes from offset %d are beyond the end of the file, which has %d bytes", need, d.offset, st.Size)
	}
	file, err := duplicate(fd)
	if err != nil {
		return nil, err
	}
	from := d.offset & (page - 1)
	raw, err := unix.Mmap(fd, int64(d.offset-from), int(from+need), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("map %d bytes: %w", need, err), unix.Close(file))
	}
	return &inflightArea{raw: raw, mem: raw[from : from+need], queues: int(d.queues), ringSize: int(d.ringSize), desc: d, file: file}, nil
}

func (a *inflightArea) unmap() error {
	if err := errors.Join(unix.Munmap(a.raw), unix.Close(a.file)); err != nil {
		return fmt.Errorf("unmap area of requests in flight: %w", err)
	}
	return nil
}

// track is the part of a ring. Its fields are in shared memory. Other processes may
// change them at any time.
type track struct {
	head    *trackHead
	entries []trackEntry
}

// trackHead is struct QueueRegionSplit without its entries.
type trackHead struct {
	features  uint64
	version   uint16
	descNum   uint16
	lastBatch uint16 // the entry that was completed last
	usedIdx   uint16
}

// trackEntry is struct DescStateSplit.
type trackEntry struct {
	inflight uint8
	_        [5]uint8
	next     uint16 // of the same batch
	counter  uint64 // order of the requests
}

var (
	_ [inflightHeader]byte = [unsafe.Sizeof(trackHead{})]byte{}
	_ [inflightEntry]byte  = [unsafe.Sizeof(trackEntry{})]byte{}
	_ [6]byte              = [unsafe.Offsetof(trackEntry{}.next)]byte{}
	_ [8]byte              = [unsafe.Offsetof(trackEntry{}.counter)]byte{}
)

const trackVersion = 1

// track returns the part of a ring with num entries, or nil if the area has none.
func (a *inflightArea) track(ring, num int) (*track, error) {
	if a == nil || ring >= a.queues {
		return nil, nil
	}
	if num > a.ringSize {
		return nil, fmt.Errorf("ring %d has %d entries, and the area of requests in flight %d", ring, num, a.ringSize)
	}
	p := unsafe.Pointer(&a.mem[uint64(ring)*trackSize(a.ringSize)])
	t := &track{
		head:    (*trackHead)(p),
		entries: unsafe.Slice((*trackEntry)(unsafe.Add(p, inflightHeader)), num),
	}
	return t, nil
}

// restore returns the descriptors of the requests that were in flight when the last
// server ended, oldest first, and the next value of the counter. usedIdx is the index of
// the used ring.
func (t *track) restore(usedIdx uint16) (heads []uint16, counter uint64, err error) {
	h := t.head
	switch h.version {
	case 0:
		h.version, h.descNum, h.usedIdx = trackVersion, uint16(len(t.entries)), usedIdx
		return nil, 0, nil
	case trackVersion:
	default:
		return nil, 0, fmt.Errorf("area of requests in flight has version %d, want %d", h.version, trackVersion)
	}
	if err := t.finishBatch(usedIdx); err != nil {
		return nil, 0, err
	}
	type flight struct {
		head    uint16
		counter uint64
	}
	var all []flight
	for i := range t.entries {
		e := &t.entries[i]
		c := e.counter
		counter = max(counter, c+1)
		if e.inflight != 0 {
			all = append(all, flight{uint16(i), c})
		}
	}
	slices.SortFunc(all, func(a, b flight) int {
		if a.counter < b.counter {
			return -1
		}
		return 1
	})
	for _, f := range all {
		heads = append(heads, f.head)
	}
	return heads, counter, nil
}

// finishBatch does the rest of complete, if the last server ended after it had published
// a batch in the used ring.
func (t *track) finishBatch(usedIdx uint16) error {
	h := t.head
	n := usedIdx - h.usedIdx
	if int(n) > len(t.entries) && !slices.ContainsFunc(t.entries, func(e trackEntry) bool { return e.inflight != 0 }) {
		h.usedIdx = usedIdx // the guest has begun anew
		return nil
	}
	if int(n) > len(t.entries) {
		return fmt.Errorf("the used ring is at %d, and the area of requests in flight at %d", usedIdx, h.usedIdx)
	}
	i := h.lastBatch
	for range n {
		if int(i) >= len(t.entries) {
			return fmt.Errorf("area of requests in flight names descriptor %d of %d", i, len(t.entries))
		}
		e := &t.entries[i]
		e.inflight = 0
		i = e.next
	}
	h.usedIdx = usedIdx
	return nil
}

// take records that a request is in flight.
func (t *track) take(head uint16, counter uint64) {
	e := &t.entries[head]
	atomic.StoreUint64(&e.counter, counter)
	e.inflight = 1
}

// reset records that no request is in flight, and that the ring begins anew.
func (t *track) reset() {
	for i := range t.entries {
		t.entries[i].inflight = 0
	}
	t.head.version = 0
}

// link adds a request to the batch that the next publish makes visible.
func (t *track) link(head uint16) {
	t.entries[head].next = t.head.lastBatch
	t.head.lastBatch = head
}

// complete records that the requests in heads are not in flight any more. The used ring
// shows them already.
func (t *track) complete(heads []uint16, usedIdx uint16) {
	for _, i := range heads {
		t.entries[i].inflight = 0
	}
	t.head.usedIdx = usedIdx
}
