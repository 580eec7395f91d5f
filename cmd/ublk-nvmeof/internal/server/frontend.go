package server

import (
	"errors"
	"fmt"

	"ublk-nvmeof/block"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/nbd"
	"ublk-nvmeof/process"
	"ublk-nvmeof/ublk"
)

// frontEnd is the front end of a server, with the reason for the choice.
type frontEnd struct {
	name   string // options.Ublk, NBD, NBDSocket or VhostUserBlk
	reason string
}

// chooseFront chooses the front end: that of the devices to take over, the one that the
// user requested, or the first that this machine has or can load, and that this user may
// use.
func (s *server) chooseFront() (frontEnd, error) {
	const asked = "asked for"
	if f, err := s.inheritedFront(); f.name != "" || err != nil {
		return f, err
	}
	switch s.opts.Frontend {
	case options.Ublk:
		return frontEnd{options.Ublk, asked}, s.driver(host.UblkDrv, s.back.available, ublk.ErrNoDriver)
	case options.NBD:
		return frontEnd{options.NBD, asked}, s.driver(host.NBD, s.back.nbd, nbd.ErrNoDriver)
	case options.NBDSocket, options.VhostUserBlk:
		return frontEnd{s.opts.Frontend, asked}, nil
	}
	noUblk := s.driver(host.UblkDrv, s.back.available, ublk.ErrNoDriver)
	forbidden := errors.Is(noUblk, ublk.ErrPermission)
	if !forbidden && !errors.Is(noUblk, ublk.ErrNoDriver) || s.opts.Device != options.AutoDevice {
		return frontEnd{options.Ublk, "the ublk driver is there"}, noUblk
	}
	noNBD := s.driver(host.NBD, s.back.nbd, nbd.ErrNoDriver)
	switch {
	case noNBD == nil && forbidden:
		return frontEnd{options.NBD, "this user may not use the ublk driver, but the kernel's NBD client"}, nil
	case noNBD == nil:
		return frontEnd{options.NBD, "there is no ublk driver, but the kernel's NBD client"}, nil
	}
	s.log.Info("no driver for block devices can be used", "ublk", noUblk, "nbd", noNBD)
	if forbidden || errors.Is(noNBD, nbd.ErrPermission) {
		return frontEnd{options.NBDSocket, "this user may not make block devices"}, nil
	}
	return frontEnd{options.NBDSocket, "neither a ublk driver nor the kernel's NBD client can be used"}, nil
}

// inheritedFront returns the front end of the devices to take over. It is empty if
// there are none.
func (s *server) inheritedFront() (frontEnd, error) {
	const inherited = "the recovered devices have it"
	var f frontEnd
	for _, d := range s.waiting {
		switch d.Kind {
		case state.Ublk:
			f = frontEnd{options.Ublk, inherited}
		case state.NBDSocket:
			f = frontEnd{options.NBDSocket, inherited}
		case state.VhostUserBlk:
			f = frontEnd{options.VhostUserBlk, inherited}
		default:
			there, err := s.back.nbdConnected(d.ID, d.Cookie)
			if err != nil {
				return frontEnd{}, err
			}
			if there {
				return frontEnd{}, exit.Errorf(exit.Other, "a dead server left %s, which cannot be recovered, because the kernel would not resend requests in flight; disconnect removes it", d.Path())
			}
		}
	}
	if f.name != "" && s.opts.Frontend != options.Auto && s.opts.Frontend != f.name {
		return frontEnd{}, exit.Errorf(exit.Other, "--frontend %q: a dead server left %s, which only %s can take over; recover does that, disconnect removes it",
			s.opts.Frontend, s.waiting[0].Path(), f.name)
	}
	if f.name == options.Ublk {
		return f, s.driver(host.UblkDrv, s.back.available, ublk.ErrNoDriver)
	}
	return f, nil
}

// driver makes sure that a driver is available. none is the error of available if there
// is no driver.
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

// ublkAvailable returns nil if this process can make ublk devices.
func ublkAvailable() error {
	err := ublk.Available()
	if err == nil && !process.IsAdmin() {
		err = fmt.Errorf("%w: want CAP_SYS_ADMIN", ublk.ErrPermission)
	}
	return err
}

// nbdAvailable returns nil if this process can make devices of the kernel's NBD client,
// and sees them.
func nbdAvailable() error {
	err := nbd.Available()
	switch {
	case err != nil:
		return err
	case !host.NBD.Present():
		return fmt.Errorf("%w: there is no /dev/nbd0", nbd.ErrNoDriver)
	case !process.IsAdmin():
		return fmt.Errorf("%w: want CAP_SYS_ADMIN", nbd.ErrPermission)
	}
	return nil
}

// isBusy reports whether the error says that a device is in use.
func isBusy(err error) bool {
	return errors.Is(err, block.ErrBusy)
}
