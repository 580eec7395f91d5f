package initiator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"ublk-nvmeof/cq"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/sq"
)

// connection is an RDMA connection with the NVMe queues on it, of the admin queue or of
// an I/O queue.
type connection struct {
	qid uint16
	id  rdma.ID
	qp  rdma.QP
	sq  *sq.Queue
	cq  *cq.Queue
}

// queueParam holds the parameters of a connection.
type queueParam struct {
	remote netip.AddrPort
	qid    uint16
	depth  int
	cntlid uint16 // for I/O queues
	events bool   // the queue has a completion channel
	vector int
	// descriptors is how many the data of a command may have. Lists are for more than one.
	descriptors int
}

// dial resolves the target and makes the queues and the QP. It sends nothing to the
// target yet.
func (c *Controller) dial(ctx context.Context, p queueParam) (_ *connection, err error) {
	tos := -1
	if c.cfg.TOS != 0 {
		tos = int(c.cfg.TOS)
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.ConnectTimeout)
	defer cancel()
	conn := &connection{qid: p.qid}
	defer func() {
		if err != nil {
			err = errors.Join(err, conn.close())
		}
	}()
	if conn.id, err = c.cfg.Provider.Resolve(ctx, c.cfg.Source, p.remote, tos); err != nil {
		return nil, err
	}
	// The admin queue is the first connection of an association.
	dev := conn.id.Device()
	if err = c.mem.use(dev, p.qid == 0); err != nil {
		return nil, err
	}
	pd := c.mem.current()
	list := p.descriptors
	if list == 1 {
		list = 0
	}
	if conn.sq, err = sq.New(dev, pd, sq.Config{Depth: p.depth, Vector: p.vector, Descriptors: list}); err != nil {
		return nil, err
	}
	if conn.cq, err = cq.New(dev, pd, cq.Config{Depth: p.depth, Vector: p.vector, Events: p.events}); err != nil {
		return nil, err
	}
	sge := 2
	if p.qid == 0 {
		sge = 1
	}
	conn.qp, err = conn.id.CreateQP(pd, rdma.QPConfig{
		SendCQ: conn.sq.CQ(), RecvCQ: conn.cq.CQ(),
		MaxSendWR: conn.sq.WorkRequests(), MaxRecvWR: conn.cq.WorkRequests(),
		MaxSendSGE: sge, MaxRecvSGE: 1,
	})
	if err != nil {
		return nil, fmt.Errorf("create queue pair: %w", err)
	}
	conn.sq.Bind(conn.qp)
	conn.cq.Bind(conn.qp)
	return conn, conn.cq.Fill()
}

// establish connects the QP. The private data names the queue.
func (c *Controller) establish(ctx context.Context, conn *connection, p queueParam) error {
	req := nvme.RDMARequest{QID: p.qid, HRQSize: uint16(p.depth), HSQSize: uint16(p.depth - 1), CNTLID: p.cntlid}
	private := req.Marshal()
	ctx, cancel := context.WithTimeout(ctx, c.cfg.ConnectTimeout)
	defer cancel()
	_, err := conn.id.Connect(ctx, rdma.ConnParam{
		PrivateData:        private[:],
		ResponderResources: uint8(min(conn.id.Device().Attr().MaxQPReadAtomic, 255)),
		RetryCount:         7,
		RNRRetryCount:      7,
		FlowControl:        true,
	})
	var rej *rdma.RejectError
	if errors.As(err, &rej) && rej.Reason == rdma.RejectConsumer {
		if r, perr := nvme.ParseRDMAReject(rej.Private); perr == nil {
			return fmt.Errorf("%w: %w", err, r.Status)
		}
	}
	return err
}

// callPauseMin and callPauseMax limit the time between two looks for the answer of a command.
// Each pause is twice as long as the one before.
const (
	callPauseMin = 20 * time.Microsecond
	callPauseMax = time.Millisecond
)

// call runs one command on a connection that nothing else uses yet. Data of the command
// must be named by key.
func (conn *connection) call(ctx context.Context, cmd *nvme.Command) (nvme.Completion, error) {
	slot, capsule, ok := conn.sq.Get()
	if !ok {
		return nvme.Completion{}, errors.New("submission queue is full")
	}
	*capsule = *cmd
	conn.sq.Push(slot, rdma.SGE{})
	if _, err := conn.sq.Flush(); err != nil {
		return nvme.Completion{}, err
	}
	// A queue without a completion channel can only be polled. Most targets answer at once, and
	// each queue of an association waits in its turn.
	pause := callPauseMin
	next := time.NewTimer(pause)
	defer next.Stop()
	for {
		events, err := conn.cq.Poll()
		switch {
		case err != nil:
			return nvme.Completion{}, err
		case len(events) > 1:
			return nvme.Completion{}, fmt.Errorf("%d responses to one command", len(events))
		case len(events) == 1:
			done := events[0].Completion
			if got, ok := conn.sq.Match(done.CID()); !ok || got != slot {
				return nvme.Completion{}, fmt.Errorf("response to command id %#x, which is not outstanding", done.CID())
			}
			conn.sq.Answer(slot)
			return done, nil
		}
		select {
		case <-next.C:
			pause = min(2*pause, callPauseMax)
			next.Reset(pause)
		case ev := <-conn.id.Events():
			return nvme.Completion{}, fmt.Errorf("connection lost: %v", ev.Type)
		case <-ctx.Done():
			return nvme.Completion{}, context.Cause(ctx)
		}
	}
}

// close closes the connection and frees its resources. Until close returns, the target
// may access memory whose key it was given.
func (conn *connection) close() error {
	var errs []error
	if conn.qp != nil {
		// The error state comes first, because the target can still write for a
		// moment after a disconnect alone.
		errs = append(errs, conn.qp.Fail())
	}
	if conn.id != nil {
		errs = append(errs, conn.id.Close())
	}
	if conn.cq != nil {
		errs = append(errs, conn.cq.Close())
	}
	if conn.sq != nil {
		errs = append(errs, conn.sq.Close())
	}
	return errors.Join(errs...)
}
