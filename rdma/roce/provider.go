package roce

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// DefaultPort is the UDP port of RoCEv2 (IBTA Annex A17).
const DefaultPort = wire.Port

// Config configures a Provider. The zero value serves all local addresses of both
// families on the port of RoCEv2.
type Config struct {
	// Addrs are the local addresses. Each gets one socket. None means the unspecified
	// address of both families; one family may be missing on the host.
	Addrs []netip.Addr
	// OnDemand opens no socket before Resolve needs one, and then opens it on the
	// local address of the route. It is for hosts. It lets several hosts and a target
	// share a machine. One of the hosts gets the port of RoCEv2. The others get a
	// port to which only a target of this package answers. A host that resolves an
	// address of this machine also gets such a port, because the target has the port
	// of RoCEv2 there. Addrs must be empty.
	OnDemand bool
	// Port is the UDP port on this machine and at the peers. Zero means DefaultPort.
	Port uint16
	// NoOffload disables UDP_SEGMENT and UDP_GRO, which are otherwise used if the
	// kernel supports them. Set it if a network card does not number the segments
	// that it makes in the way of the kernel.
	NoOffload bool
	// Receivers is the number of sockets that share the port of an address, 1..64.
	// Zero means 1. Each has a receive loop of its own. Queue pairs are assigned to
	// them by the vectors of their receive completion queues. There are as many
	// vectors as receivers.
	Receivers int
	// MaxHalfOpen limits the number of half-open connections: those that are
	// requested or accepted while the peer has not yet proven that it got our answer.
	// Zero means 64. Peers that have not proven that they receive our messages have
	// half of these places. Others make room for each other: the source with the most
	// connections loses one to a source that has fewer. No connection stays half-open
	// for more than 15 s.
	MaxHalfOpen int
	// MaxHalfOpenPerSource is the same limit for each proven source: an IPv4 address,
	// or an IPv6 network of 64 bits. Zero means 16. The oldest connection makes room
	// for the next one if it is older than one second.
	MaxHalfOpenPerSource int
	// MaxRequestRate limits the connect requests that are accepted per second. Up to
	// four times as many may come at once. Zero means 1024. One half is reserved for
	// proven sources that send few. MaxRequestRatePerSource is the same limit for
	// each source. Zero means 256. Of the strangers' requests that are not accepted,
	// up to 16 times MaxRequestRate per second get a challenge.
	MaxRequestRate          int
	MaxRequestRatePerSource int

	tamper func() func(packet []byte, deliver func([]byte)) // makes the tamper function of an endpoint
	psn    func() uint32                                    // picks the first sequence number; nil: random
	ecn    int                                              // ECN bits of sent packets; 0: ecnCapable
	buffer int                                              // size of socket buffers in bytes; 0: socketBuffer
}

// Defaults of Config
const (
	defaultHalfOpen          = 64
	defaultHalfOpenPerSource = 16
	defaultRate              = 1024
	defaultRatePerSource     = 256
)

// Provider implements rdma.Provider. Its methods may be called from any goroutine.
type Provider struct {
	cfg      Config
	guid     uint64
	device   device
	counters counters

	mu        sync.Mutex // guards the fields below
	endpoints []*endpoint
	closed    bool

	drops sync.WaitGroup // endpoints that drop is closing
}

var _ rdma.Provider = (*Provider)(nil)

// The CA GUID that we name to peers consists of our mark and 40 random bits. A peer with
// the mark uses this package, which defines what the standard leaves open, and what two
// ends of this package can omit. If this behavior changes, the mark must change.
const (
	guidMark  = 0x02756f // locally administered
	guidShift = 40
)

