// Package sq is the host side of an NVMe submission queue over RDMA (NVMe over RDMA
// transport 1.1). There is no ring in memory that the controller reads. Instead, the
// queue has a slab of registered capsules, and each capsule is sent by one SEND. A capsule is a
// command of 64 bytes, with room behind it for a list of descriptors if the queue has such commands.
//
// # Slots and command ids
//
// A slot is a capsule with its command id. The id consists of 12 bits of slot number
// and, above them, 4 bits of generation. The generation changes each time the slot is
// taken, so that a late or repeated response does not match the next command. A slot
// is free again when its response has arrived and its SEND is known to be complete,
// because until then the SEND occupies a work request of the queue pair.
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
// a quarter of the depth is signaled. The queue has slots beyond Depth, as many as may
// wait for such a confirmation, and so never runs out of slots while it waits for one.
//
// # Data in capsules
//
// The caller may change the data of a capsule as soon as the response has arrived,
// although the SEND may still be incomplete. The controller has answered, so its adapter
// has received the whole SEND: it completes the receive only with the last packet
// (IBTA vol 1, 9.7.5.1.1 and 9.9.2). If the acknowledgement was lost, our adapter sends
// packets again, from the changed memory. Their sequence numbers are those of packets
// that were received, and the adapter at the other end acknowledges and drops such a
// duplicate of a SEND (9.7.5.1.2). Until then the memory must stay registered, because our
// adapter fails the queue pair if it cannot read it. Mark and Confirmed tell when that is.
//
// # Lists of descriptors
//
// The data of a command can be in several places, which a list in its capsule names (PushList). The list
// belongs to the slot like the command, so nothing has to wait for its SEND.
//
// # Probes
//
// A controller may take any time to answer. So once it has acknowledged the SENDs, a
// slow controller looks the same as one whose queue pair is gone. An RDMA WRITE of no
// bytes tells them apart. The adapter at the other end acknowledges it without
// involving the controller and does not check the key (IBTA vol 1, C9-88). If no
// acknowledgement comes, our queue pair fails when its retries are used up. The completion
// of a probe also confirms the SENDs before it.
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
	slotBits = 12
	slotMask = 1<<slotBits - 1

	// MaxDepth leaves room in the slot number for the slots that wait for the
	// confirmation of their SEND.
	MaxDepth = 2048

	// MaxDescriptors is the largest number of descriptors in the list of a command.
	MaxDescriptors = 255
)

// Slot states
const (
	slotFree     = 1 << iota // on the free stack
	slotSent                 // the SEND has completed
	slotAnswered             // the response has arrived
)

// probeID is the work request id of a probe. No SEND ever has it.
const probeID = 1<<64 - 1

// Config configures a Queue.
type Config struct {
	Depth       int // entries as in CREATE/CONNECT, one of which stays empty; 2..MaxDepth
	Vector      int // completion vector of the SEND completions
	Descriptors int // descriptors in the list of a command, 0..MaxDescriptors; 0: no command has a list
}

// Queue is a submission queue.
type Queue struct {
	qp   rdma.QP
	cq   rdma.CQ
	mr   rdma.MR
	slab []byte
	addr uint64
	lkey uint32
	size int // of a capsule in the slab, in bytes

	depth       int
	outstanding int    // commands taken and not answered
	interval    int    // number of SENDs from one signaled SEND to the next
	unsignaled  int    // number of SENDs since the last signaled one
	probing     bool   // a probe is outstanding
	covered     uint64 // the probe confirms the SENDs before this one

	state []uint8
	gen   []uint8
	free  []uint16 // stack
	order []uint16 // slots in the order of their SENDs; a ring, its size a power of two
	first uint64   // sequence number of the oldest SEND not known to be complete
	next  uint64   // sequence number of the next SEND
	mark  uint64   // sequence number after that of the last SEND with data

	batch []rdma.SendWR // not posted yet
	wcs   []rdma.WC
}

