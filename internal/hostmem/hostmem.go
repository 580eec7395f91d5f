// Package hostmem maps memory outside the Go heap for the kernel or an RDMA device to
// read and write. Such memory does not move, the garbage collector does not scan it,
// and a child process does not inherit it.
//
// Memory stays mapped until Unmap. Pages must not be given back to the kernel
// (MADV_DONTNEED) while they are registered: the device would keep the old pages, and
// the process would get new ones.
//
// All functions may be called from any goroutine.
package hostmem

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hugePage is the size of a transparent huge page that madvise helps with on
// the architectures of interest.
const hugePage = 2 << 20

// Map maps length bytes > 0, rounded up to whole pages, zeroed and populated.
// The slice has the rounded length; give exactly it to Unmap. Errors wrap the
// errno, unix.ENOMEM above all.
func Map(length int) ([]byte, error) {
	b, err := Reserve(length)
	if err != nil {
		return nil, err
	}
	if err := Populate(b); err != nil {
		return nil, errors.Join(err, Unmap(b))
	}
	return b, nil
}

// Reserve is like Map, but populates nothing: a page costs memory when it is touched or
// populated. Memory that is only touched has small pages, because a huge one takes long to be
// zeroed. If a huge page fits in, the memory begins with one.
func Reserve(length int) ([]byte, error) {
	if length <= 0 {
		return nil, fmt.Errorf("map %d bytes: %w", length, unix.EINVAL)
	}
	page := os.Getpagesize()
	size := (length + page - 1) / page * page
	b, err := reserve(size)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	if size >= hugePage {
		// Only a hint, and EINVAL on a kernel without transparent huge pages.
		_ = unix.Madvise(b, unix.MADV_NOHUGEPAGE)
	}
	// After a fork, copy-on-write could leave the parent with the copy and the
	// device with the original page.
	if err := unix.Madvise(b, unix.MADV_DONTFORK); err != nil {
		return nil, errors.Join(fmt.Errorf("keep %d bytes from children: %w", size, err), Unmap(b))
	}
	return b, nil
}

// reserve maps whole pages. Linux before 6.7 does not align large mappings itself.
func reserve(size int) ([]byte, error) {
	extra := 0
	if size >= hugePage {
		extra = hugePage
	}
	at, err := unix.MmapPtr(-1, 0, nil, uintptr(size+extra), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	if extra == 0 {
		return unsafe.Slice((*byte)(at), size), nil
	}
	before := -int(uintptr(at)) & (hugePage - 1)
	var errs []error
	if before > 0 {
		errs = append(errs, unix.MunmapPtr(at, uintptr(before)))
	}
	errs = append(errs, unix.MunmapPtr(unsafe.Add(at, before+size), uintptr(extra-before)))
	return unsafe.Slice((*byte)(unsafe.Add(at, before)), size), errors.Join(errs...)
}

// Populate gets the pages of a part of what Reserve returned, which begins and ends with a
// page, so that no fault comes on the data path. They are huge pages as far as these fit in. What
// is in them stays, and others may use them meanwhile.
func Populate(b []byte) error {
	if len(b) >= hugePage {
		// Only a hint, as in Reserve. What was touched has small pages, whose place a huge page
		// takes; Linux before 6.1 does not know that.
		if unix.Madvise(b, unix.MADV_HUGEPAGE) == nil && touched(b) {
			_ = unix.Madvise(b, unix.MADV_COLLAPSE)
		}
	}
	err := unix.Madvise(b, unix.MADV_POPULATE_WRITE)
	if errors.Is(err, unix.EINVAL) { // Linux before 5.14 does not know it
		for i := 0; i < len(b); i += os.Getpagesize() {
			atomic.AddUint32((*uint32)(unsafe.Pointer(&b[i])), 0)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("populate %d bytes: %w", len(b), err)
	}
	return nil
}

// touched reports whether some page of b is in memory.
func touched(b []byte) bool {
	resident := make([]byte, (len(b)+os.Getpagesize()-1)/os.Getpagesize())
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(unsafe.Pointer(&resident[0])))
	return errno == 0 && slices.Contains(resident, 1)
}

// Unmap gives back what Map returned. Nobody may touch it any more, and no
// device may have it registered.
func Unmap(b []byte) error {
	if err := unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(b)), uintptr(len(b))); err != nil {
		return fmt.Errorf("unmap %d bytes: %w", len(b), err)
	}
	return nil
}

// Addr is the address of the first byte.
func Addr(b []byte) uint64 {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
}

const hugetlbfsMagic = 0x958458f6

// FilePage is the size of the pages of a file, in bytes: that of huge pages if it has them. A
// mapping of the file begins at a multiple of it, and its length is one.
func FilePage(fd int) int64 {
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) == nil && uint32(fs.Type) == hugetlbfsMagic {
		return fs.Bsize
	}
	return int64(os.Getpagesize())
}
