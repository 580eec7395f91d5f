package options

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestReadFile(t *testing.T) {
	before := pipeTime
	pipeTime = 10 * time.Millisecond
	defer func() { pipeTime = before }()
	dir := t.TempDir()
	write := func(name string, size int) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// pipe returns the name of a pipe into which text has been written, and its other end.
	pipe := func(text string) (string, *os.File) {
		r, w, err := os.Pipe()
		if err == nil {
			_, err = w.WriteString(text)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close(); w.Close() })
		return fmt.Sprintf("/proc/self/fd/%d", r.Fd()), w
	}
	ended, w := pipe("text")
	w.Close()
	open, _ := pipe("text")
	for name, want := range map[string]string{
		write("most", MaxFile): "", os.DevNull: "", ended: "",
		write("more", MaxFile+1):      "it is longer than 1.0 MiB",
		fifo:                          "it is a named pipe; want a regular file, or a descriptor such as /dev/fd/0",
		"/dev/zero":                   "it is a device; want",
		dir:                           "it is a directory; want",
		open:                          "its end did not come within 10ms",
		filepath.Join(dir, "missing"): "no such file or directory",
	} {
		_, err := ReadFile(name)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), name+": "+want)) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
}

// A descriptor without an end, such as one of /dev/zero, is as bounded as a file.
func TestReadEndless(t *testing.T) {
	f, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := ReadFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Error(err)
	}
}
