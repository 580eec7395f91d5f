package ublk

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/internal/iostats"
	"ublk-nvmeof/internal/uring"
	"ublk-nvmeof/poller"
)

// reapBatch is how many results are taken from the back end at once.
const reapBatch = 64

// submitter is the part of uring.Entries that the data path uses.
type submitter interface {
	SQE() *uring.SQE // never nil
}

// hwQueue is one hardware queue. It serves the driver's requests from a block.Queue. It
// is a poller.Source and a poller.Handler of one loop, and unless it is said otherwise,
// only that loop uses it.
//
// A tag belongs to the driver while a FETCH or COMMIT_AND_FETCH of it is pending, to the
// back end from Submit to Reap, and to the queue itself between Complete and Poll of one
// pass, when it is in reqs.
type hwQueue struct {
	ring  submitter
	back  block.Queue
	descs []ioDesc  // by tag, shared with the driver; valid while the driver does not hold the tag
	entry uring.SQE // what all COMMIT_AND_FETCH entries have in common
	index uint16    // its number
	limit uint32    // sectors of the largest read or write
	addrs []uint64  // of the tags' buffers

	reqs      []block.Request // taken from the driver in this pass; capacity is the depth
	done      [reapBatch]block.Result
	transfers []transfer // by tag

	sharing  bool     // the device can have shared memory
	region   uint16   // of the back end, that shared memory is; 0: there is none
	refusing bool     // requests with shared memory fail
	held     []uint16 // tags of requests with shared memory that this process does not have yet

	fetching int  // tags that the driver holds
	inflight int  // tags that the back end holds
	ending   bool // the driver has returned a tag without a request, because it stops
	reported bool // ended was called

	// Both are called on the loop: ended once, when neither the driver nor the back
	// end holds a tag any more, and failed when the driver refused a command.
	ended  func()
	failed func(error)

	iostats.Counters
}

// transfer describes a request in flight for its result and its counters.
type transfer struct {
	bytes  uint32 // the driver's result of success
	op     block.Op
	direct bool // its data is not copied
}

// opOf maps UBLK_IO_OP_* to operations. Requests with other operations are refused.
var opOf = [opMask + 1]block.Op{
	opRead: block.OpRead, opWrite: block.OpWrite, opFlush: block.OpFlush,
	opDiscard: block.OpDiscard, opWriteZeroes: block.OpWriteZeroes,
}

// newHWQueue makes the queue with number index from its descriptors and back end.
func newHWQueue(index int, descs []ioDesc, back block.Queue, maxIO int, ended func(), failed func(error)) *hwQueue {
	q := &hwQueue{
		back: back, descs: descs, index: uint16(index), limit: uint32(maxIO >> block.SectorShift),
		ended: ended, failed: failed,
		addrs: make([]uint64, len(descs)), transfers: make([]transfer, len(descs)), reqs: make([]block.Request, 0, len(descs)),
		held: make([]uint16, 0, len(descs)),
	}
	for tag := range q.addrs {
		q.addrs[tag] = hostmem.Addr(back.Buffer(uint16(tag)))
	}
	return q
}

// start fetches all tags. char is the descriptor of ublkcN, and base is what
// poller.Loop.Handle returned.
func (q *hwQueue) start(ring submitter, char int, base uint64) {
	q.ring = ring
	q.entry = uring.SQE{Opcode: uring.OpURingCmd, FD: int32(char), UserData: base}
	q.entry.SetCmdOp(uint32(fetchReq))
	for tag := range q.addrs {
		q.give(uint16(tag), 0)
	}
	q.entry.SetCmdOp(uint32(commitAndFetchReq))
}

// give gives a tag to the driver, with the result of its last request: the number of
// bytes of a read or write, 0 for other requests, or a negative errno.
func (q *hwQueue) give(tag uint16, result int32) {
	s := q.ring.SQE()
	*s = q.entry
	s.UserData |= uint64(tag)
	*(*ioCmd)(unsafe.Pointer(&s.Cmd)) = ioCmd{queue: q.index, tag: tag, result: result, addr: q.addrs[tag]}
	q.fetching++
}

// Complete takes a tag from the driver. It implements poller.Handler.
func (q *hwQueue) Complete(data uint64, res int32, _ uint32) {
	tag := uint16(data)
	q.fetching--
	if res != 0 {
		q.aborted(tag, res)
		return
	}
	q.take(tag)
}

