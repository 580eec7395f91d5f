// Package cq is the host side of an NVMe completion queue over RDMA. It has a slab of
// registered 16-byte buffers with a RECV posted for each, and one completion queue of
// verbs. It decodes the messages that arrive into batches of events.
//
// # Flow control
//
// At least as many RECVs are posted as commands can be outstanding, so a controller that
// sends one response to each command always finds a buffer. Poll posts buffers again when it
// has taken the contents of a quarter of the depth, with one call. So there are that many
// more buffers.
//
// # Concurrency
//
// All methods must be called from the one goroutine that owns the queue pair. Poll,
// Arm and Ack do not allocate memory.
package cq

import (
	"errors"
	"fmt"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

const cqeSize = 16

// batch is the number of completions that one call into verbs returns at most.
const batch = 64

// Config configures a Queue.
type Config struct {
	Depth  int  // number of commands that may be outstanding
	Vector int  // completion vector
	Events bool // make a completion channel; without one, the queue can only be polled
}

// Event is one response.
type Event struct {
	Completion     nvme.Completion
	InvalidatedKey uint32 // local key that the controller invalidated
	Invalidated    bool
}

// Queue is a completion queue.
type Queue struct {
	qp   rdma.QP
	cq   rdma.CQ
	mr   rdma.MR
	slab []byte
	addr uint64
	lkey uint32

	depth  int // number of buffers
	spare  int // of them, those that need not be posted
	wcs    []rdma.WC
	wrs    []rdma.RecvWR
	events []Event
}

// New allocates and registers the buffers and makes the verbs completion queue. The
// caller must call Bind and Fill next.
func New(dev rdma.Device, pd rdma.PD, cfg Config) (*Queue, error) {
	if cfg.Depth < 1 {
		return nil, fmt.Errorf("completion queue: depth %d is below 1", cfg.Depth)
	}
	spare := max(1, cfg.Depth/4)
	q := &Queue{
		depth:  cfg.Depth + spare,
		spare:  spare,
		wcs:    make([]rdma.WC, batch),
		wrs:    make([]rdma.RecvWR, 0, cfg.Depth+spare),
		events: make([]Event, 0, batch),
	}
	var err error
	if q.mr, err = pd.AllocMR(q.depth*cqeSize, rdma.AccessLocalWrite); err != nil {
		return nil, fmt.Errorf("register completion buffers: %w", err)
	}
	q.slab, q.addr, q.lkey = q.mr.Bytes(), q.mr.Addr(), q.mr.LKey()
	if q.cq, err = dev.CreateCQ(q.depth+1, cfg.Events, cfg.Vector); err != nil {
		return nil, errors.Join(fmt.Errorf("create completion queue: %w", err), q.mr.Close())
	}
	return q, nil
}

// CQ returns the verbs completion queue, for QPConfig.RecvCQ.
func (q *Queue) CQ() rdma.CQ { return q.cq }

// WorkRequests returns the largest number of posted RECVs, for QPConfig.MaxRecvWR.
func (q *Queue) WorkRequests() int { return q.depth }

// Bind sets the QP of the queue.
func (q *Queue) Bind(qp rdma.QP) { q.qp = qp }

// Fill posts all buffers. Call it once, before the connection is established.
func (q *Queue) Fill() error {
	if q.slab == nil {
		return fmt.Errorf("post receive: %w", rdma.ErrClosed)
	}
	q.wrs = q.wrs[:0]
	for i := range q.depth {
		q.recycle(uint64(i))
	}
	return q.post()
}

// Close frees the resources of New. The QP must be closed before. Otherwise Close returns
// an error and frees nothing. After Close, the methods do nothing, and return
// rdma.ErrClosed if they return an error. A second Close returns nil.
func (q *Queue) Close() error {
	if err := q.cq.Close(); err != nil {
		return err
	}
	q.wrs, q.slab = q.wrs[:0], nil
	return q.mr.Close()
}

func (q *Queue) recycle(buffer uint64) {
	q.wrs = append(q.wrs, rdma.RecvWR{ID: buffer, SGE: rdma.SGE{
		Addr: q.addr + buffer*cqeSize, Length: cqeSize, LKey: q.lkey,
	}})
}

func (q *Queue) post() error {
	_, err := q.qp.PostRecv(q.wrs)
	q.wrs = q.wrs[:0]
	if err != nil {
		return fmt.Errorf("post receive: %w", err)
	}
	return nil
}

// Poll returns the responses that have arrived. It does not block. The events are valid until the next Poll. An error means that the queue pair
// is lost; events that arrived before it may be returned with the error.
func (q *Queue) Poll() ([]Event, error) {
	q.events = q.events[:0]
	if q.slab == nil {
		return nil, fmt.Errorf("poll completions: %w", rdma.ErrClosed)
	}
	n, err := q.cq.Poll(q.wcs)
	if err != nil {
		return nil, fmt.Errorf("poll completions: %w", err)
	}
	for i := range q.wcs[:n] {
		wc := &q.wcs[i]
		switch {
		case wc.Status != rdma.WCSuccess:
			return q.events, fmt.Errorf("receive: %v", wc.Status)
		case wc.ID >= uint64(q.depth):
			return q.events, fmt.Errorf("receive: completion of buffer %d of %d", wc.ID, q.depth)
		case wc.Bytes != cqeSize:
			return q.events, fmt.Errorf("receive: response of %d bytes, want %d", wc.Bytes, cqeSize)
		}
		at := int(wc.ID) * cqeSize
		q.events = append(q.events, Event{
			Completion:     *nvme.CompletionAt(q.slab[at : at+cqeSize]),
			InvalidatedKey: wc.InvalidatedKey,
			Invalidated:    wc.Flags&rdma.WCWithInvalidate != 0,
		})
		q.recycle(wc.ID)
	}
	if len(q.wrs) < q.spare {
		return q.events, nil
	}
	return q.events, q.post()
}

// Arm requests one event on FD at the next response. Call Poll once more after it.
func (q *Queue) Arm() error { return q.cq.Arm() }

// FD returns the descriptor of the events, each of which is one 8-byte read, or -1
// without events.
func (q *Queue) FD() int { return q.cq.FD() }

// Ack acknowledges n events that were read from FD.
func (q *Queue) Ack(n int) { q.cq.Ack(n) }
