package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/vhost"
)

// serveVhost serves a namespace to a virtual machine monitor. Front ends that connect wait
// until Accept is called. path is where the front ends of a dead server look for it, or "". session is
// that of a front end of the server that this one replaces, or nil.
func (s *server) serveVhost(ns namespace, path string, session *vhost.Session) (device, error) {
	l, err := s.bindVhost(ns.nsid, path)
	if err != nil {
		return nil, fmt.Errorf("listen for vhost-user-blk front ends: %w", err)
	}
	srv, err := vhost.New(vhost.Config{
		Device: ns.device, Loops: s.loops, Depth: s.depth, MaxIO: s.opts.MaxIO, ID: s.diskID(ns), Log: s.log, ZeroCopy: s.opts.ZeroCopy,
	})
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &vhostDevice{
		srv: srv, log: s.log, listener: l, session: session, done: make(chan struct{}),
		record:    state.Device{Kind: state.VhostUserBlk, Socket: l.Addr().String()},
		queueInfo: queueInfo{Queues: len(s.loops), Depth: s.depth, MaxIO: min(s.opts.MaxIO, int(ns.device.Geometry().MaxIO))},
	}, nil
}

// diskID returns a name of a namespace. A guest sees the first 20 bytes.
func (s *server) diskID(ns namespace) string {
	switch {
	case ns.eui64 != "":
		return ns.eui64
	case ns.nguid != "":
		return ns.nguid
	case ns.uuid != "":
		return strings.ReplaceAll(ns.uuid, "-", "")
	}
	number := "-" + strconv.FormatUint(uint64(ns.nsid), 10)
	serial := strings.TrimSpace(s.sub.Info().Paths[0].Serial)
	return serial[:min(len(serial), 20-len(number))] + number
}

// bindVhost listens at the path where front ends look for a namespace: that of a
// predecessor, the one that the user gave, or one that only this target has.
func (s *server) bindVhost(nsid uint32, path string) (*net.UnixListener, error) {
	l, err := s.bind(path, s.opts.VhostSocket, nsid, "--vhost-socket")
	if err != nil {
		return nil, err
	}
	if err := s.permitVhost(l.Addr().String()); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// bind listens at the path of a namespace: that of a predecessor, the one that the user gave with
// flag, or one that only this target has. Only the owner can connect.
func (s *server) bind(path, pattern string, nsid uint32, flag string) (*net.UnixListener, error) {
	number := strconv.FormatUint(uint64(nsid), 10)
	if path == "" {
		path = strings.ReplaceAll(pattern, options.NSIDField, number)
	}
	if path == "" {
		var err error
		if path, err = s.derivedPath("vhost-" + number); err != nil {
			return nil, err
		}
	}
	if err := s.claimPath(path, pattern != "", flag); err != nil {
		return nil, err
	}
	// The permissions of an unbound socket become those of its file, so nobody else can
	// connect before the file has its owner.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }), err)
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// permitVhost gives the file of a socket its owner and its mode.
func (s *server) permitVhost(path string) error {
	o := s.opts.VhostOwner
	if o.UID >= 0 || o.GID >= 0 {
		if err := os.Chown(path, o.UID, o.GID); err != nil {
			return fmt.Errorf("--vhost-socket-owner: %w", err)
		}
	}
	if err := os.Chmod(path, s.opts.VhostMode); err != nil {
		return fmt.Errorf("--vhost-socket-mode: %w", err)
	}
	return nil
}

// vhostDevice is a namespace that is served to a virtual machine monitor.
type vhostDevice struct {
	srv       *vhost.Server
	log       *slog.Logger
	listener  *net.UnixListener
	session   *vhost.Session // of a front end that is connected already, or nil
	accepts   sync.Once
	record    state.Device
	queueInfo queueInfo
	once      sync.Once
	done      chan struct{} // closed when the server has ended
}

// Record implements device.
func (d *vhostDevice) Record() state.Device { return d.record }

// Accept implements device.
func (d *vhostDevice) Accept() {
	d.accepts.Do(func() {
		go func() {
			if d.session != nil {
				d.srv.Resume(d.session)
			}
			if err := d.srv.Serve(d.listener); err != nil && !errors.Is(err, vhost.ErrStopped) {
				d.log.Error("vhost-user-blk server stopped accepting front ends", "socket", d.record.Socket, "error", err)
			}
		}()
	})
}

// Queues implements device.
func (d *vhostDevice) Queues() queueInfo { return d.queueInfo }

// InUse implements device.
func (d *vhostDevice) InUse() error {
	if front := d.srv.Front(); front != "" {
		return fmt.Errorf("%w: by %s", vhost.ErrBusy, front)
	}
	return nil
}

// Resize implements device.
func (d *vhostDevice) Resize(context.Context, uint64) error { return d.srv.Changed() }

// SetReadOnly implements device. Guests see the change when they start again. Until then the
// namespace refuses writes.
func (d *vhostDevice) SetReadOnly(bool) error { return nil }

// HandOver implements device. The device has ended if no request is left in flight.
func (d *vhostDevice) HandOver(ctx context.Context, sessions string) error {
	to, err := dialSessions(sessions)
	if err != nil {
		d.log.Warn("the front end is not handed over; it connects again", "socket", d.record.Socket, "error", err)
	}
	if to != nil {
		defer to.Close()
	}
	if err := d.srv.HandOver(ctx, to); err != nil {
		return err
	}
	return d.Stop(ctx, true)
}

// dialSessions connects to the server that receives sessions at a path, if it is not empty.
func dialSessions(path string) (*net.UnixConn, error) {
	if path == "" {
		return nil, nil
	}
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
}

// Stop implements device.
func (d *vhostDevice) Stop(ctx context.Context, force bool) error {
	if err := d.srv.Stop(ctx, force); err != nil {
		return err
	}
	d.once.Do(func() { close(d.done) })
	return d.closeListener()
}

// closeListener closes a listener that Serve has never had.
func (d *vhostDevice) closeListener() error {
	var err error
	d.accepts.Do(func() {
		if err = d.listener.Close(); d.session != nil {
			err = errors.Join(err, d.session.Close())
		}
	})
	return err
}

// Done implements device.
func (d *vhostDevice) Done() <-chan struct{} { return d.done }

// Err implements device.
func (d *vhostDevice) Err() error { return nil }

// Snapshot implements device.
func (d *vhostDevice) Snapshot() block.Stats { return d.srv.Snapshot() }
