package roce

import (
	"encoding/binary"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// Limits of the responder
const (
	// notReadyCode is the timer code of the RNR NAKs that this side sends: 640 µs.
	notReadyCode = 12
	// settlePackets limits the READ responses that are sent at a time, so that a peer
	// that reads much does not starve the others.
	settlePackets = 256
	maxMessage    = 1 << 30
)

// messageKind is the kind of the message of several packets that the peer is sending.
type messageKind uint8

const (
	noMessage messageKind = iota
	sendMessage
	writeMessage
)

// responder is the receiving half of a queue pair.
type responder struct {
	recvQ              []rdma.RecvWR
	recvHead, recvTail uint64

	expected uint64 // next sequence number
	msn      uint32
	served   int // number of RDMA READs that the peer may have outstanding
	message  messageKind
	offset   uint32    // offset of the next packet in the message
	write    wire.RETH // header of the message, if it is a WRITE

	reads   readJobs
	recent  readHistory
	ackDue  bool
	ackable uint64        // end of the last packet that was not a READ
	acked   uint64        // everything before it was acknowledged
	unsaid  uint64        // a duplicate that was not acknowledged
	noteDue bool          // a CNP must be sent
	nak     wire.Syndrome // NAK to send with nakPSN; 0: none
	nakPSN  uint64
	refused wire.Syndrome // the NAK that ended the connection
	nakSent bool          // a NAK was sent for the gap before expected
	gapTop  uint64        // last sequence number that was seen beyond the gap
}

// readJob is a READ of the peer that must be answered.
type readJob struct {
	psn      uint64 // sequence number of the next response
	left     wire.RETH
	begun    bool
	repeated bool // the peer requested it before
}

// readJobs holds jobs in the order of their sequence numbers.
type readJobs struct {
	jobs [maxReadAtomic]readJob
	n    int
}

func (r *readJobs) clear() { r.n = 0 }

// insert inserts a job at its place. It returns false if there is no room.
func (r *readJobs) insert(j readJob) bool {
	if r.n == len(r.jobs) {
		return false
	}
	i := r.n
	for i > 0 && r.jobs[i-1].psn > j.psn {
		r.jobs[i] = r.jobs[i-1]
		i--
	}
	r.jobs[i] = j
	r.n++
	return true
}

// room reports whether there is room for one more job, if n are allowed. It removes jobs
// for which the peer no longer waits: a peer that requested the oldest READ again, then
// received the responses that were in flight, and now requests more.
func (r *readJobs) room(n int) bool {
	for r.n >= n && r.n > 0 && r.jobs[0].repeated {
		r.drop(r.jobs[0].psn, r.jobs[0].psn+1)
	}
	return r.n < n
}

// drop removes jobs that begin in [from, to).
func (r *readJobs) drop(from, to uint64) {
	kept := 0
	for _, j := range r.jobs[:r.n] {
		if j.psn < from || j.psn >= to {
			r.jobs[kept] = j
			kept++
		}
	}
	r.n = kept
}

// readHistory holds the last READ requests, as many as a peer may have outstanding. A
// peer does not repeat an older one.
type readHistory struct {
	taken [maxReadAtomic]takenRead
	next  int
}

// takenRead is a READ request with the sequence numbers of its responses.
type takenRead struct {
	psn, n uint64
	what   wire.RETH
}

func (h *readHistory) add(r takenRead) {
	h.taken[h.next] = r
	h.next = (h.next + 1) % len(h.taken)
}

// has reports whether the request r at psn is a request in the history, or a part of one.
func (h *readHistory) has(psn uint64, r *wire.RETH, mtu int) bool {
	for i := range h.taken {
		t := &h.taken[i]
		if psn < t.psn || psn-t.psn >= t.n {
			continue
		}
		off := (psn - t.psn) * uint64(mtu) // below the length, or 0
		return r.RKey == t.what.RKey && r.VA == t.what.VA+off && uint64(r.Length)+off <= uint64(t.what.Length)
	}
	return false
}

func (r *responder) start(c *connected) {
	r.expected = startPSN(c.recvPSN)
	r.ackable, r.acked = r.expected, r.expected
	r.served = min(c.readsServed, maxReadAtomic)
}

// completeRecv completes the oldest receive.
func (q *queuePair) completeRecv(wc *rdma.WC) {
	wc.ID, wc.QPNum, wc.Recv = q.recvQ[q.recvHead%uint64(len(q.recvQ))].ID, q.num, true
	q.recvHead++
	q.recvCQ.push(wc)
}

// request handles a SEND, WRITE or READ request.
func (q *queuePair) request(h *wire.BTH, packet, payload []byte) {
	psn := extend(h.PSN, q.expected)
	c := &q.provider.counters
	switch {
	case psn < q.expected:
		c.duplicates.Add(1)
		switch {
		case h.Op == wire.ReadRequest:
			q.readAgain(psn, wire.ParseRETH(packet[wire.BTHLen:]))
		case q.ackable == q.expected || psn <= q.unsaid:
			q.ackDue = true
		default:
			// The peer will request the READ behind it again, too, unless
			// this duplicate comes once more.
			q.unsaid = psn
		}
		return
	case psn > q.expected:
		c.outOfSequence.Add(1)
		// Send one NAK per gap, and one more when the peer has begun again
		// without success. The sequence number then goes back.
		if !q.nakSent || psn <= q.gapTop {
			q.nak, q.nakPSN, q.nakSent = wire.NAKSequence, q.expected, true
		}
		q.gapTop = psn
		return
	}
	if q.unproven {
		q.unproven = false
		q.id.heard()
	}
	q.nakSent = false
	if q.nak == wire.NAKSequence { // it was for the gap that this packet fills
		q.nak = 0
	}

	switch h.Op {
	case wire.SendFirst, wire.SendOnly, wire.SendOnlyImm, wire.SendOnlyInv:
		if q.message != noMessage {
			q.refuse(wire.NAKInvalid)
			return
		}
		q.offset = 0
		q.takeSend(h, packet, payload)
	case wire.SendMiddle, wire.SendLast, wire.SendLastImm, wire.SendLastInv:
		if q.message != sendMessage {
			q.refuse(wire.NAKInvalid)
			return
		}
		q.takeSend(h, packet, payload)
	case wire.WriteFirst, wire.WriteOnly, wire.WriteOnlyImm:
		if q.message != noMessage {
			q.refuse(wire.NAKInvalid)
			return
		}
		q.offset, q.write = 0, wire.ParseRETH(packet[wire.BTHLen:])
		q.takeWrite(h, payload)
	case wire.WriteMiddle, wire.WriteLast, wire.WriteLastImm:
		if q.message != writeMessage {
			q.refuse(wire.NAKInvalid)
			return
		}
		q.takeWrite(h, payload)
	case wire.ReadRequest:
		q.takeRead(wire.ParseRETH(packet[wire.BTHLen:]), len(payload))
	default:
		q.refuse(wire.NAKInvalid)
	}
	if h.AckReq && h.Op != wire.ReadRequest && q.state == qpReady && q.expected > psn {
		q.ackDue = true
	}
}

// place reports whether a packet is the first and whether it is the last of its message.
func place(op wire.Opcode) (first, last bool) {
	switch op {
	case wire.SendFirst, wire.WriteFirst:
		return true, false
	case wire.SendMiddle, wire.WriteMiddle:
		return false, false
	case wire.SendLast, wire.SendLastImm, wire.SendLastInv, wire.WriteLast, wire.WriteLastImm:
		return false, true
	}
	return true, true
}

// fits reports whether the length of a packet's payload is allowed at its place in the
// message.
func (q *queuePair) fits(op wire.Opcode, n int) bool {
	first, last := place(op)
	switch {
	case !last:
		return n == q.mtu
	case !first:
		return n >= 1 && n <= q.mtu
	}
	return n <= q.mtu
}

// took accounts for a packet of a message.
func (q *queuePair) took(kind messageKind, n int, last bool) {
	q.expected++
	q.ackable = q.expected
	q.message = kind
	q.offset += uint32(n)
	if last {
		q.message = noMessage
		q.msn++
	}
}

// takeSend handles the next packet of a SEND.
func (q *queuePair) takeSend(h *wire.BTH, packet, payload []byte) {
	if !q.fits(h.Op, len(payload)) {
		q.refuse(wire.NAKInvalid)
		return
	}
	if q.recvHead == q.recvTail {
		q.peerMustWait()
		return
	}
	into := &q.recvQ[q.recvHead%uint64(len(q.recvQ))].SGE
	if uint64(q.offset)+uint64(len(payload)) > uint64(into.Length) {
		q.completeRecv(&rdma.WC{Status: wcLocalLength})
		q.refuse(wire.NAKInvalid)
		return
	}
	if len(payload) > 0 {
		q.pd.mu.RLock()
		mem := piece(q.pd.local, into.LKey, into.Addr, uint64(into.Length), rdma.AccessLocalWrite)
		if mem != nil {
			copy(mem[q.offset:], payload)
		}
		q.pd.mu.RUnlock()
		if mem == nil {
			q.completeRecv(&rdma.WC{Status: rdma.WCLocalProt})
			q.refuse(wire.NAKRemoteOp)
			return
		}
	}
	_, last := place(h.Op)
	wc := rdma.WC{Bytes: q.offset + uint32(len(payload))}
	if h.Op == wire.SendLastInv || h.Op == wire.SendOnlyInv {
		wc.Flags, wc.InvalidatedKey = rdma.WCWithInvalidate, binary.BigEndian.Uint32(packet[wire.BTHLen:])
		if !q.pd.invalidate(wc.InvalidatedKey) {
			q.completeRecv(&rdma.WC{Status: wcLocalOp})
			q.refuse(wire.NAKRemoteAccess)
			return
		}
	}
	q.took(sendMessage, len(payload), last)
	if last {
		q.completeRecv(&wc)
	}
}

// takeWrite handles the next packet of a WRITE.
func (q *queuePair) takeWrite(h *wire.BTH, payload []byte) {
	_, last := place(h.Op)
	n := uint32(len(payload))
	left := q.write.Length - q.offset
	if !q.fits(h.Op, len(payload)) || q.write.Length > maxMessage || last && n != left || !last && n >= left {
		q.refuse(wire.NAKInvalid)
		return
	}
	immediate := h.Op == wire.WriteLastImm || h.Op == wire.WriteOnlyImm
	if immediate && q.recvHead == q.recvTail {
		q.peerMustWait()
		return
	}
	if n > 0 {
		// Check the whole message with each packet, because the key may have
		// become invalid.
		q.pd.mu.RLock()
		mem := piece(q.pd.remote, q.write.RKey, q.write.VA, uint64(q.write.Length), rdma.AccessRemoteWrite)
		if mem != nil {
			copy(mem[q.offset:], payload)
		}
		q.pd.mu.RUnlock()
		if mem == nil {
			q.refuse(wire.NAKRemoteAccess)
			return
		}
	}
	q.took(writeMessage, len(payload), last)
	if immediate {
		q.completeRecv(&rdma.WC{Bytes: q.write.Length})
	}
}

// readable reports whether the peer may READ the given memory.
func (q *queuePair) readable(r *wire.RETH) bool {
	if r.Length == 0 {
		return true
	}
	q.pd.mu.RLock()
	defer q.pd.mu.RUnlock()
	return piece(q.pd.remote, r.RKey, r.VA, uint64(r.Length), rdma.AccessRemoteRead) != nil
}

// takeRead handles a new READ request.
func (q *queuePair) takeRead(r wire.RETH, payload int) {
	switch {
	case q.message != noMessage, payload != 0, r.Length > maxMessage, !q.reads.room(q.served):
		q.refuse(wire.NAKInvalid)
		return
	case !q.readable(&r):
		q.refuse(wire.NAKRemoteAccess)
		return
	}
	n := q.packets(r.Length)
	q.reads.insert(readJob{psn: q.expected, left: r})
	q.recent.add(takenRead{q.expected, n, r})
	q.acknowledges(q.expected)
	q.expected += n
	q.msn++
}

// readAgain handles a repeated READ request, or the rest of one. It drops any other
// request with an old sequence number, and any request whose key is gone. An error would
// end the connection, and half of all sequence numbers are old, so a forged request would
// have an easy guess.
func (q *queuePair) readAgain(psn uint64, r wire.RETH) {
	if !q.recent.has(psn, &r, q.mtu) || !q.readable(&r) {
		q.provider.counters.staleReads.Add(1)
		return
	}
	q.reads.drop(psn, psn+q.packets(r.Length))
	q.reads.insert(readJob{psn: psn, left: r, repeated: true})
	q.acknowledges(psn)
}

// acknowledges records that responses from psn on will be sent. Earlier requests then
// need no acknowledgement, and should get none: rdma_rxe interprets it as the end of a
// READ that it has received in part, and as the last response if it has the same sequence
// number.
func (r *responder) acknowledges(psn uint64) {
	if r.ackable <= psn {
		r.ackDue, r.acked, r.unsaid = false, r.ackable, 0
	}
}

// peerMustWait answers a message for which no receive is posted.
func (q *queuePair) peerMustWait() {
	q.provider.counters.rnrNAKsSent.Add(1)
	q.nak, q.nakPSN, q.nakSent, q.gapTop = wire.NAKNotReady|notReadyCode, q.expected, true, q.expected
}

// refuse ends the connection because the peer violated the protocol or its rights.
func (q *queuePair) refuse(s wire.Syndrome) {
	q.provider.counters.fatalNAKsSent.Add(1)
	q.nak, q.nakPSN, q.refused = s, q.expected, s
	q.fail(rdma.WCFlushErr)
	q.id.report(rdma.EventQPFatal, "a request of the peer was refused")
}

// refuseAgain repeats the last NAK, which may have been lost.
func (q *queuePair) refuseAgain(h *wire.BTH) {
	if q.refused != 0 && (h.Op <= wire.ReadRequest || h.Op == wire.SendLastInv || h.Op == wire.SendOnlyInv) &&
		extend(h.PSN, q.nakPSN) >= q.nakPSN {
		q.nak = q.refused
	}
}

// respond sends READ responses and then one acknowledgement for all requests that have
// arrived. It reports whether there is more to send.
func (q *queuePair) respond() (more bool) {
	if q.state != qpReady && q.state != qpFailed {
		return false
	}
	if q.reads.n > 0 && !q.sendResponses() {
		return true
	}
	gap := q.nak == wire.NAKSequence
	if gap {
		q.provider.counters.naksSent.Add(1)
	}
	// A NAK also acknowledges the packets before it. But rdma_rxe ignores a second
	// NAK until it has received an acknowledgement, or until its timer has expired.
	if (q.ackDue && q.nak == 0 || gap && q.ackable > q.acked) && q.state == qpReady {
		q.sendAck(wire.ACK, q.ackable-1)
		q.acked = q.ackable
	}
	if q.nak != 0 {
		q.sendAck(q.nak, q.nakPSN)
	}
	q.nak, q.ackDue = 0, false
	if q.noteDue {
		q.noteDue = false
		q.sendNote()
	}
	return false
}

// sendNote asks the peer to send less.
func (q *queuePair) sendNote() {
	b := q.header(wire.CongestionNote, 0, false)
	wire.SetBECN(b)
	clear(b[wire.BTHLen : wire.BTHLen+wire.NoteLen])
	q.out.add(wire.BTHLen+wire.NoteLen, nil, nil)
}

func (q *queuePair) sendAck(s wire.Syndrome, psn uint64) {
	b := q.header(wire.Acknowledge, psn, false)
	h := wire.AETH{Syndrome: s, MSN: q.msn}
	h.Put(b[wire.BTHLen:])
	q.out.add(wire.BTHLen+wire.AETHLen, nil, nil)
}

// sendResponses answers READs. It returns false if some are left for the next call.
func (q *queuePair) sendResponses() bool {
	q.pd.mu.RLock()
	defer q.pd.mu.RUnlock()
	defer q.send() // while the lock keeps the memory valid
	budget := settlePackets
	done := 0
	for ; done < q.reads.n; done++ {
		if !q.sendResponse(&q.reads.jobs[done], &budget) {
			break
		}
		if q.state != qpReady {
			return true
		}
	}
	q.reads.n = copy(q.reads.jobs[:], q.reads.jobs[done:q.reads.n])
	return q.reads.n == 0
}

// sendResponse answers one READ within the budget. It returns false if the READ is not
// finished.
func (q *queuePair) sendResponse(j *readJob, budget *int) bool {
	var mem []byte
	if j.left.Length > 0 {
		mem = piece(q.pd.remote, j.left.RKey, j.left.VA, uint64(j.left.Length), rdma.AccessRemoteRead)
		if mem == nil && j.repeated {
			q.provider.counters.staleReads.Add(1)
			return true
		}
		if mem == nil {
			q.refuse(wire.NAKRemoteAccess) // the key was revoked in between
			q.nakPSN = j.psn
			return true
		}
	}
	for {
		if *budget == 0 {
			return false
		}
		*budget--
		n := min(q.mtu, len(mem))
		last := n == len(mem)
		op := wire.ReadResponseMid
		switch {
		case last && !j.begun:
			op = wire.ReadResponseOnly
		case last:
			op = wire.ReadResponseLast
		case !j.begun:
			op = wire.ReadResponseFirst
		}
		b := q.header(op, j.psn, false)
		if op != wire.ReadResponseMid {
			h := wire.AETH{Syndrome: wire.ACK, MSN: q.msn}
			h.Put(b[wire.BTHLen:])
		}
		q.out.add(op.HeaderLen(), mem[:n], nil)
		j.begun = true
		j.psn++
		j.left.VA += uint64(n)
		j.left.Length -= uint32(n)
		mem = mem[n:]
		if last {
			return true
		}
	}
}
