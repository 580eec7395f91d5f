package server

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/provider"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/ublk"
)

// controller is what the server needs of an initiator.Controller.
type controller interface {
	Info() initiator.Info
	Done() <-chan struct{}
	Err() error
	Outlive(ctx context.Context, cntlids ...uint16) error
	Abort(reason error)
	Close(ctx context.Context) error
}

// namespace is what the server needs of an initiator.Namespace.
type namespace struct {
	nsid   uint32
	uuid   string
	device block.Device
}

// device is what the server needs of a ublk.Device, or of what stands in its place.
type device interface {
	Record() state.Device
	Info() ublk.Info // queues, depth and request size
	InUse() error
	Resize(ctx context.Context, sectors uint64) error
	SetReadOnly(readOnly bool) error
	HandOver(ctx context.Context) error
	Stop(ctx context.Context, force bool) error
	Done() <-chan struct{}
	Err() error
	Snapshot() ublk.Stats
}

// backend makes what a server is composed of. Tests have one that needs neither
// a driver nor a target.
type backend struct {
	load      func(host.Module) error // nil if the module is there
	available func() error            // ublk
	nbd       func() error            // the kernel's NBD client
	route     func(remote netip.AddrPort, source netip.Addr) (host.Route, error)
	provider  func(name string) (rdma.Provider, error)
	prepare   func(loops int) error
	loop      func(poller.Config) (*poller.Loop, error)
	connect   func(ctx context.Context, cfg initiator.Config, changed func(namespace, initiator.Change)) (controller, []namespace, error)
	start     func(context.Context, ublk.Config) (device, error)
	recover   func(context.Context, ublk.Info, ublk.Config) (device, error)
	get       func(ctx context.Context, id int) (ublk.Info, error)
	list      func(context.Context) ([]ublk.Info, error)
	remove    func(context.Context, ublk.Info) error
	abandon   func(ctx context.Context, info ublk.Info, force bool) error
}

// actual is the backend of a server.
var actual = backend{
	load: func(m host.Module) error {
		if m.Present() {
			return nil
		}
		return m.Load()
	},
	available: ublk.Available,
	nbd:       nbdAvailable,
	route:     host.RouteTo,
	provider:  provider.ForHost,
	prepare:   host.Prepare,
	loop: func(cfg poller.Config) (*poller.Loop, error) {
		l, err := poller.New(cfg)
		return l, host.ExplainMemlock(err)
	},
	connect: func(ctx context.Context, cfg initiator.Config, changed func(namespace, initiator.Change)) (controller, []namespace, error) {
		cfg.Changed = func(ns *initiator.Namespace, what initiator.Change) { changed(describe(ns), what) }
		c, err := initiator.Connect(ctx, cfg)
		if err != nil {
			return nil, nil, host.ExplainMemlock(err)
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
	get:     ublk.Get,
	list:    ublk.List,
	remove:  ublk.Remove,
	abandon: ublk.Abandon,
}

// ublkDevice is a ublk.Device.
type ublkDevice struct{ *ublk.Device }

// Record implements device.
func (d ublkDevice) Record() state.Device {
	return state.Device{ID: d.ID(), Cookie: d.Device.Info().Cookie}
}

func describe(ns *initiator.Namespace) namespace {
	n := namespace{nsid: ns.NSID(), device: ns}
	if id := ns.IDs().UUID; !id.IsZero() {
		n.uuid = id.String()
	}
	return n
}

// Waiting is what Clear does about devices that wait for another server.
type Waiting uint8

// What to do about devices that wait.
const (
	Keep      Waiting = iota // nothing
	EndUnused                // remove them, unless somebody uses them
	EndAll                   // remove them; what waits for them fails
)

// Clear takes away what a dead server left: its devices, each only if it
// still is the server's and nobody can use it any more, or as waiting says, and
// its record. It returns false if a device is still there.
func Clear(ctx context.Context, dir state.Dir, name string, waiting Waiting, log *slog.Logger) (bool, error) {
	return dir.Clear(ctx, name, actual.reap(log, waiting))
}

// reap is for state.Dir.
func (b *backend) reap(log *slog.Logger, waiting Waiting) func(context.Context, state.Record) bool {
	return func(ctx context.Context, r state.Record) bool {
		for _, d := range r.Devices {
			gone, err := b.gone(ctx, d, waiting)
			if err != nil {
				log.Warn("a dead server's device is still there", "server", r.Name, "device", d.Path(), "error", err)
			}
			if !gone {
				return false
			}
		}
		return true
	}
}

// gone says whether nothing is left of a device of a dead server, after
// removing it if that is wanted or if nobody can use it any more.
func (b *backend) gone(ctx context.Context, d state.Device, waiting Waiting) (bool, error) {
	if d.Kind != state.Ublk {
		return goneNBD(ctx, d, waiting)
	}
	info, err := b.get(ctx, d.ID)
	switch {
	case errors.Is(err, ublk.ErrNoDevice), errors.Is(err, ublk.ErrNoDriver):
		return true, nil
	case err != nil:
		return false, err
	case info.Cookie != d.Cookie:
		return true, nil // somebody else's by now
	case info.State == ublk.Dead:
		err = b.remove(ctx, info)
	case waiting == Keep || info.State == ublk.Live:
		return false, nil
	default:
		err = b.abandon(ctx, info, waiting == EndAll)
	}
	return err == nil || errors.Is(err, ublk.ErrNoDevice), err
}
