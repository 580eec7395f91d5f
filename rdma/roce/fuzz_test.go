package roce

import (
	"bytes"
	"context"
	"encoding/binary"
	"net/netip"
	"os"
	"testing"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// The fuzz targets below are peers that may send anything. The input determines their
// packets. The results must be legal at every step.

const (
	fuzzMTU   = 256
	fuzzSlot  = 1024 // bytes of a receive, or of the memory of a work request
	fuzzSlots = 8
	fuzzArea  = fuzzSlots * fuzzSlot
)

// specimen is a queue pair without a network, surrounded by memory that must not be
// accessed.
type specimen struct {
	t testing.TB
	e *end // e.mr is what the peer has a key of
	q *queuePair
	// private has receives in its first area, the destinations of READs in the
	// second, and the sources of SENDs and WRITEs in the third. The peer has no right
	// to it.
	private rdma.MR
	foreign rdma.MR // of another domain, with all rights
	images  [3][]byte

	posted, completed uint64 // sends
	waiting, done     []int  // slots of receives that are posted, and that are not
	wcs               [16]rdma.WC
}

// fuzzHost returns a provider with an address that only this process has, because fuzzing
// uses several processes.
func fuzzHost(f *testing.F, network byte) (*Provider, netip.Addr) {
	pid := os.Getpid()
	addr := netip.AddrFrom4([4]byte{127, network, byte(pid >> 8), byte(pid)})
	return open(f, Config{Addrs: []netip.Addr{addr}, MaxRequestRate: 1 << 30, MaxRequestRatePerSource: 1 << 30}), addr
}

func newSpecimen(t testing.TB, host *Provider, addr netip.Addr) *specimen {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	id, err := host.Resolve(ctx, netip.Addr{}, netip.AddrPortFrom(addr, 1), -1)
	check(t, err)
	s := &specimen{t: t, e: newEnd(t, id, 2*fuzzSlots, fuzzArea, false)}
	s.private, err = s.e.pd.AllocMR(3*fuzzArea, rdma.AccessLocalWrite)
	check(t, err)
	other, err := id.Device().AllocPD()
	check(t, err)
	s.foreign, err = other.AllocMR(fuzzArea, allAccess)
	check(t, err)
	t.Cleanup(func() {
		for _, c := range []interface{ Close() error }{s.foreign, other, s.private} {
			check(t, c.Close())
		}
	})
	for i, mr := range []rdma.MR{s.e.mr, s.private, s.foreign} {
		for j := range mr.Bytes() {
			mr.Bytes()[j] = byte(j*7 + j>>8 + i*31)
		}
		s.images[i] = bytes.Clone(mr.Bytes())
	}
	s.q = s.e.queuePair()
	s.q.ready(connected{dest: s.q.num, mtu: fuzzMTU, sendPSN: 0xfffffe, recvPSN: 0xfffffd, retries: 7, notReadyRetries: 7, readDepth: 2, readsServed: 2})
	host.endpoints[0].removeQP(s.q) // what it sends, to itself, is not for it
	for i := range fuzzSlots {
		s.receive(i)
	}
	return s
}

func (s *specimen) sge(area, slot, n int) rdma.SGE {
	return rdma.SGE{Addr: s.private.Addr() + uint64(area*fuzzArea+slot*fuzzSlot), Length: uint32(n), LKey: s.private.LKey()}
}

func (s *specimen) receive(slot int) {
	s.waiting = append(s.waiting, slot)
	_, err := s.e.qp.PostRecv([]rdma.RecvWR{{ID: uint64(slot), SGE: s.sge(0, slot, fuzzSlot)}})
	check(s.t, err)
}

// packet passes a packet to the queue pair in the way of the endpoint.
func (s *specimen) packet(op wire.Opcode, psn uint64, ext []byte, payload []byte) {
	p := request(op, s.q.num, psn&0xffffff, wire.RETH{}, payload)
	copy(p[wire.BTHLen:op.HeaderLen()], ext)
	h, payload, ok := wire.Parse(p)
	if !ok {
		s.t.Fatalf("not a packet: %x", p)
	}
	s.q.receive(&h, p, payload, len(ext) > 0 && ext[0]&1 != 0)
	s.q.settle()
}

// poll takes completions, which must be in order.
func (s *specimen) poll() {
	s.t.Helper()
	for _, cq := range []rdma.CQ{s.e.sendCQ, s.e.recvCQ} {
		for {
			n, err := cq.Poll(s.wcs[:])
			check(s.t, err)
			if n == 0 {
				break
			}
			for _, wc := range s.wcs[:n] {
				s.completion(&wc)
			}
		}
	}
}

func (s *specimen) completion(wc *rdma.WC) {
	s.t.Helper()
	switch {
	case wc.Recv:
		if len(s.waiting) == 0 || wc.ID != uint64(s.waiting[0]) || wc.Bytes > fuzzSlot {
			s.t.Fatalf("receive %d of %d bytes, want one of %d", wc.ID, wc.Bytes, s.waiting)
		}
		s.done = append(s.done, s.waiting[0])
		s.waiting = s.waiting[1:]
	case wc.ID >= s.posted || wc.ID < s.completed:
		s.t.Fatalf("completion of send %d of %d..%d", wc.ID, s.completed, s.posted)
	default:
		s.completed = wc.ID + 1
	}
}

func (s *specimen) state() qpState {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	return s.q.state
}

// legal checks the state of both halves.
func (s *specimen) legal() {
	s.t.Helper()
	q := s.q
	q.mu.Lock()
	defer q.mu.Unlock()
	bad := func(what string) {
		s.t.Helper()
		s.t.Fatalf("%s: state %d, send queue %d ≤ %d ≤ %d, sequence %d ≤ %d ≤ %d ≤ %d, window %d, expected %d, receives %d ≤ %d, %+v",
			what, q.state, q.head, q.cur, q.tail, q.una, q.nxt, q.top, q.requester.end, q.window, q.expected, q.recvHead, q.recvTail, q.reads)
	}
	switch {
	case q.state != qpReady && q.state != qpFailed:
		bad("state")
	case q.head > q.cur || q.cur > q.tail || q.tail-q.head > uint64(len(q.sendQ)):
		bad("send queue")
	case q.una > q.nxt || q.nxt > q.top || q.top > q.requester.end:
		bad("sequence numbers")
	case q.window < 2 || q.window > maxWindow:
		bad("window")
	case q.asking.n < 0 || q.asking.n > q.depth:
		bad("READs asked for")
	case q.recvHead > q.recvTail || q.recvTail-q.recvHead > uint64(len(q.recvQ)):
		bad("receive queue")
	case q.reads.n < 0 || q.reads.n > maxReadAtomic || q.state != qpReady && q.reads.n > 0:
		bad("READs to answer")
	case q.message > writeMessage:
		bad("message")
	case q.state == qpFailed && (q.head != q.tail || q.recvHead != q.recvTail):
		bad("not flushed")
	}
	if q.state != qpReady {
		return
	}
	if q.head < q.tail {
		if e := q.entry(q.head); q.una < e.psn || q.una >= e.psn+e.n {
			bad("una is not in the oldest work request")
		}
	} else if q.una != q.requester.end {
		bad("una is not at the end")
	}
	if q.cur < q.tail {
		if e := q.entry(q.cur); q.nxt < e.psn || q.nxt >= e.psn+e.n {
			bad("nxt is not in the current work request")
		}
	}
}

// untouched checks that memory is unchanged, except for [from, to).
func (s *specimen) untouched(i int, mr rdma.MR, from, to int) {
	s.t.Helper()
	if b, want := mr.Bytes(), s.images[i]; !bytes.Equal(b[:from], want[:from]) || !bytes.Equal(b[to:], want[to:]) {
		s.t.Fatalf("memory of region %d outside %d..%d has changed", i, from, to)
	}
}

// take cuts n bytes off the input. After the end of the input it returns zeros.
func take(in *[]byte, n int) []byte {
	b := make([]byte, n)
	*in = (*in)[copy(b, *in):]
	return b
}

var requestOps = []wire.Opcode{
	wire.SendFirst, wire.SendMiddle, wire.SendLast, wire.SendLastImm, wire.SendOnly, wire.SendOnlyImm,
	wire.WriteFirst, wire.WriteMiddle, wire.WriteLast, wire.WriteLastImm, wire.WriteOnly, wire.WriteOnlyImm,
	wire.ReadRequest, wire.SendLastInv, wire.SendOnlyInv, wire.CongestionNote, wire.DatagramSendOnly,
}

// FuzzResponder is a peer that sends requests. Six bytes of the input determine one
// request: its opcode, the distance of its sequence number from the expected one, its
// length, the length of its message, and its target.
func FuzzResponder(f *testing.F) {
	host, addr := fuzzHost(f, 1)
	f.Add([]byte{4, 0, 64, 0, 0, 0, 4, 0, 0, 0, 0, 0})                                                         // SENDs
	f.Add([]byte{0, 0, 128, 0, 0, 0, 1, 0, 128, 0, 0, 0, 2, 0, 10, 0, 0, 0})                                   // in parts
	f.Add([]byte{6, 0, 128, 150, 0, 0, 8, 0, 22, 0, 0, 0, 10, 0, 64, 64, 0, 0})                                // WRITEs
	f.Add([]byte{12, 0, 0, 200, 0, 0, 12, 255, 0, 72, 128, 0, 12, 253, 0, 200, 0, 0})                          // READ, and again
	f.Add([]byte{10, 5, 4, 4, 0, 0, 10, 0, 4, 4, 0, 0, 10, 251, 4, 4, 0, 0})                                   // out of sequence
	f.Add([]byte{10, 0, 4, 4, 0, 1, 10, 0, 4, 4, 0, 0})                                                        // wrong key
	f.Add([]byte{14, 0, 4, 4, 0, 0, 4, 0, 4, 0, 0, 0})                                                         // invalidate
	f.Add([]byte{12, 0, 0, 4, 0, 2, 10, 0, 4, 255, 0, 3, 12, 0, 0, 255, 255, 0})                               // private, foreign, beyond
	f.Add([]byte{4, 0, 4, 0, 0, 0, 4, 0, 4, 0, 0, 0, 4, 0, 4, 0, 0, 0, 5, 0, 4, 0, 0, 0x80, 9, 0, 4, 0, 0, 0}) // no receives
	f.Add([]byte{10, 0, 60, 60, 127, 0})                                                                       // beyond the end
	f.Add([]byte{12, 0, 0, 100, 127, 0})                                                                       // READ beyond the end
	f.Add([]byte{10, 0, 4, 4, 0, 2})                                                                           // private
	f.Add([]byte{12, 0, 0, 4, 0, 6, 10, 0, 4, 4, 0, 6})                                                        // by its local key
	f.Fuzz(func(t *testing.T, in []byte) {
		s := newSpecimen(t, host, addr)
		mayWrite := false
		for steps := 0; len(in) > 0 && steps < 200; steps++ {
			b := take(&in, 6)
			op := requestOps[int(b[0])%len(requestOps)]
			before := s.e.expected()
			psn := before + uint64(int64(int8(b[1])))
			if b[5]&0x40 != 0 {
				psn += 1 << 22
			}
			r := wire.RETH{VA: s.e.mr.Addr() + uint64(b[4])<<6, RKey: s.e.mr.RKey(), Length: uint32(b[3]) * 2}
			switch b[5] & 7 {
			case 1:
				r.RKey++
			case 2:
				r.RKey, r.VA = s.private.RKey(), s.private.Addr()+fuzzArea
			case 3:
				r.RKey, r.VA = s.foreign.RKey(), s.foreign.Addr()
			case 4:
				r.Length = uint32(b[3])<<24 | uint32(b[4])
			case 5:
				r.VA = ^uint64(0) - uint64(b[4])
			case 6:
				r.RKey = s.private.LKey()
			}
			if op >= wire.WriteFirst && op <= wire.WriteOnlyImm && r.RKey == s.e.mr.RKey() {
				mayWrite = true
			}
			ext := make([]byte, wire.RETHLen+wire.ImmLen)
			if op == wire.SendOnlyInv || op == wire.SendLastInv {
				binary.BigEndian.PutUint32(ext, r.RKey)
			} else {
				r.Put(ext)
			}
			alive := s.state() == qpReady
			s.packet(op, psn, ext[:op.HeaderLen()-wire.BTHLen], make([]byte, min(2*int(b[2]), fuzzMTU+8)))
			if op == wire.ReadRequest && alive && psn == before && r.RKey != s.e.mr.RKey() && r.Length > 0 && s.state() == qpReady {
				t.Fatalf("a READ with key %#x was taken", r.RKey)
			}
			s.poll()
			if b[5]&0x80 == 0 && s.state() == qpReady { // receives come back
				for _, slot := range s.done {
					s.receive(slot)
				}
				s.done = s.done[:0]
			}
			s.legal()
			if after := s.e.expected(); after < before || after > before && psn != before {
				t.Fatalf("packet %d: expected %d, then %d", psn, before, after)
			}
			s.untouched(1, s.private, 0, fuzzArea)
			s.untouched(2, s.foreign, 0, 0)
			if !mayWrite {
				s.untouched(0, s.e.mr, 0, 0)
			}
			if s.e.mr.RKey() == 0 || piece(s.q.pd.remote, s.e.mr.RKey(), s.e.mr.Addr(), fuzzArea, 0) == nil {
				t.Fatal("the peer has ended a key")
			}
		}
	})
}

// FuzzRequester is a peer that answers. Four bytes of the input determine an answer, a
// work request to be answered, or a passage of time.
func FuzzRequester(f *testing.F) {
	host, addr := fuzzHost(f, 3)
	f.Add([]byte{0, 100, 0, 0, 8, 0, 0, 0})                                        // SEND, ACK
	f.Add([]byte{2, 255, 0, 0, 10, 0, 0, 0, 11, 1, 0, 0, 12, 1, 0, 0})             // READ, responses
	f.Add([]byte{2, 255, 0, 0, 1, 255, 1, 0, 0, 9, 2, 0, 8, 4, 0, 0, 10, 0, 0, 0}) // mixed, early ACK
	f.Add([]byte{1, 255, 0, 0, 9, 0, 0, 0, 9, 0, 32, 0, 14, 0, 0, 0, 8, 3, 0, 0})  // NAKs
	f.Add([]byte{1, 255, 0, 0, 9, 0, 0x62, 0})                                     // refused
	f.Add([]byte{3, 8, 0, 0, 13, 0, 0, 0, 13, 0, 0, 0, 13, 0, 0, 0, 15, 0, 0, 0})  // time, congestion
	f.Add([]byte{1, 10, 0, 0, 1, 10, 0, 0, 11, 1, 0, 0, 8, 1, 0, 0})               // response to a WRITE
	f.Add([]byte{4, 10, 0, 0, 8, 0, 0, 0, 0, 20, 0, 0, 5, 1, 0, 0, 8, 1, 0, 0})    // probe, bad key
	f.Add([]byte{2, 255, 0, 0, 10, 0, 0, 0, 10, 1, 0, 0, 10, 0, 0, 0})             // a response is missing
	f.Fuzz(func(t *testing.T, in []byte) {
		s := newSpecimen(t, host, addr)
		reads := map[uint64]readUnderTest{}
		for steps := 0; len(in) > 0 && steps < 200; steps++ {
			b := take(&in, 4)
			q := s.q
			q.mu.Lock()
			una := q.una
			q.mu.Unlock()
			psn := una + uint64(int64(int8(b[1])))
			switch what := b[0] % 16; what {
			case 0, 1, 2, 3, 5:
				s.post(what, b, reads)
			case 4:
				q.probe()
			case 6:
				q.peerMayBeReady()
			case 7:
				s.packet(wire.Acknowledge, psn, []byte{b[2], 0, 0, 0}, nil)
			case 8:
				s.packet(wire.Acknowledge, psn, []byte{byte(wire.ACK), 0, 0, b[2]}, nil)
			case 9:
				s.packet(wire.Acknowledge, psn, []byte{b[2] | byte(wire.NAKSequence), 0, 0, 0}, nil)
			case 10, 11, 12:
				ops := []wire.Opcode{wire.ReadResponseFirst, wire.ReadResponseMid, wire.ReadResponseLast, wire.ReadResponseOnly}
				n := fuzzMTU
				if want := s.awaits(psn); want >= 0 && b[2]&0x80 == 0 {
					n = want
				} else if b[2]&0x40 != 0 {
					n = int(b[3])
				}
				payload := bytes.Repeat([]byte{byte(psn)}, n)
				op := ops[int(b[2])%len(ops)]
				s.packet(op, psn, make([]byte, op.HeaderLen()-wire.BTHLen), payload)
			case 13:
				q.tick()
			case 14:
				s.packet(wire.Acknowledge, psn, []byte{byte(wire.NAKNotReady) | 1, 0, 0, 0}, nil)
			case 15:
				s.packet(wire.CongestionNote, 0, make([]byte, wire.NoteLen), nil)
			}
			s.pollReads(reads)
			s.legal()
			s.untouched(0, s.e.mr, 0, 0)
			s.untouched(1, s.private, fuzzArea, 2*fuzzArea)
			s.untouched(2, s.foreign, 0, 0)
		}
		check(t, s.e.qp.Fail())
		s.pollReads(reads)
		s.legal()
	})
}

// readUnderTest is a READ with its destination and the sequence number of each packet.
type readUnderTest struct {
	slot int
	n    int
	psn  uint64
}

// post posts a work request. Every fourth one is not signaled.
func (s *specimen) post(what byte, b []byte, reads map[uint64]readUnderTest) {
	q := s.q
	id := s.posted
	slot, n := int(id%fuzzSlots), min(int(b[1])*4, fuzzSlot)
	wr := rdma.SendWR{ID: id, NumSGE: 1, Signaled: b[2]&3 != 3, RemoteAddr: 1 << 20, RKey: 7, SGE: [2]rdma.SGE{s.sge(2, slot, n)}}
	switch what {
	case 0:
		wr.Op = rdma.Send
	case 1:
		wr.Op = rdma.Write
	case 2:
		wr.Op, wr.SGE[0], wr.Signaled = rdma.Read, s.sge(1, slot, n), true
	case 3:
		wr.Op = rdma.SendInvalidate
	case 5:
		wr.Op = rdma.Send
		wr.SGE[0].LKey += uint32(b[1]) // wrong, unless 0
	}
	q.mu.Lock()
	psn := q.requester.end
	q.mu.Unlock()
	for _, r := range reads { // one READ at a time into a slot
		if r.slot == slot && what == 2 {
			return
		}
	}
	if k, _ := s.e.qp.PostSend([]rdma.SendWR{wr}); k == 1 { // it may be full
		s.posted++
		if what == 2 {
			reads[id] = readUnderTest{slot, n, psn}
		}
	}
}

// awaits returns the number of bytes that the response with this sequence number must
// have, or -1 if it is not a response.
func (s *specimen) awaits(psn uint64) int {
	q := s.q
	q.mu.Lock()
	defer q.mu.Unlock()
	for pos := q.head; pos < q.tail; pos++ {
		if e := q.entry(pos); psn >= e.psn && psn < e.psn+e.n && e.wr.Op == rdma.Read {
			return min(fuzzMTU, int(e.length)-int(psn-e.psn)*fuzzMTU)
		}
	}
	return -1
}

// pollReads is poll for a requester. A READ that succeeded has brought all requested
// data.
func (s *specimen) pollReads(reads map[uint64]readUnderTest) {
	s.t.Helper()
	for {
		n, err := s.e.sendCQ.Poll(s.wcs[:])
		check(s.t, err)
		if n == 0 {
			break
		}
		for _, wc := range s.wcs[:n] {
			s.completion(&wc)
			r, ok := reads[wc.ID]
			delete(reads, wc.ID)
			if !ok || wc.Status != rdma.WCSuccess {
				continue
			}
			at := fuzzArea + r.slot*fuzzSlot
			for i, got := range s.private.Bytes()[at : at+r.n] {
				if want := byte(r.psn + uint64(i/fuzzMTU)); got != want {
					s.t.Fatalf("READ %d: byte %d is %#x, want %#x", wc.ID, i, got, want)
				}
			}
		}
	}
	s.poll()
}

// FuzzManage passes messages that are cut out of the input to the connection manager,
// without a network, for an ID in any state and a listener. Whatever the messages are,
// nothing of them is left when the ID and the requests are closed.
func FuzzManage(f *testing.F) {
	host, addr := fuzzHost(f, 2)
	p := host.endpoints[0]
	const service = 4420
	l, err := p.listen(netip.AddrPortFrom(addr, service), addr, 8)
	check(f, err)
	f.Cleanup(func() { check(f, l.Close()) })
	asked := wire.Request{
		Port: service, GUID: 77, QPN: 99, PSN: 1, ResponderResources: 1, InitiatorDepth: 1, MTU: 1024,
		Source: addr, Destination: addr, SourcePort: 1,
	}
	for state := range byte(idEnded) {
		f.Add(state, []byte{0, 1, 1, 0, 3, 0, 0, 4, 0, 0, 6, 0, 0})
		f.Add(state|0x80, []byte{0, 0, 1, 0, 0, 0, 0, 2, 4, 1, 1, 0, 0, 5, 1, 1, 0, 0})
	}
	f.Fuzz(func(t *testing.T, state byte, in []byte) {
		made, err := host.Resolve(t.Context(), netip.Addr{}, netip.AddrPortFrom(addr, service), -1)
		check(t, err)
		e := newEnd(t, made, 8, 4096, false)
		id := made.(*connID)
		p.mu.Lock()
		id.state, id.passive = idIdle+idState(state&0x7f)%idEnded, state&0x80 != 0
		id.peerComm, id.peerQPN, id.peerGUID, id.last = 7, 99, 77, wire.NewMAD(wire.RTU, 1, id.comm, 7)
		id.tid, id.listener, id.asking = 1, l, wire.NewMAD(wire.REQ, 1, id.comm, 0)
		if id.halfOpen() {
			p.begin(id, strangersShare)
		}
		p.mu.Unlock()
		if id.state > idRequested {
			e.queuePair().ready(connected{dest: 99, mtu: 1024})
		}
		// Message, receiver, sender, and a byte that is changed
		for ; len(in) >= 5; in = in[5:] {
			var ids [2]uint32
			for i, known := range []uint32{id.comm, id.peerComm} {
				switch in[1+i] {
				case 0:
					ids[i] = known
				case 1:
				default:
					ids[i] = uint32(in[1+i])
				}
			}
			m := wire.NewMAD(wire.REQ+wire.Attribute(in[0]%7), 1, ids[1], ids[0])
			switch m.Attribute() {
			case wire.REQ:
				asked.Put(m)
			case wire.DREQ:
				m.SetQPN(id.qp.num)
			}
			if in[3] != 0 {
				m[24+8+int(in[3])%(wire.MADLen-32)] = in[4]
			}
			p.manage(m, netip.AddrPortFrom(addr, testPort), addr)
		}
		check(t, id.Close())
		for came := l.take(); came != nil; came = l.take() {
			check(t, came.Close())
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.ids)+len(p.byPeer)+len(p.byQP)+len(p.handshakes.open)+p.handshakes.ending != 0 {
			t.Fatalf("left: %d ids, %d by peer, %d by queue pair, %d half open", len(p.ids), len(p.byPeer), len(p.byQP), len(p.handshakes.open))
		}
		for _, farewell := range p.farewells {
			p.farewellDone(farewell, "") // its answer is another test's
		}
	})
}