// take reads the request of a tag. One with shared memory that this process does not have waits.
func (q *hwQueue) take(tag uint16) {
	d := &q.descs[tag]
	flags, sectors := d.opFlags, d.nrSectors
	op := opOf[flags&opMask]
	m := transfer{op: op}
	region, offset := uint16(0), uint64(0)
	switch op {
	case block.OpRead, block.OpWrite:
		if sectors > q.limit {
			q.refuse(tag, unix.EIO)
			return
		}
		if q.sharing && flags&flagShmem != 0 {
			if q.region == 0 {
				q.hold(tag)
				return
			}
			region, offset, m.direct = q.region, d.sharedOffset(), true
		}
		m.bytes = sectors << block.SectorShift
	case block.OpUnset:
		q.refuse(tag, unix.EOPNOTSUPP)
		return
	}
	q.transfers[tag] = m
	q.reqs = append(q.reqs, block.Request{
		Sector: d.startSector, Sectors: sectors, Tag: tag, Op: op, Flags: flagsOf(flags), Region: region, Offset: offset,
	})
}

// hold keeps a request whose memory this process does not have, or refuses it.
func (q *hwQueue) hold(tag uint16) {
	if q.refusing || q.ending {
		q.refuse(tag, unix.EIO)
		return
	}
	q.held = append(q.held, tag)
}

// share says which region shared memory is, 0 if there is none, and has the requests that waited
// for it executed or refused.
func (q *hwQueue) share(region uint16, refuse bool) {
	q.region, q.refusing = region, refuse
	if region == 0 && !refuse {
		return
	}
	held := q.held
	q.held = q.held[:0]
	for _, tag := range held {
		q.take(tag)
	}
}

// flagsOf translates UBLK_IO_F_* flags.
func flagsOf(f uint32) block.Flags {
	return block.Flags(f/flagFUA&1)*block.FUA | block.Flags(f/flagNoUnmap&1)*block.NoUnmap
}

// Poll passes new requests to the back end and results of the back end to the driver. It
// implements poller.Source.
func (q *hwQueue) Poll() int {
	n := len(q.reqs)
	if n > 0 {
		q.inflight += n
		q.back.Submit(q.reqs)
		q.reqs = q.reqs[:0]
		q.CountBatch()
	}
	for q.inflight > 0 {
		k := q.back.Reap(q.done[:])
		for i := range q.done[:k] {
			r := &q.done[i]
			q.commit(r.Tag, q.transfers[r.Tag], r.Errno)
		}
		q.inflight -= k
		n += k
		if k < len(q.done) {
			break
		}
	}
	if n > 0 {
		q.Publish()
		q.end()
	}
	return n
}

// Arm requests no wake-up, because commands of the driver complete on the loop's ring. It
// implements poller.Source.
func (q *hwQueue) Arm() poller.Readiness {
	if len(q.reqs) > 0 {
		return poller.Busy
	}
	return poller.Sleep
}

// commit ends a request that the back end has completed.
func (q *hwQueue) commit(tag uint16, m transfer, errno uint16) {
	q.Count(m.op, errno != 0, uint64(m.bytes))
	if errno != 0 {
		if unix.Errno(errno) == unix.EAGAIN {
			// io_uring clients would try again forever.
			errno = uint16(unix.EIO)
		}
		q.give(tag, -int32(errno))
		return
	}
	if m.direct {
		q.CountDirect(uint64(m.bytes))
	}
	q.give(tag, int32(m.bytes))
}

// refuse ends a request that cannot be passed to the back end.
func (q *hwQueue) refuse(tag uint16, errno unix.Errno) {
	q.Count(block.OpUnset, true, 0)
	q.Publish()
	q.give(tag, -int32(errno))
}

// aborted takes a tag that the driver returned without a request.
func (q *hwQueue) aborted(tag uint16, res int32) {
	if q.ending = true; len(q.held) > 0 {
		q.share(q.region, true) // nobody will hand the memory over
	}
	if errno := unix.Errno(-res); errno != unix.ENODEV {
		q.failed(fmt.Errorf("serve queue %d tag %d: %w", q.index, tag, errno))
	}
	q.end()
}

// end reports the end of the queue when no tag is outstanding. Requests that the back end
// still holds are committed with COMMIT_AND_FETCH, the only command for that, and the
// driver then returns the tag.
func (q *hwQueue) end() {
	if !q.ending || q.reported || q.fetching+q.inflight+len(q.reqs)+len(q.held) > 0 {
		return
	}
	q.reported = true
	q.ended()
}

// descBytes returns the size of the mapping with the descriptors of a queue of the given
// depth.
func descBytes(depth int) int {
	page := os.Getpagesize()
	return (depth*int(unsafe.Sizeof(ioDesc{})) + page - 1) / page * page
}

// mapDescs maps the descriptors of the queue with number index from ublkcN. The driver
// places the queues as if each had the largest depth.
func mapDescs(fd, index, depth int) (mem []byte, descs []ioDesc, err error) {
	mem, err = unix.Mmap(fd, int64(index)*int64(descBytes(maxDepth)), descBytes(depth),
		unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, nil, fmt.Errorf("map descriptors of queue %d: %w", index, err)
	}
	return mem, unsafe.Slice((*ioDesc)(unsafe.Pointer(&mem[0])), depth), nil
}
