package target

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// File is a [Store] in a file or on a block device.
type File struct {
	file *os.File
	raw  syscall.RawConn // for system calls, so that they never hit a descriptor that was closed and reused
	path string
}

// FileConfig configures OpenFile.
type FileConfig struct {
	// ReadOnly opens the file for reading only. The namespace must be read-only,
	// too.
	ReadOnly bool
	// Shared allows others to use the file at the same time, if they set Shared,
	// too. Without it, a file can be used by one namespace or by several read-only
	// ones, and a block device must not be in use, for instance by a mount.
	Shared bool
}

// Errors of OpenFile, for errors.Is
var (
	ErrNotStorage = errors.New("not storage; want a block device, or a regular file that holds data (files of the kernel, as in /proc and /sys, do not)")
	ErrInUse      = errors.New("in use by another namespace, target, mount or program")
)

// OpenFile opens an existing regular file or block device. It follows symbolic links.
// The error is ErrNotStorage for anything else and for files that a file system of the
// kernel makes up, such as those in /proc and /sys, and ErrInUse if others use the
// file.
func OpenFile(name string, c FileConfig) (*File, error) {
	mode := os.O_RDWR
	if c.ReadOnly {
		mode = os.O_RDONLY
	}
	// The kind is checked before the file is opened, because opening some files,
	// such as tapes, has an effect.
	info, err := os.Stat(name)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	kind := info.Mode().Type()
	if kind != 0 && kind != fs.ModeDevice || kind == 0 && ofKernel(name) {
		return nil, fmt.Errorf("open store: %s: %w", name, ErrNotStorage)
	}
	if kind == fs.ModeDevice && !c.Shared {
		mode |= os.O_EXCL // claims the block device
	}
	f, err := os.OpenFile(name, mode|unix.O_NONBLOCK, 0) // does not wait if a pipe has replaced the file
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("%s: %w", name, ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	opened := &File{file: f, path: name}
	if opened.raw, err = f.SyscallConn(); err == nil {
		err = opened.claim(info, c)
	}
	if err == nil {
		opened.path, err = filepath.EvalSymlinks(name)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open store: %w", err), f.Close())
	}
	return opened, nil
}

// ofKernel reports whether a path is in a file system that makes up its files, so that
// reads and writes do not just keep data (linux/magic.h).
func ofKernel(path string) bool {
	const configFS = 0x62656570 // fs/configfs/mount.c
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return false // opening the file will fail
	}
	switch uint32(st.Type) {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC,
		unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.BPF_FS_MAGIC, unix.SELINUX_MAGIC, unix.SMACK_MAGIC,
		unix.PSTOREFS_MAGIC, unix.EFIVARFS_MAGIC, unix.BINFMTFS_MAGIC, unix.NSFS_MAGIC, unix.RDTGROUP_SUPER_MAGIC, configFS:
		return true
	}
	return false
}

// claim checks that the open file is the one that looked describes, and locks a regular
// file. It returns ErrInUse if others use the file, unless all have said that it is
// shared.
func (f *File) claim(looked fs.FileInfo, c FileConfig) error {
	info, err := f.file.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(looked, info) || info.Mode().Type() != looked.Mode().Type() {
		return fmt.Errorf("%s: %w", f.path, ErrNotStorage)
	}
	if info.Mode().Type() == fs.ModeDevice {
		return nil
	}
	how := unix.LOCK_EX
	if c.Shared || c.ReadOnly {
		how = unix.LOCK_SH
	}
	err = f.control(func(fd int) error { return unix.Flock(fd, how|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%s: %w", f.path, ErrInUse)
	}
	return nil // the file system may have no locks
}

// control calls op with the descriptor, which is not closed meanwhile. It calls op
// again if a signal interrupted it.
func (f *File) control(op func(fd int) error) error {
	var err error
	if cerr := f.raw.Control(func(fd uintptr) {
		for err = unix.EINTR; errors.Is(err, unix.EINTR); {
			err = op(int(fd))
		}
	}); cerr != nil {
		return cerr
	}
	return err
}

// Path returns the path of the file, without symbolic links.
func (f *File) Path() string { return f.path }

// Device reports whether the file is a block device. The size of a block device cannot
// be changed.
func (f *File) Device() bool {
	info, err := f.file.Stat()
	return err == nil && info.Mode().Type() == fs.ModeDevice
}

// Resize changes the size of a regular file to size bytes. The added part reads as
// zeroes.
func (f *File) Resize(size int64) error {
	if err := f.file.Truncate(size); err != nil {
		return fmt.Errorf("resize store: %w", err)
	}
	return nil
}

// Close closes the file. No namespace may use it any more.
func (f *File) Close() error { return f.file.Close() }

// Size implements [Store]. It returns 0 if the size cannot be determined.
func (f *File) Size() int64 {
	size, err := f.file.Seek(0, io.SeekEnd) // the inode of a block device has no size
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
	return os.NewSyscallError("fdatasync", f.control(unix.Fdatasync))
}

// Discard implements [Store]. It punches a hole, or writes zeroes if the file system or
// the device cannot do that.
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
		return nil // fallocate refuses a length of 0
	}
	err := f.control(func(fd int) error { return unix.Fallocate(fd, mode, off, length) })
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
