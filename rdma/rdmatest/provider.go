package rdmatest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// Provider is the rdma.Provider of one endpoint of a Fabric. Its methods may be
// called from any goroutine.
type Provider struct{ endpoint *endpoint }

// Name implements rdma.Provider.
func (*Provider) Name() string { return "test" }

// Addr returns the address of the endpoint.
func (p *Provider) Addr() netip.Addr { return p.endpoint.addr }

// Resolve implements rdma.Provider. tos is ignored.
func (p *Provider) Resolve(ctx context.Context, local netip.Addr, remote netip.AddrPort, _ int) (rdma.ID, error) {
	e := p.endpoint
	f := e.fabric
	fail := func(err error) (rdma.ID, error) {
		return nil, &rdma.StepError{Step: "resolve address", Peer: remote, Err: err}
	}
	if !remote.IsValid() {
		return fail(unix.EINVAL)
	}
	if local.IsValid() && local.Unmap() != e.addr {
		return fail(unix.EADDRNOTAVAIL)
	}
	for {
		f.mu.Lock()
		peer, changed := f.endpoints[remote.Addr().Unmap()], f.changed
		if peer != nil && !peer.silent && !e.silent {
			id := e.newID(netip.AddrPortFrom(e.addr, e.port()), remote)
			f.mu.Unlock()
			return id, nil
		}
		f.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return fail(ctx.Err())
		}
	}
}

// port picks a port without a listener.
func (e *endpoint) port() uint16 {
	for {
		e.nextPort = max(49152, e.nextPort+1)
		if e.listeners[e.nextPort] == nil {
			return e.nextPort
		}
	}
}

// listener accepts connect requests. It implements rdma.Listener.
type listener struct {
	endpoint *endpoint
	addr     netip.AddrPort
	requests chan *connID
	closed   chan struct{}
	once     sync.Once
}

// Listen implements rdma.Provider. The address must be that of the endpoint, or the
// unspecified one of its family.
func (p *Provider) Listen(addr netip.AddrPort, backlog int) (rdma.Listener, error) {
	e := p.endpoint
	e.fabric.mu.Lock()
	defer e.fabric.mu.Unlock()
	fail := func(err error) (rdma.Listener, error) {
		return nil, &rdma.StepError{Step: "listen on", Peer: addr, Err: err}
	}
	if a := addr.Addr().Unmap(); a != e.addr && !(a.IsUnspecified() && a.Is4() == e.addr.Is4()) {
		return fail(unix.EADDRNOTAVAIL)
	}
	port := addr.Port()
	if port == 0 {
		port = e.port()
	}
	if e.listeners[port] != nil {
		return fail(unix.EADDRINUSE)
	}
	l := &listener{
		endpoint: e,
		addr:     netip.AddrPortFrom(addr.Addr(), port),
		requests: make(chan *connID, max(1, backlog)),
		closed:   make(chan struct{}),
	}
	e.listeners[port] = l
	e.fabric.objects.Listeners++
	e.fabric.wake()
	return l, nil
}

// Addr implements rdma.Listener.
func (l *listener) Addr() netip.AddrPort { return l.addr }

// Accept implements rdma.Listener.
func (l *listener) Accept(ctx context.Context) (rdma.ID, error) {
	select {
	case id := <-l.requests:
		f := l.endpoint.fabric
		f.mu.Lock()
		f.wake() // there is room in the backlog again
		f.mu.Unlock()
		return id, nil
	case <-ctx.Done():
		return nil, &rdma.StepError{Step: "accept on", Peer: l.addr, Err: ctx.Err()}
	case <-l.closed:
		return nil, &rdma.StepError{Step: "accept on", Peer: l.addr, Err: rdma.ErrClosed}
	}
}

// Close implements rdma.Listener. It refuses requests that were not accepted.
func (l *listener) Close() error {
	var errs []error
	l.once.Do(func() {
		f := l.endpoint.fabric
		f.mu.Lock()
		delete(l.endpoint.listeners, l.addr.Port())
		close(l.closed)
		f.objects.Listeners--
		f.mu.Unlock()
		for {
			select {
			case id := <-l.requests:
				errs = append(errs, id.Close())
				continue
			default:
			}
			break
		}
	})
	return errors.Join(errs...)
}

// device implements rdma.Device.
type device struct {
	endpoint *endpoint
	removed  chan struct{} // closed by Fabric.ReplaceDevice
}

func newDevice(e *endpoint) *device { return &device{e, make(chan struct{})} }

// Limits of the device
const (
	maxQPWR       = 4096
	maxSGE        = 4
	maxCQE        = 1 << 16
	maxReadAtomic = 16
	compVectors   = 4
)

// Attr implements rdma.Device.
func (d *device) Attr() rdma.DeviceAttr {
	return rdma.DeviceAttr{
		Name:            "test" + d.endpoint.addr.String(),
		MaxQPWR:         maxQPWR,
		MaxSGE:          maxSGE,
		MaxCQE:          maxCQE,
		MaxMR:           1 << 16,
		MaxMRSize:       1 << 40,
		MaxQPReadAtomic: maxReadAtomic,
		CompVectors:     compVectors,
	}
}

// Removed implements rdma.Device.
func (d *device) Removed() <-chan struct{} { return d.removed }

// AllocPD implements rdma.Device.
func (d *device) AllocPD() (rdma.PD, error) {
	f := d.endpoint.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	f.objects.PDs++
	return &protectionDomain{device: d}, nil
}

// busy returns the error of closing an object that is in use.
func busy(what string) error { return fmt.Errorf("destroy %s: %w", what, unix.EBUSY) }
