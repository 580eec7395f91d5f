package roce

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// trace is what another process needs to know of a connection to end it.
type trace struct {
	local, remote           netip.AddrPort // of UDP
	comm, peerComm, peerQPN uint32
}

func (t trace) String() string {
	return fmt.Sprintf("%v %v %x %x %x", t.local, t.remote, t.comm, t.peerComm, t.peerQPN)
}

func parseTrace(text string) (t trace, err error) {
	malformed := fmt.Errorf("trace %q of a connection: %w", text, unix.EINVAL)
	fields := strings.Fields(text)
	if len(fields) != 5 {
		return t, malformed
	}
	for i, to := range []*netip.AddrPort{&t.local, &t.remote} {
		if *to, err = netip.ParseAddrPort(fields[i]); err != nil {
			return t, malformed
		}
	}
	for i, to := range []*uint32{&t.comm, &t.peerComm, &t.peerQPN} {
		n, err := strconv.ParseUint(fields[2+i], 16, 32)
		if err != nil || n == 0 {
			return t, malformed
		}
		*to = uint32(n)
	}
	return t, nil
}

// Trace implements rdma.Traced. It is empty unless the connection is established.
func (id *connID) Trace() string {
	id.endpoint.mu.Lock()
	defer id.endpoint.mu.Unlock()
	if id.state != idEstablished || id.closed {
		return ""
	}
	local := netip.AddrPortFrom(id.path.local.Addr(), id.path.sock.local.Port())
	return trace{local, id.path.remote, id.comm, id.peerComm, id.peerQPN}.String()
}

// Leave implements rdma.Leaver. It sends the DREQ that the dead process has not sent. A peer that
// uses this package accepts it only from the port of the dead process, which is free by now, or
// is the well-known one.
func (p *Provider) Leave(ctx context.Context, connection string) error {
	t, err := parseTrace(connection)
	if err != nil {
		return err
	}
	fail := func(err error) error { return &rdma.StepError{Step: "end connection", Peer: t.remote, Err: err} }
	o, err := p.endpointAt(t.local)
	if err != nil {
		return fail(err)
	}
	id, err := o.sendFarewell(t)
	if err != nil {
		return fail(err)
	}
	select {
	case e := <-id.events:
		if e.Detail == unanswered {
			return fail(unix.ETIMEDOUT)
		}
		return nil
	case <-ctx.Done():
		return fail(context.Cause(ctx))
	}
}

// endpointAt returns the endpoint with a UDP port, which may be new.
func (p *Provider) endpointAt(local netip.AddrPort) (*endpoint, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range p.endpoints {
		if a := o.sock.local; a.Port() == local.Port() && (a.Addr() == local.Addr() || a.Addr().IsUnspecified() && a.Addr().Is4() == local.Addr().Is4()) {
			return o.manager, nil
		}
	}
	if p.closed {
		return nil, rdma.ErrClosed
	}
	return p.open(local, true, nil)
}

// sendFarewell sends a DREQ for a connection that this process does not have, until it is answered.
func (p *endpoint) sendFarewell(t trace) (*connID, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return nil, rdma.ErrClosed
	case p.ids[t.comm] != nil || p.farewells[t.comm] != nil:
		return nil, unix.EADDRINUSE
	}
	id := p.newID(newPath(p.sock, t.local.Addr(), t.remote, -1))
	delete(p.ids, id.comm)
	id.comm, id.peerComm, id.peerQPN, id.state = t.comm, t.peerComm, t.peerQPN, idLeaving
	p.startFarewell(id)
	return id, nil
}

// startFarewell sends a DREQ until it is answered. The lock is held.
func (p *endpoint) startFarewell(id *connID) {
	m := wire.NewMAD(wire.DREQ, uint64(random32())<<32|uint64(random32()), id.comm, id.peerComm)
	m.SetQPN(id.peerQPN)
	f := &farewell{id: id, mad: m}
	p.farewells[id.comm] = f
	p.sendMAD(id.path, m)
	f.timer = time.AfterFunc(resendTime(0), func() { p.repeatFarewell(f) })
}
