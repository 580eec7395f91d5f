// Package roce is an rdma.Provider without RDMA hardware and without kernel
// modules: RoCEv2 reliable connections over ordinary UDP sockets. It talks to RDMA
// NICs, to rdma_rxe of the kernel, and to itself.
//
// # Structure
//
// A Provider has an endpoint for each local address, or one for all addresses of a
// family. An endpoint has a socket, a receive loop (a goroutine), the connection
// manager and the queue pairs. With several receivers, more endpoints without a
// connection manager share the UDP port, and the kernel gives each the packets of its
// own queue pairs. The receive loop takes a batch of packets, lets each queue pair
// carry out what came for it, and then lets those queue pairs send acknowledgements,
// READ responses and what their window allows, once per batch. A caller that polls an
// empty completion queue takes a batch itself, so spinning does not depend on the
// scheduler. PostSend sends at once, on the caller's goroutine. Package wire has the
// formats.
//
// Between two ends on one host, each queue pair has a dedicated endpoint at both ends.
// Its packets concern nobody else, so the thread that serves the queue pair can take
// them itself (rdma.Receiver) without waiting for the scheduler. The ends recognize
// each other by the mark in their GUIDs, and answer to the UDP port that a message
// came from. What never leaves the host's memory needs no checksum: the ICRC covers
// only headers there. Nor do the MTUs of the standard apply: if the route takes it,
// packets carry up to wire.HostMTU, which saves work for large transfers. No more is
// under way than the receive buffer of such an endpoint has room for, which without
// CAP_NET_ADMIN is net.core.rmem_max.
//
// # Cost
//
// The work of the kernel for each UDP message limits small transfers. So packets of the
// same length are sent as one UDP_SEGMENT message. Post all WRITEs of a batch first and
// then all SENDs, with one PostSend. Work requests that are not signaled do not ask the
// peer for an acknowledgement.
//
// The posting and polling calls allocate nothing, but they do lock: each queue pair,
// completion queue, protection domain and endpoint has a mutex. A 4 KiB read takes
// about 33 locks at queue depth 1 and about 12 at queue depth 32, counted at both ends
// together. With one thread per queue pair hardly any of them waits: fewer than one in
// ten thousand did in that measurement, on two CPUs.
//
// # Security
//
// RoCE authenticates nothing. Whoever can see the packets of a connection can forge
// them: use IPsec, or a network that strangers have no access to.
//
// A sender that cannot see the packets has to guess. A queue pair takes packets only
// from its peer's address to its own address, so the sender has to forge the source
// address, which its network may prevent (BCP 38); the peer's own host does not prevent it
// for local users, unless the peer is of this package, whose packets also have to come
// from its UDP port. What is left to guess is random (crypto/rand), but short:
//
//   - The queue pair number: 24 bits, without the first 16 numbers.
//   - The sequence number of the next request: 24 bits at first. It counts packets, so it
//     stays unknown to those who cannot count them. A request with both right is carried
//     out: a SEND fills a receive, an RDMA READ or WRITE needs a key of 32 bits besides,
//     and a request that is wrong in any other way ends the connection.
//   - The sequence number of what is under way, for answers: 24 bits, of which up to 128,
//     or up to 1024 during an RDMA READ, are right at a time, and none when nothing is under
//     way. A forged refusal ends the connection; a forged acknowledgement makes it lose
//     packets, and then end; a forged READ response with the one right number
//     puts wrong bytes where the READ's should go.
//
// So one forged packet in 2^48 does harm in general, and one in 2^38 while RDMA READs are
// outstanding. Anything else is dropped and counted (Counters). With the queue pair
// number alone, a sender can slow the connection down: sequence errors and congestion
// notifications make it send again, or less at a time.
//
// Messages of the connection manager need the communication id (32 bits), and those of
// a handshake its transaction id (64 bits; both random at the active side), or, to end
// a connection, both communication ids and the queue pair number. A connect request that
// names a queue pair which has a connection does not end that connection; the peer is
// asked whether it still has it.
//
// A connect request costs the passive side memory before its sender has proven anything.
// Config bounds how many handshakes may be unfinished, in all and per source, and how
// many requests are taken per second. Until a peer has proven that it receives what
// is sent to its address, by an RTU or by a request with the right sequence number, it gets
// one message for each that came from there. A flood of requests from forged addresses
// keeps new connections out some of the time; it does not touch established ones.
//
// Keys are random, valid in one protection domain, and end with the region. A protection
// domain's keys may be used through each of its queue pairs: give peers that do not trust
// each other domains of their own.
//
// # Hazards
//
//  1. The ICRC covers addresses and ports, so there is no way through a NAT. It
//     also covers the IPv4 identification, which a UDP socket does not show;
//     it is recovered from the ICRC itself, which leaves 16 of the 32 bits as
//     a check (26 between two of our own). IPv6 keeps all 32.
//  2. In one network namespace with rdma_rxe the UDP port is taken. A host without
//     the port (Config.OnDemand) can only talk to a target of this package,
//     which recognizes the GUID in its messages and answers to the port that they
//     came from.
//  3. A path that takes smaller packets than its MTU promised fails the
//     connection (RDMA has no fragmentation).
//  4. Addresses of IPv6 that are link-local need a zone, the interface.
package roce
