package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/nbd"
	"ublk-nvmeof/ublk"
)

// front is the front end of a server, and why it is this one.
type front struct {
	name   string // options.Ublk, NBD or NBDSocket
	reason string
}

// chooseFront finds the front end: the one that was asked for, or the first that this
// machine has or can load.
func (s *server) chooseFront() (front, error) {
	const asked = "asked for"
	for _, d := range s.waiting {
		if d.Kind != state.Ublk {
			return front{}, exit.Errorf(exit.Other, "%s was left by a dead server and cannot be served on: the kernel would not send what was in flight again; disconnect ends it", d.Path())
		}
	}
	switch s.opts.Frontend {
	case options.Ublk:
		return front{options.Ublk, asked}, s.driver(host.UblkDrv, s.back.available, ublk.ErrNoDriver)
	case options.NBD:
		return front{options.NBD, asked}, s.driver(host.NBD, s.back.nbd, nbd.ErrNoDriver)
	case options.NBDSocket:
		return front{options.NBDSocket, asked}, nil
	}
	noUblk := s.driver(host.UblkDrv, s.back.available, ublk.ErrNoDriver)
	if !errors.Is(noUblk, ublk.ErrNoDriver) || len(s.waiting) > 0 || s.predecessor != nil || s.opts.Device != options.AutoDevice {
		return front{options.Ublk, "the ublk driver is there"}, noUblk
	}
	noNBD := s.driver(host.NBD, s.back.nbd, nbd.ErrNoDriver)
	if noNBD == nil {
		return front{options.NBD, "no ublk driver, but the kernel's NBD client"}, nil
	}
	s.log.Info("block devices are not to be had", "ublk", noUblk, "nbd", noNBD)
	return front{options.NBDSocket, "neither a ublk driver nor the kernel's NBD client can be used"}, nil
}

// driver makes sure that a driver can be used.
func (s *server) driver(m host.Module, available func() error, none error) error {
	var loading error
	if s.opts.LoadModules == "auto" {
		loading = s.back.load(m)
	}
	err := available()
	if errors.Is(err, none) && loading != nil {
		return fmt.Errorf("%w; %w", err, loading)
	}
	return err
}

// nbdAvailable is nil if the kernel's NBD client can make devices that are seen here.
func nbdAvailable() error {
	if err := nbd.Available(); err != nil {
		return err
	}
	if !host.NBD.Present() {
		return fmt.Errorf("%w: there is no /dev/nbd0", nbd.ErrNoDriver)
	}
	return nil
}

// makeDevice makes the device of a namespace by the front end.
func (s *server) makeDevice(ctx context.Context, ns namespace, id int, later bool) (device, error) {
	if s.front.name != options.Ublk {
		return s.export(ctx, ns, id)
	}
	return s.back.start(ctx, ublk.Config{
		ID: id, Device: ns.device, Loops: s.loops, Depth: s.depth, MaxIO: s.opts.MaxIO,
		Recovery: policies[s.opts.OnCrash], KeepAffinity: later, Log: s.log,
	})
}

// minNBDDepth is the least that package nbd takes.
const minNBDDepth = 16

// openNBD makes the NBD server that all namespaces are exports of.
func (s *server) openNBD() error {
	secure, err := s.opts.TLSConfig()
	if err != nil {
		return err
	}
	srv, err := nbd.New(nbd.Config{
		Loops: s.loops, Depth: max(s.depth, minNBDDepth), MaxIO: s.opts.MaxIO, Log: s.log,
		TLS: secure, RequireTLS: secure != nil,
	})
	if err != nil {
		return err
	}
	s.nbd = srv
	if s.front.name == options.NBD {
		return nil
	}
	network, address := "tcp", s.opts.Socket
	switch {
	case address == "":
		network, address = "unix", filepath.Join(filepath.Dir(s.entry.Socket()), "nbd.sock")
	case strings.HasPrefix(address, "/"):
		network = "unix"
	}
	if network == "unix" {
		if err := removeDeadSocket(address); err != nil {
			return err
		}
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return fmt.Errorf("listen for NBD clients: %w", err)
	}
	s.address = l.Addr()
	go func() {
		if err := srv.Serve(l); err != nil && !errors.Is(err, nbd.ErrStopped) {
			s.log.Error("NBD clients are not accepted any more", "error", err)
		}
	}()
	return nil
}

// removeDeadSocket removes a socket that nobody listens on.
func removeDeadSocket(path string) error {
	c, err := net.Dial("unix", path)
	switch {
	case err == nil:
		_ = c.Close()
		return exit.Errorf(exit.DeviceTaken, "listen for NBD clients: somebody listens at %s", path)
	case errors.Is(err, unix.ECONNREFUSED):
		if info, err := os.Lstat(path); err != nil || info.Mode().Type() != os.ModeSocket {
			return fmt.Errorf("listen for NBD clients: %s is there, and no socket", path)
		}
		return os.Remove(path)
	}
	return nil
}

