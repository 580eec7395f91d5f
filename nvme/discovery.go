package nvme

import (
	"fmt"
	"strings"
)

const (
	// DiscoveryHeaderSize is the size of the header of the discovery log in
	// bytes.
	DiscoveryHeaderSize = 1024
	// DiscoveryEntrySize is the size of an entry of the discovery log in bytes.
	DiscoveryEntrySize = 1024

	// DiscoveryHeaderMin is the number of bytes of the header that contain the number
	// of records.
	DiscoveryHeaderMin = 20
)

// CNTLIDStatic in a discovery entry means that the host must connect with CNTLIDDynamic
// and afterwards always use the controller id that it was given.
const CNTLIDStatic = 0xFFFE

// DiscoveryHeader is the header of the discovery log (Base, "Discovery Log Page").
type DiscoveryHeader struct {
	// GenCtr counts the changes of the log. It must be the same before and after the
	// entries are read.
	GenCtr uint64
	// NumRec is the number of entries.
	NumRec uint64
	// RecFmt is 0.
	RecFmt uint16
	// Returned tells which of the requested kinds of log this is, DiscoveryLog bits. 0
	// from older controllers.
	Returned uint8
	// Length is the length of the whole log in bytes (TDLPL); 0 from older controllers.
	Length uint32
}

// Bits of the log specific parameter of a Get Log Page for the discovery log, and of
// [DiscoveryHeader.Returned].
const (
	DiscoveryExtended = 1 << 0 // entries with attributes, of different lengths
	DiscoveryPortOnly = 1 << 1 // only entries of the port that the host uses
	DiscoveryAll      = 1 << 2 // entries of all subsystems, also of those that the host may not use
)

// ParseDiscoveryHeader decodes the header from the first bytes of the log, at least
// DiscoveryHeaderMin. Returned and Length need 24 bytes, and are 0 if b has fewer.
func ParseDiscoveryHeader(b []byte) (DiscoveryHeader, error) {
	if len(b) < DiscoveryHeaderMin {
		return DiscoveryHeader{}, fmt.Errorf("decode discovery header: %d bytes, want %d", len(b), DiscoveryHeaderMin)
	}
	h := DiscoveryHeader{GenCtr: le.Uint64(b[0:8]), NumRec: le.Uint64(b[8:16]), RecFmt: le.Uint16(b[16:18])}
	if h.RecFmt != 0 {
		return DiscoveryHeader{}, fmt.Errorf("decode discovery header: record format %d", h.RecFmt)
	}
	if len(b) >= discoveryLengthEnd {
		h.Returned, h.Length = b[18], le.Uint32(b[20:24])
	}
	return h, nil
}

// discoveryLengthEnd is where the last field of the header ends.
const discoveryLengthEnd = 24

// AppendTo appends the header, DiscoveryHeaderSize bytes.
func (h DiscoveryHeader) AppendTo(b []byte) []byte {
	var raw [DiscoveryHeaderSize]byte
	le.PutUint64(raw[0:8], h.GenCtr)
	le.PutUint64(raw[8:16], h.NumRec)
	le.PutUint16(raw[16:18], h.RecFmt)
	raw[18] = h.Returned
	le.PutUint32(raw[20:24], h.Length)
	return append(b, raw[:]...)
}

// ParseDiscoveryLog decodes a whole log. The entries are copies. It returns an error if b
// holds fewer entries than the header says.
func ParseDiscoveryLog(b []byte) (DiscoveryHeader, []DiscoveryEntry, error) {
	h, err := ParseDiscoveryHeader(b)
	if err != nil {
		return DiscoveryHeader{}, nil, err
	}
	var held uint64
	if len(b) > DiscoveryHeaderSize {
		held = uint64(len(b)-DiscoveryHeaderSize) / DiscoveryEntrySize
	}
	if h.NumRec > held {
		return DiscoveryHeader{}, nil, fmt.Errorf("decode discovery log: %d of %d records", held, h.NumRec)
	}
	entries := make([]DiscoveryEntry, h.NumRec)
	for i := range entries {
		copy(entries[i][:], b[DiscoveryHeaderSize+i*DiscoveryEntrySize:])
	}
	return h, entries, nil
}

