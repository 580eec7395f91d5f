package target

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/nvme"
)

// TestStores puts all stores through the same operations.
func TestStores(t *testing.T) {
	const size = 1 << 20
	name := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(name, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := OpenFile(name, false)
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
	readOnly, err := OpenFile(name, true)
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	if err := readOnly.Discard(0, 512); err == nil {
		t.Error("a discard succeeds on a file opened for reading")
	}
	// Without fallocate zeroes are written.
	if err := file.zero(1<<30, 0, 100<<10); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 100<<10)
	if _, err := file.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, len(got))) {
		t.Errorf("not zeroed: %v", err)
	}
}

// TestCache: only what was flushed, or had no room, is in the store below.
func TestCache(t *testing.T) {
	const size = 1<<20 + 512
	ram := NewRAM(size)
	c := NewCache(ram, 32<<10)
	stored := func() (n int) {
		for _, b := range ram.data {
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
	if err := c.Close(); err != nil || stored() != 1024+512+32<<10 || len(c.dirty) != 0 {
		t.Errorf("%d bytes are stored, %v", stored(), err)
	}
	if _, err := c.WriteAt(data[:512], size-511); err == nil {
		t.Error("a write beyond the end succeeds")
	}
	// What shrinks meanwhile loses its end.
	if _, err := c.WriteAt(data[:1024], size-1024); err != nil {
		t.Fatal(err)
	}
	ram.Resize(size - 512)
	if err := c.Flush(); err != nil || len(c.dirty) != 0 {
		t.Error(err)
	}
}

// failing is a store whose every operation fails.
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
