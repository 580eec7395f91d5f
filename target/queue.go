package target

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

const pollBatch = 32 // work completions handled between two posts

// Kinds of work requests, in the upper half of their id. The lower half is the
// receive buffer, or the position in the ring of completions.
const (
	kindRecv = uint64(iota+1) << 32
	kindRead // the RDMA READ of a command
	kindSend // a completion
	kindData // an RDMA WRITE; seen only when it fails
	kindMask = uint64(math.MaxUint32) << 32
)

// request is a command from its arrival to its answer. It belongs to the
// receive buffer of the same index.
type request struct {
	bytes uint32 // of the capsule
	data  run
	ns    *Namespace

	// Of the data descriptor.
	addr       uint64
	length     uint32
	key        uint32
	invalidate bool
	inline     bool

	// Of faults.
	judged  bool // faults were looked at
	held    bool // its Hold is over
	rule    *rule
	due     time.Time
	corrupt Corruption
}

// response is a completion on its way.
type response struct {
	data run // to be freed when it was sent
}

// queue is one connection: an admin or I/O queue of a controller. All methods
// are for the goroutine of run, except wake and kill.
type queue struct {
	target *Target
	id     rdma.ID
	qp     rdma.QP
	cq     rdma.CQ
	pd     rdma.PD
	in     rdma.MR // capsules
	out    rdma.MR // completions
	data   rdma.MR // chunks

	qid     uint16
	depth   int // receive buffers
	capsule int // bytes of each
	inline  int // bytes of in-capsule data

	// access is odd while the queue is inside a store; others read it.
	access atomic.Uint64
	ctrl   *controller // nil before Connect
	stats  queueStats
	size   uint16 // entries of the submission queue
	head   uint16
	noFlow bool // SQ flow control is off

	reqs      []request
	pending   []uint16 // ring of buffers whose command has not begun
	first     int
	count     int
	delayed   []uint16
	responses []response
	posted    uint64 // completions sent
	confirmed uint64 // of those, how many have left the ring
	lazy      int    // completions since the last one whose SEND is signaled
	reserved  int    // completions sent and not confirmed, and commands that may send one
	free      chunks

	sends   []rdma.SendWR // to be posted: data, and then
	answers []rdma.SendWR // completions
	recvs   []rdma.RecvWR
	wcs     [pollBatch]rdma.WC
	armed   bool
	fds     [3]unix.PollFd
	// receiver is nil if the provider takes the packets.
	receiver rdma.Receiver
	event    [8]byte
	other    []byte // what Compare compares with

	stopped atomic.Bool
	wakeMu  sync.Mutex // guards the eventfd against its end, and reason
	wakeFD  int
	reason  string
}

func newQueue(t *Target, id rdma.ID, req nvme.RDMARequest) (*queue, error) {
	q := &queue{target: t, id: id, qid: req.QID, depth: int(req.HSQSize) + 1, capsule: nvme.CommandSize, wakeFD: -1}
	if q.qid > 0 {
		q.inline = t.cfg.InCapsule
		q.capsule += q.inline
	}
	if err := q.allocate(); err != nil {
		return nil, errors.Join(fmt.Errorf("open queue %d: %w", q.qid, err), q.release())
	}
	return q, nil
}

