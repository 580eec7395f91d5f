package roce

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// idState is the state of an ID.
type idState uint8

const (
	idIdle        idState = iota + 1 // resolved
	idConnecting                     // REQ sent
	idRequested                      // REQ received
	idAccepting                      // REP sent
	idEstablished                    //
	idLeaving                        // DREQ sent
	idEnded                          // refused, given up or disconnected
)

// connID implements rdma.ID.
type connID struct {
	endpoint      *endpoint
	path          *path
	mtu           int            // payload bytes per packet that this side names to the peer
	local, remote netip.AddrPort // as callers see them
	private       []byte
	passive       bool
	closing       chan struct{} // closed by Close

	// The endpoint's lock guards these.
	state    idState
	closed   bool
	comm     uint32 // our communication id
	peerComm uint32
	peerGUID uint64
	peerQPN  uint32
	tid      uint64
	qp       *queuePair
	param    rdma.ConnParam // of Connect
	psn      uint32         // first sequence number that the peer sends
	request  wire.Request   // on the passive side
	last     *wire.MAD      // our REP or RTU, to be repeated
	arrived  time.Time      // of the request
	patient  chan struct{}  // has a token after an MRA: the peer needs time
	// On the passive side
	listener *listener
	owed     int       // number of messages that the peer of a half-open connection may still get
	share    originKey // share of the half-open connections; see origin.share
	ending   bool      // the connection was abandoned, and its owner must close it
	// On the active side
	asking       *wire.MAD // our REQ
	confirmation *time.Timer

	answer    chan answer   // result of Connect or Accept; at most one
	heardPeer chan struct{} // has a token after a packet of the peer has arrived, which proves as much as an RTU

	eventsMu     sync.Mutex // guards the fields below
	events       chan rdma.Event
	eventsClosed bool
	reported     bool // EventDisconnected was reported
}

// answer is the result of a connect request.
type answer struct {
	private []byte
	err     error
}

// newID makes an ID with a random communication id. The lock is held.
func (p *endpoint) newID(path *path) *connID {
	id := &connID{
		endpoint: p, path: path, state: idIdle,
		closing: make(chan struct{}), patient: make(chan struct{}, 1),
		answer: make(chan answer, 1), heardPeer: make(chan struct{}, 1),
		events: make(chan rdma.Event, 16),
	}
	for {
		id.comm = random32()
		if id.comm != 0 && p.ids[id.comm] == nil && p.farewells[id.comm] == nil {
			p.ids[id.comm] = id
			return id
		}
	}
}

// Device implements rdma.ID.
func (id *connID) Device() rdma.Device { return &id.endpoint.provider.device }

// LocalAddr implements rdma.ID.
func (id *connID) LocalAddr() netip.AddrPort { return id.local }

// RemoteAddr implements rdma.ID.
func (id *connID) RemoteAddr() netip.AddrPort { return id.remote }

// PrivateData implements rdma.ID.
func (id *connID) PrivateData() []byte { return id.private }

// Events implements rdma.ID.
func (id *connID) Events() <-chan rdma.Event { return id.events }

func (id *connID) report(t rdma.EventType, detail string) {
	id.eventsMu.Lock()
	defer id.eventsMu.Unlock()
	if id.eventsClosed || t == rdma.EventDisconnected && id.reported {
		return
	}
	id.reported = id.reported || t == rdma.EventDisconnected
	select {
	case id.events <- rdma.Event{Type: t, Detail: detail}:
	default:
	}
}

// heard records that a packet of the peer has arrived.
func (id *connID) heard() {
	select {
	case id.heardPeer <- struct{}{}:
	default:
	}
}

// respond passes the result to Connect or Accept.
func (id *connID) respond(a answer) {
	select {
	case id.answer <- a:
	default:
	}
}

