package vhost

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// logPage is the number of bytes of guest memory for a bit of the log.
const logPage = 4096

// dirtyLog is the log of written pages for a migration, one bit for each page of guest
// addresses. The front end reads and clears it at the same time.
type dirtyLog struct {
	raw    []byte
	bits   []uint32
	offset uint64 // of raw in the file
	file   int    // what is mapped, for the next server
}

// mapLog maps a log of size bytes at an offset of a file.
func mapLog(fd int, size, offset uint64) (*dirtyLog, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat the file: %w", err)
	}
	page := uint64(os.Getpagesize())
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, fmt.Errorf("the file is not a memfd or another regular file")
	case size < 4 || size > maxArea || offset > maxArea || offset&(page-1) != 0:
		return nil, fmt.Errorf("size %#x or offset %#x is not possible", size, offset)
	case offset+size > uint64(st.Size):
		return nil, fmt.Errorf("%d bytes from offset %d are beyond the end of the file, which has %d bytes", size, offset, st.Size)
	}
	file, err := duplicate(fd)
	if err != nil {
		return nil, err
	}
	raw, err := unix.Mmap(fd, int64(offset), int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("map %d bytes: %w", size, err), unix.Close(file))
	}
	return &dirtyLog{raw, unsafe.Slice((*uint32)(unsafe.Pointer(&raw[0])), size/4), offset, file}, nil
}

// mark logs a write of n > 0 bytes. It is called after the write. Pages that the log does
// not cover are not logged: the front end says how large it is.
func (l *dirtyLog) mark(guest, n uint64) {
	for page := guest / logPage; page <= (guest+n-1)/logPage; page++ {
		if page/32 >= uint64(len(l.bits)) {
			return
		}
		atomic.OrUint32(&l.bits[page/32], 1<<(page%32))
	}
}

func (l *dirtyLog) unmap() error {
	if err := errors.Join(unix.Munmap(l.raw), unix.Close(l.file)); err != nil {
		return fmt.Errorf("unmap log: %w", err)
	}
	return nil
}
