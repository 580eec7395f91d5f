// Package sq is the host side of an NVMe submission queue over RDMA (NVMe over RDMA
// transport 1.1). There is no ring in memory that the controller reads. Instead, the
// queue has a slab of registered 64-byte capsules, and each capsule is sent by one
// SEND.
//
// # Slots and command ids
//
// A slot is a capsule with its command id. The id consists of 12 bits of slot number
// and, above them, 4 bits of generation. The generation changes each time the slot is
// taken, so that a late or repeated response does not match the next command. A slot
// is free again when its response has arrived and its SEND is known to be complete.
// Until then the adapter may send the capsule again, and for that it reads it.
//
// # Flow control
//
// At most Depth-1 commands are outstanding. So the controller's submission queue
// cannot overflow, whatever SQHD the controller reports: the entries that it has not
// consumed are among the outstanding commands. SQHD is only checked to be in range.
//
// # Signaling
//
// SENDs complete in order, so one signaled SEND confirms all SENDs before it. One in
// a quarter of the depth is signaled. So is each SEND that carries data from the
// caller's buffer, because the buffer is returned only when the SEND is complete. The
// queue has slots beyond Depth, as many as may wait for such a confirmation, and so
// never runs out of slots while it waits for one.
//
// # Probes
//
// A controller may take any time to answer. So once it has acknowledged the SENDs, a
// slow controller looks the same as one whose queue pair is gone. An RDMA WRITE of no
// bytes tells them apart. The adapter at the other end acknowledges it without
// involving the controller and does not check the key (IBTA vol 1, C9-88). If no
// acknowledgement comes, our queue pair fails when its retries are used up.
//
// # Concurrency
//
// All methods must be called from the one goroutine that owns the queue pair. The
// methods on the data path do not allocate memory.
package sq

