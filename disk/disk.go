package disk

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/internal/frontend"
	"ublk-nvmeof/poller"
)

// Disk reads and writes a block device. Its methods may be called from any goroutine except
// those of the loops, in any order.
type Disk struct {
	dev    block.Device
	queues []*queue
	shift  uint // log2 of the logical block size
	maxIO  int  // of a buffer, in bytes
	watch  watch

	// Of Open
	sub   *initiator.Subsystem // nil: the disk was made by New
	ns    *initiator.Namespace
	frees []func() error // free what is below the subsystem

	shut    atomic.Bool // as closed, for buffers and batches
	closing sync.Once
	gone    chan struct{} // closed when everything was freed
	err     error         // of freeing it; written before gone is closed

	mu     sync.Mutex // guards what follows
	lent   int        // buffers and batches
	closed bool
}

// DeviceConfig configures New.
type DeviceConfig struct {
	Device block.Device
	// Loops serve the device: Loops[i] uses queue i. They must run until the disk is
	// closed. If it is empty, the loops are those of the device (poller.Looper).
	Loops []*poller.Loop
	Depth int // requests in flight on each loop, 1..4096; 0: 64
	// MaxIO is the size of a buffer in bytes, from one page to 1 GiB; 0: 128 KiB. It is
	// rounded down to pages and limited to the geometry's MaxIO. Larger reads and writes are
	// executed in pieces, several at a time. The back end allocates Loops × Depth × MaxIO.
	MaxIO int
}

const (
	defaultDepth = 64
	defaultMaxIO = 128 << 10
)

// New makes a disk of a block.Device that the caller has, such as a RAM device. The caller
// closes the device after the disk.
func New(cfg DeviceConfig) (*Disk, error) {
	if cfg.Device == nil {
		return nil, errors.New("open disk: no block device")
	}
	depth, maxIO := cmp.Or(cfg.Depth, defaultDepth), cmp.Or(cfg.MaxIO, defaultMaxIO)
	if err := frontend.SizeQueues(&depth, &maxIO, 1); err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	loops, err := frontend.Loops(cfg.Loops, cfg.Device)
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	g := cfg.Device.Geometry()
	if err := g.Validate(); err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	d := &Disk{dev: cfg.Device, maxIO: frontend.BufferSize(maxIO, g, 1), gone: make(chan struct{})}
	for 1<<d.shift < g.LogicalBlock {
		d.shift++
	}
	for i, l := range loops {
		q, err := openQueue(cfg.Device, i, l, depth, d.maxIO, d.gone)
		if err != nil {
			close(d.gone)
			return nil, errors.Join(fmt.Errorf("open disk: %w", err), d.freeQueues())
		}
		d.queues = append(d.queues, q)
	}
	return d, nil
}

func openQueue(dev block.Device, i int, l *poller.Loop, depth, maxIO int, stop <-chan struct{}) (*queue, error) {
	q := &queue{loop: l, slots: make([]slot, depth), reqs: make([]block.Request, 0, depth), told: make([]*Batch, 0, depth)}
	var err error
	lost := l.Call(func() {
		if q.back, err = dev.OpenQueue(i, block.QueueConfig{Depth: depth, MaxIO: maxIO}); err == nil {
			l.Attach(q)
		}
	})
	if err := errors.Join(lost, err); err != nil {
		return nil, err
	}
	for tag := range q.slots {
		s := &q.slots[tag]
		s.queue, s.buf, s.parked = q, q.back.Buffer(uint16(tag)), make(chan struct{}, 1)
		s.req.Tag = uint16(tag)
		q.pool.free = append(q.pool.free, s)
	}
	q.pool.count.Store(int32(depth))
	go q.watch(stop)
	return q, nil
}

// pick returns the queue with the most free slots.
func (d *Disk) pick() *queue {
	best := d.queues[0]
	if len(d.queues) > 1 {
		most := best.pool.count.Load()
		for _, q := range d.queues[1:] {
			if n := q.pool.count.Load(); n > most {
				best, most = q, n
			}
		}
	}
	return best
}

// Size returns the size of the disk in bytes.
func (d *Disk) Size() int64 { return int64(d.dev.Geometry().Sectors) << block.SectorShift }

// Geometry returns the present geometry.
func (d *Disk) Geometry() block.Geometry { return d.dev.Geometry() }

// BlockSize returns the logical block size in bytes. Offsets and lengths are multiples of it.
func (d *Disk) BlockSize() int { return 1 << d.shift }

// MaxIO returns the size of a Buffer in bytes.
func (d *Disk) MaxIO() int { return d.maxIO }

// Stats returns the counters of the disk. A call that needs several requests counts as often.
func (d *Disk) Stats() block.Stats {
	var total block.Stats
	for _, q := range d.queues {
		total.Add(q.Snapshot())
	}
	return total
}

// ErrClosed is the error of calls after Close. It is os.ErrClosed.
var ErrClosed = os.ErrClosed

// Close closes the disk. Calls that have not begun fail with ErrClosed, and requests in flight
// are finished. If they are not finished within CloseTimeout, the target is given up, and they
// fail. A Disk of New cannot give up its device, and waits.
//
// Buffers and batches may be closed after the disk. If there are any, the target is given up
// at once, so that it cannot access them any more. Their memory stays until they are closed.
//
// Close may be called again, also from several goroutines. Each call returns the same.
func (d *Disk) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), CloseTimeout)
	defer cancel()
	return d.Shutdown(ctx)
}

// CloseTimeout is the time that Close gives requests in flight, and the target to answer.
const CloseTimeout = 5 * time.Second

// Shutdown is Close with the time of ctx in the place of CloseTimeout.
func (d *Disk) Shutdown(ctx context.Context) error {
	d.mu.Lock()
	d.closed = true
	lent := d.lent
	d.mu.Unlock()
	d.shut.Store(true)
	d.closing.Do(func() { go d.end(ctx, lent > 0) })
	if lent > 0 {
		return nil
	}
	<-d.gone
	return d.err
}

// end frees everything when no slot is out any more.
func (d *Disk) end(ctx context.Context, lent bool) {
	d.watch.notify()
	var idle []<-chan struct{}
	for _, q := range d.queues {
		idle = append(idle, q.pool.close())
	}
	if d.sub != nil && lent {
		d.sub.Abort(ErrClosed)
	}
	for _, c := range idle {
		select {
		case <-c:
			continue
		case <-ctx.Done():
		}
		if d.sub != nil {
			d.sub.Abort(ErrClosed)
		}
		<-c
	}
	errs := []error{d.freeQueues()}
	if d.sub != nil {
		errs = append(errs, d.sub.Close(ctx))
	}
	for _, free := range d.frees {
		errs = append(errs, free())
	}
	d.err = errors.Join(errs...)
	close(d.gone)
}

// lend counts a buffer or a batch that the caller gets.
func (d *Disk) lend() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return ErrClosed
	}
	d.lent++
	return nil
}

// takeBack undoes lend.
func (d *Disk) takeBack() {
	d.mu.Lock()
	d.lent--
	d.mu.Unlock()
}

// freeQueues closes the queues. If a loop has ended with requests at the back end, their memory
// is not freed, because the back end may still use it.
func (d *Disk) freeQueues() error {
	var errs []error
	for _, q := range d.queues {
		lost := q.loop.Call(func() {
			q.loop.Detach(q)
			errs = append(errs, q.back.Close())
		})
		if lost != nil && q.inflight == 0 {
			errs = append(errs, q.back.Close())
		}
	}
	return errors.Join(errs...)
}
