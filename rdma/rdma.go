// Package rdma defines the RDMA verbs and the RDMA connection manager as far as this
// module needs them: interfaces, work requests, completions and errors. Three providers
// implement it: rdma/verbs with libibverbs and librdmacm, rdma/roce with RoCEv2 over UDP,
// and rdma/rdmatest within the process.
//
// # Ownership
//
// Registered memory is off the Go heap. Either the provider allocates it (PD.AllocMR), and it
// stays mapped until MR.Close, or it is the caller's (PD.RegMR). It stays pinned until
// MR.Close. Close objects in the reverse order of their creation: the ID (which
// destroys its QP) before the CQs and MRs that the QP used, and those before the PD. In
// another order, Close works, or changes nothing and returns EBUSY. After Close of an
// object or of its provider, every method returns an error (ErrClosed) or does nothing,
// except that the memory of MR.Bytes is gone. A provider never uses a descriptor number
// after it closed the descriptor.
//
// # Concurrency
//
// One goroutine at a time may call PostSend of a QP, and one at a time PostRecv. One
// goroutine at a time may call Poll, Arm and Ack of a CQ. Any goroutine may call all other
// methods. These five methods allocate no memory.
//
// # Hazards
//
//  1. When a QP leaves the ready state because of an error, its outstanding work
//     requests complete with WCFlushErr, in any order. Until QP.Fail has returned, the
//     peer may write to memory whose key it has (rdma/verbs documents an exception).
//  2. A CQ event is one 8-byte read from CQ.FD. The reader of n events must call
//     Ack(n) before Close, or Close waits forever.
//  3. Call Arm before the last Poll, not after it: a completion that arrives between
//     Poll and Arm causes no event.
//  4. The slot of a send work request becomes free when the completion of that request,
//     or of a later one, has been polled. So at least one of any MaxSendWR consecutive
//     work requests must be signaled.
package rdma

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
)

// Provider makes connections.
type Provider interface {
	// Name returns the name that --provider and the logs use.
	Name() string
	// Resolve finds the device and the route to remote, a unicast address and port. If
	// local is valid, it is the source address. ctx limits both steps. A tos < 0 keeps
	// the default type of service. Errors are of type *StepError.
	Resolve(ctx context.Context, local netip.Addr, remote netip.AddrPort, tos int) (ID, error)
	// Listen listens for connections to addr. If the port is 0, it chooses one.
	Listen(addr netip.AddrPort, backlog int) (Listener, error)
}

// Leaver is a Provider that can end a connection of a process that has died, whose peer would not
// notice that for a while. The kernel ends those of the other providers.
type Leaver interface {
	// Leave tells the peer that the connection has ended, and waits for its answer.
	// connection is the trace of an ID of the dead process.
	Leave(ctx context.Context, connection string) error
}

// Traced is an ID of a Leaver.
type Traced interface {
	// Trace returns what Leave needs to know, or "" without a connection.
	Trace() string
}

// ID is a connection identifier (rdma_cm_id): first resolved or requested,
// then given a QP, then connected.
type ID interface {
	// Device returns the RDMA device of the route. It stays open as long as any ID on
	// it.
	Device() Device
	LocalAddr() netip.AddrPort
	RemoteAddr() netip.AddrPort
	// PrivateData returns the private data of the peer's connect request, at most 56
	// bytes for the RC service. Call it on an ID from a Listener, before Accept. Private
	// data of requests, answers and rejects may be padded with zeros.
	PrivateData() []byte
	// CreateQP makes the one reliable-connected QP of this ID.
	CreateQP(pd PD, cfg QPConfig) (QP, error)
	// Connect sends the request, waits for the answer, and returns the peer's private
	// data. Errors are of type *RejectError or *StepError. Post receives before.
	Connect(ctx context.Context, p ConnParam) (private []byte, err error)
	// Accept answers a request from a Listener, and waits until the connection is
	// established. Until then nothing proves that the peer exists, so allocate memory
	// for the connection afterwards if possible. Accept returns an error if the peer
	// does not answer, or if the provider ends the handshake in favor of others. The
	// caller must still call Close.
	Accept(ctx context.Context, p ConnParam) error
	// Reject refuses a request from a Listener. private has at most 148 bytes.
	Reject(private []byte) error
	// Events returns the channel of the events of an established connection. The channel
	// is buffered and never blocks the provider: it keeps the first event and drops later
	// ones when it is full. Close closes it.
	Events() <-chan Event
	// Disconnect sends a disconnect request (DREQ) and does not wait for the answer. The
	// local QP goes to the error state.
	Disconnect() error
	// Close destroys the QP and the ID. It is idempotent, and its time is limited even if
	// the peer is silent.
	Close() error
}

