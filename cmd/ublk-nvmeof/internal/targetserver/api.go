package targetserver

// SchemaVersion is that of Status.
const SchemaVersion = 1

// Status is what a target says of itself. Sizes are in bytes.
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
	Faults      Faults       `json:"faults"`

	Connections int    `json:"connections"` // at this moment
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

// Subsystem is a subsystem of a target.
type Subsystem struct {
	NQN        string            `json:"subsysnqn"`
	MaxQueues  int               `json:"max_queues"`
	AllowHosts []string          `json:"allow_hosts,omitempty"` // none: any
	ANA        map[string]string `json:"ana,omitempty"`         // group → state, of those that were set
	Namespaces []NamespaceStatus `json:"namespaces"`
}

// NamespaceStatus is a namespace. Data is what holds it: "ram", or a path.
type NamespaceStatus struct {
	NSID      uint32 `json:"nsid"`
	Data      string `json:"data"`
	Size      int64  `json:"size"`
	BlockSize int    `json:"block_size"`
	ReadOnly  bool   `json:"read_only"`
	UUID      string `json:"uuid,omitempty"`
	// NewAtStart says that the UUID is a new one at each start of the target.
	NewAtStart bool `json:"new_at_start,omitempty"`
}

// Controller is a connected host.
type Controller struct {
	CNTLID  uint16 `json:"cntlid"`
	NQN     string `json:"subsysnqn"`
	HostNQN string `json:"hostnqn"`
	Queues  int    `json:"queues"` // I/O queues
	// Ending says that the controller has ended, but not yet all its commands.
	Ending bool `json:"ending,omitempty"`
}

// Faults are what is wrong with a target on purpose.
type Faults struct {
	Grant    string  `json:"grant,omitempty"`   // what is granted, whatever is asked for
	Stalled  bool    `json:"stalled,omitempty"` // no command is begun
	Frozen   bool    `json:"frozen,omitempty"`  // nothing is done at all
	Hidden   bool    `json:"hidden,omitempty"`  // no namespace is listed
	Reject   string  `json:"reject,omitempty"`  // connect requests
	Refuse   string  `json:"refuse,omitempty"`  // Connect commands
	Commands []Fault `json:"commands"`
}

// Fault is a fault of commands; see options.FaultWords.
type Fault struct {
	ID   int    `json:"id"`
	What string `json:"fault"`
	// UsedUp says that it has applied to as many commands as it may (count=N).
	UsedUp bool `json:"used_up,omitempty"`
}

// Requests of the control socket. An empty NQN means all subsystems, or, where
// only one can be meant, the only one.
type (
	// GrantRequest changes how many I/O queues a controller gets when it next
	// connects: Limit 1..65535. With Exactly it gets so many whatever it asks for,
	// or, with 0, an error.
	GrantRequest struct {
		NQN     string `json:"subsysnqn,omitempty"`
		Limit   int    `json:"limit"`
		Exactly bool   `json:"exactly,omitempty"`
	}
	// DropRequest ends connections: of the queues with an id, or of all if
	// it is negative. Of one subsystem only all.
	DropRequest struct {
		NQN string `json:"subsysnqn,omitempty"`
		QID int    `json:"qid"`
	}
	// StallRequest stops and starts the target's answers.
	StallRequest struct {
		On bool `json:"on"`
	}
	// FreezeRequest freezes the target for a time of up to an hour; 0 ends the freeze.
	FreezeRequest struct {
		Milliseconds int64 `json:"milliseconds"`
	}
	// HideRequest hides all namespaces for a time of up to an hour; 0 shows them.
	HideRequest struct {
		Milliseconds int64 `json:"milliseconds"`
	}
	// FaultRequest adds a fault; see options.FaultWords.
	FaultRequest struct {
		Fault string `json:"fault"`
	}
	// UnfaultRequest takes a fault away; 0 means everything in Faults.
	UnfaultRequest struct {
		ID int `json:"id"`
	}
	// RejectRequest rejects connect requests with an NVMe/RDMA status 1..9; 0 ends it.
	RejectRequest struct {
		Status int `json:"status"`
	}
	// RefuseRequest answers Connect commands with a status; 0 ends it.
	RefuseRequest struct {
		Status int `json:"status"`
	}
	// ANARequest sets the state of an ANA group.
	ANARequest struct {
		NQN   string `json:"subsysnqn,omitempty"`
		Group uint32 `json:"group"`
		State string `json:"state"`
	}
	// AddRequest adds a namespace; see options.NamespaceWords.
	AddRequest struct {
		NQN       string `json:"subsysnqn,omitempty"`
		Namespace string `json:"namespace"`
	}
	// RemoveRequest removes a namespace.
	RemoveRequest struct {
		NQN  string `json:"subsysnqn,omitempty"`
		NSID uint32 `json:"nsid"`
	}
	// ResizeRequest changes the size of a namespace; 0 takes notice of the one
	// that its device has.
	ResizeRequest struct {
		NQN  string `json:"subsysnqn,omitempty"`
		NSID uint32 `json:"nsid"`
		Size int64  `json:"size"`
	}
	// ReadOnlyRequest protects a namespace, or no longer.
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
	// StopRequest ends the target.
	StopRequest struct{}
)

// Done is the answer to a request that changed something.
type Done struct {
	ID   int    `json:"id,omitempty"`   // of the fault that was added
	NSID uint32 `json:"nsid,omitempty"` // of the namespace that was added
}
