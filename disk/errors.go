package disk

import (
	"fmt"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
)

// Error is a request that the device has failed.
type Error struct {
	Op             block.Op
	Offset, Length int64       // of the request, in bytes
	Errno          unix.Errno  // as of a block device of Linux
	Status         nvme.Status // what the target said; 0: the request did not get that far
}

func (e *Error) Error() string {
	text := fmt.Sprintf("%v %d bytes at %d: %v", e.Op, e.Length, e.Offset, e.Errno)
	if e.Status != 0 {
		text += " (" + e.Status.Error() + ")"
	}
	return text
}

// Unwrap returns the errno and, if there is one, the nvme.Status, for errors.Is and errors.As.
func (e *Error) Unwrap() []error {
	if e.Status == 0 {
		return []error{e.Errno}
	}
	return []error{e.Errno, e.Status}
}

func (s *slot) err() error {
	return &Error{
		Op: s.req.Op, Offset: int64(s.req.Sector << block.SectorShift), Length: int64(s.req.Sectors) << block.SectorShift,
		Errno: unix.Errno(s.errno), Status: nvme.Status(s.status),
	}
}

// beyond is the error of a change beyond the end of the disk.
func beyond(op block.Op, off, length int64) error {
	return &Error{Op: op, Offset: off, Length: length, Errno: unix.ENOSPC}
}

// AlignmentError is a range that does not consist of logical blocks. errors.Is reports EINVAL.
type AlignmentError struct {
	Op             block.Op
	Offset, Length int64 // bytes
	BlockSize      int   // bytes
}

func (e *AlignmentError) Error() string {
	if e.Offset < 0 || e.Length < 0 {
		return fmt.Sprintf("%v %d bytes at %d: negative", e.Op, e.Length, e.Offset)
	}
	return fmt.Sprintf("%v %d bytes at %d: not whole blocks of %d bytes", e.Op, e.Length, e.Offset, e.BlockSize)
}

// Unwrap returns EINVAL.
func (*AlignmentError) Unwrap() error { return unix.EINVAL }