// Listener accepts connection requests. The provider limits the number of unfinished
// handshakes (roce.Config.MaxHalfOpen); the caller limits the number of established
// connections.
type Listener interface {
	Addr() netip.AddrPort
	// Accept waits for the next request. The caller must answer it with ID.Accept or
	// ID.Reject.
	Accept(ctx context.Context) (ID, error)
	Close() error
}

// ConnParam holds the parameters of a connect request or of its answer (rdma_conn_param).
type ConnParam struct {
	PrivateData        []byte // at most 56 bytes in a request, 196 in an answer
	ResponderResources uint8  // largest number of concurrent RDMA READs of the peer
	InitiatorDepth     uint8  // largest number of concurrent RDMA READs to the peer
	RetryCount         uint8  // 0..7
	RNRRetryCount      uint8  // 0..7; 7: no limit
	FlowControl        bool
}

// EventType is the type of a connection event.
type EventType uint8

// Connection events
const (
	EventUnset         EventType = iota
	EventDisconnected            // the peer left, or the connection broke
	EventDeviceRemoved           // the RDMA device is being removed
	EventAddrChange              // the route of the connection changed
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

// Event is one connection event. Detail describes it in the provider's own terms.
type Event struct {
	Type   EventType
	Detail string
}

// DeviceAttr holds the limits of a device (ibv_device_attr).
type DeviceAttr struct {
	Name            string
	MaxQPWR         int // work requests per send or receive queue
	MaxSGE          int // scatter/gather elements per work request
	MaxCQE          int
	MaxMR           int
	MaxMRSize       uint64
	MaxQPReadAtomic int  // RDMA READs of the peer per QP that the device can serve concurrently
	CompVectors     int  // completion vectors, ≥ 1
	MemoryWindows   bool // type 2 memory windows
	// Software means that the CPU of this process handles each packet. Then several small RDMA
	// READs or WRITEs cost more than a large one and a copy.
	Software bool
}

// Device is an open RDMA device.
type Device interface {
	Attr() DeviceAttr
	AllocPD() (PD, error)
	// CreateCQ makes a completion queue of at least the given number of entries. With
	// events, it has its own completion channel and FD is ≥ 0. Without, it can only
	// be polled. vector is taken modulo CompVectors.
	CreateCQ(entries int, events bool, vector int) (CQ, error)
	// Removed returns a channel that is closed when the device is removed. Some drivers
	// wait until nothing on the device is open any more. The channel of a device that
	// cannot be removed is nil.
	Removed() <-chan struct{}
}

// Access is the set of rights on a memory region. Local read is always allowed.
type Access uint8

// Access rights. AccessRemoteWrite includes AccessLocalWrite.
//
// AccessRemoteInvalidate allows the peer to invalidate the remote key by SEND with
// invalidate. The region then has no remote key. Without this right, such a SEND ends the
// connection with a remote access error, and the key stays valid (IBTA vol 1, 10.6.7.2). A
// provider that does not support the right for ordinary regions returns
// ErrUnsupported.
const (
	AccessLocalWrite Access = 1 << iota
	AccessRemoteRead
	AccessRemoteWrite
	AccessRemoteInvalidate
)

// PD is a protection domain.
type PD interface {
	// AllocMR maps length bytes, rounded up to pages, populates them and registers them.
	AllocMR(length int, access Access) (MR, error)
	// RegMR registers memory that exists. The memory is off the Go heap and page aligned,
	// and stays mapped until Close of the region has succeeded. The same memory may be in
	// any number of regions, in any domains of any providers. Its address is the same in
	// all of them, and each region has keys of its own.
	RegMR(mem []byte, access Access) (MR, error)
	Close() error
}

// MR is a registered memory region.
type MR interface {
	Bytes() []byte // off the Go heap, page aligned; of AllocMR: zeroed at first
	Addr() uint64  // address for an SGE or for the peer
	LKey() uint32
	RKey() uint32
	// Close ends the registration, and unmaps the memory if AllocMR allocated it.
	Close() error
}

// QPConfig holds the sizes of a queue pair. Each send work request has its own Signaled
// flag.
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
	// PostSend posts wrs in order and returns the number of posted work requests, which is
	// less than len(wrs) only if err is not nil. It does not keep the slice.
	PostSend(wrs []SendWR) (int, error)
	PostRecv(wrs []RecvWR) (int, error)
	// Fail moves the QP to the error state. Outstanding work requests complete with
	// WCFlushErr. When Fail returns, the peer can no longer read or write local memory
	// through this QP. It is idempotent.
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

// Send operations
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
	RKey       uint32 // for Write and Read; the key to invalidate for SendInvalidate
	Op         SendOp
	Signaled   bool
	NumSGE     uint8 // 0..2; with 0 there is no data, and a Write needs no key
	SGE        [2]SGE
}

