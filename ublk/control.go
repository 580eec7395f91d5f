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

// cancelGrace is the time that a canceled command has to end. A command that waits
// interruptibly in the kernel (START_DEV, DEL_DEV) ends at once.
const cancelGrace = 100 * time.Millisecond

// User data of the control ring. Commands count up from firstCommand.
const (
	pollData = iota // the poll on control.wake
	cancelData
	firstCommand
)

// control issues control commands, one at a time. Any goroutine may call its methods.
// The kernel executes the commands in io-wq threads. A command that hangs there is
// abandoned, and its buffer is lost.
type control struct {
	idle chan struct{} // a lock: holds a token while no command runs; guards what follows
	fd   int           // controlPath
	wake int           // eventfd that ends a wait
	ring *uring.Ring
	buf  []byte // one page, the buffer of all commands
	seq  uint64 // user data of the last command

	polling   bool // the poll on wake is pending
	abandoned bool // an abandoned command may still use buf
}

// openControl opens the control device. The error is ErrNoDriver, ErrPermission or an
// error of the system.
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

// openError classifies an error of opening a device node.
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

// close frees everything. An abandoned command keeps the control device open until it
// ends, and its buffer is never unmapped.
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

// call holds the parameters of a control command.
type call struct {
	cmd  command
	id   uint32 // device number or anyID
	data uint64
	// buf is copied to the kernel before the command and back after it. It is nil
	// if the command has no buffer.
	buf []byte
}

// do executes a command. It returns when the command has ended, or soon after ctx is done.
// An error names the command and wraps the errno, or the cause of ctx, or both if ctx
// ended the command. If it wraps the cause of ctx alone, the command may still take effect.
func (c *control) do(ctx context.Context, k call) error {
	_, err := c.exec(ctx, k)
	return err
}

// exec is do with the result of the command.
func (c *control) exec(ctx context.Context, k call) (int32, error) {
	select {
	case <-c.idle:
		defer func() { c.idle <- struct{}{} }()
	case <-ctx.Done():
		return 0, fmt.Errorf("%v: %w", k.cmd, context.Cause(ctx))
	}
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("%v: %w", k.cmd, context.Cause(ctx))
	}
	res, err := c.run(ctx, k)
	if err != nil {
		return 0, fmt.Errorf("%v: %w", k.cmd, err)
	}
	if errno := unix.Errno(-res); res < 0 && ctx.Err() != nil && (errno == unix.EINTR || errno == unix.ECANCELED) {
		return 0, fmt.Errorf("%v: %w: %w", k.cmd, context.Cause(ctx), errno)
	} else if res < 0 {
		return 0, fmt.Errorf("%v: %w", k.cmd, errno)
	}
	copy(k.buf, c.buf)
	return res, nil
}

// run submits a command and waits for its result.
func (c *control) run(ctx context.Context, k call) (res int32, err error) {
	// A command is canceled when the thread that submitted it ends. A poll completes
	// only on the thread that submitted it, and only if that thread does not hang
	// elsewhere in the kernel.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer c.unpoll()

	if c.abandoned {
		// The abandoned command may still write to the old buffer.
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
	unwanted = 1 // ctx is done, so the command is canceled
	overdue  = 2 // cancelGrace has passed, so the command is abandoned
)

// bound sets phase and interrupts the wait when ctx is done, and again when cancelGrace
// has passed. The caller must call end when the command is over.
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

// wait submits the entries and waits for a completion or an interrupt.
func (c *control) wait() error {
	if !c.polling {
		s := c.ring.SQE()
		s.Opcode, s.FD, s.OpFlags, s.UserData = uring.OpPollAdd, int32(c.wake), unix.POLLIN, pollData
		c.polling = true
	}
	return c.ring.WaitBlocking()
}

// unpoll ends the pending poll on wake.
func (c *control) unpoll() {
	if c.polling {
		c.interrupt()
	}
	for c.polling && c.ring.WaitBlocking() == nil {
		c.result()
	}
}

// result consumes completions up to that of the last command.
func (c *control) result() (res int32, ok bool) {
	for e := c.ring.Next(); e != nil && !ok; e = c.ring.Next() {
		switch e.UserData {
		case pollData:
			var count [8]byte
			_, _ = unix.Read(c.wake, count[:]) // EAGAIN: it is not set
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
	_, _ = unix.Write(c.wake, one[:]) // EAGAIN: it is set
}
