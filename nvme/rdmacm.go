package nvme

import "fmt"

// Sizes of the private data that the RDMA connection manager carries, in bytes. Received
// data may be longer, because the network pads them with zeroes.
const (
	RDMARequestSize = 32
	RDMAAcceptSize  = 32
	RDMARejectSize  = 4
)

// RDMARequest is the private data of a connection request (RDMA, "RDMA_CM_REQ
// Private Data Format").
//
//	0 record format   2 queue id   4 hrqsize   6 hsqsize   8 controller id
type RDMARequest struct {
	// RecFmt is 0.
	RecFmt uint16
	// QID is the id of the queue that will use the connection.
	QID uint16
	// HRQSize is the size of the host's receive queue, in entries.
	HRQSize uint16
	// HSQSize is the size of the host's send queue, in entries, 0-based.
	HSQSize uint16
	// CNTLID is the controller's id on I/O queues and 0 on the admin queue.
	CNTLID uint16
}

// AppendTo appends the private data, RDMARequestSize bytes.
func (r RDMARequest) AppendTo(b []byte) []byte {
	raw := r.Marshal()
	return append(b, raw[:]...)
}

// Marshal returns the private data.
func (r RDMARequest) Marshal() [RDMARequestSize]byte {
	var b [RDMARequestSize]byte
	le.PutUint16(b[0:2], r.RecFmt)
	le.PutUint16(b[2:4], r.QID)
	le.PutUint16(b[4:6], r.HRQSize)
	le.PutUint16(b[6:8], r.HSQSize)
	le.PutUint16(b[8:10], r.CNTLID)
	return b
}

// ParseRDMARequest decodes the private data of a request. The error wraps the
// [RDMARejectStatus] for the answer.
func ParseRDMARequest(b []byte) (RDMARequest, error) {
	if len(b) < RDMARequestSize {
		return RDMARequest{}, fmt.Errorf("decode rdma request: %d bytes: %w", len(b), RDMARejectInvalidLength)
	}
	r := RDMARequest{
		RecFmt:  le.Uint16(b[0:2]),
		QID:     le.Uint16(b[2:4]),
		HRQSize: le.Uint16(b[4:6]),
		HSQSize: le.Uint16(b[6:8]),
		CNTLID:  le.Uint16(b[8:10]),
	}
	if r.RecFmt != 0 {
		return RDMARequest{}, fmt.Errorf("decode rdma request: record format %d: %w", r.RecFmt, RDMARejectInvalidRecFmt)
	}
	return r, nil
}

// RDMAAccept is the private data of a reply that accepts (RDMA, "RDMA_CM_REP
// Private Data Format").
//
//	0 record format   2 crqsize
type RDMAAccept struct {
	// RecFmt is 0.
	RecFmt uint16
	// CRQSize is the size of the controller's receive queue, in entries.
	CRQSize uint16
}

// AppendTo appends the private data, RDMAAcceptSize bytes.
func (a RDMAAccept) AppendTo(b []byte) []byte {
	raw := a.Marshal()
	return append(b, raw[:]...)
}

// Marshal returns the private data.
func (a RDMAAccept) Marshal() [RDMAAcceptSize]byte {
	var b [RDMAAcceptSize]byte
	le.PutUint16(b[0:2], a.RecFmt)
	le.PutUint16(b[2:4], a.CRQSize)
	return b
}

// ParseRDMAAccept decodes the private data of a reply. The kernel's host ignores it, so
// errors of controllers may go unnoticed.
func ParseRDMAAccept(b []byte) (RDMAAccept, error) {
	if len(b) < RDMAAcceptSize {
		return RDMAAccept{}, fmt.Errorf("decode rdma accept: %d bytes, want %d", len(b), RDMAAcceptSize)
	}
	a := RDMAAccept{RecFmt: le.Uint16(b[0:2]), CRQSize: le.Uint16(b[2:4])}
	if a.RecFmt != 0 {
		return RDMAAccept{}, fmt.Errorf("decode rdma accept: record format %d", a.RecFmt)
	}
	return a, nil
}

// RDMARejectStatus is the reason why a connection request was rejected. It is an error.
type RDMARejectStatus uint16

// Reasons to reject a request (RDMA, "RDMA_CM_REJ Status").
const (
	RDMARejectInvalidLength  RDMARejectStatus = 1
	RDMARejectInvalidRecFmt  RDMARejectStatus = 2
	RDMARejectInvalidQID     RDMARejectStatus = 3
	RDMARejectInvalidHSQSize RDMARejectStatus = 4
	RDMARejectInvalidHRQSize RDMARejectStatus = 5
	RDMARejectNoResources    RDMARejectStatus = 6
	RDMARejectInvalidIRD     RDMARejectStatus = 7
	RDMARejectInvalidORD     RDMARejectStatus = 8
	RDMARejectInvalidCNTLID  RDMARejectStatus = 9
)

// String returns the reason in words.
func (s RDMARejectStatus) String() string {
	switch s {
	case RDMARejectInvalidLength:
		return "invalid private data length"
	case RDMARejectInvalidRecFmt:
		return "invalid record format"
	case RDMARejectInvalidQID:
		return "invalid queue id"
	case RDMARejectInvalidHSQSize:
		return "invalid host send queue size"
	case RDMARejectInvalidHRQSize:
		return "invalid host receive queue size"
	case RDMARejectNoResources:
		return "no resources"
	case RDMARejectInvalidIRD:
		return "invalid inbound rdma read depth"
	case RDMARejectInvalidORD:
		return "invalid outbound rdma read depth"
	case RDMARejectInvalidCNTLID:
		return "invalid controller id"
	}
	return fmt.Sprintf("reject status %d", uint16(s))
}

// Error implements error.
func (s RDMARejectStatus) Error() string { return "rdma connection rejected: " + s.String() }

// RDMAReject is the private data of a reply that rejects (RDMA, "RDMA_CM_REJ Private Data
// Format"). It is present only if the reason of the reject is "consumer defined" (28 on
// InfiniBand and RoCE).
//
//	0 record format   2 status
type RDMAReject struct {
	// RecFmt is 0.
	RecFmt uint16
	// Status is the reason.
	Status RDMARejectStatus
}

// AppendTo appends the private data, RDMARejectSize bytes.
func (r RDMAReject) AppendTo(b []byte) []byte {
	raw := r.Marshal()
	return append(b, raw[:]...)
}

// Marshal returns the private data.
func (r RDMAReject) Marshal() [RDMARejectSize]byte {
	var b [RDMARejectSize]byte
	le.PutUint16(b[0:2], r.RecFmt)
	le.PutUint16(b[2:4], uint16(r.Status))
	return b
}

// ParseRDMAReject decodes the private data of a reject.
func ParseRDMAReject(b []byte) (RDMAReject, error) {
	if len(b) < RDMARejectSize {
		return RDMAReject{}, fmt.Errorf("decode rdma reject: %d bytes, want %d", len(b), RDMARejectSize)
	}
	r := RDMAReject{RecFmt: le.Uint16(b[0:2]), Status: RDMARejectStatus(le.Uint16(b[2:4]))}
	if r.RecFmt != 0 {
		return RDMAReject{}, fmt.Errorf("decode rdma reject: record format %d", r.RecFmt)
	}
	return r, nil
}
