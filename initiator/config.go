package initiator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
)

// Limits and defaults of Linux' nvme-rdma (drivers/nvme/host/fabrics.h)
const (
	MinQueueSize     = 16
	MaxQueueSize     = 1024
	DefaultQueueSize = 128
	DefaultKeepAlive = 5 * time.Second

	defaultConnectTimeout = 10 * time.Second
	defaultAdminTimeout   = 60 * time.Second
	defaultIOTimeout      = 30 * time.Second
	defaultPollMaxBytes   = 16 << 10
	defaultReconnectDelay = 10 * time.Second
	defaultCtrlLoss       = 600 * time.Second

	// Forever is a Config.CtrlLoss that never ends, and AtOnce is a time limit that ends
	// immediately, where 0 means a default.
	Forever time.Duration = -1
	AtOnce  time.Duration = 1

	adminDepth = 32 // NVME_AQ_DEPTH; nvmet accepts no more
)

// Path is a way to a controller of a subsystem.
type Path struct {
	Provider rdma.Provider
	Address  netip.AddrPort // of the target; unused if Resolve is set
	Source   netip.Addr     // local address; zero: chosen by the route

	// Resolve returns the addresses of the target in the order in which to try them.
	// It is called for the first association, and for a later one if the last address
	// does not accept it. If Resolve is nil, Address is the only address.
	Resolve func(ctx context.Context) ([]netip.AddrPort, error)
}

func (p *Path) check() error {
	switch {
	case p.Provider == nil:
		return errors.New("no RDMA provider")
	case p.Resolve == nil && (!p.Address.IsValid() || p.Address.Port() == 0):
		return errors.New("no target address")
	}
	return nil
}

// Config configures Connect. Fields are required unless their comment says otherwise.
type Config struct {
	Path    // the first path
	SubNQN  string
	HostNQN string
	HostID  nvme.UUID

	// Credentials are for targets that require authentication. See also
	// Subsystem.Reauthenticate.
	Credentials Credentials

	// Discovery says that SubNQN is a discovery subsystem. Its controller has an admin
	// queue and nothing else, so Queues and Loops stay empty.
	Discovery bool
	// DiscoveryChanged is called when the discovery log may have changed: after an event
	// of the controller, and after the connection was lost and made again. It must neither
	// block nor call back. nil: nobody.
	DiscoveryChanged func()

	// Queues is what to ask for, clipped to the number of CPUs. Loops are the
	// threads to serve it, at least Queues.Loops() of them.
	Queues poller.Request
	Loops  []*poller.Loop

	Policy Policy // how a request chooses its path; see SetPolicy
	// NoFence sends changes again over other paths at once, without knowing whether the
	// controller of a lost path still executes them, as Linux does. An old write may then
	// overwrite a newer one.
	NoFence bool

	QueueSize     int           // entries per I/O queue, 16..1024; 0: 128. The target may lower it
	KeepAlive     time.Duration // 0: 5 s; for a discovery controller: none, so the target may end it after a while
	TOS           uint8         // type of service; 0: unset
	DisableSQFlow bool          // ask the target not to use SQ flow control
	PollMaxBytes  int           // reads and writes up to this size go to the poll queues; 0: 16 KiB

	ConnectTimeout time.Duration // per address or route resolution, per connection, and for any sign of life while an association is made; 0: 10 s
	AdminTimeout   time.Duration // per admin command; 0: 60 s. While an association is made again, it is ConnectTimeout at first, and twice as much at each attempt
	IOTimeout      time.Duration // per I/O command; 0: 30 s

	// A lost association is made again: at once, and then every ReconnectDelay (0: 10 s),
	// as long as the subsystem lives. While no path has an association, requests wait.
	// They fail after FastIOFail (0: only when the subsystem is given up), and the
	// subsystem is given up after CtrlLoss (0: 600 s; Forever: never).
	ReconnectDelay time.Duration
	CtrlLoss       time.Duration
	FastIOFail     time.Duration

	// MaxMemory limits the I/O buffers of all queues of all namespaces, in bytes (0:
	// half of the memory that is available when Connect is called). A queue
	// beyond the limit is not opened.
	MaxMemory int64

	// Associated is called before anything is sent over a new association, with all
	// controllers that may have commands of this process: that of the new association,
	// those of the other paths, and those whose end is not known yet. A process that takes
	// over from this one needs to wait for these (Subsystem.Outlive). If Associated returns an error, nothing is sent: Connect
	// fails, and a later association is tried again. Associated must not call the
	// Subsystem. It may be nil.
	Associated func(all []ControllerID) error

	// Connected is called before Associated, with the traces of the connections of all
	// associations (rdma.Traced), if the provider has any. With them the next process can
	// tell the target that this one has died (rdma.Leaver), and need not wait until the
	// target notices it. Connected must not call the Subsystem. It may be nil.
	Connected func(traces []string)

	// Made is called with each controller as soon as the target has made it. asked is
	// the time when this host requested it. Made must not call the Subsystem. It may
	// be nil.
	Made func(target netip.AddrPort, cntlid uint16, asked time.Time)

	// Superseded is called while the target says that it has a controller with the id of
	// an old controller. It reports whether there is proof that the target gave the id to
	// another association of this host since: then the target has ended the old controller.
	// Without proof the controller is taken for the old one, and I/O waits. A wrong true
	// lets an old write overwrite a newer one. Superseded must return when ctx is done,
	// and must not call the Subsystem. It may be nil.
	Superseded func(ctx context.Context, p Present) bool

	// StateChanged is called when the state of a path or of the subsystem has changed
	// (Subsystem.Info). It must neither block nor call the Subsystem. It may be nil.
	StateChanged func()

	// Changed is called when a namespace changes after Connect has returned. It must
	// neither block nor call the Subsystem. It may be nil.
	Changed func(ns *Namespace, what Change)

	Log *slog.Logger // nil: nothing is logged
}