func (q *queue) allocate() error {
	nchunks := min(max(minChunks, q.depth), maxChunks)
	ring := 2*q.depth + aerLimit
	q.reqs = make([]request, q.depth)
	q.pending = make([]uint16, q.depth)
	q.delayed = make([]uint16, 0, q.depth)
	q.responses = make([]response, ring)
	q.free.flip(run{n: uint8(nchunks)})
	// What holds a chunk has one work request, and so has a completion.
	maxSend := nchunks + ring
	q.sends = make([]rdma.SendWR, 0, maxSend)
	q.answers = make([]rdma.SendWR, 0, ring)
	q.recvs = make([]rdma.RecvWR, 0, q.depth)

	var err error
	dev := q.id.Device()
	if q.pd, err = dev.AllocPD(); err != nil {
		return err
	}
	for _, m := range []struct {
		mr   *rdma.MR
		size int
	}{{&q.in, q.depth * q.capsule}, {&q.out, ring * nvme.CompletionSize}, {&q.data, nchunks * chunkSize}} {
		if *m.mr, err = q.pd.AllocMR(m.size, rdma.AccessLocalWrite); err != nil {
			return err
		}
	}
	if q.cq, err = dev.CreateCQ(q.depth+maxSend+1, true, int(q.qid)); err != nil {
		return err
	}
	q.qp, err = q.id.CreateQP(q.pd, rdma.QPConfig{
		SendCQ: q.cq, RecvCQ: q.cq, MaxSendWR: maxSend, MaxRecvWR: q.depth, MaxSendSGE: 1, MaxRecvSGE: 1,
	})
	if err != nil {
		return err
	}
	for i := range q.reqs {
		q.receive(i)
	}
	if err := q.post(); err != nil {
		return err
	}
	if q.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	packets := -1 // which poll(2) skips
	if r, ok := q.cq.(rdma.Receiver); ok && r.PacketFD() >= 0 {
		q.receiver, packets = r, r.PacketFD()
	}
	q.fds = [3]unix.PollFd{
		{Fd: int32(q.cq.FD()), Events: unix.POLLIN}, {Fd: int32(q.wakeFD), Events: unix.POLLIN}, {Fd: int32(packets), Events: unix.POLLIN},
	}
	return nil
}

// close ends the connection and frees everything.
func (q *queue) close() error {
	err := q.id.Close()
	q.wakeMu.Lock()
	defer q.wakeMu.Unlock()
	unix.Close(q.wakeFD)
	q.wakeFD = -1
	return errors.Join(err, q.release())
}

