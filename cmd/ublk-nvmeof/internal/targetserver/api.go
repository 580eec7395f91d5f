package targetserver

import "ublk-nvmeof/cmd/ublk-nvmeof/internal/options"

// SchemaVersion is the version of Status.
const SchemaVersion = 1

// Status describes a target. Sizes are in bytes.
type Status struct {
	SchemaVersion int    `json:"schema_version"`
	Name          string `json:"name"`
	PID           int    `json:"pid"`

	TrAddr         string `json:"traddr"`
	TrSvcID        string `json:"trsvcid"`
	Provider       string `json:"provider"`
	ProviderReason string `json:"provider_reason"`

	Subsystems  []Subsystem  `json:"subsystems"`
	Referrals   []string     `json:"referrals,omitempty"` // to other discovery services, as address:port
	Controllers []Controller `json:"controllers"`
	Ports       []Port       `json:"ports,omitempty"`
	Faults      Faults       `json:"faults"`

	Connections int    `json:"connections"` // current connections
	QueueMemory int64  `json:"queue_memory"`
	Connects    uint64 `json:"connects"` // accepted since the start
	Rejects     uint64 `json:"rejects"`  // refused since the start
	// Refusals are connect requests and Connect commands that were refused since
	// the start, by reason.
	Refusals   map[string]uint64 `json:"refusals"`
	Reads      uint64            `json:"reads"`
	Writes     uint64            `json:"writes"`
	ReadBytes  uint64            `json:"read_bytes"`
	WriteBytes uint64            `json:"write_bytes"`
	Errors     uint64            `json:"errors"`
}

// Port is an address on which a target listens.
type Port struct {
	ID      uint16 `json:"id"`
	TrAddr  string `json:"traddr"`
	TrSvcID string `json:"trsvcid"`
}

// Subsystem is a subsystem of a target.
type Subsystem struct {
	NQN        string   `json:"subsysnqn"`
	MaxQueues  int      `json:"max_queues"`
	AllowHosts []string `json:"allow_hosts,omitempty"` // empty: any host
	// ANA has the states of groups that were set, by group, or by group and port ("1 over port 2").
	ANA        map[string]string `json:"ana,omitempty"`
	Auth       []HostAuth        `json:"auth,omitempty"` // of the hosts that must authenticate
	Namespaces []NamespaceStatus `json:"namespaces"`
}

// HostAuth says how a host must authenticate. Empty lists mean all.
type HostAuth struct {
	HostNQN       string   `json:"hostnqn"`
	ControllerKey bool     `json:"dhchap_ctrl_key"` // controllers can prove who they are
	Hashes        []string `json:"hashes,omitempty"`
	Groups        []string `json:"dhgroups,omitempty"`
	Queues        string   `json:"queues"` // all or admin
}

// NamespaceStatus describes a namespace. Data is "ram", or the path of the file or
// device that holds its data.
type NamespaceStatus struct {
	NSID      uint32 `json:"nsid"`
	Data      string `json:"data"`
	Size      int64  `json:"size"`
	BlockSize int    `json:"block_size"`
	ReadOnly  bool   `json:"read_only"`
	UUID      string `json:"uuid,omitempty"`
	// NewAtStart says that the namespace gets a new UUID at each start of the
	// target.
	NewAtStart bool `json:"new_at_start,omitempty"`
}

// Controller is a connected host.
type Controller struct {
	CNTLID  uint16 `json:"cntlid"`
	NQN     string `json:"subsysnqn"`
	HostNQN string `json:"hostnqn"`
	Queues  int    `json:"queues"` // I/O queues
	// Ending says that the controller has ended, but some of its commands have not.
	Ending bool `json:"ending,omitempty"`
}

// Faults are the faults of a target.
type Faults struct {
	Grant    string  `json:"grant,omitempty"`   // number of queues that is granted, whatever the host asks for
	Stalled  bool    `json:"stalled,omitempty"` // the target begins no command
	Frozen   bool    `json:"frozen,omitempty"`  // the target does nothing at all
	Hidden   bool    `json:"hidden,omitempty"`  // no namespace is listed
	Reject   string  `json:"reject,omitempty"`  // reason for rejecting connect requests
	Refuse   string  `json:"refuse,omitempty"`  // status of all Connect commands
	Commands []Fault `json:"commands"`
}

