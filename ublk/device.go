package ublk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/uring"
	"ublk-nvmeof/poller"
)

// Device is a ublk device that this process serves. Its methods may be called from any
// goroutine except those of its loops.
type Device struct {
	log  *slog.Logger
	info Info // what the driver granted

	// idle is a lock: it holds a token while nobody starts, stops or frees the
	// device. It guards the fields down to writeThrough.
	idle         chan struct{}
	ctl          *control // nil after everything was freed
	added        bool     // the driver has the device
	char         int      // descriptor of ublkcN, or -1
	serves       []*serving
	stopping     bool // Stop was called
	writeThrough bool // users were told that there is no volatile cache

	// Shared memory. registrar is nil if the device cannot have any.
	registrar block.Registrar
	sharing   sync.Mutex   // guards what follows; taken after idle
	shareCtl  *control     // for commands that wait for I/O; nil: not open
	shared    SharedMemory // that the driver has
	mapped    *mapping     // nil: this process does not have it
	unshared  bool         // the device has ended

	broken chan struct{} // closed when the device cannot continue
	once   sync.Once     // closes broken
	cause  error         // why; written before broken is closed

	done chan struct{} // closed when the device has ended
	err  error         // why; written before done is closed
}

// serving is a hardware queue with its loop and its memory.
type serving struct {
	*hwQueue
	loop  *poller.Loop
	ended chan struct{} // closed by the loop when neither the driver nor the back end holds a tag
	descs []byte        // the mapped descriptors; nil after they were unmapped

	// The loop alone uses these.
	base    uint64 // what poller.Loop.Handle returned
	begun   bool   // the loop serves the queue
	retired bool   // the loop will not serve the queue any more
}

// Start adds a ublk device, serves it from cfg.Device on cfg.Loops, and starts it. When
// Start returns without an error, the block device exists.
//
// After an error, Start removes the device again if it has added it. This has a time
// limit of its own. If it hangs because the back end does not answer requests, the error
// says so, and the device is removed in the background when they are answered. The loops
// cannot stop before that.
//
// Errors (errors.Is): ErrNoDriver, ErrPermission, ErrIDTaken, errors.ErrUnsupported if
// the driver lacks a feature that cfg.Recovery needs, the cause of ctx, and errors of the
// back end and of the system.
func Start(ctx context.Context, cfg Config) (*Device, error) {
	d := newDevice()
	if err := d.start(ctx, cfg); err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		if undone := d.clear(undo); undone != nil {
			err = errors.Join(err, fmt.Errorf("undo: %w", undone))
			go d.linger()
		}
		return nil, fmt.Errorf("start ublk device: %w", err)
	}
	d.log.Info("ublk device started", "device", d.Path(), "queues", d.info.Queues, "depth", d.info.Depth,
		"max_io", d.info.MaxIO, "features", d.info.Features.String())
	d.run()
	return d, nil
}

func newDevice() *Device {
	return &Device{
		idle: make(chan struct{}, 1), char: -1, broken: make(chan struct{}), done: make(chan struct{}),
	}
}

// run releases the lock of a device that has started and watches the device.
func (d *Device) run() {
	d.idle <- struct{}{}
	go d.watch()
}

func (d *Device) start(ctx context.Context, cfg Config) error {
	if err := cfg.setDefaults(); err != nil {
		return err
	}
	d.log = cfg.Log
	geometry := cfg.Device.Geometry()
	if err := geometry.Validate(); err != nil {
		return err
	}
	var err error
	if d.ctl, err = openControl(); err != nil {
		return err
	}
	known, err := d.ctl.features(ctx)
	if err != nil {
		return err
	}
	if err := d.add(ctx, cfg, geometry, known); err != nil {
		return err
	}
	d.writeThrough = !geometry.VolatileCache
	p := paramsOf(geometry, uint32(d.info.MaxIO))
	if err := d.command(ctx, call{cmd: setParams, buf: bytesOf(&p)}); err != nil {
		return err
	}
	if d.char, err = openChar(ctx, d.info.ID); err != nil {
		return err
	}
	if err := d.begin(ctx, cfg); err != nil {
		return err
	}
	// START_DEV waits until all queues have fetched their tags, and for the reads
	// of its partition scan. The loops serve meanwhile.
	ctx, cancel := d.untilBroken(ctx)
	defer cancel()
	return d.command(ctx, call{cmd: startDev, data: uint64(os.Getpid())})
}