// unrecognized is the word of nvme-cli for an unknown value.
const unrecognized = "unrecognized"

// TransportType is TRTYPE. The words for it and for the other types here are those of
// nvme-cli.
type TransportType uint8

// Transports.
const (
	TransportUnspecified TransportType = 0
	TransportRDMA        TransportType = 1
	TransportFC          TransportType = 2
	TransportTCP         TransportType = 3
	TransportLoop        TransportType = 254
)

// String returns the name of the transport.
func (t TransportType) String() string {
	switch t {
	case TransportRDMA:
		return "rdma"
	case TransportFC:
		return "fc"
	case TransportTCP:
		return "tcp"
	case TransportLoop:
		return "loop"
	}
	return unrecognized
}

// AddressFamily is ADRFAM.
type AddressFamily uint8

// Address families.
const (
	AddressPCI        AddressFamily = 0
	AddressIPv4       AddressFamily = 1
	AddressIPv6       AddressFamily = 2
	AddressInfiniBand AddressFamily = 3
	AddressFC         AddressFamily = 4
	AddressLoop       AddressFamily = 254
)

// String returns the name of the family.
func (f AddressFamily) String() string {
	switch f {
	case AddressPCI:
		return "pci"
	case AddressIPv4:
		return "ipv4"
	case AddressIPv6:
		return "ipv6"
	case AddressInfiniBand:
		return "infiniband"
	case AddressFC:
		return "fibre-channel"
	}
	return unrecognized
}

// SubsystemType is SUBTYPE.
type SubsystemType uint8

// Types of subsystems
const (
	SubsystemReferral         SubsystemType = 1
	SubsystemNVMe             SubsystemType = 2
	SubsystemCurrentDiscovery SubsystemType = 3
)

// String returns the name of the type.
func (t SubsystemType) String() string {
	switch t {
	case SubsystemReferral:
		return "discovery subsystem referral"
	case SubsystemNVMe:
		return "nvme subsystem"
	case SubsystemCurrentDiscovery:
		return "current discovery subsystem"
	}
	return unrecognized
}

// TransportRequirements is TREQ.
type TransportRequirements uint8

// Requirements. Bits 0-1 say whether a secure channel is needed.
const (
	TREQNotSpecified  TransportRequirements = 0
	TREQRequired      TransportRequirements = 1
	TREQNotRequired   TransportRequirements = 2
	TREQDisableSQFlow TransportRequirements = 4
)

// DisableSQFlow reports whether the controller can work without submission queue flow
// control.
func (t TransportRequirements) DisableSQFlow() bool { return t&TREQDisableSQFlow != 0 }

// String returns the requirements in words.
func (t TransportRequirements) String() string {
	var out string
	switch t &^ TREQDisableSQFlow {
	case TREQNotSpecified:
		out = "not specified"
	case TREQRequired:
		out = "required"
	case TREQNotRequired:
		out = "not required"
	default:
		return unrecognized
	}
	if t.DisableSQFlow() {
		out += ", sq flow control disable supported"
	}
	return out
}

// EntryFlags is EFLAGS.
type EntryFlags uint16

// Flags of an entry
const (
	// EntryDuplicate means that other entries with this flag lead to the same log.
	EntryDuplicate EntryFlags = 1 << 0
	// EntryPersistent means that explicit persistent connections are supported.
	EntryPersistent EntryFlags = 1 << 1
	// EntryNoCDC means that no direct discovery controller of this entry is connected
	// to the central one.
	EntryNoCDC EntryFlags = 1 << 2
)

// String returns the flags in words.
func (f EntryFlags) String() string {
	if f&^(EntryDuplicate|EntryPersistent|EntryNoCDC) != 0 {
		return unrecognized
	}
	var words []string
	if f&EntryPersistent != 0 {
		words = append(words, "explicit discovery connections")
	}
	if f&EntryDuplicate != 0 {
		words = append(words, "duplicate discovery information")
	}
	if f&EntryNoCDC != 0 {
		words = append(words, "no cdc connectivity")
	}
	if words == nil {
		return "none"
	}
	return strings.Join(words, ", ")
}

