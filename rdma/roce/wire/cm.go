package wire

import (
	"encoding/binary"
	"net/netip"
)

// Management datagrams of the connection manager are UD SEND_ONLY packets from queue pair
// 1 to queue pair 1.
const (
	MADLen       = 256
	MADPacketLen = BTHLen + DETHLen + MADLen + ICRCLen
	CMQueuePair  = 1
	cmQKey       = 0x80010000
	body         = 24 // offset of the message in the datagram
)

// Attribute is the type of a message of the connection manager (IBTA 12.6).
type Attribute uint16

// Attributes
const (
	REQ  Attribute = 0x10
	MRA  Attribute = 0x11
	REJ  Attribute = 0x12
	REP  Attribute = 0x13
	RTU  Attribute = 0x14
	DREQ Attribute = 0x15
	DREP Attribute = 0x16
)

// Lengths of private data, in bytes
const (
	RequestPrivate = 56 // after the IP header of annex A11
	ReplyPrivate   = 196
	RejectPrivate  = 148
)

// MAD is a management datagram with a message of the connection manager.
type MAD [MADLen]byte

// NewMAD makes a message. Every message has the sender's communication id, and all but
// REQ also that of the receiver.
func NewMAD(attr Attribute, tid uint64, local, remote uint32) *MAD {
	m := &MAD{1, 7, 2, 3} // base version, class CM, class version, method Send
	binary.BigEndian.PutUint64(m[8:], tid)
	binary.BigEndian.PutUint16(m[16:], uint16(attr))
	binary.BigEndian.PutUint32(m[body:], local)
	binary.BigEndian.PutUint32(m[body+4:], remote)
	return m
}

// Attribute returns the type of the message, or 0 if it is not one of the connection
// manager.
func (m *MAD) Attribute() Attribute {
	if [4]byte(m[:4]) != [4]byte{1, 7, 2, 3} {
		return 0
	}
	return Attribute(binary.BigEndian.Uint16(m[16:]))
}

// TID returns the transaction id. An answer has the id of the message that it answers.
func (m *MAD) TID() uint64 { return binary.BigEndian.Uint64(m[8:]) }

// Local returns the sender's communication id.
func (m *MAD) Local() uint32 { return binary.BigEndian.Uint32(m[body:]) }

// Remote returns the receiver's communication id. REQ has none.
func (m *MAD) Remote() uint32 { return binary.BigEndian.Uint32(m[body+4:]) }

// Packet returns the packet with sequence number psn, without the ICRC.
func (m *MAD) Packet(psn uint32) []byte {
	b := make([]byte, MADPacketLen)
	m.PutPacket(b, psn)
	return b
}

// PutPacket writes the result of Packet to b, which must be MADPacketLen bytes long.
func (m *MAD) PutPacket(b []byte, psn uint32) {
	h := BTH{Op: DatagramSendOnly, PKey: DefaultPKey, DestQP: CMQueuePair, PSN: psn}
	h.Put(b)
	binary.BigEndian.PutUint32(b[BTHLen:], cmQKey)
	b[BTHLen+7] = CMQueuePair
	copy(b[BTHLen+DETHLen:], m[:])
}

// ParseMAD returns the message in a packet that Parse accepted. It returns false if there
// is none.
func ParseMAD(h *BTH, packet, payload []byte) (*MAD, bool) {
	if h.Op != DatagramSendOnly || h.DestQP != CMQueuePair || len(payload) != MADLen ||
		binary.BigEndian.Uint32(packet[BTHLen:]) != cmQKey || get24(packet[BTHLen+5:]) != CMQueuePair {
		return nil, false
	}
	m := MAD(payload)
	return &m, m.Attribute() != 0
}

func get24(b []byte) uint32 { return uint32(b[0])<<16 | uint32(b[1])<<8 | uint32(b[2]) }

func set24(b []byte, v uint32) { b[0], b[1], b[2] = byte(v>>16), byte(v>>8), byte(v) }

