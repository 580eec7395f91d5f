package roce

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"hash/maphash"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma/roce/wire"
)

// Anyone can send messages of the connection manager, from any address. So the rate of
// answers is limited, and a source that has proven that it receives our messages is
// distinguished from a stranger, whose address may be forged. A flood can use up the
// share of the strangers, but not that of the proven sources.
//
// A stranger whose request finds no room is challenged, and nothing of the request is
// kept. The challenge is a DREQ for a connection that does not exist. Every connection
// manager answers it with a DREP with the same transaction id (Linux:
// drivers/infiniband/core/cm.c, cm_issue_drep). This id is a keyed hash of the address,
// so only a receiver of the challenge knows it. When the stranger repeats its request, it
// is a proven source.
//
// No more can be known of a host with another implementation: an attacker who forges the
// address of a proven source can use up the share of that source. A host of this package
// also puts the lower half of the challenge's transaction id into its request, so the
// request itself is confirmed. Confirmed requests are counted separately from the other
// requests of their source.

const (
	// burst is the number of seconds whose messages may come at once.
	burst = 4
	// sourceWays is the number of sources in a set of the table of sources.
	sourceWays = 4
	// sourceSets is the number of sets. With 72 bytes for each source, the table
	// takes 288 KiB. A dedicated endpoint has only one peer.
	sourceSets, dedicatedSets = 1024, 1
	// challengeTime is the least time for which the answer to a challenge is valid.
	// The longest is twice as long.
	challengeTime = 30 * time.Second
	// challengeRate is the number of challenges that are sent for each request that
	// may be accepted. A challenge costs little more than dropping a request.
	challengeRate = 16
)

// source returns the key of the limits per source. It is the address itself for IPv4 and
// link-local addresses, and otherwise the IPv6 network, because a host has all addresses
// of its network.
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
	refilled time.Time // time of the value of tokens; zero: the bucket is full
}

// take takes a token if at least one is left above the given fraction of the bucket's
// capacity.
func (b *bucket) take(now time.Time, rate int, above float64) bool {
	most := float64(rate) * burst
	if b.refilled.IsZero() {
		b.tokens = most
	} else {
		b.tokens = min(most, b.tokens+now.Sub(b.refilled).Seconds()*float64(rate))
	}
	b.refilled = now
	if b.tokens < most*above+1 {
		return false
	}
	b.tokens--
	return true
}

// originKey identifies a source.
type originKey struct {
	addr      netip.Addr // a result of source
	confirmed bool       // its requests prove that they come from this address
}

// origin holds the state of a source. Its confirmed requests count as a source of their
// own.
type origin struct {
	key    originKey
	proven bool // it receives what is sent to its address, or this side connects to it
	bucket bucket
}

// share returns the share to which the half-open connections of the source belong: a
// share of its own, or that of all strangers.
func (o *origin) share() originKey {
	if o.proven {
		return o.key
	}
	return strangersShare
}

// strangersShare is the share of all strangers.
var strangersShare originKey

// strangers holds the state of an endpoint for messages that belong to no connection. Its
// memory does not grow. The endpoint's lock guards it.
type strangers struct {
	seed       maphash.Seed
	origins    [][sourceWays]origin // by the hash of their addresses
	all        bucket               // limits the messages that are answered
	challenges bucket
	secret     [sha256.Size]byte
	prover     *socket // sends challenges; nil before there is a listener
}

func newStrangers(dedicated bool) strangers {
	sets := sourceSets
	if dedicated {
		sets = dedicatedSets
	}
	s := strangers{seed: maphash.MakeSeed(), origins: make([][sourceWays]origin, sets)}
	_, _ = rand.Read(s.secret[:]) // never fails
	return s
}

// find returns the source of an address.
func (s *strangers) find(a netip.Addr) *origin { return s.lookup(originKey{addr: source(a)}) }

// lookup returns a source. A new source replaces the stranger that has been silent for
// the longest time, or the proven source if there is no stranger. The result is valid
// until the next call.
func (s *strangers) lookup(key originKey) *origin {
	b := key.addr.As16()
	set := &s.origins[maphash.Bytes(s.seed, b[:])%uint64(len(s.origins))]
	worst := &set[0]
	for i := range set {
		o := &set[i]
		switch {
		case o.key == key:
			return o
		case o.proven != worst.proven:
			if worst.proven {
				worst = o
			}
		case o.bucket.refilled.Before(worst.bucket.refilled):
			worst = o
		}
	}
	*worst = origin{key: key, proven: key.confirmed}
	return worst
}

