//go:build linux && cgo && !noverbs

package verbs

/*
#cgo noescape poll_cq
#cgo nocallback poll_cq
#cgo noescape arm_cq
#cgo nocallback arm_cq
#cgo noescape ack_cq
#cgo nocallback ack_cq
#include "shim.h"
*/
import "C"

import (
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// rdma.WC must have the layout of the C struct that poll_cq fills in.
var (
	_ [unsafe.Sizeof(C.struct_wc{})]byte                   = [unsafe.Sizeof(rdma.WC{})]byte{}
	_ [unsafe.Offsetof(C.struct_wc{}.id)]byte              = [unsafe.Offsetof(rdma.WC{}.ID)]byte{}
	_ [unsafe.Offsetof(C.struct_wc{}.bytes)]byte           = [unsafe.Offsetof(rdma.WC{}.Bytes)]byte{}
	_ [unsafe.Offsetof(C.struct_wc{}.qp_num)]byte          = [unsafe.Offsetof(rdma.WC{}.QPNum)]byte{}
	_ [unsafe.Offsetof(C.struct_wc{}.invalidated_key)]byte = [unsafe.Offsetof(rdma.WC{}.InvalidatedKey)]byte{}
	_ [unsafe.Offsetof(C.struct_wc{}.vendor)]byte          = [unsafe.Offsetof(rdma.WC{}.Vendor)]byte{}
	_ [unsafe.Offsetof(C.struct_wc{}.status)]byte          = [unsafe.Offsetof(rdma.WC{}.Status)]byte{}
	_ [unsafe.Offsetof(C.struct_wc{}.flags)]byte           = [unsafe.Offsetof(rdma.WC{}.Flags)]byte{}
	_ [unsafe.Offsetof(C.struct_wc{}.recv)]byte            = [unsafe.Offsetof(rdma.WC{}.Recv)]byte{}
)

// cq is a completion queue, with or without a completion channel of its own.
type cq struct {
	device  *device
	c       *C.struct_ibv_cq
	channel *C.struct_ibv_comp_channel // nil without events
	fd      atomic.Int32               // -1 without events, or after Close

	mu     sync.Mutex  // held during Close
	closed atomic.Bool // written with mu held
}

// CreateCQ implements rdma.Device.
func (d *device) CreateCQ(entries int, events bool, vector int) (rdma.CQ, error) {
	if !d.get() {
		return nil, fmt.Errorf("create completion queue on %s: %w", d.attr.Name, rdma.ErrClosed)
	}
	q, err := d.createCQ(entries, events, vector)
	if err != nil {
		d.put()
		return nil, err
	}
	return q, nil
}

func (d *device) createCQ(entries int, events bool, vector int) (*cq, error) {
	q := &cq{device: d}
	q.fd.Store(-1)
	if events {
		channel, err := C.ibv_create_comp_channel(d.c)
		if channel == nil {
			return nil, missing("create completion channel on "+d.attr.Name, err)
		}
		q.channel = channel
		q.fd.Store(int32(channel.fd))
		if err := prepareFD(q.FD()); err != nil {
			C.ibv_destroy_comp_channel(channel)
			return nil, fmt.Errorf("create completion channel on %s: %w", d.attr.Name, err)
		}
	}
	vector %= d.attr.CompVectors
	c, err := C.ibv_create_cq(d.c, C.int(entries), nil, q.channel, C.int(vector))
	if c == nil {
		if q.channel != nil {
			C.ibv_destroy_comp_channel(q.channel)
		}
		return nil, missing(fmt.Sprintf("create completion queue of %d entries on %s", entries, d.attr.Name), err)
	}
	q.c = c
	return q, nil
}

func prepareFD(fd int) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC)
	return err
}

// handle returns the queue for the functions of the data path.
func (q *cq) handle() C.uintptr_t { return C.uintptr_t(uintptr(unsafe.Pointer(q.c))) }

// Poll implements rdma.CQ.
func (q *cq) Poll(wcs []rdma.WC) (int, error) {
	switch {
	case q.closed.Load():
		return 0, errPollClosed
	case len(wcs) == 0:
		return 0, nil
	}
	n := C.poll_cq(q.handle(), (*C.struct_wc)(unsafe.Pointer(&wcs[0])), C.int(len(wcs)))
	if n < 0 {
		return 0, fmt.Errorf("poll completion queue: %w", unix.Errno(-n))
	}
	return int(n), nil
}

// Arm implements rdma.CQ.
func (q *cq) Arm() error {
	switch {
	case q.channel == nil:
		return errNoEvents
	case q.closed.Load():
		return errArmClosed
	}
	if errno := C.arm_cq(q.handle()); errno != 0 {
		return fmt.Errorf("arm completion queue: %w", unix.Errno(errno))
	}
	return nil
}

// Errors of the calls on the hot path, made in advance
var (
	errNoEvents   = fmt.Errorf("arm completion queue: made without events: %w", rdma.ErrUnsupported)
	errPollClosed = fmt.Errorf("poll completion queue: %w", rdma.ErrClosed)
	errArmClosed  = fmt.Errorf("arm completion queue: %w", rdma.ErrClosed)
)

// FD implements rdma.CQ.
func (q *cq) FD() int { return int(q.fd.Load()) }

// Ack implements rdma.CQ.
func (q *cq) Ack(n int) {
	if n > 0 && !q.closed.Load() {
		C.ack_cq(q.handle(), C.uint(n))
	}
}

// Close implements rdma.CQ. It waits until all events that were read are acknowledged.
// Unread events do not matter. Close fails while a QP uses the queue.
func (q *cq) Close() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed.Load() {
		return nil
	}
	if err := destroyed("completion queue", C.ibv_destroy_cq(q.c)); err != nil {
		return err
	}
	q.closed.Store(true)
	q.fd.Store(-1)
	defer q.device.put()
	if q.channel == nil {
		return nil
	}
	return destroyed("completion channel", C.ibv_destroy_comp_channel(q.channel))
}
