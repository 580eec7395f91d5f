package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/ram"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/provider"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/rdma/roce"
	"ublk-nvmeof/target"
)

// world is a target in this process, with a namespace of 16 MiB.
type world struct {
	t      testing.TB
	fabric *rdmatest.Fabric
	target *target.Target
	sub    *target.Subsystem
	ns     *target.Namespace
	store  *target.RAM // of ns
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, fabric: rdmatest.NewFabric()}
	var err error
	if w.target, err = target.New(target.Config{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.target.Close() })
	if _, err := w.target.AddPorts(target.PortConfig{Provider: w.fabric.Provider(targetAddr), Addr: netip.AddrPortFrom(targetAddr, DefaultPort)}); err != nil {
		t.Fatal(err)
	}
	if w.sub, err = w.target.AddSubsystem(target.SubsystemConfig{NQN: testNQN, AllowAny: true}); err != nil {
		t.Fatal(err)
	}
	w.store = target.NewRAM(16 << 20)
	w.ns = w.add(w.store, 512)
	return w
}

func (w *world) add(store target.Store, blockSize int) *target.Namespace {
	w.t.Helper()
	ns, err := w.sub.AddNamespace(target.NamespaceConfig{Store: store, BlockSize: blockSize})
	if err != nil {
		w.t.Fatal(err)
	}
	return ns
}

func (w *world) config() Config {
	return Config{
		NQN: testNQN, HostNQN: nvme.UUIDNQN(nvme.NewUUID()), ReconnectDelay: 20 * time.Millisecond,
		Paths: []Path{{Host: targetAddr.String(), Provider: w.fabric.Provider(hostAddr)}},
	}
}

func (w *world) open(cfg Config) *Disk {
	w.t.Helper()
	d, err := Open(w.t.Context(), cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := d.Close(); err != nil {
			w.t.Errorf("close: %v", err)
		}
	})
	return d
}

// fill makes data that depends on the position in bytes.
func fill(p []byte, off int64, key uint32) []byte {
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint32(p[i:], key)
		binary.LittleEndian.PutUint32(p[i+4:], uint32(off)+uint32(i))
	}
	return p
}

// TestReadWrite transfers sizes from a block to several times all buffers of a call.
func TestReadWrite(t *testing.T) {
	w := newWorld(t)
	d := w.open(w.config())
	if d.Size() != 16<<20 || d.BlockSize() != 512 || d.MaxIO() != 128<<10 {
		t.Fatalf("size %d, blocks of %d, buffers of %d", d.Size(), d.BlockSize(), d.MaxIO())
	}
	for i, size := range []int{0, 512, 4096, 128 << 10, 128<<10 + 512, 300 << 10, 3 << 20} {
		off := int64(i) * 512
		want := fill(make([]byte, size), off, uint32(i))
		if n, err := d.WriteAt(want, off); n != size || err != nil {
			t.Fatalf("write %d: %d, %v", size, n, err)
		}
		got := make([]byte, size)
		if n, err := d.ReadAt(got, off); n != size || err != nil || !bytes.Equal(got, want) {
			t.Fatalf("read %d: %d, %v", size, n, err)
		}
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	if s := d.Stats(); s.Reads == 0 || s.Writes != s.Reads || s.ReadBytes != s.WrittenBytes || s.Flushes != 1 || s.Errors != 0 {
		t.Errorf("%+v", s)
	}
	got := make([]byte, 4096)
	if _, err := io.ReadFull(io.NewSectionReader(d, 512, 8192), got); err != nil {
		t.Error(err)
	}
}

// TestEnd reads and writes at the end of the disk and beyond.
func TestEnd(t *testing.T) {
	w := newWorld(t)
	d := w.open(w.config())
	p := make([]byte, 4096)
	for _, c := range []struct {
		off int64
		n   int
		err error
	}{{d.Size() - 4096, 4096, nil}, {d.Size() - 512, 512, io.EOF}, {d.Size(), 0, io.EOF}, {d.Size() + 1<<40, 0, io.EOF}} {
		if n, err := d.ReadAt(p, c.off); n != c.n || err != c.err { //nolint:errorlint // io.ReaderAt demands io.EOF itself
			t.Errorf("read at %d: %d, %v", c.off, n, err)
		}
		n, err := d.WriteAt(p, c.off)
		if n != c.n || (err == nil) != (c.err == nil) || err != nil && !errors.Is(err, unix.ENOSPC) {
			t.Errorf("write at %d: %d, %v", c.off, n, err)
		}
	}
	if err := d.WriteZeroes(t.Context(), d.Size()-512, 1024, 0); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("write zeroes: %v", err)
	}
	if n, err := d.ReadAt(nil, 0); n != 0 || err != nil {
		t.Errorf("nothing: %d, %v", n, err)
	}
}