// release frees what does not end with the ID; that must be closed, or have no
// queue pair. What allocate did not come to is nil.
func (q *queue) release() error {
	if q.qp != nil {
		if err := q.id.Close(); err != nil { // again, or because allocate failed late
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

// wake makes run look at what changed. It may be called from any goroutine, at
// any time.
func (q *queue) wake() {
	q.wakeMu.Lock()
	defer q.wakeMu.Unlock()
	if q.wakeFD >= 0 {
		_, _ = unix.Write(q.wakeFD, eventfdOne) // fails only if 2^64-2 wakes are not read
	}
}

var eventfdOne = binary.NativeEndian.AppendUint64(nil, 1)

// kill makes run return soon. It may be called from any goroutine, at any time.
func (q *queue) kill(reason string) {
	q.wakeMu.Lock()
	if q.reason == "" {
		q.reason = reason
	}
	q.wakeMu.Unlock()
	q.stopped.Store(true)
	q.wake()
}

func (q *queue) killed() error {
	q.wakeMu.Lock()
	defer q.wakeMu.Unlock()
	return errors.New(q.reason)
}

// leave tells the controller that the queue is gone.
func (q *queue) leave() {
	if q.ctrl != nil {
		q.ctrl.leave(q)
	}
}

// run establishes the connection and serves it until it ends, and says why it
// ended.
func (q *queue) run(ctx context.Context) error {
	accept := nvme.RDMAAccept{CRQSize: uint16(q.depth)}.Marshal()
	ctx, cancel := context.WithTimeout(ctx, q.target.cfg.ConnectTimeout)
	defer cancel()
	err := q.id.Accept(ctx, rdma.ConnParam{PrivateData: accept[:], InitiatorDepth: readDepth, RetryCount: 7, RNRRetryCount: 7, FlowControl: true})
	if err != nil {
		return err
	}
	handshake := time.AfterFunc(q.target.cfg.ConnectTimeout, func() {
		q.target.faults.awaitThaw(q.target.ctx)
		q.kill("no Connect command came")
	})
	defer handshake.Stop()
	q.target.running.Go(q.watch)
	if q.receiver != nil {
		q.receiver.Receiving(true)
	}
	faults := &q.target.faults
	for !q.stopped.Load() {
		n, err := q.cq.Poll(q.wcs[:])
		if err != nil {
			return err
		}
		if n == 0 {
			if n, err = q.wait(); err != nil {
				return err
			}
		}
		if faults.Frozen() && !faults.awaitThaw(q.target.ctx) {
			return q.killed()
		}
		for i := range q.wcs[:n] {
			if err := q.complete(&q.wcs[i]); err != nil {
				return err
			}
		}
		if err := q.work(); err != nil {
			return err
		}
		if q.ctrl != nil && handshake != nil {
			handshake.Stop()
			handshake = nil
		}
	}
	return q.killed()
}

// watch ends the queue when the connection ends.
func (q *queue) watch() {
	for ev := range q.id.Events() {
		switch ev.Type {
		case rdma.EventDisconnected, rdma.EventDeviceRemoved, rdma.EventQPFatal:
			if faults := &q.target.faults; faults.Frozen() && faults.awaitThaw(q.target.ctx) {
				time.Sleep(afterThaw)
			}
			q.kill(ev.Type.String())
		}
	}
}

// wait sleeps until there is something to do, unless there are completions.
func (q *queue) wait() (int, error) {
	if !q.armed {
		if err := q.cq.Arm(); err != nil {
			return 0, err
		}
		q.armed = true
		if n, err := q.cq.Poll(q.wcs[:]); n > 0 || err != nil {
			return n, err
		}
	}
	if _, err := unix.Poll(q.fds[:], q.timeout()); err != nil && err != unix.EINTR {
		return 0, os.NewSyscallError("poll", err)
	}
	if q.fds[0].Revents != 0 {
		if n, _ := unix.Read(q.cq.FD(), q.event[:]); n == len(q.event) {
			q.cq.Ack(1)
			q.armed = false
		}
	}
	if q.fds[1].Revents != 0 {
		_, _ = unix.Read(q.wakeFD, q.event[:]) // empty or not
	}
	if q.fds[2].Revents != 0 {
		q.receiver.Receive()
	}
	return 0, nil
}

// timeout is how long to sleep for delayed commands, in milliseconds.
func (q *queue) timeout() int {
	if len(q.delayed) == 0 {
		return -1
	}
	least := time.Duration(math.MaxInt32) * time.Millisecond
	for _, i := range q.delayed {
		least = min(least, time.Until(q.reqs[i].due))
	}
	return int(max(0, least+time.Millisecond-1) / time.Millisecond)
}

// complete handles a work completion.
func (q *queue) complete(wc *rdma.WC) error {
	if wc.Status != rdma.WCSuccess {
		return fmt.Errorf("work request failed: %v", wc.Status)
	}
	i := int(uint32(wc.ID))
	switch wc.ID & kindMask {
	case kindRecv:
		if wc.Bytes < nvme.CommandSize {
			return fmt.Errorf("capsule of %d bytes", wc.Bytes)
		}
		q.reqs[i].bytes = wc.Bytes
		if q.ctrl != nil && !q.ctrl.alive.Load() && q.keepsAlive(i) {
			q.ctrl.alive.Store(true)
		}
		q.enqueue(i)
	case kindRead:
		q.finish(i)
	case kindSend:
		q.confirm(i)
	}
	return nil
}

// keepsAlive says whether the arrival of a command tells that its host is alive.
func (q *queue) keepsAlive(i int) bool {
	return !q.target.cfg.CommandKeepAlive || q.qid == 0 && q.command(i).Opcode() == nvme.AdminKeepAlive
}

// confirm ends the completions up to the one at pos of the ring: SENDs end in
// order.
func (q *queue) confirm(pos int) {
	for at := -1; at != pos; q.confirmed++ {
		at = int(q.confirmed % uint64(len(q.responses)))
		r := &q.responses[at]
		q.free.flip(r.data)
		r.data = run{}
		q.reserved--
	}
}

func (q *queue) enqueue(i int) {
	q.pending[(q.first+q.count)%len(q.pending)] = uint16(i)
	q.count++
}

// work begins what can begin, and posts what came of it.
func (q *queue) work() error {
	if len(q.delayed) > 0 {
		q.wakeDelayed()
	}
	for q.count > 0 && !q.stopped.Load() {
		if !q.begin(int(q.pending[q.first])) {
			break
		}
		q.first = (q.first + 1) % len(q.pending)
		q.count--
	}
	if q.qid == 0 && q.ctrl != nil {
		q.sendEvents()
	}
	return q.post()
}

// wakeDelayed puts commands whose time has come back in the line.
func (q *queue) wakeDelayed() {
	now := time.Now()
	kept := q.delayed[:0]
	for _, i := range q.delayed {
		if now.Before(q.reqs[i].due) {
			kept = append(kept, i)
			continue
		}
		q.reserved-- // begin takes it again
		q.enqueue(int(i))
	}
	q.delayed = kept
}

// sendEvents answers asynchronous event requests.
func (q *queue) sendEvents() {
	for q.reserved < len(q.responses) {
		cid, dw0, ok := q.ctrl.next()
		if !ok {
			return
		}
		q.reserved++
		sge, at := q.completion(run{})
		nvme.CompletionAt(q.out.Bytes()[at:]).Set(uint64(dw0), q.sqHead(), cid, nvme.StatusSuccess)
		q.answers = append(q.answers, sge)
	}
}

// post posts receives first, so that no answer gets to the host before there is
// room for the command that it lets the host send. Then come data and, behind
// all of it, completions: packets of one length cost least.
func (q *queue) post() error {
	if len(q.recvs) > 0 {
		if _, err := q.qp.PostRecv(q.recvs); err != nil {
			return err
		}
		q.recvs = q.recvs[:0]
	}
	q.sends = append(q.sends, q.answers...)
	q.answers = q.answers[:0]
	if len(q.sends) > 0 {
		if _, err := q.qp.PostSend(q.sends); err != nil {
			return err
		}
		q.sends = q.sends[:0]
	}
	return nil
}

// receive gives a buffer back to the queue pair.
func (q *queue) receive(i int) {
	q.recvs = append(q.recvs, rdma.RecvWR{ID: kindRecv | uint64(i), SGE: rdma.SGE{
		Addr: q.in.Addr() + uint64(i*q.capsule), Length: uint32(q.capsule), LKey: q.in.LKey(),
	}})
}

// command is the command in a receive buffer.
func (q *queue) command(i int) *nvme.Command {
	return nvme.CommandAt(q.in.Bytes()[i*q.capsule:])
}

// advance moves the submission queue head over one command.
func (q *queue) advance() {
	if q.size > 0 && !q.noFlow {
		if q.head++; q.head >= q.size {
			q.head = 0
		}
	}
}

// sqHead is what completions say of the submission queue.
func (q *queue) sqHead() uint16 {
	if q.noFlow {
		return 0xFFFF
	}
	return q.head
}

// completion takes the next place in the ring of completions, at offset at of
// q.out, and makes the SEND of it. It was reserved before.
func (q *queue) completion(data run) (wr rdma.SendWR, at int) {
	pos := int(q.posted % uint64(len(q.responses)))
	q.posted++
	q.responses[pos].data = data
	at = pos * nvme.CompletionSize
	return rdma.SendWR{
		ID: kindSend | uint64(pos), Op: rdma.Send, Signaled: q.signaled(), NumSGE: 1,
		SGE: [2]rdma.SGE{{Addr: q.out.Addr() + uint64(at), Length: nvme.CompletionSize, LKey: q.out.LKey()}},
	}, at
}

// lazyLimit is how many completions are sent without asking whether they have
// arrived.
const lazyLimit = 8

// signaled says whether the next completion is to be confirmed, with all before
// it: the host says of none but these that it has them. Whatever a command may
// wait for is free without that of the others.
func (q *queue) signaled() bool {
	q.lazy++
	if q.lazy < lazyLimit && q.free.find(chunksFor(uint32(q.target.cfg.MaxTransfer))) >= 0 && q.reserved < len(q.responses)/2 {
		return false
	}
	q.lazy = 0
	return true
}

// respond answers a command. Its chunks stay until the SEND is complete,
// because the RDMA WRITE before it may read them.
func (q *queue) respond(i int, result uint64, s nvme.Status) {
	r := &q.reqs[i]
	cmd := q.command(i)
	if !s.OK() {
		q.stats.errors.Add(1)
	}
	if r.corrupt == CorruptLost {
		q.drop(i)
		return
	}
	q.advance()
	wr, at := q.completion(r.data)
	done := nvme.CompletionAt(q.out.Bytes()[at:])
	done.Set(result, q.sqHead(), cmd.CID(), s)
	if r.invalidate {
		wr.Op, wr.RKey = rdma.SendInvalidate, r.key
	}
	if r.corrupt != CorruptNone {
		q.corrupt(r, &wr, done)
	}
	q.answers = append(q.answers, wr)
	q.done(i)
}

// done forgets a command and gives its buffer back.
func (q *queue) done(i int) {
	q.reqs[i] = request{}
	q.receive(i)
}

// drop ends a command without an answer.
func (q *queue) drop(i int) {
	q.advance()
	q.free.flip(q.reqs[i].data)
	q.reserved--
	q.done(i)
}
