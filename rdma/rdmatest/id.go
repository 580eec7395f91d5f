package rdmatest

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// Lengths of the private data in the CM messages. Shorter data is padded.
const (
	requestPrivate = 56
	acceptPrivate  = 196
	rejectPrivate  = 148
)

// connID implements rdma.ID.
type connID struct {
	endpoint      *endpoint
	device        *device
	local, remote netip.AddrPort
	private       []byte
	closing       chan struct{} // closed by Close

	// The fabric's lock guards these.
	qp           *queuePair
	connected    bool
	peer         *connID // set while both exist and are connected
	cut          bool    // the wire is broken
	disconnected bool    // this side requested the end
	reported     bool    // EventDisconnected was reported
	events       chan rdma.Event
	closed       bool

	// For a connect request that is not answered yet
	param     rdma.ConnParam
	from      *connID     // on the passive side: the ID that requests the connection
	answer    chan answer // on the active side: buffered, at most one answer
	requested bool
}

// answer is the result of a connect request.
type answer struct {
	private []byte
	err     error
}

// newID makes an ID. The lock is held.
func (e *endpoint) newID(local, remote netip.AddrPort) *connID {
	id := &connID{
		endpoint: e, device: e.device, local: local, remote: remote,
		closing: make(chan struct{}),
		events:  make(chan rdma.Event, 16),
		answer:  make(chan answer, 1),
	}
	e.ids[id] = struct{}{}
	e.fabric.objects.IDs++
	return id
}

// Device implements rdma.ID.
func (c *connID) Device() rdma.Device { return c.device }

// LocalAddr implements rdma.ID.
func (c *connID) LocalAddr() netip.AddrPort { return c.local }

// RemoteAddr implements rdma.ID.
func (c *connID) RemoteAddr() netip.AddrPort { return c.remote }

// PrivateData implements rdma.ID.
func (c *connID) PrivateData() []byte { return c.private }

// Events implements rdma.ID.
func (c *connID) Events() <-chan rdma.Event { return c.events }

// CreateQP implements rdma.ID.
func (c *connID) CreateQP(domain rdma.PD, cfg rdma.QPConfig) (rdma.QP, error) {
	f := c.endpoint.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	pd, okPD := domain.(*protectionDomain)
	send, okSend := cfg.SendCQ.(*completionQueue)
	recv, okRecv := cfg.RecvCQ.(*completionQueue)
	fail := func(err error) (rdma.QP, error) { return nil, fmt.Errorf("create queue pair: %w", err) }
	switch {
	case c.closed:
		return fail(rdma.ErrClosed)
	case c.qp != nil:
		return fail(unix.EEXIST)
	case !okPD || !okSend || !okRecv || pd.device != c.device || send.endpoint != c.endpoint || recv.endpoint != c.endpoint:
		return fail(unix.EINVAL)
	case pd.closed || send.closed || recv.closed:
		return fail(rdma.ErrClosed)
	case cfg.MaxSendWR > maxQPWR || cfg.MaxRecvWR > maxQPWR || cfg.MaxSendSGE > maxSGE || cfg.MaxRecvSGE > maxSGE:
		return fail(errTooLarge)
	}
	f.nextQP++
	c.qp = &queuePair{
		id: c, pd: pd, sendCQ: send, recvCQ: recv, num: f.nextQP & 0xffffff, state: qpInit,
		maxSendSGE: max(1, cfg.MaxSendSGE),
		sendQ:      make([]sendEntry, max(1, cfg.MaxSendWR)),
		recvQ:      make([]rdma.RecvWR, max(1, cfg.MaxRecvWR)),
	}
	pd.users++
	send.users++
	recv.users++
	f.objects.QPs++
	return c.qp, nil
}

func (c *connID) stepError(step string, err error) error {
	return &rdma.StepError{Step: step, Peer: c.remote, Err: err}
}

// pad returns private data with the length of its message's field.
func pad(private []byte, length int) []byte {
	return append(slices.Clone(private), make([]byte, length-len(private))...)
}

func checkPrivate(private []byte, most int) error {
	if len(private) > most {
		return fmt.Errorf("%d bytes of private data, at most %d fit: %w", len(private), most, unix.EMSGSIZE)
	}
	return nil
}

// Connect implements rdma.ID. After an error, the ID can only be closed.
func (c *connID) Connect(ctx context.Context, p rdma.ConnParam) ([]byte, error) {
	f := c.endpoint.fabric
	if err := checkPrivate(p.PrivateData, requestPrivate); err != nil {
		return nil, c.stepError("connect", err)
	}
	f.mu.Lock()
	switch {
	case c.closed:
		f.mu.Unlock()
		return nil, c.stepError("connect", rdma.ErrClosed)
	case c.qp == nil || c.requested || c.from != nil:
		f.mu.Unlock()
		return nil, c.stepError("connect", unix.EINVAL)
	}
	c.requested, c.param = true, p
	f.mu.Unlock()

	if err := c.request(ctx); err != nil {
		c.withdraw()
		return nil, err
	}
	select {
	case a := <-c.answer:
		return a.private, a.err
	case <-ctx.Done():
		c.withdraw()
		return nil, c.stepError("connect", ctx.Err())
	case <-c.closing:
		return nil, c.stepError("connect", rdma.ErrClosed)
	}
}

