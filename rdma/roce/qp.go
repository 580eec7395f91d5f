package roce

import (
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// Statuses that package rdma does not name, because its users do not branch on them
// (ibv_wc_status)
const (
	wcLocalLength   rdma.WCStatus = 1
	wcLocalOp       rdma.WCStatus = 2
	wcBadResponse   rdma.WCStatus = 7
	wcRemoteInvalid rdma.WCStatus = 9
	wcRemoteOp      rdma.WCStatus = 11
)

// qpState is the state of a queue pair.
type qpState uint8

const (
	qpInit qpState = iota + 1 // accepts receives
	qpReady
	qpFailed // flushes all work requests
	qpDestroyed
)

// queuePair implements rdma.QP. It consists of a requester and a responder, which share a
// path and a lock. Sequence numbers have 64 bits here. The packets carry the low 24.
type queuePair struct {
	provider       *Provider
	endpoint       *endpoint // receives its packets
	id             *connID
	pd             *domain
	sendCQ, recvCQ *completionQueue
	num            uint32
	here, there    netip.Addr // local and remote address, without zones
	scope          uint32     // interface of link-local addresses

	// The endpoint's recvMu guards these.
	recvBases baseCache
	dirty     bool

	// peerPort is the UDP port from which all packets of the peer come. 0 means any
	// port. It is not 0 if the peer uses this package.
	peerPort atomic.Uint32
	ours     atomic.Bool // the peer uses this package, and numbers its packets in the same way
	near     atomic.Bool // in addition, it is on this host: ICRCs cover only the headers

	settling atomic.Bool // settleAll runs

	mu    sync.Mutex // guards the fields below
	state qpState
	path  *path
	out   *batch
	dest  uint32 // number of the peer's queue pair
	mtu   int    // payload bytes per packet on the path
	// unproven is true until a packet arrives that only the peer can have sent: a
	// request with the sequence number that our REQ or REP named.
	unproven bool

	requester
	responder
}

// Num implements rdma.QP.
func (q *queuePair) Num() uint32 { return q.num }

// newQueuePair makes a queue pair in its initial state. No packet can reach it yet.
func newQueuePair(id *connID, p *endpoint, pd *domain, send, recv *completionQueue, cfg rdma.QPConfig) *queuePair {
	q := &queuePair{
		provider: p.provider, endpoint: p, id: id, pd: pd, sendCQ: send, recvCQ: recv,
		here: id.path.local.Addr().WithZone(""), there: id.path.remote.Addr().WithZone(""), scope: id.path.scope(), path: id.path,
		state: qpInit, out: &batch{path: id.path}, unproven: true,
	}
	q.timer, q.notReadyTimer = stopped(q.tick), stopped(q.peerMayBeReady)
	q.sendQ = make([]sendEntry, max(1, cfg.MaxSendWR)+1)
	q.recvQ = make([]rdma.RecvWR, max(1, cfg.MaxRecvWR))
	return q
}

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
	q.mu.Lock()
	defer q.mu.Unlock()
	switch q.state {
	case qpDestroyed:
		return 0, errDestroyed
	case qpInit:
		return 0, errSendState
	}
	n, err := 0, error(nil)
	for ; n < len(wrs); n++ {
		if err = q.enqueue(&wrs[n]); err != nil {
			break
		}
	}
	if q.state == qpFailed {
		q.flush()
		return n, err
	}
	q.transmit()
	q.send()
	return n, err
}

// PostRecv implements rdma.QP.
func (q *queuePair) PostRecv(wrs []rdma.RecvWR) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.state == qpDestroyed {
		return 0, errDestroyed
	}
	n := 0
	for ; n < len(wrs) && q.recvTail-q.recvHead < uint64(len(q.recvQ)); n++ {
		q.recvQ[q.recvTail%uint64(len(q.recvQ))] = wrs[n]
		q.recvTail++
	}
	if q.state == qpFailed {
		q.flush()
	}
	if n < len(wrs) {
		return n, errRecvFull
	}
	return n, nil
}

// Fail implements rdma.QP.
func (q *queuePair) Fail() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.fail(rdma.WCFlushErr)
	return nil
}

// fail moves the queue pair to the error state. The oldest send work request completes
// with status, all others as flushed. The lock is held, here and in everything below.
func (q *queuePair) fail(status rdma.WCStatus) {
	if q.state >= qpFailed {
		return
	}
	q.state = qpFailed
	q.stopTimers()
	q.reads.clear()
	if q.head < q.tail && status != rdma.WCFlushErr {
		q.completeSend(status)
	}
	q.flush()
}

// flush completes all outstanding work requests.
func (q *queuePair) flush() {
	for q.head < q.tail {
		q.completeSend(rdma.WCFlushErr)
	}
	for q.recvHead < q.recvTail {
		q.completeRecv(&rdma.WC{Status: rdma.WCFlushErr})
	}
}

// destroy ends the queue pair for good.
func (q *queuePair) destroy() {
	q.mu.Lock()
	q.fail(rdma.WCFlushErr)
	q.state = qpDestroyed
	q.mu.Unlock()
	q.endpoint.removeQP(q)
	q.sendCQ.unuse()
	q.recvCQ.unuse()
	q.pd.unuse()
	if q.endpoint.dedicated && q.endpoint != q.id.endpoint {
		q.provider.drop(q.endpoint)
	}
}

