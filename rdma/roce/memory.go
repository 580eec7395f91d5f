package roce

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/rdma"
)

// device implements rdma.Device. A provider has exactly one.
type device struct{ provider *Provider }

// Limits of the device
const (
	maxQPWR       = 4096
	maxSGE        = 2
	maxCQE        = 1 << 16
	maxReadAtomic = 16
)

var errTooLarge = fmt.Errorf("exceeds the device's limit: %w", unix.EINVAL)

// busy returns the error of closing an object that is in use.
func busy(what string) error { return fmt.Errorf("destroy %s: %w", what, unix.EBUSY) }

// Attr implements rdma.Device.
func (d *device) Attr() rdma.DeviceAttr {
	return rdma.DeviceAttr{
		Name: "roce", MaxQPWR: maxQPWR, MaxSGE: maxSGE, MaxCQE: maxCQE, MaxMR: 1 << 16, MaxMRSize: 1 << 40,
		MaxQPReadAtomic: maxReadAtomic, CompVectors: d.provider.cfg.Receivers, Software: true,
	}
}

// Removed implements rdma.Device. There is no device that could be removed.
func (*device) Removed() <-chan struct{} { return nil }

// AllocPD implements rdma.Device.
func (d *device) AllocPD() (rdma.PD, error) {
	return &domain{device: d, local: make(map[uint32]*region), remote: make(map[uint32]*region)}, nil
}

// domain implements rdma.PD. A goroutine that accesses memory of its regions looks up the
// key and uses the memory while it holds mu for reading. So a key that was removed from
// the maps is not in use any more. mu is an innermost lock.
type domain struct {
	device *device
	mu     sync.RWMutex // guards the fields below, and the memory of the regions
	local  map[uint32]*region
	remote map[uint32]*region
	users  int // number of queue pairs and regions
	closed bool
}

// AllocMR implements rdma.PD.
func (d *domain) AllocMR(length int, access rdma.Access) (rdma.MR, error) {
	mem, err := hostmem.Map(length)
	if err != nil {
		return nil, fmt.Errorf("allocate memory region: %w", err)
	}
	m, err := d.register(mem, access)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("allocate memory region: %w", err), hostmem.Unmap(mem))
	}
	m.own = true
	return m, nil
}

// RegMR implements rdma.PD.
func (d *domain) RegMR(mem []byte, access rdma.Access) (rdma.MR, error) {
	m, err := d.register(mem, access)
	if err != nil {
		return nil, fmt.Errorf("register memory region: %w", err)
	}
	return m, nil
}

func (d *domain) register(mem []byte, access rdma.Access) (*region, error) {
	if access&rdma.AccessRemoteWrite != 0 {
		access |= rdma.AccessLocalWrite
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return nil, rdma.ErrClosed
	case len(mem) == 0:
		return nil, unix.EINVAL
	}
	m := &region{domain: d, mem: mem, addr: hostmem.Addr(mem), access: access, lkey: newKey(d.local), rkey: newKey(d.remote)}
	d.local[m.lkey], d.remote[m.rkey] = m, m
	d.users++
	return m, nil
}

// use keeps the domain open for one more queue pair or region.
func (d *domain) use() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return rdma.ErrClosed
	}
	d.users++
	return nil
}

// unuse undoes use.
func (d *domain) unuse() {
	d.mu.Lock()
	d.users--
	d.mu.Unlock()
}

// newKey picks a random key that is not in use. The peer cannot guess it.
func newKey(used map[uint32]*region) uint32 {
	for {
		if k := random32(); k != 0 && used[k] == nil {
			return k
		}
	}
}

func random32() uint32 {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return binary.NativeEndian.Uint32(b[:])
}

// Close implements rdma.PD.
func (d *domain) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed && d.users > 0 {
		return busy("protection domain")
	}
	d.closed = true
	return nil
}

// region implements rdma.MR.
type region struct {
	domain     *domain
	own        bool // the memory ends with the region
	mem        []byte
	addr       uint64
	access     rdma.Access
	lkey, rkey uint32
	closed     bool // guarded by the domain's lock
}

// Bytes implements rdma.MR.
func (m *region) Bytes() []byte { return m.mem }

// Addr implements rdma.MR.
func (m *region) Addr() uint64 { return m.addr }

// LKey implements rdma.MR.
func (m *region) LKey() uint32 { return m.lkey }

// RKey implements rdma.MR.
func (m *region) RKey() uint32 { return m.rkey }

// Close implements rdma.MR. Its keys are not in use any more when it returns.
func (m *region) Close() error {
	d := m.domain
	d.mu.Lock()
	defer d.mu.Unlock()
	if m.closed {
		return nil
	}
	m.closed = true
	delete(d.local, m.lkey)
	if d.remote[m.rkey] == m { // it was not invalidated
		delete(d.remote, m.rkey)
	}
	d.users--
	if !m.own {
		return nil
	}
	return hostmem.Unmap(m.mem)
}

// piece returns the memory that a key names, or nil if the key, the rights or the bounds
// do not match. The domain's lock must be held while the memory is used.
func piece(keys map[uint32]*region, key uint32, addr, length uint64, need rdma.Access) []byte {
	m := keys[key]
	if m == nil || m.access&need != need {
		return nil
	}
	off, size := addr-m.addr, uint64(len(m.mem)) // off is huge if addr is too low
	if off > size || length > size-off {
		return nil
	}
	return m.mem[off : off+length]
}

// invalidate ends a remote key. It returns false unless the region has the right
// AccessRemoteInvalidate.
func (d *domain) invalidate(key uint32) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.remote[key]; m == nil || m.access&rdma.AccessRemoteInvalidate == 0 {
		return false
	}
	delete(d.remote, key)
	return true
}