// untilBroken returns a context that ends with ctx and when a loop fails, because a
// command that waits for the fetches of that loop would never end.
func (d *Device) untilBroken(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-d.broken:
			cancel(d.cause)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// command executes a control command for this device.
func (d *Device) command(ctx context.Context, k call) error {
	k.id = uint32(d.info.ID)
	return d.ctl.do(ctx, k)
}

// add adds the device and stores what the driver granted.
func (d *Device) add(ctx context.Context, cfg Config, g block.Geometry, known Features) error {
	want := IoctlEncode | cfg.Recovery.features()
	if cfg.ShareMemory {
		want |= ShmemZeroCopy
		d.registrar = cfg.Device.(block.Registrar) // as setDefaults has checked
	}
	if !known.Has(want) {
		return fmt.Errorf("the ublk driver lacks %v: %w", want&^known, errors.ErrUnsupported)
	}
	page := os.Getpagesize()
	raw := devInfo{
		nrHWQueues: uint16(len(cfg.Loops)), queueDepth: uint16(cfg.Depth),
		maxIOBufBytes: uint32(min(cfg.MaxIO, int(g.MaxIO)) / page * page),
		devID:         uint32(int32(cfg.ID)), // -1 is anyID
		flags:         uint64(want | known&cfg.Recovery.optional()), serverFlags: newCookie(),
	}
	err := d.ctl.do(ctx, call{cmd: addDev, id: raw.devID, buf: bytesOf(&raw)})
	switch {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w: %s: %w", ErrIDTaken, blockPath(cfg.ID), err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: %w", ErrPermission, err)
	case err != nil:
		return err
	}
	d.added, d.info = true, infoOf(&raw)
	d.log = d.log.With("ublk", d.info.ID)
	switch i := d.info; {
	case !i.Features.Has(want):
		return fmt.Errorf("the ublk driver did not grant %v: %w", want&^i.Features, errors.ErrUnsupported)
	case i.Queues < 1 || i.Queues > len(cfg.Loops) || i.Depth < 1 || i.Depth > maxDepth || i.MaxIO < page:
		return fmt.Errorf("the ublk driver granted %d queues of depth %d and %d bytes", i.Queues, i.Depth, i.MaxIO)
	}
	return nil
}

// openBackoff is the longest pause between two attempts to open ublkcN.
const openBackoff = 50 * time.Millisecond

// openChar opens ublkcN. It tries again while udev has not made the node (ENOENT) or has
// it open (EBUSY).
func openChar(ctx context.Context, id int) (int, error) {
	path, pause := charPath(id), time.Millisecond
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil {
			return fd, nil
		}
		err = fmt.Errorf("open %s: %w", path, err)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EBUSY):
			return -1, err
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, openBackoff)
		case <-ctx.Done():
			return -1, fmt.Errorf("%w: %w", err, context.Cause(ctx))
		}
	}
}

// begin opens the queues and has the loops fetch their tags.
func (d *Device) begin(ctx context.Context, cfg Config) error {
	if err := d.openAll(cfg); err != nil {
		return err
	}
	if !cfg.KeepAffinity {
		if err := d.pin(ctx); err != nil {
			return err
		}
	}
	for i, s := range d.serves {
		if err := onLoop(ctx, s.loop, func() error { return s.begin(d.char) }); err != nil {
			return fmt.Errorf("fetch requests of queue %d: %w", i, err)
		}
	}
	return nil
}

// openAll opens all queues, several at a time: most of the time goes into the zeroing of their
// buffers.
func (d *Device) openAll(cfg Config) error {
	opened, errs := make([]*serving, d.info.Queues), make([]error, d.info.Queues)
	atOnce := make(chan struct{}, runtime.NumCPU())
	var opening sync.WaitGroup
	for i := range opened {
		atOnce <- struct{}{}
		opening.Go(func() {
			opened[i], errs[i] = d.open(i, cfg)
			<-atOnce
		})
	}
	opening.Wait()
	for _, s := range opened {
		if s != nil {
			d.serves = append(d.serves, s)
		}
	}
	return errors.Join(errs...)
}

