// Package control is the protocol between a server and the command: HTTP and JSON
// over the Unix socket of the server.
//
//	GET  /v1/status                      → 200 Status
//	GET  /metrics                        → 200 the same for Prometheus (docs/metrics.md)
//	POST /v1/disconnect {"force": true}  → 200 when everything has ended, or an exit.Error:
//	                                       409 if a device is in use, else 500
//	POST /v1/replace {"program": "/path"} → 200 with the process id of the new server, when
//	                                        it has begun to take over
//	POST /v1/query Query                 → 200 QueryResult
//	POST /v1/reservation Reservation     → 200 QueryResult
//	POST /v1/reset                       → 200 when the controller is connected again
//	POST /v1/rescan                      → 200 at once
//	POST /v1/path/add PathRequest        → 200 when the path is in use
//	POST /v1/path/remove PathRequest     → 200 when the path is gone
//	POST /v1/policy PolicyRequest        → 200
//	POST /v1/reauth Reauthentication     → 200 when the connection is authenticated again
//
// What a server refuses is an exit.Error: 400 if the request makes no sense, 409 if it does
// not suit the state of the server, else 500.
package control

import "strings"

// SchemaVersion is that of Status.
const SchemaVersion = 1

// Status is what a server says of itself. Sizes are in bytes, times in seconds.
type Status struct {
	SchemaVersion int    `json:"schema_version"`
	Name          string `json:"name"`
	PID           int    `json:"pid"`

	// Managed says that a service manager runs the server.
	Managed bool `json:"managed,omitempty"`

	Transport  string `json:"transport"`
	TrAddr     string `json:"traddr"`
	TrSvcID    string `json:"trsvcid"`
	HostTrAddr string `json:"host_traddr,omitempty"`
	HostIface  string `json:"host_iface,omitempty"`
	NQN        string `json:"subsysnqn"`
	HostNQN    string `json:"hostnqn"`
	HostID     string `json:"hostid"`
	Context    string `json:"context,omitempty"`
	Owner      string `json:"owner,omitempty"`

	State  string `json:"state"`            // live, dead, …; "lost" of a server that is no more
	Since  string `json:"since,omitempty"`  // when the state began, RFC 3339
	Reason string `json:"reason,omitempty"` // why it is not live, or was not the last time
	// Losses counts how often the association was lost, Attempts how often it was
	// tried to make it again since then.
	Losses   int    `json:"losses"`
	Attempts int    `json:"attempts"`
	Failure  string `json:"failure,omitempty"` // of the last attempt, while it is not live
	// Outages has what these are part of, from the start of the server.
	Outages Outages `json:"outages"`

	// Paths are the controllers over which the subsystem is reached. What follows here, and
	// the address above, is about the first of them.
	Paths  []Path  `json:"paths,omitempty"`
	Policy string  `json:"policy,omitempty"` // queue-depth, round-robin or preferred
	Fence  string  `json:"fence,omitempty"`  // auto or none
	Fences []Fence `json:"fences,omitempty"` // what writes wait for
	// Authentication is the hash, the group, and whether both sides proved who they are;
	// empty if the target did not ask.
	Authentication string `json:"authentication,omitempty"`

	CNTLID   uint16 `json:"cntlid"`
	Version  string `json:"nvme_version"`
	Model    string `json:"model"`
	Serial   string `json:"serial"`
	Firmware string `json:"firmware_rev"`

	Frontend       string `json:"frontend"` // ublk, nbd, nbd-socket or vhost-user-blk
	FrontendReason string `json:"frontend_reason,omitempty"`

	Provider string `json:"provider"`
	// ProviderReason says why it is this provider.
	ProviderReason string `json:"provider_reason,omitempty"`
	RDMADevice     string `json:"rdma_device"`
	// Memory says how the target gets at I/O memory: "registered" is one key for
	// many buffers, from their first use to the end of the device.
	Memory string `json:"memory_mode"`
	// ZeroCopy names memory that the target can access beside the I/O buffers, because the
	// users of the devices do I/O from it: "guests". RegionBytes is how much it is at present.
	// Places is in how many pieces of that memory the data of a request may be without a copy; 0:
	// a server that does not say, or nothing is connected.
	ZeroCopy    string `json:"zero_copy,omitempty"`
	RegionBytes int64  `json:"region_bytes,omitempty"`
	Places      int    `json:"zero_copy_places,omitempty"`

	InCapsule int    `json:"in_capsule_bytes"`
	SQFlow    bool   `json:"sq_flow_control"`
	QueueSize int    `json:"queue_size"`
	Queues    Queues `json:"queues"`

	KeepAlive int `json:"keep_alive_tmo"`
	Reconnect int `json:"reconnect_delay"`
	Loss      int `json:"ctrl_loss_tmo"`    // -1: for ever
	FastFail  int `json:"fast_io_fail_tmo"` // -1: off
	TOS       int `json:"tos"`              // 0: unset
	PollMax   int `json:"poll_max_size"`

	BufferBytes int `json:"buffer_bytes"` // I/O memory of all devices
	// ReservedBytes is address space for I/O buffers, RegisteredBytes the part of it that is
	// registered because it has been needed, RegisteredLimit the most that may be reserved.
	ReservedBytes   int64    `json:"reserved_bytes"`
	RegisteredBytes int64    `json:"registered_bytes"`
	RegisteredLimit int64    `json:"registered_limit_bytes"`
	Requests        Requests `json:"requests"`
	// DurationBounds are the upper bounds of the buckets of all Durations, in seconds.
	DurationBounds []float64 `json:"duration_bounds,omitempty"`
	// Stages has the parts of the time that requests take (queue, wire, return), by stage
	// and operation.
	Stages  map[string]map[string]Durations `json:"stages,omitempty"`
	Devices []Device                        `json:"devices"`
	Lanes   []Lane                          `json:"lanes"`
	Packets *Packets                        `json:"packets,omitempty"` // of the provider roce
}

