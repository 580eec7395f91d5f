//go:build linux && cgo && !noverbs

package verbs

// #include "shim.h"
import "C"

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// Limits of private data for the RC service over the IB CM. They are the size of the
// message's field, less, in a request, the header of the RDMA IP CM service.
const (
	maxRequestPrivate = 56
	maxAcceptPrivate  = 196
	maxRejectPrivate  = 148
)

// neighbourMS is the time in milliseconds that the kernel may wait for an answer of a
// neighbour before it is asked again. The kernel looks for the answer only when some
// neighbour answers, and at the end of this time. An answer that arrives while the kernel
// looks because of another one remains unnoticed until then (addr.c, netevent_callback
// and process_one_req).
const neighbourMS = 1000

// cmID is a connection identifier.
//
// read runs on a goroutine of its own from newID to Close. It passes the answers to steps
// of connection management to await, and the events of an established connection to
// Events.
type cmID struct {
	channel *channel
	device  *device // set once resolved
	local   netip.AddrPort
	remote  netip.AddrPort
	private []byte

	steps chan cmEvent  // answers to steps
	done  chan struct{} // closed when read has returned

	mu          sync.Mutex // guards the fields below, and c until it is destroyed
	c           *C.struct_rdma_cm_id
	qp          *qp
	established bool
	events      chan rdma.Event
	closed      bool

	once     sync.Once // guards closeErr
	closeErr error
}

// newID makes an unresolved ID.
func newID() (*cmID, error) {
	ch, err := newChannel()
	if err != nil {
		return nil, err
	}
	var c *C.struct_rdma_cm_id
	if ret, err := C.rdma_create_id(ch.c, &c, nil, C.RDMA_PS_TCP); ret != 0 {
		_ = ch.w.close()
		ch.destroy()
		return nil, missing("create ID", err)
	}
	return startID(ch, c), nil
}

// startID starts to read the events of c, which arrive on ch.
func startID(ch *channel, c *C.struct_rdma_cm_id) *cmID {
	id := &cmID{
		channel: ch, c: c,
		steps:  make(chan cmEvent, 8),
		done:   make(chan struct{}),
		events: make(chan rdma.Event, 16),
	}
	go id.read()
	return id
}

// acceptID makes an ID for a connect request that arrived on a listener's channel, and
// moves it to a channel of its own. The caller must not have read further events, because
// those of the new ID could be lost.
func acceptID(ev cmEvent) (*cmID, error) {
	ch, err := newChannel()
	if err != nil {
		return nil, errors.Join(err, destroyID(ev.id))
	}
	if ret, err := C.rdma_migrate_id(ev.id, ch.c); ret != 0 {
		err = errors.Join(fmt.Errorf("migrate ID: %w", err), destroyID(ev.id), ch.w.close())
		ch.destroy()
		return nil, err
	}
	id := startID(ch, ev.id)
	id.private = ev.private
	id.local, id.remote = addrPort(C.rdma_get_local_addr(ev.id)), addrPort(C.rdma_get_peer_addr(ev.id))
	d, err := deviceOf(ev.id)
	if err != nil {
		return nil, errors.Join(err, id.Close())
	}
	id.setDevice(d)
	return id, nil
}

// resolve finds the device and the route. step is the step that failed.
func (id *cmID) resolve(ctx context.Context, local netip.Addr, remote netip.AddrPort, tos int) (step string, err error) {
	step = "resolve address"
	dst, err := newSockaddr(remote)
	if err != nil {
		return step, err
	}
	var src *C.struct_sockaddr
	if local.IsValid() {
		s, err := newSockaddr(netip.AddrPortFrom(local, 0))
		if err != nil {
			return step, err
		}
		if s.Family != dst.Family {
			return step, fmt.Errorf("source address %s: %w", local, unix.EAFNOSUPPORT)
		}
		src = s.c()
	}
	if tos >= 0 {
		b := C.uint8_t(min(tos, 255))
		if ret, err := C.rdma_set_option(id.c, C.RDMA_OPTION_ID, C.RDMA_OPTION_ID_TOS, unsafe.Pointer(&b), 1); ret != 0 {
			return step, fmt.Errorf("set type of service %d: %w", tos, err)
		}
	}
	for {
		if ret, err := C.rdma_resolve_addr(id.c, src, dst.c(), min(timeoutMS(ctx), neighbourMS)); ret != 0 {
			return step, cmErrno(err)
		}
		err := id.awaitStep(ctx, C.RDMA_CM_EVENT_ADDR_RESOLVED)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.ETIMEDOUT) || ctx.Err() != nil {
			return step, err
		}
	}
	id.local = addrPort(C.rdma_get_local_addr(id.c))
	d, err := deviceOf(id.c)
	if err != nil {
		return step, err
	}
	id.setDevice(d)

	step = "resolve route"
	if ret, err := C.rdma_resolve_route(id.c, timeoutMS(ctx)); ret != 0 {
		return step, cmErrno(err)
	}
	return step, id.awaitStep(ctx, C.RDMA_CM_EVENT_ROUTE_RESOLVED)
}

