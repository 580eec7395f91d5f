package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// logLimit is how long a log may get: it is in memory. The one before is kept.
const logLimit = 1 << 20

// logFile is where a background server logs: standard error, which becomes a
// file once there is a place for it, so that panics go there, too. slog's
// handlers write one record at a time.
type logFile struct {
	path string // empty: not open
	size int64
}

// open begins the log, and makes it the process's standard output and error.
func (l *logFile) open(path string) error {
	l.path, l.size = path, 0
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer f.Close()
	for _, fd := range []int{1, 2} {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("open log: %w", err)
		}
	}
	return nil
}

func (l *logFile) Write(p []byte) (int, error) {
	n, err := os.Stderr.Write(p)
	l.size += int64(n)
	if l.path != "" && l.size > logLimit {
		if err := os.Rename(l.path, l.path+".1"); err != nil {
			return n, err
		}
		if err := l.open(l.path); err != nil {
			return n, err
		}
	}
	return n, err
}