// open opens queue i of the driver and of the back end.
func (d *Device) open(i int, cfg Config) (*serving, error) {
	mem, descs, err := mapDescs(d.char, i, d.info.Depth)
	if err != nil {
		return nil, err
	}
	back, err := cfg.Device.OpenQueue(i, block.QueueConfig{Depth: d.info.Depth, MaxIO: d.info.MaxIO, WriteThrough: d.writeThrough})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open queue %d of the back end: %w", i, err), unix.Munmap(mem))
	}
	s := &serving{loop: cfg.Loops[i], ended: make(chan struct{}), descs: mem}
	s.hwQueue = newHWQueue(i, descs, back, d.info.MaxIO, func() { close(s.ended) }, d.fail)
	s.sharing = d.registrar != nil
	return s, nil
}

// begin starts to serve the queue. Only the loop calls it.
func (s *serving) begin(char int) error {
	if s.retired {
		return context.Canceled
	}
	s.begun = true
	s.base = s.loop.Handle(s.hwQueue)
	s.loop.Attach(s.hwQueue)
	entries := uring.OfLoop(s.loop)
	s.hwQueue.start(entries, char, s.base)
	return entries.Submit()
}

// retire ends a queue that has not been served, and prevents that it is served later.
// Only the loop calls it.
func (s *serving) retire() {
	if !s.begun && !s.retired {
		s.retired = true
		close(s.ended)
	}
}

// finish detaches a queue that has ended from the loop and frees its memory. Only the
// loop calls it.
func (s *serving) finish() error {
	if s.begun {
		s.loop.Detach(s.hwQueue)
		s.loop.Unhandle(s.base)
		s.begun, s.retired = false, true
	}
	return s.free()
}

// free frees the memory of the queue. It is called on the loop, or after the loop has
// ended.
func (s *serving) free() error {
	if s.descs == nil {
		return nil
	}
	if s.inflight > 0 {
		// The loop has ended with requests in flight. The back end may still
		// write to their buffers.
		return fmt.Errorf("queue %d: the back end holds %d requests", s.index, s.inflight)
	}
	err := errors.Join(s.back.Close(), unix.Munmap(s.descs))
	s.descs = nil
	return err
}

// onLoop runs fn on a loop and waits for it. If ctx is done first, it returns, and fn may
// still run later.
func onLoop(ctx context.Context, l *poller.Loop, fn func() error) error {
	result := make(chan error, 1)
	go func() {
		var err error
		if stopped := l.Call(func() { err = fn() }); stopped != nil {
			err = stopped
		}
		result <- err
	}()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// fail records that the device cannot continue. Only the first cause counts.
func (d *Device) fail(err error) {
	d.once.Do(func() {
		d.cause = err
		close(d.broken)
	})
}

// ID returns the device number N of /dev/ublkbN.
func (d *Device) ID() int { return d.info.ID }

// Path returns the path of the block device, /dev/ublkbN.
func (d *Device) Path() string { return d.info.Path() }

// Info returns what the driver granted when the device was added. Its State and PID are
// those of that moment. Get returns the current ones.
func (d *Device) Info() Info { return d.info }

// Features returns the features that the driver granted to the device.
func (d *Device) Features() Features { return d.info.Features }

// Done returns a channel that is closed when the device has ended, after Stop or by
// itself, and everything was freed as far as possible.
func (d *Device) Done() <-chan struct{} { return d.done }

// Err returns why the device has ended: nil after Stop, ErrStopped if another process
// stopped or deleted it, or the error of a queue or a loop. It returns nil until Done is
// closed.
func (d *Device) Err() error {
	select {
	case <-d.done:
		return d.err
	default:
		return nil
	}
}

// Snapshot returns the counters, summed over all queues, since this process began to serve
// the device.
func (d *Device) Snapshot() block.Stats {
	var total block.Stats
	for _, s := range d.QueueStats() {
		total.Add(s)
	}
	return total
}

// QueueStats returns the counters of each hardware queue.
func (d *Device) QueueStats() []block.Stats {
	all := make([]block.Stats, len(d.serves))
	for i, q := range d.serves {
		all[i] = q.Snapshot()
	}
	return all
}
