package roce

import (
	"net/netip"
	"slices"
	"time"

	"ublk-nvmeof/rdma/roce/wire"
)

// A connect request costs the passive side a queue pair and its memory before anything shows
// that the request came from the address that it names. So there are few connections in this
// state, few for each source, and each for a short time; requests are taken at a limited rate;
// and until a peer has proven that it receives our messages, it gets no more bytes than came
// from its address.

const (
	// halfOpenTime is how long a connection may be half-open: three times what Linux waits
	// before it repeats a request.
	halfOpenTime = 15 * time.Second
	// evictionAge is how old a half-open connection must be to make room for another. If none
	// is, the new request is dropped, and its sender repeats it.
	evictionAge = 200 * time.Millisecond
	// burst is how many seconds' worth of requests may come at once.
	burst = 4
	// maxSources bounds the sources whose rates are kept.
	maxSources = 4096
)

// source is the key of the limits per source: an address of IPv4 or a link-local one, otherwise
// a network of IPv6, because a host has all the addresses of its own.
func source(a netip.Addr) netip.Addr {
	if a.Is4() || a.IsLinkLocalUnicast() {
		return a
	}
	net, _ := a.Prefix(64) // fits IPv6
	return net.Addr()
}

// bucket is a token bucket.
type bucket struct {
	tokens   float64
	refilled time.Time // when tokens was right; zero: it is full
}

func (b *bucket) take(now time.Time, rate int) bool {
	most := float64(rate) * burst
	if b.refilled.IsZero() {
		b.tokens = most
	} else {
		b.tokens = min(most, b.tokens+now.Sub(b.refilled).Seconds()*float64(rate))
	}
	b.refilled = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// handshakes are the half-open connections of an endpoint, and how many may come. It is
// guarded by the endpoint's lock.
type handshakes struct {
	open     []*connID // in the order of their requests, until they are established or closed
	bySource map[netip.Addr]int
	all      bucket
	rates    map[netip.Addr]*bucket
	timer    *time.Timer // runs while there are any
}

// admit reports whether one more message of a stranger may be looked at.
func (p *endpoint) admit(from netip.Addr) bool {
	h, cfg, now := &p.handshakes, &p.provider.cfg, time.Now()
	src := source(from)
	b := h.rates[src]
	if b == nil {
		if len(h.rates) >= maxSources {
			clear(h.rates) // which allows each of them another burst
		}
		b = new(bucket)
		h.rates[src] = b
	}
	return b.take(now, cfg.MaxRequestRatePerSource) && h.all.take(now, cfg.MaxRequestRate)
}

// begin adds a half-open connection.
func (p *endpoint) begin(id *connID) {
	h := &p.handshakes
	h.open = append(h.open, id)
	h.bySource[source(id.path.remote.Addr())]++
	switch {
	case h.timer == nil:
		h.timer = time.AfterFunc(halfOpenTime, p.expire)
	case len(h.open) == 1:
		h.timer.Reset(halfOpenTime)
	}
}

// settled takes out a connection that is not half-open any more.
func (p *endpoint) settled(id *connID) {
	h := &p.handshakes
	i := slices.Index(h.open, id)
	if i < 0 {
		return
	}
	h.open = slices.Delete(h.open, i, i+1)
	src := source(id.path.remote.Addr())
	if h.bySource[src]--; h.bySource[src] == 0 {
		delete(h.bySource, src)
	}
}

// makeRoom reports whether there is room for one more half-open connection. If there is not, it
// ends the oldest one of the same source, if that has too many, or of the source that has most.
func (p *endpoint) makeRoom(from netip.Addr) bool {
	h, cfg := &p.handshakes, &p.provider.cfg
	own := source(from)
	room := func() bool {
		return h.bySource[own] < cfg.MaxHalfOpenPerSource && len(h.open) < cfg.MaxHalfOpen
	}
	if room() {
		return true
	}
	busiest := own
	if h.bySource[own] < cfg.MaxHalfOpenPerSource {
		for other, n := range h.bySource {
			if n > h.bySource[busiest] {
				busiest = other
			}
		}
	}
	i := slices.IndexFunc(h.open, func(id *connID) bool {
		return id.state != idEnded && source(id.path.remote.Addr()) == busiest
	})
	if i >= 0 && time.Since(h.open[i].arrived) >= evictionAge {
		p.provider.counters.halfOpenEvicted.Add(1)
		p.abandon(h.open[i])
	}
	return room()
}

// expire ends half-open connections that took too long.
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
	if len(h.open) > 0 { // ended, but not closed yet
		h.timer.Reset(halfOpenTime)
	}
}

// abandon ends a half-open connection. If Listener.Accept has returned it already, its owner
// must still close it.
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
	id.respond(answer{err: errGaveUp})
}

// forget takes an ID that is closed out of all tables.
func (p *endpoint) forget(id *connID) {
	delete(p.ids, id.comm)
	if id.passive {
		p.settled(id)
		if key := (peerID{id.path.remote.Addr(), id.peerComm}); p.byPeer[key] == id {
			delete(p.byPeer, key)
		}
	}
	if key := (peerQP{id.peerGUID, id.peerQPN}); p.byQP[key] == id {
		delete(p.byQP, key)
	}
}

// halfOpen reports whether the peer has not proven yet that it receives our messages.
func (id *connID) halfOpen() bool {
	return id.passive && (id.state == idRequested || id.state == idAccepting)
}

// send sends a message of a handshake. While the connection is half-open, the peer gets as many
// as came from it, because its address may be forged.
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

// confirmations is how often an RTU is repeated. The passive side does not repeat its REP to ask
// for one, and may get no other packet.
const confirmations = 3

// confirm repeats the RTU until a packet has come from the peer. The lock is held.
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
