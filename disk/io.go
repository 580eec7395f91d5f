package disk

import (
	"context"
	"fmt"
	"io"

	"ublk-nvmeof/block"
)

// ReadAt implements io.ReaderAt. off and the length of p are multiples of BlockSize, or the
// error is an *AlignmentError. Beyond the end of the disk it returns io.EOF. It copies from
// registered memory; Buffer does not.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	return d.ReadAtContext(context.Background(), p, off)
}

// WriteAt implements io.WriterAt. off and the length of p are multiples of BlockSize, or the
// error is an *AlignmentError. A write beyond the end of the disk fails with ENOSPC, and
// writes what is before. It copies to registered memory; Buffer does not. The data is on
// stable media after the next Flush.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	return d.WriteAtContext(context.Background(), p, off)
}

// ReadAtContext is ReadAt until ctx is done. Then it returns the cause of ctx, and p is not
// written any more.
func (d *Disk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	whole := len(p)
	n, err := d.within(block.OpRead, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	p = p[:n]
	done, err := d.transfer(ctx, block.OpRead, p, off)
	if err == nil && done < whole {
		err = io.EOF
	}
	return done, err
}

// WriteAtContext is WriteAt until ctx is done. Then it returns the cause of ctx. What has been
// sent to the device may still be written, also after the return.
func (d *Disk) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	whole := len(p)
	n, err := d.within(block.OpWrite, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	done, err := d.transfer(ctx, block.OpWrite, p[:n], off)
	if err == nil && done < whole {
		err = beyond(block.OpWrite, off, int64(whole))
	}
	return done, err
}

// within returns how much of a range is on the disk.
func (d *Disk) within(op block.Op, off, length int64) (int64, error) {
	if mask := int64(1)<<d.shift - 1; (off|length)&mask != 0 || off < 0 || length < 0 {
		return 0, &AlignmentError{Op: op, Offset: off, Length: length, BlockSize: 1 << d.shift}
	}
	return max(0, min(length, d.Size()-off)), nil
}

// transfer reads or writes a range that is on the disk, and returns how many bytes of its
// beginning were transferred.
func (d *Disk) transfer(ctx context.Context, op block.Op, p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s, err := d.pick().pool.take(ctx)
	if err != nil {
		return 0, failed(op, off, int64(len(p)), err)
	}
	if len(p) > d.maxIO {
		return d.pieces(ctx, s, op, p, off)
	}
	s.begin(op, p, off)
	return s.end(ctx, op, p, off)
}

// begin starts the transfer of a piece.
func (s *slot) begin(op block.Op, p []byte, off int64) {
	if op == block.OpWrite {
		copy(s.buf, p)
	}
	s.fill(op, off, int64(len(p)), 0)
	s.start()
}

// end waits for a piece and releases the slot. If ctx is done first, the slot is given away.
func (s *slot) end(ctx context.Context, op block.Op, p []byte, off int64) (int, error) {
	if !s.wait(ctx) {
		return 0, failed(op, off, int64(len(p)), context.Cause(ctx))
	}
	if s.errno != 0 {
		err := s.err()
		s.queue.pool.release(s)
		return 0, err
	}
	if op == block.OpRead {
		copy(p, s.buf)
	}
	s.queue.pool.release(s)
	return len(p), nil
}

// atOnce is the number of pieces of a call that are in flight at the same time, if as many
// slots are free.
const atOnce = 8

// pieces transfers a range that is larger than a buffer. It has one slot, and takes more if
// they are free. It does not wait for them while it has others, so callers cannot wait for
// one another.
func (d *Disk) pieces(ctx context.Context, first *slot, op block.Op, p []byte, off int64) (n int, err error) {
	var flying [atOnce]struct {
		s   *slot
		p   []byte
		off int64
	}
	head, tail := 0, 0 // of flying, as a ring
	next := first
	for len(p) > 0 || head < tail {
		for err == nil && len(p) > 0 && tail-head < atOnce {
			if next == nil {
				if next = d.pick().pool.tryTake(); next == nil {
					break
				}
			}
			size := min(len(p), d.maxIO)
			next.begin(op, p[:size], off)
			f := &flying[tail%atOnce]
			f.s, f.p, f.off, next = next, p[:size], off, nil
			p, off, tail = p[size:], off+int64(size), tail+1
		}
		if head == tail {
			if err != nil {
				return n, err
			}
			if next, err = d.pick().pool.take(ctx); err != nil {
				return n, failed(op, off, int64(len(p)), err)
			}
			continue
		}
		f := &flying[head%atOnce]
		head++
		k, e := f.s.end(ctx, op, f.p, f.off)
		if err == nil {
			n, err = n+k, e
		}
		if err != nil {
			p = nil
		}
	}
	return n, err
}

// Flush waits until everything that was written before the call is on stable media.
func (d *Disk) Flush(ctx context.Context) error { return d.do(ctx, block.OpFlush, 0, 0, 0) }

// Discard tells the device that a range is not needed any more. It may then read as anything.
// off and length are multiples of BlockSize. A device that cannot discard returns an error for
// which errors.Is reports errors.ErrUnsupported.
func (d *Disk) Discard(ctx context.Context, off, length int64) error {
	return d.erase(ctx, block.OpDiscard, off, length, 0)
}

// WriteZeroes makes a range read as zeroes. off and length are multiples of BlockSize. With
// block.NoUnmap the range stays allocated; with block.FUA the zeroes are on stable media when
// the call returns. errors.Is reports errors.ErrUnsupported if the device has no such command.
func (d *Disk) WriteZeroes(ctx context.Context, off, length int64, flags block.Flags) error {
	return d.erase(ctx, block.OpWriteZeroes, off, length, flags)
}

// maxErase is the largest discard or write zeroes that is passed to the back end, in bytes.
const maxErase = 1 << 40

func (d *Disk) erase(ctx context.Context, op block.Op, off, length int64, flags block.Flags) error {
	n, err := d.within(op, off, length)
	switch {
	case err != nil:
		return err
	case n < length:
		return beyond(op, off, length)
	}
	for length > 0 {
		n := min(length, maxErase)
		if err := d.do(ctx, op, off, n, flags); err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

// do executes a request without data.
func (d *Disk) do(ctx context.Context, op block.Op, off, length int64, flags block.Flags) error {
	s, err := d.pick().pool.take(ctx)
	if err != nil {
		return failed(op, off, length, err)
	}
	s.fill(op, off, length, flags)
	s.start()
	_, err = s.end(ctx, op, nil, off)
	return err
}

// fill prepares a slot for a request.
func (s *slot) fill(op block.Op, off, length int64, flags block.Flags) {
	s.req.Op, s.req.Flags = op, flags
	s.req.Sector, s.req.Sectors = uint64(off)>>block.SectorShift, uint32(length>>block.SectorShift)
}

func failed(op block.Op, off, length int64, err error) error {
	return fmt.Errorf("%v %d bytes at %d: %w", op, length, off, err)
}