// RDMAQPType is the kind of queue pair.
type RDMAQPType uint8

// Kinds of queue pair.
const (
	RDMAConnected RDMAQPType = 1
	RDMADatagram  RDMAQPType = 2
)

// String returns the name of the type.
func (t RDMAQPType) String() string {
	switch t {
	case RDMAConnected:
		return "connected"
	case RDMADatagram:
		return "datagram"
	}
	return unrecognized
}

// RDMAProvider is the kind of RDMA network.
type RDMAProvider uint8

// Kinds of RDMA network.
const (
	RDMAProviderNotSpecified RDMAProvider = 1
	RDMAProviderInfiniBand   RDMAProvider = 2
	RDMAProviderRoCE         RDMAProvider = 3
	RDMAProviderRoCEv2       RDMAProvider = 4
	RDMAProviderIWARP        RDMAProvider = 5
)

// String returns the name of the type.
func (p RDMAProvider) String() string {
	switch p {
	case RDMAProviderNotSpecified:
		return "not specified"
	case RDMAProviderInfiniBand:
		return "infiniband"
	case RDMAProviderRoCE:
		return "roce"
	case RDMAProviderRoCEv2:
		return "roce-v2"
	case RDMAProviderIWARP:
		return "iwarp"
	}
	return unrecognized
}

// RDMACMS is the connection management service.
type RDMACMS uint8

// RDMACM is the only connection service.
const RDMACM RDMACMS = 1

// String returns the name of the service.
func (c RDMACMS) String() string {
	if c == RDMACM {
		return "rdma-cm"
	}
	return unrecognized
}

// TCPSecurity is the kind of secure channel of the TCP transport.
type TCPSecurity uint8

// Kinds of secure channel.
const (
	TCPSecurityNone  TCPSecurity = 0
	TCPSecurityTLS   TCPSecurity = 1 // before 1.3
	TCPSecurityTLS13 TCPSecurity = 2
)

// String names the kind.
func (s TCPSecurity) String() string {
	switch s {
	case TCPSecurityNone:
		return "none"
	case TCPSecurityTLS:
		return "tls"
	case TCPSecurityTLS13:
		return "tls13"
	}
	return unrecognized
}

// DiscoveryEntry is one entry of the discovery log. Text comes from the
// controller, without padding and not fit for a terminal as it is.
type DiscoveryEntry [DiscoveryEntrySize]byte

// DiscoveryEntryAt returns the first 1024 bytes of b, without a copy. It panics if b is
// shorter.
func DiscoveryEntryAt(b []byte) *DiscoveryEntry {
	return (*DiscoveryEntry)(b[:DiscoveryEntrySize:DiscoveryEntrySize])
}

// TRTYPE returns the transport.
func (e *DiscoveryEntry) TRTYPE() TransportType { return TransportType(e[0]) }

// SetTRTYPE sets TRTYPE.
func (e *DiscoveryEntry) SetTRTYPE(v TransportType) { e[0] = byte(v) }

// ADRFAM returns the family of the address.
func (e *DiscoveryEntry) ADRFAM() AddressFamily { return AddressFamily(e[1]) }

// SetADRFAM sets ADRFAM.
func (e *DiscoveryEntry) SetADRFAM(v AddressFamily) { e[1] = byte(v) }

// SUBTYPE returns the type of the subsystem.
func (e *DiscoveryEntry) SUBTYPE() SubsystemType { return SubsystemType(e[2]) }

// SetSUBTYPE sets SUBTYPE.
func (e *DiscoveryEntry) SetSUBTYPE(v SubsystemType) { e[2] = byte(v) }

// TREQ returns the requirements of the transport.
func (e *DiscoveryEntry) TREQ() TransportRequirements { return TransportRequirements(e[3]) }

// SetTREQ sets TREQ.
func (e *DiscoveryEntry) SetTREQ(v TransportRequirements) { e[3] = byte(v) }

