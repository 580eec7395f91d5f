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
	if access&rdma.AccessRemoteInvalidate != 0 {
		return nil, fmt.Errorf("allocate memory region that the peer may invalidate: %w", rdma.ErrUnsupported)
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.closed {
		return nil, fmt.Errorf("allocate memory region: %w", rdma.ErrClosed)
	}
	mem, err := hostmem.Map(length)
	if err != nil {
		return nil, fmt.Errorf("allocate memory region: %w", err)
	}
	c, err := C.reg_mr(p.c, unsafe.Pointer(unsafe.SliceData(mem)), C.size_t(len(mem)), accessFlags(access))
	if c == nil {
		return nil, errors.Join(registerError(len(mem), err), hostmem.Unmap(mem))
	}
	return &mr{c: c, access: access, mem: mem, addr: hostmem.Addr(mem), lkey: uint32(c.lkey), rkey: uint32(c.rkey)}, nil
}

// ReregisterMR implements rdma.PD. The old registration ends after the new one was made,
// unless it ended with its device.
func (p *pd) ReregisterMR(region rdma.MR) error {
	m, ok := region.(*mr)
	if !ok {
		return fmt.Errorf("reregister memory region: it belongs to another provider: %w", unix.EINVAL)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p.mu.RLock()
	defer p.mu.RUnlock()
	if m.closed || p.closed {
		return fmt.Errorf("reregister memory region: %w", rdma.ErrClosed)
	}
	c, err := C.reg_mr(p.c, unsafe.Pointer(unsafe.SliceData(m.mem)), C.size_t(len(m.mem)), accessFlags(m.access))
	if c == nil {
		return registerError(len(m.mem), err)
	}
	if err := m.release(); err != nil {
		return errors.Join(err, destroyed("memory region", C.ibv_dereg_mr(c)))
	}
	m.c, m.lkey, m.rkey = c, uint32(c.lkey), uint32(c.rkey)
	return nil
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
	c          *C.struct_ibv_mr // nil after release
	access     rdma.Access
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

// Release implements rdma.MR.
func (m *mr) Release() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.release()
}

func (m *mr) release() error {
	if m.c == nil {
		return nil
	}
	if err := destroyed("memory region", C.ibv_dereg_mr(m.c)); err != nil {
		return err
	}
	m.c = nil
	return nil
}

// Close implements rdma.MR. If the registration cannot be ended, the memory stays mapped,
// because the device may still write to it.
func (m *mr) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil
	}
	if err := m.release(); err != nil {
		return err
	}
	m.closed = true
	return hostmem.Unmap(m.mem)
}