// servicePrefix is the RDMA_PS_TCP port space of Linux and annex A11.
const servicePrefix = 0x0000000001060000

// Request holds the fields of the REQ message that are used (IBTA 12.6.5).
type Request struct {
	Port                               uint16 // destination port of the service id
	GUID                               uint64
	QPN                                uint32
	PSN                                uint32 // first sequence number that the receiver must send
	ResponderResources, InitiatorDepth uint8
	AckTimeout                         uint8 // 4.096 µs << AckTimeout, 5 bits
	RetryCount, RNRRetryCount          uint8
	FlowControl                        bool
	MTU                                int // bytes
	Source, Destination                netip.Addr
	SourcePort                         uint16
	// Proof has a meaning between peers that know it. It is in the Local Q_Key field,
	// which reliable connections do not use. Zero means none.
	Proof   uint32
	Private [RequestPrivate]byte
}

// HostMTU is a path MTU that the standard does not have, for two ends on one host. It
// fills a UDP datagram with whole pages.
const HostMTU = 15 * 4096

// mtuCode returns the code of a path MTU: 1 for 256, 5 for 4096, and hostCode for
// HostMTU.
func mtuCode(mtu int) uint8 {
	if mtu >= HostMTU {
		return hostCode
	}
	for code := uint8(5); code > 1; code-- {
		if mtu >= 128<<code {
			return code
		}
	}
	return 1
}

const hostCode = 6

// mtuOf returns the path MTU of a code, or 0 if the code is invalid.
func mtuOf(code uint8) int {
	switch {
	case code == hostCode:
		return HostMTU
	case code < 1 || code > 5:
		return 0
	}
	return 128 << code
}

// cmTimeouts is the code of the response timeouts that are named to the peer: 4.3 s.
const cmTimeouts = 20

// Put writes the message to m.
func (r *Request) Put(m *MAD) {
	b := m[body:]
	binary.BigEndian.PutUint64(b[8:], servicePrefix|uint64(r.Port))
	binary.BigEndian.PutUint64(b[16:], r.GUID)
	m.SetProof(r.Proof)
	set24(b[32:], r.QPN)
	b[35], b[39] = r.ResponderResources, r.InitiatorDepth
	b[43] = cmTimeouts << 3
	if r.FlowControl {
		b[43] |= 1
	}
	set24(b[44:], r.PSN)
	b[47] = cmTimeouts<<3 | min(r.RetryCount, 7)
	binary.BigEndian.PutUint16(b[48:], DefaultPKey)
	b[50] = mtuCode(r.MTU)<<4 | min(r.RNRRetryCount, 7)
	b[51] = 15 << 4 // CM retries
	b[52], b[53], b[54], b[55] = 0xff, 0xff, 0xff, 0xff
	src, dst := r.Source.As16(), r.Destination.As16()
	copy(b[56:72], src[:])
	copy(b[72:88], dst[:])
	b[93] = 64 // hop limit
	b[95] = r.AckTimeout << 3
	p := b[140:]
	p[1] = 0x60
	if r.Source.Is4() {
		p[1] = 0x40
		clear(src[:12])
		clear(dst[:12])
	}
	binary.BigEndian.PutUint16(p[2:], r.SourcePort)
	copy(p[4:20], src[:])
	copy(p[20:36], dst[:])
	copy(p[36:], r.Private[:])
}