// export makes a namespace an export, named by its number, and with the front end nbd
// a block device of that.
func (s *server) export(ctx context.Context, ns namespace, id int) (device, error) {
	if s.nbd == nil {
		if err := s.openNBD(); err != nil {
			return nil, err
		}
	}
	name := strconv.FormatUint(uint64(ns.nsid), 10)
	err := s.nbd.Add(nbd.Export{Name: name, Description: fmt.Sprintf("namespace %d of %s", ns.nsid, s.opts.NQN), Device: ns.device})
	if err != nil {
		return nil, err
	}
	x := &export{
		srv: s.nbd, name: name, size: ns.device, done: make(chan struct{}),
		queues: ublk.Info{Queues: len(s.loops), Depth: max(s.depth, minNBDDepth), MaxIO: min(s.opts.MaxIO, int(ns.device.Geometry().MaxIO))},
	}
	if s.front.name == options.NBDSocket {
		x.record = state.Device{Kind: state.NBDSocket, URI: exportURI(s.address, name, s.opts.TLS != "")}
		return x, nil
	}
	// The kernel cannot be given new connections after a crash that would make up for
	// what was in flight, so nothing waits for them.
	x.dev, err = s.nbd.Start(ctx, nbd.DeviceConfig{Index: id, Export: name, Log: s.log})
	if err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		return nil, errors.Join(err, s.nbd.Remove(undo, name, true))
	}
	x.record = state.Device{Kind: state.NBD, ID: x.dev.Index(), Cookie: x.dev.Cookie()}
	return x, nil
}

// endNBD ends the NBD server, when all devices have ended.
func (s *server) endNBD(p pace) error {
	if s.nbd == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), p.abort)
	defer cancel()
	return s.nbd.Stop(ctx, true)
}

// export is a namespace that is served by NBD, with the kernel's device or without.
type export struct {
	srv    *nbd.Server
	name   string
	size   block.Device
	dev    *nbd.Device // nil: a socket
	record state.Device
	queues ublk.Info
	once   sync.Once
	done   chan struct{} // closed when the export is gone
}

// Record implements device.
func (x *export) Record() state.Device { return x.record }

// Info implements device: the figures of the queues.
func (x *export) Info() ublk.Info { return x.queues }

// InUse implements device.
func (x *export) InUse() error {
	if x.dev != nil {
		return x.dev.InUse()
	}
	if n := x.srv.Users(x.name); n > 0 {
		return fmt.Errorf("%w: %d connections", nbd.ErrBusy, n)
	}
	return nil
}

// Resize implements device. A client of a socket learns sizes when it connects.
func (x *export) Resize(ctx context.Context, sectors uint64) error {
	if x.dev == nil {
		return nil
	}
	return x.dev.Resize(ctx, sectors<<block.SectorShift)
}

// SetReadOnly implements device: a client learns it when it connects. Until then the
// namespace refuses what it has to.
func (x *export) SetReadOnly(bool) error { return nil }

// HandOver implements device.
func (x *export) HandOver(context.Context) error {
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
func (x *export) Snapshot() ublk.Stats {
	n := x.srv.Snapshot(x.name)
	return ublk.Stats{Queues: []ublk.QueueStats{{
		Reads: n.Reads, Writes: n.Writes, ReadBytes: n.ReadBytes, WrittenBytes: n.WrittenBytes,
		Flushes: n.Flushes, Discards: n.Trims, WriteZeroes: n.WriteZeroes, Errors: n.Errors, Batches: n.Batches,
	}}}
}

// isBusy says whether an error is that somebody uses a device.
func isBusy(err error) bool { return errors.Is(err, ublk.ErrBusy) || errors.Is(err, nbd.ErrBusy) }

// goneNBD is gone, for devices that are not ublk's.
func goneNBD(ctx context.Context, d state.Device, waiting Waiting) (bool, error) {
	if d.Kind == state.NBDSocket {
		if path := socketOf(d.URI); path != "" {
			_ = removeDeadSocket(path) // else the next one who wants it says so
		}
		return true, nil
	}
	there, err := nbd.Connected(d.ID, d.Cookie)
	if err != nil || !there {
		return err == nil, err
	}
	if waiting == Keep {
		return false, nil
	}
	err = nbd.Disconnect(ctx, d.ID, d.Cookie, waiting == EndAll)
	return err == nil || errors.Is(err, nbd.ErrNoDevice), err
}
