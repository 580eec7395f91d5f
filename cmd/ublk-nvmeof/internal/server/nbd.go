package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize/english"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/nbd"
)

// minNBDDepth is the smallest depth that package nbd accepts.
const minNBDDepth = 16

// nbdServer is the NBD server whose exports are the namespaces.
type nbdServer struct {
	*nbd.Server
	log      *slog.Logger
	listener net.Listener // nil if it serves only the kernel's client
	accepts  bool         // the server accepts clients from the listener
	secure   bool         // clients must use TLS
	queues   int
	depth    int
	maxIO    int
}

// openNBD makes the NBD server, unless there is one, and records the address on which it
// listens. Clients that connect wait until accept is called.
func (s *server) openNBD() error {
	if s.nbd != nil {
		return nil
	}
	secure, err := s.secure()
	if err != nil {
		return err
	}
	depth := max(s.depth, minNBDDepth)
	srv, err := nbd.New(nbd.Config{
		Loops: s.loops, Depth: depth, MaxIO: s.opts.MaxIO, Log: s.log,
		TLS: secure, RequireTLS: secure != nil,
	})
	if err != nil {
		return err
	}
	n := &nbdServer{Server: srv, log: s.log, secure: secure != nil, queues: len(s.loops), depth: depth, maxIO: s.opts.MaxIO}
	if s.front.name == options.NBDSocket {
		if err := s.listenNBD(n); err != nil {
			undo, cancel := context.WithTimeout(context.Background(), undoTime)
			defer cancel()
			return errors.Join(fmt.Errorf("listen for NBD clients: %w", err), srv.Stop(undo, true))
		}
	}
	s.nbd = n
	return nil
}

// listenNBD opens the socket of the NBD server and records its address.
func (s *server) listenNBD(n *nbdServer) error {
	l, err := s.bindNBD()
	if err != nil {
		return err
	}
	if err := s.record.update(func(r *state.State) { r.Listen = l.Addr().String() }); err != nil {
		return errors.Join(err, l.Close())
	}
	n.listener = l
	return nil
}

// accept makes the NBD server accept clients, if it has a socket and does not accept them
// yet.
func (n *nbdServer) accept() {
	if n.listener == nil || n.accepts {
		return
	}
	n.accepts = true
	go func() {
		if err := n.Serve(n.listener); err != nil && !errors.Is(err, nbd.ErrStopped) {
			n.log.Error("NBD server stopped accepting clients", "error", err)
		}
	}()
}

// bindNBD listens at the address where NBD clients look for this server. It refuses an
// address where clients of a dead server may look for that server.
func (s *server) bindNBD() (net.Listener, error) {
	if s.cfg.Listener != nil {
		return s.cfg.Listener, nil
	}
	address, err := s.nbdAddress()
	if err != nil {
		return nil, err
	}
	given := s.opts.Socket != ""
	network := "tcp"
	if strings.HasPrefix(address, "/") {
		network = "unix"
		if err := s.claimPath(address, given, "--nbd-socket"); err != nil {
			return nil, err
		}
	}
	if at, err := netip.ParseAddrPort(address); err == nil && at.Addr().Is4() {
		network = "tcp4" // so that 0.0.0.0 does not include all IPv6 addresses
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, err
	}
	if network != "unix" {
		if err := s.checkKept(l.Addr().String(), given); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	return l, nil
}

// nbdAddress returns the address on which this server listens for NBD clients: the one
// that the user gave, that of its predecessor, or a path that only this target has.
func (s *server) nbdAddress() (string, error) {
	if s.opts.Socket != "" {
		return s.opts.Socket, nil
	}
	if address := listensAt(s.record.state()); address != "" {
		return address, nil
	}
	return s.derivedPath("nbd")
}

// listensAt returns the address on which the recorded server listens for NBD clients, or
// "". Older versions recorded it only in the addresses of the devices.
func listensAt(r state.State) string {
	if r.Listen != "" {
		return r.Listen
	}
	for _, d := range r.Devices {
		if d.Kind != state.NBDSocket {
			continue
		}
		u, err := url.Parse(d.URI)
		switch {
		case err != nil:
		case u.Host != "":
			return u.Host
		case u.Query().Get("socket") != "":
			return u.Query().Get("socket")
		}
	}
	return ""
}

// exportOf returns the export of a namespace without serving it. The number of the
// namespace is the name of the export.
func (n *nbdServer) exportOf(ns namespace, nqn string) *export {
	x := &export{
		srv: n, name: strconv.FormatUint(uint64(ns.nsid), 10), done: make(chan struct{}),
		description: fmt.Sprintf("namespace %d of %s", ns.nsid, nqn),
		queueInfo:   queueInfo{Queues: n.queues, Depth: n.depth, MaxIO: min(n.maxIO, int(ns.device.Geometry().MaxIO))},
	}
	if n.listener != nil {
		x.record = state.Device{Kind: state.NBDSocket, URI: exportURI(n.listener.Addr(), x.name, n.secure)}
	}
	return x
}

// export serves a namespace as an export. With the front end nbd it also makes a block
// device of the export.
func (s *server) export(ctx context.Context, ns namespace, id int) (device, error) {
	if err := s.openNBD(); err != nil {
		return nil, err
	}
	x := s.nbd.exportOf(ns, s.opts.NQN)
	if err := s.nbd.Add(nbd.Export{Name: x.name, Description: x.description, Device: ns.device}); err != nil {
		return nil, err
	}
	if s.front.name == options.NBDSocket {
		return x, nil
	}
	// After a crash, new connections would not make the kernel resend requests in
	// flight, so no request waits for a new server.
	var err error
	x.dev, err = nbd.Start(ctx, nbd.DeviceConfig{Server: s.nbd.Server, Index: id, Export: x.name, Log: s.log})
	if err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		return nil, errors.Join(err, s.nbd.Remove(undo, x.name, true))
	}
	x.record = state.Device{Kind: state.NBD, ID: x.dev.Index(), Cookie: x.dev.Cookie()}
	return x, nil
}

