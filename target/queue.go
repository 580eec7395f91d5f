package target

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/internal/spin"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// request is a command from its arrival to its completion. It belongs to the receive
// buffer of the same index.
type request struct {
	bytes uint32 // length of the capsule
	data  extent
	ns    *Namespace

	// These come from the data descriptor.
	addr       uint64 // of the host's memory; of in-capsule data and of a list: the offset behind the command
	length     uint32 // of all data
	key        uint32
	invalidate bool
	inline     bool
	listed     uint8 // number of descriptors in a list in the capsule; 0: there is no list

	moves uint8 // work requests for data that were posted for it

	// These belong to faults.
	judged  bool // the rules have been applied
	held    bool // its Hold has been applied
	rule    *rule
	due     time.Time
	corrupt Corruption
}

// response is a completion that was sent and is not confirmed yet.
type response struct {
	data  extent // freed when the completion is confirmed
	moves uint8  // work requests that are free then
}

// queuePair is an admin or I/O queue of a controller, on a connection of its own. It
// has memory for one command until its Connect command is accepted, and for all its
// commands after that. Only the goroutine of run calls its methods, except wake and
// kill.
type queuePair struct {
	target *Target
	port   *Port
	id     rdma.ID
	host   netip.Addr // address of the host
	qp     rdma.QP
	cq     rdma.CQ
	pd     rdma.PD
	in     rdma.MR // capsules
	out    rdma.MR // completions
	data   rdma.MR // chunks

	qid     uint16
	depth   int // number of receive buffers of the connected queue
	capsule int // bytes of a receive buffer
	inline  int // bytes of in-capsule data

	// access is odd while the queue is inside a store. Other goroutines read it.
	access atomic.Uint64
	ctrl   *controller // nil before Connect
	joined atomic.Bool // ctrl is set; for other goroutines
	stats  queueStats
	// unproved is set while the host must authenticate the queue before it may use it. proving
	// is the last authentication that has begun.
	unproved     atomic.Bool
	authReported atomic.Bool // that it has failed
	proving      *auth.Controller
	authTimer    *time.Timer
	sqSize       uint16 // entries of the submission queue
	sqHead       uint16
	noFlow       bool // SQ flow control is off

	reqs      []request
	pending   []uint16 // ring of the receive buffers whose command has not begun
	first     int
	count     int
	delayed   []uint16
	responses []response
	posted    uint64 // completions sent
	confirmed uint64 // of those, how many have left the ring
	lazy      int    // completions since the last one whose SEND is signaled
	reserved  int    // completions sent and not confirmed, and commands that may send one
	free      chunks
	moves     int // work requests for data that may still be posted

	sends   []rdma.SendWR // to be posted: transfers of data
	answers []rdma.SendWR // to be posted after sends: completions
	recvs   []rdma.RecvWR
	wcs     [pollBatch]rdma.WC
	armed   bool
	spinner spin.Spinner
	fds     [3]unix.PollFd
	// receiver is nil if the provider receives the packets itself.
	receiver rdma.Receiver
	event    [8]byte
	other    []byte // data of the store for Compare

	memory  int64           // bytes that grow took with takeMemory
	gaveWay bool            // giveWay has ended the queue; the target's lock guards this field
	ctx     context.Context // ends with kill
	cancel  context.CancelFunc
	stopped atomic.Bool
	wakeMu  sync.Mutex // guards wakeFD and reason
	wakeFD  int
	reason  string
}

// newQueuePair makes a queue that can receive a Connect command.
func newQueuePair(p *Port, id rdma.ID, req nvme.RDMARequest) (*queuePair, error) {
	t := p.target
	q := &queuePair{
		target: t, port: p, id: id, host: id.RemoteAddr().Addr(), qid: req.QID, depth: int(req.HSQSize) + 1, capsule: nvme.CommandSize, wakeFD: -1, spinner: spin.New(),
	}
	q.ctx, q.cancel = context.WithCancel(t.ctx)
	if q.qid > 0 {
		q.inline = t.cfg.InCapsule
		q.capsule += q.inline
	}
	if err := q.allocate(); err != nil {
		q.cancel()
		return nil, errors.Join(fmt.Errorf("open queue %d: %w", q.qid, err), q.release())
	}
	return q, nil
}

// ring returns the largest number of completions that are sent and not confirmed.
func (q *queuePair) ring() int { return 2*q.depth + aerLimit }

// chunks returns the number of chunks of a connected queue. An admin queue has enough
// for the largest transfer.
func (q *queuePair) chunks() int {
	least := chunksFor(uint32(q.target.cfg.MaxTransfer))
	if q.qid == 0 {
		return max(least, adminDepth)
	}
	return min(max(2*least, minChunks, q.depth), maxChunks)
}

// maxMoves returns the largest number of work requests for data that are not known to be complete. A
// command that holds chunks has one, and one with a list as many as the list has descriptors. So
// there is at least one for each chunk, and there are enough for any command.
func (q *queuePair) maxMoves() int {
	if q.target.cfg.MaxDescriptors == 1 || q.qid == 0 {
		return q.chunks()
	}
	return max(q.chunks(), listMoves)
}

