package initiator

import (
	"errors"
	"fmt"
	"sync"

	"ublk-nvmeof/rdma"
)

// memory holds the memory that a controller has registered: the protection domain of its
// connections, and the buffers of all queues in it. All of it is on one device. Another
// device may replace this one between two associations. The buffers then stay where they
// are, and get new keys. Methods may be called from any goroutine.
type memory struct {
	limit  int64       // largest number of bytes of buffers
	mu     sync.Mutex  // guards what follows
	used   int64       // bytes of buffers in use
	dev    rdma.Device // nil: none at present
	pd     rdma.PD
	name   string               // name of the device, or of the last one
	queues map[*nsQueue]rdma.PD // open queues, with the domain in which their buffers are registered
	old    []rdma.PD            // domains of earlier devices that still have something in them
}

// use makes dev the device. If move is true, dev may differ from the present device, and
// no queue pair of any lane may exist.
func (m *memory) use(dev rdma.Device, move bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.dev == dev:
	case m.dev != nil && !move:
		return fmt.Errorf("route goes through %s, registered memory is on %s", dev.Attr().Name, m.name)
	default:
		pd, err := dev.AllocPD()
		if err != nil {
			return fmt.Errorf("allocate protection domain: %w", err)
		}
		if m.pd != nil {
			m.old = append(m.old, m.pd)
		}
		m.dev, m.pd, m.name = dev, pd, dev.Attr().Name
	}
	return m.gather()
}

// gather moves the buffers of other domains to the present one. If it fails, a later call
// moves the rest.
func (m *memory) gather() error {
	for q, pd := range m.queues {
		if pd == m.pd {
			continue
		}
		if err := m.pd.ReregisterMR(q.mr); err != nil {
			return fmt.Errorf("register %d bytes on %s: %w", len(q.slab), m.name, err)
		}
		q.rkey, q.lkey = q.mr.RKey(), q.mr.LKey()
		m.queues[q] = m.pd
	}
	for len(m.old) > 0 {
		if err := m.old[0].Close(); err != nil {
			return fmt.Errorf("free protection domain: %w", err)
		}
		m.old = m.old[1:]
	}
	return nil
}

// leave releases everything on a device that is being removed. The buffers are
// registered again on the next device. No connection may be open.
func (m *memory) leave() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for q := range m.queues {
		errs = append(errs, q.mr.Release())
		m.queues[q] = nil
	}
	for _, pd := range append(m.old, m.pd) {
		if pd != nil {
			errs = append(errs, pd.Close())
		}
	}
	m.dev, m.pd, m.old = nil, nil, nil
	return errors.Join(errs...)
}

// domain returns the protection domain for connections and their memory.
func (m *memory) domain() rdma.PD {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pd
}

// device returns the name of the device.
func (m *memory) device() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.name
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

// MemoryInfo is the size of the I/O buffers of a controller, in bytes.
type MemoryInfo struct{ Used, Limit int64 }

func (m *memory) info() MemoryInfo {
	m.mu.Lock()
	defer m.mu.Unlock()
	return MemoryInfo{m.used, m.limit}
}

// open registers size bytes of buffers for a queue.
func (m *memory) open(q *nsQueue, size int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pd == nil {
		return rdma.ErrNoDevice
	}
	if int64(size) > m.limit-m.used {
		return &MemoryError{Want: int64(size), Used: m.used, Limit: m.limit}
	}
	mr, err := m.pd.AllocMR(size, rdma.AccessLocalWrite|rdma.AccessRemoteRead|rdma.AccessRemoteWrite)
	if err != nil {
		return err
	}
	q.mr, q.slab, q.base, q.rkey, q.lkey = mr, mr.Bytes(), mr.Addr(), mr.RKey(), mr.LKey()
	if m.queues == nil {
		m.queues = make(map[*nsQueue]rdma.PD)
	}
	m.queues[q] = m.pd
	m.used += int64(size)
	return nil
}

// shut frees the buffers of a queue.
func (m *memory) shut(q *nsQueue) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, open := m.queues[q]; !open {
		return fmt.Errorf("close queue: %w", rdma.ErrClosed)
	}
	delete(m.queues, q)
	m.used -= int64(len(q.slab))
	return q.mr.Close()
}

// close frees the domain. No connection and no queue may be open.
func (m *memory) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	if m.pd != nil {
		errs = append(errs, m.pd.Close())
	}
	for _, pd := range m.old {
		errs = append(errs, pd.Close())
	}
	m.old = nil
	return errors.Join(errs...)
}
