// Package acceptor accepts connections, and outlasts temporary errors.
package acceptor

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// retry is the pause after a temporary error, such as too many open files.
const retry = 100 * time.Millisecond

// Run passes what accept returns to serve, until accept fails. After a temporary error it
// calls warn and goes on. If stopped is closed, any error ends it, and it returns nil.
func Run[C any](accept func() (C, error), serve func(C), warn func(error), stopped <-chan struct{}) error {
	for {
		c, err := accept()
		if err == nil {
			serve(c)
			continue
		}
		select {
		case <-stopped:
			return nil
		default:
		}
		if !temporary(err) {
			return err
		}
		warn(err)
		select {
		case <-time.After(retry):
		case <-stopped:
		}
	}
}

func temporary(err error) bool {
	for _, e := range []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.ECONNABORTED, unix.EPROTO} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
