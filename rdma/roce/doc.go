// Package roce is an rdma.Provider that needs neither RDMA hardware nor kernel modules. It
// implements reliable connections of RoCEv2 over ordinary UDP sockets. Its peers are RDMA
// NICs, the kernel's rdma_rxe, and this package.
//
// # Structure
//
// A Provider has an endpoint for each local address, or one for all addresses of a
// family. An endpoint has a socket, a receive loop (a goroutine), the connection
// manager and the queue pairs. With several receivers, more endpoints without a
// connection manager share the UDP port, and the kernel gives each the packets of its
// own queue pairs. The receive loop takes a batch of packets and gives each packet to its
// queue pair, which carries it out. Once per batch, these queue pairs then send
// acknowledgements, READ responses and the requests that their window allows. A caller that
// polls an empty completion queue takes a batch itself, so spinning does not depend on the
// scheduler. PostSend sends at once, on the caller's goroutine. Package wire defines the
// packet formats.
//
// If both ends are on one host, each queue pair has a dedicated endpoint at both ends.
// Only this queue pair gets packets there, so the thread that serves it can take them
// itself (rdma.Receiver) without waiting for the scheduler. The ends recognize each other
// by a mark in their GUIDs, and answer to the UDP port from which a message came. Data that
// never leaves the host's memory needs no checksum, so the ICRC covers only headers. The
// MTUs of the standard do not apply either: if the route allows it, packets carry up to
// wire.HostMTU bytes, which saves work for large transfers. The data in flight is limited
// to the receive buffer of such an endpoint, which without CAP_NET_ADMIN is limited to
// net.core.rmem_max.
//
// # Cost
//
// The kernel's work for each UDP message limits small transfers. So the package sends
// packets of the same length as one UDP_SEGMENT message. To benefit, post first all WRITEs
// and then all SENDs of a batch, with one PostSend. Work requests that are not signaled do
// not ask the peer for an acknowledgement.
//
// The posting and polling calls allocate nothing, but they take locks: each queue pair,
// completion queue, protection domain and endpoint has a mutex. A 4 KiB read takes
// about 33 locks at queue depth 1 and about 12 at queue depth 32, counted at both ends
// together. With one thread per queue pair, hardly any lock is contended: in that
// measurement, on two CPUs, fewer than one in ten thousand was.
//
// # Security
//
// RoCE authenticates nothing. Anyone who can see the packets of a connection can forge
// them. Use IPsec, or a network to which strangers have no access.
//
// An attacker who cannot see the packets must guess. A queue pair takes packets only from
// its peer's address to its own address, so the attacker must forge the source address,
// which the network may prevent (BCP 38). Local users of the peer's host need not forge
// it, unless the peer uses this package: then packets must also come from the peer's UDP
// port. The other values to guess are random (crypto/rand), but short:
//
//   - The queue pair number: 24 bits, without the first 16 numbers.
//   - The sequence number of the next request: 24 bits, random at first. It counts packets,
//     so it stays unknown to an attacker who cannot count them. A request with the right
//     queue pair number and sequence number is carried out. A SEND fills a receive. An RDMA
//     READ or WRITE also needs a key of 32 bits. A request that is wrong in any other way
//     ends the connection.
//   - For answers, the sequence number of an outstanding request: 24 bits, of which up to
//     128 values, or up to 1024 during an RDMA READ, are valid at a time, and none while
//     nothing is outstanding. A forged refusal ends the connection. A forged acknowledgement
//     makes the connection lose packets, and then end. A forged READ response, for which
//     exactly one number is valid, puts wrong bytes into the destination of the READ.
//
// So one forged packet in 2^48 does harm in general, and one in 2^38 while RDMA READs are
// outstanding. All others are dropped and counted (Counters). With the queue pair number
// alone, an attacker can slow down the connection: sequence errors and congestion
// notifications make it send packets again, or fewer at a time.
//
// Messages of the connection manager need the communication id (32 bits). Those of a
// handshake also need its transaction id (64 bits; both are random at the active side). A
// message that ends a connection needs both communication ids and the queue pair number. A
// connect request for a queue pair that is connected does not end that connection; the
// provider asks the peer whether the connection still exists.
//
// A connect request costs the passive side memory before the sender has proven anything.
// Config limits the number of unfinished handshakes and the rate of requests. A source of
// requests proves that it receives messages at its address by an RTU, by a request with the
// right sequence number, or by the answer to a challenge: a disconnect request whose
// transaction id depends on the address. Until then it gets at most one message for each
// message from that address. A request of a stranger that finds no room is challenged, and
// nothing is kept of it; the next repetition then finds room. So a flood of requests from
// forged addresses delays a new host until it repeats its request: not at all if it uses this
// package, and 4.3 s if it is Linux, or some repetitions if there are more than 16,000 requests
// per second. Sources that have proven their addresses share the room. A new one displaces the
// unfinished handshakes of the one with most. Established connections lose nothing. But an
// attacker who forges the address of a host that does not use this package can keep that host
// from making new connections: its requests cannot be told from the others. A host of this
// package answers a challenge in its request, too.
//
// Keys are random, valid in one protection domain, and end with the region. Every queue
// pair of a protection domain can use the domain's keys, so give peers that do not trust
// each other separate domains.
//
// # Hazards
//
//  1. The ICRC covers addresses and ports, so connections through a NAT fail. It also
//     covers the IPv4 identification, which a UDP socket does not show. The package
//     recovers the identification from the ICRC itself, which leaves 16 of the 32 bits as
//     a check (26 if both ends use this package). IPv6 keeps all 32 bits.
//  2. In a network namespace with rdma_rxe, the UDP port is in use. A host without the
//     port (Config.OnDemand) can connect only to a target that uses this package, which
//     recognizes the GUID in its messages and answers to the port from which they came.
//  3. If a path does not carry packets as large as its MTU, the connection fails, because
//     RDMA has no fragmentation.
//  4. Link-local IPv6 addresses need a zone, which is the interface.
package roce
