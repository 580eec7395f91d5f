package target

import (
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

const dnr = nvme.StatusDNR

// begin begins a command. It returns false if the command must wait for chunks, work requests or
// a ring entry; the caller tries again later.
func (q *queuePair) begin(i int) bool {
	r := &q.reqs[i]
	s := q.describe(i)
	need := 0
	switch {
	case q.ctrl == nil:
		need = 1 // for the data of a Connect command; no other command is executed
	case s.OK() && !r.inline:
		need = chunksFor(r.length)
	}
	if q.reserved == len(q.responses) || q.free.find(need) < 0 || need > 0 && q.moves < max(1, int(r.listed)) {
		return false
	}
	faults := &q.target.faults
	if faults.stalled.Load() {
		return false
	}
	q.reserved++
	if !r.judged {
		r.judged = true
		q.stats.commands[q.command(i).Opcode()].Add(1)
		if r.listed > 0 {
			q.stats.lists.Add(1)
		}
		if rules := faults.rules.Load(); rules != nil && q.judge(i, *rules) {
			return true
		}
	} else if r.rule != nil && q.strike(i) { // its delay is over
		return true
	}
	if s.OK() {
		q.execute(i)
	} else {
		q.respond(i, 0, s)
	}
	return true
}

const (
	flagsFused = 0x03
	flagsPSDT  = 0xC0

	segmentType     = 2 // upper half of nvme.SGLType
	lastSegmentType = 3
)

// describe reads the data descriptor of a command.
func (q *queuePair) describe(i int) nvme.Status {
	r, cmd := &q.reqs[i], q.command(i)
	r.addr, r.length, r.key, r.invalidate, r.inline, r.listed = 0, 0, 0, false, false, 0
	if cmd.Flags()&(flagsFused|flagsPSDT) != nvme.PSDTSGL {
		return nvme.StatusInvalidField | dnr
	}
	if addr, length, key, invalidate, ok := cmd.KeyedSGL(); ok {
		r.key, r.invalidate = key, invalidate && length > 0
		if length > uint32(q.target.cfg.MaxTransfer) {
			return nvme.StatusInvalidField | dnr
		}
		r.addr, r.length = addr, length
		return nvme.StatusSuccess
	}
	if offset, size, ok := cmd.LastSegmentSGL(); ok && q.target.cfg.MaxDescriptors > 1 {
		return q.describeList(i, offset, size)
	}
	offset, length, ok := cmd.InCapsuleSGL()
	switch limit := uint64(q.inline); {
	case !ok && nvme.SGLType(cmd[39])>>4 != nvme.SGLKeyed>>4 && nvme.SGLType(cmd[39])>>4 != nvme.SGLInCapsule>>4:
		return nvme.StatusInvalidSGLType | dnr
	case !ok || !nvme.IsWrite(cmd):
		return nvme.StatusInvalidField | dnr
	case offset > limit || uint64(length) > limit-offset:
		return nvme.StatusInvalidSGLOffset | dnr
	case uint64(r.bytes) < nvme.CommandSize+offset+uint64(length):
		return nvme.StatusInvalidSGLDataLength | dnr
	}
	r.addr, r.length, r.inline = offset, length, true
	return nvme.StatusSuccess
}

// describeList reads a list of descriptors in the capsule, size bytes from an offset behind the
// command on. All of them are keyed (Base, "Scatter Gather List (SGL)"; RDMA, "SGL Support"). A key
// that is to be invalidated is for the command's own descriptor only.
func (q *queuePair) describeList(i int, offset uint64, size uint32) nvme.Status {
	r, cfg := &q.reqs[i], &q.target.cfg
	switch limit := uint64(q.inline); {
	case size == 0 || size%nvme.SGLSize != 0:
		return nvme.StatusInvalidSGLSegment | dnr
	case offset > limit || uint64(size) > limit-offset:
		return nvme.StatusInvalidSGLOffset | dnr
	case size/nvme.SGLSize > uint32(cfg.MaxDescriptors):
		return nvme.StatusInvalidSGLCount | dnr
	case uint64(r.bytes) < nvme.CommandSize+offset+uint64(size):
		return nvme.StatusInvalidSGLSegment | dnr
	}
	r.addr = offset
	sum := uint64(0)
	for d := range int(size / nvme.SGLSize) {
		s := q.descriptor(i, d)
		_, length, _, invalidate, keyed := s.Keyed()
		switch t := s.Type() >> 4; {
		case t == segmentType || t == lastSegmentType:
			return nvme.StatusInvalidSGLSegment | dnr // the last segment refers to no other one
		case !keyed || invalidate:
			return nvme.StatusInvalidSGLType | dnr
		}
		sum += uint64(length)
	}
	if sum > uint64(cfg.MaxTransfer) {
		return nvme.StatusInvalidField | dnr
	}
	r.length, r.listed = uint32(sum), uint8(size/nvme.SGLSize)
	return nvme.StatusSuccess
}

// descriptor returns descriptor d of a command's list.
func (q *queuePair) descriptor(i, d int) *nvme.SGL {
	return nvme.SGLAt(q.in.Bytes()[i*q.capsule+nvme.CommandSize+int(q.reqs[i].addr)+d*nvme.SGLSize:])
}

// execute carries out a command. If the command needs data of the host, finish does
// the rest when the data has arrived.
func (q *queuePair) execute(i int) {
	cmd := q.command(i)
	switch {
	case q.ctrl == nil:
		if cmd.Opcode() != nvme.OpFabrics || cmd.FCType() != nvme.FabricsConnect {
			q.respond(i, 0, nvme.StatusInvalidOpcode|dnr)
		} else if q.reqs[i].length != nvme.ConnectDataSize {
			q.respond(i, 0, nvme.StatusInvalidSGLDataLength|dnr)
		} else {
			q.fetch(i, nvme.ConnectDataSize)
		}
	case isAuth(cmd):
		q.authenticate(i)
	case q.unproved.Load():
		q.respond(i, 0, nvme.StatusAuthRequired|dnr)
	case cmd.Opcode() == nvme.OpFabrics:
		q.property(i)
	case !q.ctrl.ready.Load():
		q.respond(i, 0, nvme.StatusCommandSequence|dnr)
	case q.qid == 0:
		q.admin(i)
	default:
		q.io(i)
	}
}

// fetch reads the first length bytes of a command's data from the host, and finishes
// the command when they have arrived.
func (q *queuePair) fetch(i int, length uint32) {
	if q.reqs[i].inline {
		q.finish(i)
		return
	}
	q.reqs[i].data = q.free.take(length)
	q.transfer(i, rdma.Read, length)
}

// finish carries out a command whose data has arrived.
func (q *queuePair) finish(i int) {
	switch {
	case q.ctrl == nil:
		q.connect(i)
	case q.command(i).Opcode() == nvme.OpFabrics:
		q.takeAuth(i)
	default:
		q.finishIO(i)
	}
}

// inlineData returns the in-capsule data of a command.
func (q *queuePair) inlineData(i int) []byte {
	r := &q.reqs[i]
	return q.in.Bytes()[i*q.capsule+nvme.CommandSize+int(r.addr):][:r.length]
}

// arrived returns the data of a command, which was in its capsule or was fetched.
func (q *queuePair) arrived(i int) []byte {
	if q.reqs[i].inline {
		return q.inlineData(i)
	}
	return q.bytes(q.reqs[i].data)
}

// reply completes a command with data, padded with zeroes to length. The length of
// the data descriptor must be the same.
func (q *queuePair) reply(i int, data []byte, length uint64) {
	r := &q.reqs[i]
	if uint64(r.length) != length {
		q.respond(i, 0, nvme.StatusInvalidSGLDataLength|dnr)
		return
	}
	r.data = q.free.take(r.length)
	into := q.bytes(r.data)
	clear(into[copy(into, data):])
	n := r.length
	if r.rule != nil {
		n = uint32(r.rule.falsify(into[:n]))
	}
	q.transfer(i, rdma.Write, n)
	q.respond(i, 0, nvme.StatusSuccess)
}
