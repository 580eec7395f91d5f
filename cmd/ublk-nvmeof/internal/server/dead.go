package server

import (
	"context"
	"errors"
	"log/slog"
	"strings"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/nbd"
	"ublk-nvmeof/ublk"
)

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
func (b *backend) reap(log *slog.Logger, waiting Waiting) func(context.Context, state.Record) (bool, error) {
	return func(ctx context.Context, r state.Record) (bool, error) {
		for _, d := range r.Devices {
			gone, err := b.gone(ctx, d, waiting)
			if err != nil {
				log.Warn("a dead server's device is still there", "server", r.Name, "device", d.Path(), "error", err)
			}
			if !gone {
				return false, nil
			}
		}
		if path := listensAt(r.State); strings.HasPrefix(path, "/") {
			_ = removeDeadSocket(path) // else the next one who wants it says so
		}
		return true, nil
	}
}

// gone says whether nothing is left of a device of a dead server, after
// removing it if that is wanted or if nobody can use it any more.
func (b *backend) gone(ctx context.Context, d state.Device, waiting Waiting) (bool, error) {
	switch d.Kind {
	case state.NBDSocket:
		// Its clients wait to connect again.
		return waiting != Keep, nil
	case state.NBD:
		return b.goneNBD(ctx, d, waiting)
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

// goneNBD is gone, for a device of the kernel's NBD client.
func (b *backend) goneNBD(ctx context.Context, d state.Device, waiting Waiting) (bool, error) {
	there, err := b.nbdConnected(d.ID, d.Cookie)
	if err != nil || !there {
		return err == nil, err
	}
	if waiting == Keep {
		return false, nil
	}
	err = nbd.Disconnect(ctx, d.ID, d.Cookie, waiting == EndAll)
	return err == nil || errors.Is(err, nbd.ErrNoDevice), err
}