// CreateQP implements rdma.ID.
func (id *connID) CreateQP(pd rdma.PD, cfg rdma.QPConfig) (rdma.QP, error) {
	fail := func(err error) (rdma.QP, error) { return nil, fmt.Errorf("create queue pair: %w", err) }
	d, okPD := pd.(*domain)
	send, okSend := cfg.SendCQ.(*completionQueue)
	recv, okRecv := cfg.RecvCQ.(*completionQueue)
	p := id.endpoint
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case id.closed:
		return fail(rdma.ErrClosed)
	case id.qp != nil:
		return fail(unix.EEXIST)
	case !okPD || !okSend || !okRecv || d.device != &p.provider.device:
		return fail(unix.EINVAL)
	case cfg.MaxSendWR > maxQPWR || cfg.MaxRecvWR > maxQPWR || cfg.MaxSendSGE > maxSGE || cfg.MaxRecvSGE > maxSGE:
		return fail(errTooLarge)
	}
	data := p.member(recv.vector)
	if id.passive && ours(id.peerGUID) && sameHost(id.path.local.Addr(), id.path.remote.Addr()) {
		// The thread that serves a queue pair can receive its packets if the
		// socket gets no others. The peer sends to the port from which our
		// messages come, so from now on they come from this socket.
		if own, err := p.provider.openDedicated(id.path.local.Addr(), p); err == nil {
			data, id.path = own, newPath(own.sock, id.path.local.Addr(), id.path.remote, -1)
		}
	}
	if err := use(d, send, recv, data); err != nil {
		if data != p && data.dedicated {
			id.path = newPath(p.sock, id.path.local.Addr(), id.path.remote, -1)
			p.provider.drop(data)
		}
		return fail(err)
	}
	q := newQueuePair(id, data, d, send, recv, cfg)
	data.addQP(q)
	id.qp = q
	return q, nil
}

// use registers a queue pair with its domain and its two completion queues. It fails if
// one of them is closed.
func use(d *domain, send, recv *completionQueue, p *endpoint) error {
	if err := d.use(); err != nil {
		return fmt.Errorf("protection domain: %w", err)
	}
	for i, q := range []*completionQueue{send, recv} {
		if q.use(p) {
			continue
		}
		if i == 1 {
			send.unuse()
		}
		d.unuse()
		return fmt.Errorf("completion queue: %w", rdma.ErrClosed)
	}
	return nil
}

func (id *connID) stepError(step string, err error) error {
	return &rdma.StepError{Step: step, Peer: id.remote, Err: err}
}

func checkPrivate(private []byte, most int) error {
	if len(private) > most {
		return fmt.Errorf("%d bytes of private data, at most %d fit: %w", len(private), most, unix.EMSGSIZE)
	}
	return nil
}

// resendAfter holds the times after which a message of the connection manager is
// repeated. The last time applies to all further repetitions.
var resendAfter = [...]time.Duration{500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second}

const (
	// resends is the largest number of repetitions of a request.
	resends = 15
	// farewellResends limits the number of times that a DREQ is sent.
	farewellResends = 4
)

func resendTime(tries int) time.Duration { return resendAfter[min(tries, len(resendAfter)-1)] }

// exchange sends a REQ until there is an answer.
func (id *connID) exchange(ctx context.Context, step string) (answer, error) {
	p := id.endpoint
	timer := time.NewTimer(0)
	defer timer.Stop()
	for tries := 0; ; {
		select {
		case <-timer.C:
			if tries > resends {
				return answer{}, id.stepError(step, id.unheard(unix.ETIMEDOUT))
			}
			p.mu.Lock()
			if id.state == idConnecting && !id.closed {
				p.sendMAD(id.path, id.asking)
			}
			p.mu.Unlock()
			timer.Reset(resendTime(tries))
			if tries++; tries == 2 && id.nobodyThere() {
				return answer{}, id.stepError(step, unix.ECONNREFUSED)
			}
		case <-id.patient: // the peer has the request, and needs time
			tries = len(resendAfter) - 1
			timer.Reset(resendTime(tries))
		case a := <-id.answer:
			return a, nil
		case <-ctx.Done():
			return answer{}, id.stepError(step, id.unheard(ctx.Err()))
		case <-id.closing:
			return answer{}, id.stepError(step, rdma.ErrClosed)
		}
	}
}

