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

// Waiting tells Clear what to do with devices that wait for another server.
type Waiting uint8

// Values of Waiting.
const (
	Keep      Waiting = iota // keep them
	EndUnused                // remove them, unless they are in use
	EndAll                   // remove them; waiting requests fail
)

// Clear removes the devices and the record of a dead server. It removes a device only if
// the device still belongs to that server, and if nobody can use it any more or waiting
// says so. It returns false if a device remains.
func Clear(ctx context.Context, dir state.Dir, name string, waiting Waiting, log *slog.Logger) (bool, error) {
	return dir.Clear(ctx, name, actual.reap(log, waiting))
}

// reap returns a function that removes a record's devices, for state.Dir.Clear.
func (b *backend) reap(log *slog.Logger, waiting Waiting) func(context.Context, state.Record) (bool, error) {
	return func(ctx context.Context, r state.Record) (bool, error) {
		for _, d := range r.Devices {
			gone, err := b.gone(ctx, d, waiting)
			if err != nil {
				log.Warn("the device of a dead server remains", "server", r.Name, "device", d.Path(), "error", err)
			}
			if !gone {
				return false, nil
			}
		}
		for _, path := range addressesOf(r.State) {
			if strings.HasPrefix(path, "/") {
				_ = removeDeadSocket(path) // the next server at this path reports a failure
			}
		}
		return true, nil
	}
}

// gone reports whether a device of a dead server is gone. It removes the device first
// if waiting says so or if nobody can use it any more.
func (b *backend) gone(ctx context.Context, d state.Device, waiting Waiting) (bool, error) {
	switch d.Kind {
	case state.NBDSocket, state.VhostUserBlk:
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
		return true, nil // the number belongs to another device now
	case info.State == ublk.Dead:
		err = b.remove(ctx, info)
	case waiting == Keep || info.State == ublk.Live:
		return false, nil
	default:
		err = b.abandon(ctx, info, waiting == EndAll)
	}
	return err == nil || errors.Is(err, ublk.ErrNoDevice), err
}

// goneNBD is like gone, for a device of the kernel's NBD client.
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
