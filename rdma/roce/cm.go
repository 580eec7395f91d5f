package roce

import (
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// This file has the receiving side of the connection manager. It runs on the receive
// loop.

// manage handles a message of the connection manager.
func (p *endpoint) manage(m *wire.MAD, src netip.AddrPort, dst netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	// Messages other than REQ name the communication id of their receiver, or at
	// least their own. They must come from the address of that ID's peer.
	var id *connID
	switch m.Attribute() {
	case wire.REQ:
		p.onRequest(m, src, dst)
		return
	case wire.REJ:
		if id = p.ids[m.Remote()]; m.Remote() == 0 {
			id = p.byPeer[peerID{src.Addr(), m.Local()}]
		}
	case wire.DREP:
		if f := p.farewells[m.Remote()]; f == nil {
			p.onChallengeMet(m, src.Addr())
		} else if f.mad.TID() == m.TID() && f.id.isPeer(src, dst) {
			p.farewellDone(f, "disconnected")
		}
		return
	default:
		id = p.ids[m.Remote()]
	}
	if id != nil && !id.isPeer(src, dst) {
		p.provider.counters.wrongAddress.Add(1)
		return
	}
	if id != nil && m.Attribute() != wire.DREQ && m.TID() != id.tid {
		// All other messages carry the transaction id of the REQ, which a
		// stranger does not know.
		p.provider.counters.staleMessages.Add(1)
		return
	}
	switch m.Attribute() {
	case wire.REP:
		p.onReply(id, m, src, dst)
	case wire.RTU:
		if id != nil && id.state == idAccepting && id.peerComm == m.Local() {
			p.establish(id)
		}
	case wire.REJ:
		p.onReject(id, m)
	case wire.DREQ:
		p.onDisconnect(id, m, src, dst)
	case wire.MRA:
		if id != nil && id.state == idConnecting {
			select {
			case id.patient <- struct{}{}:
			default:
			}
		}
	}
}

// isPeer reports whether a message came from the address of the ID's peer. A peer that
// uses this package sends from the port at which it receives, or from the well-known one.
func (id *connID) isPeer(src netip.AddrPort, dst netip.Addr) bool {
	remote := id.path.remote
	return src.Addr() == remote.Addr() && dst == id.path.local.Addr() &&
		(!ours(id.peerGUID) || src.Port() == remote.Port() || src.Port() == id.endpoint.provider.cfg.Port)
}

// refuseStranger sends a REJ for a message that belongs to no ID.
func (p *endpoint) refuseStranger(m *wire.MAD, src netip.AddrPort, dst netip.Addr, guid uint64, of uint8, reason uint16) {
	r := wire.Reject{Of: of, Reason: reason}
	a := wire.NewMAD(wire.REJ, m.TID(), 0, m.Local())
	if of != 0 {
		a = wire.NewMAD(wire.REJ, m.TID(), m.Remote(), m.Local())
	}
	r.Put(a)
	p.answer(src, dst, guid, a)
}

// answer sends a message to the source of another message. The path is in use until the
// next answer.
func (p *endpoint) answer(src netip.AddrPort, dst netip.Addr, guid uint64, m *wire.MAD) {
	p.outbox.path.set(p.sock, dst, p.back(src, guid), -1)
	p.sendMAD(&p.outbox.path, m)
}

// back returns the address and port to which to send an answer. Messages go to the
// well-known port, whatever port they came from. Peers that use this package are an
// exception: they send from the port at which they receive (Config.OnDemand). guid is the
// peer's GUID, or 0 if it is unknown.
func (p *endpoint) back(src netip.AddrPort, guid uint64) netip.AddrPort {
	if !ours(guid) {
		return netip.AddrPortFrom(src.Addr(), p.provider.cfg.Port)
	}
	return src
}

// ours reports whether a CA GUID has the mark of this package.
func ours(guid uint64) bool { return guid>>guidShift == guidMark }

// onRequest handles a REQ.
func (p *endpoint) onRequest(m *wire.MAD, src netip.AddrPort, dst netip.Addr) {
	c := &p.provider.counters
	c.requests.Add(1)
	if id := p.byPeer[peerID{src.Addr(), m.Local()}]; id != nil {
		if id.halfOpen() {
			id.owed++
		}
		switch id.state {
		case idRequested:
			id.send(wire.NewMRA(m.TID(), id.comm, id.peerComm))
		case idAccepting, idEstablished:
			id.send(id.last)
		}
		return
	}
	r, ok := wire.ParseRequest(m)
	if ok && (r.Source != src.Addr().WithZone("") || r.Destination != dst.WithZone("")) {
		c.wrongAddress.Add(1)
		return
	}
	l := p.listeners[r.Port]
	if !ok || l != nil && !l.bound.IsUnspecified() && l.bound != dst {
		l = nil
	}
	o := p.strangers.originOf(src.Addr(), r.Proof)
	if !p.admit(o) || l != nil && (!p.makeRoom(o) || len(l.requests) >= l.backlog) {
		c.requestsDropped.Add(1) // the sender repeats its request
		if l != nil {
			p.challenge(o, src, dst, r.GUID)
		}
		return
	}
	switch {
	case !ok:
		p.refuseStranger(m, src, dst, 0, 0, rejectUnsupported)
		return
	case l == nil:
		p.refuseStranger(m, src, dst, r.GUID, 0, rdma.RejectInvalidServiceID)
		return
	}
	if old := p.byQP[peerQP{r.GUID, r.QPN}]; old != nil && old.path.remote.Addr() == src.Addr() {
		// The peer has lost that connection, or the request is forged.
		switch {
		case old.state == idEstablished:
			old.qp.probe()
		case old.halfOpen():
			p.abandon(old)
		}
		if old.state == idEnded {
			delete(p.byQP, peerQP{r.GUID, r.QPN})
		}
		p.refuseStranger(m, src, dst, r.GUID, 0, rdma.RejectStaleConnection)
		return
	}
	p.enqueue(l, r, m, src, dst, o.share())
}

// enqueue makes an ID for a request and passes it to the listener. share is the share of
// the sender.
func (p *endpoint) enqueue(l *listener, r wire.Request, m *wire.MAD, src netip.AddrPort, dst netip.Addr, share originKey) {
	id := p.newID(newPath(p.sock, dst, p.back(src, r.GUID), -1))
	id.passive, id.state, id.arrived, id.tid = true, idRequested, time.Now(), m.TID()
	id.local = netip.AddrPortFrom(named(dst), r.Port)
	id.remote = netip.AddrPortFrom(named(src.Addr()), r.SourcePort)
	id.peerComm, id.peerGUID, id.peerQPN = m.Local(), r.GUID, r.QPN
	id.request = r
	id.private = id.request.Private[:]
	p.byPeer[peerID{src.Addr(), m.Local()}] = id
	p.byQP[peerQP{r.GUID, r.QPN}] = id
	id.listener, id.owed = l, 1
	p.begin(id, share)
	l.requests = append(l.requests, id)
	l.signal()
}

// onReply handles a REP.
func (p *endpoint) onReply(id *connID, m *wire.MAD, src netip.AddrPort, dst netip.Addr) {
	switch {
	case id == nil || id.passive:
		if p.admit(p.strangers.find(src.Addr())) {
			p.refuseStranger(m, src, dst, 0, 1, rejectInvalidCommID)
		}
	case id.state == idConnecting:
		r := wire.ParseReply(m)
		id.peerComm, id.peerGUID, id.peerQPN = m.Local(), r.GUID, r.QPN
		id.state = idEstablished
		if ours(r.GUID) {
			id.path = id.qp.redirect(src.Port())
		}
		id.qp.peerIs(r.GUID)
		id.qp.ready(connected{
			dest: r.QPN, mtu: id.mtu, sendPSN: r.PSN, recvPSN: id.psn,
			retries: id.param.RetryCount, notReadyRetries: r.RNRRetryCount,
			readDepth:   int(min(id.param.InitiatorDepth, r.ResponderResources)),
			readsServed: int(id.param.ResponderResources),
		})
		id.last = wire.NewMAD(wire.RTU, m.TID(), id.comm, id.peerComm)
		p.sendMAD(id.path, id.last)
		id.confirm(0)
		id.respond(answer{private: r.Private[:]})
	case id.state == idEstablished && id.peerComm == m.Local():
		p.sendMAD(id.path, id.last)
	case id.state == idEnded:
		p.refuseStranger(m, src, dst, 0, 1, rejectTimeout)
	}
}

// establish completes the handshake of the passive side. The lock is held.
func (p *endpoint) establish(id *connID) {
	id.state = idEstablished
	p.strangers.find(id.path.remote.Addr()).proven = true
	p.settled(id)
	id.respond(answer{})
}

// onReject handles a REJ.
func (p *endpoint) onReject(id *connID, m *wire.MAD) {
	if id == nil || id.peerComm != 0 && m.Local() != 0 && id.peerComm != m.Local() {
		return
	}
	r := wire.ParseReject(m)
	switch id.state {
	case idConnecting:
		err := &rdma.RejectError{Peer: id.remote, Reason: int(r.Reason)}
		if r.Reason == rdma.RejectConsumer {
			err.Private = r.Private[:]
		}
		id.end()
		id.respond(answer{err: err})
	case idRequested, idAccepting:
		p.abandon(id)
	case idEstablished:
		// The peer does not know the connection: all copies of our RTU were lost,
		// or all of its REP.
		id.end()
		id.report(rdma.EventDisconnected, "rejected: "+rdma.RejectReason(int(r.Reason)))
	}
}

// onDisconnect handles a DREQ. It always answers, because the peer may not know that this
// side has received the DREQ before.
func (p *endpoint) onDisconnect(id *connID, m *wire.MAD, src netip.AddrPort, dst netip.Addr) {
	if id != nil && (id.peerComm != m.Local() || id.qp == nil || id.qp.num != m.QPN()) {
		return
	}
	guid := uint64(0)
	if id != nil {
		guid = id.peerGUID
	} else if !p.admit(p.strangers.find(src.Addr())) {
		return
	}
	p.answer(src, dst, guid, wire.NewMAD(wire.DREP, m.TID(), m.Remote(), m.Local()))
	if f := p.farewells[m.Remote()]; f != nil && f.id.isPeer(src, dst) && f.id.peerComm == m.Local() {
		p.farewellDone(f, "both sides disconnected")
	}
	if id == nil {
		if m.Remote() == 0 {
			p.onChallenge(uint32(m.TID()), src, dst)
		}
		return
	}
	switch id.state {
	case idAccepting:
		id.end()
		id.respond(answer{err: errGaveUp})
	case idEstablished, idLeaving:
		id.end()
		id.report(rdma.EventDisconnected, "disconnect request of the peer")
	}
}

// listen makes a listener on a canonical address. If the port is 0, listen picks a free
// one.
func (p *endpoint) listen(addr netip.AddrPort, bound netip.Addr, backlog int) (*listener, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, rdma.ErrClosed
	}
	number := addr.Port()
	for number == 0 {
		if n := ephemeral(); p.listeners[n] == nil {
			number = n
		}
	}
	if p.listeners[number] != nil {
		return nil, unix.EADDRINUSE
	}
	if err := p.openProver(); err != nil {
		return nil, err
	}
	l := &listener{
		endpoint: p, addr: netip.AddrPortFrom(addr.Addr(), number), bound: bound, backlog: backlog,
		ready: make(chan struct{}, 1), closed: make(chan struct{}),
	}
	p.listeners[number] = l
	return l, nil
}