// TestAlignment has clear errors for everything that is not of whole blocks.
func TestAlignment(t *testing.T) {
	w := newWorld(t)
	w.add(target.NewRAM(1<<20), 4096)
	cfg := w.config()
	cfg.NSID = 2
	d := w.open(cfg)
	for _, c := range []struct {
		off, length int64
	}{{1, 4096}, {512, 4096}, {0, 512}, {0, 4097}, {-4096, 4096}} {
		var misaligned *AlignmentError
		_, err := d.ReadAt(make([]byte, c.length), c.off)
		if !errors.As(err, &misaligned) || !errors.Is(err, unix.EINVAL) || misaligned.BlockSize != 4096 || misaligned.Offset != c.off {
			t.Errorf("read %+v: %v", c, err)
		}
		_, err = d.WriteAt(make([]byte, c.length), c.off)
		for _, err := range []error{err, d.Discard(t.Context(), c.off, c.length), d.WriteZeroes(t.Context(), c.off, c.length, 0)} {
			if !errors.As(err, &misaligned) {
				t.Errorf("change %+v: %v", c, err)
			}
		}
	}
	_, err := d.ReadAt(make([]byte, 512), 5)
	if want := "read 512 bytes at 5: not whole blocks of 4096 bytes"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

func TestErase(t *testing.T) {
	w := newWorld(t)
	d := w.open(w.config())
	p := fill(make([]byte, 64<<10), 0, 7)
	if _, err := d.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.WriteZeroes(t.Context(), 4096, 8192, block.NoUnmap); err != nil {
		t.Error(err)
	}
	if err := d.Discard(t.Context(), 32<<10, 512); err != nil {
		t.Error(err)
	}
	clear(p[4096:12288])
	got := make([]byte, 32<<10)
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, p[:32<<10]) {
		t.Errorf("%v, or other data", err)
	}
	if err := d.WriteZeroes(t.Context(), 0, d.Size(), block.FUA); err != nil {
		t.Error(err)
	}
}

// TestStatus keeps what the target said.
func TestStatus(t *testing.T) {
	w := newWorld(t)
	d := w.open(w.config())
	w.ns.SetReadOnly(true)
	_, err := d.WriteAt(make([]byte, 4096), 8192)
	var status nvme.Status
	var failed *Error
	if !errors.As(err, &status) || status.Code() != nvme.StatusNamespaceWriteProtected || !errors.Is(err, unix.EROFS) {
		t.Errorf("%v", err)
	}
	if !errors.As(err, &failed) || failed.Op != block.OpWrite || failed.Offset != 8192 || failed.Length != 4096 {
		t.Errorf("%+v", failed)
	}
	if want := "write 4096 bytes at 8192: read-only file system (nvme status "; err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("%v", err)
	}
}

