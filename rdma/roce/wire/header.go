package wire

import "encoding/binary"

// Port is the UDP destination port of RoCEv2.
const Port = 4791

// Opcode is the operation of a packet (IBTA 9.2.1).
type Opcode uint8

// Opcodes of reliable connections, and DatagramSendOnly, which the connection manager
// uses
const (
	SendFirst         Opcode = 0x00
	SendMiddle        Opcode = 0x01
	SendLast          Opcode = 0x02
	SendLastImm       Opcode = 0x03
	SendOnly          Opcode = 0x04
	SendOnlyImm       Opcode = 0x05
	WriteFirst        Opcode = 0x06
	WriteMiddle       Opcode = 0x07
	WriteLast         Opcode = 0x08
	WriteLastImm      Opcode = 0x09
	WriteOnly         Opcode = 0x0a
	WriteOnlyImm      Opcode = 0x0b
	ReadRequest       Opcode = 0x0c
	ReadResponseFirst Opcode = 0x0d
	ReadResponseMid   Opcode = 0x0e
	ReadResponseLast  Opcode = 0x0f
	ReadResponseOnly  Opcode = 0x10
	Acknowledge       Opcode = 0x11
	SendLastInv       Opcode = 0x16
	SendOnlyInv       Opcode = 0x17
	DatagramSendOnly  Opcode = 0x64
	CongestionNote    Opcode = 0x81 // CNP (annex A17)
)

// Lengths in bytes
const (
	BTHLen       = 12
	RETHLen      = 16
	AETHLen      = 4
	IETHLen      = 4
	ImmLen       = 4
	NoteLen      = 16 // reserved bytes of a CongestionNote
	DETHLen      = 8
	ICRCLen      = 4
	MaxHeaderLen = BTHLen + RETHLen + ImmLen
)

var headerLens = [256]uint8{
	SendFirst: BTHLen, SendMiddle: BTHLen, SendLast: BTHLen, SendOnly: BTHLen,
	SendLastImm: BTHLen + ImmLen, SendOnlyImm: BTHLen + ImmLen,
	SendLastInv: BTHLen + IETHLen, SendOnlyInv: BTHLen + IETHLen,
	WriteFirst: BTHLen + RETHLen, WriteMiddle: BTHLen, WriteLast: BTHLen, WriteLastImm: BTHLen + ImmLen,
	WriteOnly: BTHLen + RETHLen, WriteOnlyImm: BTHLen + RETHLen + ImmLen,
	ReadRequest:       BTHLen + RETHLen,
	ReadResponseFirst: BTHLen + AETHLen, ReadResponseMid: BTHLen,
	ReadResponseLast: BTHLen + AETHLen, ReadResponseOnly: BTHLen + AETHLen,
	Acknowledge:      BTHLen + AETHLen,
	DatagramSendOnly: BTHLen + DETHLen,
	CongestionNote:   BTHLen + NoteLen,
}

// HeaderLen returns the length of all headers before the payload in bytes, or 0 if the
// opcode is not listed here.
func (o Opcode) HeaderLen() int { return int(headerLens[o]) }

// BTH is the base transport header (IBTA 9.2).
type BTH struct {
	Op     Opcode
	Pad    uint8 // bytes of padding after the payload, 0..3
	AckReq bool
	PKey   uint16
	DestQP uint32 // 24 bits
	PSN    uint32 // 24 bits
}

// DefaultPKey is the partition of all RoCE traffic: full member of 0x7fff.
const DefaultPKey = 0xffff

const (
	bthMigrated = 0x40
	bthAckReq   = 0x80
	bthBECN     = 0x40
)

// Put writes the header into the first BTHLen bytes of b.
func (h *BTH) Put(b []byte) {
	_ = b[BTHLen-1]
	b[0] = byte(h.Op)
	b[1] = bthMigrated | h.Pad<<4
	binary.BigEndian.PutUint16(b[2:], h.PKey)
	binary.BigEndian.PutUint32(b[4:], h.DestQP)
	binary.BigEndian.PutUint32(b[8:], h.PSN)
	if h.AckReq {
		b[8] = bthAckReq
	}
}