// New allocates and registers the capsules and makes the completion queue of the SENDs.
// The caller must call Bind next.
func New(dev rdma.Device, pd rdma.PD, cfg Config) (*Queue, error) {
	if cfg.Depth < 2 || cfg.Depth > MaxDepth {
		return nil, fmt.Errorf("submission queue: depth %d is not 2..%d", cfg.Depth, MaxDepth)
	}
	if cfg.Descriptors < 0 || cfg.Descriptors > MaxDescriptors {
		return nil, fmt.Errorf("submission queue: %d descriptors are not 0..%d", cfg.Descriptors, MaxDescriptors)
	}
	q := &Queue{depth: cfg.Depth, interval: max(1, cfg.Depth/4), size: nvme.CommandSize + cfg.Descriptors*nvme.SGLSize}
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
	if q.mr, err = pd.AllocMR(n*q.size, 0); err != nil {
		return nil, fmt.Errorf("register capsules: %w", err)
	}
	q.slab, q.addr, q.lkey = q.mr.Bytes(), q.mr.Addr(), q.mr.LKey()
	// Every work request of a failed queue pair completes, signaled or not.
	if q.cq, err = dev.CreateCQ(q.WorkRequests()+1, false, cfg.Vector); err != nil {
		return nil, errors.Join(fmt.Errorf("create completion queue of the sends: %w", err), q.mr.Close())
	}
	return q, nil
}

// Slots returns the number of slots, which is also the largest number of posted SENDs.
func (q *Queue) Slots() int { return q.depth + q.interval }

// WorkRequests returns the largest number of posted work requests, including the probe,
// for QPConfig.MaxSendWR.
func (q *Queue) WorkRequests() int { return q.Slots() + 1 }

// CQ returns the verbs completion queue, for QPConfig.SendCQ.
func (q *Queue) CQ() rdma.CQ { return q.cq }

// Bind sets the QP of the queue.
func (q *Queue) Bind(qp rdma.QP) { q.qp = qp }

// Close frees the resources of New. The QP must be closed before. Otherwise Close returns
// an error and frees nothing. After Close, the methods do nothing, and return
// rdma.ErrClosed if they return an error. A second Close returns nil.
func (q *Queue) Close() error {
	if err := q.cq.Close(); err != nil {
		return err
	}
	q.free, q.batch, q.slab = q.free[:0], q.batch[:0], nil
	return q.mr.Close()
}

// Outstanding returns the number of commands that were taken and not answered.
func (q *Queue) Outstanding() int { return q.outstanding }

// Pending returns the number of commands that were pushed and not posted.
func (q *Queue) Pending() int { return len(q.batch) }

// Get takes a slot and returns its command. The caller must fill in the command, whose
// contents are arbitrary; Push sets the command id. ok is false while Depth-1 commands
// are outstanding, or if no slot is free.
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
	return slot, nvme.CommandAt(q.slab[int(slot)*q.size:]), true
}

// Descriptors returns the room for the list of a command that Get returned: Config.Descriptors times 16
// bytes, whose contents are arbitrary. PushList sends the first of them.
func (q *Queue) Descriptors(slot uint16) []byte {
	at := int(slot) * q.size
	return q.slab[at+nvme.CommandSize : at+q.size : at+q.size]
}

// Push adds the slot's command to the batch that Flush posts. If data has a length, it is
// sent in the capsule behind the command. The adapter gathers it from its place in
// memory, which must not change before the response arrives, and must stay registered
// until the SEND is confirmed (Mark).
func (q *Queue) Push(slot uint16, data rdma.SGE) {
	wr := q.push(slot, nvme.CommandSize)
	if wr == nil || data.Length == 0 {
		return
	}
	wr.SGE[1] = data
	wr.NumSGE = 2
	q.mark = q.next
}

// PushList is Push for a command whose data the first n descriptors of its list name.
func (q *Queue) PushList(slot uint16, n int) {
	q.push(slot, nvme.CommandSize+n*nvme.SGLSize)
}

