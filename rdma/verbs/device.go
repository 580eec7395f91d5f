//go:build linux && cgo && !noverbs

package verbs

// #include "shim.h"
import "C"

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// devices are the RDMA devices that are open. librdmacm opens a device once for the whole
// process, with the first ID on it, and keeps it open from then on, even without an ID.
var devices = struct {
	sync.Mutex // guards the map, and the references of the devices
	open       map[*C.struct_ibv_context]*device
}{open: make(map[*C.struct_ibv_context]*device)}

// device is an open RDMA device. All IDs share it. It is closed when it is removed and no
// ID, PD, CQ or listener refers to it.
type device struct {
	c        *C.struct_ibv_context
	attr     rdma.DeviceAttr
	initRead int // RDMA READs per QP that this side can have outstanding

	refs    int
	hold    *C.struct_rdma_cm_id // see keep; may be nil
	channel *channel             // of hold
	events  *waiter              // asynchronous events
	readers sync.WaitGroup       // the goroutines that read events

	removed chan struct{} // closed by remove
	once    sync.Once     // for removed

	mu  sync.Mutex // guards ids; taken before the lock of an id
	ids map[*cmID]struct{}
}

// deviceOf returns the device of a bound ID, with one more reference.
func deviceOf(cid *C.struct_rdma_cm_id) (*device, error) {
	if cid.verbs == nil {
		return nil, rdma.ErrNoDevice
	}
	devices.Lock()
	defer devices.Unlock()
	d := devices.open[cid.verbs]
	if d == nil {
		var err error
		if d, err = openDevice(cid); err != nil {
			return nil, fmt.Errorf("open device %s: %w", C.GoString(C.ibv_get_device_name(cid.verbs.device)), err)
		}
		devices.open[d.c] = d
	}
	d.refs++
	return d, nil
}

func openDevice(cid *C.struct_rdma_cm_id) (*device, error) {
	d := &device{c: cid.verbs, removed: make(chan struct{}), ids: make(map[*cmID]struct{})}
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
	if err := d.keep(cid); err != nil {
		_ = events.close()
		return nil, err
	}
	d.events = events
	d.readers.Go(d.readEvents)
	return d, nil
}

// keep binds an ID to the address of cid that nothing else uses. librdmacm would close the
// context of a removed device with the last ID on it, although protection domains, queues
// and memory regions may still use the context. This ID also hears of the removal when
// there is no other one. If the address belongs to another device by now, there is no such ID.
func (d *device) keep(cid *C.struct_rdma_cm_id) error {
	ch, err := newChannel()
	if err != nil {
		return err
	}
	if d.hold = C.hold_device(cid, ch.c); d.hold == nil {
		_ = ch.w.close()
		ch.destroy()
		return nil
	}
	d.channel = ch
	d.readers.Go(d.awaitRemoval)
	return nil
}

func (d *device) awaitRemoval() {
	for {
		ev, err := d.channel.next()
		if err != nil {
			return
		}
		if ev.kind == C.RDMA_CM_EVENT_DEVICE_REMOVAL {
			d.remove()
			return
		}
	}
}

// remove notes that the device is being removed. Any goroutine may call it.
func (d *device) remove() {
	d.once.Do(func() { close(d.removed) })
	devices.Lock()
	defer devices.Unlock()
	if d.forget() {
		go d.close() // it waits for the goroutines that may have called remove
	}
}

// get adds a reference. It returns false if there is none left, because the device may
// then be closed.
func (d *device) get() bool {
	devices.Lock()
	defer devices.Unlock()
	if d.refs == 0 {
		return false
	}
	d.refs++
	return true
}

// put releases a reference.
func (d *device) put() {
	devices.Lock()
	d.refs--
	last := d.forget()
	devices.Unlock()
	if last {
		d.close()
	}
}

// forget takes a device that must be closed from the open ones. Only the first caller, which
// holds the lock, gets true and closes the device. A device whose removal would not be
// noticed cannot be kept.
func (d *device) forget() bool {
	if d.refs > 0 || devices.open[d.c] != d || d.hold != nil && !d.isRemoved() {
		return false
	}
	delete(devices.open, d.c)
	return true
}

func (d *device) isRemoved() bool {
	select {
	case <-d.removed:
		return true
	default:
		return false
	}
}

// close ends what this package has of a device.
func (d *device) close() {
	_ = d.events.close() // nothing can be lost: it is a duplicate of a descriptor
	if d.hold == nil {
		d.readers.Wait()
		return
	}
	_ = d.channel.w.close()
	d.readers.Wait()
	if d.isRemoved() {
		C.detach_device(d.c)
	}
	_ = destroyID(d.hold)
	d.channel.destroy()
}

// Removed implements rdma.Device.
func (d *device) Removed() <-chan struct{} { return d.removed }

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
	for {
		var ev C.struct_async_event
		err := d.events.next(func() C.int { return C.next_async_event(d.c, &ev) })
		if errors.Is(err, os.ErrClosed) {
			return
		}
		d.mu.Lock()
		for id := range d.ids {
			if err != nil {
				id.report(rdma.EventDeviceRemoved, "asynchronous events: "+err.Error())
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