// await waits for the answer to a step.
func (id *cmID) await(ctx context.Context) (cmEvent, error) {
	select {
	case ev := <-id.steps:
		return ev, nil
	case <-ctx.Done():
		return cmEvent{}, ctx.Err()
	case <-id.done:
		return cmEvent{}, rdma.ErrClosed
	}
}

// awaitStep waits for the answer that means success. Any other answer is an error.
func (id *cmID) awaitStep(ctx context.Context, want uint32) error {
	ev, err := id.await(ctx)
	switch {
	case err != nil:
		return err
	case ev.kind == want:
		return nil
	}
	return stepFailure(ev)
}

// stepFailure returns the error for an answer that does not mean success.
func stepFailure(ev cmEvent) error {
	if err := ev.err(); err != nil {
		return cmErrno(err)
	}
	return errors.New(ev.String())
}

// read distributes the events of the ID until Close.
func (id *cmID) read() {
	defer close(id.done)
	for {
		ev, err := id.channel.next()
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			id.report(rdma.EventDisconnected, err.Error())
			return
		}
		id.dispatch(ev)
	}
}

func (id *cmID) dispatch(ev cmEvent) {
	id.mu.Lock()
	if ev.kind == C.RDMA_CM_EVENT_ESTABLISHED {
		id.established = true
	}
	established := id.established
	id.mu.Unlock()

	switch ev.kind {
	case C.RDMA_CM_EVENT_ADDR_CHANGE:
		id.report(rdma.EventAddrChange, ev.String())
		return
	case C.RDMA_CM_EVENT_TIMEWAIT_EXIT:
		id.report(rdma.EventTimewaitExit, ev.String())
		return
	case C.RDMA_CM_EVENT_DEVICE_REMOVAL:
		id.deviceRemoved(ev.String())
	case C.RDMA_CM_EVENT_DISCONNECTED:
		if established {
			id.report(rdma.EventDisconnected, ev.String())
			return
		}
	}
	select {
	case id.steps <- ev:
	default: // no step waits for the event
	}
}

// report adds an event to Events, unless the channel is full or closed.
func (id *cmID) report(kind rdma.EventType, detail string) {
	id.mu.Lock()
	defer id.mu.Unlock()
	if id.closed {
		return
	}
	select {
	case id.events <- rdma.Event{Type: kind, Detail: detail}:
	default:
	}
}

// setDevice sets the device of a resolved ID, and takes over a reference to it.
func (id *cmID) setDevice(d *device) {
	id.mu.Lock()
	id.device = d
	id.mu.Unlock()
	d.watch(id)
}

func (id *cmID) deviceRemoved(detail string) {
	id.mu.Lock()
	d := id.device
	id.mu.Unlock()
	if d != nil {
		d.remove()
	}
	id.report(rdma.EventDeviceRemoved, detail)
}