// allocate makes the queue pair and the memory for one command, the Connect command.
func (q *queuePair) allocate() (err error) {
	q.reqs, q.pending = make([]request, 1), make([]uint16, 1)
	q.responses = make([]response, q.ring())
	q.free.flip(extent{n: 1})
	q.moves = q.maxMoves()
	dev := q.id.Device()
	if q.pd, err = dev.AllocPD(); err != nil {
		return err
	}
	if q.out, err = q.pd.AllocMR(q.ring()*nvme.CompletionSize, rdma.AccessLocalWrite); err != nil {
		return err
	}
	if err := q.allocateBuffers(1, nvme.ConnectDataSize); err != nil {
		return err
	}
	maxSend := q.maxMoves() + q.ring() // each completion has one, too
	if q.cq, err = dev.CreateCQ(q.depth+maxSend+1, true, int(q.qid)); err != nil {
		return err
	}
	q.qp, err = q.id.CreateQP(q.pd, rdma.QPConfig{
		SendCQ: q.cq, RecvCQ: q.cq, MaxSendWR: maxSend, MaxRecvWR: q.depth, MaxSendSGE: 1, MaxRecvSGE: 1,
	})
	if err != nil {
		return err
	}
	q.receive(0)
	if err := q.post(); err != nil {
		return err
	}
	if q.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	packets := -1 // poll(2) ignores it
	if r, ok := q.cq.(rdma.Receiver); ok && r.PacketFD() >= 0 {
		q.receiver, packets = r, r.PacketFD()
	}
	q.fds = [3]unix.PollFd{
		{Fd: int32(q.cq.FD()), Events: unix.POLLIN}, {Fd: int32(q.wakeFD), Events: unix.POLLIN}, {Fd: int32(packets), Events: unix.POLLIN},
	}
	return nil
}

// allocateBuffers replaces the receive buffers and the data memory. No work request
// that uses the old ones may be outstanding.
func (q *queuePair) allocateBuffers(capsules, data int) error {
	in, err := q.pd.AllocMR(capsules*q.capsule, rdma.AccessLocalWrite)
	if err != nil {
		return err
	}
	chunks, err := q.pd.AllocMR(data, rdma.AccessLocalWrite)
	if err != nil {
		return errors.Join(err, in.Close())
	}
	old := [2]rdma.MR{q.in, q.data}
	q.in, q.data = in, chunks
	if old[0] == nil {
		return nil
	}
	copy(in.Bytes(), old[0].Bytes()[:q.capsule]) // the Connect command, which has yet to be completed
	return errors.Join(old[0].Close(), old[1].Close())
}

// grow allocates the memory for all commands of a queue. The Connect command is in
// receive buffer 0 and all its data has arrived. An error means that there is not
// enough memory.
func (q *queuePair) grow() error {
	size := int64(q.depth*q.capsule + q.chunks()*chunkSize)
	if err := q.target.takeMemory(size); err != nil {
		return err
	}
	if err := q.allocateBuffers(q.depth, q.chunks()*chunkSize); err != nil {
		return errors.Join(err, q.target.takeMemory(-size))
	}
	q.memory = size
	q.free.flip(extent{first: 1, n: uint8(q.chunks() - 1)})
	q.reqs = append(q.reqs, make([]request, q.depth-1)...)
	q.pending = append(q.pending, make([]uint16, q.depth-1)...)
	q.delayed = make([]uint16, 0, q.depth)
	q.sends = slices.Grow(q.sends, q.maxMoves()+q.ring())
	q.answers = slices.Grow(q.answers, q.ring())
	q.recvs = slices.Grow(q.recvs, q.depth)
	for i := 1; i < q.depth; i++ {
		q.receive(i)
	}
	return nil
}

// close ends the connection and frees everything.
func (q *queuePair) close() error {
	err := q.id.Close()
	q.wakeMu.Lock()
	defer q.wakeMu.Unlock()
	unix.Close(q.wakeFD)
	q.wakeFD = -1
	return errors.Join(err, q.release())
}

// release frees everything except the ID. After an error of allocate, the objects that
// it did not make are nil.
func (q *queuePair) release() error {
	if q.qp != nil {
		if err := q.id.Close(); err != nil { // has no effect if close called it before
			return err
		}
	}
	var errs []error
	if q.cq != nil {
		errs = append(errs, q.cq.Close())
	}
	for _, mr := range []rdma.MR{q.in, q.out, q.data} {
		if mr != nil {
			errs = append(errs, mr.Close())
		}
	}
	if q.pd != nil {
		errs = append(errs, q.pd.Close())
	}
	return errors.Join(errs...)
}

// wake makes run look for work. Any goroutine may call it at any time.
func (q *queuePair) wake() {
	q.wakeMu.Lock()
	defer q.wakeMu.Unlock()
	if q.wakeFD >= 0 {
		_, _ = unix.Write(q.wakeFD, eventfdOne) // fails only if 2^64-2 wake-ups have not been read
	}
}

var eventfdOne = binary.NativeEndian.AppendUint64(nil, 1)

// kill makes run return soon. Any goroutine may call it at any time.
func (q *queuePair) kill(reason string) {
	q.wakeMu.Lock()
	if q.reason == "" {
		q.reason = reason
	}
	q.wakeMu.Unlock()
	q.stopped.Store(true)
	q.cancel()
	q.wake()
}

func (q *queuePair) killed() error {
	q.wakeMu.Lock()
	defer q.wakeMu.Unlock()
	return errors.New(q.reason)
}

// leave removes the queue from its controller.
func (q *queuePair) leave() {
	if q.ctrl != nil {
		q.ctrl.leave(q)
	}
}