// ParseRequest reads a REQ. It returns false for a service or transport other than a
// reliable connection of RDMA_PS_TCP, and for addresses that make no sense.
func ParseRequest(m *MAD) (r Request, ok bool) {
	b := m[body:]
	service := binary.BigEndian.Uint64(b[8:])
	mtu := mtuOf(b[50] >> 4)
	if service>>16 != servicePrefix>>16 || b[43]&6 != 0 || mtu == 0 {
		return r, false
	}
	r = Request{
		Port: uint16(service), GUID: binary.BigEndian.Uint64(b[16:]),
		Proof: m.Proof(),
		QPN:   get24(b[32:]), PSN: get24(b[44:]),
		ResponderResources: b[35], InitiatorDepth: b[39],
		AckTimeout: b[95] >> 3, RetryCount: b[47] & 7, RNRRetryCount: b[50] & 7,
		FlowControl: b[43]&1 != 0, MTU: mtu,
	}
	p := b[140:]
	switch {
	case p[0] != 0:
		return r, false
	case p[1]>>4 == 4:
		r.Source, r.Destination = netip.AddrFrom4([4]byte(p[16:20])), netip.AddrFrom4([4]byte(p[32:36]))
	case p[1]>>4 == 6:
		r.Source, r.Destination = netip.AddrFrom16([16]byte(p[4:20])), netip.AddrFrom16([16]byte(p[20:36]))
	default:
		return r, false
	}
	r.SourcePort = binary.BigEndian.Uint16(p[2:])
	r.Private = [RequestPrivate]byte(p[36:])
	return r, true
}

// Reply is the REP message (IBTA 12.6.8).
type Reply struct {
	GUID                               uint64
	QPN                                uint32
	PSN                                uint32 // first sequence number that the receiver must send
	ResponderResources, InitiatorDepth uint8
	RNRRetryCount                      uint8
	FlowControl                        bool
	Private                            [ReplyPrivate]byte
}

// ackDelay is the code of the target ack delay that is named to the peer: 134 ms.
const ackDelay = 15

// Put writes the message to m.
func (r *Reply) Put(m *MAD) {
	b := m[body:]
	set24(b[12:], r.QPN)
	set24(b[20:], r.PSN)
	b[24], b[25] = r.ResponderResources, r.InitiatorDepth
	b[26] = ackDelay << 3
	if r.FlowControl {
		b[26] |= 1
	}
	b[27] = min(r.RNRRetryCount, 7) << 5
	binary.BigEndian.PutUint64(b[28:], r.GUID)
	copy(b[36:], r.Private[:])
}

// ParseReply reads a REP.
func ParseReply(m *MAD) Reply {
	b := m[body:]
	return Reply{
		GUID: binary.BigEndian.Uint64(b[28:]), QPN: get24(b[12:]), PSN: get24(b[20:]),
		ResponderResources: b[24], InitiatorDepth: b[25],
		RNRRetryCount: b[27] >> 5, FlowControl: b[26]&1 != 0,
		Private: [ReplyPrivate]byte(b[36:]),
	}
}

// Reject is the REJ message (IBTA 12.6.7).
type Reject struct {
	Of      uint8 // the message that is rejected: 0 a REQ, 1 a REP, 2 another
	Reason  uint16
	Private [RejectPrivate]byte
}

// Put writes the message to m.
func (r *Reject) Put(m *MAD) {
	b := m[body:]
	b[8] = r.Of << 6
	binary.BigEndian.PutUint16(b[10:], r.Reason)
	copy(b[84:], r.Private[:])
}

// ParseReject reads a REJ.
func ParseReject(m *MAD) Reject {
	b := m[body:]
	return Reject{Of: b[8] >> 6, Reason: binary.BigEndian.Uint16(b[10:]), Private: [RejectPrivate]byte(b[84:])}
}

// SetProof writes Request.Proof.
func (m *MAD) SetProof(proof uint32) { binary.BigEndian.PutUint32(m[body+28:], proof) }

// Proof returns the proof that SetProof wrote.
func (m *MAD) Proof() uint32 { return binary.BigEndian.Uint32(m[body+28:]) }

// NewMRA makes the message that confirms the arrival of a REQ. It says that the answer
// will take at least another 4.3 s.
func NewMRA(tid uint64, local, remote uint32) *MAD {
	m := NewMAD(MRA, tid, local, remote)
	m[body+9] = cmTimeouts << 3
	return m
}

// SetQPN sets the queue pair of a DREQ, which is the receiver's.
func (m *MAD) SetQPN(qpn uint32) { set24(m[body+8:], qpn) }

// QPN returns the queue pair that SetQPN set.
func (m *MAD) QPN() uint32 { return get24(m[body+8:]) }
