//go:build linux && cgo && !noverbs

package verbs

// #include "shim.h"
import "C"

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// device is an open RDMA device. librdmacm opens each device once per process, and all
// IDs share it. It is kept as long as an ID, a PD or a CQ refers to it.
type device struct {
	provider *Provider
	c        *C.struct_ibv_context
	attr     rdma.DeviceAttr
	initRead int // RDMA READs per QP that this side can have outstanding

	hold   *C.struct_rdma_cm_id // keeps c open, see hold_device; may be nil
	refs   int                  // guarded by provider.mu
	events *waiter              // asynchronous events
	done   chan struct{}        // closed when readEvents has returned

	removed atomic.Bool // an event reported the removal

	mu  sync.Mutex // guards ids; taken before the lock of an id
	ids map[*cmID]struct{}
}

// device returns the device of a resolved ID, with one more reference.
func (p *Provider) device(cid *C.struct_rdma_cm_id) (*device, error) {
	if cid.verbs == nil {
		return nil, rdma.ErrNoDevice
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := p.devices[cid.verbs]; d != nil {
		d.refs++
		return d, nil
	}
	d, err := p.open(cid)
	if err != nil {
		return nil, fmt.Errorf("open device %s: %w", C.GoString(C.ibv_get_device_name(cid.verbs.device)), err)
	}
	p.devices[d.c] = d
	return d, nil
}

func (p *Provider) open(cid *C.struct_rdma_cm_id) (*device, error) {
	d := &device{provider: p, c: cid.verbs, refs: 1, done: make(chan struct{}), ids: make(map[*cmID]struct{})}
	var attr C.struct_ibv_device_attr
	if errno := C.ibv_query_device(d.c, &attr); errno != 0 {
		return nil, fmt.Errorf("query attributes: %w", unix.Errno(errno))
	}
	d.attr = rdma.DeviceAttr{
		Name:            C.GoString(C.ibv_get_device_name(d.c.device)),
		MaxQPWR:         int(attr.max_qp_wr),
		MaxSGE:          int(attr.max_sge),
		MaxCQE:          int(attr.max_cqe),
		MaxMR:           int(attr.max_mr),
		MaxMRSize:       uint64(attr.max_mr_size),
		MaxQPReadAtomic: int(attr.max_qp_rd_atom),
		CompVectors:     max(1, int(d.c.num_comp_vectors)),
		MemoryWindows:   attr.device_cap_flags&(C.IBV_DEVICE_MEM_WINDOW_TYPE_2A|C.IBV_DEVICE_MEM_WINDOW_TYPE_2B) != 0,
	}
	d.initRead = int(attr.max_qp_init_rd_atom)
	events, err := newWaiter(d.c.async_fd, "asynchronous events")
	if err != nil {
		return nil, err
	}
	d.events = events
	d.hold = C.hold_device(cid)
	go d.readEvents()
	return d, nil
}

// get adds a reference. It returns false if there is none left, because the device is
// then closed.
func (d *device) get() bool {
	d.provider.mu.Lock()
	defer d.provider.mu.Unlock()
	if d.refs == 0 {
		return false
	}
	d.refs++
	return true
}

// put releases a reference. The last one stops reading events and lets librdmacm close
// the device.
func (d *device) put() {
	d.provider.mu.Lock()
	defer d.provider.mu.Unlock()
	if d.refs--; d.refs > 0 {
		return
	}
	delete(d.provider.devices, d.c)
	_ = d.events.close() // nothing can be lost: it is a duplicate of a descriptor
	<-d.done
	if d.hold != nil {
		C.rdma_destroy_id(d.hold)
	}
	if d.removed.Load() {
		C.forget_removed_devices()
	}
}

// Attr implements rdma.Device.
func (d *device) Attr() rdma.DeviceAttr { return d.attr }

// watch starts to pass the device's asynchronous events to an ID. unwatch ends this.
func (d *device) watch(id *cmID) {
	d.mu.Lock()
	d.ids[id] = struct{}{}
	d.mu.Unlock()
}

func (d *device) unwatch(id *cmID) {
	d.mu.Lock()
	delete(d.ids, id)
	d.mu.Unlock()
}

func (d *device) readEvents() {
	defer close(d.done)
	for {
		var ev C.struct_async_event
		err := d.events.next(func() C.int { return C.next_async_event(d.c, &ev) })
		if errors.Is(err, os.ErrClosed) {
			return
		}
		d.mu.Lock()
		for id := range d.ids {
			if err != nil {
				id.deviceRemoved("asynchronous events: " + err.Error())
			} else {
				id.async(&ev)
			}
		}
		d.mu.Unlock()
		if err != nil {
			return // the descriptor has failed, and so has the device
		}
	}
}

// AllocPD implements rdma.Device.
func (d *device) AllocPD() (rdma.PD, error) {
	what := "allocate protection domain on " + d.attr.Name
	if !d.get() {
		return nil, fmt.Errorf("%s: %w", what, rdma.ErrClosed)
	}
	c, err := C.ibv_alloc_pd(d.c)
	if c == nil {
		d.put()
		return nil, missing(what, err)
	}
	return &pd{device: d, c: c}, nil
}

// destroyed returns the error of destroying an object. EIO is no error: it means that the
// device was removed, together with the object.
func destroyed(what string, errno C.int) error {
	if errno == 0 || unix.Errno(errno) == unix.EIO {
		return nil
	}
	return fmt.Errorf("destroy %s: %w", what, unix.Errno(errno))
}
