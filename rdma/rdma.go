// Package rdma defines the RDMA verbs and the RDMA connection manager as far as this
// module needs them: interfaces, work requests, completions and errors. The providers
// implement it: rdma/verbs with libibverbs and librdmacm, rdma/roce with RoCEv2 over
// UDP, and rdma/rdmatest in process.
//
// # Ownership
//
// Registered memory is allocated by the provider, off the Go heap, and stays
// mapped and pinned until MR.Close. Objects close in the reverse order of
// their making: ID.Close (which destroys its QP) before the CQs and MRs that
// the QP used, those before the PD. In another order, Close works or gives EBUSY,
// and changes nothing then. Of what was closed, or belongs to a provider that was,
// every method gives an error (ErrClosed) or does nothing, but for MR.Bytes, whose
// memory is gone. No number of a descriptor is used after its end.
//
// # Concurrency
//
// PostSend of a QP is called by one goroutine at a time, and so is PostRecv. Poll, Arm
// and Ack of a CQ are called by one goroutine at a time. All other methods may be called
// from any goroutine. None of the five allocates memory.
//
// # Hazards
//
//  1. When a QP leaves the ready state because of an error, its outstanding work
//     requests complete with WCFlushErr, in any order. The peer may write to memory
//     whose key it has until QP.Fail has returned (rdma/verbs names an exception).
//  2. A CQ event is one 8-byte read from CQ.FD. The reader of n events must call
//     Ack(n) before Close, or Close waits forever.
//  3. Call Arm before the last Poll, not after it: a completion that arrives between
//     Poll and Arm makes no event.
//  4. The slot of a send work request is free again when a completion of it, or of a
//     later one, was polled. So at least one of any MaxSendWR consecutive work
//     requests must be signaled.
package rdma

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
)

// Provider makes connections. Name is what --provider and the logs call it.
type Provider interface {
	Name() string
	// Resolve finds the device and the route that lead to remote (a unicast
	// address and port). A valid local binds the source address; its port is
	// ignored. ctx bounds both steps. tos < 0 leaves the type of service.
	// Errors: *StepError.
	Resolve(ctx context.Context, local netip.Addr, remote netip.AddrPort, tos int) (ID, error)
	// Listen accepts connections to addr; a port of 0 picks one.
	Listen(addr netip.AddrPort, backlog int) (Listener, error)
}

// ID is a connection identifier (rdma_cm_id): first resolved or requested,
// then given a QP, then connected.
type ID interface {
	// Device is the RDMA device that the route goes through. It stays open as
	// long as any ID on it.
	Device() Device
	LocalAddr() netip.AddrPort
	RemoteAddr() netip.AddrPort
	// PrivateData is what came with the peer's connect request (on an accepted
	// ID, before Accept), at most 56 bytes for the RC service. Here as in
	// answers and rejects it may come padded with zeros.
	PrivateData() []byte
	// CreateQP makes the one reliable-connected QP of this ID.
	CreateQP(pd PD, cfg QPConfig) (QP, error)
	// Connect sends the request and waits for the answer: the peer's private
	// data, or *RejectError, or *StepError. Receives should be posted before.
	Connect(ctx context.Context, p ConnParam) (private []byte, err error)
	// Accept answers a request that a Listener gave, and waits until the
	// connection is established. Until then nothing shows that the peer exists:
	// memory that is needed only afterwards is better allocated afterwards. The
	// error says so if the peer does not answer, or if the provider ends the
	// handshake to make room for others; then Close is left to call.
	Accept(ctx context.Context, p ConnParam) error
	// Reject refuses a request that a Listener gave, with at most 148 bytes.
	Reject(private []byte) error
	// Events gives what happens to an established connection. The channel is
	// buffered, never blocks the provider (later events are dropped, the first
	// is kept), and is closed by Close.
	Events() <-chan Event
	// Disconnect asks for an orderly end (DREQ); it does not wait for the
	// answer. The local QP goes to the error state.
	Disconnect() error
	// Close destroys the QP and the ID. It is idempotent, and bounded even
	// with a silent peer.
	Close() error
}

