package poller

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/uring"
)

// Provided buffers for the reads of all watches. A buffer is returned as soon as its
// completion is seen. If one enter produces more completions, the read ends with ENOBUFS
// and is armed again.
const (
	watchGroup      = 65535
	watchBuffers    = 64
	watchBufferSize = 64

	eventSize = 8 // size of the count of an eventfd and of struct ib_uverbs_comp_event_desc
)

// watch is the Handler of a watched file. It uses a READ_MULTISHOT, or, before Linux 6.7,
// a multishot POLL_ADD with a read(2) for each of its completions.
type watch struct {
	l       *Loop
	fd      int // descriptor of the owner, which identifies the watch
	file    int // our own descriptor for the same file, because the owner's number may be used again
	w       Watcher
	base    uint64
	armed   bool // a command is pending
	plain   bool // report readiness, do not read
	closing bool // a cancellation is in progress
	failed  bool
	gone    chan struct{} // closed when the watch does not use the file any more
}

// Watch passes the events of a file to w until Unwatch. The file must be O_NONBLOCK. The
// loop uses its own descriptor for the file. So it does no harm if fd is closed before
// Unwatch and then names another file. Only the loop may call it.
//
// Errors: EBADF, EINVAL for a file that is not O_NONBLOCK, EEXIST if it is watched
// already, ENOSPC if the loop has more than a thousand handlers, EMFILE, ErrStopped.
func (l *Loop) Watch(fd int, w Watcher) error { return l.watch(fd, w, false) }

// WatchReadable is like Watch, but does not read. The loop calls w.Event(1) when the file
// has become readable, and w must read everything. One event may stand for several
// arrivals.
func (l *Loop) WatchReadable(fd int, w Watcher) error { return l.watch(fd, w, true) }

func (l *Loop) watch(fd int, w Watcher, plain bool) error {
	if l.hasEnded() {
		return fmt.Errorf("watch file %d: %w", fd, ErrStopped)
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	switch {
	case err != nil:
		return fmt.Errorf("watch file %d: %w", fd, err)
	case flags&unix.O_NONBLOCK == 0:
		return fmt.Errorf("watch file %d: not O_NONBLOCK: %w", fd, unix.EINVAL)
	case l.watched(fd) != nil:
		return fmt.Errorf("watch file %d: %w", fd, unix.EEXIST)
	}
	file, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("watch file %d: %w", fd, err)
	}
	a := &watch{l: l, fd: fd, file: file, w: w, plain: plain, gone: make(chan struct{})}
	base, ok := l.slot(a)
	if !ok {
		a.close()
		return fmt.Errorf("watch file %d: %w", fd, unix.ENOSPC)
	}
	a.base = base
	l.watches = append(l.watches, a)
	a.arm()
	return nil
}

// Unwatch ends a Watch or a WatchReadable. When it returns, all events that had occurred
// before the call were delivered, no other will be, and the loop does not use the file
// any more, so its owner may close it. The error is ENOENT if the file is not watched. On
// a loop that has ended, Unwatch does nothing and returns nil. Any goroutine except the
// loop may call it.
func (l *Loop) Unwatch(fd int) error {
	var a *watch
	err := l.Call(func() {
		if a = l.watched(fd); a != nil {
			l.cancel(a)
		}
	})
	switch {
	case errors.Is(err, ErrStopped):
		return nil
	case a == nil:
		return fmt.Errorf("unwatch file %d: %w", fd, unix.ENOENT)
	}
	select {
	case <-a.gone:
	case <-l.done:
	}
	return nil
}

func (l *Loop) watched(fd int) *watch {
	for _, a := range l.watches {
		if a.fd == fd {
			return a
		}
	}
	return nil
}

// cancel begins to end a watch. It may be called again.
func (l *Loop) cancel(a *watch) {
	if a.closing {
		return
	}
	a.closing = true
	if a.armed {
		a.disarm()
	} else {
		a.end()
	}
}

func (a *watch) arm() {
	s := a.l.sqe()
	s.FD, s.UserData = int32(a.file), a.base
	if a.l.bufs != nil && !a.plain {
		s.Opcode, s.Flags, s.BufIndex = uring.OpReadMultishot, uring.BufferSelect, watchGroup
	} else {
		s.Opcode, s.Len, s.OpFlags = uring.OpPollAdd, uring.PollAddMulti, uring.PollMask(unix.POLLIN)
	}
	a.armed = true
}

// disarm requests the last completion of the command. The completion of the cancellation
// itself is ignored.
func (a *watch) disarm() {
	s := a.l.sqe()
	s.Opcode, s.Addr = uring.OpAsyncCancel, a.base
}

// Complete implements Handler.
func (a *watch) Complete(_ uint64, res int32, flags uint32) {
	a.armed = flags&uring.CQEMore != 0
	err := a.take(res, flags)
	switch {
	case a.closing:
		if !a.armed {
			a.end()
		}
	case err != nil && !a.failed:
		a.fail(err)
	case !a.armed && !a.failed:
		a.arm()
	}
}

// take delivers the events of a completion. An error is final.
func (a *watch) take(res int32, flags uint32) error {
	if flags&uring.CQEBuffer != 0 {
		a.l.bufs.Recycle(uring.BufID(flags))
	}
	switch errno := unix.Errno(-res); {
	case res > 0 && a.plain:
		a.w.Event(1)
		return nil
	case res > 0 && a.l.bufs == nil:
		return a.read()
	case res > 0:
		a.w.Event(int(res) / eventSize)
		return nil
	case res == 0:
		return io.EOF
	case errno == unix.ENOBUFS, errno == unix.ENOMEM, errno == unix.EAGAIN, errno == unix.EINTR, errno == unix.ECANCELED:
		return nil // arm it again, unless the loop itself canceled it
	default:
		return errno
	}
}

// read reads and delivers all events.
func (a *watch) read() error {
	for {
		n, err := unix.Read(a.file, a.l.readBuf[:])
		switch {
		case n > 0:
			a.w.Event(n / eventSize)
		case err == nil:
			return io.EOF
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return nil
		default:
			return err
		}
	}
}

// fail stops reading the file. The watch remains until its owner ends it.
func (a *watch) fail(err error) {
	a.failed = true
	a.l.stats.WatchFailures++
	if a.armed {
		a.disarm()
	}
	if f, ok := a.w.(Failer); ok {
		f.Failed(fmt.Errorf("read file %d: %w", a.fd, err))
	}
}

// end ends the watch. The kernel cancels a read before it looks for data, so the last
// events must still be read.
func (a *watch) end() {
	if !a.failed && !a.plain {
		_ = a.read()
	}
	a.l.watches = slices.DeleteFunc(a.l.watches, func(b *watch) bool { return a == b })
	a.l.release(a.base)
	a.close()
	close(a.gone)
}

func (a *watch) close() { _ = unix.Close(a.file) } // nothing can be lost
