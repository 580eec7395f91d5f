package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/rundir"
)

// logLimit is the size, in bytes, at which a new log is begun, because run directories
// are in memory. One older log is kept.
const logLimit = 1 << 20

// logFile is the log of a background server. At first it is standard error. After open,
// standard error is a file, so that panics are logged there, too. slog's handlers write
// one record at a time, so there is no lock.
type logFile struct {
	path string // empty before open
	size int64
}

// open makes the file at path the standard output and standard error of the process.
// Child processes inherit it only as these two.
func (l *logFile) open(path string) error {
	l.path, l.size = path, 0
	f, err := rundir.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
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