// originOf returns the source of a request with a proof; 0 means no proof.
func (s *strangers) originOf(a netip.Addr, proof uint32) *origin {
	key, now := originKey{addr: source(a)}, time.Now()
	key.confirmed = proof != 0 && (proof == uint32(s.proof(key.addr, now)) || proof == uint32(s.proof(key.addr, now.Add(-challengeTime))))
	return s.lookup(key)
}

// admit reports whether one more message of a source may be handled. A proven source that
// has sent few messages may use all tokens. Other sources may use only the upper half of
// them.
func (p *endpoint) admit(o *origin) bool {
	s, cfg, now := &p.strangers, &p.provider.cfg, time.Now()
	if !o.bucket.take(now, cfg.MaxRequestRatePerSource, 0) {
		return false
	}
	above := 0.5
	if o.proven && o.bucket.tokens >= float64(cfg.MaxRequestRatePerSource)*burst/2 {
		above = 0
	}
	return s.all.take(now, cfg.MaxRequestRate, above)
}

// openProver opens the socket that sends challenges. Challenges need their own socket,
// because most of them may go to addresses that do not exist. While the kernel looks for
// those, the packets fill the socket's buffer.
func (p *endpoint) openProver() error {
	if p.strangers.prover != nil {
		return nil
	}
	local := p.sock.local.Addr()
	s := &socket{v4: local.Is4()}
	err := s.bind(netip.AddrPortFrom(local, 0), socketConfig{plain: true, hasty: true, ecn: p.provider.cfg.ecn, buffer: p.provider.cfg.buffer})
	if err != nil {
		return err
	}
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 0) // the socket is never read; the kernel has a minimum
	p.strangers.prover = s
	return nil
}

// challenge requests a proof that a source receives what is sent to its address, unless a
// proof would not help it. guid is the GUID in its request.
func (p *endpoint) challenge(o *origin, src netip.AddrPort, dst netip.Addr, guid uint64) {
	s, now := &p.strangers, time.Now()
	if o.key.confirmed || o.proven && !ours(guid) || !s.challenges.take(now, challengeRate*p.provider.cfg.MaxRequestRate, 0) {
		return
	}
	p.provider.counters.challengesSent.Add(1)
	tid := s.proof(o.key.addr, now)
	p.outbox.path.set(s.prover, dst, p.back(src, guid), -1)
	p.sendMAD(&p.outbox.path, wire.NewMAD(wire.DREQ, tid, uint32(tid), 0))
}

// onChallenge puts the requested proof into the requests to a peer. At the first
// challenge of a request, it also repeats the request at once.
func (p *endpoint) onChallenge(proof uint32, src netip.AddrPort, dst netip.Addr) {
	for _, id := range p.ids {
		if id.state != idConnecting || !id.isPeer(src, dst) {
			continue
		}
		first := id.asking.Proof() == 0
		id.asking.SetProof(proof)
		if first {
			p.sendMAD(id.path, id.asking)
		}
	}
}

// proof returns the transaction id of a challenge to a source at a time.
func (s *strangers) proof(src netip.Addr, at time.Time) uint64 {
	var b [sha256.Size + 16 + 4 + 8]byte
	copy(b[:], s.secret[:])
	a := src.As16()
	copy(b[sha256.Size:], a[:])
	binary.BigEndian.PutUint32(b[sha256.Size+16:], scopeOf(src))
	binary.BigEndian.PutUint64(b[sha256.Size+20:], uint64(at.UnixNano()/int64(challengeTime)))
	sum := sha256.Sum256(b[:])
	return binary.BigEndian.Uint64(sum[:])
}

// onChallengeMet handles a DREP that may be the answer to a challenge.
func (p *endpoint) onChallengeMet(m *wire.MAD, from netip.Addr) {
	s, src, now := &p.strangers, source(from), time.Now()
	if s.prover == nil || m.TID() != s.proof(src, now) && m.TID() != s.proof(src, now.Add(-challengeTime)) {
		p.provider.counters.staleMessages.Add(1)
		return
	}
	if o := s.find(from); !o.proven {
		o.proven = true
		p.provider.counters.addressesProven.Add(1)
	}
}
