package rdmatest

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/rdma"
)

// protectionDomain implements rdma.PD.
type protectionDomain struct {
	device *device
	users  int // number of QPs and MRs
	closed bool
}

// AllocMR implements rdma.PD.
func (p *protectionDomain) AllocMR(length int, access rdma.Access) (rdma.MR, error) {
	mem, err := hostmem.Map(length)
	if err != nil {
		return nil, fmt.Errorf("allocate memory region: %w", err)
	}
	m, err := p.register(mem, access)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("allocate memory region: %w", err), hostmem.Unmap(mem))
	}
	m.own = true
	return m, nil
}

// RegMR implements rdma.PD.
func (p *protectionDomain) RegMR(mem []byte, access rdma.Access) (rdma.MR, error) {
	m, err := p.register(mem, access)
	if err != nil {
		return nil, fmt.Errorf("register memory region: %w", err)
	}
	return m, nil
}

func (p *protectionDomain) register(mem []byte, access rdma.Access) (*memoryRegion, error) {
	f := p.device.endpoint.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case p.closed:
		return nil, rdma.ErrClosed
	case len(mem) == 0:
		return nil, unix.EINVAL
	}
	if access&rdma.AccessRemoteWrite != 0 {
		access |= rdma.AccessLocalWrite
	}
	f.nextKey += 2
	m := &memoryRegion{pd: p, fabric: f, mem: mem, addr: hostmem.Addr(mem), access: access, lkey: f.nextKey, rkey: f.nextKey + 1}
	f.mrs[m.lkey], f.mrs[m.rkey] = m, m
	f.objects.MRs++
	p.users++
	return m, nil
}

// Close implements rdma.PD.
func (p *protectionDomain) Close() error {
	f := p.device.endpoint.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case p.closed:
		return nil
	case p.users > 0:
		return busy("protection domain")
	}
	p.closed = true
	f.objects.PDs--
	return nil
}

// memoryRegion implements rdma.MR.
type memoryRegion struct {
	pd         *protectionDomain
	fabric     *Fabric
	own        bool // the memory ends with the region
	mem        []byte
	addr       uint64
	access     rdma.Access
	lkey, rkey uint32
	closed     bool
}

// Bytes implements rdma.MR.
func (m *memoryRegion) Bytes() []byte { return m.mem }

// Addr implements rdma.MR.
func (m *memoryRegion) Addr() uint64 { return m.addr }

// LKey implements rdma.MR.
func (m *memoryRegion) LKey() uint32 { return m.lkey }

// RKey implements rdma.MR.
func (m *memoryRegion) RKey() uint32 { return m.rkey }

// Close implements rdma.MR.
func (m *memoryRegion) Close() error {
	f := m.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	if m.closed {
		return nil
	}
	m.closed = true
	delete(f.mrs, m.lkey)
	delete(f.mrs, m.rkey)
	m.pd.users--
	f.objects.MRs--
	if !m.own {
		return nil
	}
	return hostmem.Unmap(m.mem)
}

// piece returns the memory that a key names, or nil if the key, the domain, the rights or
// the bounds do not match. The key must be of the right kind.
func (f *Fabric) piece(p *protectionDomain, key uint32, remote bool, addr uint64, length uint32, need rdma.Access) []byte {
	m := f.mrs[key]
	if m == nil || m.pd != p || (key == m.rkey) != remote || m.access&need != need {
		return nil
	}
	off, size := addr-m.addr, uint64(len(m.mem)) // off is huge if addr is too low
	if off > size || uint64(length) > size-off {
		return nil
	}
	return m.mem[off : off+uint64(length)]
}

// invalidate ends a remote key of the domain. It returns false unless the region has the
// right AccessRemoteInvalidate.
func (f *Fabric) invalidate(p *protectionDomain, key uint32) bool {
	m := f.mrs[key]
	if m == nil || m.pd != p || key != m.rkey || m.access&rdma.AccessRemoteInvalidate == 0 {
		return false
	}
	delete(f.mrs, key)
	return true
}

var errTooLarge = fmt.Errorf("exceeds the device's limit: %w", unix.EINVAL)
