package roce

import (
	"slices"
	"time"

	"ublk-nvmeof/rdma/roce/wire"
)

// A connect request costs the passive side a queue pair and its memory, before anything
// proves that the request came from the address that it names. So the number of
// connections in this state is limited, and so is their time. The sources share these
// places (see makeRoom). Until a peer has proven that it receives our messages, it gets
// no more bytes than came from its address.

const (
	// halfOpenTime limits the time for which a connection is half-open. It is three
	// times as long as Linux waits before it repeats a request.
	halfOpenTime = 15 * time.Second
	// evictionAge is the age at which a half-open connection may make room for
	// another one of the same share. A peer that receives our answer confirms it long
	// before.
	evictionAge = time.Second
)

// handshakes are the half-open connections of an endpoint. The endpoint's lock guards
// them.
type handshakes struct {
	open    []*connID         // in the order of their requests
	byShare map[originKey]int // number of connections of each proven source, and of all strangers
	ending  int               // number of abandoned connections whose owner has not closed them yet
	timer   *time.Timer       // runs while open is not empty
}

// begin adds a half-open connection to a share.
func (p *endpoint) begin(id *connID, share originKey) {
	h := &p.handshakes
	id.share = share
	h.open = append(h.open, id)
	h.byShare[id.share]++
	switch {
	case h.timer == nil:
		h.timer = time.AfterFunc(halfOpenTime, p.expire)
	case len(h.open) == 1:
		h.timer.Reset(halfOpenTime)
	}
}

// settled removes a connection that is not half-open any more.
func (p *endpoint) settled(id *connID) {
	h := &p.handshakes
	i := slices.Index(h.open, id)
	if i < 0 {
		return
	}
	h.open = slices.Delete(h.open, i, i+1)
	if h.byShare[id.share]--; h.byShare[id.share] == 0 {
		delete(h.byShare, id.share)
	}
}

// makeRoom reports whether there is room for one more half-open connection of a source.
// It may end another one for this purpose. All strangers together may have half of the
// places, and each proven source MaxHalfOpenPerSource. A share that has reached its limit
// loses a connection, if one is old enough. If all places are taken, the largest share
// makes room at once for a proven source that has fewer connections. Of several largest
// shares, that of the strangers is chosen.
func (p *endpoint) makeRoom(o *origin) bool {
	h, cfg := &p.handshakes, &p.provider.cfg
	own, most := o.share(), cfg.MaxHalfOpenPerSource
	if !o.proven {
		most = max(1, cfg.MaxHalfOpen/2)
	}
	full := len(h.open) >= cfg.MaxHalfOpen
	switch {
	case h.ending >= cfg.MaxHalfOpen: // their memory is still in use
		return false
	case h.byShare[own] < most && !full:
		return true
	case h.byShare[own] >= most || !o.proven:
		return p.evict(own, evictionAge)
	}
	busiest, age := own, evictionAge
	for other, n := range h.byShare {
		if most := h.byShare[busiest]; n > h.byShare[own] && (n > most || n == most && other == strangersShare) {
			busiest, age = other, 0
		}
	}
	return p.evict(busiest, age)
}

// evict ends the oldest half-open connection of a share, if it has reached the age.
func (p *endpoint) evict(share originKey, age time.Duration) bool {
	h := &p.handshakes
	i := slices.IndexFunc(h.open, func(id *connID) bool { return id.state != idEnded && id.share == share })
	if i < 0 || time.Since(h.open[i].arrived) < age {
		return false
	}
	p.provider.counters.halfOpenEvicted.Add(1)
	p.abandon(h.open[i])
	return true
}

// expire ends half-open connections that have taken too long.
func (p *endpoint) expire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	h := &p.handshakes
	for _, id := range slices.Clone(h.open) {
		left := halfOpenTime - time.Since(id.arrived)
		if left > 0 {
			h.timer.Reset(left)
			return
		}
		if id.state != idEnded {
			p.provider.counters.halfOpenExpired.Add(1)
			p.abandon(id)
		}
	}
	if len(h.open) > 0 { // they have ended, but are not closed yet
		h.timer.Reset(halfOpenTime)
	}
}

// abandon ends a half-open connection. If Listener.Accept has returned it already, its
// owner must still close it.
func (p *endpoint) abandon(id *connID) {
	l := id.listener
	if i := slices.Index(l.requests, id); i >= 0 {
		l.requests = slices.Delete(l.requests, i, i+1)
		id.end()
		id.closed = true
		p.forget(id)
		return
	}
	id.end()
	p.settled(id)
	id.ending = true
	p.handshakes.ending++
	id.respond(answer{err: errGaveUp})
}

// forget removes a closed ID from all tables.
func (p *endpoint) forget(id *connID) {
	delete(p.ids, id.comm)
	if id.passive {
		p.settled(id)
		if id.ending {
			p.handshakes.ending--
		}
		if key := (peerID{id.path.remote.Addr(), id.peerComm}); p.byPeer[key] == id {
			delete(p.byPeer, key)
		}
	}
	if key := (peerQP{id.peerGUID, id.peerQPN}); p.byQP[key] == id {
		delete(p.byQP, key)
	}
}

// halfOpen reports whether the peer has not yet proven that it receives our messages.
func (id *connID) halfOpen() bool {
	return id.passive && (id.state == idRequested || id.state == idAccepting)
}

// send sends a message of a handshake. While the connection is half-open, the peer gets
// only as many messages as came from it, because its address may be forged.
func (id *connID) send(m *wire.MAD) {
	if id.halfOpen() {
		if id.owed == 0 {
			id.endpoint.provider.counters.answersWithheld.Add(1)
			return
		}
		id.owed--
	}
	id.endpoint.sendMAD(id.path, m)
}

// confirmations is the number of times that an RTU is repeated. The passive side does not
// repeat its REP to request an RTU, and may get no other packet.
const confirmations = 3

// confirm repeats the RTU until a packet has arrived from the peer. The lock is held.
func (id *connID) confirm(tries int) {
	id.confirmation = time.AfterFunc(resendTime(tries), func() {
		p := id.endpoint
		p.mu.Lock()
		defer p.mu.Unlock()
		if id.closed || id.state != idEstablished || id.qp.heardOfPeer() {
			return
		}
		p.sendMAD(id.path, id.last)
		if tries+1 < confirmations {
			id.confirm(tries + 1)
		}
	})
}
