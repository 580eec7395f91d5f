package block

import "errors"

// Errors that front ends have in common, for errors.Is. The errors of a front end say more, and
// are also one of these: errors.Is(ublk.ErrBusy, block.ErrBusy).
var (
	ErrNoDriver   = errors.New("the kernel has no driver")
	ErrPermission = errors.New("no permission to make devices")
	ErrTaken      = errors.New("the name or number is taken")
	ErrNoDevice   = errors.New("no such device")
	ErrBusy       = errors.New("in use") // so it is not stopped without force
	ErrStopped    = errors.New("stopped")
)