// TestBuffer reads and writes without a copy.
func TestBuffer(t *testing.T) {
	w := newWorld(t)
	d := w.open(w.config())
	b, err := d.Buffer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	fill(b.Bytes(), 0, 3)
	if err := b.Write(t.Context(), len(b.Bytes()), 4096, block.FUA); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, d.MaxIO())
	if _, err := d.ReadAt(got, 4096); err != nil || !bytes.Equal(got, b.Bytes()) {
		t.Errorf("%v, or other data", err)
	}
	clear(b.Bytes())
	if err := b.Read(t.Context(), 8192, 4096); err != nil || !bytes.Equal(got[:8192], b.Bytes()[:8192]) {
		t.Errorf("%v, or other data", err)
	}
	if err := b.Read(t.Context(), d.MaxIO()+512, 0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("more than the buffer: %v", err)
	}
	if err := b.Read(t.Context(), 512, d.Size()); !errors.Is(err, unix.EIO) {
		t.Errorf("beyond the end: %v", err)
	}
	for range 2 {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := b.Read(t.Context(), 512, 0); err == nil {
		t.Error("read into a closed buffer")
	}
}

// TestBatch keeps several requests in flight from one goroutine.
func TestBatch(t *testing.T) {
	w := newWorld(t)
	d := w.open(w.config())
	const n = 16
	b, err := d.NewBatch(n)
	if err != nil {
		t.Fatal(err)
	}
	run := func(op block.Op) {
		t.Helper()
		var reqs []Request
		for i := range n {
			reqs = append(reqs, Request{Buffer: i, Op: op, Offset: int64(i) * 65536, Length: 65536})
		}
		if err := b.Submit(reqs...); err != nil {
			t.Fatal(err)
		}
		if err := b.Submit(Request{Buffer: 3, Op: block.OpFlush}); err == nil && b.InFlight() > n {
			t.Error("took a buffer in flight")
		}
		seen := map[int]bool{}
		var done [5]Completion
		for len(seen) < n {
			k, err := b.Wait(t.Context(), done[:])
			if err != nil || k == 0 {
				t.Fatalf("%d, %v", k, err)
			}
			for _, c := range done[:k] {
				if c.Err != nil || seen[c.Buffer] {
					t.Errorf("%+v, seen %t", c, seen[c.Buffer])
				}
				seen[c.Buffer] = true
			}
		}
		if k, err := b.Wait(t.Context(), done[:]); k != 0 || err != nil || b.InFlight() != 0 {
			t.Errorf("after all: %d, %v", k, err)
		}
	}
	for i := range n {
		fill(b.Bytes(i)[:65536], int64(i), uint32(i))
	}
	run(block.OpWrite)
	for i := range n {
		clear(b.Bytes(i))
	}
	run(block.OpRead)
	for i := range n {
		if !bytes.Equal(b.Bytes(i)[:65536], fill(make([]byte, 65536), int64(i), uint32(i))) {
			t.Errorf("buffer %d has other data", i)
		}
	}
	for _, r := range []Request{{Buffer: n}, {Buffer: -1}, {Op: block.OpRead, Offset: 1, Length: 512}, {Op: block.OpDiscard, Length: 1 << 50}} {
		if err := b.Submit(Request{Op: block.OpRead, Length: 512, Buffer: 1}, r); err == nil || b.InFlight() != 0 {
			t.Errorf("%+v: %v, %d in flight", r, err, b.InFlight())
		}
	}
	if _, err := d.NewBatch(64 - n + 1); !errors.Is(err, ErrBusy) {
		t.Errorf("too many: %v", err)
	}
	if _, err := d.NewBatch(65); err == nil {
		t.Error("more than there are")
	}
	rest, err := d.NewBatch(64 - n)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(rest.Close(), b.Close(), b.Close()); err != nil {
		t.Error(err)
	}
}

