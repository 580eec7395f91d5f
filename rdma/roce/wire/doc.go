// Package wire defines the RoCEv2 packet format: transport headers, the invariant CRC,
// and the messages of the connection manager. It does no I/O.
//
// The layouts are those of the InfiniBand Architecture Specification, volume 1 (IBTA):
// chapter 9 for the transport headers, chapter 12 for the connection manager, chapter
// 13 for management datagrams, and annexes A11 (IP addressing in the connection
// manager) and A17 (RoCEv2). Everything is big endian except the invariant CRC.
package wire