// Fault is a fault of commands. See options.FaultWords.
type Fault struct {
	ID   int    `json:"id"`
	What string `json:"fault"`
	// UsedUp says that the fault has applied to as many commands as it may
	// (count=N).
	UsedUp bool `json:"used_up,omitempty"`
}

// Requests of the control socket. An empty NQN means all subsystems, or, in a request
// about one subsystem, the only one.
type (
	// GrantRequest changes the largest number of I/O queues of a controller that
	// connects next to Limit, 1..65535. If Exactly is set, the controller gets
	// Limit queues, whatever the host asks for, or an error if Limit is 0.
	GrantRequest struct {
		NQN     string `json:"subsysnqn,omitempty"`
		Limit   int    `json:"limit"`
		Exactly bool   `json:"exactly,omitempty"`
	}
	// DropRequest ends the connections of the queues with an id, or all connections
	// if QID is negative. With NQN or Port, QID must be negative.
	DropRequest struct {
		NQN  string `json:"subsysnqn,omitempty"`
		QID  int    `json:"qid"`
		Port uint16 `json:"port,omitempty"` // number of the port whose connections end; 0: any
	}
	// StallRequest makes the target begin no commands, or begin them again.
	StallRequest struct {
		On bool `json:"on"`
	}
	// FreezeRequest freezes the target for up to an hour. Zero ends the freeze.
	FreezeRequest struct {
		Milliseconds int64 `json:"milliseconds"`
	}
	// HideRequest hides all namespaces for up to an hour. Zero shows them.
	HideRequest struct {
		Milliseconds int64 `json:"milliseconds"`
	}
	// FaultRequest adds a fault. See options.FaultWords.
	FaultRequest struct {
		Fault string `json:"fault"`
	}
	// UnfaultRequest removes a fault, or everything in Faults if ID is 0.
	UnfaultRequest struct {
		ID int `json:"id"`
	}
	// RejectRequest rejects connect requests with an NVMe/RDMA status, 1..9. Zero
	// ends this.
	RejectRequest struct {
		Status int `json:"status"`
	}
	// RefuseRequest completes Connect commands with an NVMe status. Zero ends this.
	RefuseRequest struct {
		Status int `json:"status"`
	}
	// ANARequest sets the state of an ANA group.
	ANARequest struct {
		NQN   string `json:"subsysnqn,omitempty"`
		Group uint32 `json:"group"`
		State string `json:"state"`
		Port  uint16 `json:"port,omitempty"` // number of the port; 0: all
	}
	// AddRequest adds a namespace. See options.NamespaceWords.
	AddRequest struct {
		NQN       string `json:"subsysnqn,omitempty"`
		Namespace string `json:"namespace"`
	}
	// RemoveRequest removes a namespace.
	RemoveRequest struct {
		NQN  string `json:"subsysnqn,omitempty"`
		NSID uint32 `json:"nsid"`
	}
	// ResizeRequest changes the size of a namespace to Size bytes. If Size is 0,
	// the namespace gets the current size of its file or device.
	ResizeRequest struct {
		NQN  string `json:"subsysnqn,omitempty"`
		NSID uint32 `json:"nsid"`
		Size int64  `json:"size"`
	}
	// ReadOnlyRequest sets or clears the write protection of a namespace.
	ReadOnlyRequest struct {
		NQN  string `json:"subsysnqn,omitempty"`
		NSID uint32 `json:"nsid"`
		On   bool   `json:"on"`
	}
	// ReferralRequest adds a referral to another discovery service, or removes it; see
	// options.ReferralWords.
	ReferralRequest struct {
		Address string `json:"address"`
		Remove  bool   `json:"remove,omitempty"`
	}
	// AuthRequest says how a host must authenticate from now on.
	AuthRequest struct {
		NQN  string               `json:"subsysnqn,omitempty"`
		Host string               `json:"hostnqn"`
		Auth options.HostAuthText `json:"auth"`
	}
	// StopRequest ends the target.
	StopRequest struct{}
)

// Done is the answer to a request that has changed something.
type Done struct {
	ID   int    `json:"id,omitempty"`   // of the fault that was added
	NSID uint32 `json:"nsid,omitempty"` // of the namespace that was added
}
