package rdmatest

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// qpState is the state of a queue pair, as far as it matters here.
type qpState uint8

const (
	qpInit  qpState = iota + 1 // accepts receives
	qpReady                    // connected
	qpError                    // flushes all work requests
)

// queuePair implements rdma.QP. Positions do not wrap around: sendFree ≤ sendNext ≤
// sendDone ≤ sendTail, and sendTail - sendFree ≤ len(sendQ).
type queuePair struct {
	id             *connID
	pd             *protectionDomain
	sendCQ, recvCQ *completionQueue
	num            uint32
	state          qpState
	maxSendSGE     int

	sendQ    []sendEntry
	sendTail int // next to post
	sendDone int // next to execute
	sendNext int // next to acknowledge
	sendFree int // oldest whose slot is not free

	recvQ    []rdma.RecvWR
	recvTail int
	recvNext int
	recvFree int

	initDepth int // RDMA READs that this side may have outstanding; 0: none
	respRes   int // RDMA READs that the peer may have outstanding

	timer     *time.Timer // calls onTimer; made at its first use
	destroyed bool
}

// sendEntry is a send work request with the time before which it has no effect.
type sendEntry struct {
	wr  rdma.SendWR
	due time.Time
}

func (q *queuePair) fabric() *Fabric { return q.id.endpoint.fabric }

// Num implements rdma.QP.
func (q *queuePair) Num() uint32 { return q.num }

// Errors of PostSend and PostRecv, made in advance because these calls may be on the hot
// path
var (
	errSendState = fmt.Errorf("post send: queue pair is not connected: %w", unix.EINVAL)
	errSendFull  = fmt.Errorf("post send: queue is full: %w", unix.ENOMEM)
	errSendWR    = fmt.Errorf("post send: invalid work request: %w", unix.EINVAL)
	errRecvFull  = fmt.Errorf("post receive: queue is full: %w", unix.ENOMEM)
	errDestroyed = fmt.Errorf("post: queue pair is destroyed: %w", rdma.ErrClosed)
)

// PostSend implements rdma.QP.
func (q *queuePair) PostSend(wrs []rdma.SendWR) (int, error) {
	f := q.fabric()
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case q.destroyed:
		return 0, errDestroyed
	case q.state == qpInit:
		return 0, errSendState
	}
	n, err := 0, error(nil)
	for ; n < len(wrs); n++ {
		wr := &wrs[n]
		if wr.Op < rdma.Send || wr.Op > rdma.Read || int(wr.NumSGE) > min(q.maxSendSGE, len(wr.SGE)) {
			err = errSendWR
			break
		}
		if q.sendTail-q.sendFree == len(q.sendQ) {
			err = errSendFull
			break
		}
		e := &q.sendQ[q.sendTail%len(q.sendQ)]
		e.wr, e.due = *wr, time.Time{}
		if f.delay > 0 {
			e.due = time.Now().Add(f.delay)
		}
		q.sendTail++
	}
	q.progress()
	return n, err
}

// PostRecv implements rdma.QP.
func (q *queuePair) PostRecv(wrs []rdma.RecvWR) (int, error) {
	f := q.fabric()
	f.mu.Lock()
	defer f.mu.Unlock()
	if q.destroyed {
		return 0, errDestroyed
	}
	n, err := 0, error(nil)
	for ; n < len(wrs); n++ {
		if q.recvTail-q.recvFree == len(q.recvQ) {
			err = errRecvFull
			break
		}
		q.recvQ[q.recvTail%len(q.recvQ)] = wrs[n]
		q.recvTail++
	}
	if q.state == qpError {
		q.flush()
	} else if p := q.id.peer; p != nil && p.qp != nil {
		p.qp.progress() // it may have waited for a receive
	}
	return n, err
}

// Fail implements rdma.QP.
func (q *queuePair) Fail() error {
	f := q.fabric()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !q.destroyed {
		q.fail()
	}
	return nil
}

// fail moves the queue pair to the error state. The lock is held, here and below.
func (q *queuePair) fail() {
	q.state = qpError
	q.flush()
	// Outstanding requests of the peer get no answer any more.
	if p := q.id.peer; p != nil && p.qp != nil && p.qp.state == qpReady {
		p.qp.progress()
	}
}

