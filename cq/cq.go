// Package cq is the host side of an NVMe completion queue over RDMA. It has a slab of
// registered 16-byte buffers with a RECV posted for each, and one completion queue of
// verbs. It decodes the messages that arrive into batches of events.
//
// # Flow control
//
// The number of posted RECVs is the number of commands that can be outstanding. Poll
// posts a buffer again as soon as it has taken its contents. So a controller that
// sends one response to each command always finds a buffer.
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

// batch is the number of completions taken per call into verbs.
const batch = 64

// Config sizes a Queue.
type Config struct {
	Depth  int  // number of RECVs, at least the number of commands outstanding
	Vector int  // completion vector
	Events bool // with a completion channel; without, the queue is only polled
}

// Event is one response.
type Event struct {
	Completion     nvme.Completion
	InvalidatedKey uint32 // the key of ours that the controller invalidated
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

	depth  int
	wcs    []rdma.WC
	wrs    []rdma.RecvWR
	events []Event
}

// New allocates and registers the buffers and makes the verbs completion
// queue. Bind and Fill come next.
func New(dev rdma.Device, pd rdma.PD, cfg Config) (*Queue, error) {
	if cfg.Depth < 1 {
		return nil, fmt.Errorf("completion queue: depth %d is below 1", cfg.Depth)
	}
	q := &Queue{
		depth:  cfg.Depth,
		wcs:    make([]rdma.WC, batch),
		wrs:    make([]rdma.RecvWR, 0, max(batch, cfg.Depth)),
		events: make([]Event, 0, batch),
	}
	var err error
	if q.mr, err = pd.AllocMR(cfg.Depth*cqeSize, rdma.AccessLocalWrite); err != nil {
		return nil, fmt.Errorf("register completion buffers: %w", err)
	}
	q.slab, q.addr, q.lkey = q.mr.Bytes(), q.mr.Addr(), q.mr.LKey()
	if q.cq, err = dev.CreateCQ(cfg.Depth+1, cfg.Events, cfg.Vector); err != nil {
		return nil, errors.Join(fmt.Errorf("create completion queue: %w", err), q.mr.Close())
	}
	return q, nil
}

// CQ is the completion queue to create the QP with.
func (q *Queue) CQ() rdma.CQ { return q.cq }

// Depth is the number of RECVs: the QP's MaxRecvWR.
func (q *Queue) Depth() int { return q.depth }

// Bind gives the queue its QP.
func (q *Queue) Bind(qp rdma.QP) { q.qp = qp }

// Fill posts every buffer. Once, before the connection is established.
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

// Close frees what New made. The QP is to be closed before; an error says that it was
// not, and nothing is freed then. A second Close does nothing, and so do the other
// methods after it, which give rdma.ErrClosed where they can.
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
	if len(q.wrs) == 0 {
		return nil
	}
	_, err := q.qp.PostRecv(q.wrs)
	q.wrs = q.wrs[:0]
	if err != nil {
		return fmt.Errorf("post receive: %w", err)
	}
	return nil
}

// Poll takes what has arrived, without blocking, and posts the buffers again.
// The events are valid until the next Poll. An error means that the queue pair
// is lost; events that came before it are given all the same.
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
	return q.events, q.post()
}

// Arm asks for one event on FD at the next response. Poll once more after it.
func (q *Queue) Arm() error { return q.cq.Arm() }

// FD gives the events, each one 8-byte read; -1 without.
func (q *Queue) FD() int { return q.cq.FD() }

// Ack accounts for n events read from FD.
func (q *Queue) Ack(n int) { q.cq.Ack(n) }