// ControllerID names a controller of the subsystem at one of its addresses.
type ControllerID struct {
	Address netip.AddrPort // zero: any
	CNTLID  uint16
}

// Present is a controller that the target reports as existing.
type Present struct {
	Address       netip.AddrPort // of the target
	CNTLID        uint16
	Serial, Model string // of the subsystem, as in Identify Controller
}

func (c *Config) setDefaults() error {
	if err := c.check(); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	switch {
	case c.Credentials.Controller != nil && c.Credentials.Host == nil:
		return errors.New("config: a controller key needs a host key")
	case c.Discovery && c.Queues != (poller.Request{}):
		return fmt.Errorf("config: queues %+v: a discovery controller has no I/O queues", c.Queues)
	case len(c.Loops) < c.Queues.Loops():
		return fmt.Errorf("config: %d loops for queues that need %d", len(c.Loops), c.Queues.Loops())
	case !c.Discovery && c.Queues.IO < 1 || c.Queues.Write < 0 || c.Queues.Poll < 0:
		return fmt.Errorf("config: queues %+v: at least one I/O queue, none negative", c.Queues)
	case c.QueueSize != 0 && (c.QueueSize < MinQueueSize || c.QueueSize > MaxQueueSize):
		return fmt.Errorf("config: queue size %d is not %d..%d", c.QueueSize, MinQueueSize, MaxQueueSize)
	case c.KeepAlive < 0:
		return fmt.Errorf("config: keep alive timeout %v is negative", c.KeepAlive)
	case c.ReconnectDelay < 0:
		return fmt.Errorf("config: reconnect delay %v is negative", c.ReconnectDelay)
	case c.MaxMemory < 0:
		return fmt.Errorf("config: memory of %d bytes is negative", c.MaxMemory)
	case c.FastIOFail < 0:
		return fmt.Errorf("config: fast I/O fail timeout %v is negative", c.FastIOFail)
	}
	if err := nvme.ValidateNQN(c.SubNQN); err != nil {
		return fmt.Errorf("config: subsystem NQN: %w", err)
	}
	if err := nvme.ValidateNQN(c.HostNQN); err != nil {
		return fmt.Errorf("config: host NQN: %w", err)
	}
	setDefault(&c.QueueSize, DefaultQueueSize)
	if !c.Discovery {
		setDefault(&c.KeepAlive, DefaultKeepAlive)
	}
	setDefault(&c.PollMaxBytes, defaultPollMaxBytes)
	setDefault(&c.ConnectTimeout, defaultConnectTimeout)
	setDefault(&c.AdminTimeout, defaultAdminTimeout)
	setDefault(&c.IOTimeout, defaultIOTimeout)
	setDefault(&c.ReconnectDelay, defaultReconnectDelay)
	setDefault(&c.CtrlLoss, defaultCtrlLoss)
	if c.MaxMemory == 0 && !c.Discovery { // which has no I/O buffers
		available, err := hostmem.Available()
		if err != nil {
			return fmt.Errorf("config: memory: %w", err)
		}
		c.MaxMemory = available / 2
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

func setDefault[T int | time.Duration](field *T, value T) {
	if *field == 0 {
		*field = value
	}
}
