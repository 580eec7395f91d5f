package target

import (
	"bytes"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// io carries out an I/O command, as far as that needs no data of the host.
func (q *queue) io(i int) {
	r, cmd := &q.reqs[i], q.command(i)
	ns := q.ctrl.subsystem.namespace(cmd.NSID())
	if ns == nil {
		q.respond(i, 0, nvme.StatusInvalidNamespace|dnr)
		return
	}
	r.ns = ns
	s := ns.access()
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
	case nvme.OpFlush:
		q.respond(i, 0, storeStatus(ns.cfg.Store.Flush()))
	case nvme.OpWriteZeroes:
		err := ns.cfg.Store.WriteZeroes(ns.offset(cmd), int64(cmd.NLB())<<ns.shift)
		if err == nil && q.durable(cmd) {
			err = ns.cfg.Store.Flush()
		}
		q.respond(i, 0, storeStatus(err))
	}
}

// checkIO is the status of a command that is not to be carried out.
func (q *queue) checkIO(r *request, cmd *nvme.Command) nvme.Status {
	op := cmd.Opcode()
	length, ranged := uint64(0), true
	switch op {
	case nvme.OpRead, nvme.OpWrite, nvme.OpCompare:
		length = uint64(cmd.NLB()) << r.ns.shift
	case nvme.OpWriteZeroes:
	case nvme.OpFlush:
		ranged = false
	case nvme.OpDSM:
		// Hosts send whole pages, so more than the ranges is allowed.
		if r.length < cmd.DSMRanges()*nvme.DSMRangeSize {
			return nvme.StatusInvalidSGLDataLength | dnr
		}
		length, ranged = uint64(r.length), false
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
	if r.ns.readOnly.Load() && op != nvme.OpRead && op != nvme.OpCompare && op != nvme.OpFlush {
		return nvme.StatusNamespaceWriteProtected
	}
	return nvme.StatusSuccess
}

func (n *Namespace) within(slba, nlb uint64) bool {
	blocks := n.blocks.Load()
	return slba <= blocks && nlb <= blocks-slba
}

func (n *Namespace) offset(cmd *nvme.Command) int64 { return int64(cmd.SLBA() << n.shift) }

// durable says whether a write has to be on stable media when it completes.
func (q *queue) durable(cmd *nvme.Command) bool { return cmd.FUA() || q.ctrl.cacheOff.Load() }

// read answers a Read: data and completion go out in one post.
func (q *queue) read(i int) {
	r := &q.reqs[i]
	r.data = q.free.take(r.length)
	if _, err := r.ns.cfg.Store.ReadAt(q.bytes(r.data)[:r.length], r.ns.offset(q.command(i))); err != nil {
		q.respond(i, 0, storeStatus(err))
		return
	}
	q.stats.read.Add(uint64(r.length))
	q.transfer(i, rdma.Write, r.length)
	q.respond(i, 0, nvme.StatusSuccess)
}

// finishIO carries out a command whose data is there.
func (q *queue) finishIO(i int) {
	r, cmd := &q.reqs[i], q.command(i)
	var s nvme.Status
	switch cmd.Opcode() {
	case nvme.OpWrite:
		if s = q.write(i); s.OK() && q.durable(cmd) {
			s = storeStatus(r.ns.cfg.Store.Flush())
		}
		q.stats.written.Add(uint64(r.length))
	case nvme.OpCompare:
		s = q.compare(i)
	case nvme.OpDSM:
		s = r.ns.discard(cmd, q.arrived(i))
	}
	q.respond(i, 0, s)
}

func (q *queue) write(i int) nvme.Status {
	r := &q.reqs[i]
	_, err := r.ns.cfg.Store.WriteAt(q.arrived(i)[:r.length], r.ns.offset(q.command(i)))
	return storeStatus(err)
}

func (q *queue) compare(i int) nvme.Status {
	r := &q.reqs[i]
	if q.other == nil {
		q.other = make([]byte, chunkSize)
	}
	off := r.ns.offset(q.command(i))
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

// discard carries out a Dataset Management whose ranges are in data. All ranges
// are checked before the first is discarded.
func (n *Namespace) discard(cmd *nvme.Command, data []byte) nvme.Status {
	if !cmd.DSMDeallocate() {
		return nvme.StatusSuccess // hints
	}
	data = data[:cmd.DSMRanges()*nvme.DSMRangeSize]
	for b := data; len(b) > 0; b = b[nvme.DSMRangeSize:] {
		if _, nlb, slba := nvme.DSMRange(b); !n.within(slba, uint64(nlb)) {
			return nvme.StatusLBAOutOfRange | dnr
		}
	}
	for b := data; len(b) > 0; b = b[nvme.DSMRangeSize:] {
		_, nlb, slba := nvme.DSMRange(b)
		if err := n.cfg.Store.Discard(int64(slba<<n.shift), int64(nlb)<<n.shift); err != nil {
			return storeStatus(err)
		}
	}
	return nvme.StatusSuccess
}