// New opens the sockets. The error names the socket that could not be opened.
func New(cfg Config) (*Provider, error) {
	if cfg.Port == 0 {
		cfg.Port = wire.Port
	}
	cfg.Receivers = min(max(1, cfg.Receivers), maxReceivers)
	for _, limit := range []struct {
		value    *int
		fallback int
	}{
		{&cfg.MaxHalfOpen, defaultHalfOpen}, {&cfg.MaxHalfOpenPerSource, defaultHalfOpenPerSource},
		{&cfg.MaxRequestRate, defaultRate}, {&cfg.MaxRequestRatePerSource, defaultRatePerSource},
	} {
		if *limit.value <= 0 {
			*limit.value = limit.fallback
		}
	}
	p := &Provider{cfg: cfg, guid: guidMark<<guidShift | (uint64(random32())<<32|uint64(random32()))&(1<<guidShift-1)}
	p.device.provider = p
	if p.cfg.psn == nil {
		p.cfg.psn = random32
	}
	if p.cfg.ecn == 0 {
		p.cfg.ecn = ecnCapable
	}
	if p.cfg.buffer == 0 {
		p.cfg.buffer = socketBuffer
	}
	if cfg.OnDemand {
		if len(cfg.Addrs) > 0 {
			return nil, fmt.Errorf("open RoCE socket: both Addrs and OnDemand are set: %w", unix.EINVAL)
		}
		return p, nil
	}
	addrs, optional := cfg.Addrs, false
	if len(addrs) == 0 {
		addrs, optional = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, true
	}
	for _, a := range addrs {
		a, err := canonical(a)
		if err == nil {
			_, err = p.openShared(netip.AddrPortFrom(a, cfg.Port))
		}
		if optional && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
			continue
		}
		if err != nil {
			return nil, errors.Join(err, p.Close())
		}
	}
	if len(p.endpoints) == 0 {
		return nil, fmt.Errorf("open RoCE socket: %w", unix.EAFNOSUPPORT)
	}
	return p, nil
}

// open adds an endpoint. The lock is held, or the provider is not in use yet.
func (p *Provider) open(addr netip.AddrPort, dedicated bool, manager *endpoint) (*endpoint, error) {
	s, err := openSocket(addr, socketConfig{
		plain: p.cfg.NoOffload, share: manager != nil && !dedicated, ecn: p.cfg.ecn, buffer: p.cfg.buffer,
	})
	if err != nil {
		return nil, err
	}
	o, err := newEndpoint(p, s, dedicated)
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	if manager != nil {
		o.manager = manager
	}
	p.endpoints = append(p.endpoints, o)
	go o.run()
	return o, nil
}

// Close closes the sockets and waits for the receive loops. It first closes the IDs and
// listeners that are still open. The owners of completion queues, regions and domains
// must close them.
func (p *Provider) Close() error {
	p.mu.Lock()
	endpoints := slices.Clone(p.endpoints)
	p.closed = true
	p.mu.Unlock()
	var errs []error
	for _, o := range endpoints {
		errs = append(errs, o.close())
	}
	p.drops.Wait()
	return errors.Join(errs...)
}

// openDedicated opens an endpoint for one queue pair. manager has its connection.
func (p *Provider) openDedicated(local netip.Addr, manager *endpoint) (*endpoint, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, rdma.ErrClosed
	}
	return p.open(netip.AddrPortFrom(local, 0), true, manager)
}

// drop closes an endpoint that is not used any more. It does not wait.
func (p *Provider) drop(o *endpoint) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.Index(p.endpoints, o)
	if i < 0 || p.closed {
		return // Close closes the endpoint
	}
	p.endpoints = slices.Delete(p.endpoints, i, i+1)
	p.drops.Go(func() { _ = o.close() }) // there is no caller to get an error
}

// Name implements rdma.Provider.
func (*Provider) Name() string { return "roce" }

// endpointFor returns the endpoint that sends from local to remote. It may open one.
func (p *Provider) endpointFor(local, remote netip.Addr) (*endpoint, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range p.endpoints {
		a := o.sock.local.Addr()
		if o.dedicated {
			continue
		}
		if a == local || a.IsUnspecified() && a.Is4() == local.Is4() {
			return o, nil
		}
	}
	switch {
	case p.closed:
		return nil, rdma.ErrClosed
	case !p.cfg.OnDemand:
		return nil, unix.EADDRNOTAVAIL
	}
	if !sameHost(local, remote) {
		o, err := p.openShared(netip.AddrPortFrom(local, p.cfg.Port))
		if !errors.Is(err, unix.EADDRINUSE) {
			return o, err
		}
	}
	return p.open(netip.AddrPortFrom(local, 0), true, nil)
}

