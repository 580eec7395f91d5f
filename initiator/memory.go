package initiator

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/process"
	"ublk-nvmeof/rdma"
)

// memory registers the memory for the I/O of a subsystem, which is in slabs: the chunks of the
// buffers of each queue that have been needed, and the regions of front ends. They are in the
// domain of each path. A slab outlives its queue until no adapter has to read it
// (Subsystem.settle). Methods may be called from any goroutine.
type memory struct {
	chunk      int                // bytes of a chunk of buffers
	turns      int                // spareTurns
	limit      int64              // largest number of bytes of buffers
	limited    bool               // locked memory is limited, and registered memory may be locked
	mu         sync.Mutex         // guards what follows, and the fields of the domains
	used       int64              // bytes of buffers of open queues
	regions    int64              // bytes of regions
	registered int64              // bytes of all slabs that are registered
	slabs      map[*slab]struct{} // that are registered
	domains    [MaxPaths]*domain
}

// slab is memory that is registered as a whole. Its address is the same on all paths.
type slab struct {
	mem  []byte
	base uint64         // address of mem
	keys [MaxPaths]keys // by slot; they change with the device, between associations of the path

	// The lane of the queue uses these:
	ready bool // it is registered
	asked bool // it is being made ready, or will be tried again

	// Of a region:
	gone  atomic.Bool // no command may name it any more
	users []users     // by lane
}

// users is the number of requests from Submit to Reap whose data is in a region. Only the lane uses
// it.
type users struct {
	n int
	_ cpu.CacheLinePad
}

// keys are the keys of a slab in the domain of a path.
type keys struct{ local, remote uint32 }

// domain is the protection domain of a path: it has the connections of the path, and the
// buffers of all queues. Each path has one of its own, even if several use the same device, so
// that a target cannot use a key over the connections of another path. Another device may
// replace the present one between two associations. The buffers stay where they are, and get
// new keys.
type domain struct {
	mem  *memory
	slot int         // of the path
	dev  rdma.Device // nil: none at present
	pd   rdma.PD
	name string // name of the device, or of the last one
	regs map[*slab]registration
	old  []rdma.PD // domains of earlier devices that still have something in them
}

// registration is a slab in a domain.
type registration struct {
	pd rdma.PD
	mr rdma.MR
}

// lockLimited reports whether this process may lock only so much memory.
func lockLimited() bool {
	var limit unix.Rlimit
	return !process.MayLock() && (unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) != nil || limit.Cur != unix.RLIM_INFINITY)
}

// domain returns the domain of a path, which has no device yet.
func (m *memory) domain(slot int) *domain {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := &domain{mem: m, slot: slot, regs: make(map[*slab]registration)}
	m.domains[slot] = d
	return d
}

// use makes dev the device. If move is true, dev may differ from the present device, and
// no queue pair of any lane may exist on this path.
func (d *domain) use(dev rdma.Device, move bool) error {
	d.mem.mu.Lock()
	defer d.mem.mu.Unlock()
	switch {
	case d.dev == dev:
	case d.dev != nil && !move:
		return fmt.Errorf("route goes through %s, registered memory is on %s", dev.Attr().Name, d.name)
	default:
		pd, err := dev.AllocPD()
		if err != nil {
			return fmt.Errorf("allocate protection domain: %w", err)
		}
		if d.pd != nil {
			d.old = append(d.old, d.pd)
		}
		d.dev, d.pd, d.name = dev, pd, dev.Attr().Name
	}
	return d.gather()
}

// gather registers all slabs in the present domain. If it fails, a later call registers the
// rest.
func (d *domain) gather() error {
	for b := range d.mem.slabs {
		if err := d.register(b); err != nil {
			return fmt.Errorf("register %d bytes on %s: %w", len(b.mem), d.name, err)
		}
	}
	for len(d.old) > 0 {
		if err := d.old[0].Close(); err != nil {
			return fmt.Errorf("free protection domain: %w", err)
		}
		d.old = d.old[1:]
	}
	return nil
}

// register registers a slab in the present domain, and in no other.
func (d *domain) register(b *slab) error {
	r, ok := d.regs[b]
	if ok && r.pd == d.pd {
		return nil
	}
	mr, err := d.pd.RegMR(b.mem, rdma.AccessLocalWrite|rdma.AccessRemoteRead|rdma.AccessRemoteWrite)
	if err != nil {
		return err
	}
	if ok {
		if err := r.mr.Close(); err != nil {
			return errors.Join(err, mr.Close())
		}
	}
	d.regs[b] = registration{d.pd, mr}
	b.keys[d.slot] = keys{mr.LKey(), mr.RKey()}
	return nil
}

// unregister ends the registration of a slab.
func (d *domain) unregister(b *slab) error {
	r, ok := d.regs[b]
	if !ok {
		return nil
	}
	if err := r.mr.Close(); err != nil {
		return err
	}
	delete(d.regs, b)
	return nil
}

// removed returns a channel that is closed when the device is removed. Without a device it is nil.
func (d *domain) removed() <-chan struct{} {
	d.mem.mu.Lock()
	defer d.mem.mu.Unlock()
	if d.dev == nil {
		return nil
	}
	return d.dev.Removed()
}

