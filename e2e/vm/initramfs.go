package main

import (
	"bufio"
	"fmt"
	"io"
)

// cpio writes a cpio archive in the "newc" format, which the kernel unpacks as
// its first root file system (Documentation/driver-api/early-userspace/buffer-format.rst).
type cpio struct {
	w   *bufio.Writer
	ino int
	err error
}

func newCPIO(w io.Writer) *cpio { return &cpio{w: bufio.NewWriter(w)} }

// Modes of the entries, as in stat(2).
const (
	modeDir  = 0o040755
	modeChar = 0o020600
	modeFile = 0o100755
)

func (c *cpio) dir(name string)                    { c.entry(name, modeDir, 0, 0, nil) }
func (c *cpio) file(name string, data []byte)      { c.entry(name, modeFile, 0, 0, data) }
func (c *cpio) char(name string, major, minor int) { c.entry(name, modeChar, major, minor, nil) }

func (c *cpio) entry(name string, mode, major, minor int, data []byte) {
	c.ino++
	// ino mode uid gid nlink mtime filesize dev(2) rdev(2) namesize check
	c.printf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.ino, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0)
	c.printf("%s\x00", name)
	c.pad(110 + len(name) + 1)
	if c.err == nil {
		_, c.err = c.w.Write(data)
	}
	c.pad(len(data))
}

// close ends the archive and reports the first error of all writes.
func (c *cpio) close() error {
	c.entry("TRAILER!!!", 0, 0, 0, nil)
	if c.err != nil {
		return fmt.Errorf("write initramfs: %w", c.err)
	}
	return c.w.Flush()
}

func (c *cpio) printf(format string, args ...any) {
	if c.err == nil {
		_, c.err = fmt.Fprintf(c.w, format, args...)
	}
}

// pad aligns what follows n bytes to 4.
func (c *cpio) pad(n int) { c.printf("%s", "\x00\x00\x00"[:-n&3]) }
