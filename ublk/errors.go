package ublk

import "errors"

// Errors for errors.Is
var (
	// ErrNoDriver means that /dev/ublk-control does not exist, because ublk_drv is
	// not loaded, or that the driver is too old.
	ErrNoDriver = errors.New("no ublk driver")
	// ErrPermission means that the process lacks CAP_SYS_ADMIN or access to
	// /dev/ublk-control, or that io_uring is disabled.
	ErrPermission = errors.New("no permission to use ublk")
	// ErrIDTaken means that a device with this number exists.
	ErrIDTaken = errors.New("ublk device number is taken")
	// ErrNoDevice means that no device with this number exists.
	ErrNoDevice = errors.New("no such ublk device")
	// ErrNotOurs means that another program added the device.
	ErrNotOurs = errors.New("ublk device is not ours")
	// ErrBusy means that the device is in use.
	ErrBusy = errors.New("ublk device is in use")
	// ErrStopped means that another process stopped or deleted the device.
	ErrStopped = errors.New("ublk device was stopped from outside")
)
