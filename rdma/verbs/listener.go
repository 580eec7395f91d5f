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

	"ublk-nvmeof/rdma"
)

// listener reads connect requests on a goroutine of its own, at most one before Accept
// needs it. The others wait in the kernel, limited by the backlog.
type listener struct {
	channel  *channel
	c        *C.struct_rdma_cm_id
	device   *device // on which it listens; nil: on all
	addr     netip.AddrPort
	requests chan request
	stop     chan struct{} // closed by Close
	done     chan struct{} // closed when read has returned
	readErr  error         // why read returned; valid after done is closed
	once     sync.Once
	closeErr error
}

// request is a connect request, or the error of accepting it.
type request struct {
	id  *cmID
	err error
}

// Listen implements rdma.Provider.
func (*Provider) Listen(addr netip.AddrPort, backlog int) (rdma.Listener, error) {
	l, err := listen(addr, backlog)
	if err != nil {
		return nil, &rdma.StepError{Step: "listen on", Peer: addr, Err: err}
	}
	return l, nil
}

func listen(addr netip.AddrPort, backlog int) (*listener, error) {
	s, err := newSockaddr(addr)
	if err != nil {
		return nil, err
	}
	ch, err := newChannel()
	if err != nil {
		return nil, err
	}
	var c *C.struct_rdma_cm_id
	if ret, err := C.rdma_create_id(ch.c, &c, nil, C.RDMA_PS_TCP); ret != 0 {
		err = errors.Join(missing("create ID", err), ch.w.close())
		ch.destroy()
		return nil, err
	}
	if err := bindListen(c, s, backlog); err != nil {
		err = errors.Join(err, ch.w.close(), destroyID(c))
		ch.destroy()
		return nil, err
	}
	l := &listener{
		channel: ch, c: c,
		addr:     addrPort(C.rdma_get_local_addr(c)),
		requests: make(chan request),
		stop:     make(chan struct{}),
		done:     make(chan struct{}),
	}
	if c.verbs != nil {
		if l.device, err = deviceOf(c); err != nil {
			err = errors.Join(err, ch.w.close(), destroyID(c))
			ch.destroy()
			return nil, err
		}
	}
	go l.read()
	return l, nil
}

func bindListen(c *C.struct_rdma_cm_id, s *sockaddr, backlog int) error {
	if ret, err := C.rdma_bind_addr(c, s.c()); ret != 0 {
		return fmt.Errorf("bind: %w", cmErrno(err))
	}
	if ret, err := C.rdma_listen(c, C.int(backlog)); ret != 0 {
		return cmErrno(err)
	}
	return nil
}

// read reads requests until Close, or until the device on which it listens is removed.
func (l *listener) read() {
	defer close(l.done)
	for {
		ev, err := l.channel.next()
		if errors.Is(err, os.ErrClosed) {
			l.readErr = rdma.ErrClosed
			return
		}
		if err != nil {
			l.readErr = err
			return
		}
		switch {
		case ev.kind == C.RDMA_CM_EVENT_CONNECT_REQUEST:
		case ev.kind == C.RDMA_CM_EVENT_DEVICE_REMOVAL && l.device != nil:
			l.readErr = fmt.Errorf("%w: the RDMA device is removed", rdma.ErrClosed)
			l.device.remove()
			go func() { _ = l.Close() }() // the removal waits for it
			return
		default:
			continue // it listens on all devices, and one was removed
		}
		id, err := acceptID(ev)
		select {
		case l.requests <- request{id, err}:
		case <-l.stop:
			if err == nil {
				_ = id.Close() // refuses the request
			}
			l.readErr = rdma.ErrClosed
			return
		}
	}
}

// Addr implements rdma.Listener.
func (l *listener) Addr() netip.AddrPort { return l.addr }

// Accept implements rdma.Listener. Any number of goroutines may call it. An error that
// wraps neither the error of ctx nor rdma.ErrClosed concerns one request, which was
// refused.
func (l *listener) Accept(ctx context.Context) (rdma.ID, error) {
	select {
	case r := <-l.requests:
		if r.err != nil {
			return nil, &rdma.StepError{Step: "accept on", Peer: l.addr, Err: r.err}
		}
		return r.id, nil
	case <-ctx.Done():
		return nil, &rdma.StepError{Step: "accept on", Peer: l.addr, Err: ctx.Err()}
	case <-l.done:
		return nil, &rdma.StepError{Step: "accept on", Peer: l.addr, Err: l.readErr}
	}
}

// Close implements rdma.Listener. It refuses requests that were not accepted.
func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.stop)
		err := l.channel.w.close()
		<-l.done
		l.closeErr = errors.Join(err, destroyID(l.c))
		l.channel.destroy()
		if l.device != nil {
			l.device.put()
		}
	})
	return l.closeErr
}
