package target

import (
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// MaxRAM is the largest size of a [RAM] in bytes. The machine may have less memory,
// because a page takes memory only when it is written.
const MaxRAM = 1 << 50

// RAM is a [Store] in memory, off the Go heap. A page takes memory from its first write
// until it is discarded. The data of overlapping requests at the same time may be
// mixed, as on a disk.
type RAM struct {
	mu      sync.RWMutex // held for writing by Resize and Close only
	mapping *mapping
}

// mapping is the memory of a RAM. It is unmapped when the RAM is closed or unreachable.
type mapping struct {
	pages []byte // whole pages; nil if there are none
	data  []byte // the part of pages that the store uses
	ended bool
}

func (m *mapping) unmap() error {
	if m.pages == nil {
		return nil
	}
	err := os.NewSyscallError("munmap", unix.Munmap(m.pages))
	m.pages, m.data = nil, nil
	return err
}

// OpenRAM makes a store of size bytes (0..MaxRAM) of zeroes. It fails if the size is
// out of range or there is not enough address space.
func OpenRAM(size int64) (*RAM, error) {
	r := &RAM{mapping: &mapping{}}
	if err := r.Resize(size); err != nil {
		return nil, err
	}
	runtime.AddCleanup(r, func(m *mapping) { _ = m.unmap() }, r.mapping)
	return r, nil
}

// NewRAM is like OpenRAM, but panics on an error.
func NewRAM(size int64) *RAM {
	r, err := OpenRAM(size)
	if err != nil {
		panic(err)
	}
	return r
}

// Close frees the memory. The store has a size of 0 after that.
func (r *RAM) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mapping.ended = true
	return r.mapping.unmap()
}

// Resize changes the size to size bytes (0..MaxRAM). The added part reads as zeroes.
// Call [Namespace.Revalidate] after it. After an error the size is unchanged.
func (r *RAM) Resize(size int64) error {
	if size < 0 || size > MaxRAM {
		return fmt.Errorf("store of %d bytes in memory: want 0 to %d", size, int64(MaxRAM))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.mapping
	page := int64(os.Getpagesize())
	length := int((size + page - 1) / page * page)
	switch {
	case m.ended:
		return fmt.Errorf("store in memory: %w", os.ErrClosed)
	case length == len(m.pages):
	case length == 0:
		return m.unmap()
	case m.pages == nil:
		pages, err := unix.Mmap(-1, 0, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
		if err != nil {
			return fmt.Errorf("store of %d bytes in memory: %w", size, os.NewSyscallError("mmap", err))
		}
		m.pages = pages
	default:
		pages, err := unix.Mremap(m.pages, length, unix.MREMAP_MAYMOVE)
		if err != nil {
			return fmt.Errorf("store of %d bytes in memory: %w", size, os.NewSyscallError("mremap", err))
		}
		m.pages = pages
	}
	m.data = m.pages[:size]
	clear(m.pages[size:]) // less than a page; it reads as zeroes if the size grows again
	return nil
}

// Size implements [Store].
func (r *RAM) Size() int64 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return int64(len(r.mapping.data))
}

// at returns the memory of a range, or errBeyondEnd. The caller holds the lock.
func (r *RAM) at(off, length int64) ([]byte, error) {
	data := r.mapping.data
	if off < 0 || length < 0 || off > int64(len(data)) || length > int64(len(data))-off {
		return nil, errBeyondEnd
	}
	return data[off : off+length], nil
}

// ReadAt implements [Store].
func (r *RAM) ReadAt(p []byte, off int64) (int, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	data, err := r.at(off, int64(len(p)))
	return copy(p, data), err
}

// WriteAt implements [Store].
func (r *RAM) WriteAt(p []byte, off int64) (int, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	data, err := r.at(off, int64(len(p)))
	return copy(data, p), err
}

// Flush implements [Store].
func (r *RAM) Flush() error { return nil }

// Discard implements [Store].
func (r *RAM) Discard(off, length int64) error { return r.WriteZeroes(off, length) }

// minFree is the smallest range, in bytes, whose pages WriteZeroes frees instead of
// writing to them.
const minFree = 256 << 10

// WriteZeroes implements [Store].
func (r *RAM) WriteZeroes(off, length int64) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	data, err := r.at(off, length)
	if err != nil || length < minFree {
		clear(data)
		return err
	}
	page := int64(os.Getpagesize())
	head := (page - off%page) % page
	tail := (off + length) % page
	if err := unix.Madvise(data[head:length-tail], unix.MADV_DONTNEED); err != nil {
		clear(data) // slower, with the same result
		return nil
	}
	clear(data[:head])
	clear(data[length-tail:])
	return nil
}