// established waits until the peer has proven that it got the REP. The REP is repeated
// only when the REQ is, and the endpoint limits the time (halfOpenTime).
func (id *connID) established(ctx context.Context) error {
	for {
		select {
		case <-id.heardPeer:
			p := id.endpoint
			p.mu.Lock()
			if id.state == idAccepting {
				p.establish(id)
			}
			p.mu.Unlock()
		case a := <-id.answer:
			return a.err
		case <-ctx.Done():
			return ctx.Err()
		case <-id.closing:
			return rdma.ErrClosed
		}
	}
}

// unheard adds a possible reason to the error of a request without an answer.
func (id *connID) unheard(err error) error {
	own, port := id.local.Addr(), id.endpoint.provider.cfg.Port
	if id.endpoint.sock.local.Port() == port || sameHost(own, id.remote.Addr()) {
		return err
	}
	return fmt.Errorf("%w (another user has port %d of %s, so that only a target of this software can answer)", err, port, own)
}

// probeTime limits the time that nobodyThere waits for an ICMP message.
const probeTime = 100 * time.Millisecond

// nobodyThere reports whether the peer's host answers that the port of RoCEv2 is closed.
// The socket of the connections cannot tell, because it is not connected.
func (id *connID) nobodyThere() bool {
	to := netip.AddrPortFrom(id.remote.Addr(), id.endpoint.provider.cfg.Port)
	c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(id.local.Addr(), 0)), net.UDPAddrFromAddrPort(to))
	if err != nil {
		return false
	}
	defer c.Close() // nothing can be lost
	if err := c.SetDeadline(time.Now().Add(probeTime)); err != nil {
		return false
	}
	if _, _, err := c.WriteMsgUDP(nil, nil, nil); err != nil { // an empty datagram, which every implementation ignores
		return errors.Is(err, unix.ECONNREFUSED)
	}
	_, err = c.Read(make([]byte, 1))
	return errors.Is(err, unix.ECONNREFUSED)
}

// Connect implements rdma.ID. After an error, the ID can only be closed.
func (id *connID) Connect(ctx context.Context, param rdma.ConnParam) ([]byte, error) {
	const step = "connect"
	param.RetryCount, param.RNRRetryCount = min(param.RetryCount, 7), min(param.RNRRetryCount, 7)
	if err := checkPrivate(param.PrivateData, wire.RequestPrivate); err != nil {
		return nil, id.stepError(step, err)
	}
	p := id.endpoint
	p.mu.Lock()
	switch {
	case id.closed:
		p.mu.Unlock()
		return nil, id.stepError(step, rdma.ErrClosed)
	case id.state != idIdle || id.passive || id.qp == nil:
		p.mu.Unlock()
		return nil, id.stepError(step, unix.EINVAL)
	}
	id.state, id.param, id.psn = idConnecting, param, p.provider.cfg.psn()&0xffffff
	id.tid = uint64(random32())<<32 | uint64(random32())
	p.strangers.find(id.path.remote.Addr()).proven = true // for this side, the peer is proven, so that it may ask for a proof
	r := wire.Request{
		Port: id.remote.Port(), GUID: p.provider.guid, QPN: id.qp.num, PSN: id.psn,
		ResponderResources: min(param.ResponderResources, maxReadAtomic),
		InitiatorDepth:     min(param.InitiatorDepth, maxReadAtomic),
		AckTimeout:         ackTimeout, RetryCount: param.RetryCount, RNRRetryCount: param.RNRRetryCount,
		FlowControl: param.FlowControl, MTU: id.mtu,
		Source: id.local.Addr(), Destination: id.remote.Addr(), SourcePort: id.local.Port(),
	}
	copy(r.Private[:], param.PrivateData)
	id.asking = wire.NewMAD(wire.REQ, id.tid, id.comm, 0)
	r.Put(id.asking)
	p.mu.Unlock()

	a, err := id.exchange(ctx, step)
	if err != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		id.giveUp()
		return nil, err
	}
	return a.private, a.err
}

