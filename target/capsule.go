package target

import (
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// receive queues receive buffer i for posting.
func (q *queuePair) receive(i int) {
	q.recvs = append(q.recvs, rdma.RecvWR{ID: kindRecv | uint64(i), SGE: rdma.SGE{
		Addr: q.in.Addr() + uint64(i*q.capsule), Length: uint32(q.capsule), LKey: q.in.LKey(),
	}})
}

// command returns the command in receive buffer i.
func (q *queuePair) command(i int) *nvme.Command {
	return nvme.CommandAt(q.in.Bytes()[i*q.capsule:])
}

// advance moves the head of the submission queue by one command.
func (q *queuePair) advance() {
	if q.sqSize > 0 && !q.noFlow {
		if q.sqHead++; q.sqHead >= q.sqSize {
			q.sqHead = 0
		}
	}
}

// reportedHead returns the submission queue head for a completion.
func (q *queuePair) reportedHead() uint16 {
	if q.noFlow {
		return 0xFFFF
	}
	return q.sqHead
}

// completion takes the next entry of the ring of completions, which is at offset at
// of q.out, and returns the SEND for it. The caller has reserved the entry. What the command holds is
// free when the SEND is confirmed.
func (q *queuePair) completion(holds response) (wr rdma.SendWR, at int) {
	pos := int(q.posted % uint64(len(q.responses)))
	q.posted++
	q.responses[pos] = holds
	at = pos * nvme.CompletionSize
	return rdma.SendWR{
		ID: kindSend | uint64(pos), Op: rdma.Send, Signaled: q.signaled(), NumSGE: 1,
		SGE: [2]rdma.SGE{{Addr: q.out.Addr() + uint64(at), Length: nvme.CompletionSize, LKey: q.out.LKey()}},
	}, at
}

// lazyLimit is the largest number of SENDs in a row of which at most the last one
// is signaled.
const lazyLimit = 8

// signaled reports whether the SEND of the next completion is signaled. Its work
// completion confirms all completions before it too, and frees their chunks, work requests and ring
// entries. So it may be unsignaled only while there are enough of each for any
// command.
func (q *queuePair) signaled() bool {
	q.lazy++
	cfg := &q.target.cfg
	enough := q.free.find(chunksFor(uint32(cfg.MaxTransfer))) >= 0 && q.moves >= cfg.MaxDescriptors && q.reserved < len(q.responses)/2
	if q.lazy < lazyLimit && enough {
		return false
	}
	q.lazy = 0
	return true
}

// respond completes a command. It keeps the command's chunks until the SEND is
// confirmed, because the RDMA WRITE before it may still read them.
func (q *queuePair) respond(i int, result uint64, s nvme.Status) {
	r := &q.reqs[i]
	cmd := q.command(i)
	if !s.OK() {
		q.stats.errors.Add(1)
		if q.ctrl != nil {
			q.ctrl.errors.add(q.qid, cmd, s)
		}
	}
	if r.corrupt == CorruptLost {
		q.drop(i)
		return
	}
	q.advance()
	wr, at := q.completion(response{r.data, r.moves})
	done := nvme.CompletionAt(q.out.Bytes()[at:])
	done.Set(result, q.reportedHead(), cmd.CID(), s)
	if r.invalidate {
		wr.Op, wr.RKey = rdma.SendInvalidate, r.key
	}
	if r.corrupt != CorruptNone {
		q.corrupt(r, &wr, done)
	}
	q.answers = append(q.answers, wr)
	q.done(i)
}

// done clears a command and queues its receive buffer for posting.
func (q *queuePair) done(i int) {
	q.reqs[i] = request{}
	q.receive(i)
}

// drop ends a command without a completion.
func (q *queuePair) drop(i int) {
	q.advance()
	q.free.flip(q.reqs[i].data)
	q.moves += int(q.reqs[i].moves)
	q.reserved--
	q.done(i)
}

// confirm frees the chunks, the work requests and the ring entries of all completions up to the one at
// index pos of the ring. SENDs complete in order.
func (q *queuePair) confirm(pos int) {
	for at := -1; at != pos; q.confirmed++ {
		at = int(q.confirmed % uint64(len(q.responses)))
		r := &q.responses[at]
		q.free.flip(r.data)
		q.moves += int(r.moves)
		*r = response{}
		q.reserved--
	}
}