// Path is a controller over which a subsystem is reached.
type Path struct {
	Path       string `json:"path"` // as --path takes it
	TrAddr     string `json:"traddr"`
	TrSvcID    string `json:"trsvcid"`
	HostTrAddr string `json:"host_traddr,omitempty"`
	State      string `json:"state"`
	CNTLID     uint16 `json:"cntlid"` // 0: it is not connected
	Provider   string `json:"provider"`
	RDMADevice string `json:"rdma_device"`
	Preferred  bool   `json:"preferred,omitempty"`
	// ANA has the state of each namespace of which the controller reports one, by number.
	ANA       map[string]string `json:"ana"`
	InFlight  int               `json:"in_flight"` // requests
	Failovers uint64            `json:"failovers"` // requests that were in flight when it was lost
	Held      int               `json:"held"`      // writes, zeroes and discards that wait for the end of its old controllers
	Losses    int               `json:"losses"`
	Attempts  int               `json:"attempts"` // to connect again, since the last loss
	// Vouched are the addresses of the paths whose controllers the target of this path
	// knows, so that it can say when they are gone.
	Vouched   []string `json:"vouched"`
	LastError string   `json:"last_error,omitempty"`
}

// Fence is an old controller that may still execute writes. These, and those that overlap
// them, wait.
type Fence struct {
	Path     string `json:"path"` // address of the lost path
	CNTLID   uint16 `json:"cntlid"`
	Since    string `json:"since"`     // of the loss, RFC 3339
	Changes  int    `json:"changes"`   // writes, zeroes and discards whose outcome is unknown
	WaitsFor string `json:"waits_for"` // in words
}

// PathRequest asks to add or remove a path, in the form of --path. The other fields are for a path
// that is added.
type PathRequest struct {
	Path string `json:"path"`
	// Keep keeps a path that cannot be connected, so that it is tried again.
	Keep bool `json:"keep,omitempty"`
	// Host and Controller are the keys that are wanted for the path. Empty ones are those of the
	// server, and "none" means that there is none.
	Host       string `json:"dhchap_secret,omitempty"`
	Controller string `json:"dhchap_ctrl_secret,omitempty"`
}