// request passes a request to the listener, as soon as it is reachable and its backlog
// has room.
func (c *connID) request(ctx context.Context) error {
	f := c.endpoint.fabric
	for {
		f.mu.Lock()
		changed := f.changed
		e := f.endpoints[c.remote.Addr().Unmap()]
		silent := c.endpoint.silent || e.silent
		l := e.listeners[c.remote.Port()]
		var passive *connID
		switch {
		case silent: // wait
		case e.refuse != nil:
			err := &rdma.RejectError{Peer: c.remote, Reason: e.refuse.reason}
			if err.Reason == rdma.RejectConsumer {
				err.Private = pad(e.refuse.private, rejectPrivate)
			}
			f.mu.Unlock()
			return err
		case l == nil:
			f.mu.Unlock()
			return &rdma.RejectError{Peer: c.remote, Reason: rdma.RejectInvalidServiceID}
		case len(l.requests) < cap(l.requests):
			passive = e.newID(netip.AddrPortFrom(e.addr, c.remote.Port()), c.local)
			passive.from, passive.param, passive.private = c, c.param, pad(c.param.PrivateData, requestPrivate)
			l.requests <- passive // only senders that hold the lock fill it, so there is room
		}
		f.mu.Unlock()
		if passive != nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return c.stepError("connect", ctx.Err())
		case <-c.closing:
			return c.stepError("connect", rdma.ErrClosed)
		}
	}
}

// withdraw prevents an answer to a request that was given up.
func (c *connID) withdraw() {
	f := c.endpoint.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	c.cut = true
}

// Accept implements rdma.ID.
func (c *connID) Accept(_ context.Context, p rdma.ConnParam) error {
	f := c.endpoint.fabric
	if err := checkPrivate(p.PrivateData, acceptPrivate); err != nil {
		return c.stepError("accept", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	active := c.from
	switch {
	case c.closed:
		return c.stepError("accept", rdma.ErrClosed)
	case active == nil || c.requested || c.qp == nil:
		return c.stepError("accept", unix.EINVAL)
	}
	c.requested = true
	if active.closed || active.cut {
		return c.stepError("accept", fmt.Errorf("the peer gave up: %w", unix.ECONNRESET))
	}
	c.peer, active.peer = active, c
	c.connected, active.connected = true, true
	c.qp.state = max(c.qp.state, qpReady) // a QP that failed before stays failed
	active.qp.state = max(active.qp.state, qpReady)
	c.qp.initDepth = min(int(p.InitiatorDepth), maxReadAtomic)
	c.qp.respRes = min(int(p.ResponderResources), maxReadAtomic)
	active.qp.initDepth = min(int(active.param.InitiatorDepth), c.qp.respRes)
	active.qp.respRes = min(int(active.param.ResponderResources), maxReadAtomic)
	active.answer <- answer{private: pad(p.PrivateData, acceptPrivate)}
	return nil
}

// Reject implements rdma.ID.
func (c *connID) Reject(private []byte) error {
	f := c.endpoint.fabric
	if err := checkPrivate(private, rejectPrivate); err != nil {
		return c.stepError("reject", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if c.closed || c.from == nil || c.requested {
		return c.stepError("reject", unix.EINVAL)
	}
	c.refuse(rdma.RejectConsumer, pad(private, rejectPrivate))
	return nil
}

// refuse answers an open request with a reject. The lock is held.
func (c *connID) refuse(reason int, private []byte) {
	c.requested = true
	c.from.answer <- answer{err: &rdma.RejectError{Peer: c.from.remote, Reason: reason, Private: private}}
}

// report adds an event. The lock is held.
func (c *connID) report(kind rdma.EventType, detail string) {
	if c.closed {
		return
	}
	select {
	case c.events <- rdma.Event{Type: kind, Detail: detail}:
	default:
	}
}

// reportDisconnected reports the end of a connection once.
func (c *connID) reportDisconnected(detail string) {
	if c.connected && !c.reported {
		c.reported = true
		c.report(rdma.EventDisconnected, detail)
	}
}

// Disconnect implements rdma.ID. The peer gets its event at once. The local event comes
// with the peer's answer, which is its Disconnect or Close.
func (c *connID) Disconnect() error {
	f := c.endpoint.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case c.closed:
		return nil
	case !c.connected:
		return c.stepError("disconnect", unix.EINVAL)
	}
	c.disconnect()
	return nil
}

func (c *connID) disconnect() {
	if c.disconnected {
		return
	}
	c.disconnected = true
	c.qp.fail()
	if p := c.peer; p != nil && !c.cut && !c.endpoint.silent && !p.endpoint.silent {
		p.reportDisconnected("disconnect request")
	}
}

// Close implements rdma.ID. It disconnects a connection, and refuses a request that was
// not answered.
func (c *connID) Close() error {
	f := c.endpoint.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	if c.closed {
		return nil
	}
	if c.from != nil && !c.requested {
		c.refuse(rdma.RejectConsumer, pad(nil, rejectPrivate))
	}
	if c.connected {
		c.disconnect()
	}
	c.closed = true
	close(c.events)
	close(c.closing)
	if c.qp != nil {
		c.qp.destroy()
	}
	if c.peer != nil {
		peer := c.peer
		c.peer, peer.peer, peer.cut = nil, nil, true
		if peer.qp != nil {
			peer.qp.progress()
		}
	}
	delete(c.endpoint.ids, c)
	f.objects.IDs--
	return nil
}
