package rdmatest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// completionQueue implements rdma.CQ.
type completionQueue struct {
	endpoint *endpoint
	ring     []completion // head..arrived can be polled, arrived..tail are held
	head     int          // positions do not wrap around
	arrived  int
	tail     int
	overrun  bool

	events bool
	fd     int // eventfd, where each read consumes one event; -1 without events, or after Close
	armed  bool
	sent   int // events written
	acked  int
	ackCh  chan struct{} // gets a token at each Ack

	users  int // number of uses: two for each QP, once as send and once as receive queue
	closed bool
}

// completion is a WC with the slots that polling it frees.
type completion struct {
	wc   rdma.WC
	qp   *queuePair
	free int // position in the send or receive queue up to which slots become free
	recv bool
}

// CreateCQ implements rdma.Device.
func (d *device) CreateCQ(entries int, events bool, _ int) (rdma.CQ, error) {
	if entries < 1 || entries > maxCQE {
		return nil, fmt.Errorf("create completion queue of %d entries: %w", entries, errTooLarge)
	}
	q := &completionQueue{endpoint: d.endpoint, ring: make([]completion, entries), events: events, fd: -1, ackCh: make(chan struct{}, 1)}
	if events {
		// Each read consumes one event, as with a completion channel.
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK|unix.EFD_SEMAPHORE)
		if err != nil {
			return nil, fmt.Errorf("create completion channel: %w", err)
		}
		q.fd = fd
	}
	f := d.endpoint.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	f.objects.CQs++
	d.endpoint.cqs[q] = struct{}{}
	return q, nil
}

// push adds a completion. The lock is held, here and in arrive.
func (q *completionQueue) push(c completion) {
	if q.tail-q.head == len(q.ring) {
		q.overrun = true
		return
	}
	q.ring[q.tail%len(q.ring)] = c
	q.tail++
	if !q.endpoint.hold {
		q.arrive()
	}
}

// arrive makes the held completions visible, with one event if the queue is armed.
func (q *completionQueue) arrive() {
	if q.arrived == q.tail {
		return
	}
	q.arrived = q.tail
	if !q.armed || q.closed {
		return
	}
	q.armed = false
	q.sent++
	_, _ = unix.Write(q.fd, eventfdOne) // fails only if 2^64-2 events were not read
}

// eventfdOne is written to an eventfd to add one event.
var eventfdOne = binary.NativeEndian.AppendUint64(nil, 1)

var (
	errOverrun    = errors.New("poll completion queue: it was overrun")
	errPollClosed = fmt.Errorf("poll completion queue: %w", rdma.ErrClosed)
	errArmClosed  = fmt.Errorf("arm completion queue: %w", rdma.ErrClosed)
)

// Poll implements rdma.CQ. After an overrun (more completions than entries), it always
// returns that error.
func (q *completionQueue) Poll(wcs []rdma.WC) (int, error) {
	f := q.endpoint.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case q.closed:
		return 0, errPollClosed
	case q.overrun:
		return 0, errOverrun
	}
	n := 0
	for n < len(wcs) && q.head < q.arrived {
		c := &q.ring[q.head%len(q.ring)]
		wcs[n] = c.wc
		if c.recv {
			c.qp.recvFree = c.free
		} else {
			c.qp.sendFree = c.free
		}
		q.head++
		n++
	}
	return n, nil
}

var errNoEvents = fmt.Errorf("arm completion queue: made without events: %w", rdma.ErrUnsupported)

// Arm implements rdma.CQ.
func (q *completionQueue) Arm() error {
	if !q.events {
		return errNoEvents
	}
	f := q.endpoint.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	if q.closed {
		return errArmClosed
	}
	q.armed = true
	return nil
}

// FD implements rdma.CQ.
func (q *completionQueue) FD() int {
	f := q.endpoint.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	return q.fd
}

// Ack implements rdma.CQ.
func (q *completionQueue) Ack(n int) {
	f := q.endpoint.fabric
	f.mu.Lock()
	q.acked += n
	f.mu.Unlock()
	select {
	case q.ackCh <- struct{}{}:
	default:
	}
}

// ackPatience limits the time that Close waits for acknowledgements. Libraries wait
// forever, but a test needs an error.
const ackPatience = 5 * time.Second

// Close implements rdma.CQ.
func (q *completionQueue) Close() error {
	f := q.endpoint.fabric
	f.mu.Lock()
	switch {
	case q.closed:
		f.mu.Unlock()
		return nil
	case q.users > 0:
		f.mu.Unlock()
		return busy("completion queue")
	}
	q.closed = true
	f.objects.CQs--
	delete(q.endpoint.cqs, q)
	fd := q.fd
	q.fd = -1
	f.mu.Unlock()
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
	err := q.waitAcked(read)
	return errors.Join(err, os.NewSyscallError("close", unix.Close(fd)))
}

func (q *completionQueue) waitAcked(read int) error {
	timeout := time.NewTimer(ackPatience)
	defer timeout.Stop()
	for {
		q.endpoint.fabric.mu.Lock()
		acked := q.acked
		q.endpoint.fabric.mu.Unlock()
		if acked == read {
			return nil
		}
		select {
		case <-q.ackCh:
		case <-timeout.C:
			return fmt.Errorf("destroy completion queue: %d events were read and %d acknowledged", read, acked)
		}
	}
}