// flush completes all outstanding work requests.
func (q *queuePair) flush() {
	for ; q.sendNext < q.sendTail; q.sendNext++ {
		q.completeSend(q.sendNext, rdma.WCFlushErr)
	}
	q.sendDone = q.sendTail
	for ; q.recvNext < q.recvTail; q.recvNext++ {
		q.completeRecv(rdma.WC{Status: rdma.WCFlushErr})
	}
}

func (q *queuePair) completeSend(pos int, status rdma.WCStatus) {
	wr := &q.sendQ[pos%len(q.sendQ)].wr
	if status == rdma.WCSuccess && !wr.Signaled {
		return
	}
	q.sendCQ.push(completion{wc: rdma.WC{ID: wr.ID, QPNum: q.num, Status: status}, qp: q, free: pos + 1})
}

// completeRecv completes the receive at recvNext, without moving recvNext.
func (q *queuePair) completeRecv(wc rdma.WC) {
	wc.ID, wc.QPNum, wc.Recv = q.recvQ[q.recvNext%len(q.recvQ)].ID, q.num, wc.Status == rdma.WCSuccess
	q.recvCQ.push(completion{wc: wc, qp: q, free: q.recvNext + 1, recv: true})
}

// progress executes work requests in order, as far as possible.
func (q *queuePair) progress() {
	if q.destroyed || q.state == qpInit {
		return
	}
	if q.state == qpError {
		q.flush()
		return
	}
	for q.state == qpReady && q.sendDone < q.sendTail {
		e := &q.sendQ[q.sendDone%len(q.sendQ)]
		if !q.mayPass(e) {
			break
		}
		peer := q.id.peer
		status, at := q.execute(&e.wr)
		if at == nowhere {
			break
		}
		q.sendDone++
		if status == rdma.WCSuccess {
			continue
		}
		q.acknowledge(q.sendDone - 1)
		q.completeSend(q.sendNext, status)
		q.sendNext++
		q.fail()
		if at == responder {
			peer.qp.fail()
		}
	}
	if q.state == qpReady && !q.id.endpoint.deaf {
		q.acknowledge(q.sendDone)
	}
}

// acknowledge completes the work requests before a position, which have been executed.
func (q *queuePair) acknowledge(end int) {
	for ; q.sendNext < end; q.sendNext++ {
		q.completeSend(q.sendNext, rdma.WCSuccess)
	}
}

// repeat sends again what has been executed and not acknowledged. The peer drops it, but
// the memory is read.
func (q *queuePair) repeat() {
	for pos := q.sendNext; q.state == qpReady && pos < q.sendDone; pos++ {
		if _, _, ok := q.gather(&q.sendQ[pos%len(q.sendQ)].wr); !ok {
			q.acknowledge(pos)
			q.completeSend(pos, rdma.WCLocalProt)
			q.sendNext++
			q.fail()
		}
	}
}

// mayPass reports whether the faults let a work request through. If it only has to wait
// for its time, progress will be called again then.
func (q *queuePair) mayPass(e *sendEntry) bool {
	if !q.id.cut && (q.id.endpoint.silent || q.id.peer != nil && q.id.peer.endpoint.silent) {
		return false
	}
	if e.due.IsZero() {
		return true
	}
	wait := time.Until(e.due)
	if wait <= 0 {
		return true
	}
	if q.timer == nil {
		q.timer = time.AfterFunc(wait, q.onTimer)
	} else {
		q.timer.Reset(wait)
	}
	return false
}

func (q *queuePair) onTimer() {
	f := q.fabric()
	f.mu.Lock()
	defer f.mu.Unlock()
	q.progress()
}

// Statuses that package rdma does not name, because its users do not branch on them
const (
	wcLocalLength   rdma.WCStatus = 1
	wcLocalOp       rdma.WCStatus = 2
	wcRemoteInvalid rdma.WCStatus = 9
	wcRemoteOp      rdma.WCStatus = 11
)

// where is the side that determined the outcome of a work request.
type where uint8

