package initiator

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// opDirect is the operation of a request that has a command of its own.
const opDirect block.Op = 0xFF

// maxReport is the longest reservation report in bytes.
const maxReport = 4096

// direct is the command of such a request. It is sent once: what an association that is lost
// has made of it cannot be known. The lane that has the request sets err.
type direct struct {
	cmd    nvme.Command
	mr     rdma.MR // that the command names; nil: the buffer of the request
	length uint32  // of the data in that buffer
	err    error
	done   chan struct{} // closed when the request has ended
}

// ErrUncertain is the error of a reservation command that was sent and not answered. The
// target may have carried it out; a report tells.
var ErrUncertain = errors.New("the association was lost before the answer, so the command may have been carried out")

// Reserve sends a reservation command on an I/O queue of the namespace and waits for the
// answer: a Reservation Report (data is filled), Register or Acquire (data has two keys) or
// Release (one key). Only dwords 10 and 11 of cmd count beside the opcode.
//
// Errors: *QueryError, ErrNotConnected, ErrUncertain, os.ErrNotExist if the namespace is
// gone, an nvme.Status, or that of ctx; the command goes on without its caller when ctx ends.
// A command that is not answered within Config.IOTimeout ends the association. Any goroutine
// but the loops' may call it. Close waits for such commands.
func (ns *Namespace) Reserve(ctx context.Context, cmd *nvme.Command, data []byte) error {
	if err := checkReservation(cmd, len(data)); err != nil {
		return err
	}
	s := ns.sub
	if err := s.beginReservation(); err != nil {
		return err
	}
	q, err := ns.openReservation()
	if err != nil {
		s.reservations.Done()
		return err
	}
	d := &direct{length: uint32(len(data)), done: make(chan struct{})}
	d.cmd = *bare(cmd)
	d.cmd.SetNSID(ns.id)
	copy(q.Buffer(0), data)
	q.start(d)
	answer := make([]byte, len(data))
	ended := make(chan error, 1)
	go func() {
		defer s.reservations.Done()
		<-d.done
		copy(answer, q.Buffer(0))
		ended <- errors.Join(d.err, q.Close())
	}()
	select {
	case err := <-ended:
		if err == nil && !nvme.IsWrite(cmd) {
			copy(data, answer)
		}
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// openReservation makes a queue for one command, on the first lane.
func (ns *Namespace) openReservation() (*nsQueue, error) {
	q, err := ns.OpenQueue(0, block.QueueConfig{Depth: 1, MaxIO: os.Getpagesize()})
	if err != nil {
		return nil, err
	}
	return q.(*nsQueue), nil
}

// start gives the queue's only request to its lane. Any goroutine but the loops'.
func (q *nsQueue) start(d *direct) {
	err := q.lane.loop.Call(func() {
		r := &q.requests[0]
		r.begin(block.Request{Op: opDirect})
		r.direct, r.troubled = d, true // so that lanes look at it
		q.lane.dispatch(r)
	})
	if err != nil { // the loop has ended and has never had the request
		d.end(err)
	}
}

// end tells the caller.
func (d *direct) end(err error) {
	d.err = err
	close(d.done)
}

// beginReservation counts a reservation command that Close has to wait for.
func (s *Subsystem) beginReservation() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return errClosed
	}
	s.reservations.Add(1)
	return nil
}

// checkReservation reports whether cmd is a reservation command with n bytes of data.
func checkReservation(cmd *nvme.Command, n int) error {
	want := nvme.ReservationKeys
	switch op := cmd.Opcode(); op {
	case nvme.OpReservationReport:
		if uint64(n) != cmd.ReservationReportLength() || n > maxReport {
			return &QueryError{fmt.Sprintf("%d bytes of a reservation report; the command says %d, and there are at most %d", n, cmd.ReservationReportLength(), maxReport)}
		}
		return nil
	case nvme.OpReservationRegister, nvme.OpReservationAcquire:
	case nvme.OpReservationRelease:
		want = nvme.ReservationKeys / 2
	default:
		return &QueryError{fmt.Sprintf("the command is %s; want reservation report, register, acquire or release", op.IOString())}
	}
	if n != want {
		return &QueryError{fmt.Sprintf("%d bytes of keys; want %d", n, want)}
	}
	return nil
}

// admitDirect reports whether a request with a command of its own may be sent. If not, it
// ends: it does not wait for an association.
func (l *lane) admitDirect(r *request) bool {
	switch presence := r.home.ns.presence.Load(); {
	case presence == gone:
		r.direct.err = fmt.Errorf("namespace %d: %w", r.home.ns.id, os.ErrNotExist)
	case r.home.ns.barred(r):
		r.direct.err = errBarred
	case presence != served || l.pick(r) == nil:
		r.direct.err = ErrNotConnected
	default:
		return true
	}
	l.finish(r, uint16(unix.ENOLINK))
	return false
}