import (
	"errors"
	"fmt"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

const (
	capsuleSize = 64
	slotBits    = 12
	slotMask    = 1<<slotBits - 1

	// MaxDepth leaves room in the slot number for the slots that wait for the
	// confirmation of their SEND.
	MaxDepth = 2048
)

// slot states.
const (
	slotFree     = 1 << iota // on the free stack
	slotSent                 // the SEND is complete
	slotAnswered             // the response arrived
	slotData                 // the SEND gathers the caller's data
)

// probeID is the work request id of a probe; no SEND will ever have it.
const probeID = 1<<64 - 1

// Config sizes a Queue.
type Config struct {
	Depth  int // entries as in CREATE/CONNECT, one of which stays empty; 2..MaxDepth
	Vector int // completion vector of the SEND completions
}

// Queue is a submission queue.
type Queue struct {
	qp   rdma.QP
	cq   rdma.CQ
	mr   rdma.MR
	slab []byte
	addr uint64
	lkey uint32

	depth       int
	outstanding int // taken and not answered
	interval    int // SENDs from one signaled one to the next
	unsignaled  int // SENDs since the last signaled one
	held        int // answered slots with data whose SEND is not complete
	probing     bool

	state []uint8
	gen   []uint8
	free  []uint16 // stack
	order []uint16 // slots in the order of their SENDs; a ring, its size a power of two
	first uint64   // sequence number of the oldest SEND not known to be complete
	next  uint64   // sequence number of the next SEND

	batch []rdma.SendWR // not posted yet
	wcs   []rdma.WC
}

// New allocates and registers the capsules and makes the completion queue of
// the SENDs. Bind comes next.
func New(dev rdma.Device, pd rdma.PD, cfg Config) (*Queue, error) {
	if cfg.Depth < 2 || cfg.Depth > MaxDepth {
		return nil, fmt.Errorf("submission queue: depth %d is not 2..%d", cfg.Depth, MaxDepth)
	}
	q := &Queue{depth: cfg.Depth, interval: max(1, cfg.Depth/4)}
	n := q.Slots()
	ring := 1
	for ring < n {
		ring *= 2
	}
	q.state, q.gen = make([]uint8, n), make([]uint8, n)
	q.order = make([]uint16, ring)
	q.free = make([]uint16, 0, n)
	for i := n - 1; i >= 0; i-- {
		q.state[i] = slotFree
		q.free = append(q.free, uint16(i))
	}
	q.batch = make([]rdma.SendWR, 0, n)
	q.wcs = make([]rdma.WC, 32)

	var err error
	if q.mr, err = pd.AllocMR(n*capsuleSize, 0); err != nil {
		return nil, fmt.Errorf("register capsules: %w", err)
	}
	q.slab, q.addr, q.lkey = q.mr.Bytes(), q.mr.Addr(), q.mr.LKey()
	// Every work request of a failed queue pair completes, signaled or not.
	if q.cq, err = dev.CreateCQ(q.WorkRequests()+1, false, cfg.Vector); err != nil {
		return nil, errors.Join(fmt.Errorf("create completion queue of the sends: %w", err), q.mr.Close())
	}
	return q, nil
}

// Slots is the number of slots, and so of SENDs that may be posted.
func (q *Queue) Slots() int { return q.depth + q.interval }

// WorkRequests is how many may be posted, the probe among them: the QP's MaxSendWR.
func (q *Queue) WorkRequests() int { return q.Slots() + 1 }

// CQ is the completion queue to create the QP with.
func (q *Queue) CQ() rdma.CQ { return q.cq }

// Bind gives the queue its QP.
func (q *Queue) Bind(qp rdma.QP) { q.qp = qp }

// Close frees what New made. The QP is to be closed before; an error says that it was
// not, and nothing is freed then. A second Close does nothing, and so do the other
// methods after it, which give rdma.ErrClosed where they can.
func (q *Queue) Close() error {
	if err := q.cq.Close(); err != nil {
		return err
	}
	q.free, q.batch, q.slab = q.free[:0], q.batch[:0], nil
	return q.mr.Close()
}

// Outstanding is the number of commands taken and not answered.
func (q *Queue) Outstanding() int { return q.outstanding }

// Held is the number of answered commands whose data the adapter may still
// read; Reap will name them.
func (q *Queue) Held() int { return q.held }

// Pending is the number of commands pushed and not posted.
func (q *Queue) Pending() int { return len(q.batch) }

// Get takes a slot and gives its command, with arbitrary contents, to fill; the
// command id is set by Push. ok is false while Depth-1 commands are
// outstanding, or no slot is free.
func (q *Queue) Get() (slot uint16, cmd *nvme.Command, ok bool) {
	if q.outstanding >= q.depth-1 || len(q.free) == 0 {
		return 0, nil, false
	}
	last := len(q.free) - 1
	slot = q.free[last]
	q.free = q.free[:last]
	q.outstanding++
	q.state[slot] = 0
	q.gen[slot]++
	at := int(slot) * capsuleSize
	return slot, nvme.CommandAt(q.slab[at : at+capsuleSize]), true
}

// Push adds the slot's command to the batch that Flush posts. A data element
// with a length travels in the capsule, behind the command, gathered from where
// it lies.
func (q *Queue) Push(slot uint16, data rdma.SGE) {
	if q.slab == nil {
		return // closed
	}
	at := int(slot) * capsuleSize
	nvme.CommandAt(q.slab[at : at+capsuleSize]).SetCID(q.commandID(slot))

	n := len(q.batch)
	q.batch = q.batch[:n+1]
	wr := &q.batch[n]
	wr.ID = q.next
	wr.Op = rdma.Send
	wr.SGE[0] = rdma.SGE{Addr: q.addr + uint64(at), Length: capsuleSize, LKey: q.lkey}
	wr.NumSGE = 1
	q.unsignaled++
	wr.Signaled = q.unsignaled >= q.interval
	if data.Length > 0 {
		wr.SGE[1] = data
		wr.NumSGE = 2
		wr.Signaled = true
		q.state[slot] |= slotData
	}
	if wr.Signaled {
		q.unsignaled = 0
	}
	q.order[q.next&uint64(len(q.order)-1)] = slot
	q.next++
}

func (q *Queue) commandID(slot uint16) uint16 { return uint16(q.gen[slot])<<slotBits | slot }

// Flush posts the batch, in one call, and says how many commands that were.
func (q *Queue) Flush() (int, error) {
	if len(q.batch) == 0 {
		return 0, nil
	}
	n, err := q.qp.PostSend(q.batch)
	q.batch = q.batch[:0]
	if err != nil {
		return n, fmt.Errorf("post send: %w", err)
	}
	return n, nil
}

// Probe has the target's adapter say that it is there, if it is not being asked
// already. If it is not, the queue pair fails.
func (q *Queue) Probe() error {
	switch {
	case q.probing:
		return nil
	case q.slab == nil:
		return fmt.Errorf("post probe: %w", rdma.ErrClosed)
	}
	if _, err := q.qp.PostSend([]rdma.SendWR{{ID: probeID, Op: rdma.Write, Signaled: true}}); err != nil {
		return fmt.Errorf("post probe: %w", err)
	}
	q.probing = true
	return nil
}

// Match finds the slot that a response is for. ok is false for an id that
// names no slot, or a command that is not outstanding.
func (q *Queue) Match(cid uint16) (slot uint16, ok bool) {
	slot = cid & slotMask
	if int(slot) >= len(q.state) || q.state[slot]&(slotFree|slotAnswered) != 0 || q.commandID(slot) != cid {
		return 0, false
	}
	return slot, true
}

// CheckHead reports whether a response's SQHD is one that a controller with
// this queue can have.
func (q *Queue) CheckHead(sqhd uint16) bool { return int(sqhd) < q.depth }

// Answer records the response to a slot that Match gave. done says that the
// data is the caller's again; if not, Reap will say it.
func (q *Queue) Answer(slot uint16) (done bool) {
	q.outstanding--
	s := q.state[slot] | slotAnswered
	q.state[slot] = s
	if s&slotSent != 0 {
		q.release(slot)
		return true
	}
	if s&slotData != 0 {
		q.held++
		return false
	}
	return true
}

func (q *Queue) release(slot uint16) {
	q.state[slot] = slotFree
	q.free = q.free[:len(q.free)+1]
	q.free[len(q.free)-1] = slot
}

// Starved says that a command could be outstanding, but every free slot waits for
// the completion of its SEND.
func (q *Queue) Starved() bool { return len(q.free) == 0 && q.outstanding < q.depth-1 }

// Scarce says that Reap is worth a call: the free slots run low, or somebody waits
// for what it tells.
func (q *Queue) Scarce() bool { return q.held > 0 || len(q.free) <= q.interval || q.probing }

// Reap collects completed SENDs: it fills done with slots that were answered
// before and whose data is now the caller's again, and says how many. Call it
// until it gives 0. done has room for at least Slots. An error means that the
// queue pair is lost.
func (q *Queue) Reap(done []uint16) (int, error) {
	if q.slab == nil {
		return 0, fmt.Errorf("poll send completions: %w", rdma.ErrClosed)
	}
	n := 0
	for {
		got, err := q.cq.Poll(q.wcs)
		if err != nil {
			return n, fmt.Errorf("poll send completions: %w", err)
		}
		for i := range q.wcs[:got] {
			wc := &q.wcs[i]
			if wc.Status != rdma.WCSuccess {
				return n, fmt.Errorf("send: %v", wc.Status)
			}
			if wc.ID == probeID {
				q.probing = false
				continue
			}
			if wc.ID < q.first || wc.ID >= q.next {
				return n, fmt.Errorf("send: completion of number %d, expected %d..%d", wc.ID, q.first, q.next)
			}
			for ; q.first <= wc.ID; q.first++ {
				slot := q.order[q.first&uint64(len(q.order)-1)]
				s := q.state[slot] | slotSent
				q.state[slot] = s
				if s&slotAnswered == 0 {
					continue
				}
				if s&slotData != 0 {
					q.held--
					done[n] = slot
					n++
				}
				q.release(slot)
			}
		}
		if got < len(q.wcs) {
			return n, nil
		}
	}
}
