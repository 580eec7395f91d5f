package ublk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/internal/uring"
)

// controlPath is the driver's control device.
const controlPath = "/dev/ublk-control"

// cancelGrace is how long a command that was given up may take to notice. What
// waits interruptibly in the kernel (START_DEV, DEL_DEV) ends at once.
const cancelGrace = 100 * time.Millisecond

// User data of the control ring. Commands count up from firstCommand.
const (
	pollData = iota // the poll on control.wake
	cancelData
	firstCommand
)

// control issues control commands, one at a time, from any goroutine. They run
// in the kernel's io-wq threads; a command that hangs there is given up, and
// costs its buffer.
type control struct {
	idle chan struct{} // holds a token while nobody uses what follows
	fd   int           // controlPath
	wake int           // eventfd, ends a wait
	ring *uring.Ring
	buf  []byte // one page that commands name as their buffer
	seq  uint64 // user data of the last command

	polling   bool // the poll on wake is pending
	abandoned bool // a command given up may still use buf
}

// openControl opens the control device. Errors are ErrNoDriver, ErrPermission
// or those of the system.
func openControl() (*control, error) {
	fd, err := unix.Open(controlPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, openError(controlPath, err)
	}
	c := &control{idle: make(chan struct{}, 1), fd: fd, wake: -1, seq: firstCommand}
	c.idle <- struct{}{}
	if err := c.open(); err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

// openError sorts the errors of opening a device node.
func openError(path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("open %s: %w (%w)", path, ErrNoDriver, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("open %s: %w (%w)", path, ErrPermission, err)
	}
	return fmt.Errorf("open %s: %w", path, err)
}

func (c *control) open() error {
	var err error
	if c.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return fmt.Errorf("make eventfd: %w", err)
	}
	if c.buf, err = hostmem.Map(1); err != nil {
		return err
	}
	c.ring, err = uring.New(uring.Config{Entries: 8, SQE128: true})
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: %w", ErrPermission, err)
	case errors.Is(err, errors.ErrUnsupported):
		return fmt.Errorf("%w: %w", ErrNoDriver, err)
	}
	return err
}

// close frees everything. A command that was given up and still runs keeps the
// control device open until it ends; its buffer stays mapped for good.
func (c *control) close() error {
	var errs []error
	if c.ring != nil {
		errs = append(errs, c.ring.Close())
	}
	if c.buf != nil && !c.abandoned {
		errs = append(errs, hostmem.Unmap(c.buf))
	}
	if c.wake >= 0 {
		errs = append(errs, unix.Close(c.wake))
	}
	errs = append(errs, unix.Close(c.fd))
	return errors.Join(errs...)
}

// call is one control command.
type call struct {
	cmd  command
	id   uint32 // device number or anyID
	data uint64
	// buf is the command's buffer: copied to the kernel before, and back
	// after the command. nil if the command has none.
	buf []byte
}

// do carries out a command and returns when it is done or soon after ctx is.
// Errors name the command and wrap the errno, ctx' error, or both, if ctx ended
// the command; with ctx' error alone the command may still have its effect.
func (c *control) do(ctx context.Context, k call) error {
	select {
	case <-c.idle:
		defer func() { c.idle <- struct{}{} }()
	case <-ctx.Done():
		return fmt.Errorf("%v: %w", k.cmd, context.Cause(ctx))
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%v: %w", k.cmd, context.Cause(ctx))
	}
	res, err := c.run(ctx, k)
	if err != nil {
		return fmt.Errorf("%v: %w", k.cmd, err)
	}
	if errno := unix.Errno(-res); res < 0 && ctx.Err() != nil && (errno == unix.EINTR || errno == unix.ECANCELED) {
		return fmt.Errorf("%v: %w: %w", k.cmd, context.Cause(ctx), errno)
	} else if res < 0 {
		return fmt.Errorf("%v: %w", k.cmd, errno)
	}
	copy(k.buf, c.buf)
	return nil
}

// run submits a command and waits for its result.
func (c *control) run(ctx context.Context, k call) (res int32, err error) {
	// A command is cancelled when the thread that submitted it ends, and a poll
	// completes on the thread that submitted it only, not while that is stuck
	// elsewhere in the kernel.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer c.unpoll()

	if c.abandoned {
		// The old buffer cannot be used again, nor be freed.
		if c.buf, err = hostmem.Map(1); err != nil {
			return 0, err
		}
		c.abandoned = false
	}
	copy(c.buf, k.buf)
	c.seq++
	s := c.ring.SQE()
	s.Opcode, s.FD, s.UserData = uring.OpURingCmd, int32(c.fd), c.seq
	s.SetCmdOp(uint32(k.cmd))
	cmd := (*ctrlCmd)(unsafe.Pointer(s.Cmd80()))
	*cmd = ctrlCmd{devID: k.id, queueID: noQueue, data: k.data}
	if k.buf != nil {
		cmd.addr, cmd.len = hostmem.Addr(c.buf), uint16(len(k.buf))
	}

	var phase atomic.Int32
	defer c.bound(ctx, &phase)()
	cancelled := false
	for {
		if err := c.wait(); err != nil {
			c.abandoned = true
			return 0, err
		}
		if res, ok := c.result(); ok {
			return res, nil
		}
		switch p := phase.Load(); {
		case p == overdue:
			c.abandoned = true
			return 0, context.Cause(ctx)
		case p == unwanted && !cancelled:
			cancelled = true
			s := c.ring.SQE()
			s.Opcode, s.Addr, s.UserData = uring.OpAsyncCancel, c.seq, cancelData
		}
	}
}

// Phases of a command that outlives its context.
const (
	unwanted = 1 // ctx is done: cancel it
	overdue  = 2 // the grace has passed: leave it
)

// bound tells and interrupts the wait when ctx is done, and again when the
// grace has passed. The function that it returns ends that.
func (c *control) bound(ctx context.Context, phase *atomic.Int32) (end func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-ctx.Done():
		case <-quit:
			return
		}
		phase.Store(unwanted)
		c.interrupt()
		select {
		case <-time.After(cancelGrace):
			phase.Store(overdue)
			c.interrupt()
		case <-quit:
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

// wait submits and waits for a completion or an interrupt.
func (c *control) wait() error {
	if !c.polling {
		s := c.ring.SQE()
		s.Opcode, s.FD, s.OpFlags, s.UserData = uring.OpPollAdd, int32(c.wake), unix.POLLIN, pollData
		c.polling = true
	}
	return c.ring.WaitBlocking()
}

// unpoll ends the poll on wake.
func (c *control) unpoll() {
	if c.polling {
		c.interrupt()
	}
	for c.polling && c.ring.WaitBlocking() == nil {
		c.result()
	}
}

// result consumes completions until that of the last command.
func (c *control) result() (res int32, ok bool) {
	for e := c.ring.Next(); e != nil && !ok; e = c.ring.Next() {
		switch e.UserData {
		case pollData:
			var count [8]byte
			_, _ = unix.Read(c.wake, count[:]) // EAGAIN: nothing to reset
			c.polling = false
		case c.seq:
			res, ok = e.Res, true
		}
		c.ring.Seen()
	}
	return res, ok
}

// interrupt ends a wait. Any goroutine may call it.
func (c *control) interrupt() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(c.wake, one[:]) // EAGAIN: it is set already
}
