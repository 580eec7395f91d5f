package initiator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// Data of an admin command travels through one of a few page-sized buffers:
// identify data, and log pages read page by page, are not longer.
const (
	adminBuffers = 8
	adminPage    = 4096
)

// admin runs commands on the admin queue, from any goroutine. One goroutine of
// its own takes the responses.
type admin struct {
	conn    *connection
	mr      rdma.MR
	buffers chan int      // free pages of mr
	timeout time.Duration // of a command
	fail    func(error)   // hears once that the queue is lost
	file    *os.File      // the completion channel, for the runtime's poller
	joined  chan struct{}

	mu    sync.Mutex // guards conn's queues, calls and err
	calls []*adminCall
	err   error // why the queue is lost
	lost  chan struct{}
}

type adminCall struct {
	answer chan nvme.Completion
}

// newAdmin starts the admin queue of a connection that is established. fail
// hears once that the queue is lost.
func newAdmin(conn *connection, pd rdma.PD, timeout time.Duration, fail func(error)) (*admin, error) {
	a := &admin{
		conn: conn, timeout: timeout, fail: fail, buffers: make(chan int, adminBuffers),
		calls: make([]*adminCall, conn.sq.Slots()),
		lost:  make(chan struct{}), joined: make(chan struct{}),
	}
	var err error
	a.mr, err = pd.AllocMR(adminBuffers*adminPage, rdma.AccessLocalWrite|rdma.AccessRemoteRead|rdma.AccessRemoteWrite)
	if err != nil {
		return nil, fmt.Errorf("register admin buffers: %w", err)
	}
	for i := range adminBuffers {
		a.buffers <- i
	}
	fd, err := unix.FcntlInt(uintptr(conn.cq.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("duplicate completion channel: %w", err), a.mr.Close())
	}
	a.file = os.NewFile(uintptr(fd), "completion channel")
	go a.run()
	return a, nil
}

// run takes responses until the queue is lost or closed.
func (a *admin) run() {
	defer close(a.joined)
	event := make([]byte, 8)
	for {
		if err := a.drain(); err != nil {
			a.lose(err)
			a.fail(fmt.Errorf("admin queue: %w", err))
			return
		}
		if _, err := a.file.Read(event); err != nil {
			a.lose(rdma.ErrClosed)
			return
		}
		a.conn.cq.Ack(1)
	}
}

// drain takes responses until there is none and an event is due for the next.
func (a *admin) drain() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for armed := false; ; {
		n, err := a.poll()
		switch {
		case err != nil:
			return err
		case n == 0 && armed:
			return nil
		case n == 0:
			if err := a.conn.cq.Arm(); err != nil {
				return fmt.Errorf("arm completion queue: %w", err)
			}
			armed = true
		}
	}
}

func (a *admin) poll() (int, error) {
	events, err := a.conn.cq.Poll()
	for i := range events {
		cid := events[i].Completion.CID()
		slot, ok := a.conn.sq.Match(cid)
		if !ok {
			return i, fmt.Errorf("response to command id %#x, which is not outstanding", cid)
		}
		a.conn.sq.Answer(slot)
		a.calls[slot].answer <- events[i].Completion
		a.calls[slot] = nil
	}
	return len(events), err
}

func (a *admin) lose(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = err
		close(a.lost)
	}
}

// exec runs a command that the controller must answer within the admin timeout,
// or sooner if ctx ends. in is copied to where the target can read it before, out
// is filled after; at most one of them, at most a page. A status other than success
// is an error of type nvme.Status.
//
// The controller may still execute a command that has run out of time. Nothing can
// be concluded about it and its buffer stays with the target, so the association is
// lost. Only a command that is canceled does not end it: its caller does.
func (a *admin) exec(ctx context.Context, cmd *nvme.Command, in, out []byte) (nvme.Completion, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	c, err := a.transfer(ctx, cmd, in, out)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("%s was not answered: %w", cmd.Opcode().AdminString(), err)
		a.lose(err)
		a.fail(err)
	}
	return c, err
}

// transfer runs a command with its data.
func (a *admin) transfer(ctx context.Context, cmd *nvme.Command, in, out []byte) (nvme.Completion, error) {
	n := max(len(in), len(out))
	if n > 0 {
		select {
		case page := <-a.buffers:
			buf := a.mr.Bytes()[page*adminPage:][:adminPage]
			copy(buf, in)
			cmd.SetKeyedSGL(a.mr.Addr()+uint64(page*adminPage), uint32(n), a.mr.RKey(), false)
			c, err := a.do(ctx, cmd)
			if err == nil || errors.As(err, new(nvme.Status)) {
				copy(out, buf)
				a.buffers <- page
			}
			return c, err
		case <-ctx.Done():
			return nvme.Completion{}, context.Cause(ctx)
		case <-a.lost:
			return nvme.Completion{}, a.lossError()
		}
	}
	return a.do(ctx, cmd)
}

// do runs a command without data, or whose data are where they have to be. The
// controller has until ctx ends.
func (a *admin) do(ctx context.Context, cmd *nvme.Command) (nvme.Completion, error) {
	call := &adminCall{answer: make(chan nvme.Completion, 1)}
	if err := a.start(cmd, call); err != nil {
		return nvme.Completion{}, err
	}
	select {
	case c := <-call.answer:
		if s := c.Status(); !s.OK() {
			return c, s
		}
		return c, nil
	case <-ctx.Done():
		return nvme.Completion{}, context.Cause(ctx)
	case <-a.lost:
		return nvme.Completion{}, a.lossError()
	}
}

func (a *admin) start(cmd *nvme.Command, call *adminCall) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		return a.err
	}
	if a.conn.sq.Scarce() {
		if _, err := a.conn.sq.Reap(make([]uint16, a.conn.sq.Slots())); err != nil {
			return err
		}
	}
	slot, capsule, ok := a.conn.sq.Get()
	if !ok {
		return errors.New("admin queue is full")
	}
	*capsule = *cmd
	a.calls[slot] = call
	a.conn.sq.Push(slot, rdma.SGE{})
	_, err := a.conn.sq.Flush()
	return err
}

func (a *admin) lossError() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// getProperty and setProperty access a property of 4 or 8 bytes.
func (a *admin) getProperty(ctx context.Context, offset uint32, wide bool) (uint64, error) {
	var cmd nvme.Command
	cmd.SetPropertyGet(offset, wide)
	c, err := a.exec(ctx, &cmd, nil, nil)
	return c.Result(), err
}

func (a *admin) setProperty(ctx context.Context, offset uint32, value uint64) error {
	var cmd nvme.Command
	cmd.SetPropertySet(offset, value, false)
	_, err := a.exec(ctx, &cmd, nil, nil)
	return err
}

func (a *admin) identify(ctx context.Context, cns uint8, nsid uint32, out *[adminPage]byte) error {
	var cmd nvme.Command
	cmd.SetIdentify(cns, nsid, 0)
	_, err := a.exec(ctx, &cmd, nil, out[:])
	return err
}

func (a *admin) setFeature(ctx context.Context, fid uint8, value uint32) (uint32, error) {
	var cmd nvme.Command
	cmd.SetSetFeatures(fid, value)
	c, err := a.exec(ctx, &cmd, nil, nil)
	return c.DW0(), err
}

// close ends the admin queue and its connection.
func (a *admin) close() error {
	a.lose(rdma.ErrClosed)
	a.file.Close()
	<-a.joined
	return errors.Join(a.conn.close(), a.mr.Close())
}