// Listener accepts connection requests. How many handshakes may be unfinished is the
// provider's to bound (roce.Config.MaxHalfOpen); how many connections may be established is
// the caller's.
type Listener interface {
	Addr() netip.AddrPort
	// Accept waits for the next request. The ID still has to be answered with
	// Accept or Reject.
	Accept(ctx context.Context) (ID, error)
	Close() error
}

// ConnParam are the parameters of a connect request or of its answer
// (rdma_conn_param).
type ConnParam struct {
	PrivateData        []byte // at most 56 bytes in a request, 196 in an answer
	ResponderResources uint8  // RDMA READs of the peer that we serve at a time
	InitiatorDepth     uint8  // RDMA READs that we have outstanding at a time
	RetryCount         uint8  // 0..7
	RNRRetryCount      uint8  // 0..7, 7 = for ever
	FlowControl        bool
}

// EventType says what happened to a connection.
type EventType uint8

// Connection events.
const (
	EventUnset         EventType = iota
	EventDisconnected            // the peer left, or the connection broke
	EventDeviceRemoved           // the RDMA device goes away
	EventAddrChange              // the route changed under the connection
	EventTimewaitExit            // the QP number may be used again
	EventQPFatal                 // asynchronous error of the QP
	EventPortDown                // asynchronous: the port lost its link
)

var eventNames = [...]string{
	"unset", "peer disconnected", "device removed", "address changed",
	"timewait exit", "queue pair fatal error", "port down",
}

func (t EventType) String() string {
	if int(t) < len(eventNames) {
		return eventNames[t]
	}
	return fmt.Sprintf("event %d", t)
}

// Event is one connection event; Detail is the provider's own word for it.
type Event struct {
	Type   EventType
	Detail string
}

// DeviceAttr are limits of a device (ibv_device_attr).
type DeviceAttr struct {
	Name            string
	MaxQPWR         int // work requests per send or receive queue
	MaxSGE          int // scatter/gather elements per work request
	MaxCQE          int
	MaxMR           int
	MaxMRSize       uint64
	MaxQPReadAtomic int  // RDMA READs per QP that we can serve as target of them
	CompVectors     int  // completion vectors, ≥ 1
	MemoryWindows   bool // type 2 memory windows
}

// Device is an open RDMA device.
type Device interface {
	Attr() DeviceAttr
	AllocPD() (PD, error)
	// CreateCQ makes a completion queue of at least entries. With events it
	// has a completion channel of its own and FD is ≥ 0; without, it can only
	// be polled. vector is taken modulo CompVectors.
	CreateCQ(entries int, events bool, vector int) (CQ, error)
}

// Access are the rights on a memory region; local read is always given.
type Access uint8

// Access rights. AccessRemoteWrite includes AccessLocalWrite.
//
// AccessRemoteInvalidate lets the peer end the remote key, by SEND with invalidate. The
// region then has none until ReregisterMR. Without it, such a SEND ends the connection with a remote
// access error, and the key stays: a peer may only take back what it was offered (IBTA vol 1,
// 10.6.7.2). A provider that cannot do it for ordinary regions gives ErrUnsupported.
const (
	AccessLocalWrite Access = 1 << iota
	AccessRemoteRead
	AccessRemoteWrite
	AccessRemoteInvalidate
)

// PD is a protection domain.
type PD interface {
	// AllocMR maps length bytes (rounded up to pages), populates and
	// registers them.
	AllocMR(length int, access Access) (MR, error)
	// ReregisterMR registers a region of another domain of this provider here
	// instead, perhaps on another device: the same memory at the same address
	// with the same rights, and new keys. Nothing may use the region meanwhile.
	// On an error it is where it was. A region may have been Released before.
	ReregisterMR(mr MR) error
	Close() error
}

