package uring

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Config configures a Ring.
type Config struct {
	// Entries is the size of the submission queue, at most 32768. It is rounded up to
	// a power of two. Zero means 64.
	Entries uint32
	// CQEntries is the size of the completion queue, rounded up to a power of two.
	// Zero means twice Entries. The kernel keeps completions that do not fit in a
	// list of its own. So the size affects the speed, but no completion is lost.
	CQEntries uint32
	// SQE128 makes entries of 128 bytes, which ublk's control device needs.
	SQE128 bool
	// Loop makes a ring for a thread that waits on it for its whole life. Completions
	// are made only inside Submit, Wait and WaitBlocking of the thread that called
	// New, and never interrupt it (SINGLE_ISSUER, DEFER_TASKRUN). TaskRun reports
	// whether completions wait to be made (TASKRUN_FLAG).
	Loop bool
}

// Ring is an io_uring instance. The package documentation says which goroutine may use
// it, and how long entries are valid.
type Ring struct {
	sq  submission
	cq  completion
	arg *scratch // in mem

	enterFD    uintptr // fd, or the index of its registration
	enterFlags uintptr // enterRegisteredRing or 0
	blockFlags uintptr // additional flags of WaitBlocking

	fd       int
	features uint32
	flags    uint32
	ops      [maxOps / 64]uint64 // supported opcodes
	mem      [][]byte            // mappings: rings, SQEs, scratch, buffer rings
	fixed    fixedFiles
	closed   bool
}

// scratch is memory for arguments that system calls read through a second pointer, which
// must not point to Go memory.
type scratch struct {
	arg geteventsArg
	ts  timespec
	fd  int32
}

// New makes a ring. With Config.Loop, the calling goroutine must be locked to its thread,
// and must use the ring until Close.
//
// The error is ErrUnsupported (errors.Is) if the kernel has no io_uring or is too old,
// EPERM if the administrator has disabled io_uring (/proc/sys/kernel/io_uring_disabled),
// and ENOMEM if RLIMIT_MEMLOCK or memory is exhausted.
func New(cfg Config) (*Ring, error) {
	if cfg.Entries == 0 {
		cfg.Entries = 64
	}
	if cfg.CQEntries == 0 {
		cfg.CQEntries = 2 * cfg.Entries
	}
	p := params{cqEntries: cfg.CQEntries, flags: setupCQSize | setupClamp | setupSubmitAll}
	if cfg.SQE128 {
		p.flags |= setupSQE128
	}
	if cfg.Loop {
		p.flags |= setupSingleIssuer | setupDeferTaskrun | setupTaskrunFlag
	}
	fd, err := setup(cfg.Entries, &p)
	if err != nil {
		return nil, fmt.Errorf("set up io_uring: %w", err)
	}
	r := &Ring{fd: fd, enterFD: uintptr(fd), features: p.features, flags: p.flags}
	if err := r.open(&p, cfg.Loop); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// setup makes the ring's descriptor, with NO_SQARRAY if the kernel supports it. The
// kernel sets O_CLOEXEC.
func setup(entries uint32, p *params) (int, error) {
	want := *p
	for _, optional := range []uint32{setupNoSQArray, 0} {
		*p = want
		p.flags |= optional
		fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(p)), 0)
		if errno == 0 {
			return int(fd), nil
		}
		if errno != unix.EINVAL {
			return -1, errno
		}
	}
	return -1, fmt.Errorf("%w: the kernel lacks a flag of %#x", errors.ErrUnsupported, want.flags)
}

