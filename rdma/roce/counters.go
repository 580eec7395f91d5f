package roce

import "sync/atomic"

// Counters holds counts since the provider was made.
type Counters struct {
	PacketsReceived uint64 // packets with a valid ICRC
	PacketsSent     uint64 // packets that connections sent
	Malformed       uint64 // packets dropped because they are not RoCEv2
	BadICRC         uint64 // packets dropped because their ICRC is wrong
	UnknownQP       uint64 // packets dropped because no such queue pair exists
	WrongAddress    uint64 // packets dropped because they are not from or to the queue pair's addresses, or not from its peer's port
	Duplicates      uint64 // requests with a sequence number that had been received before
	StaleReads      uint64 // of Duplicates, READs dropped because they are not one of the last, or because their key is gone
	Unsolicited     uint64 // dropped answers to requests that were answered before, or never sent
	OutOfSequence   uint64 // requests and responses after a gap
	Retransmits     uint64 // packets sent again
	Timeouts        uint64 // retry timer intervals without progress
	Probes          uint64 // last packets sent again to request an acknowledgement
	NAKsSent        uint64 // NAKs for sequence errors
	NAKsReceived    uint64
	FatalNAKsSent   uint64 // refusals of a request because of rights, lengths or the sequence of opcodes
	FatalNAKs       uint64 // such refusals received
	RNRNAKsSent     uint64 // NAKs because no receive was posted
	RNRNAKs         uint64 // such NAKs received
	Strays          uint64 // packets that arrived at another receive loop than that of their queue pair
	Marks           uint64 // packets that a router marked because of congestion
	Notes           uint64 // congestion notifications received
	Requests        uint64 // connect requests received, including duplicates
	RequestsDropped uint64 // of Requests, those over the rate limit or without room
	HalfOpenEvicted uint64 // handshakes ended to make room for others
	HalfOpenExpired uint64 // handshakes ended because they took too long
	ChallengesSent  uint64 // challenges to strangers whose requests were dropped
	AddressesProven uint64 // addresses proven by answers to challenges
	AnswersWithheld uint64 // messages not sent to peers that had not proven their address
	StaleMessages   uint64 // dropped messages of the connection manager that belong to no current handshake
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