// PORTID returns the port of the subsystem.
func (e *DiscoveryEntry) PORTID() uint16 { return le.Uint16(e[4:6]) }

// SetPORTID sets PORTID.
func (e *DiscoveryEntry) SetPORTID(v uint16) { le.PutUint16(e[4:6], v) }

// CNTLID returns the controller to connect to: CNTLIDDynamic, CNTLIDStatic or an id.
func (e *DiscoveryEntry) CNTLID() uint16 { return le.Uint16(e[6:8]) }

// SetCNTLID sets CNTLID.
func (e *DiscoveryEntry) SetCNTLID(v uint16) { le.PutUint16(e[6:8], v) }

// ASQSZ returns the largest size of the admin submission queue, in entries.
func (e *DiscoveryEntry) ASQSZ() uint16 { return le.Uint16(e[8:10]) }

// SetASQSZ sets ASQSZ.
func (e *DiscoveryEntry) SetASQSZ(v uint16) { le.PutUint16(e[8:10], v) }

// EFLAGS returns the flags of the entry.
func (e *DiscoveryEntry) EFLAGS() EntryFlags { return EntryFlags(le.Uint16(e[10:12])) }

// SetEFLAGS sets EFLAGS.
func (e *DiscoveryEntry) SetEFLAGS(v EntryFlags) { le.PutUint16(e[10:12], uint16(v)) }

// TRSVCID returns the service of the address, the port number on RDMA.
func (e *DiscoveryEntry) TRSVCID() string { return text(e[32:64]) }

// SetTRSVCID sets TRSVCID, at most 32 bytes.
func (e *DiscoveryEntry) SetTRSVCID(v string) error { return putText(e[32:64], v) }

// SUBNQN returns the NQN of the subsystem, not validated.
func (e *DiscoveryEntry) SUBNQN() string { return cString(e[256:512]) }

// SetSUBNQN sets SUBNQN. The error is that of [ValidateNQN].
func (e *DiscoveryEntry) SetSUBNQN(v string) error { return putNQN(e[256:512], v) }

// TRADDR returns the address.
func (e *DiscoveryEntry) TRADDR() string { return text(e[512:768]) }

// SetTRADDR sets TRADDR, at most 256 bytes.
func (e *DiscoveryEntry) SetTRADDR(v string) error { return putText(e[512:768], v) }

// RDMAQPType returns the kind of queue pair; valid on RDMA.
func (e *DiscoveryEntry) RDMAQPType() RDMAQPType { return RDMAQPType(e[768]) }

// SetRDMAQPType sets RDMAQPType.
func (e *DiscoveryEntry) SetRDMAQPType(v RDMAQPType) { e[768] = byte(v) }

// RDMAProvider returns the kind of RDMA network; valid on RDMA.
func (e *DiscoveryEntry) RDMAProvider() RDMAProvider { return RDMAProvider(e[769]) }

// SetRDMAProvider sets RDMAProvider.
func (e *DiscoveryEntry) SetRDMAProvider(v RDMAProvider) { e[769] = byte(v) }

// RDMACMS returns the connection service; valid on RDMA.
func (e *DiscoveryEntry) RDMACMS() RDMACMS { return RDMACMS(e[770]) }

// SetRDMACMS sets RDMACMS.
func (e *DiscoveryEntry) SetRDMACMS(v RDMACMS) { e[770] = byte(v) }

// RDMAPKey returns the partition key; valid on InfiniBand.
func (e *DiscoveryEntry) RDMAPKey() uint16 { return le.Uint16(e[776:778]) }

// SetRDMAPKey sets RDMAPKey.
func (e *DiscoveryEntry) SetRDMAPKey(v uint16) { le.PutUint16(e[776:778], v) }

// TCPSecurity returns the kind of secure channel; valid on TCP.
func (e *DiscoveryEntry) TCPSecurity() TCPSecurity { return TCPSecurity(e[768]) }

// SetTCPSecurity sets TCPSecurity.
func (e *DiscoveryEntry) SetTCPSecurity(v TCPSecurity) { e[768] = byte(v) }
