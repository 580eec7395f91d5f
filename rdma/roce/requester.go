package roce

import (
	"time"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// Limits of the requester
const (
	maxWindow = 128 // unacknowledged packets; rdma_rxe has the same limit
	minWindow = 8   // but fewer if packets are large
	readChunk = 64  // response packets that one READ request asks for, at most

	// Limits in bytes, which large packets reach first
	maxFlight = 1 << 20
	readBytes = readChunk * 4096
	askBytes  = askEvery * 4096

	askEvery = 32 // number of packets after which an acknowledgement is requested in any case

	// With seven retries, a peer has 3.7 s to answer, and 4.8 s if it has been slow.
	minRetry = 100 * time.Millisecond
	maxRetry = 600 * time.Millisecond
	// hastyRetry is the time until the first retry on a path that loses packets. It does not
	// count as a retry, because the peer may only be slow.
	hastyRetry = 10 * time.Millisecond
	// retryTicks is the number of times that the timer looks for progress in one
	// retry interval, so that sending need not read the clock.
	retryTicks = 2
)

// sendEntry is a send work request that has not completed.
type sendEntry struct {
	wr      rdma.SendWR
	psn     uint64 // of its first packet; it has n packets (for a READ: responses)
	n       uint64
	before  uint64 // number of bytes of all work requests before it
	length  uint32
	invalid bool // its lengths make no sense
	probe   bool // the requester made it for itself, so it causes no completion
}

// requester is the sending half of a queue pair. Positions in sendQ and sequence numbers
// do not wrap around:
//
//	head ≤ cur ≤ tail        una ≤ nxt ≤ top ≤ end
//
// una lies in the work request at head, and nxt in the one at cur.
type requester struct {
	sendQ           []sendEntry // one more entry than the consumer may use, for a probe
	probing         uint64      // number of probes in sendQ, 0 or 1
	head, cur, tail uint64
	firstPSN        uint64 // first sequence number of the connection
	una             uint64 // oldest sequence number without an acknowledgement
	nxt             uint64 // next to send
	top             uint64 // next that was never sent before
	end             uint64 // next to assign to a work request
	posted          uint64 // number of bytes of all work requests
	asked           uint64 // everything before it will be acknowledged without another request
	askedBytes      uint64 // number of bytes of all packets before asked
	ask             bool   // the next packet requests an acknowledgement

	window uint64
	flight uint64 // number of bytes of data that may be in flight
	growth uint64 // number of packets acknowledged since the window grew
	slowed uint64 // congestion marks of packets before it do not count
	depth  int    // number of RDMA READ requests that may be outstanding
	asking readEnds

	retryLimit, notReadyLimit uint8
	retries, notReady         uint8
	gapOpen                   bool   // una was requested again
	gapHigh                   uint64 // sequence number that was seen beyond the gap since then
	tooLarge                  bool   // the socket returned EMSGSIZE

	timer, notReadyTimer *time.Timer
	timing               bool // timer runs
	waiting              bool // notReadyTimer runs
	hurried              bool // there was a hasty retry since una moved
	backoff              uint8
	idleTicks            int
	seen                 uint64 // una at the last tick
	rtt                  time.Duration
	sample               uint64 // its acknowledgement ends the measurement of rtt; 0: none runs
	sampled              time.Time
}

// readEnds holds the ends of the outstanding READ requests.
type readEnds struct {
	ends    [maxReadAtomic]uint64
	head, n int
}

func (r *readEnds) push(end uint64) {
	r.ends[(r.head+r.n)%len(r.ends)] = end
	r.n++
}

func (r *readEnds) acked(una uint64) {
	for r.n > 0 && r.ends[r.head] <= una {
		r.head = (r.head + 1) % len(r.ends)
		r.n--
	}
}

// start begins a connection over a socket with a receive buffer of the given number of
// bytes.
func (r *requester) start(c *connected, buffer uint64) {
	psn := startPSN(c.sendPSN)
	r.firstPSN, r.una, r.nxt, r.top, r.end, r.asked, r.seen = psn, psn, psn, psn, psn, psn, psn
	r.window = maxWindow
	// Read data arrives in this buffer. Written data arrives in a buffer that is
	// assumed to be as large.
	r.flight = min(maxFlight, buffer/4*3)
	r.depth = min(c.readDepth, maxReadAtomic)
	r.retryLimit, r.notReadyLimit = c.retries, c.notReadyRetries
}

func (r *requester) entry(pos uint64) *sendEntry { return &r.sendQ[pos%uint64(len(r.sendQ))] }

// enqueue adds a work request to the queue, if it is valid and there is room.
func (q *queuePair) enqueue(wr *rdma.SendWR) error {
	switch {
	case wr.Op < rdma.Send || wr.Op > rdma.Read || wr.NumSGE > maxSGE:
		return errSendWR
	case q.tail-q.head-q.probing == uint64(len(q.sendQ)-1):
		return errSendFull
	}
	q.add(wr)
	return nil
}

// add appends a work request to the queue and assigns its sequence numbers.
func (q *queuePair) add(wr *rdma.SendWR) *sendEntry {
	e := q.entry(q.tail)
	length := uint64(0)
	for i := range wr.NumSGE {
		length += uint64(wr.SGE[i].Length)
	}
	e.wr, e.length, e.probe = *wr, uint32(length), false
	e.invalid = length > 1<<30 || wr.Op == rdma.Read && q.depth == 0
	if e.invalid {
		e.length = 0
	}
	q.tail++
	if q.state == qpReady {
		e.psn, e.n, e.before = q.end, q.packets(e.length), q.posted
		q.end += e.n
		q.posted += uint64(e.length)
	}
	return e
}

// probe sends an RDMA WRITE of no bytes to find out whether the peer's adapter still has
// the queue pair. If it does not, the probe fails when its retries are used up, and an
// event reports this.
func (q *queuePair) probe() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.state != qpReady || q.head < q.tail {
		return // the work requests in flight have the same effect
	}
	q.add(&rdma.SendWR{Op: rdma.Write, Signaled: true}).probe = true
	q.probing = 1
	q.transmit()
	q.send()
}

