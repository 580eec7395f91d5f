package ublk

import (
	"errors"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/frontend"
)

// Errors for errors.Is
var (
	// ErrNoDriver means that /dev/ublk-control does not exist, because ublk_drv is
	// not loaded, or that the driver is too old.
	ErrNoDriver = frontend.NewError(block.ErrNoDriver, "no ublk driver")
	// ErrPermission means that the process lacks CAP_SYS_ADMIN or access to
	// /dev/ublk-control, or that io_uring is disabled.
	ErrPermission = frontend.NewError(block.ErrPermission, "no permission to use ublk")
	// ErrIDTaken means that a device with this number exists.
	ErrIDTaken = frontend.NewError(block.ErrTaken, "ublk device number is taken")
	// ErrNoDevice means that no device with this number exists.
	ErrNoDevice = frontend.NewError(block.ErrNoDevice, "no such ublk device")
	// ErrNotOurs means that another program added the device.
	ErrNotOurs = errors.New("ublk device is not ours")
	// ErrBusy means that the device is in use.
	ErrBusy = frontend.NewError(block.ErrBusy, "ublk device is in use")
	// ErrStopped means that another process stopped or deleted the device.
	ErrStopped = frontend.NewError(block.ErrStopped, "ublk device was stopped from outside")
)
