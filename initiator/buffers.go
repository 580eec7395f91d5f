package initiator

import (
	"errors"
	"sync"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/hostmem"
)

// buffers are the I/O buffers of a queue, one for each tag, in chunks. A chunk is address space
// until requests need its buffers. Until then the data of requests is in the spare buffer, one
// request at a time, and is copied. When a request finds the spare buffer in use, or after so many
// requests that copies cost more than the chunk (memory.turns), its chunk is populated and
// registered in the background, so that the loop does not wait for memory. So a chunk that the
// machine has no memory for costs time, but no request, and a device of which somebody has read
// the partition table only has no chunk yet.
//
// Once the queue is open, only the lane uses the fields.
type buffers struct {
	mem    []byte
	size   int   // of a buffer
	shift  uint8 // log2 of the number of buffers in a chunk
	chunks []slab
	spare  slab     // without memory: all chunks have been ready since the queue was opened
	user   *request // that has the spare buffer
	lent   int      // how often a request got it
	short  fifo     // requests that wait for it, or for their chunk

	preparing sync.WaitGroup // chunks that are being made ready
}

// chunkSize is the size of a chunk in bytes, unless a buffer is larger: that of a huge page.
const chunkSize = 2 << 20

// spareTurns is the number of requests of a queue that get the spare buffer before chunks are made
// ready for single requests, too. So many copies of 4 KiB take less than a chunk takes to be zeroed.
const spareTurns = 64

// prepareAgain is the time before a chunk is tried again that could not be made ready.
const prepareAgain = 200 * time.Millisecond

// QueueMemory returns the number of bytes for which a queue counts in Config.MaxMemory.
func QueueMemory(depth, maxIO int) int64 { return queueMemory(depth, maxIO, chunkSize) }

func queueMemory(depth, maxIO, chunk int) int64 {
	size := int64(depth) * int64(maxIO)
	if size > int64(chunk) {
		size += int64(maxIO) // the spare buffer
	}
	return size
}

// open makes the buffers of a queue, which count as used at once. Those of several queues are
// populated at the same time.
func (b *buffers) open(m *memory, depth, size int) error {
	want := queueMemory(depth, size, m.chunk)
	if err := m.reserve(want); err != nil {
		return err
	}
	b.size = size
	err := b.reserve(depth, m.chunk)
	if err == nil {
		err = b.begin(m)
	}
	if err != nil {
		m.unreserve(want)
		return errors.Join(err, b.free(m))
	}
	return nil
}

// reserve reserves the address space of the chunks, which have at most chunk bytes or one buffer.
// They are whole pages, as OpenQueue has checked.
func (b *buffers) reserve(depth, chunk int) (err error) {
	if b.mem, err = hostmem.Reserve(depth * b.size); err != nil {
		return err
	}
	for b.size<<(b.shift+1) <= chunk {
		b.shift++
	}
	length := b.size << b.shift
	for at := 0; at < len(b.mem); at += length {
		mem := b.mem[at:min(at+length, len(b.mem))]
		b.chunks = append(b.chunks, slab{mem: mem, base: hostmem.Addr(mem)})
	}
	return nil
}

// begin makes ready what is needed before a request asks for it: the only chunk, or the spare
// buffer. A process that may lock only so much memory registers all, so that it learns now and not
// later if that is too much.
func (b *buffers) begin(m *memory) (err error) {
	if len(b.mem) <= m.chunk {
		b.chunks[0].ready = true
		return m.prepare(&b.chunks[0])
	}
	if b.spare.mem, err = hostmem.Map(b.size); err != nil {
		return err
	}
	b.spare.base = hostmem.Addr(b.spare.mem)
	if err := m.enroll(&b.spare); err != nil || !m.limited {
		return err
	}
	for i := range b.chunks {
		b.chunks[i].ready = true
		if err := m.enroll(&b.chunks[i]); err != nil {
			return err
		}
	}
	return nil
}

// free frees the buffers. If a registration cannot be ended, the memory stays mapped, because the
// device may still write to it.
func (b *buffers) free(m *memory) error {
	b.preparing.Wait()
	errs := []error{m.withdraw(&b.spare)}
	for i := range b.chunks {
		errs = append(errs, m.withdraw(&b.chunks[i]))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, mem := range [][]byte{b.spare.mem, b.mem} {
		if mem != nil {
			errs = append(errs, hostmem.Unmap(mem))
		}
	}
	return errors.Join(errs...)
}

// chunk returns the chunk of a tag's buffer, and where it is in it.
func (b *buffers) chunk(tag uint16) (c *slab, at uint64) {
	return &b.chunks[tag>>b.shift], uint64(tag&(1<<b.shift-1)) * uint64(b.size)
}

// of returns the buffer of a tag.
func (b *buffers) of(tag uint16) []byte {
	at := int(tag) * b.size
	return b.mem[at : at+b.size : at+b.size]
}

// equip finds memory for a request whose chunk is not ready. It returns false if the request waits
// for it.
func (q *nsQueue) equip(r *request) bool {
	b := &q.buffers
	if r.io.Op == block.OpFlush {
		return true // it has no data
	}
	if b.user != nil || b.lent >= q.ns.sub.mem.turns {
		q.ask(r.data)
	}
	if b.user != nil {
		b.short.push(r)
		return false
	}
	b.lend(r)
	return true
}

// lend gives the spare buffer to a request.
func (b *buffers) lend(r *request) {
	b.user = r
	b.lent++
	r.data, r.at = &b.spare, 0
	if r.io.Op == block.OpWrite {
		copy(b.spare.mem, b.of(r.io.Tag)[:r.io.Sectors<<block.SectorShift])
	}
}

// takeBack takes the spare buffer back from a request that has ended.
func (q *nsQueue) takeBack(r *request) {
	b := &q.buffers
	if r.io.Op == block.OpRead && r.errno == 0 {
		copy(b.of(r.io.Tag), b.spare.mem[:r.io.Sectors<<block.SectorShift])
	}
	b.user = nil
	q.supply()
}

// supply dispatches the requests for which there is memory now.
func (q *nsQueue) supply() {
	b := &q.buffers
	waiting := b.short.take()
	for r := waiting.pop(); r != nil; r = waiting.pop() {
		if r.data.ready || q.equip(r) {
			q.lane.dispatch(r)
		}
	}
}

// ask has a chunk made ready.
func (q *nsQueue) ask(c *slab) {
	if !c.asked {
		c.asked = true
		q.buffers.preparing.Go(func() { q.prepare(c) })
	}
}

// prepare makes a chunk ready. If it cannot, the requests that then wait for it ask again.
func (q *nsQueue) prepare(c *slab) {
	s := q.ns.sub
	err := s.mem.prepare(c)
	if err != nil {
		s.reports.Warn("I/O is slow: I/O buffers cannot be registered, so requests take turns", "nsid", q.ns.id, "bytes", len(c.mem), "error", err)
		time.AfterFunc(prepareAgain, func() { q.prepared(c, false) })
		return
	}
	q.prepared(c, true)
}

// prepared tells the lane whether a chunk is ready.
func (q *nsQueue) prepared(c *slab, ready bool) {
	// A loop that has ended has no requests.
	_ = q.lane.loop.Call(func() {
		c.ready, c.asked = ready, false
		q.supply()
	})
}