// local returns the memory of a work request. It returns false if keys or bounds do not
// match. The domain's lock is held.
func (q *queuePair) local(e *sendEntry) (mem [2][]byte, ok bool) {
	need := rdma.Access(0)
	if e.wr.Op == rdma.Read {
		need = rdma.AccessLocalWrite
	}
	for i := range e.wr.NumSGE {
		s := &e.wr.SGE[i]
		if s.Length == 0 {
			continue
		}
		if mem[i] = piece(q.pd.local, s.LKey, s.Addr, uint64(s.Length), need); mem[i] == nil {
			return mem, false
		}
	}
	return mem, true
}

// cut returns n bytes at offset off of mem, as two pieces.
func cut(mem *[2][]byte, off, n int) (first, second []byte) {
	a := len(mem[0])
	if off >= a {
		return mem[1][off-a : off-a+n], nil
	}
	if off+n <= a {
		return mem[0][off : off+n], nil
	}
	return mem[0][off:], mem[1][:off+n-a]
}

// transmit sends as much as the window and the READ depth allow.
func (q *queuePair) transmit() {
	if q.state != qpReady || q.waiting || q.cur == q.tail {
		return
	}
	q.pd.mu.RLock()
	status := q.transmitLocked()
	q.send() // while the lock keeps the memory valid
	q.pd.mu.RUnlock()
	switch {
	case q.tooLarge:
		q.fail(wcLocalOp)
	case status != rdma.WCSuccess:
		q.fail(status)
	case q.una < q.nxt && !q.timing:
		q.timing, q.idleTicks, q.seen = true, 0, q.una
		q.timer.Reset(q.nextTick())
	}
}

// transmitLocked returns WCSuccess, or the status with which the oldest work request must
// end because it cannot be sent.
func (q *queuePair) transmitLocked() rdma.WCStatus {
	var mem [2][]byte
	memOf := ^uint64(0)
	for q.cur < q.tail {
		room := int64(q.una + q.window - q.nxt)
		e := q.entry(q.cur)
		acked, sent := q.carried(q.entry(q.head), q.una), q.carried(e, q.nxt)
		if room <= 0 || sent-acked >= q.flight || q.tooLarge {
			break
		}
		if memOf != q.cur {
			var ok bool
			if mem, ok = q.local(e); !ok || e.invalid {
				// Earlier work requests may still succeed.
				switch {
				case q.cur != q.head:
					return rdma.WCSuccess
				case e.invalid:
					return wcLocalOp
				}
				return rdma.WCLocalProt
			}
			memOf = q.cur
		}
		if e.wr.Op == rdma.Read {
			if !q.sendRead(e, uint64(room), q.flight-(sent-acked)) {
				break
			}
		} else {
			q.sendPacket(e, &mem, room == 1 || sent-acked+uint64(q.mtu) >= q.flight, sent-max(q.askedBytes, acked))
		}
		q.top = max(q.top, q.nxt)
		if q.nxt == e.psn+e.n {
			q.cur++
		}
	}
	return rdma.WCSuccess
}

