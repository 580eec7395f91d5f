package disk

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"ublk-nvmeof/block"
)

// Buffer is registered memory for one request at a time: the device reads and writes it
// without a copy. One goroutine uses it at a time.
type Buffer struct {
	disk *Disk
	slot *slot // nil after Close, or after a call whose context was done
}

// errGivenAway is the error of a buffer that was given up with a request in flight.
var errGivenAway = errors.New("the buffer was given up with a request in flight")

// Buffer takes a buffer of MaxIO bytes from those of the disk, and waits until ctx is done if
// all are in use. Other calls cannot use it until Buffer.Close.
func (d *Disk) Buffer(ctx context.Context) (*Buffer, error) {
	if err := d.lend(); err != nil {
		return nil, fmt.Errorf("take buffer: %w", err)
	}
	s, err := d.pick().pool.take(ctx)
	if err != nil {
		d.takeBack()
		return nil, fmt.Errorf("take buffer: %w", err)
	}
	s.queue.pool.lent.Add(1)
	return &Buffer{d, s}, nil
}

// Bytes returns the memory. It is valid until Close, and until a call returns because its
// context was done.
func (b *Buffer) Bytes() []byte {
	if b.slot == nil {
		return nil
	}
	return b.slot.buf
}

// Read reads n bytes at off into the beginning of the buffer. Errors are those of ReadAt, and
// a range that is not on the disk or larger than the buffer fails with EIO or EINVAL. If ctx is done
// first, the device may still write to the memory, so the buffer is given up: only Close may
// follow.
func (b *Buffer) Read(ctx context.Context, n int, off int64) error {
	return b.do(ctx, block.OpRead, n, off, 0)
}

// Write writes the first n bytes of the buffer at off. Otherwise it is like Read. With
// block.FUA the data is on stable media when the call returns.
func (b *Buffer) Write(ctx context.Context, n int, off int64, flags block.Flags) error {
	return b.do(ctx, block.OpWrite, n, off, flags)
}

func (b *Buffer) do(ctx context.Context, op block.Op, n int, off int64, flags block.Flags) error {
	s := b.slot
	if s == nil {
		return failed(op, off, int64(n), errGivenAway)
	}
	if b.disk.shut.Load() {
		return failed(op, off, int64(n), ErrClosed)
	}
	if _, err := b.disk.within(op, off, int64(n)); err != nil {
		return err
	}
	s.fill(op, off, int64(n), flags)
	s.start()
	if !s.wait(ctx) {
		s.queue.pool.lent.Add(-1)
		b.slot = nil
		return failed(op, off, int64(n), context.Cause(ctx))
	}
	if s.errno != 0 {
		return s.err()
	}
	return nil
}

// Close gives the buffer back. It may be called again, and after Disk.Close.
func (b *Buffer) Close() error {
	if b.disk == nil {
		return nil
	}
	if b.slot != nil {
		b.slot.queue.pool.lent.Add(-1)
		b.slot.queue.pool.release(b.slot)
	}
	b.disk.takeBack()
	b.disk, b.slot = nil, nil
	return nil
}

// Batch is a set of buffers whose requests are in flight at the same time. One goroutine uses
// it at a time.
type Batch struct {
	disk   *Disk
	slots  []*slot
	index  map[*slot]int
	flying int

	done   stack         // slots that are finished
	signal chan struct{} // has a token if there may be some
	asleep atomic.Uint32 // 1: the thread of the owner waits in the kernel
	listed bool          // among those that the loop tells at the end of its pass
}

// Request is a request of a Batch.
type Request struct {
	Buffer int      // index of the buffer in the batch
	Op     block.Op // OpRead, OpWrite, OpFlush, OpDiscard or OpWriteZeroes
	Flags  block.Flags
	Offset int64 // bytes
	Length int64 // bytes; of a read or write at most MaxIO
}

// Completion is the end of a Request.
type Completion struct {
	Buffer int
	Err    error // nil, or an *Error
}

// ErrBusy means that not as many buffers are free.
var ErrBusy = errors.New("not as many buffers are free")

// NewBatch takes n buffers of one loop. It does not wait for them: the error is ErrBusy if they
// are in use, and it is of another kind if a loop does not have as many.
func (d *Disk) NewBatch(n int) (*Batch, error) {
	q := d.pick()
	if n < 1 || n > len(q.slots) {
		return nil, fmt.Errorf("make batch: %d buffers are not in 1..%d", n, len(q.slots))
	}
	b := &Batch{disk: d, index: make(map[*slot]int, n), signal: make(chan struct{}, 1)}
	if err := d.lend(); err != nil {
		return nil, fmt.Errorf("make batch of %d: %w", n, err)
	}
	for i := range n {
		s := q.pool.tryTake()
		if s == nil {
			err := cmp.Or(q.pool.reason(), ErrBusy)
			return nil, errors.Join(fmt.Errorf("make batch of %d: %w", n, err), b.Close())
		}
		s.batch = b
		q.pool.lent.Add(1)
		b.slots = append(b.slots, s)
		b.index[s] = i
	}
	return b, nil
}

