package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/internal/iostats"
	"ublk-nvmeof/internal/uring"
	"ublk-nvmeof/poller"
)

const (
	// reapBatch is the number of results that are reaped from the back end at once.
	reapBatch = 64
	// ringBudget is the number of requests that are taken from a ring before it is
	// another ring's turn.
	ringBudget = 64
	// none is a value that is not a tag.
	none = ^uint16(0)
	// runMin is the number of bytes from which on a command for a part of a buffer alone, which
	// the back end can access, is cheaper than to copy that part.
	runMin = 32 << 10
	// segmentMin is the number of bytes of a segment, on average, from which on several segments
	// are cheaper than to copy them.
	segmentMin = 4 << 10
)

// submitter is the part of uring.Entries that the data path uses.
type submitter interface {
	SQE() *uring.SQE // never nil
}

// worker is the part of a server on one loop. It has a queue of the back end, whose tags
// the rings of the loop share. It is a poller.Source and a poller.Handler. Only the loop
// uses its fields.
//
// Guest memory is touched only in functions that guard calls, and in none that the back
// end calls.
type worker struct {
	server *Server
	ring   submitter
	base   uint64 // what poller.Loop.Handle returned
	back   block.Queue
	bounds bounds
	gather block.Gatherer                   // back; nil: it takes no segments
	single [block.MaxSegments]block.Segment // the table of segments of such a queue
	one    []byte                           // what is written to an eventfd

	session  *session // nil: there is none, or it has failed
	mem      *memory
	rings    []*vring
	turn     int           // ring that is first in the next pass
	polled   int           // number of rings without a kick
	drained  chan struct{} // not nil: no more requests are taken; closed when none is in flight
	writeFUA bool          // the guest does not flush

	tags     []tag
	freeTag  uint16
	tasks    []task
	freeTask *task
	running  int // tasks in use
	reqs     []block.Request
	done     [reapBatch]block.Result
	from, to int // results in done that were not handled
	inflight int // requests at the back end
	header   [blkHeaderSize]byte
	status   [1]byte

	iostats.Counters
}

// tag is a tag of the back end with the piece of a task that uses it.
type tag struct {
	task   *task // nil: free, or the task is gone
	at     uint64
	sector uint64
	direct *memory // guest memory in which the back end accesses the data itself; nil: the buffer has it
	bytes  uint32
	state  tagState
	next   uint16 // in the list of free tags
}

type tagState uint8

const (
	tagFree   tagState = iota
	tagQueued          // in reqs
	tagAtBack          // from Submit to Reap
	tagDone            // its result is being handled
)

// bounds are the limits of requests to the back end.
type bounds struct {
	sectors uint64 // capacity
	block   uint64 // sectors of a logical block
	piece   uint64 // bytes of a read or write, whole blocks
	chunk   uint64 // reads and writes do not cross a multiple of it, in bytes; 0: no limit
	discard uint64 // sectors, whole blocks
	zeroes  uint64
}

func boundsOf(g block.Geometry, buffer int) bounds {
	whole := ^(g.LogicalBlock - 1)
	b := bounds{
		sectors: g.Sectors, block: uint64(g.LogicalBlock >> block.SectorShift),
		piece: uint64(min(uint32(buffer), g.MaxIO) & whole),
		chunk: uint64(g.ChunkSectors) << block.SectorShift,
	}
	if b.chunk%uint64(g.LogicalBlock) != 0 {
		b.chunk = 0
	}
	// A device that does not support them any more still accepts them.
	limit := func(sectors uint32) uint64 {
		if sectors == 0 {
			sectors = 1 << 20
		}
		return max(uint64(sectors)/b.block, 1) * b.block
	}
	b.discard, b.zeroes = limit(g.MaxDiscardSectors), limit(g.MaxZeroesSectors)
	return b
}

func newWorker(s *Server, ring submitter, back block.Queue, depth int, b bounds) *worker {
	w := &worker{
		server: s, ring: ring, back: back, bounds: b, freeTag: none,
		one:  binary.NativeEndian.AppendUint64(nil, 1),
		tags: make([]tag, depth), tasks: make([]task, depth), reqs: make([]block.Request, 0, depth),
	}
	w.gather, _ = back.(block.Gatherer)
	for i := depth - 1; i >= 0; i-- {
		w.tags[i].next, w.freeTag = w.freeTag, uint16(i)
		w.tasks[i].next, w.freeTask = w.freeTask, &w.tasks[i]
	}
	return w
}