// carried returns the number of bytes that the packets of e before psn carry, plus those
// of all work requests before e.
func (q *queuePair) carried(e *sendEntry, psn uint64) uint64 {
	return e.before + min((psn-e.psn)*uint64(q.mtu), uint64(e.length))
}

// sendRead requests the next part of a READ, if there is room for the packets and the
// bytes of its response. It returns false if the request must wait.
func (q *queuePair) sendRead(e *sendEntry, room, bytes uint64) bool {
	i := q.nxt - e.psn
	// A part that is requested again must end where the first request for it ended,
	// so the ends are always the same.
	chunk := min(readChunk, readBytes/uint64(q.mtu))
	n := min(e.n-i, chunk-i%chunk)
	off := uint32(i) * uint32(q.mtu)
	length := min(e.length-off, uint32(n)*uint32(q.mtu))
	// Data in flight makes room only if it will be acknowledged.
	if q.asking.n == q.depth || (room < n || bytes < uint64(length)) && q.asked > q.una {
		return false
	}
	b := q.header(wire.ReadRequest, q.nxt, true)
	h := wire.RETH{
		VA: e.wr.RemoteAddr + uint64(off), RKey: e.wr.RKey, Length: length,
	}
	h.Put(b[wire.BTHLen:])
	q.out.add(wire.BTHLen+wire.RETHLen, nil, nil)
	if q.nxt < q.top {
		q.provider.counters.retransmits.Add(1)
	}
	q.nxt += n
	q.asked, q.askedBytes = q.nxt, q.carried(e, q.nxt)
	q.asking.push(q.nxt)
	return true
}

// sendOps holds the opcodes by operation and place in the message.
var sendOps = [rdma.Read]struct{ first, middle, last, only wire.Opcode }{
	rdma.Send:           {wire.SendFirst, wire.SendMiddle, wire.SendLast, wire.SendOnly},
	rdma.SendInvalidate: {wire.SendFirst, wire.SendMiddle, wire.SendLastInv, wire.SendOnlyInv},
	rdma.Write:          {wire.WriteFirst, wire.WriteMiddle, wire.WriteLast, wire.WriteOnly},
}

// sendPacket sends the next packet of a SEND or WRITE. unasked is the number of bytes
// that were sent since the peer was last asked for an acknowledgement.
func (q *queuePair) sendPacket(e *sendEntry, mem *[2][]byte, lastOfWindow bool, unasked uint64) {
	i := q.nxt - e.psn
	first, last := i == 0, i == e.n-1
	op := sendOps[e.wr.Op].middle
	switch {
	case first && last:
		op = sendOps[e.wr.Op].only
	case first:
		op = sendOps[e.wr.Op].first
	case last:
		op = sendOps[e.wr.Op].last
	}
	off := int(i) * q.mtu
	n := min(q.mtu, int(e.length)-off)

	ask := q.ask || lastOfWindow || last && e.wr.Signaled || q.nxt+1-q.asked >= min(askEvery, q.window/2) ||
		unasked+uint64(n) >= askBytes
	b := q.header(op, q.nxt, ask)
	headLen := op.HeaderLen()
	switch {
	case e.wr.Op == rdma.Write && first:
		h := wire.RETH{VA: e.wr.RemoteAddr, RKey: e.wr.RKey, Length: e.length}
		h.Put(b[wire.BTHLen:])
	case e.wr.Op == rdma.SendInvalidate && last:
		b[wire.BTHLen], b[wire.BTHLen+1], b[wire.BTHLen+2], b[wire.BTHLen+3] =
			byte(e.wr.RKey>>24), byte(e.wr.RKey>>16), byte(e.wr.RKey>>8), byte(e.wr.RKey)
	}
	if n == 0 {
		q.out.add(headLen, nil, nil)
	} else {
		a, c := cut(mem, off, n)
		q.out.add(headLen, a, c)
	}
	if q.nxt < q.top {
		q.provider.counters.retransmits.Add(1)
	}
	q.nxt++
	if ask {
		q.asked, q.askedBytes, q.ask = q.nxt, q.carried(e, q.nxt), false
	}
}