// ackTimeout is the retry timer that we request of the peer: 537 ms, as Linux does.
const ackTimeout = 17

// Reasons of REJ that package rdma does not name
const (
	rejectTimeout        = 4
	rejectUnsupported    = 5
	rejectInvalidCommID  = 6
	rejectInvalidPathMTU = 26
)

// giveUp ends a connect request or its answer. The lock is held.
func (id *connID) giveUp() {
	switch id.state {
	case idConnecting, idAccepting:
		id.reject(rejectTimeout, nil)
	case idEstablished:
		id.leave()
	}
	id.end()
}

// end moves the ID to its final state and fails the queue pair. The lock is held.
func (id *connID) end() {
	id.state = idEnded
	if id.qp != nil {
		_ = id.qp.Fail() // never fails
	}
}

// reject sends a REJ. The lock is held.
func (id *connID) reject(reason uint16, private []byte) {
	r := wire.Reject{Reason: reason}
	switch {
	case id.state == idAccepting:
		r.Of = 2
	case !id.passive && id.peerComm != 0:
		r.Of = 1
	}
	copy(r.Private[:], private)
	m := wire.NewMAD(wire.REJ, id.tid, id.comm, id.peerComm)
	r.Put(m)
	id.send(m)
}

// Accept implements rdma.ID.
func (id *connID) Accept(ctx context.Context, param rdma.ConnParam) error {
	const step = "accept"
	if err := checkPrivate(param.PrivateData, wire.ReplyPrivate); err != nil {
		return id.stepError(step, err)
	}
	_, mtu, routeErr := route(id.path.local.Addr(), netip.AddrPortFrom(id.path.remote.Addr(), id.endpoint.provider.cfg.Port))
	if err := id.accept(param, mtu, routeErr); err != nil {
		return id.stepError(step, err)
	}
	if err := id.established(ctx); err != nil {
		id.endpoint.mu.Lock()
		defer id.endpoint.mu.Unlock()
		id.giveUp()
		return id.stepError(step, err)
	}
	return nil
}

var errGaveUp = fmt.Errorf("the peer gave up: %w", unix.ECONNRESET)

// accept makes the queue pair ready and sends the REP.
func (id *connID) accept(param rdma.ConnParam, mtu int, routeErr error) error {
	p, r := id.endpoint, &id.request
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case id.closed:
		return rdma.ErrClosed
	case !id.passive || id.qp == nil:
		return unix.EINVAL
	case id.state == idEnded:
		return errGaveUp
	case id.state != idRequested:
		return unix.EINVAL
	case routeErr != nil:
		return routeErr
	case payloadMTU(mtu, ours(r.GUID) && sameHost(id.path.local.Addr(), id.path.remote.Addr())) < r.MTU:
		// The requester names the MTU, and the REP cannot name another.
		id.reject(rejectInvalidPathMTU, nil)
		id.end()
		return fmt.Errorf("the peer wants an MTU of %d, the route takes %d: %w", r.MTU, mtu, unix.EMSGSIZE)
	}
	id.psn = p.provider.cfg.psn() & 0xffffff
	c := connected{
		dest: r.QPN, mtu: r.MTU, sendPSN: r.PSN, recvPSN: id.psn,
		retries: r.RetryCount, notReadyRetries: r.RNRRetryCount,
		readDepth:   int(min(param.InitiatorDepth, r.ResponderResources, maxReadAtomic)),
		readsServed: int(min(param.ResponderResources, maxReadAtomic)),
	}
	a := wire.Reply{
		GUID: p.provider.guid, QPN: id.qp.num, PSN: id.psn,
		ResponderResources: uint8(c.readsServed), InitiatorDepth: uint8(c.readDepth),
		RNRRetryCount: param.RNRRetryCount, FlowControl: param.FlowControl,
	}
	copy(a.Private[:], param.PrivateData)
	m := wire.NewMAD(wire.REP, id.tid, id.comm, id.peerComm)
	a.Put(m)
	id.state, id.last = idAccepting, m
	id.qp.peerIs(id.peerGUID)
	id.qp.ready(c) // data may arrive before the RTU
	id.send(m)
	return nil
}