// async handles an asynchronous event of the device. It runs on the device's goroutine
// with the device's lock held.
func (id *cmID) async(ev *C.struct_async_event) {
	id.mu.Lock()
	q, port := id.qp, C.int(0)
	if !id.closed {
		port = C.int(id.c.port_num)
	}
	mine := q != nil && (ev.qp == q.c || ev.cq != nil && (ev.cq == q.sendCQ.c || ev.cq == q.recvCQ.c))
	if mine && ev._type == C.IBV_EVENT_COMM_EST && !id.closed {
		// Data arrived before the peer's ready-to-use message, which may be lost.
		C.rdma_notify(id.c, C.IBV_EVENT_COMM_EST)
	}
	id.mu.Unlock()

	detail := C.GoString(C.ibv_event_type_str(uint32(ev._type)))
	switch ev._type {
	case C.IBV_EVENT_QP_FATAL, C.IBV_EVENT_QP_REQ_ERR, C.IBV_EVENT_QP_ACCESS_ERR, C.IBV_EVENT_CQ_ERR:
		if mine {
			id.report(rdma.EventQPFatal, detail)
		}
	case C.IBV_EVENT_PORT_ERR:
		if ev.port == port {
			id.report(rdma.EventPortDown, detail)
		}
	case C.IBV_EVENT_DEVICE_FATAL:
		id.report(rdma.EventDeviceRemoved, detail)
	}
}

// Device implements rdma.ID.
func (id *cmID) Device() rdma.Device { return id.device }

// LocalAddr implements rdma.ID.
func (id *cmID) LocalAddr() netip.AddrPort { return id.local }

// RemoteAddr implements rdma.ID.
func (id *cmID) RemoteAddr() netip.AddrPort { return id.remote }

// PrivateData implements rdma.ID. With the IB CM, it always has the full length, padded
// with zeros.
func (id *cmID) PrivateData() []byte { return id.private }

// Events implements rdma.ID.
func (id *cmID) Events() <-chan rdma.Event { return id.events }

// CreateQP implements rdma.ID.
func (id *cmID) CreateQP(domain rdma.PD, cfg rdma.QPConfig) (rdma.QP, error) {
	p, ok := domain.(*pd)
	if !ok || p.device != id.device {
		return nil, fmt.Errorf("create queue pair: protection domain of another device: %w", unix.EINVAL)
	}
	id.mu.Lock()
	defer id.mu.Unlock()
	switch {
	case id.closed:
		return nil, rdma.ErrClosed
	case id.qp != nil:
		return nil, fmt.Errorf("create queue pair: the ID has one: %w", unix.EEXIST)
	}
	q, err := newQP(id.c, p, cfg)
	if err != nil {
		return nil, err
	}
	id.qp = q
	return q, nil
}

// conn converts parameters. It lowers values to the limits of the device, because the
// library would refuse larger ones.
func (id *cmID) conn(p rdma.ConnParam, maxPrivate int) (*C.struct_conn, error) {
	if len(p.PrivateData) > maxPrivate {
		return nil, fmt.Errorf("%d bytes of private data, at most %d fit: %w", len(p.PrivateData), maxPrivate, unix.EMSGSIZE)
	}
	c := &C.struct_conn{
		responder_resources: C.uint8_t(min(int(p.ResponderResources), id.device.attr.MaxQPReadAtomic)),
		initiator_depth:     C.uint8_t(min(int(p.InitiatorDepth), id.device.initRead)),
		retry_count:         C.uint8_t(min(p.RetryCount, 7)),
		rnr_retry_count:     C.uint8_t(min(p.RNRRetryCount, 7)),
		private_len:         C.uint8_t(len(p.PrivateData)),
	}
	if p.FlowControl {
		c.flow_control = 1
	}
	for i, b := range p.PrivateData {
		c.private_data[i] = C.uint8_t(b)
	}
	return c, nil
}

// start begins Connect or Accept. It holds the lock, so that Close waits.
func (id *cmID) start(p rdma.ConnParam, maxPrivate int, call func(*C.struct_rdma_cm_id, *C.struct_conn) C.int) error {
	c, err := id.conn(p, maxPrivate)
	if err != nil {
		return err
	}
	id.mu.Lock()
	defer id.mu.Unlock()
	switch {
	case id.closed:
		return rdma.ErrClosed
	case id.qp == nil:
		return fmt.Errorf("the ID has no queue pair: %w", unix.EINVAL)
	}
	if errno := call(id.c, c); errno != 0 {
		return cmErrno(unix.Errno(errno))
	}
	return nil
}

