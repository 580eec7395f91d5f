// Package roce is an rdma.Provider that needs neither RDMA hardware nor kernel modules.
// It implements RoCEv2 reliable connections over ordinary UDP sockets, with one port for
// each address family. It interoperates with RDMA NICs, with the kernel's rdma_rxe, and
// with itself.
//
// # Structure
//
// A Provider has one port for each local address, or one for all of them. A port has
// the socket, one receive loop (a goroutine), the connection manager and the queue
// pairs. With several receivers, more ports without a connection manager share the UDP
// port, and the kernel gives each of them the packets of its own queue pairs. The
// receive loop takes a batch of packets and lets each queue pair execute what arrived
// for it. Once for each batch, these queue pairs then send acknowledgements, READ
// responses and what their window allows. A goroutine that polls an empty completion
// queue runs one iteration of the loop itself, so spinning does not depend on the
// scheduler. PostSend sends at once, on the goroutine of the caller. Package wire
// defines the formats.
//
// If both ends are on one host, each queue pair has a port of its own at both ends. Its
// packets concern no other queue pair. So the goroutine that serves the queue pair can
// take them itself (rdma.Receiver), on its own thread, without waiting for the
// scheduler. The ends recognize each other by a mark in their GUIDs, and answer to the
// UDP port that a message came from. Data that never leaves the memory of the host needs
// no checksum, so the ICRC covers only headers there. Packets are not limited to the
// MTUs of the standard either: if the route allows it, they carry up to wire.HostMTU,
// which saves work for large transfers. The amount of data in flight is limited to the
// receive buffer of such a port, which without CAP_NET_ADMIN is net.core.rmem_max.
//
// # Cost
//
// The work of the kernel for each UDP message limits small transfers. So packets of the
// same length are sent as one UDP_SEGMENT message. Post all WRITEs of a batch first and
// then all SENDs, with one PostSend. Work requests that are not signaled do not ask the
// peer for an acknowledgement.
//
// # Hazards
//
//  1. RoCE authenticates nothing. Queue pair numbers, sequence numbers, communication
//     ids and keys are random, and packets must come from the address of the peer. This
//     stops an attacker who cannot see the traffic. An attacker who can see it can forge
//     it: use IPsec or a separate network.
//  2. The ICRC covers addresses and ports, so packets cannot pass a NAT. It also covers
//     the IPv4 identification, which a UDP socket does not show. The identification is
//     recovered from the ICRC itself, which leaves 16 of the 32 bits as a check (26
//     between two ends of this package). IPv6 keeps all 32 bits.
//  3. In a network namespace with rdma_rxe the UDP port is taken. A host without the
//     port (Config.OnDemand) can connect only to a target of this package. Such a target
//     recognizes the host by the GUID in its messages and answers to the port that they
//     were sent from.
//  4. If a path takes smaller packets than its MTU promised, the connection fails,
//     because RDMA has no fragmentation.
//  5. The keys of a protection domain can be used, and invalidated by SEND with
//     invalidate, through each of its queue pairs. Peers that do not trust each other
//     need separate protection domains.
package roce