const (
	nowhere   where = iota // neither side, because the work request must wait
	requester              // the side of the work request
	responder              // the other side, which also fails if the outcome is an error
)

// gather returns the local memory of a work request and its length. ok is false if the
// work request may not use it.
func (q *queuePair) gather(wr *rdma.SendWR) (local [2][]byte, total uint64, ok bool) {
	need := rdma.Access(0)
	if wr.Op == rdma.Read {
		need = rdma.AccessLocalWrite
	}
	for i, s := range wr.SGE[:wr.NumSGE] {
		if s.Length == 0 {
			continue
		}
		if local[i] = q.fabric().piece(q.pd, s.LKey, false, s.Addr, s.Length, need); local[i] == nil {
			return local, total, false
		}
		total += uint64(s.Length)
	}
	return local, total, true
}

// execute executes one work request.
func (q *queuePair) execute(wr *rdma.SendWR) (rdma.WCStatus, where) {
	local, total, ok := q.gather(wr)
	if !ok {
		return rdma.WCLocalProt, requester
	}
	if wr.Op == rdma.Read && q.initDepth == 0 {
		return wcLocalOp, requester
	}
	peer := q.id.peer
	if q.id.cut || peer == nil || peer.qp == nil || peer.qp.state != qpReady {
		return rdma.WCRetryExc, requester
	}
	switch p := peer.qp; wr.Op {
	case rdma.Write:
		return p.serve(wr, &local, total, rdma.AccessRemoteWrite), responder
	case rdma.Read:
		return p.serve(wr, &local, total, rdma.AccessRemoteRead), responder
	default:
		if p.recvNext == p.recvTail {
			return 0, nowhere
		}
		return p.receive(wr, &local, total), responder
	}
}

// receive handles a SEND of the peer. A receive is posted for it.
func (q *queuePair) receive(wr *rdma.SendWR, from *[2][]byte, total uint64) rdma.WCStatus {
	f := q.fabric()
	into := q.recvQ[q.recvNext%len(q.recvQ)].SGE
	var wc rdma.WC
	var to []byte
	status := rdma.WCSuccess
	if into.Length > 0 {
		to = f.piece(q.pd, into.LKey, false, into.Addr, into.Length, rdma.AccessLocalWrite)
	}
	switch {
	case total > uint64(into.Length):
		wc.Status, status = wcLocalLength, wcRemoteInvalid
	case into.Length > 0 && to == nil:
		wc.Status, status = rdma.WCLocalProt, wcRemoteOp
	case wr.Op == rdma.SendInvalidate && !f.invalidate(q.pd, wr.RKey):
		wc.Status, status = wcLocalOp, rdma.WCRemoteAccess
	case wr.Op == rdma.SendInvalidate:
		wc.Flags, wc.InvalidatedKey = rdma.WCWithInvalidate, wr.RKey
	}
	if status == rdma.WCSuccess {
		wc.Bytes = uint32(total)
		for _, b := range from {
			to = to[copy(to, b):]
		}
	}
	q.completeRecv(wc)
	q.recvNext++
	return status
}

// serve executes the peer's RDMA READ or WRITE in local memory.
func (q *queuePair) serve(wr *rdma.SendWR, local *[2][]byte, total uint64, need rdma.Access) rdma.WCStatus {
	if need == rdma.AccessRemoteRead && q.respRes == 0 {
		return wcRemoteInvalid
	}
	if total == 0 {
		return rdma.WCSuccess
	}
	mem := q.fabric().piece(q.pd, wr.RKey, true, wr.RemoteAddr, uint32(total), need)
	if mem == nil {
		return rdma.WCRemoteAccess
	}
	for _, b := range local {
		if need == rdma.AccessRemoteRead {
			copy(b, mem)
		} else {
			copy(mem, b)
		}
		mem = mem[len(b):]
	}
	return rdma.WCSuccess
}

// destroy ends the queue pair. Its flushed completions stay in the completion queues.
func (q *queuePair) destroy() {
	q.fail()
	q.destroyed = true
	if q.timer != nil {
		q.timer.Stop()
	}
	q.sendCQ.users--
	q.recvCQ.users--
	q.pd.users--
	q.fabric().objects.QPs--
}