// completeSend completes the oldest work request.
func (q *queuePair) completeSend(status rdma.WCStatus) {
	e := q.entry(q.head)
	q.head++
	q.cur = max(q.cur, q.head)
	if e.probe {
		q.probing = 0
		if status != rdma.WCSuccess && status != rdma.WCFlushErr {
			q.id.report(rdma.EventDisconnected, "the peer has restarted and does not answer any more")
		}
		return
	}
	if status != rdma.WCSuccess || e.wr.Signaled {
		q.sendCQ.push(&rdma.WC{ID: e.wr.ID, QPNum: q.num, Status: status})
	}
}

// progress moves una, which stays in the work request at head or completes it.
func (q *queuePair) progress(una uint64) {
	q.grow(una - q.una)
	q.una = una
	q.retries, q.notReady, q.gapOpen, q.hurried = 0, 0, false, false
	q.asked = max(q.asked, una)
	q.asking.acked(una)
	if q.sample != 0 && una >= q.sample {
		q.rtt = max(time.Since(q.sampled), q.rtt-q.rtt/8)
		q.sample = 0
	}
	if e := q.entry(q.head); una == e.psn+e.n {
		q.completeSend(rdma.WCSuccess)
	}
	if q.nxt < una { // the response was in flight when goBack was called
		q.nxt, q.cur = una, q.head
	}
}

// grow opens the window again, by one packet per window.
func (q *queuePair) grow(n uint64) {
	if q.window == maxWindow {
		return
	}
	if q.growth += n; q.growth >= q.window {
		q.window++
		q.growth = 0
	}
}

// ackedTo handles an acknowledgement of everything before psn. It stops at a READ whose
// responses have not arrived.
func (q *queuePair) ackedTo(psn uint64) {
	for q.una < psn && q.head < q.tail {
		e := q.entry(q.head)
		if e.wr.Op == rdma.Read {
			return
		}
		q.progress(min(psn, e.psn+e.n))
	}
}

// goBack makes transmit begin again at una.
func (q *queuePair) goBack() {
	q.nxt, q.cur, q.asked, q.askedBytes, q.ask = q.una, q.head, q.una, 0, false
	q.asking = readEnds{}
	q.sample = 0
}

// lost handles a loss: it halves the window and goes back.
func (q *queuePair) lost() {
	q.halve()
	q.goBack()
}

// halve sets the window to half of the packets in flight, which may be fewer than it
// allows.
func (q *queuePair) halve() {
	least := max(2, min(minWindow, minWindow*4096/uint64(q.mtu)))
	q.window, q.growth = max(least, min(q.window, q.nxt-q.una)/2), 0
}

// slow halves the window, at most once for all packets in flight.
func (q *queuePair) slow() {
	if q.una >= q.slowed {
		q.halve()
		q.slowed = q.nxt
	}
}

// gap is called when psn was seen although una is missing. It goes back once per gap, and
// again each time that the peer has begun again and the beginning was lost again.
func (q *queuePair) gap(psn uint64, response bool) {
	q.provider.counters.outOfSequence.Add(1)
	if q.gapOpen && (psn > q.gapHigh || !response) {
		q.gapHigh = max(q.gapHigh, psn)
		return
	}
	q.lost()
	q.gapOpen, q.gapHigh = true, psn
}

// acknowledge handles an ACK or NAK.
func (q *queuePair) acknowledge(h *wire.BTH, a wire.AETH) {
	psn := extend(h.PSN, q.una)
	c := &q.provider.counters
	if psn+1 < q.una || psn >= q.top {
		c.unsolicited.Add(1) // old, or never sent
		return
	}
	switch {
	case a.Syndrome.IsACK():
		if q.ackedTo(psn + 1); q.una < psn+1 {
			q.gap(psn+1, false)
		}
		return
	case a.Syndrome.IsNotReady():
		c.rnrNAKs.Add(1)
	default:
		c.naksReceived.Add(1)
	}
	if psn < q.una {
		return
	}
	q.ackedTo(psn)
	switch {
	case a.Syndrome >= wire.NAKInvalid && a.Syndrome <= wire.NAKRemoteOp:
		c.fatalNAKs.Add(1)
		status := wcRemoteInvalid
		switch a.Syndrome {
		case wire.NAKRemoteAccess:
			status = rdma.WCRemoteAccess
		case wire.NAKRemoteOp:
			status = wcRemoteOp
		}
		q.fail(status)
	case q.una != psn:
		q.gap(psn, false)
	case a.Syndrome == wire.NAKSequence:
		q.lost()
	case a.Syndrome.IsNotReady():
		q.peerNotReady(uint8(a.Syndrome & 0x1f))
	}
}