// leave releases everything on a device that is being removed. The buffers are
// registered again on the next device. No connection of the path may be open.
func (d *domain) leave() error {
	d.mem.mu.Lock()
	defer d.mem.mu.Unlock()
	var errs []error
	for b := range d.regs {
		errs = append(errs, d.unregister(b))
	}
	for _, pd := range append(d.old, d.pd) {
		if pd != nil {
			errs = append(errs, pd.Close())
		}
	}
	d.dev, d.pd, d.old = nil, nil, nil
	return errors.Join(errs...)
}

// current returns the protection domain for connections and their memory.
func (d *domain) current() rdma.PD {
	d.mem.mu.Lock()
	defer d.mem.mu.Unlock()
	return d.pd
}

// device returns the name of the device.
func (d *domain) device() string {
	d.mem.mu.Lock()
	defer d.mem.mu.Unlock()
	return d.name
}

// MemoryError means that the buffers of a queue would exceed Config.MaxMemory. All values
// are in bytes.
type MemoryError struct {
	Want  int64 // for this queue
	Used  int64 // by the open queues
	Limit int64
}

func (e *MemoryError) Error() string {
	return fmt.Sprintf("%d bytes of I/O buffers are too many: %d of %d are in use", e.Want, e.Used, e.Limit)
}

// MemoryInfo says how much memory a subsystem has for I/O, in bytes. Targets can access what is
// registered.
type MemoryInfo struct {
	Used, Limit int64 // I/O buffers that are reserved, and the most that may be
	Registered  int64 // I/O buffers that are registered; the others cost nothing yet
	Regions     int64 // memory of front ends, registered by Namespace.Register
}

func (m *memory) info() MemoryInfo {
	m.mu.Lock()
	defer m.mu.Unlock()
	return MemoryInfo{Used: m.used, Limit: m.limit, Registered: m.registered - m.regions, Regions: m.regions}
}

// prepare populates a slab and registers it. Requests may use its memory meanwhile.
func (m *memory) prepare(b *slab) error {
	if err := hostmem.Populate(b.mem); err != nil {
		return err
	}
	return m.enroll(b)
}

// enroll registers a slab in all domains that have a device, or in none.
func (m *memory) enroll(b *slab) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.register(b); err != nil {
		return errors.Join(err, m.unregister(b))
	}
	return nil
}

// adopt registers a region.
func (m *memory) adopt(b *slab) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.register(b); err != nil {
		return errors.Join(err, m.unregister(b))
	}
	m.regions += int64(len(b.mem))
	return nil
}

// disown undoes adopt.
func (m *memory) disown(b *slab) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.slabs[b]; ok {
		m.regions -= int64(len(b.mem))
	}
	return m.unregister(b)
}

// register registers a slab in all domains that have a device. The others follow when their
// path has an association. The caller holds the lock.
func (m *memory) register(b *slab) error {
	if m.slabs == nil {
		m.slabs = make(map[*slab]struct{})
	}
	m.slabs[b] = struct{}{}
	m.registered += int64(len(b.mem))
	for _, d := range m.domains {
		if d != nil && d.pd != nil {
			if err := d.register(b); err != nil {
				return err
			}
		}
	}
	return nil
}

// reserve counts size bytes as used, unless they are too many. unreserve undoes it.
func (m *memory) reserve(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if size > m.limit-m.used {
		return &MemoryError{Want: size, Used: m.used, Limit: m.limit}
	}
	m.used += size
	return nil
}

func (m *memory) unreserve(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used -= size
}

// shut says that the buffers of a queue are not used any more. They stay as they are until
// release, but do not count.
func (m *memory) shut(q *nsQueue) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if q.closed {
		return fmt.Errorf("close queue: %w", rdma.ErrClosed)
	}
	q.closed = true
	m.used -= queueMemory(len(q.requests), q.buffers.size, m.chunk)
	return nil
}

// withdraw undoes enroll.
func (m *memory) withdraw(b *slab) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.unregister(b)
}

// unregister ends the registrations of a slab. If one of them cannot be ended, the memory must
// stay mapped, because the device may still write to it. The caller holds the lock.
func (m *memory) unregister(b *slab) error {
	if _, ok := m.slabs[b]; ok {
		delete(m.slabs, b)
		m.registered -= int64(len(b.mem))
	}
	var errs []error
	for _, d := range m.domains {
		if d != nil {
			errs = append(errs, d.unregister(b))
		}
	}
	return errors.Join(errs...)
}

// close frees the domains. No connection and no queue may be open.
func (m *memory) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for slot := range m.domains {
		errs = append(errs, m.drop(slot))
	}
	return errors.Join(errs...)
}

// forget frees the domain of a path that is removed. The path has no connection any more.
func (m *memory) forget(slot int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.domains[slot]
	var errs []error
	for b := range d.regs {
		errs = append(errs, d.unregister(b))
	}
	return errors.Join(append(errs, m.drop(slot))...)
}

// drop frees the domain of a path, which has no connection and no registration any more.
func (m *memory) drop(slot int) error {
	d := m.domains[slot]
	if d == nil {
		return nil
	}
	var errs []error
	if d.pd != nil {
		errs = append(errs, d.pd.Close())
	}
	for _, pd := range d.old {
		errs = append(errs, pd.Close())
	}
	m.domains[slot] = nil
	return errors.Join(errs...)
}
