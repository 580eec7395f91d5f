package target

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/nvme"
)

// Store holds the data of a namespace. Offsets and lengths are in bytes; they are
// whole blocks within the size of the namespace. Several queues call the methods at
// the same time, and each call blocks its queue. ReadAt and WriteAt get registered
// memory and must not keep it.
//
// An error determines the status of the command: the [nvme.Status] that it wraps;
// otherwise "capacity exceeded" for ENOSPC and "internal error" for all others, both
// with "do not retry".
type Store interface {
	io.ReaderAt
	io.WriterAt
	// Flush makes all written data durable.
	Flush() error
	// Discard gives up the data of a range, which then reads as zeroes.
	Discard(off, length int64) error
	// WriteZeroes makes a range read as zeroes.
	WriteZeroes(off, length int64) error
	// Size returns the capacity in bytes. See [Namespace.Revalidate] for changes.
	Size() int64
}

// storeStatus returns the status of a command whose store returned err.
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

var errBeyondEnd = fmt.Errorf("beyond the end of the store: %w", nvme.StatusLBAOutOfRange|nvme.StatusDNR)
