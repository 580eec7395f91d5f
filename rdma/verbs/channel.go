//go:build linux && cgo && !noverbs

package verbs

// #include "shim.h"
import "C"

import (
	"fmt"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// waiter waits for a library's event descriptor in Go's network poller. It has a
// duplicate of the descriptor, because the library closes its own.
type waiter struct {
	file   *os.File
	raw    syscall.RawConn
	closed atomic.Bool
}

func newWaiter(fd C.int, name string) (*waiter, error) {
	if err := unix.SetNonblock(int(fd), true); err != nil {
		return nil, fmt.Errorf("%s: set non-blocking: %w", name, err)
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: duplicate: %w", name, err)
	}
	file := os.NewFile(uintptr(dup), name)
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return &waiter{file: file, raw: raw}, nil
}

// next calls get, which returns an errno, until the errno is not EAGAIN. It sleeps in
// between. After close it returns os.ErrClosed.
func (w *waiter) next(get func() C.int) error {
	var got C.int
	err := w.raw.Read(func(uintptr) bool {
		got = get()
		return unix.Errno(got) != unix.EAGAIN
	})
	switch {
	case w.closed.Load():
		return os.ErrClosed
	case err == nil && got != 0:
		return unix.Errno(got)
	}
	return err
}

// close makes the current and all later calls of next return.
func (w *waiter) close() error {
	w.closed.Store(true)
	return w.file.Close()
}

// cmEvent is an event of the connection manager.
type cmEvent struct {
	id      *C.struct_rdma_cm_id // for a connect request, the new ID
	kind    uint32               // enum rdma_cm_event_type
	status  int
	private []byte
}

// String returns the library's name of the event.
func (e cmEvent) String() string {
	return C.GoString(C.rdma_event_str(e.kind))
}

// err returns the error of a step that the event has ended, or nil for success.
func (e cmEvent) err() error {
	switch {
	case e.status < 0:
		return fmt.Errorf("%s: %w", e, unix.Errno(-e.status))
	case e.status > 0:
		return fmt.Errorf("%s: status %d", e, e.status)
	}
	return nil
}

// channel is an event channel of the connection manager.
type channel struct {
	c *C.struct_rdma_event_channel
	w *waiter
}

func newChannel() (*channel, error) {
	c, err := C.rdma_create_event_channel()
	if c == nil {
		return nil, missing("open rdma_cm", err)
	}
	w, err := newWaiter(c.fd, "rdma_cm")
	if err != nil {
		C.rdma_destroy_event_channel(c)
		return nil, err
	}
	return &channel{c: c, w: w}, nil
}

// next waits for an event. The event is already acknowledged, so that destroying the ID
// never waits for this process.
func (ch *channel) next() (cmEvent, error) {
	var ev C.struct_cm_event
	if err := ch.w.next(func() C.int { return C.next_cm_event(ch.c, &ev) }); err != nil {
		return cmEvent{}, fmt.Errorf("read rdma_cm event: %w", err)
	}
	got := cmEvent{id: ev.id, kind: uint32(ev._type), status: int(ev.status)}
	for _, b := range ev.private_data[:ev.private_len] {
		got.private = append(got.private, byte(b))
	}
	return got, nil
}

// destroy frees the channel. Its waiter must have been closed and its IDs destroyed.
func (ch *channel) destroy() { C.rdma_destroy_event_channel(ch.c) }
