package initiator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// The data of an admin command passes through one of a few buffers. Most commands have at
// most a page. The buffers have room for the ANA log of Linux' target (1024 namespaces in 128
// groups), because that target cannot return a log page from the middle, although it says so.
const (
	adminBuffers = 8
	adminBuffer  = 16 << 10
	adminPage    = 4096
)

// admin runs commands on the admin queue. Its methods may be called from any goroutine. A
// goroutine of its own handles the responses.
type admin struct {
	conn    *connection
	pd      rdma.PD
	mr      rdma.MR
	buffers chan int     // free buffers of mr
	timeout atomic.Int64 // limit for one command, in nanoseconds
	fail    func(error)  // called once, when the queue is lost
	file    *os.File     // the completion channel, for the runtime's poller
	joined  chan struct{}

	mu    sync.Mutex // guards conn's queues, calls, stray and err
	calls []*adminCall
	stray []rdma.MR // of commands of transferLarge whose end is unknown
	err   error     // why the queue is lost
	lost  chan struct{}
	users sync.WaitGroup // of mr; no one is added once the queue is lost
}

type adminCall struct {
	answer chan nvme.Completion
}

// newAdmin starts the admin queue of an established connection. It calls fail once, when
// the queue is lost.
func newAdmin(conn *connection, pd rdma.PD, timeout time.Duration, fail func(error)) (*admin, error) {
	a := &admin{
		conn: conn, pd: pd, fail: fail, buffers: make(chan int, adminBuffers),
		calls: make([]*adminCall, conn.sq.Slots()),
		lost:  make(chan struct{}), joined: make(chan struct{}),
	}
	a.setTimeout(timeout)
	var err error
	a.mr, err = pd.AllocMR(adminBuffers*adminBuffer, rdma.AccessLocalWrite|rdma.AccessRemoteRead|rdma.AccessRemoteWrite)
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

// setTimeout sets the time limit of the commands from now on. Any goroutine may call it.
func (a *admin) setTimeout(d time.Duration) { a.timeout.Store(int64(d)) }

// run handles responses until the queue is lost or closed.
func (a *admin) run() {
	defer close(a.joined)
	event := make([]byte, 8)
	for {
		if err := a.drain(); err != nil {
			a.lose(err)
			a.fail(because(LossQueuePair, fmt.Errorf("admin queue: %w", err)))
			return
		}
		if _, err := a.file.Read(event); err != nil {
			a.lose(rdma.ErrClosed)
			return
		}
		a.conn.cq.Ack(1)
	}
}

// drain handles responses until there are none and the next one causes an event.
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
			return i, because(LossProtocol, fmt.Errorf("response to command id %#x, which is not outstanding", cid))
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

// exec runs a command. The controller must answer within the admin timeout, and before
// ctx is done. in is copied to the buffer that the target reads, and out is filled from
// it after the command. At most one of them may be given. A status
// other than success is an error of type nvme.Status.
//
// If a command times out, the controller may still execute it, so its effect is unknown
// and its buffer cannot be used again. The association is therefore lost. A command that
// the caller cancels has no such effect, because the caller ends the association.
func (a *admin) exec(ctx context.Context, cmd *nvme.Command, in, out []byte) (nvme.Completion, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(a.timeout.Load()))
	defer cancel()
	c, err := a.transfer(ctx, cmd, in, out)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		reason := LossCommandTimeout
		if cmd.Opcode() == nvme.AdminKeepAlive {
			reason = LossKeepAlive
		}
		err = because(reason, fmt.Errorf("%s was not answered: %w", commandName(cmd), err))
		a.lose(err)
		a.fail(err)
	}
	return c, err
}

// commandName is the name of an admin command.
func commandName(cmd *nvme.Command) string {
	if cmd.Opcode() == nvme.OpFabrics {
		return cmd.FCType().String()
	}
	return cmd.Opcode().AdminString()
}

// transfer runs a command with its data.
func (a *admin) transfer(ctx context.Context, cmd *nvme.Command, in, out []byte) (nvme.Completion, error) {
	n := max(len(in), len(out))
	if n > adminBuffer {
		return a.transferLarge(ctx, cmd, out)
	}
	if n > 0 {
		if err := a.use(); err != nil {
			return nvme.Completion{}, err
		}
		defer a.users.Done()
		select {
		case b := <-a.buffers:
			buf := a.mr.Bytes()[b*adminBuffer:][:adminBuffer]
			clear(buf[:n]) // the controller may fill less of it
			copy(buf, in)
			cmd.SetKeyedSGL(a.mr.Addr()+uint64(b*adminBuffer), uint32(n), a.mr.RKey(), false)
			c, err := a.do(ctx, cmd)
			if err == nil || errors.As(err, new(nvme.Status)) {
				copy(out, buf)
				a.buffers <- b
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

// transferLarge runs a command whose data is larger than a buffer, in memory of its own.
func (a *admin) transferLarge(ctx context.Context, cmd *nvme.Command, out []byte) (nvme.Completion, error) {
	if err := a.use(); err != nil {
		return nvme.Completion{}, err
	}
	defer a.users.Done()
	mr, err := a.pd.AllocMR(len(out), rdma.AccessLocalWrite|rdma.AccessRemoteWrite)
	if err != nil {
		return nvme.Completion{}, fmt.Errorf("register memory of %s: %w", cmd.Opcode().AdminString(), err)
	}
	cmd.SetKeyedSGL(mr.Addr(), uint32(len(out)), mr.RKey(), false)
	c, err := a.do(ctx, cmd)
	if err == nil || errors.As(err, new(nvme.Status)) {
		copy(out, mr.Bytes())
		return c, errors.Join(err, mr.Close())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stray = append(a.stray, mr) // the target may still write to it
	return c, err
}

// use keeps the buffers registered until users.Done is called.
func (a *admin) use() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.users.Add(1)
	}
	return a.err
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
		if _, err := a.conn.sq.Reap(); err != nil {
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

// LogRequest says what to read of a log page.
type LogRequest struct {
	Page     uint8  // LID, a Log constant of package nvme
	NSID     uint32 // 0 or nvme.NSIDAll for the controller
	Offset   uint64 // in bytes, a multiple of 4
	Specific uint8  // log specific parameter (LSP), 7 bits
	Retain   bool   // keep the event that belongs to the page disabled (RAE)
}

// logPage reads a part of a log page with one command.
func (a *admin) logPage(ctx context.Context, r LogRequest, out []byte) error {
	var cmd nvme.Command
	cmd.SetGetLogPage(r.Page, r.NSID, uint32(len(out)), r.Offset, r.Retain)
	cmd.SetLogSpecific(r.Specific)
	_, err := a.exec(ctx, &cmd, nil, out)
	return err
}

// close ends the admin queue and its connection.
func (a *admin) close() error {
	a.lose(rdma.ErrClosed)
	a.file.Close()
	<-a.joined
	a.users.Wait()
	errs := []error{a.conn.close(), a.mr.Close()}
	for _, mr := range a.stray {
		errs = append(errs, mr.Close())
	}
	return errors.Join(errs...)
}