// TestNoAllocations: a call allocates nothing, in whatever way it waits.
func TestNoAllocations(t *testing.T) {
	l := newLoop(t)
	back, err := ram.New(ram.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { back.Close() })
	d, err := New(DeviceConfig{Device: back, Loops: []*poller.Loop{l}, MaxIO: 8192})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	p, large := make([]byte, 4096), make([]byte, 100<<10)
	b, err := d.NewBatch(2)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	reqs := []Request{{Buffer: 0, Op: block.OpRead, Length: 4096}, {Buffer: 1, Op: block.OpWrite, Length: 4096}}
	var done [2]Completion
	batch := func(ctx context.Context) error {
		err := b.Submit(reqs...)
		for b.InFlight() > 0 && err == nil {
			_, err = b.Wait(ctx, done[:])
		}
		return err
	}
	for name, call := range map[string]func() error{
		"read":                func() error { _, err := d.ReadAt(p, 4096); return err },
		"write":               func() error { _, err := d.WriteAt(p, 4096); return err },
		"with context":        func() error { _, err := d.ReadAtContext(ctx, p, 4096); return err },
		"in pieces":           func() error { _, err := d.ReadAt(large, 4096); return err },
		"flush":               func() error { return d.Flush(ctx) },
		"zeroes":              func() error { return d.WriteZeroes(ctx, 0, 4096, 0) },
		"batch":               func() error { return batch(context.Background()) },
		"batch, with context": func() error { return batch(ctx) },
	} {
		for range 100 { // the runtime allocates when it parks goroutines for the first time
			if err := call(); err != nil {
				t.Fatal(err)
			}
		}
		if n := testing.AllocsPerRun(100, func() {
			if err := call(); err != nil {
				t.Error(err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func newLoop(t testing.TB) *poller.Loop {
	t.Helper()
	l, err := poller.New(poller.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Stop() })
	return l
}

// TestManyCallers has more goroutines than slots write and verify stripes of their own, with
// calls of all sizes, on all loops.
func TestManyCallers(t *testing.T) {
	w := newWorld(t)
	cfg := w.config()
	cfg.Queues, cfg.Depth, cfg.MaxIO = 2, 4, 16<<10
	d := w.open(cfg)
	var running sync.WaitGroup
	const callers, stripe = 24, 512 << 10
	for g := range callers {
		running.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(g)))
			for i := range 60 {
				size := 512 * (1 + rng.IntN(200))
				off := int64(g*stripe + 512*rng.IntN((stripe-size)/512))
				want := fill(make([]byte, size), off, uint32(g<<16|i))
				got := make([]byte, size)
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				if _, err := d.WriteAtContext(ctx, want, off); err != nil {
					t.Errorf("write: %v", err)
				}
				if _, err := d.ReadAtContext(ctx, got, off); err != nil || !bytes.Equal(got, want) {
					t.Errorf("read: %v, or other data", err)
				}
				cancel()
			}
		})
	}
	running.Wait()
	if s := d.Stats(); s.Errors != 0 {
		t.Errorf("%+v", s)
	}
	for _, q := range d.queues {
		if len(q.pool.free) != len(q.slots) || int(q.pool.count.Load()) != len(q.slots) {
			t.Errorf("%d of %d slots are free, counted %d", len(q.pool.free), len(q.slots), q.pool.count.Load())
		}
	}
}

// TestContext gives up calls that wait for a target that does not answer, and uses their
// slots again when it does.
func TestContext(t *testing.T) {
	w := newWorld(t)
	cfg := w.config()
	cfg.Depth, cfg.MaxIO = 2, 4096
	d := w.open(cfg)
	w.target.Faults().Stall(true)
	p := bytes.Repeat([]byte{9}, 4096)
	var running sync.WaitGroup
	for range 5 { // two of them have a slot, the others wait for one
		running.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if _, err := d.ReadAtContext(ctx, p, 0); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("read: %v", err)
			}
		})
	}
	running.Wait()
	b := bytes.Repeat([]byte{9}, 4096)
	w.target.Faults().Stall(false)
	if !bytes.Equal(p, b) {
		t.Error("a call that had returned has changed the data")
	}
	for range 10 {
		if _, err := d.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Flush(canceled()); !errors.Is(err, context.Canceled) && err != nil {
		t.Errorf("flush: %v", err)
	}
}