// open maps the queues, probes the opcodes and registers the descriptor.
func (r *Ring) open(p *params, loop bool) error {
	if p.features&featRequired != featRequired {
		return fmt.Errorf("set up io_uring: %w: the kernel lacks a feature of %#x", errors.ErrUnsupported, featRequired)
	}
	size := p.cqOff.cqes + p.cqEntries*uint32(unsafe.Sizeof(CQE{}))
	if p.flags&setupNoSQArray == 0 {
		size = max(size, p.sqOff.array+p.sqEntries*4)
	}
	rings, err := r.mmap("rings", r.fd, offSQRing, int(size))
	if err != nil {
		return err
	}
	stride := unsafe.Sizeof(SQE{})
	if p.flags&setupSQE128 != 0 {
		stride *= 2
	}
	sqes, err := r.mmap("submission entries", r.fd, offSQEs, int(uintptr(p.sqEntries)*stride))
	if err != nil {
		return err
	}
	args, err := r.mmap("arguments", -1, 0, int(unsafe.Sizeof(scratch{})))
	if err != nil {
		return err
	}
	word := func(off uint32) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&rings[off])) }
	r.sq = submission{
		khead: word(p.sqOff.head), ktail: word(p.sqOff.tail), kflags: word(p.sqOff.flags),
		mask: p.sqEntries - 1, stride: stride, sqes: unsafe.Pointer(&sqes[0]),
	}
	r.cq = completion{
		khead: word(p.cqOff.head), ktail: word(p.cqOff.tail),
		mask: p.cqEntries - 1, cqes: unsafe.Pointer(&rings[p.cqOff.cqes]),
	}
	if p.flags&setupNoSQArray == 0 {
		// Older kernels need this indirection: slot i is entry i.
		for i := range p.sqEntries {
			*(*uint32)(unsafe.Pointer(&rings[p.sqOff.array+i*4])) = i
		}
	}
	r.arg = (*scratch)(unsafe.Pointer(&args[0]))
	r.arg.arg.timeout = uint64(uintptr(unsafe.Pointer(&r.arg.ts)))
	if r.features&featNoIowait != 0 {
		r.blockFlags = enterNoIowait
	}
	if err := r.probe(); err != nil {
		return err
	}
	if loop {
		return r.registerFD()
	}
	return nil
}

func (r *Ring) mmap(what string, fd int, off int64, size int) ([]byte, error) {
	flags := unix.MAP_SHARED | unix.MAP_POPULATE
	if fd < 0 {
		flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_POPULATE
	}
	mem, err := unix.Mmap(fd, off, size, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, fmt.Errorf("map io_uring %s: %w", what, err)
	}
	r.mem = append(r.mem, mem)
	return mem, nil
}

