package options

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
)

// MaxFile is the longest file that ReadFile reads, in bytes.
const MaxFile = 1 << 20

// pipeTime limits the time to read a file that is no regular one. Somebody may have to type
// what comes out of a pipe.
var pipeTime = time.Minute

// isDescriptor reports whether a file is named as something that a process has opened, such as
// /dev/fd/63, which is what a shell passes for <(COMMAND).
func isDescriptor(name string) bool {
	if name == "/dev/stdin" {
		return true
	}
	for _, pattern := range []string{"/dev/fd/*", "/proc/*/fd/*"} {
		if ok, _ := path.Match(pattern, name); ok {
			return true
		}
	}
	return false
}

// ReadFile reads a file that a flag names. The file must be a regular one, or a descriptor,
// behind which may be a pipe or a terminal. So neither its length nor a missing writer keeps
// the caller for ever.
func ReadFile(name string) ([]byte, error) { return readFile(name, MaxFile) }

func readFile(name string, limit int) ([]byte, error) {
	// Without waiting for the writer of a pipe.
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	regular := info.Mode().IsRegular()
	if !regular && !isDescriptor(name) && name != os.DevNull {
		return nil, fmt.Errorf("%s: it is %s; want a regular file, or a descriptor such as /dev/fd/0", name, kindOf(info.Mode()))
	}
	if !regular {
		_ = f.SetReadDeadline(time.Now().Add(pipeTime)) // the rest never blocks
	}
	text, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("%s: its end did not come within %v", name, pipeTime)
	case err != nil:
		return nil, err
	case len(text) > limit:
		return nil, fmt.Errorf("%s: it is longer than %s", name, humanize.IBytes(uint64(limit)))
	}
	return text, nil
}

// kindOf names what is no regular file.
func kindOf(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "a directory"
	case m&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case m&fs.ModeSocket != 0:
		return "a socket"
	}
	return "a device"
}