// notReadyMicros translates the timer codes of RNR NAKs to microseconds (IBTA table 45).
var notReadyMicros = [32]uint32{
	655360, 10, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480, 640, 960, 1280, 1920,
	2560, 3840, 5120, 7680, 10240, 15360, 20480, 30720, 40960, 61440, 81920, 122880, 163840, 245760, 327680, 491520,
}

func (q *queuePair) peerNotReady(code uint8) {
	if q.notReadyLimit != 7 {
		if q.notReady == q.notReadyLimit {
			q.fail(rdma.WCRNRRetryExc)
			return
		}
		q.notReady++
	}
	q.goBack()
	q.retries = 0
	q.waiting = true
	q.notReadyTimer.Reset(time.Duration(notReadyMicros[code]) * time.Microsecond)
}

func (q *queuePair) peerMayBeReady() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = false
	q.transmit()
}

// awaited reports whether psn belongs to a response to an outstanding READ.
func (q *queuePair) awaited(psn uint64) bool {
	if psn < q.una || psn >= q.top {
		return false
	}
	for pos := q.head; pos < q.tail; pos++ {
		if e := q.entry(pos); psn < e.psn+e.n {
			return e.wr.Op == rdma.Read
		}
	}
	return false
}

// readResponse handles a response to a READ.
func (q *queuePair) readResponse(h *wire.BTH, payload []byte) {
	psn := extend(h.PSN, q.una)
	if !q.awaited(psn) {
		q.provider.counters.unsolicited.Add(1)
		return
	}
	if q.ackedTo(psn); q.una != psn {
		q.gap(psn, true)
		return
	}
	e := q.entry(q.head)
	off := int(psn-e.psn) * q.mtu
	if len(payload) != min(q.mtu, int(e.length)-off) {
		q.fail(wcBadResponse)
		return
	}
	q.pd.mu.RLock()
	mem, ok := q.local(e)
	if ok && len(payload) > 0 {
		a, b := cut(&mem, off, len(payload))
		copy(b, payload[copy(a, payload):])
	}
	q.pd.mu.RUnlock()
	if !ok {
		q.fail(rdma.WCLocalProt)
		return
	}
	q.progress(psn + 1)
}

// retryInterval returns the time to wait for progress.
func (r *requester) retryInterval() time.Duration {
	return min(max(minRetry, 4*r.rtt)<<r.backoff, maxRetry)
}

// nextTick returns the time until the next tick.
func (r *requester) nextTick() time.Duration {
	if r.hasty() {
		return max(hastyRetry, 4*r.rtt)
	}
	return r.retryInterval() / retryTicks
}

// hasty reports whether the lack of progress is likely to be a loss: packets were lost not long
// ago, so the window is not open. A refusal or an acknowledgement that was lost is not repeated,
// and the last packets of a window are not missed by the peer.
func (r *requester) hasty() bool { return r.window < maxWindow && !r.hurried && r.retries == 0 }

// tick checks for progress. The timer calls it.
func (q *queuePair) tick() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.state != qpReady || q.una == q.nxt && q.una == q.top && !q.waiting {
		q.timing = false
		return
	}
	defer func() {
		if q.state == qpReady {
			q.timer.Reset(q.nextTick())
		}
	}()
	if q.seen != q.una || q.waiting {
		q.seen, q.idleTicks = q.una, 0
		q.backoff -= min(q.backoff, 1)
		if q.sample == 0 && q.asked > q.una {
			q.sample, q.sampled = q.asked, time.Now()
		}
		return
	}
	q.idleTicks++
	c := &q.provider.counters
	switch {
	case q.asked == q.una && q.nxt > q.una:
		// No acknowledgement was requested for any of the packets in flight.
		c.probes.Add(1)
		if q.cur == q.tail || q.entry(q.cur).psn == q.nxt {
			q.cur--
		}
		q.nxt--
		q.ask = true
		q.idleTicks = 0
	case q.hasty():
		q.hurried, q.idleTicks, q.gapOpen = true, 0, false
		q.lost()
		q.ask = true
	case q.idleTicks < retryTicks:
		return
	case q.retries == q.retryLimit:
		c.timeouts.Add(1)
		q.fail(rdma.WCRetryExc)
		return
	default:
		c.timeouts.Add(1)
		q.retries++
		q.backoff = min(q.backoff+1, 5)
		q.idleTicks = 0
		q.gapOpen = false
		q.lost()
		q.ask = true // otherwise the next interval would begin with a probe
	}
	q.transmit()
}

func (r *requester) stopTimers() {
	r.timer.Stop()
	r.notReadyTimer.Stop()
}