// sameHost reports whether two addresses are known to belong to one host.
func sameHost(a, b netip.Addr) bool { return a == b || a.IsLoopback() }

// Resolve implements rdma.Provider.
func (p *Provider) Resolve(ctx context.Context, local netip.Addr, remote netip.AddrPort, tos int) (rdma.ID, error) {
	fail := func(err error) (rdma.ID, error) {
		return nil, &rdma.StepError{Step: "resolve address", Peer: remote, Err: err}
	}
	to := remote.Addr().Unmap()
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	if !to.IsValid() || to.IsUnspecified() || to.IsMulticast() {
		return fail(unix.EINVAL)
	}
	local = local.Unmap()
	if to.Zone() == "" && to.IsLinkLocalUnicast() {
		to = to.WithZone(local.Zone()) // both addresses are on one network
	}
	shown := to
	to, err := canonical(to)
	if err == nil && local.IsValid() {
		local, err = canonical(local)
	}
	if err != nil {
		return fail(err)
	}
	if !local.IsValid() {
		// An endpoint that is bound to an address sends from no other.
		local = p.onlyAddr(to.Is4())
	}
	local, mtu, err := route(local, netip.AddrPortFrom(to, p.cfg.Port))
	if err != nil {
		return fail(err)
	}
	if payloadMTU(mtu, false) == 0 {
		return fail(fmt.Errorf("MTU %d of the route is too small: %w", mtu, unix.EMSGSIZE))
	}
	o, err := p.endpointFor(local, to)
	if err != nil {
		return fail(err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return fail(rdma.ErrClosed)
	}
	id := o.newID(newPath(o.sock, local, netip.AddrPortFrom(to, p.cfg.Port), min(tos, 255)))
	id.mtu = payloadMTU(mtu, o.dedicated && sameHost(local, to))
	id.local, id.remote = netip.AddrPortFrom(named(local), ephemeral()), netip.AddrPortFrom(shown, remote.Port())
	return id, nil
}

// onlyAddr returns the address to which the first socket of a family is bound. It returns
// the zero address if that socket is bound to all addresses, or if the route may choose.
func (p *Provider) onlyAddr(v4 bool) netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range p.endpoints {
		if a := o.sock.local.Addr(); a.Is4() == v4 && !p.cfg.OnDemand {
			if a.IsUnspecified() {
				break
			}
			return a
		}
	}
	return netip.Addr{}
}

// ephemeral picks a port number that serves only to distinguish connections.
func ephemeral() uint16 { return 49152 + uint16(random32()%16384) }

// route returns the kernel's choice of the local address, in canonical form, and the MTU
// of the route to remote.
func route(local netip.Addr, remote netip.AddrPort) (netip.Addr, int, error) {
	network, level, option := "udp6", unix.IPPROTO_IPV6, unix.IPV6_MTU
	if remote.Addr().Is4() {
		network, level, option = "udp4", unix.IPPROTO_IP, unix.IP_MTU
	}
	var from *net.UDPAddr
	if local.IsValid() {
		if local.Is4() != remote.Addr().Is4() {
			return local, 0, unix.EAFNOSUPPORT
		}
		from = net.UDPAddrFromAddrPort(netip.AddrPortFrom(local, 0))
	}
	conn, err := net.DialUDP(network, from, net.UDPAddrFromAddrPort(remote))
	if err != nil {
		return local, 0, err
	}
	defer conn.Close() // nothing was sent, so nothing can be lost
	if local, err = canonical(conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr()); err != nil {
		return local, 0, err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return local, 0, err
	}
	mtu, err := getsockopt(raw, level, option)
	return local, mtu, err
}

