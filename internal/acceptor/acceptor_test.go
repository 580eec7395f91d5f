package acceptor

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"
)

// TestRun accepts through temporary errors, and ends at others.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		answers := []error{nil, fmt.Errorf("accept: %w", unix.EMFILE), nil, unix.EPROTO, nil, fs.ErrClosed}
		n, served, warned := 0, 0, 0
		accept := func() (int, error) { n++; return n, answers[n-1] }
		err := Run(accept, func(int) { served++ }, func(error) { warned++ }, nil)
		if !errors.Is(err, fs.ErrClosed) || served != 3 || warned != 2 {
			t.Errorf("served %d, warned %d, %v", served, warned, err)
		}
	})
}

// TestStopped returns nil for every error after the end, and does not wait for the pause.
func TestStopped(t *testing.T) {
	for _, e := range []error{unix.EMFILE, fs.ErrClosed} {
		stopped := make(chan struct{})
		close(stopped)
		err := Run(func() (int, error) { return 0, e }, nil, nil, stopped)
		if err != nil {
			t.Errorf("%v: %v", e, err)
		}
	}
	stopped := make(chan struct{})
	err := Run(func() (int, error) { return 0, unix.EMFILE }, nil, func(error) { close(stopped) }, stopped)
	if err != nil {
		t.Errorf("stopped in the pause: %v", err)
	}
}