// SetBECN sets a bit in a header that Put wrote. It tells the receiver that its packets
// met congestion.
func SetBECN(b []byte) { b[4] |= bthBECN }

// Parse parses a packet (the UDP payload) up to its payload. It returns false if the
// version, the partition, the opcode or the length is not valid.
func Parse(packet []byte) (h BTH, payload []byte, ok bool) {
	if len(packet) < BTHLen+ICRCLen || len(packet)%4 != 0 || packet[1]&0x0f != 0 {
		return h, nil, false
	}
	h = BTH{
		Op:     Opcode(packet[0]),
		Pad:    packet[1] >> 4 & 3,
		AckReq: packet[8]&bthAckReq != 0,
		PKey:   binary.BigEndian.Uint16(packet[2:]),
		DestQP: binary.BigEndian.Uint32(packet[4:]) & 0xffffff,
		PSN:    binary.BigEndian.Uint32(packet[8:]) & 0xffffff,
	}
	head, end := h.Op.HeaderLen(), len(packet)-ICRCLen-int(h.Pad)
	if head == 0 || end < head || h.PKey&0x7fff != DefaultPKey&0x7fff {
		return h, nil, false
	}
	return h, packet[head:end], true
}

// RETH is the RDMA extended transport header (IBTA 9.3.3).
type RETH struct {
	VA     uint64
	RKey   uint32
	Length uint32 // of the whole message
}

// Put writes the header into the first RETHLen bytes of b.
func (h *RETH) Put(b []byte) {
	binary.BigEndian.PutUint64(b, h.VA)
	binary.BigEndian.PutUint32(b[8:], h.RKey)
	binary.BigEndian.PutUint32(b[12:], h.Length)
}

// ParseRETH reads what Put wrote.
func ParseRETH(b []byte) RETH {
	return RETH{
		VA:     binary.BigEndian.Uint64(b),
		RKey:   binary.BigEndian.Uint32(b[8:]),
		Length: binary.BigEndian.Uint32(b[12:]),
	}
}

// Syndrome is the first byte of an AETH (IBTA 9.7.5.2).
type Syndrome uint8

// Syndromes. An RNR NAK is NAKNotReady plus a timer code of 5 bits.
const (
	ACK              Syndrome = 0x1f // no end-to-end credits
	NAKNotReady      Syndrome = 0x20
	NAKSequence      Syndrome = 0x60
	NAKInvalid       Syndrome = 0x61
	NAKRemoteAccess  Syndrome = 0x62
	NAKRemoteOp      Syndrome = 0x63
	syndromeTypeMask          = 0xe0
)

// IsACK reports whether s is a positive acknowledgement.
func (s Syndrome) IsACK() bool { return s&syndromeTypeMask == 0 }

// IsNotReady reports whether s is an RNR NAK.
func (s Syndrome) IsNotReady() bool { return s&syndromeTypeMask == NAKNotReady }

// AETH is the acknowledgement extended transport header.
type AETH struct {
	Syndrome Syndrome
	MSN      uint32 // 24 bits
}

// Put writes the header into the first AETHLen bytes of b.
func (h *AETH) Put(b []byte) {
	binary.BigEndian.PutUint32(b, h.MSN&0xffffff|uint32(h.Syndrome)<<24)
}

// ParseAETH reads what Put wrote.
func ParseAETH(b []byte) AETH {
	v := binary.BigEndian.Uint32(b)
	return AETH{Syndrome: Syndrome(v >> 24), MSN: v & 0xffffff}
}

// PSNDiff returns a - b for two 24-bit sequence numbers, from -1<<23 to 1<<23 - 1.
func PSNDiff(a, b uint32) int { return int(int32((a-b)<<8) >> 8) }