// push adds the first size bytes of the slot's capsule to the batch. It returns nil if the queue is
// closed.
func (q *Queue) push(slot uint16, size int) *rdma.SendWR {
	if q.slab == nil {
		return nil
	}
	at := int(slot) * q.size
	nvme.CommandAt(q.slab[at : at+q.size]).SetCID(q.commandID(slot))

	n := len(q.batch)
	q.batch = q.batch[:n+1]
	wr := &q.batch[n]
	wr.ID = q.next
	wr.Op = rdma.Send
	wr.SGE[0] = rdma.SGE{Addr: q.addr + uint64(at), Length: uint32(size), LKey: q.lkey}
	wr.NumSGE = 1
	q.unsignaled++
	if wr.Signaled = q.unsignaled >= q.interval; wr.Signaled {
		q.unsignaled = 0
	}
	q.order[q.next&uint64(len(q.order)-1)] = slot
	q.next++
	return wr
}

func (q *Queue) commandID(slot uint16) uint16 { return uint16(q.gen[slot])<<slotBits | slot }

// Flush posts the batch in one call, and returns the number of posted commands.
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

// Probe checks whether the target's adapter still has the queue pair, unless a probe is
// outstanding. If it does not, the queue pair fails later.
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
	q.probing, q.covered = true, q.next-uint64(len(q.batch))
	return nil
}

// Mark returns a position for Confirmed: after the last SEND that was pushed with data.
func (q *Queue) Mark() uint64 { return q.mark }

// Confirmed reports whether all SENDs before a position are known to be complete. The
// adapter does not read their data any more. Reap learns of it, and Probe brings it about.
func (q *Queue) Confirmed(mark uint64) bool { return q.first >= mark }

// Match returns the slot of the command that a response answers. ok is false for an id
// that names no slot, or a command that is not outstanding.
func (q *Queue) Match(cid uint16) (slot uint16, ok bool) {
	slot = cid & slotMask
	if int(slot) >= len(q.state) || q.state[slot]&(slotFree|slotAnswered) != 0 || q.commandID(slot) != cid {
		return 0, false
	}
	return slot, true
}

// CheckHead reports whether a controller with this queue can send the SQHD of a response.
func (q *Queue) CheckHead(sqhd uint16) bool { return int(sqhd) < q.depth }

// Answer records the response to a slot that Match returned. The caller may use the
// command's data again.
func (q *Queue) Answer(slot uint16) {
	q.outstanding--
	q.state[slot] |= slotAnswered
	if q.state[slot]&slotSent != 0 {
		q.release(slot)
	}
}

func (q *Queue) release(slot uint16) {
	q.state[slot] = slotFree
	q.free = q.free[:len(q.free)+1]
	q.free[len(q.free)-1] = slot
}

// Starved reports whether a further command could be outstanding, but no slot is free
// because of incomplete SENDs.
func (q *Queue) Starved() bool { return len(q.free) == 0 && q.outstanding < q.depth-1 }

// Scarce reports whether a call of Reap is useful: few slots are free, or a probe is
// outstanding.
func (q *Queue) Scarce() bool { return len(q.free) <= q.interval || q.probing }

// Reap collects completed SENDs and frees the slots of those that were answered. It
// returns the number of completions. An error means that the queue pair is lost.
func (q *Queue) Reap() (int, error) {
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
			if err := q.complete(&q.wcs[i]); err != nil {
				return n, err
			}
			n++
		}
		if got < len(q.wcs) {
			return n, nil
		}
	}
}

// complete handles a completion, which confirms all SENDs up to its own.
func (q *Queue) complete(wc *rdma.WC) error {
	switch {
	case wc.Status != rdma.WCSuccess:
		return fmt.Errorf("send: %v", wc.Status)
	case wc.ID == probeID:
		q.probing = false
		q.confirm(q.covered)
		return nil
	case wc.ID < q.first || wc.ID >= q.next:
		return fmt.Errorf("send: completion of number %d, expected %d..%d", wc.ID, q.first, q.next)
	}
	q.confirm(wc.ID + 1)
	return nil
}

// confirm frees the slots of the SENDs before a position, if they were answered.
func (q *Queue) confirm(end uint64) {
	for ; q.first < end; q.first++ {
		slot := q.order[q.first&uint64(len(q.order)-1)]
		q.state[slot] |= slotSent
		if q.state[slot]&slotAnswered != 0 {
			q.release(slot)
		}
	}
}