// PolicyRequest asks to change how paths are chosen. Preferred is a path in the form of --path,
// or empty.
type PolicyRequest struct {
	Policy    string `json:"policy"`
	Preferred string `json:"preferred,omitempty"`
}

// Outages are the times without a connection to the target.
type Outages struct {
	Unavailable float64        `json:"unavailable"` // seconds in all
	Losses      map[string]int `json:"losses"`      // associations lost, by reason
	Attempts    int            `json:"attempts"`    // to make one again
	Reconnects  int            `json:"reconnects"`  // of these, successful ones
}

// Requests are the requests that have not ended.
type Requests struct {
	InFlight int64   `json:"in_flight"` // all of them
	Held     int64   `json:"held"`      // those that cannot be sent at present
	Oldest   float64 `json:"oldest"`    // age in seconds of the oldest command with the target; whole seconds
}

// Durations is how long some of the requests took: about one in 64 is timed. Buckets has
// the number of requests in each bucket, the last one of those beyond the last bound.
type Durations struct {
	Buckets []uint64 `json:"buckets"`
	Sum     float64  `json:"sum"` // seconds
}

// Packets counts what RoCEv2 in this process sent and received, and what went wrong
// with it. It counts from the server's start.
type Packets struct {
	Sent          uint64 `json:"sent"`
	Received      uint64 `json:"received"` // valid ones
	Retransmitted uint64 `json:"retransmitted"`
	Timeouts      uint64 `json:"timeouts"`        // of the retry timer
	OutOfSequence uint64 `json:"out_of_sequence"` // received after a gap
	Duplicates    uint64 `json:"duplicates"`      // requests of the target that had been seen
	NAKsSent      uint64 `json:"naks_sent"`       // sequence errors
	NAKsReceived  uint64 `json:"naks_received"`   // the same
	RNRNAKs       uint64 `json:"rnr_naks"`        // received: the target had no room
	BadICRC       uint64 `json:"bad_icrc"`        // dropped
	Dropped       uint64 `json:"dropped"`         // for other reasons: malformed, for nobody, from a stranger
	Congestion    uint64 `json:"congestion"`      // marks of routers, and notifications of the target
	// DroppedBy has the packets of Dropped and BadICRC by reason.
	DroppedBy map[string]uint64 `json:"dropped_by,omitempty"`
}

// Queues are the I/O queues: how many were asked for and granted, and what
// became of each class.
type Queues struct {
	Requested int   `json:"requested"`
	Granted   int   `json:"granted"`
	Read      Class `json:"read"`
	Default   Class `json:"default"`
	Poll      Class `json:"poll"`
}

// Class is a class of queues. Mapped is the class whose queues serve its
// requests: its own name, or "default".
type Class struct {
	Requested int    `json:"requested"`
	Granted   int    `json:"granted"`
	Mapped    string `json:"mapped"`
}

// Device is a block device that the server serves.
type Device struct {
	Device string `json:"device"` // ublkb0, nbd0, an NBD URI, or the path of a vhost-user-blk socket
	// User is the front end that is connected to a vhost-user-blk socket.
	User string `json:"user,omitempty"`
	NSID uint32 `json:"nsid"`
	UUID string `json:"uuid,omitempty"`
	Size uint64 `json:"size"`
	// Used is the part of Size that the target has allocated; nil: unknown.
	Used        *uint64 `json:"used,omitempty"`
	BlockSize   uint32  `json:"block_size"`
	ReadOnly    bool    `json:"read_only"`
	WriteCache  bool    `json:"write_cache"`
	Queues      int     `json:"queues"`
	QueueDepth  int     `json:"queue_depth"`
	MaxIO       int     `json:"max_io_size"`
	BufferBytes int     `json:"buffer_bytes"`
	Counters    IO      `json:"counters"`
	// Present says whether the target has the namespace, so that requests are sent.
	Present bool `json:"present"`
	// Wait says why requests are not sent at present; nil: they are sent.
	Wait *Wait `json:"wait,omitempty"`
	// Durations has how long requests took, by operation.
	Durations map[string]Durations `json:"durations,omitempty"`
}

