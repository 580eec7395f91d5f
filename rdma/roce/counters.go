package roce

import "sync/atomic"

// Counters count since the provider was made.
type Counters struct {
	PacketsReceived uint64 // with a valid ICRC
	PacketsSent     uint64 // of connections
	Malformed       uint64 // dropped: no RoCEv2 packet
	BadICRC         uint64 // dropped
	UnknownQP       uint64 // dropped: no such queue pair
	WrongAddress    uint64 // dropped: not from or to the queue pair's addresses, or not from its peer's port
	Duplicates      uint64 // requests that had been seen
	StaleReads      uint64 // of those, dropped: a READ that is none of the last ones, or whose key has gone
	Unsolicited     uint64 // dropped: answers to what was answered before, or never asked
	OutOfSequence   uint64 // requests and responses after a gap
	Retransmits     uint64 // packets sent again
	Timeouts        uint64 // rounds of the retry timer without progress
	Probes          uint64 // last packets sent again to ask for an acknowledgement
	NAKsSent        uint64 // sequence errors
	NAKsReceived    uint64
	FatalNAKsSent   uint64 // a request was refused: rights, lengths, sequence of opcodes
	FatalNAKs       uint64 // the same, received
	RNRNAKsSent     uint64 // no receive was posted
	RNRNAKs         uint64 // the same, received
	Strays          uint64 // packets that came to another receive loop than their queue pair's
	Marks           uint64 // packets that met congestion
	Notes           uint64 // congestion notifications received
	Requests        uint64 // connect requests received, duplicates included
	RequestsDropped uint64 // of those, over the rate or without room
	HalfOpenEvicted uint64 // handshakes that ended to make room for others
	HalfOpenExpired uint64 // handshakes that took too long
	ChallengesSent  uint64 // to strangers whose requests were dropped
	AddressesProven uint64 // by answers to challenges
	AnswersWithheld uint64 // messages not sent to peers that had not proven their address
	StaleMessages   uint64 // dropped: messages of the connection manager that belong to no handshake under way
}

type counters struct {
	packetsReceived, packetsSent, malformed, badICRC, unknownQP, wrongAddress,
	duplicates, staleReads, unsolicited, outOfSequence, retransmits, timeouts, probes,
	naksSent, naksReceived, fatalNAKsSent, fatalNAKs, rnrNAKsSent, rnrNAKs,
	strays, marks, notes, requests, requestsDropped, halfOpenEvicted, halfOpenExpired, challengesSent, addressesProven, answersWithheld, staleMessages atomic.Uint64
}

// Snapshot reads the counters. It may be called from any goroutine.
func (p *Provider) Snapshot() Counters {
	c := &p.counters
	return Counters{
		PacketsReceived: c.packetsReceived.Load(), PacketsSent: c.packetsSent.Load(),
		Malformed: c.malformed.Load(), BadICRC: c.badICRC.Load(),
		UnknownQP: c.unknownQP.Load(), WrongAddress: c.wrongAddress.Load(),
		Duplicates: c.duplicates.Load(), StaleReads: c.staleReads.Load(), Unsolicited: c.unsolicited.Load(),
		OutOfSequence: c.outOfSequence.Load(),
		Retransmits:   c.retransmits.Load(), Timeouts: c.timeouts.Load(), Probes: c.probes.Load(),
		NAKsSent: c.naksSent.Load(), NAKsReceived: c.naksReceived.Load(),
		FatalNAKsSent: c.fatalNAKsSent.Load(), FatalNAKs: c.fatalNAKs.Load(),
		RNRNAKsSent: c.rnrNAKsSent.Load(), RNRNAKs: c.rnrNAKs.Load(),
		Strays: c.strays.Load(), Marks: c.marks.Load(), Notes: c.notes.Load(),
		Requests: c.requests.Load(), RequestsDropped: c.requestsDropped.Load(),
		HalfOpenEvicted: c.halfOpenEvicted.Load(), HalfOpenExpired: c.halfOpenExpired.Load(),
		ChallengesSent: c.challengesSent.Load(), AddressesProven: c.addressesProven.Load(), AnswersWithheld: c.answersWithheld.Load(),
		StaleMessages: c.staleMessages.Load(),
	}
}
