//go:build linux && cgo && !noverbs

package verbs

// #include "shim.h"
import "C"

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/rdma"
)

// pd is a protection domain.
type pd struct {
	device *device
	c      *C.struct_ibv_pd
	mu     sync.RWMutex // guards closed, and c until it is freed
	closed bool
}

// AllocMR implements rdma.PD.
func (p *pd) AllocMR(length int, access rdma.Access) (rdma.MR, error) {
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
func (p *pd) RegMR(mem []byte, access rdma.Access) (rdma.MR, error) {
	m, err := p.register(mem, access)
	if err != nil {
		return nil, fmt.Errorf("register memory region: %w", err)
	}
	return m, nil
}

func (p *pd) register(mem []byte, access rdma.Access) (*mr, error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	switch {
	case access&rdma.AccessRemoteInvalidate != 0:
		return nil, fmt.Errorf("keys that the peer may invalidate: %w", rdma.ErrUnsupported)
	case p.closed:
		return nil, rdma.ErrClosed
	case len(mem) == 0:
		return nil, unix.EINVAL
	}
	c, err := C.reg_mr(p.c, unsafe.Pointer(unsafe.SliceData(mem)), C.size_t(len(mem)), accessFlags(access))
	if c == nil {
		return nil, registerError(len(mem), err)
	}
	return &mr{c: c, mem: mem, addr: hostmem.Addr(mem), lkey: uint32(c.lkey), rkey: uint32(c.rkey)}, nil
}

func accessFlags(a rdma.Access) C.int {
	var flags C.int
	if a&(rdma.AccessLocalWrite|rdma.AccessRemoteWrite) != 0 { // remote write requires local write
		flags |= C.IBV_ACCESS_LOCAL_WRITE
	}
	if a&rdma.AccessRemoteRead != 0 {
		flags |= C.IBV_ACCESS_REMOTE_READ
	}
	if a&rdma.AccessRemoteWrite != 0 {
		flags |= C.IBV_ACCESS_REMOTE_WRITE
	}
	return flags
}

// registerError adds the limit on locked memory to ENOMEM if the limit is the likely
// cause.
func registerError(length int, err error) error {
	var limit unix.Rlimit
	if errors.Is(err, unix.ENOMEM) && unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) == nil && limit.Cur != unix.RLIM_INFINITY {
		return fmt.Errorf("register %d bytes: %w; locked memory is limited to %d bytes (RLIMIT_MEMLOCK, without CAP_IPC_LOCK)",
			length, err, limit.Cur)
	}
	return fmt.Errorf("register %d bytes: %w", length, err)
}

// Close implements rdma.PD. It fails while the domain is in use.
func (p *pd) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	if err := destroyed("protection domain", C.ibv_dealloc_pd(p.c)); err != nil {
		return err
	}
	p.closed = true
	p.device.put()
	return nil
}

// mr is a memory region.
type mr struct {
	c          *C.struct_ibv_mr
	own        bool // the memory ends with the region
	mem        []byte
	addr       uint64
	lkey, rkey uint32
	mu         sync.Mutex // guards c and closed
	closed     bool
}

func (m *mr) Bytes() []byte { return m.mem }
func (m *mr) Addr() uint64  { return m.addr }
func (m *mr) LKey() uint32  { return m.lkey }
func (m *mr) RKey() uint32  { return m.rkey }

// Close implements rdma.MR. If the registration cannot be ended, the memory stays mapped,
// because the device may still write to it.
func (m *mr) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil
	}
	if err := destroyed("memory region", C.ibv_dereg_mr(m.c)); err != nil {
		return err
	}
	m.c, m.closed = nil, true
	if !m.own {
		return nil
	}
	return hostmem.Unmap(m.mem)
}
