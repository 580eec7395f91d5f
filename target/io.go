package target

import (
	"bytes"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// io carries out an I/O command. If the command needs data of the host, finishIO
// does the rest when the data has arrived.
func (q *queuePair) io(i int) {
	r, cmd := &q.reqs[i], q.command(i)
	ns := q.ctrl.subsystem.namespace(cmd.NSID())
	if ns == nil {
		q.respond(i, 0, nvme.StatusInvalidNamespace|dnr)
		return
	}
	r.ns = ns
	s := ns.access(q.port)
	if s.OK() {
		s = q.checkIO(r, cmd)
	}
	if !s.OK() {
		q.respond(i, 0, s)
		return
	}
	switch cmd.Opcode() {
	case nvme.OpRead:
		q.read(i)
	case nvme.OpWrite, nvme.OpCompare:
		q.fetch(i, r.length)
	case nvme.OpDSM:
		q.fetch(i, cmd.DSMRanges()*nvme.DSMRangeSize)
	case nvme.OpReservationReport:
		q.report(i)
	case nvme.OpReservationRegister, nvme.OpReservationAcquire, nvme.OpReservationRelease:
		q.fetch(i, r.length)
	case nvme.OpFlush:
		q.respond(i, 0, q.flush(i))
	case nvme.OpWriteZeroes:
		s := q.zero(i, (Store).WriteZeroes, cmd.SLBA(), uint64(cmd.NLB()))
		if s.OK() && q.durable(cmd) {
			s = q.flush(i)
		}
		q.respond(i, 0, s)
	}
}

// checkIO checks the fields of an I/O command.
func (q *queuePair) checkIO(r *request, cmd *nvme.Command) nvme.Status {
	op := cmd.Opcode()
	length, ranged := uint64(0), true
	switch op {
	case nvme.OpRead, nvme.OpWrite, nvme.OpCompare:
		length = uint64(cmd.NLB()) << r.ns.shift
	case nvme.OpWriteZeroes:
	case nvme.OpFlush:
		ranged = false
	case nvme.OpDSM:
		// Hosts send whole pages, so there may be more data than ranges.
		if r.length < cmd.DSMRanges()*nvme.DSMRangeSize {
			return nvme.StatusInvalidSGLDataLength | dnr
		}
		length, ranged = uint64(r.length), false
	case nvme.OpReservationReport, nvme.OpReservationRegister, nvme.OpReservationAcquire, nvme.OpReservationRelease:
		length, ranged = reservationLength(cmd), false
	default:
		return nvme.StatusInvalidOpcode | dnr
	}
	if ranged && !r.ns.within(cmd.SLBA(), uint64(cmd.NLB())) {
		return nvme.StatusLBAOutOfRange | dnr
	}
	if length > uint64(q.target.cfg.MaxTransfer) {
		return nvme.StatusInvalidField | dnr
	}
	if uint64(r.length) != length {
		return nvme.StatusInvalidSGLDataLength | dnr
	}
	if r.ns.readOnly.Load() && op != nvme.OpRead && op != nvme.OpCompare && op != nvme.OpFlush && !isReservation(op) {
		return nvme.StatusNamespaceWriteProtected
	}
	return nvme.StatusSuccess
}

func (n *Namespace) within(slba, nlb uint64) bool {
	blocks := n.blocks.Load()
	return slba <= blocks && nlb <= blocks-slba
}

func (n *Namespace) offset(slba uint64) int64 { return int64(slba << n.shift) }

// durable reports whether a write must be on stable media when it completes.
func (q *queuePair) durable(cmd *nvme.Command) bool { return cmd.FUA() || q.ctrl.cacheOff.Load() }

// read carries out a Read. Data and completion are posted together.
func (q *queuePair) read(i int) {
	r, cmd := &q.reqs[i], q.command(i)
	r.data = q.free.take(r.length)
	s := q.enter(i, cmd.SLBA(), uint64(cmd.NLB()))
	if s.OK() {
		_, err := r.ns.cfg.Store.ReadAt(q.bytes(r.data)[:r.length], r.ns.offset(cmd.SLBA()))
		s = storeStatus(err)
		q.exit()
	}
	if s.OK() {
		q.stats.read.Add(uint64(r.length))
		q.transfer(i, rdma.Write, r.length)
	}
	q.respond(i, 0, s)
}

// finishIO carries out an I/O command whose data has arrived.
func (q *queuePair) finishIO(i int) {
	r, cmd := &q.reqs[i], q.command(i)
	var s nvme.Status
	switch cmd.Opcode() {
	case nvme.OpWrite:
		if s = q.write(i); s.OK() && q.durable(cmd) {
			s = q.flush(i)
		}
		if s.OK() {
			q.stats.written.Add(uint64(r.length))
		}
	case nvme.OpCompare:
		s = q.compare(i)
	case nvme.OpDSM:
		s = q.discard(i, q.arrived(i))
	case nvme.OpReservationRegister, nvme.OpReservationAcquire, nvme.OpReservationRelease:
		s = q.reserve(i)
	}
	q.respond(i, 0, s)
}

func (q *queuePair) write(i int) nvme.Status {
	r, cmd := &q.reqs[i], q.command(i)
	if s := q.enter(i, cmd.SLBA(), uint64(cmd.NLB())); !s.OK() {
		return s
	}
	defer q.exit()
	_, err := r.ns.cfg.Store.WriteAt(q.arrived(i)[:r.length], r.ns.offset(cmd.SLBA()))
	return storeStatus(err)
}

func (q *queuePair) flush(i int) nvme.Status {
	if s := q.enter(i, 0, 0); !s.OK() {
		return s
	}
	defer q.exit()
	return storeStatus(q.reqs[i].ns.cfg.Store.Flush())
}

func (q *queuePair) compare(i int) nvme.Status {
	r, cmd := &q.reqs[i], q.command(i)
	if q.other == nil {
		q.other = make([]byte, chunkSize)
	}
	if s := q.enter(i, cmd.SLBA(), uint64(cmd.NLB())); !s.OK() {
		return s
	}
	defer q.exit()
	off := r.ns.offset(cmd.SLBA())
	for data := q.arrived(i)[:r.length]; len(data) > 0; {
		other := q.other[:min(len(data), len(q.other))]
		if _, err := r.ns.cfg.Store.ReadAt(other, off); err != nil {
			return storeStatus(err)
		}
		if !bytes.Equal(data[:len(other)], other) {
			return nvme.StatusCompareFailed | dnr
		}
		data, off = data[len(other):], off+int64(len(other))
	}
	return nvme.StatusSuccess
}

// discard executes a Dataset Management command whose ranges are in data. It checks all
// ranges before it discards the first one.
func (q *queuePair) discard(i int, data []byte) nvme.Status {
	ns, cmd := q.reqs[i].ns, q.command(i)
	if !cmd.DSMDeallocate() {
		return nvme.StatusSuccess // all other attributes are hints
	}
	data = data[:cmd.DSMRanges()*nvme.DSMRangeSize]
	for b := data; len(b) > 0; b = b[nvme.DSMRangeSize:] {
		if _, nlb, slba := nvme.DSMRange(b); !ns.within(slba, uint64(nlb)) {
			return nvme.StatusLBAOutOfRange | dnr
		}
	}
	for b := data; len(b) > 0; b = b[nvme.DSMRangeSize:] {
		_, nlb, slba := nvme.DSMRange(b)
		if s := q.zero(i, (Store).Discard, slba, uint64(nlb)); !s.OK() {
			return s
		}
	}
	return nvme.StatusSuccess
}

// zero discards or zeroes blocks in pieces. It stops between two pieces if the queue or
// the namespace ends.
func (q *queuePair) zero(i int, zero func(s Store, off, length int64) error, slba, nlb uint64) nvme.Status {
	ns := q.reqs[i].ns
	for {
		n := min(nlb, maxPiece>>ns.shift)
		if q.stopped.Load() {
			return nvme.StatusAbortedSQDeletion
		}
		if s := q.enter(i, slba, n); !s.OK() {
			return s
		}
		err := zero(ns.cfg.Store, ns.offset(slba), int64(n)<<ns.shift)
		q.exit()
		if err != nil {
			return storeStatus(err)
		}
		if slba, nlb = slba+n, nlb-n; nlb == 0 {
			return nvme.StatusSuccess
		}
	}
}