func (id *cmID) stepError(step string, err error) error {
	return &rdma.StepError{Step: step, Peer: id.remote, Err: err}
}

// Connect implements rdma.ID. After an error, the ID can only be closed.
func (id *cmID) Connect(ctx context.Context, p rdma.ConnParam) ([]byte, error) {
	err := id.start(p, maxRequestPrivate, func(cid *C.struct_rdma_cm_id, c *C.struct_conn) C.int { return C.cm_connect(cid, c) })
	if err != nil {
		return nil, id.stepError("connect", err)
	}
	ev, err := id.await(ctx)
	switch {
	case err != nil:
		return nil, id.stepError("connect", err)
	case ev.kind == C.RDMA_CM_EVENT_ESTABLISHED && ev.status == 0:
		return ev.private, nil
	case ev.kind == C.RDMA_CM_EVENT_REJECTED:
		return nil, id.rejection(ev)
	}
	return nil, id.stepError("connect", stepFailure(ev))
}

// rejection returns the error for a reject. iWARP reports an errno instead of the reason.
func (id *cmID) rejection(ev cmEvent) error {
	e := &rdma.RejectError{Peer: id.remote, Reason: ev.status}
	if unix.Errno(-ev.status) == unix.ECONNREFUSED {
		e.Reason = rdma.RejectConsumer
	}
	if e.Reason == rdma.RejectConsumer {
		e.Private = ev.private
	}
	return e
}

// Accept implements rdma.ID.
func (id *cmID) Accept(ctx context.Context, p rdma.ConnParam) error {
	err := id.start(p, maxAcceptPrivate, func(cid *C.struct_rdma_cm_id, c *C.struct_conn) C.int { return C.cm_accept(cid, c) })
	if err != nil {
		return id.stepError("accept", err)
	}
	if err := id.awaitStep(ctx, C.RDMA_CM_EVENT_ESTABLISHED); err != nil {
		return id.stepError("accept", err)
	}
	return nil
}

// Reject implements rdma.ID. private has at most 148 bytes.
func (id *cmID) Reject(private []byte) error {
	if len(private) > maxRejectPrivate {
		return id.stepError("reject", fmt.Errorf("%d bytes of private data, at most %d fit: %w", len(private), maxRejectPrivate, unix.EMSGSIZE))
	}
	id.mu.Lock()
	defer id.mu.Unlock()
	if id.closed {
		return id.stepError("reject", rdma.ErrClosed)
	}
	if ret, err := C.rdma_reject(id.c, unsafe.Pointer(unsafe.SliceData(private)), C.uint8_t(len(private))); ret != 0 {
		return id.stepError("reject", err)
	}
	return nil
}

// Disconnect implements rdma.ID.
func (id *cmID) Disconnect() error {
	id.mu.Lock()
	defer id.mu.Unlock()
	if id.closed {
		return nil
	}
	if ret, err := C.rdma_disconnect(id.c); ret != 0 {
		return id.stepError("disconnect", err)
	}
	return nil
}

// Close implements rdma.ID. A second Close waits for the first.
func (id *cmID) Close() error {
	id.once.Do(func() { id.closeErr = id.end() })
	return id.closeErr
}

// end implements Close. The order matters: no event may arrive for an ID that is
// destroyed, and no event may use the queue pair after it is destroyed. An ID that is
// still connected sends a disconnect request when it is destroyed.
func (id *cmID) end() error {
	id.mu.Lock()
	id.closed = true
	close(id.events)
	id.mu.Unlock()

	if id.device != nil {
		id.device.unwatch(id)
	}
	errs := []error{id.channel.w.close()}
	<-id.done
	if id.qp != nil {
		errs = append(errs, id.qp.Fail())
	}
	errs = append(errs, destroyID(id.c))
	id.channel.destroy()
	if id.qp != nil {
		errs = append(errs, id.qp.destroy())
	}
	if id.device != nil {
		id.device.put()
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close connection to %s: %w", id.remote, err)
	}
	return nil
}

func destroyID(c *C.struct_rdma_cm_id) error {
	if ret, err := C.rdma_destroy_id(c); ret != 0 {
		return fmt.Errorf("destroy ID: %w", err)
	}
	return nil
}