// peerIs records the GUID of the peer. It is called before ready, and after redirect.
//
// Packets of a host to itself stay in its memory. For TCP, the kernel computes no
// checksum of them either. Both ends know about this case, because both have ports of
// their own, to which nothing else would answer.
func (q *queuePair) peerIs(guid uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	near := ours(guid) && q.endpoint.dedicated && q.path.remote.Port() != q.provider.cfg.Port
	if ours(guid) {
		q.peerPort.Store(uint32(q.path.remote.Port()))
	}
	q.ours.Store(ours(guid))
	q.near.Store(near)
	q.out.headersOnly = near
}

// ready connects the queue pair. recvPSN is the first sequence number that the peer
// sends.
func (q *queuePair) ready(c connected) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.state != qpInit {
		return // it failed before, and stays failed
	}
	q.state = qpReady
	q.dest, q.mtu = c.dest, c.mtu
	q.requester.start(&c, uint64(q.endpoint.sock.recvBuffer))
	q.responder.start(&c)
}

// redirect makes packets go to another port of the peer. It is called before ready.
func (q *queuePair) redirect(port uint16) *path {
	q.mu.Lock()
	defer q.mu.Unlock()
	to := *q.path
	to.remote = netip.AddrPortFrom(to.remote.Addr(), port)
	to.name, to.nameLen = sockaddrOf(to.remote)
	q.path, q.out.path = &to, &to
	return q.path
}

// connected holds the parameters of a connection.
type connected struct {
	dest             uint32
	mtu              int
	sendPSN, recvPSN uint32
	retries          uint8 // of the retry timer
	notReadyRetries  uint8 // after RNR NAKs; 7: no limit
	readDepth        int   // RDMA READs that this side may have outstanding
	readsServed      int   // RDMA READs that the peer may have outstanding
}

// startPSN returns the extended sequence number of the first packet. It is far above 0,
// so that extend can go down.
func startPSN(psn uint32) uint64 { return 1<<24 | uint64(psn) }

// extend returns the extended sequence number nearest to ref.
func extend(psn uint32, ref uint64) uint64 {
	return ref + uint64(int64(wire.PSNDiff(psn, uint32(ref&0xffffff))))
}

// packets returns the number of packets of a message of n bytes.
func (q *queuePair) packets(n uint32) uint64 {
	return max(1, (uint64(n)+uint64(q.mtu)-1)/uint64(q.mtu))
}

// header starts the next packet of the batch.
func (q *queuePair) header(op wire.Opcode, psn uint64, ackReq bool) []byte {
	if q.out.full() {
		q.send()
	}
	b := q.out.header()
	h := wire.BTH{Op: op, AckReq: ackReq, PKey: wire.DefaultPKey, DestQP: q.dest, PSN: uint32(psn & 0xffffff)}
	h.Put(b)
	return b
}

// send sends the packets that transmit and respond have put into the batch.
func (q *queuePair) send() {
	if q.out.packets == 0 {
		return
	}
	q.provider.counters.packetsSent.Add(uint64(q.out.packets))
	if q.out.flush() != nil {
		// The path carries less than when the connection was made, and a
		// connection cannot change its MTU.
		q.tooLarge = true
	}
}

// settle sends what became due by a batch of packets or a timer. It reports whether there
// is more to do at once.
func (q *queuePair) settle() (more bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	more = q.respond()
	q.transmit()
	q.send()
	if q.tooLarge {
		q.fail(wcLocalOp)
		more = false
	}
	return more
}

// settleAll calls settle until nothing is left to do, or the queue pair has ended.
func (q *queuePair) settleAll() {
	defer q.settling.Store(false)
	for q.settle() {
	}
}

// receive handles a packet whose ICRC and addresses are right.
func (q *queuePair) receive(h *wire.BTH, packet, payload []byte, congested bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch q.state {
	case qpReady:
	case qpFailed:
		q.refuseAgain(h)
		return
	default:
		return
	}
	if congested {
		q.congested(h.Op)
	}
	switch h.Op {
	case wire.CongestionNote:
		q.provider.counters.notes.Add(1)
		q.slow()
	case wire.Acknowledge:
		q.acknowledge(h, wire.ParseAETH(packet[wire.BTHLen:]))
	case wire.ReadResponseFirst, wire.ReadResponseMid, wire.ReadResponseLast, wire.ReadResponseOnly:
		q.readResponse(h, payload)
	case wire.DatagramSendOnly:
	default:
		q.request(h, packet, payload)
	}
}

// heardOfPeer reports whether the peer has sent a request, or answered one.
func (q *queuePair) heardOfPeer() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return !q.unproven || q.una != q.firstPSN
}

// congested handles the congestion mark of a router. If the peer's requests met
// congestion, the peer is asked to send less. If they are responses to our READs, this
// side requests less.
func (q *queuePair) congested(op wire.Opcode) {
	q.provider.counters.marks.Add(1)
	switch op {
	case wire.CongestionNote:
	case wire.Acknowledge, wire.ReadResponseFirst, wire.ReadResponseMid, wire.ReadResponseLast, wire.ReadResponseOnly:
		q.slow()
	default:
		q.noteDue = true
	}
}

// stopped returns a timer that does not run yet, because making one later would allocate.
func stopped(f func()) *time.Timer {
	t := time.AfterFunc(time.Hour, f)
	t.Stop()
	return t
}
