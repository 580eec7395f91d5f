package poller

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/uring"
)

// Provided buffers for the reads of all watches. They are given back as soon
// as their completion is seen; when one enter makes more completions, the read
// ends with ENOBUFS and is armed again.
const (
	watchGroup      = 65535
	watchBuffers    = 64
	watchBufferSize = 64

	eventSize = 8 // bytes of an eventfd's count and of struct ib_uverbs_comp_event_desc
)

// watch is the Handler of a watched file: a READ_MULTISHOT, or before
// Linux 6.7 a multishot POLL_ADD with a read(2) for each of its completions.
type watch struct {
	l       *Loop
	fd      int // the owner's, by which it is known
	file    int // a descriptor of our own for the same file: the owner's may become another's
	w       Watcher
	base    uint64
	armed   bool // a command is pending
	plain   bool // tell of readiness, do not read
	closing bool // a cancellation is on its way
	failed  bool
	gone    chan struct{} // closed when nothing refers to fd any more
}

// Watch lets w hear of the events of a file, which is O_NONBLOCK, until Unwatch.
// The loop has a descriptor of its own for it, so that a descriptor that is
// closed before Unwatch, and then leads to another file, does no harm. Loop only.
//
// Errors: EBADF, EINVAL for a file that is not O_NONBLOCK, EEXIST if it is
// watched already, ENOSPC if the loop has more than a thousand handlers, EMFILE,
// ErrStopped.
func (l *Loop) Watch(fd int, w Watcher) error { return l.watch(fd, w, false) }

// WatchReadable is Watch without reading: w hears Event(1) when something has
// come to read, and reads all of it. One event may be for several arrivals.
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

// Unwatch ends a Watch or a WatchReadable. When it returns, every event that was there when it was
// called has been delivered, no other will be, and nothing refers to the file,
// so that its owner may close it. ENOENT says that the file is not watched; on
// a loop that has ended there is nothing to do. Any goroutine but the loop.
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

// cancel starts the end of a watch. It may be called again.
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
	s := a.l.SQE()
	s.FD, s.UserData = int32(a.file), a.base
	if a.l.bufs != nil && !a.plain {
		s.Opcode, s.Flags, s.BufIndex = uring.OpReadMultishot, uring.BufferSelect, watchGroup
	} else {
		s.Opcode, s.Len, s.OpFlags = uring.OpPollAdd, uring.PollAddMulti, uring.PollMask(unix.POLLIN)
	}
	a.armed = true
}

// disarm asks for the last completion of the command; its own is not looked at.
func (a *watch) disarm() {
	s := a.l.SQE()
	s.Opcode, s.Addr = uring.OpAsyncCancel, a.base
}

// Complete is the Handler's.
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

// take delivers what a completion brings. The error, if any, is final.
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
		return nil // to be armed again, unless it was we who cancelled
	default:
		return errno
	}
}

// read delivers what there is to read.
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

// fail ends the reading but not the watch, which is its owner's to end.
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

// end is the end of the watch. The kernel cancels a read before it looks for
// data, so what came last is still to be read.
func (a *watch) end() {
	if !a.failed && !a.plain {
		_ = a.read()
	}
	a.l.watches = slices.DeleteFunc(a.l.watches, func(b *watch) bool { return a == b })
	a.l.release(a.base)
	a.close()
	close(a.gone)
}

func (a *watch) close() { _ = unix.Close(a.file) } // there is nothing to lose