// Len returns the number of buffers.
func (b *Batch) Len() int { return len(b.slots) }

// Bytes returns the memory of a buffer. The device may access it from Submit until Wait has
// returned the buffer.
func (b *Batch) Bytes(i int) []byte { return b.slots[i].buf }

// Submit sends requests, all of them with one wake-up of the loop. If one of them is not valid,
// none is sent: a buffer out of range or in flight, or a range that is not of logical blocks.
func (b *Batch) Submit(reqs ...Request) error {
	if b.disk == nil || b.disk.shut.Load() {
		return fmt.Errorf("submit: %w", ErrClosed)
	}
	for i := range reqs {
		if err := b.check(&reqs[i]); err != nil {
			for _, r := range reqs[:i] {
				b.slots[r.Buffer].state.Store(stateIdle)
			}
			return err
		}
		b.slots[reqs[i].Buffer].state.Store(stateClaimed)
	}
	if len(reqs) == 0 {
		return nil
	}
	var first, last *slot // a stack: the last request is on top
	for i := range reqs {
		r := &reqs[i]
		s := b.slots[r.Buffer]
		s.fill(r.Op, r.Offset, r.Length, r.Flags)
		s.next = first
		if first = s; last == nil {
			last = s
		}
	}
	b.flying += len(reqs)
	q := first.queue
	q.inbox.push(first, last)
	for i := range reqs { // unless it has ended already
		b.slots[reqs[i].Buffer].state.CompareAndSwap(stateClaimed, stateFlying)
	}
	q.wake()
	return nil
}

func (b *Batch) check(r *Request) error {
	if r.Buffer < 0 || r.Buffer >= len(b.slots) || b.slots[r.Buffer].state.Load() != stateIdle {
		return fmt.Errorf("submit %v: buffer %d is out of range or in flight", r.Op, r.Buffer)
	}
	if r.Length > maxErase {
		return fmt.Errorf("submit %v: %d bytes are more than %d", r.Op, r.Length, maxErase)
	}
	_, err := b.disk.within(r.Op, r.Offset, r.Length)
	return err
}

// InFlight returns the number of requests that Wait has not returned.
func (b *Batch) InFlight() int { return b.flying }

// Wait waits until a request has ended, and stores as many completions as there are, and as
// there is room for, in done. It returns 0 without an error if no request is in flight. If ctx is done first, it returns
// the cause; the requests go on, and Wait may be called again. With a context that cannot end, one
// goroutine of a loop waits in the kernel, which makes its wake-up quicker.
func (b *Batch) Wait(ctx context.Context, done []Completion) (int, error) {
	for b.flying > 0 && len(done) > 0 {
		if n := b.collect(done); n > 0 {
			return n, nil
		}
		if sleeper := &b.slots[0].queue.sleeper; ctx.Done() == nil && sleeper.CompareAndSwap(false, true) {
			b.sleep()
			sleeper.Store(false)
			continue
		}
		select {
		case <-b.signal:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
	return 0, nil
}

// sleep waits in the kernel for slots that are finished; see slot.sleep.
func (b *Batch) sleep() {
	b.asleep.Store(1)
	if b.done.Load() != nil {
		b.asleep.Store(0)
		return
	}
	for b.asleep.Load() == 1 {
		futexWait(&b.asleep, 1)
	}
}

// tell wakes the owner up, who may be waiting for slots. It reports whether the thread of the owner
// was asleep.
func (b *Batch) tell() bool {
	if b.asleep.CompareAndSwap(1, 0) {
		futexWake(&b.asleep)
		return true
	}
	select {
	case b.signal <- struct{}{}:
	default:
	}
	return false
}

// collect takes slots that are finished.
func (b *Batch) collect(done []Completion) int {
	n := 0
	for s := b.done.Swap(nil); s != nil; {
		next := s.next
		if n == len(done) {
			b.done.push(s, s) // for the next call
		} else {
			done[n] = Completion{Buffer: b.index[s]}
			if s.errno != 0 {
				done[n].Err = s.err()
			}
			s.state.Store(stateIdle)
			b.flying--
			n++
		}
		s = next
	}
	return n
}

// Close waits for the requests in flight and gives the buffers back. It may be called again,
// and after Disk.Close, which makes them fail.
func (b *Batch) Close() error {
	if b.disk == nil {
		return nil
	}
	var done [32]Completion
	for b.flying > 0 {
		if _, err := b.Wait(context.Background(), done[:]); err != nil {
			return err
		}
	}
	for _, s := range b.slots {
		s.queue.pool.lent.Add(-1)
		s.queue.pool.release(s)
	}
	b.disk.takeBack()
	b.disk, b.slots = nil, nil
	return nil
}
