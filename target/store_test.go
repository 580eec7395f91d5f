package target

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/nvme"
)

// TestStores tests all stores with the same operations.
func TestStores(t *testing.T) {
	const size = 1 << 20
	name := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(name, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := OpenFile(name, FileConfig{Shared: true})
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, s := range []Store{NewRAM(size), file, NewCache(NewRAM(size), 64<<10)} {
		t.Run(fmt.Sprintf("%T", s), func(t *testing.T) {
			want := make([]byte, size)
			pattern(want, 11)
			if _, err := s.WriteAt(want, 0); err != nil {
				t.Fatal(err)
			}
			if err := s.Discard(4096, 512); err != nil {
				t.Fatal(err)
			}
			clear(want[4096:][:512])
			if err := s.WriteZeroes(8192, 200<<10); err != nil {
				t.Fatal(err)
			}
			clear(want[8192:][:200<<10])
			if err := s.WriteZeroes(0, 0); err != nil {
				t.Fatal(err)
			}
			if err := s.Flush(); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, size)
			if _, err := s.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("read: the same %t, %v", bytes.Equal(got, want), err)
			}
			if s.Size() != size {
				t.Errorf("%d bytes", s.Size())
			}
			if _, err := s.ReadAt(got[:512], size-256); err == nil {
				t.Error("a read beyond the end succeeds")
			}
		})
	}
	readOnly, err := OpenFile(name, FileConfig{ReadOnly: true, Shared: true})
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	if err := readOnly.Discard(0, 512); err == nil {
		t.Error("a discard succeeds on a file opened for reading")
	}
	// Zeroes are written if fallocate is not supported.
	if err := file.zero(1<<30, 0, 100<<10); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 100<<10)
	if _, err := file.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, len(got))) {
		t.Errorf("not zeroed: %v", err)
	}
}

// TestCache: the store below has only data that was flushed or for which the cache had
// no room.
func TestCache(t *testing.T) {
	const size = 1<<20 + 512
	ram := NewRAM(size)
	c := NewCache(ram, 32<<10)
	stored := func() (n int) {
		for _, b := range ram.mapping.data {
			if b != 0 {
				n++
			}
		}
		return n
	}
	data := bytes.Repeat([]byte{7}, 100<<10)
	for _, w := range []struct{ off, n, stored int64 }{
		{4096 - 512, 1024, 0}, {size - 512, 512, 0}, {64 << 10, 32 << 10, 3 * 4096},
	} {
		if _, err := c.WriteAt(data[:w.n], w.off); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, w.n)
		if _, err := c.ReadAt(got, w.off); err != nil || !bytes.Equal(got, data[:w.n]) {
			t.Errorf("%d bytes at %d: read as they are not, %v", w.n, w.off, err)
		}
		if n := stored(); int64(n) > w.stored || len(c.dirty) > 8 {
			t.Errorf("%d bytes are stored, %d pages are not", n, len(c.dirty))
		}
	}
	if err := c.Flush(); err != nil || stored() != 1024+512+32<<10 || len(c.dirty) != 0 {
		t.Errorf("%d bytes are stored, %v", stored(), err)
	}
	if _, err := c.WriteAt(data[:512], size-511); err == nil {
		t.Error("a write beyond the end succeeds")
	}
	// If the store shrinks, the cached data beyond its end is lost.
	if _, err := c.WriteAt(data[:1024], size-1024); err != nil {
		t.Fatal(err)
	}
	if err := ram.Resize(size - 512); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil || len(c.dirty) != 0 || ram.Size() != 0 {
		t.Errorf("%v, %d pages are not stored", err, len(c.dirty))
	}
}

// failing is a store whose operations all fail.
type failing struct {
	*RAM
	err error
}

func (f *failing) ReadAt([]byte, int64) (int, error)  { return 0, f.err }
func (f *failing) WriteAt([]byte, int64) (int, error) { return 0, f.err }
func (f *failing) Flush() error                       { return f.err }
func (f *failing) Discard(int64, int64) error         { return f.err }
func (f *failing) WriteZeroes(int64, int64) error     { return f.err }

func TestStoreErrors(t *testing.T) {
	r := newRig(t, Config{}, SubsystemConfig{})
	store := &failing{RAM: NewRAM(1 << 20)}
	if _, err := r.subsys.AddNamespace(NamespaceConfig{Store: store}); err != nil {
		t.Fatal(err)
	}
	h := r.io(r.admin(testNQN), 1, 32)
	for _, c := range []struct {
		err  error
		want nvme.Status
	}{
		{unix.EIO, nvme.StatusInternal | dnr},
		{fmt.Errorf("full: %w", unix.ENOSPC), nvme.StatusCapacityExceeded | dnr},
		{fmt.Errorf("media: %w", nvme.StatusUnrecoveredRead), nvme.StatusUnrecoveredRead},
	} {
		store.err = c.err
		for name, set := range hotCommands(h) {
			clear(h.data.Bytes())
			var cmd nvme.Command
			inline := set(&cmd)
			if got := h.do(&cmd, inline).Status(); got != c.want {
				t.Errorf("%s, %v: status %v", name, c.err, got)
			}
		}
	}
}

