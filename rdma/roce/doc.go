// Package roce is an rdma.Provider without RDMA hardware and without kernel
// modules: RoCEv2 reliable connections over ordinary UDP sockets, on one port per address
// family. It talks to RDMA NICs, to rdma_rxe of the kernel, and to itself.
//
// # Structure
//
// A Provider has one port per local address, or one for all. A port has the socket, one receive
// loop (a goroutine), the connection manager and the queue pairs. With several
// receivers more ports, without a manager, share the UDP port, and the kernel gives
// each the packets of its own queue pairs. The receive
// loop takes a batch of packets, lets each queue pair carry out what came for
// it, and then lets those queue pairs send acknowledgements, READ responses and
// what their window allows, once per batch. Who polls an empty completion queue
// does a turn of the loop himself: spinning does not depend on the scheduler.
// PostSend sends at once, on the caller's goroutine. Package wire has the
// formats.
//
// Between two ends on one host, each queue pair has a port of its own at both
// ends: its packets concern nobody else, so who serves it can take them himself
// (rdma.Receiver), on his thread, without waiting for the scheduler. The ends
// know each other by the mark in their GUIDs, and answer to the UDP port that a
// message came from. What never leaves the host's memory needs no checksum: the
// ICRC covers only headers there. Nor is it bound to the MTUs of the standard: if the
// route takes it, packets carry up to wire.HostMTU, which saves work for large
// transfers. No more is under way than the receive buffer of such a port has room for,
// which without CAP_NET_ADMIN is net.core.rmem_max.
//
// # Cost
//
// The kernel's work per UDP message is what limits small transfers, so packets
// of one length go as one UDP_SEGMENT message. Post all WRITEs of a batch
// first, and then all SENDs, with one PostSend. Work requests that are not
// signaled do not ask the peer for an acknowledgement.
//
// # Hazards
//
//  1. RoCE authenticates nothing. Queue pair numbers, sequence numbers,
//     communication ids and keys are random, and packets must come from the
//     peer's address, which stops who cannot see the traffic. Who can see it
//     can forge it: use IPsec or a network of its own.
//  2. The ICRC covers addresses and ports, so there is no way through a NAT. It
//     also covers the IPv4 identification, which a UDP socket does not show;
//     it is recovered from the ICRC itself, which leaves 16 of the 32 bits as
//     a check (26 between two of our own). IPv6 keeps all 32.
//  3. In one network namespace with rdma_rxe the port is taken. A host without
//     the port (Config.OnDemand) can only talk to a target of this package,
//     which knows its own by the GUID in their messages and answers to the
//     port that they sent from.
//  4. A path that takes smaller packets than its MTU promised fails the
//     connection (RDMA has no fragmentation).
//  5. A protection domain's keys may be used, and ended by SEND with
//     invalidate, through each of its queue pairs: give peers that do not trust
//     each other domains of their own.
package roce
