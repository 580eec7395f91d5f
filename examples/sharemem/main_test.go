package main

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestShare hands memory to two servers, one after the other. A program writes to it.
func TestShare(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- run(socket, "1", false, []string{"sh", "-c", "dd if=/dev/zero of={} bs=1M count=1 conv=notrunc 2>/dev/null && read line <" + fifo})
	}()
	var inode uint64
	for range 2 {
		c, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		oob := make([]byte, unix.CmsgSpace(4))
		if _, _, _, _, err := c.ReadMsgUnix(make([]byte, 1), oob); err != nil {
			t.Fatal(err)
		}
		all, err := unix.ParseSocketControlMessage(oob)
		if err != nil {
			t.Fatal(err)
		}
		fds, err := unix.ParseUnixRights(&all[0])
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fds[0]), "memory")
		var st unix.Stat_t
		if err := unix.Fstat(fds[0], &st); err != nil || st.Size != 1<<20 || inode != 0 && st.Ino != inode {
			t.Errorf("%d bytes, inode %d after %d: %v", st.Size, st.Ino, inode, err)
		}
		inode = st.Ino
		if f.Truncate(1) == nil {
			t.Error("the memory can shrink")
		}
		f.Close()
		if _, err := c.Write([]byte("ok 1048576\n")); err != nil {
			t.Error(err)
		}
		c.Close() // the server dies
	}
	if err := os.WriteFile(fifo, []byte("end\n"), 0); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the program: %v", err)
	}
}
