package server

import (
	"context"
	"encoding/hex"
	"net/netip"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/systemd"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nbd"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/process"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/provider"
	"ublk-nvmeof/ublk"
)

// subsystem is the part of initiator.Subsystem that the server uses.
type subsystem interface {
	Info() initiator.Info
	Done() <-chan struct{}
	Err() error
	Outlive(ctx context.Context, keepAlive time.Duration, ids ...initiator.ControllerID) error
	OutliveTime(keepAlive time.Duration, n int) time.Duration
	QueryOver(ctx context.Context, path *initiator.Controller, cmd *nvme.Command, out []byte) (uint64, error)
	Reset(ctx context.Context) error
	Rescan() error
	AddPath(ctx context.Context, p initiator.Path) (*initiator.Controller, error)
	KeepPath(p initiator.Path) (*initiator.Controller, error)
	RemovePath(ctx context.Context, c *initiator.Controller) error
	Paths() []*initiator.Controller
	SetPolicy(p initiator.Policy, preferred *initiator.Controller) error
	Reauthenticate(ctx context.Context, keys *initiator.Credentials) error
	Abort(reason error)
	Close(ctx context.Context) error
}

// namespace is the part of initiator.Namespace that the server uses.
type namespace struct {
	nsid               uint32
	uuid, nguid, eui64 string // empty if the namespace does not have it
	device             block.Device
	used               func() uint64 // bytes that are allocated; nil: unknown
	reserve            func(ctx context.Context, cmd *nvme.Command, data []byte) error
	timed              timed // nil: nothing is known of it
}

// timed is the part of initiator.Namespace that the status is about.
type timed interface {
	Durations() initiator.OpHistograms
	Present() bool
	Wait() (initiator.Wait, bool)
}

// queueInfo describes the queues of a device.
type queueInfo struct {
	Queues int
	Depth  int // requests in flight per queue
	MaxIO  int // bytes of the largest request
}

// device is the part of ublk.Device, of an NBD export or of a vhost-user-blk server that the
// server uses.
type device interface {
	Record() state.Device
	// Accept lets clients of a socket in. It is called, also repeatedly, when the record
	// names the device.
	Accept()
	Queues() queueInfo
	InUse() error
	Resize(ctx context.Context, sectors uint64) error
	SetReadOnly(readOnly bool) error
	// HandOver leaves the device to another server. sessions is the path of a socket on which
	// that server receives the sessions of front ends, or empty.
	HandOver(ctx context.Context, sessions string) error
	Stop(ctx context.Context, force bool) error
	Done() <-chan struct{}
	Err() error
	Snapshot() block.Stats
}

// backend makes the parts of a server. Tests use a backend that needs neither a driver
// nor a target.
type backend struct {
	load      func(host.Module) error // makes sure that the module is loaded
	available func() error            // checks for ublk
	nbd       func() error            // checks for the kernel's NBD client
	// nbdConnected reports whether the kernel's NBD client has this device connected
	// with this cookie.
	nbdConnected func(id int, cookie uint64) (bool, error)
	route        func(remote netip.AddrPort, source netip.Addr) (provider.Route, error)
	provider     func(name string) (rdma.Provider, error)
	prepare      func(loops int) error
	loop         func(poller.Config) (*poller.Loop, error)
	kernelHas    func(context.Context, host.NVMeController) bool
	connect      func(ctx context.Context, cfg initiator.Config, changed func(namespace, initiator.Change)) (subsystem, []namespace, error)
	start        func(context.Context, ublk.Config) (device, error)
	recover      func(context.Context, ublk.Info, ublk.Config) (device, error)
	get          func(ctx context.Context, id int) (ublk.Info, error)
	list         func(context.Context) ([]ublk.Info, error)
	remove       func(context.Context, ublk.Info) error
	abandon      func(ctx context.Context, info ublk.Info, force bool) error
	uevent       func(name string) error             // makes udev process a block device again
	stopping     func(context.Context) (bool, error) // the machine is being shut down
}

// actual is the backend outside of tests.
var actual = backend{
	load: func(m host.Module) error {
		if m.Present() {
			return nil
		}
		return m.Load()
	},
	available:    ublkAvailable,
	nbd:          nbdAvailable,
	nbdConnected: nbd.Connected,
	route:        provider.RouteTo,
	provider:     provider.ForHost,
	prepare:      process.Prepare,
	loop:         explainedLoop,
	kernelHas:    host.NewKernelNVMe().Has,
	connect: func(ctx context.Context, cfg initiator.Config, changed func(namespace, initiator.Change)) (subsystem, []namespace, error) {
		cfg.Changed = func(ns *initiator.Namespace, what initiator.Change) { changed(describe(ns), what) }
		c, err := initiator.Connect(ctx, cfg)
		if err != nil {
			return nil, nil, process.ExplainMemlock(err)
		}
		var found []namespace
		for _, ns := range c.Namespaces() {
			found = append(found, describe(ns))
		}
		return c, found, nil
	},
	start: func(ctx context.Context, cfg ublk.Config) (device, error) {
		// A nil *ublk.Device is not a nil device.
		d, err := ublk.Start(ctx, cfg)
		if err != nil {
			return nil, err
		}
		return ublkDevice{d}, nil
	},
	recover: func(ctx context.Context, info ublk.Info, cfg ublk.Config) (device, error) {
		d, err := ublk.Recover(ctx, info, cfg)
		if err != nil {
			return nil, err
		}
		return ublkDevice{d}, nil
	},
	get:      ublk.Get,
	list:     ublk.List,
	remove:   ublk.Remove,
	abandon:  ublk.Abandon,
	uevent:   host.Uevent,
	stopping: systemd.ShuttingDown,
}

// explainedLoop makes a loop. Its error names the limit that the loop exceeds.
func explainedLoop(cfg poller.Config) (*poller.Loop, error) {
	l, err := poller.New(cfg)
	return l, process.ExplainMemlock(err)
}

// ublkDevice implements device with a ublk.Device.
type ublkDevice struct{ *ublk.Device }

// Record implements device.
func (d ublkDevice) Record() state.Device {
	return state.Device{ID: d.ID(), Cookie: d.Info().Cookie}
}

// HandOver implements device. The driver keeps the users.
func (d ublkDevice) HandOver(ctx context.Context, _ string) error { return d.Device.HandOver(ctx) }

// Accept implements device. The block device is there already.
func (d ublkDevice) Accept() {}

// Queues implements device.
func (d ublkDevice) Queues() queueInfo {
	i := d.Info()
	return queueInfo{Queues: i.Queues, Depth: i.Depth, MaxIO: i.MaxIO}
}

func describe(ns *initiator.Namespace) namespace {
	n := namespace{nsid: ns.NSID(), device: ns, used: ns.Used, reserve: ns.Reserve, timed: ns}
	ids := ns.IDs()
	if !ids.UUID.IsZero() {
		n.uuid = ids.UUID.String()
	}
	if ids.NGUID != [16]byte{} {
		n.nguid = hex.EncodeToString(ids.NGUID[:])
	}
	if ids.EUI64 != [8]byte{} {
		n.eui64 = hex.EncodeToString(ids.EUI64[:])
	}
	return n
}