// Wait says why the requests of a device are not sent.
type Wait struct {
	Since  string `json:"since"` // RFC 3339
	Reason string `json:"reason"`
	// FailIn is the number of seconds until the requests fail: 0 if they fail already, null if they
	// wait until the server gives the subsystem up.
	FailIn *int64 `json:"fail_in"`
}

// Path is the block device's node, or the path of its socket, or its URI.
func (d Device) Path() string {
	if strings.Contains(d.Device, "://") || strings.HasPrefix(d.Device, "/") {
		return d.Device
	}
	return "/dev/" + d.Device
}

// IO counts completed requests.
type IO struct {
	Reads        uint64 `json:"reads"`
	Writes       uint64 `json:"writes"`
	ReadBytes    uint64 `json:"read_bytes"`
	WrittenBytes uint64 `json:"written_bytes"`
	DirectBytes  uint64 `json:"direct_bytes"` // of both, those that were not copied
	Flushes      uint64 `json:"flushes"`
	Discards     uint64 `json:"discards"`
	WriteZeroes  uint64 `json:"write_zeroes"`
	Errors       uint64 `json:"errors"`
	Batches      uint64 `json:"batches"`
	// Failed has the requests of Errors by operation, as far as they have one.
	Failed Failures `json:"failed"`
}

// Failures are failed requests by operation.
type Failures struct {
	Reads       uint64 `json:"reads"`
	Writes      uint64 `json:"writes"`
	Flushes     uint64 `json:"flushes"`
	Discards    uint64 `json:"discards"`
	WriteZeroes uint64 `json:"write_zeroes"`
}

// Lane counts what one loop did: for the NVMe side, and in system calls.
type Lane struct {
	Submitted     uint64 `json:"submitted"`
	Completed     uint64 `json:"completed"`
	HandedOver    uint64 `json:"handed_over"` // requests that another loop's queue served
	Retried       uint64 `json:"retried"`
	Passes        uint64 `json:"passes"`
	Enters        uint64 `json:"enters"` // io_uring_enter calls
	Waits         uint64 `json:"waits"`
	BlockingWaits uint64 `json:"blocking_waits"`
	Spins         uint64 `json:"spins"`
	// Busy, Spin and Sleep are how the loop has spent its time, in seconds.
	Busy  float64 `json:"busy"`
	Spin  float64 `json:"spin"`
	Sleep float64 `json:"sleep"`
}

// Query is an admin command that changes nothing, for the controller (see
// initiator.Subsystem.Query).
type Query struct {
	Command []byte `json:"command"` // 64 bytes
	Length  int    `json:"length"`  // bytes of data
	// Path is the path over which it is sent, in the form of --path; empty: the first that is
	// connected.
	Path string `json:"path,omitempty"`
}

// Reservation is a reservation command for a namespace that the server serves (see
// initiator.Namespace.Reserve).
type Reservation struct {
	NSID    uint32 `json:"nsid"`
	Command []byte `json:"command"` // 64 bytes
	Data    []byte `json:"data"`    // keys, or zeroes as long as the report
}

// Reauthentication has the keys to authenticate with from now on. An empty one stays as it
// is, and for "none" there is none from now on.
type Reauthentication struct {
	Host       string `json:"dhchap_secret,omitempty"`
	Controller string `json:"dhchap_ctrl_secret,omitempty"`
	// Timeout is the time limit in seconds; 0: a minute.
	Timeout int `json:"timeout,omitempty"`
}

// QueryResult is what the controller answered.
type QueryResult struct {
	Result uint64 `json:"result"`
	Data   []byte `json:"data,omitempty"`
	Path   string `json:"path,omitempty"` // over which it was asked, if there are several
}
