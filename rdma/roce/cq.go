package roce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// completionQueue implements rdma.CQ and rdma.Receiver.
type completionQueue struct {
	endpoint atomic.Pointer[endpoint] // endpoint of the first queue pair
	ring     []rdma.WC
	vector   int
	events   bool
	fd       atomic.Int32  // eventfd, where each read consumes one event; -1 without events, or after Close
	tail     atomic.Uint64 // position of the next push; written with mu held
	head     atomic.Uint64 // position of the next poll; only the poller writes it
	idle     bool          // the last poll found nothing; only the poller uses it

	mu     sync.Mutex            // guards pushing and the fields below
	armed  atomic.Bool           // written with mu held
	fault  atomic.Pointer[error] // if set, Poll returns it; written with mu held
	users  int                   // number of uses: two for each queue pair, once as send and once as receive queue
	closed bool
	acks   *sync.Cond // signaled when acked grows
	sent   int
	acked  int
}

// CreateCQ implements rdma.Device.
func (d *device) CreateCQ(entries int, events bool, vector int) (rdma.CQ, error) {
	if entries < 1 || entries > maxCQE {
		return nil, fmt.Errorf("create completion queue of %d entries: %w", entries, errTooLarge)
	}
	q := &completionQueue{ring: make([]rdma.WC, entries), events: events, vector: vector}
	q.fd.Store(-1)
	q.acks = sync.NewCond(&q.mu)
	if events {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK|unix.EFD_SEMAPHORE)
		if err != nil {
			return nil, fmt.Errorf("create completion channel: %w", err)
		}
		q.fd.Store(int32(fd))
	}
	return q, nil
}

// eventfdOne is written to an eventfd to add one event.
var eventfdOne = binary.NativeEndian.AppendUint64(nil, 1)

// push adds a completion, and an event if the queue is armed.
func (q *completionQueue) push(wc *rdma.WC) {
	q.mu.Lock()
	defer q.mu.Unlock()
	tail := q.tail.Load()
	if tail-q.head.Load() == uint64(len(q.ring)) {
		q.fault.CompareAndSwap(nil, &errOverrun)
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
	_, _ = unix.Write(int(q.fd.Load()), eventfdOne) // fails only if 2^64-2 events were not read
}

var (
	errOverrun    = errors.New("poll completion queue: it was overrun")
	errPollClosed = fmt.Errorf("poll completion queue: %w", rdma.ErrClosed)
	errArmClosed  = fmt.Errorf("arm completion queue: %w", rdma.ErrClosed)
)

// Poll implements rdma.CQ. The second poll of an empty queue in a row also receives
// packets, unless the queue is armed. After an overrun (more completions than entries),
// Poll always returns that error.
func (q *completionQueue) Poll(wcs []rdma.WC) (int, error) {
	n, err := q.take(wcs)
	if n > 0 || err != nil || len(wcs) == 0 {
		q.idle = false
		return n, err
	}
	// A caller that polls once and then sleeps is woken by the receive loop, so it
	// need not pay for the system call.
	if p := q.endpoint.Load(); p != nil && q.idle && !q.armed.Load() {
		p.poll()
		return q.take(wcs)
	}
	q.idle = true
	return 0, nil
}

func (q *completionQueue) take(wcs []rdma.WC) (int, error) {
	head, tail := q.head.Load(), q.tail.Load()
	if err := q.fault.Load(); err != nil {
		return 0, *err
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
	if p == nil || !p.dedicated {
		return
	}
	q.mu.Lock()
	armed := q.armed.Load()
	q.armed.Store(false)
	q.mu.Unlock()
	p.receiveSome()
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
	if !q.events {
		return errNoEvents
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return errArmClosed
	}
	q.armed.Store(true)
	return nil
}

// FD implements rdma.CQ.
func (q *completionQueue) FD() int { return int(q.fd.Load()) }

// Ack implements rdma.CQ.
func (q *completionQueue) Ack(n int) {
	q.mu.Lock()
	q.acked += n
	q.mu.Unlock()
	q.acks.Broadcast()
}

// use registers a queue pair that uses the queue. p receives its packets. use returns
// false if the queue or the endpoint is closed.
func (q *completionQueue) use(p *endpoint) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return false
	}
	if q.users == 0 {
		if p.dedicated && !p.hold() {
			return false
		}
		q.leave()
		q.endpoint.Store(p)
	}
	q.users++
	return true
}

// leave undoes the effects of use on the endpoint after the last queue pair is gone. The
// lock is held.
func (q *completionQueue) leave() {
	if p := q.endpoint.Swap(nil); p != nil && p.dedicated {
		_ = p.release() // an error loses no data
	}
}

func (q *completionQueue) unuse() {
	q.mu.Lock()
	q.users--
	q.mu.Unlock()
}

// ackPatience limits the time that Close waits for acknowledgements.
const ackPatience = 5 * time.Second

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
	q.fault.Store(&errPollClosed)
	q.leave()
	fd := int(q.fd.Swap(-1))
	if fd < 0 {
		return nil
	}
	read := q.sent // number of events that were read; those still there are subtracted
	var buf [8]byte
	for {
		if _, err := unix.Read(fd, buf[:]); err != nil {
			break
		}
		read--
	}
	var err error
	if q.acked < read {
		timeout := time.AfterFunc(ackPatience, q.acks.Broadcast)
		for deadline := time.Now().Add(ackPatience); q.acked < read && time.Now().Before(deadline); {
			q.acks.Wait()
		}
		timeout.Stop()
		if q.acked < read {
			err = fmt.Errorf("destroy completion queue: %d events were read and %d acknowledged", read, q.acked)
		}
	}
	return errors.Join(err, os.NewSyscallError("close", unix.Close(fd)))
}
