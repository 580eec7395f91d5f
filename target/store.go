package target

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/nvme"
)

// Store holds the data of a namespace. Offsets and lengths are in bytes, whole
// blocks, and within the size that the namespace has. Methods are called by
// several queues at a time; they block the queue that calls. ReadAt and WriteAt
// get registered memory and must not keep it.
//
// An error becomes the status of the command. One that wraps an [nvme.Status]
// is answered with that status, as it is; ENOSPC with "capacity exceeded", any
// other with an internal error, both with "do not retry".
type Store interface {
	io.ReaderAt
	io.WriterAt
	// Flush makes all that was written durable.
	Flush() error
	// Discard gives up the data of a range, which then reads as zeroes.
	Discard(off, length int64) error
	// WriteZeroes makes a range read as zeroes.
	WriteZeroes(off, length int64) error
	// Size is the capacity in bytes. See [Namespace.Revalidate] for changes.
	Size() int64
}

// storeStatus is the status of a command whose store said err.
func storeStatus(err error) nvme.Status {
	if err == nil {
		return nvme.StatusSuccess
	}
	var s nvme.Status
	switch {
	case errors.As(err, &s) && !s.OK():
		return s
	case errors.Is(err, unix.ENOSPC):
		return nvme.StatusCapacityExceeded | nvme.StatusDNR
	}
	return nvme.StatusInternal | nvme.StatusDNR
}

// RAM is a [Store] in memory. Overlapping requests at the same time mix, as on
// a disk.
type RAM struct {
	mu   sync.RWMutex // held for writing by Resize only
	data []byte
	order
}

// NewRAM makes a store of size bytes of zeroes.
func NewRAM(size int64) *RAM { return &RAM{data: make([]byte, size)} }

// Resize changes the size; what is added reads as zeroes. The namespace takes
// notice in [Namespace.Revalidate].
func (r *RAM) Resize(size int64) {
	data := make([]byte, size)
	r.mu.Lock()
	copy(data, r.data)
	r.data = data
	r.mu.Unlock()
}

// Size implements [Store].
func (r *RAM) Size() int64 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return int64(len(r.data))
}

var errBeyondEnd = fmt.Errorf("beyond the end of the store: %w", nvme.StatusLBAOutOfRange|nvme.StatusDNR)

// within says whether the range exists; the lock is held.
func (r *RAM) within(off, length int64) bool {
	return off >= 0 && length >= 0 && off <= int64(len(r.data)) && length <= int64(len(r.data))-off
}

// ReadAt implements [Store].
func (r *RAM) ReadAt(p []byte, off int64) (int, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if !r.within(off, int64(len(p))) {
		return 0, errBeyondEnd
	}
	r.mark()
	defer r.mark()
	return copy(p, r.data[off:]), nil
}

// WriteAt implements [Store].
func (r *RAM) WriteAt(p []byte, off int64) (int, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if !r.within(off, int64(len(p))) {
		return 0, errBeyondEnd
	}
	r.mark()
	defer r.mark()
	return copy(r.data[off:], p), nil
}

// Flush implements [Store].
func (r *RAM) Flush() error { return nil }

// Discard implements [Store].
func (r *RAM) Discard(off, length int64) error { return r.WriteZeroes(off, length) }

// WriteZeroes implements [Store].
func (r *RAM) WriteZeroes(off, length int64) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if !r.within(off, length) {
		return errBeyondEnd
	}
	r.mark()
	defer r.mark()
	clear(r.data[off : off+length])
	return nil
}