// endNBD ends the NBD server after all devices have ended.
func (s *server) endNBD(p pace) error {
	if s.nbd == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), p.abort)
	defer cancel()
	err := s.nbd.Stop(ctx, true)
	if s.nbd.listener != nil && !s.nbd.accepts {
		err = errors.Join(err, s.nbd.listener.Close())
	}
	return err
}

// export is a namespace that is served by NBD, with or without a device of the kernel's
// client.
type export struct {
	srv         *nbdServer
	name        string
	description string
	dev         *nbd.Device // nil for the front end nbd-socket
	record      state.Device
	queueInfo   queueInfo
	once        sync.Once
	done        chan struct{} // closed when the export is gone
}

// Record implements device.
func (x *export) Record() state.Device { return x.record }

// Queues implements device.
func (x *export) Queues() queueInfo { return x.queueInfo }

// InUse implements device.
func (x *export) InUse() error {
	if x.dev != nil {
		return x.dev.InUse()
	}
	if n := x.srv.Users(x.name); n > 0 {
		return fmt.Errorf("%w: %d %s", nbd.ErrBusy, n, english.PluralWord(n, "connection", ""))
	}
	return nil
}

// Accept implements device.
func (x *export) Accept() { x.srv.accept() }

// Resize implements device. A client of a socket sees the new size when it connects
// again.
func (x *export) Resize(ctx context.Context, sectors uint64) error {
	if x.dev == nil {
		return nil
	}
	return x.dev.Resize(ctx, sectors<<block.SectorShift)
}

// SetReadOnly implements device. Clients see the change when they connect again. Until
// then the namespace refuses writes.
func (x *export) SetReadOnly(bool) error { return nil }

// HandOver implements device.
func (x *export) HandOver(context.Context, string) error {
	return fmt.Errorf("hand over %s: %w", x.record.Path(), errors.ErrUnsupported)
}

// Stop implements device.
func (x *export) Stop(ctx context.Context, force bool) error {
	if x.dev != nil {
		if err := x.dev.Stop(ctx, force); err != nil {
			return err
		}
	}
	if err := x.srv.Remove(ctx, x.name, force); err != nil {
		return err
	}
	x.once.Do(func() { close(x.done) })
	return nil
}

// Done implements device.
func (x *export) Done() <-chan struct{} {
	if x.dev != nil {
		return x.dev.Done()
	}
	return x.done
}

// Err implements device.
func (x *export) Err() error {
	if x.dev != nil {
		return x.dev.Err()
	}
	return nil
}

// Snapshot implements device.
func (x *export) Snapshot() block.Stats { return x.srv.Snapshot(x.name) }