func getsockopt(raw syscall.RawConn, level, option int) (v int, err error) {
	if cerr := raw.Control(func(fd uintptr) { v, err = unix.GetsockoptInt(int(fd), level, option) }); cerr != nil {
		return 0, cerr
	}
	return v, err
}

// overhead is the number of bytes by which a netdev's MTU must exceed that of RoCE, in
// the reckoning of rdma_rxe.
const overhead = 80

// payloadMTU returns the largest MTU of RoCE that fits in a netdev's MTU, or 0 if none
// fits. Two ends of this package on one host may use a larger MTU than the standard has.
func payloadMTU(mtu int, oneHost bool) int {
	if oneHost && mtu >= wire.HostMTU+overhead {
		return wire.HostMTU
	}
	for payload := 4096; payload >= 256; payload /= 2 {
		if mtu >= payload+overhead {
			return payload
		}
	}
	return 0
}

// Listen implements rdma.Provider.
func (p *Provider) Listen(addr netip.AddrPort, backlog int) (rdma.Listener, error) {
	fail := func(err error) (rdma.Listener, error) {
		return nil, &rdma.StepError{Step: "listen on", Peer: addr, Err: err}
	}
	a, err := canonical(addr.Addr())
	if err != nil {
		return fail(err)
	}
	var o *endpoint
	p.mu.Lock()
	endpoints := slices.Clone(p.endpoints)
	p.mu.Unlock()
	for _, c := range endpoints {
		if l := c.sock.local.Addr(); l == a || a.Is4() == l.Is4() && (a.IsUnspecified() || l.IsUnspecified()) {
			o = c
			break
		}
	}
	if o == nil {
		return fail(unix.EADDRNOTAVAIL)
	}
	// The kernel knows whether the address belongs to this machine.
	probe, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0)))
	if err != nil {
		return fail(err)
	}
	if err := probe.Close(); err != nil {
		return fail(err)
	}
	l, err := o.listen(addr, a, max(1, backlog))
	if err != nil {
		return fail(err)
	}
	return l, nil
}

// listener implements rdma.Listener.
type listener struct {
	endpoint *endpoint
	addr     netip.AddrPort // as requested
	bound    netip.Addr     // the same address in canonical form
	backlog  int
	ready    chan struct{} // has a token if requests may be waiting
	closed   chan struct{}
	once     sync.Once

	requests []*connID // guarded by the endpoint's lock
}

// Addr implements rdma.Listener.
func (l *listener) Addr() netip.AddrPort { return l.addr }

// Accept implements rdma.Listener.
func (l *listener) Accept(ctx context.Context) (rdma.ID, error) {
	fail := func(err error) (rdma.ID, error) {
		return nil, &rdma.StepError{Step: "accept on", Peer: l.addr, Err: err}
	}
	for {
		select {
		case <-l.closed:
			return fail(rdma.ErrClosed)
		default:
		}
		if id := l.take(); id != nil {
			return id, nil
		}
		select {
		case <-l.ready:
		case <-ctx.Done():
			return fail(ctx.Err())
		case <-l.closed:
			return fail(rdma.ErrClosed)
		}
	}
}

// take returns the oldest request, or nil. It leaves a token for the next one.
func (l *listener) take() *connID {
	l.endpoint.mu.Lock()
	defer l.endpoint.mu.Unlock()
	if len(l.requests) == 0 {
		return nil
	}
	id := l.requests[0]
	l.requests = l.requests[1:]
	l.signal()
	return id
}

func (l *listener) signal() {
	select {
	case l.ready <- struct{}{}:
	default:
	}
}

// Close implements rdma.Listener. It refuses requests that were not accepted.
func (l *listener) Close() error {
	var errs []error
	l.once.Do(func() {
		l.endpoint.mu.Lock()
		close(l.closed)
		delete(l.endpoint.listeners, l.addr.Port())
		waiting := l.requests
		l.requests = nil
		l.endpoint.mu.Unlock()
		for _, id := range waiting {
			errs = append(errs, id.Close())
		}
	})
	return errors.Join(errs...)
}