// register calls io_uring_register(2).
func (r *Ring) register(op uintptr, arg unsafe.Pointer, n uintptr) (int, error) {
	if r.closed && r.mem == nil {
		return 0, ErrClosed
	}
	for {
		v, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), op, uintptr(arg), n, 0, 0)
		switch errno {
		case 0:
			return int(v), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

func (r *Ring) probe() error {
	var p probe
	if _, err := r.register(registerProbe, unsafe.Pointer(&p), maxOps); err != nil {
		return fmt.Errorf("probe io_uring: %w", err)
	}
	for _, o := range p.ops[:p.opsLen] {
		if o.flags&opSupported != 0 {
			r.ops[o.op/64] |= 1 << (o.op % 64)
		}
	}
	return nil
}

// registerFD registers the ring's descriptor, which saves its look-up at each enter. The
// registration belongs to the thread.
func (r *Ring) registerFD() error {
	u := rsrcUpdate{offset: ^uint32(0), data: uint64(r.fd)}
	if _, err := r.register(registerRingFDs, unsafe.Pointer(&u), 1); err != nil {
		return fmt.Errorf("register io_uring descriptor: %w", err)
	}
	r.enterFD, r.enterFlags = uintptr(u.offset), enterRegisteredRing
	return nil
}

// ErrClosed means that the ring was closed.
var ErrClosed = errors.New("io_uring: closed")

// Close frees all memory and the descriptor. The kernel cancels pending commands, and may
// hold its last references a moment longer. Call it on the goroutine that used the ring.
// A second Close does nothing. A closed ring has no free entries and no completions, and
// its other methods return ErrClosed.
func (r *Ring) Close() error {
	if r.closed {
		return nil
	}
	r.closed = true
	var errs []error
	if r.enterFlags != 0 {
		u := rsrcUpdate{offset: uint32(r.enterFD)}
		if _, err := r.register(unregisterRingFDs, unsafe.Pointer(&u), 1); err != nil {
			errs = append(errs, fmt.Errorf("unregister io_uring descriptor: %w", err))
		}
	}
	if err := unix.Close(r.fd); err != nil {
		errs = append(errs, fmt.Errorf("close io_uring: %w", err))
	}
	for _, mem := range r.mem {
		if err := unix.Munmap(mem); err != nil {
			errs = append(errs, fmt.Errorf("unmap io_uring: %w", err))
		}
	}
	*r = Ring{closed: true, fd: -1}
	return errors.Join(errs...)
}

// Supports reports whether the kernel supports an opcode.
func (r *Ring) Supports(op Op) bool { return r.ops[op/64]>>(op%64)&1 != 0 }

// Entries returns the size of the submission queue.
func (r *Ring) Entries() int { return int(r.sq.mask) + 1 }

// SQE returns the next free submission entry, which is zeroed and already queued. The
// caller must fill it in before the next Submit or Wait. SQE returns nil if the queue is
// full. Submit then makes room.
func (r *Ring) SQE() *SQE {
	if r.closed {
		return nil
	}
	return r.sq.next()
}

// Pending returns the number of entries that the kernel has not consumed.
func (r *Ring) Pending() int {
	if r.closed {
		return 0
	}
	return int(r.sq.pending())
}

// CQReady reports whether Next would return a completion. It only reads shared memory.
func (r *Ring) CQReady() bool { return !r.closed && r.cq.ready() }

// TaskRun reports whether completions wait for Submit or Wait to make them visible. It
// only reads shared memory.
func (r *Ring) TaskRun() bool {
	return !r.closed && r.sq.kflags.Load()&(sqTaskrun|sqCQOverflow) != 0
}

// Next returns the oldest completion that was not consumed, or nil. The completion is
// valid until Seen.
func (r *Ring) Next() *CQE {
	if r.closed {
		return nil
	}
	return r.cq.next()
}

// Seen consumes the completion that Next returned.
func (r *Ring) Seen() { r.cq.seen() }

// Submit passes the pending entries to the kernel and lets it make the completions that
// wait for this (TaskRun). It does not wait for other completions. The kernel may consume
// fewer entries if memory is short; Pending then is not zero.
//
// Submit keeps the scheduler's P. It takes as long as the commands' own work: a few
// microseconds, and the time to copy their data.
func (r *Ring) Submit() error {
	return r.enter(0, enterGetEvents, 0, 0)
}

// Wait submits like Submit, and waits until there is a completion or the bound has
// passed. It may return early without a completion and without an error (EINTR), so call
// Next. It keeps the scheduler's P, so the bound must be small, about 2 ms. The runtime
// interrupts it with a signal to stop the world.
func (r *Ring) Wait(bound time.Duration) error {
	if r.closed {
		return ErrClosed
	}
	bound = max(bound, 0)
	r.arg.ts.sec, r.arg.ts.nsec = int64(bound/time.Second), int64(bound%time.Second)
	return r.enter(1, enterGetEvents|enterExtArg, uintptr(unsafe.Pointer(&r.arg.arg)), unsafe.Sizeof(r.arg.arg))
}

// WaitBlocking submits like Submit, and waits without a bound until there is a
// completion. It gives up the scheduler's P. Like Wait, it may return early.
func (r *Ring) WaitBlocking() error {
	if r.closed {
		return ErrClosed
	}
	r.publish()
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, r.enterFD, uintptr(r.sq.pending()), 1,
		enterGetEvents|r.enterFlags|r.blockFlags, 0, 0)
	return enterError(errno)
}

func (r *Ring) enter(wait, flags, arg, argSize uintptr) error {
	if r.closed {
		return ErrClosed
	}
	r.publish()
	_, _, errno := unix.RawSyscall6(unix.SYS_IO_URING_ENTER, r.enterFD, uintptr(r.sq.pending()), wait,
		flags|r.enterFlags, arg, argSize)
	return enterError(errno)
}

func (r *Ring) publish() {
	r.sq.publish()
	r.cq.publish()
}

// enterError classifies the results of io_uring_enter(2). The head of the queue shows how
// many entries were submitted, whatever the result is. After a temporary error, the
// caller finds the other entries pending and calls again.
func enterError(errno unix.Errno) error {
	switch errno {
	case 0:
		return nil
	case unix.EINTR, unix.ETIME: // a signal; the bound has passed
		return nil
	case unix.EAGAIN, unix.EBUSY: // memory is short; the completion queue is full
		return nil
	}
	return fmt.Errorf("enter io_uring: %w", errno)
}

// Entries has the submission entries of a loop. Only the loop may use it. Buffer group 65535 is
// in use.
type Entries interface {
	// SQE returns a free submission entry, which is zeroed and queued. The caller must
	// fill it in before it calls the loop. If the queue is full, its entries are submitted
	// first. After the end of the loop, or of its ring, the entry has no effect.
	SQE() *SQE
	// Submit enters the kernel with the entries so far. The loop does that by itself, too.
	Submit() error
}

// OfLoop returns the entries of a *poller.Loop. Package poller sets it, so that its exported
// methods do not name types that others cannot use.
var OfLoop func(loop any) Entries