// Poll implements poller.Source.
func (w *worker) Poll() (n int) {
	defer w.guard(&n)
	n += w.takeAll()
	n += w.submit()
	n += w.reap()
	if n > 0 {
		w.publishAll()
		w.Publish()
	}
	return n
}

// Arm asks the guest to kick. After a fault it returns no answer, so the loop polls again. It
// implements poller.Source.
func (w *worker) Arm() (ready poller.Readiness) {
	defer w.guard(nil)
	if len(w.reqs) > 0 {
		return poller.Busy
	}
	if w.session == nil {
		return poller.Sleep
	}
	for _, r := range w.rings {
		r.askForKick()
	}
	if w.polled > 0 {
		return poller.Spin
	}
	return poller.Sleep
}

// Complete handles the end of a write to the eventfd of a ring. It implements
// poller.Handler.
func (w *worker) Complete(data uint64, _ int32, _ uint32) {
	for _, r := range w.rings {
		if uint64(r.index) != data {
			continue
		}
		r.calling = false
		w.hush(r)
		if r.again && r.call >= 0 {
			r.again = false
			w.callRing(r)
		}
		w.settle(r)
		return
	}
}

// takeAll takes requests from all rings, a different one first each time.
func (w *worker) takeAll() int {
	if w.session == nil || w.drained != nil || len(w.rings) == 0 || w.server.orphans.Load() > 0 {
		return 0
	}
	if w.turn++; w.turn >= len(w.rings) {
		w.turn = 0
	}
	n := 0
	for i := range w.rings {
		if i += w.turn; i >= len(w.rings) {
			i -= len(w.rings)
		}
		r := w.rings[i]
		if !r.enabled && !(r.stopping && len(r.resubmit) > 0) {
			continue
		}
		k, err := w.takeFrom(r)
		if err != nil {
			w.fail(fmt.Errorf("ring %d: %w", r.index, err))
			return n + 1
		}
		n += k
	}
	return n
}