// Reject implements rdma.ID.
func (id *connID) Reject(private []byte) error {
	if err := checkPrivate(private, wire.RejectPrivate); err != nil {
		return id.stepError("reject", err)
	}
	p := id.endpoint
	p.mu.Lock()
	defer p.mu.Unlock()
	if id.closed || id.state != idRequested {
		return id.stepError("reject", unix.EINVAL)
	}
	id.reject(rdma.RejectConsumer, private)
	id.end()
	return nil
}

// Disconnect implements rdma.ID.
func (id *connID) Disconnect() error {
	p := id.endpoint
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case id.closed || id.state == idLeaving || id.state == idEnded:
		return nil
	case id.state != idEstablished:
		return id.stepError("disconnect", unix.EINVAL)
	}
	id.leave()
	return nil
}

// farewell is a DREQ without an answer. It may outlive its ID.
type farewell struct {
	id    *connID
	mad   *wire.MAD
	tries int
	timer *time.Timer
}

// leave sends a DREQ, which is repeated until it is answered. The lock is held.
func (id *connID) leave() {
	p := id.endpoint
	id.state = idLeaving
	_ = id.qp.Fail() // never fails
	p.startFarewell(id)
}

// unanswered is the detail of the event if no DREQ was answered.
const unanswered = "no answer to the disconnect request"

func (p *endpoint) repeatFarewell(f *farewell) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.farewells[f.id.comm] != f {
		return
	}
	if f.tries++; f.tries == farewellResends {
		p.farewellDone(f, unanswered)
		return
	}
	p.sendMAD(f.id.path, f.mad)
	f.timer.Reset(resendTime(f.tries))
}

// unused reports whether a dedicated endpoint is not needed any more. The lock is held.
func (p *endpoint) unused() bool { return p.dedicated && len(p.ids)+len(p.farewells) == 0 }

func (p *endpoint) farewellDone(f *farewell, detail string) {
	f.timer.Stop()
	delete(p.farewells, f.id.comm)
	f.id.state = idEnded
	f.id.report(rdma.EventDisconnected, detail)
	if p.unused() {
		p.provider.drop(p)
	}
}

// Close implements rdma.ID.
func (id *connID) Close() error {
	p := id.endpoint
	p.mu.Lock()
	if id.closed {
		p.mu.Unlock()
		return nil
	}
	switch id.state {
	case idRequested:
		id.reject(rdma.RejectConsumer, nil)
	case idConnecting, idAccepting:
		id.reject(rejectTimeout, nil)
	case idEstablished:
		id.leave()
	}
	if id.state != idLeaving {
		id.end()
	}
	id.closed = true
	p.forget(id)
	if id.confirmation != nil {
		id.confirmation.Stop()
	}
	close(id.closing)
	id.eventsMu.Lock() // before the answer to the DREQ can arrive
	id.eventsClosed = true
	close(id.events)
	id.eventsMu.Unlock()
	q := id.qp
	if id.path.sock != p.sock { // that socket ends with the queue pair
		id.path = newPath(p.sock, id.path.local.Addr(), id.path.remote, -1)
	}
	p.mu.Unlock()
	if q != nil {
		q.destroy()
	}
	p.mu.Lock()
	unused := p.unused()
	p.mu.Unlock()
	if unused {
		p.provider.drop(p)
	}
	return nil
}
