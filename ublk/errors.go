package ublk

import "errors"

// Errors that callers tell apart, with errors.Is.
var (
	// ErrNoDriver: /dev/ublk-control does not exist (is ublk_drv loaded?), or
	// the driver is too old to be used.
	ErrNoDriver = errors.New("no ublk driver")
	// ErrPermission: not enough rights: CAP_SYS_ADMIN and access to
	// /dev/ublk-control are needed, and io_uring must not be disabled.
	ErrPermission = errors.New("no permission to use ublk")
	// ErrIDTaken: a device with the wanted number exists.
	ErrIDTaken = errors.New("ublk device number is taken")
	// ErrNoDevice: no device with this number exists.
	ErrNoDevice = errors.New("no such ublk device")
	// ErrNotOurs: another program added the device.
	ErrNotOurs = errors.New("ublk device is not ours")
	// ErrBusy: the device is in use.
	ErrBusy = errors.New("ublk device is in use")
	// ErrStopped: another process stopped or deleted the device.
	ErrStopped = errors.New("ublk device was stopped from outside")
)