// RecvWR is a receive work request with one element.
type RecvWR struct {
	ID  uint64
	SGE SGE
}

// WCStatus is the outcome of a work request (ibv_wc_status, same numbers).
type WCStatus uint8

// Outcomes that callers distinguish. String names all of them.
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
	"local protection error", "connection dropped (work request flushed)", "memory window bind error", "bad response",
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

// WCFlags are the flags of a receive completion.
type WCFlags uint8

// WCWithInvalidate is set if the peer invalidated the local region's key
// WC.InvalidatedKey.
const WCWithInvalidate WCFlags = 1

// WC is a work completion. If Status is not WCSuccess, only ID, Status, QPNum and Vendor
// are valid.
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
	// Poll stores completions in wcs and returns their number, which may be 0.
	Poll(wcs []WC) (int, error)
	// Arm requests one event at the next completion. It fails on a CQ without events.
	Arm() error
	// FD returns a non-blocking descriptor; each event is one 8-byte read. It returns -1
	// on a CQ without events, and after Close.
	FD() int
	// Ack acknowledges n events that were read from FD.
	Ack(n int)
	Close() error
}

// Receiver is a CQ of a provider that handles packets in this process. The goroutine
// that polls the CQ can take the packets itself. Otherwise the provider takes them and
// then wakes that goroutine.
type Receiver interface {
	CQ
	// PacketFD returns a descriptor that is readable when there are packets for the CQ's
	// QP. The caller may wait for that, but must not read. It is -1 after Close, and if
	// several QPs share the packets, because then the provider takes them. Until Close
	// the caller may wait for the descriptor, even if the QP or the provider is closed.
	PacketFD() int
	// Receive takes a limited number of packets; the provider takes the others. Work
	// requests that these packets complete cause no event, so call Poll next. Receive
	// counts as Poll for the rule of one goroutine at a time.
	Receive()
	// Receiving tells the provider whether the caller will call Receive when PacketFD is
	// readable. If it is off, or if Receive has not been called for a second, the provider
	// takes the packets. Any goroutine may call it.
	Receiving(on bool)
}

// StepError names the step of connection management that failed.
type StepError struct {
	Step string // "resolve address", "resolve route", "connect", "accept", …
	Peer netip.AddrPort
	Err  error // error of the library or of the context
}

func (e *StepError) Error() string { return fmt.Sprintf("%s %s: %v", e.Step, e.Peer, e.Err) }
func (e *StepError) Unwrap() error { return e.Err }

// RejectError means that the peer refused a connect request.
type RejectError struct {
	Peer    netip.AddrPort
	Reason  int    // IBTA CM REJ reason, for example 8: no listener, 10: stale connection, 28: refused by the consumer
	Private []byte // the consumer's private data, only with Reason 28
}

func (e *RejectError) Error() string {
	return fmt.Sprintf("connect %s: rejected: %s", e.Peer, RejectReason(e.Reason))
}

// Reject reasons that callers distinguish (IBTA vol 1, 12.6.7.2).
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

// RejectReason returns the text of a CM REJ reason code.
func RejectReason(code int) string {
	if s, ok := rejectReasons[code]; ok {
		return s
	}
	return fmt.Sprintf("reason %d", code)
}

// Errors for errors.Is
var (
	ErrClosed      = errors.New("rdma: closed")
	ErrNoDevice    = errors.New("rdma: no RDMA device")
	ErrUnsupported = errors.New("rdma: not supported by the provider")
)
