package roce

import (
	"errors"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// endpoint is a socket with its receive loop, its queue pairs and its connections. Locks
// are taken in the order endpoint.recvMu, endpoint.mu, queuePair.mu, then all others.
type endpoint struct {
	provider  *Provider
	sock      *socket
	done      chan struct{}               // closed when the receive loop has ended
	wake      int                         // eventfd that wakes the receive loop of a dedicated endpoint
	file      *os.File                    // a copy of the socket for the runtime's poller, unless dedicated
	dedicated bool                        // serves one queue pair only, with its connection
	manager   *endpoint                   // endpoint that has the state of the connections; may be this one
	group     atomic.Pointer[[]*endpoint] // of the manager: the endpoints that share the UDP port
	driven    atomic.Bool                 // the caller of Receive takes the packets

	recvMu sync.Mutex   // the outermost lock; guards receiving and the fields below
	dirty  []*queuePair // queue pairs to settle after the batch
	shut   bool         // the socket is closed

	fdMu    sync.Mutex // an innermost lock; guards the use of wake and the field below
	fdUsers int        // the endpoint itself, and completion queues whose PacketFD is in use

	// tamper is between socket and queue pairs. Tests use it to lose packets.
	tamper func(packet []byte, deliver func([]byte))

	eventsMu   sync.Mutex         // an innermost lock; guards the fields below
	collecting bool               // packets are being received
	events     []*completionQueue // queues whose events wait until collecting ends

	qpsMu sync.RWMutex // guards qps
	qps   map[uint32]*queuePair
	qp0   atomic.Pointer[queuePair] // the only one of a dedicated endpoint

	mu         sync.Mutex // guards the fields below, and the state of the IDs
	closed     bool
	listeners  map[uint16]*listener
	ids        map[uint32]*connID   // by our communication id
	byPeer     map[peerID]*connID   // passive IDs
	byQP       map[peerQP]*connID   // connections and requests, by the peer's queue pair
	farewells  map[uint32]*farewell // by our communication id
	handshakes handshakes
	strangers  strangers
	outbox     outbox
}

// peerID identifies an ID of a peer by its communication id.
type peerID struct {
	addr netip.Addr
	comm uint32
}

// peerQP identifies a queue pair of a peer.
type peerQP struct {
	guid uint64
	qpn  uint32
}

func newEndpoint(p *Provider, s *socket, dedicated bool) (*endpoint, error) {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	o := &endpoint{
		provider: p, sock: s, done: make(chan struct{}), wake: wake, fdUsers: 1, dedicated: dedicated,
		qps: make(map[uint32]*queuePair), listeners: make(map[uint16]*listener),
		ids: make(map[uint32]*connID), byPeer: make(map[peerID]*connID), byQP: make(map[peerQP]*connID),
		farewells:  make(map[uint32]*farewell),
		handshakes: handshakes{byShare: make(map[originKey]int)},
		strangers:  newStrangers(dedicated),
	}
	o.manager = o
	if !dedicated {
		fd, err := unix.FcntlInt(uintptr(s.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, errors.Join(os.NewSyscallError("fcntl", err), unix.Close(wake))
		}
		o.file = os.NewFile(uintptr(fd), "RoCE socket")
	}
	if p.cfg.tamper != nil {
		o.tamper = p.cfg.tamper()
	}
	return o, nil
}

// addQP gives a queue pair a random number that is not in use.
func (p *endpoint) addQP(q *queuePair) {
	p.qpsMu.Lock()
	defer p.qpsMu.Unlock()
	for {
		q.num = random32() & 0xffffff
		if q.num >= 16 && p.ownerOf(q.num) == p && p.qps[q.num] == nil { // some peers treat the first 16 specially
			p.qps[q.num] = q
			if p.dedicated {
				p.qp0.Store(q)
			}
			return
		}
	}
}

func (p *endpoint) removeQP(q *queuePair) {
	p.qpsMu.Lock()
	defer p.qpsMu.Unlock()
	delete(p.qps, q.num)
	p.qp0.CompareAndSwap(q, nil)
}

// drivenCheck is the interval, in milliseconds, at which the receive loop takes packets
// that the caller of Receive has not taken. That caller may be busy, but the peer needs
// answers.
const drivenCheck = 1000

// run is the receive loop.
func (p *endpoint) run() {
	defer close(p.done)
	if !p.dedicated {
		p.runShared()
		return
	}
	var event [8]byte
	for {
		fds := [2]unix.PollFd{{Fd: int32(p.wake), Events: unix.POLLIN}, {Fd: int32(p.sock.fd), Events: unix.POLLIN}}
		watch, timeout := fds[:], -1
		if p.driven.Load() {
			watch, timeout = fds[:1], drivenCheck
		}
		if _, err := unix.Poll(watch, timeout); err != nil && err != unix.EINTR {
			p.broken(os.NewSyscallError("poll", err))
			return
		}
		if fds[0].Revents != 0 {
			_, _ = unix.Read(p.wake, event[:]) // fails if there was no wake-up
		}
		if !p.receive() {
			return
		}
	}
}

// runShared is run for an endpoint that several queue pairs share. No other thread takes
// its packets regularly, and the runtime's poller wakes the loop at less cost than a
// thread of its own.
func (p *endpoint) runShared() {
	raw, err := p.file.SyscallConn()
	if err == nil {
		err = raw.Read(func(uintptr) bool { return !p.receive() })
	}
	if err != nil && !errors.Is(err, os.ErrClosed) {
		p.broken(err)
	}
}

// receive takes all packets that have arrived. It returns false if no others will arrive.
func (p *endpoint) receive() bool {
	for {
		more, err := p.receiveBatch()
		if err != nil {
			if !errors.Is(err, rdma.ErrClosed) {
				p.broken(err)
			}
			return false
		}
		if !more {
			return true
		}
	}
}

// mostBatches limits the packets of one call of Receive, because its caller has other
// work. A batch is at most 32 messages of 64 KiB.
const mostBatches = 4

// receiveSome is like receive, with a limit. It leaves the rest to the receive loop,
// because the socket may not become readable again to wake the caller.
func (p *endpoint) receiveSome() {
	for range mostBatches {
		if more, err := p.receiveBatch(); err != nil || !more {
			return // the loop gets the error, too
		}
	}
	p.nudge()
}

// nudge wakes the receive loop so that it notices a change.
func (p *endpoint) nudge() {
	p.fdMu.Lock()
	defer p.fdMu.Unlock()
	if p.fdUsers > 0 {
		_, _ = unix.Write(p.wake, eventfdOne) // fails only if 2^64-2 of them were not read
	}
}

// hold keeps the descriptors open until release, even if the endpoint is closed, because
// others know their numbers. It returns false if they are closed already.
func (p *endpoint) hold() bool {
	p.fdMu.Lock()
	defer p.fdMu.Unlock()
	if p.fdUsers == 0 {
		return false
	}
	p.fdUsers++
	return true
}

// release undoes hold.
func (p *endpoint) release() error {
	p.fdMu.Lock()
	defer p.fdMu.Unlock()
	if p.fdUsers--; p.fdUsers > 0 {
		return nil
	}
	return errors.Join(p.sock.close(), os.NewSyscallError("close", unix.Close(p.wake)))
}

// receiveBatch receives the packets that have arrived and lets their queue pairs answer.
// It reports whether there is more to do at once.
func (p *endpoint) receiveBatch() (more bool, err error) {
	p.recvMu.Lock()
	defer p.recvMu.Unlock()
	if p.shut {
		return false, rdma.ErrClosed
	}
	return p.receiveBatchLocked()
}

// poll is receiveBatch for a caller that polls an empty completion queue. The caller then
// need not wait until the receive loop is scheduled. poll does nothing while the loop
// receives.
func (p *endpoint) poll() {
	if !p.recvMu.TryLock() {
		return
	}
	more := false
	if !p.shut {
		more, _ = p.receiveBatchLocked() // the loop gets the error, too
	}
	p.recvMu.Unlock()
	if more && p.dedicated {
		p.nudge() // perhaps no further packet comes that would wake the loop for the rest
	}
}

func (p *endpoint) receiveBatchLocked() (more bool, err error) {
	n, err := p.sock.receive()
	if n > 0 {
		p.collect(true)
		for i := range n {
			if a, ok := p.sock.arrived(i); ok {
				p.datagrams(&a)
			}
		}
		p.collect(false)
		for _, q := range p.events {
			q.mu.Lock()
			q.signal()
			q.mu.Unlock()
		}
		clear(p.events)
		p.events = p.events[:0]
	}
	kept := p.dirty[:0]
	for _, q := range p.dirty {
		if q.settle() {
			kept = append(kept, q)
		} else {
			q.dirty = false
		}
	}
	clear(p.dirty[len(kept):])
	p.dirty = kept
	// If there are fewer messages than there was room for, there were no more.
	return n == recvMessages || len(kept) > 0, err
}

// collect begins and ends the time in which events wait, so that the goroutine that they
// wake finds all completions of the batch. After collect(false), the caller may use
// events.
func (p *endpoint) collect(on bool) {
	p.eventsMu.Lock()
	p.collecting = on
	p.eventsMu.Unlock()
}

// postpone reports whether the event of a queue will be made later.
func (p *endpoint) postpone(q *completionQueue) bool {
	p.eventsMu.Lock()
	defer p.eventsMu.Unlock()
	if p.collecting {
		p.events = append(p.events, q)
	}
	return p.collecting
}

// broken reports to all connections of the endpoint why it can receive no more.
func (p *endpoint) broken(err error) {
	m := p.manager
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range m.ids {
		if m != p && (id.qp == nil || id.qp.endpoint != p) {
			continue
		}
		if id.qp != nil {
			_ = id.qp.Fail() // never fails
		}
		id.report(rdma.EventDeviceRemoved, err.Error())
	}
}

// datagrams splits a message into the datagrams that UDP_GRO joined.
func (p *endpoint) datagrams(a *arrival) {
	for i, data := 0, a.data; len(data) > 0; i++ {
		n := min(a.segment, len(data))
		packet := data[:n]
		data = data[n:]
		if p.tamper != nil {
			p.tampered(*a, packet, i)
			continue
		}
		p.packet(a, packet, i)
	}
}

// tampered calls packet through tamper. It gets copies, so that nothing escapes to the
// heap when there is no tamper.
func (p *endpoint) tampered(a arrival, packet []byte, i int) {
	p.tamper(packet, func(packet []byte) { p.packet(&a, packet, i) })
}

// maxID is the largest IPv4 identification of the packets that this package sends.
const maxID = batchPackets - 1

// packet handles one packet, the i-th of its group.
func (p *endpoint) packet(a *arrival, packet []byte, i int) {
	c := &p.provider.counters
	h, payload, ok := wire.Parse(packet)
	if !ok {
		c.malformed.Add(1)
		return
	}
	if h.DestQP == wire.CMQueuePair {
		if _, ok := wire.Check(wire.Base(a.src, a.dst, len(packet)), packet, len(packet)-wire.ICRCLen, p.sock.v4, uint8(i)); !ok {
			c.badICRC.Add(1)
			return
		}
		m, ok := wire.ParseMAD(&h, packet, payload)
		if !ok {
			c.malformed.Add(1)
			return
		}
		c.packetsReceived.Add(1)
		p.manager.manage(m, netip.AddrPortFrom(withScope(a.src.Addr(), a.scope), a.src.Port()), withScope(a.dst.Addr(), a.scope))
		return
	}
	owner := p.ownerOf(h.DestQP)
	q := owner.qp(h.DestQP)
	if q == nil {
		c.unknownQP.Add(1)
		return
	}
	port := q.peerPort.Load()
	if a.src.Addr() != q.there || a.dst.Addr() != q.here || a.scope != q.scope || port != 0 && port != uint32(a.src.Port()) {
		c.wrongAddress.Add(1)
		return
	}
	end := len(packet) - wire.ICRCLen
	if q.near.Load() {
		end = h.Op.HeaderLen()
	}
	var base uint32
	if owner == p {
		base = q.recvBases.get(a.src, a.dst, len(packet))
	} else {
		base = wire.Base(a.src, a.dst, len(packet))
	}
	id, ok := wire.Check(base, packet, end, p.sock.v4, uint8(i))
	if !ok || id > maxID && q.ours.Load() {
		c.badICRC.Add(1)
		return
	}
	c.packetsReceived.Add(1)
	q.receive(&h, packet, payload, a.congested)
	if owner != p {
		c.strays.Add(1)
		if q.settle() && q.settling.CompareAndSwap(false, true) {
			go q.settleAll() // the loop of its own endpoint does not know of it, and this loop has others to serve
		}
		return
	}
	if !q.dirty {
		q.dirty = true
		p.dirty = append(p.dirty, q)
	}
}

// qp returns the queue pair with a number, or nil.
func (p *endpoint) qp(qpn uint32) *queuePair {
	if q := p.qp0.Load(); q != nil && q.num == qpn {
		return q
	}
	p.qpsMu.RLock()
	defer p.qpsMu.RUnlock()
	return p.qps[qpn]
}

// outbox is the memory for one datagram of the connection manager, which is sent at once.
// The endpoint's lock guards it.
type outbox struct {
	sent   uint32 // number of datagrams, used as their sequence numbers
	packet [wire.MADPacketLen]byte
	iov    unix.Iovec
	msg    [1]message
	path   path // path of answers to strangers
}

// sendMAD sends one message of the connection manager.
func (p *endpoint) sendMAD(to *path, m *wire.MAD) {
	o := &p.outbox
	o.sent++
	b := o.packet[:]
	m.PutPacket(b, o.sent&0xffffff)
	base := wire.Base(to.local, to.remote, len(b))
	wire.PutICRC(b[len(b)-wire.ICRCLen:], wire.Update(wire.Header(base, b[:wire.BTHLen]), b[wire.BTHLen:len(b)-wire.ICRCLen]))
	o.iov.Base = &b[0]
	o.iov.SetLen(len(b))
	h := &o.msg[0].hdr
	h.Name, h.Namelen = to.namePtr(), to.nameLen
	h.Iov = &o.iov
	h.SetIovlen(1)
	h.Control = &to.control[0]
	h.SetControllen(to.controlLen)
	// A lost message is repeated. The message fits in any MTU.
	_ = to.sock.send(o.msg[:])
}

// close closes listeners, connections and the socket, and ends the receive loop.
func (p *endpoint) close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true // no new IDs or listeners from now on
	ids, listeners := slices.Collect(maps.Values(p.ids)), slices.Collect(maps.Values(p.listeners))
	p.mu.Unlock()
	var errs []error
	for _, l := range listeners {
		errs = append(errs, l.Close())
	}
	for _, id := range ids {
		errs = append(errs, id.Close())
	}
	p.mu.Lock()
	for _, f := range p.farewells {
		f.timer.Stop()
	}
	clear(p.farewells)
	if p.handshakes.timer != nil {
		p.handshakes.timer.Stop()
	}
	if p.strangers.prover != nil {
		errs = append(errs, p.strangers.prover.close())
		p.strangers.prover = nil
	}
	p.mu.Unlock()
	p.recvMu.Lock()
	p.shut = true
	p.recvMu.Unlock()
	p.nudge()
	if p.file != nil {
		errs = append(errs, p.file.Close())
	}
	<-p.done
	return errors.Join(append(errs, p.release())...)
}