// MR is a registered memory region.
type MR interface {
	Bytes() []byte // off the Go heap, page aligned, zeroed at first
	Addr() uint64  // address to name in an SGE or to the peer
	LKey() uint32
	RKey() uint32
	// Release ends the registration and keeps the memory, until ReregisterMR
	// registers it again. Idempotent.
	Release() error
	Close() error
}

// QPConfig sizes a queue pair. Every send WR states itself whether it is
// signaled.
type QPConfig struct {
	SendCQ, RecvCQ CQ
	MaxSendWR      int
	MaxRecvWR      int
	MaxSendSGE     int // 1..MaxSGE
	MaxRecvSGE     int
}

// QP is a reliable-connected queue pair.
type QP interface {
	Num() uint32
	// PostSend posts wrs in order and says how many were taken; all of them
	// unless err. The slice is the caller's again when it returns.
	PostSend(wrs []SendWR) (int, error)
	PostRecv(wrs []RecvWR) (int, error)
	// Fail moves the QP to the error state: outstanding work requests will
	// complete with WCFlushErr. When it returns, the peer can no longer read
	// or write our memory through this QP. Idempotent.
	Fail() error
}

// SGE names a piece of registered memory.
type SGE struct {
	Addr   uint64
	Length uint32
	LKey   uint32
}

// SendOp is the operation of a send work request.
type SendOp uint8

// Send operations.
const (
	SendUnset      SendOp = iota
	Send                  // SEND
	SendInvalidate        // SEND with invalidate of the peer's RKey
	Write                 // RDMA WRITE to RemoteAddr, RKey
	Read                  // RDMA READ from RemoteAddr, RKey
)

// SendWR is a send work request. The struct has no pointers.
type SendWR struct {
	ID         uint64
	RemoteAddr uint64 // Write, Read
	RKey       uint32 // Write, Read; the key to invalidate for SendInvalidate
	Op         SendOp
	Signaled   bool
	NumSGE     uint8 // 0..2; 0 carries no bytes, and a Write of none needs no key
	SGE        [2]SGE
}

// RecvWR is a receive work request of one element.
type RecvWR struct {
	ID  uint64
	SGE SGE
}

// WCStatus is the outcome of a work request (ibv_wc_status, same numbers).
type WCStatus uint8

// Outcomes that callers tell apart; String knows all.
const (
	WCSuccess      WCStatus = 0
	WCLocalProt    WCStatus = 4
	WCFlushErr     WCStatus = 5
	WCRemoteAccess WCStatus = 10
	WCRetryExc     WCStatus = 12
	WCRNRRetryExc  WCStatus = 13
)

var wcNames = [...]string{
	"success", "local length error", "local QP operation error", "local EE context operation error",
	"local protection error", "work request flushed", "memory window bind error", "bad response",
	"local access error", "remote invalid request", "remote access error", "remote operation error",
	"transport retry counter exceeded", "receiver-not-ready retry counter exceeded",
	"local RDD violation", "remote invalid RD request", "remote aborted", "invalid EE context number",
	"invalid EE context state", "fatal error", "response timeout", "general error",
}

func (s WCStatus) String() string {
	if int(s) < len(wcNames) {
		return wcNames[s]
	}
	return fmt.Sprintf("work completion status %d", s)
}

// WCFlags say what came with a receive.
type WCFlags uint8

// WCWithInvalidate says that the peer invalidated our key WC.InvalidatedKey.
const WCWithInvalidate WCFlags = 1

// WC is a work completion. With Status != WCSuccess only ID, Status, QPNum and
// Vendor mean anything.
type WC struct {
	ID             uint64
	Bytes          uint32 // received bytes, receives only
	QPNum          uint32
	InvalidatedKey uint32
	Vendor         uint32
	Status         WCStatus
	Flags          WCFlags
	Recv           bool // completion of a receive
}

