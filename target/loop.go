package target

import (
	"context"
	"fmt"
	"math"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/spin"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

const pollBatch = 32 // work completions handled between two posts

// The upper half of the id of a work request is its kind. The lower half is the index
// of the receive buffer, or of the completion in its ring.
const (
	kindRecv = uint64(iota+1) << 32
	kindRead // the last RDMA READ of a command
	kindSend // a completion
	kindData // an RDMA WRITE, or a READ with another one behind it; its work completion is seen only if it failed
	kindMask = uint64(math.MaxUint32) << 32
)

// run accepts the connection and serves it until it ends. It returns the reason for
// the end.
func (q *queuePair) run() error {
	defer q.cancel()
	accept := nvme.RDMAAccept{CRQSize: uint16(q.depth)}.Marshal()
	ctx, cancel := context.WithTimeout(q.ctx, q.target.cfg.ConnectTimeout)
	defer cancel()
	err := q.id.Accept(ctx, rdma.ConnParam{PrivateData: accept[:], InitiatorDepth: readDepth, RetryCount: 7, RNRRetryCount: 7, FlowControl: true})
	if err != nil {
		return err
	}
	handshake := time.AfterFunc(q.target.cfg.ConnectTimeout, q.expire)
	defer handshake.Stop()
	defer func() {
		if q.authTimer != nil {
			q.authTimer.Stop()
		}
	}()
	q.target.running.Go(q.watch)
	if q.receiver != nil {
		q.receiver.Receiving(true)
	}
	faults := &q.target.faults
	for !q.stopped.Load() {
		n, err := q.cq.Poll(q.wcs[:])
		if err != nil {
			return err
		}
		if n == 0 {
			if n, err = q.wait(); err != nil {
				return err
			}
		}
		if faults.Frozen() && !faults.awaitThaw(q.target.ctx) {
			return q.killed()
		}
		for i := range q.wcs[:n] {
			if err := q.complete(&q.wcs[i]); err != nil {
				return err
			}
		}
		if err := q.work(); err != nil {
			return err
		}
	}
	return q.killed()
}

// sitOutFreeze returns at once if the target is not frozen. Otherwise it waits until
// the freeze has ended, and then for afterThaw.
func (q *queuePair) sitOutFreeze() {
	ctx, faults := q.target.ctx, &q.target.faults
	if !faults.Frozen() || !faults.awaitThaw(ctx) {
		return
	}
	select {
	case <-time.After(afterThaw):
	case <-ctx.Done():
	}
}

// expire ends the queue if it is not connected.
func (q *queuePair) expire() {
	q.sitOutFreeze()
	if !q.joined.Load() {
		const why = "no Connect command came"
		q.target.refused("connection: " + why)
		q.target.log.Warn("connection ends", "host", q.host, "reason", why)
		q.kill(why)
	}
}

// watch ends the queue when the connection ends.
func (q *queuePair) watch() {
	for ev := range q.id.Events() {
		switch ev.Type {
		case rdma.EventDisconnected, rdma.EventDeviceRemoved, rdma.EventQPFatal:
			q.sitOutFreeze()
			q.kill(ev.Type.String())
		}
	}
}

// wait arms the completion queue and returns the number of work completions that are in
// q.wcs. If there are none, it sleeps until there may be work, and returns 0.
func (q *queuePair) wait() (int, error) {
	if n, err := q.spin(); n > 0 || err != nil {
		return n, err
	}
	if !q.armed {
		if err := q.cq.Arm(); err != nil {
			return 0, err
		}
		q.armed = true
		if n, err := q.cq.Poll(q.wcs[:]); n > 0 || err != nil {
			return n, err
		}
	}
	if _, err := unix.Poll(q.fds[:], q.timeout()); err != nil && err != unix.EINTR {
		return 0, os.NewSyscallError("poll", err)
	}
	if q.fds[0].Revents != 0 {
		if n, _ := unix.Read(q.cq.FD(), q.event[:]); n == len(q.event) {
			q.cq.Ack(1)
			q.armed = false
		}
	}
	if q.fds[1].Revents != 0 {
		_, _ = unix.Read(q.wakeFD, q.event[:]) // fails only if the eventfd is empty
	}
	if q.fds[2].Revents != 0 {
		q.receiver.Receive()
	}
	return 0, nil
}

// spin polls for a short time, if such spins usually find something. It returns the number of
// work completions that are in q.wcs.
func (q *queuePair) spin() (int, error) {
	if q.receiver == nil || q.armed || !q.spinner.Worth() {
		return 0, nil
	}
	for range spin.Polls {
		if n, err := q.cq.Poll(q.wcs[:]); n > 0 || err != nil {
			q.spinner.Record(true)
			return n, err
		}
	}
	q.spinner.Record(false)
	return 0, nil
}

// timeout returns the time until the first delayed command is due, in milliseconds, or
// -1 if no command is delayed.
func (q *queuePair) timeout() int {
	if len(q.delayed) == 0 {
		return -1
	}
	least := time.Duration(math.MaxInt32) * time.Millisecond
	for _, i := range q.delayed {
		least = min(least, time.Until(q.reqs[i].due))
	}
	return int(max(0, least+time.Millisecond-1) / time.Millisecond)
}

// complete handles a work completion.
func (q *queuePair) complete(wc *rdma.WC) error {
	if wc.Status != rdma.WCSuccess {
		return fmt.Errorf("work request failed: %v", wc.Status)
	}
	i := int(uint32(wc.ID))
	switch wc.ID & kindMask {
	case kindRecv:
		if wc.Bytes < nvme.CommandSize {
			return fmt.Errorf("capsule of %d bytes", wc.Bytes)
		}
		q.reqs[i].bytes = wc.Bytes
		if q.ctrl != nil && !q.ctrl.alive.Load() && q.keepsAlive(i) {
			q.ctrl.alive.Store(true)
		}
		q.enqueue(i)
	case kindRead:
		q.finish(i)
	case kindSend:
		q.confirm(i)
	}
	return nil
}

// keepsAlive reports whether a command restarts the keep alive timer.
func (q *queuePair) keepsAlive(i int) bool {
	return !q.target.cfg.CommandKeepAlive || q.qid == 0 && q.command(i).Opcode() == nvme.AdminKeepAlive
}

func (q *queuePair) enqueue(i int) {
	q.pending[(q.first+q.count)%len(q.pending)] = uint16(i)
	q.count++
}

// work begins the commands that can begin, and posts the work requests that result.
func (q *queuePair) work() error {
	if len(q.delayed) > 0 {
		q.wakeDelayed()
	}
	for q.count > 0 && !q.stopped.Load() {
		if !q.begin(int(q.pending[q.first])) {
			break
		}
		q.first = (q.first + 1) % len(q.pending)
		q.count--
	}
	if q.qid == 0 && q.ctrl != nil {
		q.sendEvents()
	}
	return q.post()
}

// wakeDelayed queues the delayed commands that are due.
func (q *queuePair) wakeDelayed() {
	now := time.Now()
	kept := q.delayed[:0]
	for _, i := range q.delayed {
		if now.Before(q.reqs[i].due) {
			kept = append(kept, i)
			continue
		}
		q.reserved-- // begin takes it again
		q.enqueue(int(i))
	}
	q.delayed = kept
}

// sendEvents completes Asynchronous Event Requests for the events that wait.
func (q *queuePair) sendEvents() {
	for q.reserved < len(q.responses) {
		cid, dw0, ok := q.ctrl.next()
		if !ok {
			return
		}
		q.reserved++
		sge, at := q.completion(response{})
		nvme.CompletionAt(q.out.Bytes()[at:]).Set(uint64(dw0), q.reportedHead(), cid, nvme.StatusSuccess)
		q.answers = append(q.answers, sge)
	}
}

// post posts receive buffers first, because a completion lets the host send another
// command, which needs a receive buffer. It posts data next and completions last,
// because packets of the same length are cheapest to send in a row.
func (q *queuePair) post() error {
	if len(q.recvs) > 0 {
		if _, err := q.qp.PostRecv(q.recvs); err != nil {
			return err
		}
		q.recvs = q.recvs[:0]
	}
	q.sends = append(q.sends, q.answers...)
	q.answers = q.answers[:0]
	if len(q.sends) > 0 {
		if _, err := q.qp.PostSend(q.sends); err != nil {
			return err
		}
		q.sends = q.sends[:0]
	}
	return nil
}