func canceled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// TestCloseInAnyOrder closes a disk before its buffers and batches, twice, and with calls in
// flight.
func TestCloseInAnyOrder(t *testing.T) {
	for _, order := range []string{"buffers first", "disk first", "calls in flight", "silent target"} {
		t.Run(order, func(t *testing.T) {
			w := newWorld(t)
			d, err := Open(t.Context(), w.config())
			if err != nil {
				t.Fatal(err)
			}
			b, err := d.Buffer(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			batch, err := d.NewBatch(2)
			if err != nil {
				t.Fatal(err)
			}
			var running sync.WaitGroup
			if order != "buffers first" {
				running.Go(func() {
					for {
						if _, err := d.ReadAt(make([]byte, 4096), 0); err != nil {
							var failed *Error
							if !errors.Is(err, ErrClosed) && !(errors.As(err, &failed) && failed.Errno == unix.ENOLINK) {
								t.Errorf("read: %v", err)
							}
							return
						}
					}
				})
			}
			if order == "silent target" {
				w.target.Faults().Stall(true)
				if err := batch.Submit(Request{Op: block.OpRead, Length: 4096}); err != nil {
					t.Fatal(err)
				}
			}
			if order == "buffers first" {
				if err := errors.Join(b.Close(), batch.Close()); err != nil {
					t.Error(err)
				}
			}
			if err := d.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			running.Wait()
			if order != "buffers first" {
				fill(b.Bytes(), 0, 1) // the memory is still there
				if err := b.Write(t.Context(), 4096, 0, 0); !errors.Is(err, ErrClosed) {
					t.Errorf("write to a closed disk: %v", err)
				}
				if err := batch.Submit(Request{Op: block.OpFlush, Buffer: 1}); !errors.Is(err, ErrClosed) {
					t.Errorf("submit to a closed disk: %v", err)
				}
			}
			if err := errors.Join(batch.Close(), b.Close(), d.Close(), d.Shutdown(t.Context())); err != nil {
				t.Errorf("close again: %v", err)
			}
			<-d.gone
			if _, err := d.WriteAt(make([]byte, 512), 0); !errors.Is(err, ErrClosed) {
				t.Errorf("write: %v", err)
			}
			if _, err := d.Buffer(t.Context()); !errors.Is(err, ErrClosed) {
				t.Errorf("buffer: %v", err)
			}
			if _, err := d.NewBatch(1); !errors.Is(err, ErrClosed) {
				t.Errorf("batch: %v", err)
			}
			w.target.Faults().Stall(false)
			if s := d.State(); s.Connection != initiator.StateDeleting && s.Connection != initiator.StateDead {
				t.Errorf("state %v", s.Connection)
			}
		})
	}
}

// TestLoopEndsFirst ends the caller's loop below a disk with calls in flight.
func TestLoopEndsFirst(t *testing.T) {
	back, err := ram.New(ram.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { back.Close() })
	l := newLoop(t)
	d, err := New(DeviceConfig{Device: back, Loops: []*poller.Loop{l}})
	if err != nil {
		t.Fatal(err)
	}
	b, err := d.NewBatch(2)
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	for range 4 {
		running.Go(func() {
			for err := error(nil); err == nil; {
				_, err = d.ReadAt(make([]byte, 4096), 0)
			}
		})
	}
	running.Go(func() {
		var done [1]Completion
		for err := error(nil); err == nil; err = done[0].Err {
			if err := b.Submit(Request{Op: block.OpRead, Length: 4096}); err != nil {
				t.Error(err)
			}
			if n, err := b.Wait(context.Background(), done[:]); n != 1 {
				t.Errorf("wait: %d, %v", n, err)
			}
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := l.Stop(); err != nil {
		t.Error(err)
	}
	running.Wait()
	if _, err := d.ReadAt(make([]byte, 4096), 0); !errors.Is(err, poller.ErrStopped) {
		t.Errorf("read: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

// TestStates sees the loss of the only path, its return, a new size, and the end.
func TestStates(t *testing.T) {
	w := newWorld(t)
	d, err := Open(t.Context(), w.config())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var seen []string
	lost, resized := false, false
	for s := range d.States(ctx) {
		seen = append(seen, fmt.Sprint(s.Connection, s.Geometry.Sectors))
		switch {
		case s.Connection == initiator.StateLive && !lost:
			w.target.Faults().Disconnect(-1)
			lost = true
		case s.Connection == initiator.StateLive && s.Geometry.Sectors == 16<<20>>9 && !resized && slices.ContainsFunc(seen, func(x string) bool { return strings.HasPrefix(x, "connecting") }):
			if _, err := d.ReadAt(make([]byte, 512), 0); err != nil {
				t.Error(err)
			}
			if err := w.ns.Resize(t.Context(), 32<<20, func() error { return w.store.Resize(32 << 20) }); err != nil {
				t.Error(err)
			}
			resized = true
		case s.Connection == initiator.StateLive && s.Geometry.Sectors == 32<<20>>9:
			go d.Close()
		case s.Connection == initiator.StateDead:
			t.Errorf("dead: %v", s.Err)
		}
	}
	if n := len(seen); n < 4 || !strings.HasPrefix(seen[n-1], "deleting") || ctx.Err() != nil {
		t.Errorf("states %v, %v", seen, ctx.Err())
	}
	<-d.gone
}

// TestPaths opens a disk whose first path cannot be reached, and loses the second one while
// it is used.
func TestPaths(t *testing.T) {
	w := newWorld(t)
	for _, port := range []uint16{4421, 4422} {
		if _, err := w.target.AddPorts(target.PortConfig{Provider: w.fabric.Provider(targetAddr), Addr: netip.AddrPortFrom(targetAddr, port)}); err != nil {
			t.Fatal(err)
		}
	}
	cfg := w.config()
	p := cfg.Paths[0]
	cfg.Paths = nil
	for _, port := range []uint16{9, 4421, 4422} {
		p.Port = port
		cfg.Paths = append(cfg.Paths, p)
	}
	d := w.open(cfg)
	if got := len(d.State().Paths); got != 3 {
		t.Errorf("%d paths", got)
	}
	for i := range 300 {
		if i%100 == 50 {
			w.target.Faults().Disconnect(-1)
		}
		if _, err := d.WriteAt(fill(make([]byte, 4096), int64(i), 1), int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	w := newWorld(t)
	for name, c := range map[string]struct {
		set  func(*Config)
		want string
	}{
		"no path":         {func(c *Config) { c.Paths = nil }, "no path"},
		"no NQN":          {func(c *Config) { c.NQN = "" }, "subsystem NQN"},
		"other subsystem": {func(c *Config) { c.NQN = "nqn.x" }, "connect admin queue"},
		"nobody listens":  {func(c *Config) { c.Paths[0].Port = 9 }, "nobody listens"},
		"no namespace":    {func(c *Config) { c.NSID = 7 }, "does not have namespace 7; it has [1]"},
		"depth":           {func(c *Config) { c.Depth = 5000 }, "depth 5000"},
		"host NQN":        {func(c *Config) { c.HostNQN = strings.Repeat("x", 300) }, "host NQN"},
		"provider":        {func(c *Config) { c.Paths[0].Provider, c.Paths[0].ProviderName = nil, "tcp" }, "provider"},
	} {
		cfg := w.config()
		c.set(&cfg)
		d, err := Open(t.Context(), cfg)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if d != nil {
			d.Close()
		}
	}
	w.add(target.NewRAM(1<<20), 512)
	var which *NamespaceError
	if _, err := Open(t.Context(), w.config()); !errors.As(err, &which) || !slices.Equal(which.Have, []uint32{1, 2}) {
		t.Errorf("two namespaces: %v", err)
	}
}

func TestParseURL(t *testing.T) {
	for text, want := range map[string]Config{
		"nvmeof+rdma://10.0.0.1/nqn.x": {NQN: "nqn.x", Paths: []Path{{Host: "10.0.0.1"}}},
		"nvmeof+rdma://[fe80::1%25eth0]:4421/nqn.x?nsid=3&queues=2": {
			NQN: "nqn.x", NSID: 3, Queues: 2, Paths: []Path{{Host: "fe80::1%eth0", Port: 4421}}},
		"nvmeof+rdma://[::1]/nqn.x": {NQN: "nqn.x", Paths: []Path{{Host: "::1"}}},
		"nvmeof+rdma://a:1/nqn.2026-01.org.example:disk?path=b&path=c:2&provider=roce&hostnqn=nqn.h": {
			NQN: testNQN, HostNQN: "nqn.h", Paths: []Path{{Host: "a", Port: 1, ProviderName: "roce"}, {Host: "b", ProviderName: "roce"}, {Host: "c", Port: 2, ProviderName: "roce"}}},
	} {
		got, err := ParseURL(text)
		if err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", "http://a/nqn.x", "nvmeof+rdma:///nqn.x", "nvmeof+rdma://a", "nvmeof+rdma://a/", "nvmeof+rdma://u@a/nqn.x",
		"nvmeof+rdma://a:70000/nqn.x", "nvmeof+rdma://a/nqn.x?nsid=0", "nvmeof+rdma://a/nqn.x?nsid=b", "nvmeof+rdma://a/nqn.x?nsid=1&nsid=2",
		"nvmeof+rdma://a/nqn.x?port=3", "nvmeof+rdma://a/nqn.x?path=", "nvmeof+rdma://a/nqn.x#f", "nvmeof+rdma://a/nqn.x?queues=-1",
	} {
		if cfg, err := ParseURL(text); err == nil {
			t.Errorf("%q: %+v", text, cfg)
		}
	}
}

// TestOneP has a single processor of Go for the loop, the target and the callers.
func TestOneP(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	w := newWorld(t)
	d := w.open(w.config())
	for range 50 {
		if _, err := d.ReadAt(make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSharedProvider: disks and paths of a process have one provider over UDP, as long as one
// of them is open.
func TestSharedProvider(t *testing.T) {
	at := netip.MustParseAddr("127.0.24.2")
	own, err := roce.New(roce.Config{Addrs: []netip.Addr{at}})
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	tgt, err := target.New(target.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer tgt.Close()
	if _, err := tgt.AddPorts(target.PortConfig{Provider: own, Addr: netip.AddrPortFrom(at, DefaultPort)}); err != nil {
		t.Fatal(err)
	}
	s, err := tgt.AddSubsystem(target.SubsystemConfig{NQN: testNQN, AllowAny: true})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := s.AddNamespace(target.NamespaceConfig{Store: target.NewRAM(1 << 20)}); err != nil {
			t.Fatal(err)
		}
	}
	var disks []*Disk
	for nsid := range 2 {
		d, err := OpenURL(t.Context(), fmt.Sprintf("nvmeof+rdma://%s/%s?nsid=%d&hostnqn=nqn.h", at, testNQN, nsid+1))
		if err != nil {
			t.Fatal(err)
		}
		disks = append(disks, d)
		if _, err := d.ReadAt(make([]byte, 4096), 0); err != nil {
			t.Error(err)
		}
	}
	if p := providers.open[provider.RoCE]; len(providers.open) != 1 || p == nil || p.users != 2 {
		t.Errorf("providers %+v", providers.open)
	}
	for _, d := range disks {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if len(providers.open) != 0 {
		t.Errorf("left: %+v", providers.open)
	}
}

// TestNoAllocationsOverFabric: nor does a call that reaches a target, or the target itself.
func TestNoAllocationsOverFabric(t *testing.T) {
	w := newWorld(t)
	d := w.open(w.config())
	p := make([]byte, 4096)
	for range 200 {
		if _, err := d.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := testing.AllocsPerRun(100, func() {
		if _, err := d.ReadAt(p, 4096); err != nil {
			t.Error(err)
		}
		if _, err := d.WriteAt(p, 4096); err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