// CQ is a completion queue.
type CQ interface {
	// Poll fills wcs and says how many; 0 when there is none.
	Poll(wcs []WC) (int, error)
	// Arm asks for one event at the next completion. Error on a CQ without events.
	Arm() error
	// FD is non-blocking; each event is one 8-byte read. -1 without events, and after Close.
	FD() int
	// Ack accounts for n events that were read from FD.
	Ack(n int)
	Close() error
}

// Receiver is a CQ of a provider that handles packets in this process. The goroutine
// that polls it can take the packets too, instead of being woken by the provider after
// the provider took them.
type Receiver interface {
	CQ
	// PacketFD is readable when there are packets for the CQ's QP; the caller waits
	// for that and does not read. It is -1 if several QPs share the packets, which the
	// provider takes then, and after Close. Until Close it stays the caller's to wait
	// for, even if the QP or the provider is closed.
	PacketFD() int
	// Receive takes packets that are there, a bounded number; the provider takes the
	// others. Work requests that they complete make no event, so call Poll next. It
	// counts as a Poll for the rule of one goroutine at a time.
	Receive()
	// Receiving tells the provider whether the caller will call Receive when PacketFD
	// is readable. Without that, and when no call has come for a second, the provider
	// takes the packets. Any goroutine.
	Receiving(on bool)
}

// StepError is a step of connection management that failed.
type StepError struct {
	Step string // "resolve address", "resolve route", "connect", "accept", …
	Peer netip.AddrPort
	Err  error // what the library said, or the context's error
}

func (e *StepError) Error() string { return fmt.Sprintf("%s %s: %v", e.Step, e.Peer, e.Err) }
func (e *StepError) Unwrap() error { return e.Err }

// RejectError is a connect request that the peer refused.
type RejectError struct {
	Peer    netip.AddrPort
	Reason  int    // IBTA CM REJ reason; 8 = nobody listens, 10 = stale connection, 28 = by the consumer
	Private []byte // the consumer's private data, only with Reason 28
}

func (e *RejectError) Error() string {
	return fmt.Sprintf("connect %s: rejected: %s", e.Peer, RejectReason(e.Reason))
}

// Reject reasons that callers tell apart (IBTA vol 1, 12.6.7.2).
const (
	RejectInvalidServiceID = 8
	RejectStaleConnection  = 10
	RejectConsumer         = 28
)

var rejectReasons = map[int]string{
	1: "no queue pair available", 2: "no end-to-end context available", 3: "no resources available",
	4: "timeout", 5: "unsupported request", 6: "invalid communication ID", 7: "invalid communication instance",
	8: "nobody listens on this port", 9: "invalid transport service type", 10: "stale connection",
	11: "RDC does not exist", 12: "primary remote port GID rejected", 13: "primary remote port LID rejected",
	14: "invalid primary SL", 15: "invalid primary traffic class", 16: "invalid primary hop limit",
	17: "invalid primary packet rate", 18: "alternate remote port GID rejected",
	19: "alternate remote port LID rejected", 20: "invalid alternate SL",
	21: "invalid alternate traffic class", 22: "invalid alternate hop limit",
	23: "invalid alternate packet rate", 24: "port and CM redirection", 25: "port redirection",
	26: "invalid path MTU", 27: "insufficient responder resources", 28: "refused by the target",
	29: "RNR retry count rejected", 30: "duplicate local communication ID", 31: "invalid class version",
	32: "invalid flow label", 33: "invalid alternate flow label",
}

// RejectReason is the text of a CM REJ reason code.
func RejectReason(code int) string {
	if s, ok := rejectReasons[code]; ok {
		return s
	}
	return fmt.Sprintf("reason %d", code)
}

// Errors that callers branch on.
var (
	ErrClosed      = errors.New("rdma: closed")
	ErrNoDevice    = errors.New("rdma: no RDMA device")
	ErrUnsupported = errors.New("rdma: not supported by the provider")
)