// TestRAMSizes: an impossible size is an error and changes nothing. Sizes beyond memory
// take no memory until data is written, and added parts read as zeroes.
func TestRAMSizes(t *testing.T) {
	for _, size := range []int64{-1, MaxRAM + 1, 1<<63 - 1} {
		if _, err := OpenRAM(size); err == nil {
			t.Errorf("%d bytes are accepted", size)
		}
	}
	r := NewRAM(1 << 40)
	if _, err := r.WriteAt([]byte{1}, 1<<40-1); err != nil {
		t.Error(err)
	}
	for _, size := range []int64{-1, MaxRAM + 1, MaxRAM} { // there is not enough address space for the last one
		if err := r.Resize(size); err == nil || r.Size() != 1<<40 {
			t.Errorf("%d bytes: %d, %v", size, r.Size(), err)
		}
	}
	check := func(off int64, want byte) {
		t.Helper()
		var got [1]byte
		if _, err := r.ReadAt(got[:], off); err != nil || got[0] != want {
			t.Errorf("at %d: %d, want %d; %v", off, got[0], want, err)
		}
	}
	resize := func(size int64) {
		t.Helper()
		if err := r.Resize(size); err != nil || r.Size() != size {
			t.Errorf("%d bytes: %d, %v", size, r.Size(), err)
		}
	}
	check(1<<40-1, 1)
	resize(1000)
	if _, err := r.WriteAt(bytes.Repeat([]byte{2}, 1000), 0); err != nil {
		t.Error(err)
	}
	resize(500)
	resize(1000)
	check(499, 2)
	check(500, 0)
	resize(0)
	resize(4096)
	check(0, 0)
	if err := r.Close(); err != nil || r.Size() != 0 || r.Close() != nil {
		t.Error(err)
	}
	if _, err := r.WriteAt([]byte{1}, 0); err == nil {
		t.Error("a write succeeds after Close")
	}
}

// TestRAMGivesBack: discarded data takes no memory.
func TestRAMGivesBack(t *testing.T) {
	const size = 4 << 20
	r := NewRAM(size)
	defer r.Close()
	if _, err := r.WriteAt(bytes.Repeat([]byte{1}, size), 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Discard(100, size-300); err != nil {
		t.Fatal(err)
	}
	resident := 0
	in := make([]byte, size/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&r.mapping.pages[0])), size, uintptr(unsafe.Pointer(&in[0]))); errno != 0 {
		t.Fatal(errno)
	}
	for _, b := range in {
		resident += int(b & 1)
	}
	if resident > 2 {
		t.Errorf("%d pages are resident", resident)
	}
	for i, b := range r.mapping.data {
		if want := byte(1); i >= 100 && i < size-200 && b != 0 || (i < 100 || i >= size-200) && b != want {
			t.Fatalf("byte %d is %d", i, b)
		}
	}
}

// TestOpenFile tests which files can be stores, and who may use them at the same time.
func TestOpenFile(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := unix.Mkfifo(in("pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", in("socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, want := range map[string]error{
		dir: ErrNotStorage, in("pipe"): ErrNotStorage, in("socket"): ErrNotStorage, "/dev/null": ErrNotStorage, "/dev/tty": ErrNotStorage,
		"/proc/self/status": ErrNotStorage, "/proc/sys/kernel/hostname": ErrNotStorage, "/sys/kernel/uevent_seqnum": ErrNotStorage,
		in("nothing"): fs.ErrNotExist,
	} {
		for _, readOnly := range []bool{false, true} {
			if f, err := OpenFile(name, FileConfig{ReadOnly: readOnly}); !errors.Is(err, want) {
				t.Errorf("%s: %v", name, err)
				if err == nil {
					f.Close()
				}
			}
		}
	}
	if err := os.WriteFile(in("disk"), make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("disk", in("link")); err != nil {
		t.Fatal(err)
	}
	rw, ro, shared := FileConfig{}, FileConfig{ReadOnly: true}, FileConfig{Shared: true}
	for _, c := range []struct {
		first, second FileConfig
		ok            bool
	}{{rw, rw, false}, {rw, ro, false}, {ro, rw, false}, {ro, ro, true}, {rw, shared, false}, {shared, rw, false}, {shared, shared, true}} {
		first, err := OpenFile(in("link"), c.first)
		if err != nil {
			t.Fatal(err)
		}
		if first.Path() != in("disk") || first.Device() {
			t.Errorf("path %s, device %t", first.Path(), first.Device())
		}
		second, err := OpenFile(in("disk"), c.second)
		if (err == nil) != c.ok || !c.ok && !errors.Is(err, ErrInUse) {
			t.Errorf("%+v beside %+v: %v", c.second, c.first, err)
		}
		if err == nil {
			second.Close()
		}
		first.Close()
		if err := first.Flush(); err == nil {
			t.Error("a closed file is flushed")
		}
	}
}
