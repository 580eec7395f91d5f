package roce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// completionQueue implements rdma.CQ and rdma.Receiver: a completion completionQueue.
type completionQueue struct {
	endpoint atomic.Pointer[endpoint] // of the first queue pair
	ring     []rdma.WC
	vector   int
	fd       int           // eventfd, each read of which takes one event, or -1
	tail     atomic.Uint64 // next to push; written with mu held
	head     atomic.Uint64 // next to poll; written by the poller
	idle     bool          // the last poll found nothing; the poller's

	mu      sync.Mutex  // guards what follows, and pushing
	armed   atomic.Bool // written with mu held
	overrun atomic.Bool // written with mu held
	users   int         // queue pairs, once for each of their two queues
	closed  bool
	acks    *sync.Cond // acked grew
	sent    int
	acked   int
}

// CreateCQ implements rdma.Device.
func (d *device) CreateCQ(entries int, events bool, vector int) (rdma.CQ, error) {
	if entries < 1 || entries > maxCQE {
		return nil, fmt.Errorf("create completion queue of %d entries: %w", entries, errTooLarge)
	}
	q := &completionQueue{ring: make([]rdma.WC, entries), fd: -1, vector: vector}
	q.acks = sync.NewCond(&q.mu)
	if events {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK|unix.EFD_SEMAPHORE)
		if err != nil {
			return nil, fmt.Errorf("create completion channel: %w", err)
		}
		q.fd = fd
	}
	return q, nil
}

// eventfdOne is what adds one event to an eventfd.
var eventfdOne = binary.NativeEndian.AppendUint64(nil, 1)

// push adds a completion, and an event if one was asked for.
func (q *completionQueue) push(wc *rdma.WC) {
	q.mu.Lock()
	defer q.mu.Unlock()
	tail := q.tail.Load()
	if tail-q.head.Load() == uint64(len(q.ring)) {
		q.overrun.Store(true)
	} else {
		q.ring[tail%uint64(len(q.ring))] = *wc
		q.tail.Store(tail + 1)
	}
	if !q.armed.Load() {
		return
	}
	q.armed.Store(false)
	if p := q.endpoint.Load(); p == nil || !p.postpone(q) {
		q.signal()
	}
}

// signal makes an event. The lock is held.
func (q *completionQueue) signal() {
	if q.closed {
		return
	}
	q.sent++
	if _, err := unix.Write(q.fd, eventfdOne); err != nil {
		panic("roce: write eventfd: " + err.Error()) // not even 2^64 events fill it
	}
}

var errOverrun = errors.New("poll completion queue: it was overrun")

// Poll implements rdma.CQ. Polling an empty queue for the second time looks for
// packets, unless it is armed. After more completions than entries it reports
// the overrun, always.
func (q *completionQueue) Poll(wcs []rdma.WC) (int, error) {
	n, err := q.take(wcs)
	if n > 0 || err != nil || len(wcs) == 0 {
		q.idle = false
		return n, err
	}
	// Who polls once and then sleeps is woken by the receive loop, and need not
	// pay for the system call.
	if p := q.endpoint.Load(); p != nil && q.idle && !q.armed.Load() {
		p.poll()
		return q.take(wcs)
	}
	q.idle = true
	return 0, nil
}

func (q *completionQueue) take(wcs []rdma.WC) (int, error) {
	head, tail := q.head.Load(), q.tail.Load()
	if q.overrun.Load() {
		return 0, errOverrun
	}
	n := 0
	for ; n < len(wcs) && head < tail; n++ {
		wcs[n] = q.ring[head%uint64(len(q.ring))]
		head++
	}
	if n > 0 {
		q.head.Store(head)
	}
	return n, nil
}

var errNoEvents = fmt.Errorf("arm completion queue: made without events: %w", rdma.ErrUnsupported)

// PacketFD implements rdma.Receiver.
func (q *completionQueue) PacketFD() int {
	if p := q.endpoint.Load(); p != nil && p.dedicated {
		return p.sock.fd
	}
	return -1
}

// Receive implements rdma.Receiver.
func (q *completionQueue) Receive() {
	p := q.endpoint.Load()
	if p == nil {
		return
	}
	q.mu.Lock()
	armed := q.armed.Load()
	q.armed.Store(false)
	q.mu.Unlock()
	p.receive()
	if armed {
		q.mu.Lock()
		q.armed.Store(true)
		q.mu.Unlock()
	}
}

// Receiving implements rdma.Receiver.
func (q *completionQueue) Receiving(on bool) {
	if p := q.endpoint.Load(); p != nil && p.dedicated && p.driven.Swap(on) != on {
		p.nudge()
	}
}

// Arm implements rdma.CQ.
func (q *completionQueue) Arm() error {
	if q.fd < 0 {
		return errNoEvents
	}
	q.mu.Lock()
	q.armed.Store(true)
	q.mu.Unlock()
	return nil
}

// FD implements rdma.CQ.
func (q *completionQueue) FD() int { return q.fd }

// Ack implements rdma.CQ.
func (q *completionQueue) Ack(n int) {
	q.mu.Lock()
	q.acked += n
	q.mu.Unlock()
	q.acks.Broadcast()
}

func (q *completionQueue) use(p *endpoint) {
	q.endpoint.CompareAndSwap(nil, p)
	q.mu.Lock()
	q.users++
	q.mu.Unlock()
}

func (q *completionQueue) unuse() {
	q.mu.Lock()
	q.users--
	q.mu.Unlock()
}

// Close implements rdma.CQ.
func (q *completionQueue) Close() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.closed:
		return nil
	case q.users > 0:
		return busy("completion queue")
	}
	q.closed = true
	if q.fd < 0 {
		return nil
	}
	read := q.sent // events that somebody read: those that are not there any more
	var buf [8]byte
	for {
		if _, err := unix.Read(q.fd, buf[:]); err != nil {
			break
		}
		read--
	}
	for q.acked < read {
		q.acks.Wait()
	}
	return os.NewSyscallError("close", unix.Close(q.fd))
}