// takeFrom takes requests from a ring.
func (w *worker) takeFrom(r *vring) (n int, err error) {
	for len(r.resubmit) > 0 && w.freeTag != none {
		head := r.resubmit[0]
		r.resubmit = r.resubmit[1:]
		if err := w.begin(r, head); err != nil {
			return n, err
		}
		n++
	}
	if len(r.resubmit) > 0 || r.stopping {
		return n, nil
	}
	available, err := r.available()
	if err != nil || available == 0 {
		return n, err
	}
	r.forbidKicks()
	for range min(available, ringBudget) {
		if w.freeTag == none {
			break
		}
		head, err := r.next()
		if err != nil {
			return n, err
		}
		if err := w.begin(r, head); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// begin starts a request. An error ends the session.
func (w *worker) begin(r *vring, head uint16) error {
	t := w.freeTask
	w.freeTask = t.next
	w.running++
	r.tasks++
	t.ring, t.head, t.op, t.flags = r, head, block.OpUnset, 0
	t.nOut, t.n, t.out, t.in = 0, 0, 0, 0
	t.at, t.total, t.left, t.direct, t.failed, t.busy, t.next = 0, 0, 0, 0, false, 0, nil
	if err := r.chain(w.mem, head, t); err != nil {
		return err
	}
	switch {
	case t.out < blkHeaderSize:
		return fmt.Errorf("a request has %d bytes to read, fewer than its header", t.out)
	case t.in == 0:
		return errors.New("a request has no room for its status")
	case !t.read(w.mem, 0, w.header[:]):
		return errAddress(t.segments[0])
	}
	status, err := w.start(t, decodeBlkHeader(&w.header))
	if err != nil || t.busy > 0 {
		return err
	}
	return w.complete(t, status)
}

// start passes the first pieces of a request to the back end. If there is none, the
// request is complete, with the status.
func (w *worker) start(t *task, h blkHeader) (status byte, err error) {
	t.sector = h.sector
	switch h.kind {
	case blkIn:
		t.op, t.total = block.OpRead, t.in-1
	case blkOut:
		t.op, t.total = block.OpWrite, t.out-blkHeaderSize
	case blkFlush:
		t.op = block.OpFlush
		w.flush(t)
		return statusOK, nil
	case blkDiscard:
		t.op, t.total = block.OpDiscard, t.out-blkHeaderSize
	case blkWriteZeroes:
		t.op, t.total = block.OpWriteZeroes, t.out-blkHeaderSize
	case blkGetID:
		return w.identify(t)
	default:
		return statusUnsupported, nil
	}
	if w.writeFUA && (t.op == block.OpWrite || t.op == block.OpWriteZeroes) {
		t.flags |= block.FUA
	}
	if t.op == block.OpDiscard || t.op == block.OpWriteZeroes {
		if t.total == 0 || t.total%rangeSize != 0 || t.total > maxDiscardSegments*rangeSize {
			return statusIOErr, nil
		}
		return w.nextRange(t, w.takeTag())
	}
	sectors := t.total >> block.SectorShift
	switch {
	case t.total == 0, t.total%block.SectorSize != 0, (t.sector|sectors)&(w.bounds.block-1) != 0:
		return statusIOErr, nil
	case t.sector > w.bounds.sectors, sectors > w.bounds.sectors-t.sector:
		return statusIOErr, nil
	}
	for t.at < t.total && w.freeTag != none {
		if err := w.transfer(t, w.takeTag()); err != nil {
			return 0, err
		}
	}
	return statusOK, nil
}

// flush passes a flush to the back end.
func (w *worker) flush(t *task) {
	w.issue(t, w.takeTag(), block.Request{Op: block.OpFlush})
}

// identify answers a request for the disk's name.
func (w *worker) identify(t *task) (byte, error) {
	n := min(t.in-1, idSize)
	if !t.write(w.mem, 0, w.server.id[:n]) {
		return 0, errAddress(t.segments[t.nOut])
	}
	return statusOK, nil
}

// transfer passes the next piece of a read or write to the back end.
func (w *worker) transfer(t *task, i uint16) error {
	n := min(w.bounds.piece, t.total-t.at)
	if c := w.bounds.chunk; c > 0 {
		n = min(n, c-(t.sector<<block.SectorShift)%c)
	}
	g := &w.tags[i]
	g.at, g.sector = t.at, t.sector
	n, segments := w.place(t, i, n)
	g.bytes = uint32(n)
	t.at += n
	t.sector += n >> block.SectorShift
	return w.send(t, i, segments)
}

// place decides whether the back end can access the data of a piece of n bytes itself. Then it
// returns the number of bytes that are in the first segments of the tag's table, and the number of
// these. Otherwise it returns n and 0.
func (w *worker) place(t *task, i uint16, n uint64) (bytes uint64, segments int) {
	g := &w.tags[i]
	g.direct = nil
	if !w.server.cfg.ZeroCopy {
		return n, 0
	}
	limit := 1
	if w.gather != nil {
		limit = w.gather.SegmentLimit()
	}
	bytes, segments = w.segment(t.data(g.at), n, w.table(i)[:limit])
	if bytes < min(n, runMin) || segments > 1 && bytes < uint64(segments)*segmentMin {
		return n, 0
	}
	g.direct = w.mem
	return bytes, segments
}

// table returns the table of segments of a tag.
func (w *worker) table(i uint16) *[block.MaxSegments]block.Segment {
	if w.gather == nil {
		return &w.single
	}
	return w.gather.Segments(i)
}

// segment fills in a table with the places of up to n bytes of data from the cursor on, as many as the
// back end can access: whole blocks in memory that it has.
func (w *worker) segment(c cursor, n uint64, table []block.Segment) (bytes uint64, segments int) {
	part := w.bounds.block<<block.SectorShift - 1 // of a block
	for i := range table {
		r, guest, k := c.run(w.mem, n-bytes)
		if r == nil || r.lent == nil || (guest-r.guest)&3 != 0 || k <= part {
			break
		}
		table[i] = block.Segment{Region: r.lent.Number(), Offset: guest - r.guest, Length: uint32(k &^ part)}
		segments++
		bytes += k &^ part
		if bytes == n || k&part != 0 {
			break
		}
	}
	return bytes, segments
}

// send passes a piece of a read or write to the back end. Its data is in so many segments, or, if it is
// 0, in the buffer.
func (w *worker) send(t *task, i uint16, segments int) error {
	g := &w.tags[i]
	r := block.Request{Sector: g.sector, Sectors: g.bytes >> block.SectorShift, Op: t.op, Flags: t.flags}
	switch {
	case segments == 1:
		s := &w.table(i)[0]
		r.Region, r.Offset = s.Region, s.Offset
	case segments > 1:
		r.Segments = uint8(segments)
	case t.op == block.OpWrite && !t.read(w.mem, blkHeaderSize+g.at, w.back.Buffer(i)[:g.bytes]):
		return errRemoved
	}
	w.issue(t, i, r)
	return nil
}

// sendAgain passes a piece to the back end again whose memory the front end has replaced. If the
// guest's addresses have memory, it is another mapping of the same pages.
func (w *worker) sendAgain(t *task, i uint16) error {
	g := &w.tags[i]
	bytes, segments := w.place(t, i, uint64(g.bytes))
	if bytes < uint64(g.bytes) {
		g.direct, segments = nil, 0
	}
	return w.send(t, i, segments)
}

// replaced reports whether the front end has replaced the memory of a piece, so that the back end
// could not access it, or has read to what the guest does not see any more.
func (w *worker) replaced(t *task, g *tag, errno uint16) bool {
	switch {
	case g.direct == nil:
		return false
	case errno != 0 || t.op != block.OpRead:
		return unix.Errno(errno) == unix.EFAULT
	case g.direct == w.mem:
		return false
	}
	c := t.data(g.at)
	for left := uint64(g.bytes); left > 0; {
		r, guest, n := c.run(g.direct, left)
		if w.mem.find(guest) != r {
			return true
		}
		left -= n
	}
	return false
}

// deliver gives the guest the data of a read. It returns false if a memory region is missing.
func (w *worker) deliver(t *task, i uint16) bool {
	g := &w.tags[i]
	if g.direct == nil {
		return t.write(w.mem, g.at, w.back.Buffer(i)[:g.bytes])
	}
	if w.mem.log == nil {
		return true
	}
	c := t.data(g.at)
	for left := uint64(g.bytes); left > 0; {
		r, guest, n := c.run(w.mem, left)
		if r == nil {
			return false
		}
		w.mem.log.mark(guest, n)
		left -= n
	}
	return true
}

// errRemoved ends a session whose front end has removed memory that a request uses.
var errRemoved = errors.New("a memory region was removed while a request used it")

// nextRange passes the next part of a discard or write zeroes to the back end. If there is
// none, it frees the tag and returns the status of the request.
func (w *worker) nextRange(t *task, i uint16) (byte, error) {
	for t.left == 0 {
		if t.at == t.total {
			w.releaseTag(i)
			return statusOK, nil
		}
		if !t.read(w.mem, blkHeaderSize+t.at, w.header[:rangeSize]) {
			return 0, errRemoved
		}
		t.at += rangeSize
		if status := w.beginRange(t, decodeRange(&w.header)); status != statusOK {
			w.releaseTag(i)
			return status, nil
		}
	}
	limit := w.bounds.discard
	if t.op == block.OpWriteZeroes {
		limit = w.bounds.zeroes
	}
	n := min(t.left, limit)
	r := block.Request{Sector: t.sector, Sectors: uint32(n), Op: t.op, Flags: t.flags}
	t.left -= n
	t.sector += n
	w.tags[i].bytes = 0
	w.issue(t, i, r)
	return statusOK, nil
}

// beginRange checks a range of a discard or write zeroes.
func (w *worker) beginRange(t *task, x diskRange) byte {
	known := uint32(0)
	if t.op == block.OpWriteZeroes {
		known = unmapFlag
		t.flags |= block.NoUnmap
		if x.flags&unmapFlag != 0 {
			t.flags &^= block.NoUnmap
		}
	}
	n := uint64(x.sectors)
	switch {
	case x.flags&^known != 0:
		return statusUnsupported
	case (x.sector|n)&(w.bounds.block-1) != 0, x.sector > w.bounds.sectors, n > w.bounds.sectors-x.sector:
		return statusIOErr
	}
	t.sector, t.left = x.sector, n
	return statusOK
}

// issue passes a tag to the back end with the next Submit.
func (w *worker) issue(t *task, i uint16, r block.Request) {
	g := &w.tags[i]
	g.task, g.state = t, tagQueued
	t.busy++
	r.Tag = i
	w.reqs = append(w.reqs, r)
}

// submit passes new requests to the back end.
func (w *worker) submit() int {
	n := len(w.reqs)
	if n == 0 {
		return 0
	}
	for i := range w.reqs {
		w.tags[w.reqs[i].Tag].state = tagAtBack
	}
	w.inflight += n
	w.back.Submit(w.reqs)
	w.reqs = w.reqs[:0]
	w.CountBatch()
	return n
}

// reap handles the results of the back end. After a fault in a result, the next call
// continues with the following one.
func (w *worker) reap() int {
	n := 0
	for {
		for w.from < w.to {
			r := w.done[w.from]
			w.from++
			n++
			if err := w.finish(r.Tag, r.Errno); err != nil {
				w.fail(err)
			}
		}
		if w.inflight == 0 {
			return n
		}
		w.from, w.to = 0, 0
		w.to = w.back.Reap(w.done[:])
		w.inflight -= w.to
		if w.to == 0 {
			return n
		}
	}
}

// finish handles a tag that the back end has returned. An error ends the session.
func (w *worker) finish(i uint16, errno uint16) error {
	g := &w.tags[i]
	t := g.task
	g.state = tagDone
	if t == nil {
		w.releaseTag(i)
		w.server.orphanEnded()
		return nil
	}
	t.busy--
	switch {
	case w.replaced(t, g, errno):
		return w.sendAgain(t, i)
	case errno != 0:
		t.failed = true
	case t.op == block.OpRead && !w.deliver(t, i):
		return errRemoved
	case g.direct != nil:
		t.direct += uint64(g.bytes)
	}
	status := byte(statusOK)
	switch {
	case t.failed, t.op == block.OpFlush:
		w.releaseTag(i)
	case t.op == block.OpDiscard || t.op == block.OpWriteZeroes:
		var err error
		if status, err = w.nextRange(t, i); err != nil {
			return err
		}
	case t.at < t.total:
		return w.transfer(t, i)
	default:
		w.releaseTag(i)
	}
	if t.busy > 0 {
		return nil
	}
	if t.failed {
		status = statusIOErr
	}
	return w.complete(t, status)
}

// complete returns a request to the guest.
func (w *worker) complete(t *task, status byte) error {
	w.status[0] = status
	if !t.write(w.mem, t.in-1, w.status[:]) {
		return errRemoved
	}
	length := uint32(1)
	if status == statusOK {
		length = uint32(t.in)
	}
	r := t.ring
	r.push(t.head, length)
	r.tasks--
	w.Count(t.op, status != statusOK, t.total)
	if t.direct > 0 && status == statusOK {
		w.CountDirect(t.direct)
	}
	w.releaseTask(t)
	if len(r.batch) == maxBatch {
		w.publishRing(r)
	}
	return nil
}

func (w *worker) takeTag() uint16 {
	i := w.freeTag
	w.freeTag = w.tags[i].next
	w.tags[i].state = tagDone
	return i
}

func (w *worker) releaseTag(i uint16) {
	g := &w.tags[i]
	g.task, g.state, g.direct = nil, tagFree, nil
	g.next, w.freeTag = w.freeTag, i
}

func (w *worker) releaseTask(t *task) {
	t.ring = nil
	t.next, w.freeTask = w.freeTask, t
	w.running--
}

// publishAll shows the guest all completed requests.
func (w *worker) publishAll() {
	if w.session == nil {
		return
	}
	for i := len(w.rings) - 1; i >= 0; i-- { // settle may remove the ring
		r := w.rings[i]
		w.publishRing(r)
		w.settle(r)
	}
	if w.drained != nil && w.running == 0 {
		w.endDrain()
	}
}

func (w *worker) publishRing(r *vring) {
	if r.publish() {
		w.callRing(r)
	}
}

// callRing notifies the guest of used buffers.
func (w *worker) callRing(r *vring) {
	switch {
	case r.call < 0:
		return
	case r.calling:
		r.again = true
		return
	}
	r.calling = true
	s := w.ring.SQE()
	s.Opcode, s.FD, s.Addr, s.Len = uring.OpWrite, int32(r.call), hostmem.Addr(w.one), uint32(len(w.one))
	s.UserData = w.base | uint64(r.index)
}

// cancelCall ends a write to an eventfd that is full.
func (w *worker) cancelCall(r *vring) {
	r.again = false
	if r.calling {
		s := w.ring.SQE()
		s.Opcode, s.Addr = uring.OpAsyncCancel, w.base|uint64(r.index)
	}
}

// settle removes a ring that is stopping when nothing of it is in flight any more.
func (w *worker) settle(r *vring) {
	owed := w.session != nil && (r.published != r.usedIdx || len(r.resubmit) > 0)
	if !r.stopping || owed || r.tasks > 0 || r.calling || r.again {
		return
	}
	w.rings = slices.DeleteFunc(w.rings, func(have *vring) bool { return have == r })
	if r.polled {
		w.polled--
	}
	close(r.done)
}

// fail ends the session because of an error.
func (w *worker) fail(err error) {
	if s := w.session; s != nil {
		w.abandon(nil)
		w.session = nil
		s.fail(err)
	}
}

// abandon gives up the requests of a ring, or of all rings if r is nil. Those at the back
// end become orphans: until their end, no other request may be sent, because it could
// overtake them.
func (w *worker) abandon(r *vring) {
	kept := w.reqs[:0]
	for _, q := range w.reqs {
		if t := w.tags[q.Tag].task; t != nil && r != nil && t.ring != r {
			kept = append(kept, q)
			continue
		}
		w.tags[q.Tag].state = tagDone
	}
	w.reqs = kept
	for i := range w.tags {
		g := &w.tags[i]
		if g.state == tagFree || r != nil && (g.task == nil || g.task.ring != r) {
			continue
		}
		switch {
		case g.state == tagAtBack && g.task != nil:
			g.task = nil
			w.server.orphans.Add(1)
		case g.state == tagDone:
			w.releaseTag(uint16(i))
		}
	}
	for i := range w.tasks {
		t := &w.tasks[i]
		if t.ring != nil && (r == nil || t.ring == r) {
			t.ring.tasks--
			w.releaseTask(t)
		}
	}
	if w.drained != nil && w.running == 0 {
		w.endDrain()
	}
}

func (w *worker) endDrain() {
	select {
	case <-w.drained:
	default:
		close(w.drained)
	}
}

// adopt makes a session that of the worker.
func (w *worker) adopt(n *session) {
	if w.session == nil {
		w.session, w.drained = n, nil
		w.bounds = boundsOf(w.server.cfg.Device.Geometry(), w.server.cfg.MaxIO)
	}
}

// leave ends the session on the loop. Its rings are stopped.
func (w *worker) leave(n *session) {
	if w.session == n {
		w.abandon(nil)
		w.session = nil
	}
	w.mem, w.drained, w.writeFUA = nil, nil, false
	for _, r := range slices.Clone(w.rings) {
		w.stop(r)
	}
}

// serve begins to serve a ring. The guest gets a call, because one that an earlier server
// owed it may be lost.
func (w *worker) serve(r *vring, base uint16) error {
	if err := r.locate(w.mem, r.addr); err != nil {
		return err
	}
	if err := r.begin(base); err != nil {
		return err
	}
	w.rings = append(w.rings, r)
	w.callRing(r)
	return nil
}

// reset gives up the requests of a ring, also for later servers, and stops it.
func (w *worker) reset(r *vring) {
	if r.track != nil {
		r.track.reset()
	}
	r.resubmit = nil
	w.abandon(r)
	w.stop(r)
}

// stop stops a ring after its requests. Its done is closed then.
func (w *worker) stop(r *vring) {
	r.stopping = true
	if w.session == nil || r.tasks == 0 {
		w.cancelCall(r)
	}
	w.settle(r)
}

// setPolled says whether the ring has no kick.
func (w *worker) setPolled(r *vring, polled bool) error {
	if polled != r.polled {
		r.polled = polled
		if polled {
			w.polled++
		} else {
			w.polled--
		}
	}
	return nil
}

// setMemory makes the worker use other regions, or another log.
func (w *worker) setMemory(m *memory) error {
	w.mem = m
	for _, r := range w.rings {
		if err := r.locate(m, r.addr); err != nil {
			return err
		}
	}
	return nil
}

// hush tells replaceCall that no write to the old eventfd is pending.
func (w *worker) hush(r *vring) {
	if r.quiet != nil && !r.calling {
		close(r.quiet)
		r.quiet = nil
	}
}
