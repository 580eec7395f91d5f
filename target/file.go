package target

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// File is a [Store] in a file or on a block device.
type File struct{ file *os.File }

// OpenFile opens an existing file or block device, for reading only if
// readOnly; the namespace has to be read-only then too.
func OpenFile(name string, readOnly bool) (*File, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(name, mode, 0)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	return &File{f}, nil
}

// Close closes the file. No namespace may use it.
func (f *File) Close() error { return f.file.Close() }

// Size implements [Store]; 0 when it cannot be found out.
func (f *File) Size() int64 {
	size, err := f.file.Seek(0, io.SeekEnd) // a device has no size in its inode
	if err != nil {
		return 0
	}
	return size
}

// ReadAt implements [Store].
func (f *File) ReadAt(p []byte, off int64) (int, error) { return f.file.ReadAt(p, off) }

// WriteAt implements [Store].
func (f *File) WriteAt(p []byte, off int64) (int, error) { return f.file.WriteAt(p, off) }

// Flush implements [Store].
func (f *File) Flush() error {
	return os.NewSyscallError("fdatasync", unix.Fdatasync(int(f.file.Fd())))
}

// Discard implements [Store]. It punches a hole, and writes zeroes where the
// file system or device cannot.
func (f *File) Discard(off, length int64) error {
	return f.zero(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
}

// WriteZeroes implements [Store].
func (f *File) WriteZeroes(off, length int64) error {
	return f.zero(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, length)
}

var zeroes [64 << 10]byte

func (f *File) zero(mode uint32, off, length int64) error {
	if length == 0 {
		return nil // which fallocate refuses
	}
	err := error(unix.EINTR)
	for errors.Is(err, unix.EINTR) {
		err = unix.Fallocate(int(f.file.Fd()), mode, off, length)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS),
		errors.Is(err, unix.EINVAL): // blocks of the device are larger
	default:
		return os.NewSyscallError("fallocate", err)
	}
	for length > 0 {
		n := min(length, int64(len(zeroes)))
		if _, err := f.file.WriteAt(zeroes[:n], off); err != nil {
			return err
		}
		off += n
		length -= n
	}
	return nil
}
