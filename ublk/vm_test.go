package ublk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/null"
	"ublk-nvmeof/block/ram"
	"ublk-nvmeof/internal/hostmem"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/poller"
)

// These tests need a kernel with ublk, and root. They make and delete devices.

// patience bounds every step; nothing comes near it.
const patience = 60 * time.Second

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

var loadModule = sync.OnceFunc(func() {
	if os.Getenv("UN_VM") != "" {
		_ = exec.Command("modprobe", "ublk_drv").Run() // Available tells
	}
})

// requireUblk skips where there is no ublk, unless UN_REQUIRE wants it.
func requireUblk(t testing.TB) {
	t.Helper()
	loadModule()
	testenv.Need(t, "ublk", Available())
}

// requireTool is the path of a program.
func requireTool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	testenv.Need(t, "ublk", err)
	return path
}

// newLoops makes n loops that end with the test, and fail it if they do not.
func newLoops(t testing.TB, n int) []*poller.Loop {
	t.Helper()
	var loops []*poller.Loop
	for i := range n {
		l, err := poller.New(poller.Config{Name: fmt.Sprintf("test%d", i)})
		if err != nil {
			t.Fatal(err)
		}
		loops = append(loops, l)
		t.Cleanup(func() {
			stopped := make(chan error, 1)
			go func() { stopped <- l.Stop() }()
			select {
			case err := <-stopped:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(patience):
				t.Error("loop does not stop")
			}
		})
	}
	return loops
}

// start starts a device; at the end of the test it is stopped by force.
func start(t testing.TB, cfg Config) *Device {
	t.Helper()
	d, err := Start(testContext(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, d) })
	return d
}

// stop stops a device and checks that nothing of it is left.
func stop(t testing.TB, d *Device) {
	t.Helper()
	if err := d.Stop(testContext(t), true); err != nil {
		t.Fatal(err)
	}
	if _, err := Get(testContext(t), d.ID()); !errors.Is(err, ErrNoDevice) {
		t.Errorf("%s after Stop: %v", d.Path(), err)
	}
	if _, err := os.Stat(d.Path()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s after Stop: %v", d.Path(), err)
	}
}

func newRAM(t testing.TB, g block.Geometry) *ram.Device {
	t.Helper()
	dev, err := ram.New(ram.Config{Geometry: g})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	})
	return dev
}

func newNull(t testing.TB, g block.Geometry) *null.Device {
	t.Helper()
	dev, err := null.New(null.Config{Geometry: g})
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

// attr reads a sysfs attribute of the disk.
func attr(t testing.TB, d *Device, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.Path()), name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

func number(t testing.TB, d *Device, name string) int {
	t.Helper()
	n, err := strconv.Atoi(attr(t, d, name))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func openDisk(t testing.TB, d *Device, flags int) int {
	t.Helper()
	fd, err := unix.Open(d.Path(), flags|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open %s: %v", d.Path(), err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// directBuffer is memory for O_DIRECT.
func directBuffer(t testing.TB, size int) []byte {
	t.Helper()
	b, err := hostmem.Map(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hostmem.Unmap(b) })
	return b[:size]
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, requireTool(t, name), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// onCPU runs fn on a thread of its own on one CPU.
func onCPU(t testing.TB, cpu int, fn func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		var set unix.CPUSet
		set.Set(cpu)
		err := unix.SchedSetaffinity(0, &set)
		if err == nil {
			fn()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatalf("pin to CPU %d: %v", cpu, err)
	}
}

func TestGetFeatures(t *testing.T) {
	requireUblk(t)
	f, err := GetFeatures(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Log(f)
	if !f.Has(IoctlEncode | UserRecovery | RecoveryReissue | UserCopy) {
		t.Errorf("features %v lack what Linux 6.5 has", f)
	}
}

func TestStartStop(t *testing.T) {
	requireUblk(t)
	loops := newLoops(t, 2)
	d := start(t, Config{ID: -1, Device: newNull(t, block.Geometry{Sectors: 123456}), Loops: loops, Depth: 17, MaxIO: 70000})
	queues := min(2, runtime.NumCPU())
	if i := d.Info(); i.Queues != queues || i.Depth != 17 || i.MaxIO != 68<<10 || !i.Ours() || i.ID != d.ID() || len(d.QueueStats()) != queues {
		t.Errorf("granted %+v", i)
	}
	if got := number(t, d, "size"); got != 123456 {
		t.Errorf("%d sectors", got)
	}
	list, err := List(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(list, func(i Info) bool { return i.ID == d.ID() })
	if i < 0 || list[i].State != Live || list[i].PID != os.Getpid() || list[i].Cookie != d.Info().Cookie || list[i].Path() != d.Path() {
		t.Errorf("listed as %+v", list)
	}
	if err := Remove(testContext(t), list[i]); !errors.Is(err, ErrBusy) {
		t.Errorf("remove of a live device: %v", err)
	}
	select {
	case <-d.Done():
		t.Errorf("done: %v", d.Err())
	default:
	}
	stop(t, d)
	<-d.Done()
	if d.Err() != nil {
		t.Error(d.Err())
	}
	if err := d.Stop(testContext(t), false); err != nil {
		t.Errorf("second stop: %v", err)
	}
	for i, l := range loops { // the loops are as they were
		if err := l.Call(func() {}); err != nil {
			t.Errorf("loop %d: %v", i, err)
		}
	}
}

// TestGeometry compares what the kernel shows with the geometry.
func TestGeometry(t *testing.T) {
	requireUblk(t)
	base := block.Geometry{Sectors: 1 << 20, LogicalBlock: 512, PhysicalBlock: 512, MaxIO: 1 << 20}
	for _, c := range []struct {
		name string
		set  func(*block.Geometry)
		want map[string]string
	}{
		{"plain", func(*block.Geometry) {}, map[string]string{
			"size": "1048576", "ro": "0", "queue/logical_block_size": "512", "queue/physical_block_size": "512",
			"queue/minimum_io_size": "512", "queue/optimal_io_size": "0", "queue/max_hw_sectors_kb": "256",
			"queue/chunk_sectors": "0", "queue/write_cache": "write through", "queue/fua": "0",
			"queue/discard_max_hw_bytes": "0", "queue/write_zeroes_max_bytes": "0", "queue/rotational": "0",
		}},
		{"4096", func(g *block.Geometry) { g.LogicalBlock, g.PhysicalBlock = 4096, 16384 }, map[string]string{
			"size": "1048576", "queue/logical_block_size": "4096", "queue/physical_block_size": "16384",
			"queue/minimum_io_size": "16384",
		}},
		{"hints", func(g *block.Geometry) { g.IOMin, g.IOOpt, g.ChunkSectors = 8192, 131072, 256 }, map[string]string{
			"queue/minimum_io_size": "8192", "queue/optimal_io_size": "131072", "queue/chunk_sectors": "256",
		}},
		{"small", func(g *block.Geometry) { g.MaxIO = 8192 }, map[string]string{"queue/max_hw_sectors_kb": "8"}},
		{"cache", func(g *block.Geometry) { g.VolatileCache = true }, map[string]string{
			"queue/write_cache": "write back", "queue/fua": "1",
		}},
		{"read only", func(g *block.Geometry) { g.ReadOnly = true }, map[string]string{"ro": "1"}},
		{"discard", func(g *block.Geometry) {
			g.MaxDiscardSectors, g.DiscardGranularity = 8192, 65536
		}, map[string]string{
			"queue/discard_max_hw_bytes": "4194304", "queue/discard_granularity": "65536", "queue/write_zeroes_max_bytes": "0",
		}},
		{"write zeroes", func(g *block.Geometry) { g.MaxZeroesSectors = 256 }, map[string]string{
			"queue/discard_max_hw_bytes": "0", "queue/write_zeroes_max_bytes": "131072",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := base
			c.set(&g)
			d := start(t, Config{ID: -1, Device: newNull(t, g), Loops: newLoops(t, 1)})
			for name, want := range c.want {
				if got := attr(t, d, name); got != want {
					t.Errorf("%s is %q, want %q", name, got, want)
				}
			}
		})
	}
}

// TestDataPerQueue writes from each CPU, hence through each queue, and reads
// back from each: a descriptor or buffer of another queue would show.
func TestDataPerQueue(t *testing.T) {
	requireUblk(t)
	cpus := runtime.NumCPU()
	d := start(t, Config{ID: -1, Device: newRAM(t, block.Geometry{}), Loops: newLoops(t, cpus), Depth: 8, MaxIO: 128 << 10})
	fd := openDisk(t, d, unix.O_RDWR|unix.O_DIRECT)
	const region = 4 << 20 // larger than MaxIO: requests are split
	for cpu := range cpus {
		out, in := directBuffer(t, region), directBuffer(t, region)
		rnd := rand.NewChaCha8([32]byte{byte(cpu)})
		_, _ = rnd.Read(out)
		before := d.QueueStats()
		onCPU(t, cpu, func() {
			for off := 0; off < region; {
				n := min(512+rand.IntN(300<<10)/512*512, region-off)
				if _, err := unix.Pwrite(fd, out[off:off+n], int64(cpu*region+off)); err != nil {
					t.Error(err)
					return
				}
				off += n
			}
		})
		if moved := queuesMoved(before, d.QueueStats()); moved != 1 {
			t.Errorf("CPU %d wrote through %d queues", cpu, moved)
		}
		for reader := range cpus {
			clear(in)
			onCPU(t, reader, func() {
				if n, err := unix.Pread(fd, in, int64(cpu*region)); n != region || err != nil {
					t.Errorf("read %d bytes: %v", n, err)
				}
			})
			if !bytes.Equal(in, out) {
				t.Fatalf("written on CPU %d, read on CPU %d: data differs", cpu, reader)
			}
		}
	}
}

func queuesMoved(a, b []block.Stats) int {
	n := 0
	for i := range a {
		if a[i] != b[i] {
			n++
		}
	}
	return n
}

// TestVerify runs fio's verification at depth, over all queues and pinned to
// each CPU, on two devices that share the loops.
func TestVerify(t *testing.T) {
	requireUblk(t)
	requireTool(t, "fio")
	cpus := runtime.NumCPU()
	loops := newLoops(t, cpus)
	a := start(t, Config{ID: -1, Device: newRAM(t, block.Geometry{}), Loops: loops, Depth: 32})
	b := start(t, Config{
		ID: -1, Device: newRAM(t, block.Geometry{LogicalBlock: 4096}), Loops: loops, Depth: 64, MaxIO: 64 << 10, KeepAffinity: true,
	})
	fio := func(d *Device, bs string, extra ...string) {
		t.Helper()
		run(t, "fio", append([]string{
			"--name=verify", "--filename=" + d.Path(), "--direct=1", "--ioengine=io_uring", "--iodepth=32",
			"--rw=randrw", "--bsrange=" + bs, "--verify=crc32c", "--verify_fatal=1", "--size=24m", "--randrepeat=0",
		}, extra...)...)
	}
	var both sync.WaitGroup
	both.Go(func() { fio(a, "512-1m", "--numjobs=2", "--offset_increment=24m") })
	both.Go(func() { fio(b, "4k-1m") })
	both.Wait()
	for cpu := range cpus {
		fio(a, "512-256k", "--cpus_allowed="+strconv.Itoa(cpu))
	}
	for _, d := range []*Device{a, b} {
		if s := d.Snapshot(); s.Errors != 0 || s.Reads == 0 || s.Writes == 0 || s.Batches > s.Reads+s.Writes {
			t.Errorf("%s counted %+v", d.Path(), s)
		}
	}
}

func TestFilesystem(t *testing.T) {
	requireUblk(t)
	d := start(t, Config{ID: -1, Device: newRAM(t, block.Geometry{VolatileCache: true}), Loops: newLoops(t, 2)})
	run(t, "mkfs.ext4", "-q", d.Path())
	dir := t.TempDir()
	run(t, "mount", d.Path(), dir)
	mounted := true
	defer func() {
		if mounted {
			run(t, "umount", dir)
		}
	}()
	want := bytes.Repeat([]byte("something to keep\n"), 1<<16)
	if err := os.WriteFile(filepath.Join(dir, "file"), want, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Stop(testContext(t), false); !errors.Is(err, ErrBusy) {
		t.Fatalf("stop of a mounted device: %v", err)
	}
	run(t, "umount", dir)
	mounted = false
	run(t, "fsck.ext4", "-f", "-n", d.Path())
	run(t, "mount", d.Path(), dir)
	mounted = true
	if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read back %d bytes, %v", len(got), err)
	}
	if s := d.Snapshot(); s.Flushes == 0 || s.Errors != 0 {
		t.Errorf("counted %+v", s)
	}
}

func TestDiscardAndZeroes(t *testing.T) {
	requireUblk(t)
	d := start(t, Config{ID: -1, Device: newRAM(t, block.Geometry{}), Loops: newLoops(t, 1)})
	fd := openDisk(t, d, unix.O_RDWR|unix.O_DIRECT)
	buf := directBuffer(t, 1<<20)
	for _, c := range []struct {
		args  []string
		count func(block.Stats) uint64
	}{
		{nil, func(s block.Stats) uint64 { return s.Discards }},
		{[]string{"--zeroout"}, func(s block.Stats) uint64 { return s.WriteZeroes }},
	} {
		for i := range buf {
			buf[i] = 0xa5
		}
		if _, err := unix.Pwrite(fd, buf, 0); err != nil {
			t.Fatal(err)
		}
		run(t, "blkdiscard", append(c.args, "--offset=65536", "--length=65536", d.Path())...)
		if c.count(d.Snapshot()) == 0 {
			t.Errorf("blkdiscard %v: counted %+v", c.args, d.Snapshot())
		}
		if _, err := unix.Pread(fd, buf, 0); err != nil {
			t.Fatal(err)
		}
		for i, b := range buf {
			want := byte(0xa5)
			if i >= 65536 && i < 131072 {
				want = 0
			}
			if b != want {
				t.Fatalf("blkdiscard %v: byte %d is %#x, want %#x", c.args, i, b, want)
			}
		}
	}
}

// TestCache: flushes and FUA reach the back end iff it has a volatile cache.
func TestCache(t *testing.T) {
	requireUblk(t)
	for _, volatile := range []bool{false, true} {
		t.Run(fmt.Sprintf("volatile=%v", volatile), func(t *testing.T) {
			back := &recorder{Device: newRAM(t, block.Geometry{VolatileCache: volatile})}
			d := start(t, Config{ID: -1, Device: back, Loops: newLoops(t, 1)})
			if got := back.writeThrough.Load() > 0; got == volatile {
				t.Errorf("queues are opened write-through: %v", got)
			}
			buf := directBuffer(t, 4096)
			fd := openDisk(t, d, unix.O_RDWR|unix.O_DIRECT)
			if _, err := unix.Pwrite(fd, buf, 0); err != nil {
				t.Fatal(err)
			}
			if fua, flushes := back.fua.Load(), back.flushes.Load(); fua+flushes != 0 {
				t.Fatalf("%d FUA writes and %d flushes for a plain write", fua, flushes)
			}
			sync := openDisk(t, d, unix.O_RDWR|unix.O_DIRECT|unix.O_DSYNC)
			if _, err := unix.Pwrite(sync, buf, 0); err != nil {
				t.Fatal(err)
			}
			if got := back.fua.Load() > 0; got != volatile {
				t.Errorf("FUA for an O_DSYNC write: %v", got)
			}
			before := back.flushes.Load()
			if err := unix.Fsync(fd); err != nil {
				t.Fatal(err)
			}
			if got := back.flushes.Load() > before; got != volatile {
				t.Errorf("flush for fsync: %v", got)
			}
		})
	}
}

// recorder counts what reaches the back end.
type recorder struct {
	block.Device
	fua, flushes atomic.Int64
	writeThrough atomic.Int64 // queues that were opened so
}

type recorderQueue struct {
	block.Queue
	r *recorder
}

func (r *recorder) OpenQueue(i int, cfg block.QueueConfig) (block.Queue, error) {
	if cfg.WriteThrough {
		r.writeThrough.Add(1)
	}
	q, err := r.Device.OpenQueue(i, cfg)
	return recorderQueue{q, r}, err
}

func (q recorderQueue) Submit(reqs []block.Request) {
	for _, r := range reqs {
		if r.Op == block.OpFlush {
			q.r.flushes.Add(1)
		}
		if r.Flags&block.FUA != 0 {
			q.r.fua.Add(1)
		}
	}
	q.Queue.Submit(reqs)
}

func TestReadOnly(t *testing.T) {
	requireUblk(t)
	d := start(t, Config{ID: -1, Device: newRAM(t, block.Geometry{ReadOnly: true}), Loops: newLoops(t, 1)})
	buf := directBuffer(t, 4096)
	if _, err := unix.Pread(openDisk(t, d, unix.O_RDONLY|unix.O_DIRECT), buf, 0); err != nil {
		t.Error(err)
	}
	fd, err := unix.Open(d.Path(), unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Pwrite(fd, buf, 0)
		_ = unix.Close(fd)
	}
	if err == nil {
		t.Error("a read-only device was written to")
	}
	if s := d.Snapshot(); s.Writes != 0 || s.Reads == 0 {
		t.Errorf("counted %+v", s)
	}
}

// faulty fails every request from armed on.
type faulty struct {
	block.Device
	errno atomic.Uint32
}

type faultyQueue struct {
	block.Queue
	f *faulty
}

func (f *faulty) OpenQueue(i int, cfg block.QueueConfig) (block.Queue, error) {
	q, err := f.Device.OpenQueue(i, cfg)
	return faultyQueue{q, f}, err
}

func (q faultyQueue) Reap(done []block.Result) int {
	n := q.Queue.Reap(done)
	for i := range done[:n] {
		if e := q.f.errno.Load(); e != 0 {
			done[i].Errno = uint16(e)
		}
	}
	return n
}

// TestErrnos: what the back end says is what an application gets, but for
// EAGAIN, which it would take for an invitation.
func TestErrnos(t *testing.T) {
	requireUblk(t)
	back := &faulty{Device: newRAM(t, block.Geometry{})}
	d := start(t, Config{ID: -1, Device: back, Loops: newLoops(t, 1)})
	fd := openDisk(t, d, unix.O_RDWR|unix.O_DIRECT)
	buf := directBuffer(t, 4096)
	for _, c := range []struct{ from, to unix.Errno }{
		{unix.ENOLINK, unix.ENOLINK}, {unix.ETIMEDOUT, unix.ETIMEDOUT}, {unix.ENODATA, unix.ENODATA},
		{unix.EREMOTEIO, unix.EREMOTEIO}, {unix.EIO, unix.EIO}, {unix.EAGAIN, unix.EIO}, {unix.ENOSPC, unix.ENOSPC},
		{0, 0},
	} {
		back.errno.Store(uint32(c.from))
		_, err := unix.Pread(fd, buf, 0)
		if got, _ := err.(unix.Errno); got != c.to { //nolint:errorlint // a bare errno
			t.Errorf("read with %v: got %v", c.from, err)
		}
		_, err = unix.Pwrite(fd, buf, 0)
		if got, _ := err.(unix.Errno); got != c.to { //nolint:errorlint // a bare errno
			t.Errorf("write with %v: got %v", c.from, err)
		}
	}
}

// TestBusy: without force, a device in use is left alone.
func TestBusy(t *testing.T) {
	requireUblk(t)
	d := start(t, Config{ID: -1, Device: newRAM(t, block.Geometry{}), Loops: newLoops(t, 1)})
	fd := openDisk(t, d, unix.O_RDONLY|unix.O_DIRECT)
	if err := d.Stop(testContext(t), false); !errors.Is(err, ErrBusy) {
		t.Fatalf("stop with an opener: %v", err)
	}
	if _, err := unix.Pread(fd, directBuffer(t, 4096), 0); err != nil {
		t.Fatalf("read after a refused stop: %v", err)
	}
	_ = unix.Close(fd)
	if err := d.Stop(testContext(t), false); err != nil {
		t.Fatal(err)
	}
}

// TestForce: users of a stopped device get errors or, as its size is 0 now, the
// end of file, and do not hold it up.
func TestForce(t *testing.T) {
	requireUblk(t)
	d := start(t, Config{ID: -1, Device: newRAM(t, block.Geometry{}), Loops: newLoops(t, 2)})
	fd := openDisk(t, d, unix.O_RDONLY|unix.O_DIRECT)
	buf := directBuffer(t, 4096)
	reading, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for i := 0; ; i++ {
			if n, err := unix.Pread(fd, buf, 0); n <= 0 || err != nil {
				return
			}
			if i == 100 {
				close(reading)
			}
		}
	}()
	<-reading
	if err := d.Stop(testContext(t), true); err != nil {
		t.Fatal(err)
	}
	<-ended
	_ = unix.Close(fd)
	gone(t, d.ID())
}

// gone waits until a device number is free.
func gone(t testing.TB, id int) {
	t.Helper()
	ctx := testContext(t)
	for {
		_, err := Get(ctx, id)
		if errors.Is(err, ErrNoDevice) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestIDTaken: a device that is there is neither taken over nor harmed.
func TestIDTaken(t *testing.T) {
	requireUblk(t)
	loops := newLoops(t, 1)
	d := start(t, Config{ID: 7, Device: newRAM(t, block.Geometry{}), Loops: loops})
	if d.ID() != 7 || d.Path() != "/dev/ublkb7" {
		t.Fatalf("asked for 7, got %d", d.ID())
	}
	if _, err := Start(testContext(t), Config{ID: 7, Device: newNull(t, block.Geometry{}), Loops: loops}); !errors.Is(err, ErrIDTaken) {
		t.Fatalf("second device 7: %v", err)
	}
	info, err := Get(testContext(t), 7)
	if err != nil || info.State != Live || info.Cookie != d.Info().Cookie {
		t.Fatalf("first device after that: %+v, %v", info, err)
	}
	if _, err := unix.Pread(openDisk(t, d, unix.O_RDONLY|unix.O_DIRECT), directBuffer(t, 4096), 0); err != nil {
		t.Fatal(err)
	}
}

// TestCycles: nothing accumulates, and nothing hangs.
func TestCycles(t *testing.T) {
	requireUblk(t)
	cycles := 60
	if testing.Short() {
		cycles = 10
	}
	loops, dev := newLoops(t, 2), newRAM(t, block.Geometry{Sectors: 2048})
	buf := directBuffer(t, 4096)
	files := 0
	for i := range cycles {
		if i == 1 {
			files = len(testenv.OpenFiles(t))
		}
		d, err := Start(testContext(t), Config{ID: -1, Device: dev, Loops: loops, Depth: 4})
		if err != nil {
			t.Fatalf("cycle %d: %v", i, err)
		}
		fd, err := unix.Open(d.Path(), unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatalf("cycle %d: %v", i, err)
		}
		if _, err := unix.Pwrite(fd, buf, 0); err != nil {
			t.Fatalf("cycle %d: %v", i, err)
		}
		_ = unix.Close(fd)
		if err := d.Stop(testContext(t), i%2 == 0); err != nil {
			t.Fatalf("cycle %d: %v", i, err)
		}
	}
	if now := len(testenv.OpenFiles(t)); now != files {
		t.Errorf("%d open files, %d after the first cycle", now, files)
	}
	if list, err := List(testContext(t)); err != nil || len(list) != 0 {
		t.Errorf("left over: %+v, %v", list, err)
	}
}

// TestStoppedOutside: a device that somebody else stops or deletes ends by
// itself, says so, and does not hold up whoever did it.
func TestStoppedOutside(t *testing.T) {
	requireUblk(t)
	for _, cmd := range []command{stopDev, delDev} {
		t.Run(cmd.String(), func(t *testing.T) {
			d := start(t, Config{ID: -1, Device: newRAM(t, block.Geometry{}), Loops: newLoops(t, 2)})
			c, err := openControl()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.close() }()
			if err := c.do(testContext(t), call{cmd: cmd, id: uint32(d.ID())}); err != nil {
				t.Fatal(err)
			}
			select {
			case <-d.Done():
			case <-time.After(patience):
				t.Fatal("not done")
			}
			if !errors.Is(d.Err(), ErrStopped) {
				t.Errorf("ended with %v", d.Err())
			}
		})
	}
}

// TestNumberReused: after somebody deleted our device, its number may be
// another device's, which we do not delete.
func TestNumberReused(t *testing.T) {
	requireUblk(t)
	ctx := testContext(t)
	d := start(t, Config{ID: 9, Device: newNull(t, block.Geometry{}), Loops: newLoops(t, 1)})
	stop(t, d)
	c, err := openControl()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.close() }()
	other := devInfo{nrHWQueues: 1, queueDepth: 1, maxIOBufBytes: 4096, devID: 9, flags: uint64(IoctlEncode), serverFlags: 1}
	if err := c.do(ctx, call{cmd: addDev, id: 9, buf: bytesOf(&other)}); err != nil {
		t.Fatal(err)
	}
	// As if it had been deleted before Stop came to it.
	d.ctl, d.added = c, true
	if err := d.delete(ctx); err != nil {
		t.Error(err)
	}
	d.ctl, d.added = nil, false
	info, err := Get(ctx, 9)
	if err != nil || info.Cookie != 1 || info.Ours() {
		t.Errorf("the other device: %+v, %v", info, err)
	}
	if err := Remove(ctx, info); !errors.Is(err, ErrNotOurs) {
		t.Errorf("remove of the other device: %v", err)
	}
	if err := c.do(ctx, call{cmd: delDev, id: 9}); err != nil {
		t.Error(err)
	}
}

// TestServingAllocatesNothing counts the whole process while it serves a device.
func TestServingAllocatesNothing(t *testing.T) {
	requireUblk(t)
	d := start(t, Config{ID: -1, Device: newRAM(t, block.Geometry{}), Loops: newLoops(t, 1)})
	fd, buf := openDisk(t, d, unix.O_RDWR|unix.O_DIRECT), directBuffer(t, 8192)
	const rounds = 500
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i := range int64(rounds) {
		if _, err := unix.Pwrite(fd, buf, i<<13); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Pread(fd, buf, i<<13); err != nil {
			t.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.Mallocs - before.Mallocs; n >= rounds/10 { // the runtime has some of its own
		t.Errorf("%d allocations for %d writes and reads", n, rounds)
	}
	if s := d.Snapshot(); s.Reads < rounds || s.Writes < rounds {
		t.Errorf("counted %+v", s)
	}
}

// BenchmarkRead is a read of 4 KiB at depth 1 through the kernel, with the
// number of io_uring_enter calls that it takes.
func BenchmarkRead(b *testing.B) {
	requireUblk(b)
	loops := newLoops(b, 1)
	d := start(b, Config{ID: -1, Device: newNull(b, block.Geometry{}), Loops: loops})
	fd, buf := openDisk(b, d, unix.O_RDONLY|unix.O_DIRECT), directBuffer(b, 4096)
	before := loops[0].Snapshot().Enters
	n := 0
	for b.Loop() {
		if _, err := unix.Pread(fd, buf, 0); err != nil {
			b.Fatal(err)
		}
		n++
	}
	b.ReportMetric(float64(loops[0].Snapshot().Enters-before)/float64(n), "enters/op")
}

// TestCloseOnExec: no child inherits what would keep the device alive.
func TestCloseOnExec(t *testing.T) {
	requireUblk(t)
	inheritable := func() (fds []string) {
		t.Helper()
		files, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			fd, err := strconv.Atoi(f.Name())
			if err != nil {
				t.Fatal(err)
			}
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
				fds = append(fds, f.Name())
			}
		}
		return fds
	}
	before := inheritable()
	start(t, Config{ID: -1, Device: newNull(t, block.Geometry{}), Loops: newLoops(t, 1)})
	if now := inheritable(); !slices.Equal(before, now) {
		t.Errorf("children inherit %v, before %v", now, before)
	}
}

// broken fails to open a queue.
type broken struct {
	block.Device
	at int
}

var errBroken = errors.New("broken back end")

func (b broken) OpenQueue(i int, cfg block.QueueConfig) (block.Queue, error) {
	if i == b.at {
		return nil, errBroken
	}
	return b.Device.OpenQueue(i, cfg)
}

// TestFailedStart: whatever fails, nothing is left.
func TestFailedStart(t *testing.T) {
	requireUblk(t)
	loops := newLoops(t, 2)
	stopped := newLoops(t, 2)
	if err := stopped[1].Stop(); err != nil {
		t.Fatal(err)
	}
	good := newNull(t, block.Geometry{})
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for _, c := range []struct {
		name string
		ctx  context.Context
		cfg  Config
		want error
	}{
		{"back end", testContext(t), Config{Device: broken{good, 1}, Loops: loops}, errBroken},
		{"stopped loop", testContext(t), Config{Device: good, Loops: stopped}, nil},
		{"stopped loop, unpinned", testContext(t), Config{Device: good, Loops: stopped, KeepAffinity: true}, poller.ErrStopped},
		{"context", cancelled, Config{Device: good, Loops: loops}, context.Canceled},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := len(testenv.OpenFiles(t))
			c.cfg.ID = -1
			d, err := Start(c.ctx, c.cfg)
			if err == nil {
				stop(t, d)
				t.Fatal("started")
			}
			t.Log(err)
			if c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if list, err := List(testContext(t)); err != nil || len(list) != 0 {
				t.Errorf("left over: %+v, %v", list, err)
			}
			if now := len(testenv.OpenFiles(t)); now != before {
				t.Errorf("%d open files, %d before", now, before)
			}
		})
	}
}

// stuck holds requests back until it is let go.
type stuck struct {
	block.Device
	held    atomic.Bool
	waiting atomic.Int64
}

type stuckQueue struct {
	block.Queue
	s *stuck
}

func (s *stuck) OpenQueue(i int, cfg block.QueueConfig) (block.Queue, error) {
	q, err := s.Device.OpenQueue(i, cfg)
	return &stuckQueue{q, s}, err
}

func (q *stuckQueue) Submit(reqs []block.Request) {
	q.s.waiting.Add(int64(len(reqs)))
	q.Queue.Submit(reqs)
}

func (q *stuckQueue) Reap(done []block.Result) int {
	if q.s.held.Load() {
		return 0
	}
	return q.Queue.Reap(done)
}

// TestStuckBackEnd: a back end that does not answer holds up the kernel, but
// not the caller, and the device goes when it answers.
func TestStuckBackEnd(t *testing.T) {
	requireUblk(t)
	back := &stuck{Device: newRAM(t, block.Geometry{})}
	loops := newLoops(t, 1)
	d := start(t, Config{ID: -1, Device: back, Loops: loops})
	fd := openDisk(t, d, unix.O_RDONLY|unix.O_DIRECT)
	back.held.Store(true)
	before := back.waiting.Load()
	read := make(chan error, 1)
	buf := directBuffer(t, 4096)
	go func() {
		_, err := unix.Pread(fd, buf, 0)
		read <- err
	}()
	for back.waiting.Load() == before {
		runtime.Gosched()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	err := d.Stop(ctx, true)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "STOP_DEV") {
		t.Fatalf("stop of a device with a request that hangs: %v", err)
	}
	t.Log(err)
	back.held.Store(false)
	loops[0].Wake()
	select {
	case <-d.Done():
	case <-time.After(patience):
		t.Fatal("not done")
	}
	if d.Err() != nil {
		t.Error(d.Err())
	}
	if err := <-read; err != nil {
		t.Errorf("the read that hung: %v", err)
	}
	_ = unix.Close(fd)
	gone(t, d.ID())
}

// TestStuckStart: a start that hangs in the partition scan (before Linux 7.0)
// ends with its context, and is undone when the back end answers.
func TestStuckStart(t *testing.T) {
	requireUblk(t)
	back := &stuck{Device: newRAM(t, block.Geometry{})}
	back.held.Store(true)
	loops := newLoops(t, 1)
	ctx, cancel := context.WithCancel(testContext(t))
	go func() { // when the scan's first request hangs
		for back.waiting.Load() == 0 && ctx.Err() == nil {
			runtime.Gosched()
		}
		cancel()
	}()
	d, err := Start(ctx, Config{ID: -1, Device: back, Loops: loops})
	cancel()
	back.held.Store(false)
	loops[0].Wake()
	if err == nil { // the scan is not part of the start
		stop(t, d)
		return
	}
	t.Log(err)
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "START_DEV") {
		t.Fatalf("start: %v", err)
	}
	// The loop can stop, at the end of the test, only when the device is gone.
}

// TestHelperServe is not a test: it is the process that TestKilled and
// TestRecover kill.
func TestHelperServe(t *testing.T) {
	var policy RecoveryPolicy
	switch os.Getenv("UBLK_TEST_HELPER") {
	case "":
		return
	case "recoverable":
		policy = RecoveryRequeue
	}
	loops := newLoops(t, 2)
	d, err := Start(testContext(t), Config{ID: -1, Device: newRAM(t, block.Geometry{}), Loops: loops, Recovery: policy})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("serving %d\n", d.ID())
	select {}
}

// TestKilled: what a killed server leaves behind can be found and removed.
func TestKilled(t *testing.T) {
	requireUblk(t)
	ctx := testContext(t)
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^TestHelperServe$")
	cmd.Env = append(os.Environ(), "UBLK_TEST_HELPER=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var id int
	if _, err := fmt.Fscanf(out, "serving %d\n", &id); err != nil {
		t.Fatal(err)
	}
	info, err := Get(ctx, id)
	if err != nil || info.PID != cmd.Process.Pid || info.State != Live {
		t.Fatalf("served: %+v, %v", info, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for info.State != Dead { // the kernel takes the disk away in its own time
		if info, err = Get(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	list, err := List(ctx)
	if err != nil || len(list) != 1 || list[0].ID != id || !list[0].Ours() || list[0].PID > 0 {
		t.Fatalf("left over: %+v, %v", list, err)
	}
	for err = Remove(ctx, list[0]); errors.Is(err, ErrBusy); err = Remove(ctx, list[0]) {
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := Remove(ctx, list[0]); !errors.Is(err, ErrNoDevice) {
		t.Errorf("second remove: %v", err)
	}
}

// scanned waits until the kernel has looked for partitions.
func scanned(t testing.TB, d *Device) {
	t.Helper()
	fd := openDisk(t, d, unix.O_RDONLY)
	for ctx := testContext(t); ; {
		// It takes its turn behind the scan, and is refused before it.
		err := unix.IoctlSetInt(fd, unix.BLKRRPART, 0)
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("scan %s for partitions: %v", d.Path(), err)
		}
	}
	_ = unix.Close(fd)
}

// TestDeadLoop: the end of a loop's thread is the end of the device.
func TestDeadLoop(t *testing.T) {
	requireUblk(t)
	loops := newLoops(t, 1)
	l, err := poller.New(poller.Config{Name: "doomed"})
	if err != nil {
		t.Fatal(err)
	}
	d, err := Start(testContext(t), Config{ID: -1, Device: newNull(t, block.Geometry{}), Loops: append(loops, l)})
	if err != nil {
		t.Fatal(err)
	}
	if len(d.QueueStats()) < 2 {
		t.Fatal("needs two CPUs")
	}
	scanned(t, d) // a request on the dead loop would hang
	go func() { _ = l.Call(runtime.Goexit) }()
	select {
	case <-d.Done():
	case <-time.After(patience):
		t.Fatal("not done")
	}
	if d.Err() == nil || errors.Is(d.Err(), ErrStopped) {
		t.Errorf("ended with %v", d.Err())
	}
	t.Log(d.Err())
	if _, err := Get(testContext(t), d.ID()); !errors.Is(err, ErrNoDevice) {
		t.Errorf("left over: %v", err)
	}
}

// TestRecoveryFlags: the policy's flags are asked for and granted.
func TestRecoveryFlags(t *testing.T) {
	requireUblk(t)
	known, err := GetFeatures(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	const all = UserRecovery | RecoveryReissue | RecoveryFailIO
	for policy, want := range map[RecoveryPolicy]Features{
		RecoveryUnset: 0, RecoveryNone: 0, RecoveryRequeue: UserRecovery | RecoveryReissue, RecoveryFail: UserRecovery | RecoveryFailIO,
	} {
		d, err := Start(testContext(t), Config{ID: -1, Device: newNull(t, block.Geometry{}), Loops: newLoops(t, 1), Recovery: policy})
		if !known.Has(want) {
			if !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("policy %d: %v", policy, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := d.Features() & all; got != want {
			t.Errorf("policy %d: granted %v, want %v", policy, got, want)
		}
		stop(t, d)
	}
}

// killable starts a server, whose device outlives it, in another process.
func killable(ctx context.Context, t testing.TB) (info Info, kill func()) {
	t.Helper()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^TestHelperServe$")
	cmd.Env = append(os.Environ(), "UBLK_TEST_HELPER=recoverable")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var id int
	if _, err := fmt.Fscanf(out, "serving %d\n", &id); err != nil {
		t.Fatal(err)
	}
	if info, err = Get(ctx, id); err != nil {
		t.Fatal(err)
	}
	return info, func() {
		t.Helper()
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
	}
}

// TestRecover: another process takes over the device of a killed server, and no read fails.
func TestRecover(t *testing.T) {
	requireUblk(t)
	ctx := testContext(t)
	info, kill := killable(ctx, t)
	// Half as large, which drivers that can pass on; with a cache, which users do not
	// know of; with a limit below the size of the device's requests.
	back := &recorder{Device: newNull(t, block.Geometry{
		Sectors: newRAM(t, block.Geometry{}).Geometry().Sectors / 2, VolatileCache: true, MaxIO: uint32(info.MaxIO / 2),
	})}
	cfg := Config{Device: back, Loops: newLoops(t, info.Queues)}
	if _, err := Recover(ctx, info, cfg); !errors.Is(err, ErrBusy) {
		t.Errorf("recover from a server that lives: %v", err)
	}
	reads := exec.CommandContext(ctx, "dd", "if="+info.Path(), "of=/dev/null", "bs=64k", "count=256", "iflag=direct", "status=none")
	if err := reads.Start(); err != nil {
		t.Fatal(err)
	}
	kill()
	coarse := cfg
	coarse.Device = newNull(t, block.Geometry{LogicalBlock: 4096})
	if _, err := Recover(ctx, info, coarse); err == nil || !strings.Contains(err.Error(), "block size") {
		t.Errorf("recover over a back end of other blocks: %v", err)
	}
	other := info
	other.Cookie++
	if _, err := Recover(ctx, other, cfg); !errors.Is(err, ErrNotOurs) {
		t.Errorf("recover of another device: %v", err)
	}
	d, err := Recover(ctx, info, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if n := back.writeThrough.Load(); n != int64(info.Queues) {
		t.Errorf("%d of %d queues are opened write-through", n, info.Queues)
	}
	if err := reads.Wait(); err != nil {
		t.Errorf("read through the recovery: %v", err)
	}
	if s := d.QueueStats(); s[0].Reads+s[len(s)-1].Reads == 0 {
		t.Error("nothing was read from the second server")
	}
	stop(t, d)
}

// TestChange: size and write protection of a device that is served.
func TestChange(t *testing.T) {
	requireUblk(t)
	ctx := testContext(t)
	d := start(t, Config{ID: -1, Device: newNull(t, block.Geometry{}), Loops: newLoops(t, 1)})
	read := func(name string) string {
		text, err := os.ReadFile(fmt.Sprintf("/sys/block/ublkb%d/%s", d.ID(), name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(text))
	}
	was := read("size")
	err := d.Resize(ctx, 12345*8)
	switch got := read("size"); {
	case d.Features().Has(UpdateSize) && (err != nil || got != "98760"):
		t.Errorf("resized to %s sectors: %v", got, err)
	case !d.Features().Has(UpdateSize) && (!errors.Is(err, errors.ErrUnsupported) || got != was):
		t.Errorf("a driver that cannot: %s sectors, %v", got, err)
	}
	for _, ro := range []bool{true, false} {
		want := map[bool]string{true: "1", false: "0"}[ro]
		if err := d.SetReadOnly(ro); err != nil || read("ro") != want {
			t.Errorf("read-only %t: ro is %s, %v", ro, read("ro"), err)
		}
	}
}

// waitsForDisk says whether a thread of this process is in an uninterruptible sleep.
func waitsForDisk(t testing.TB, tid int) bool {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/stat", tid))
	if err != nil {
		t.Fatalf("the thread that should wait: %v", err)
	}
	// tid (name) state …
	return strings.HasPrefix(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " D")
}

// TestAbandon: a device that waits for a server can be given up, but not under
// its users' feet unless they are to get errors.
func TestAbandon(t *testing.T) {
	requireUblk(t)
	ctx := testContext(t)
	info, kill := killable(ctx, t)
	if err := Abandon(ctx, info, true); !errors.Is(err, ErrBusy) {
		t.Errorf("abandon a device with a server: %v", err)
	}
	fd, err := unix.Open(info.Path(), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	kill()
	for now := info; now.State != Quiesced; { // the kernel notices in its own time
		if now, err = Get(ctx, info.ID); err != nil {
			t.Fatal(err)
		}
	}
	if err := Abandon(ctx, info, false); !errors.Is(err, ErrBusy) {
		t.Errorf("abandon a device in use: %v", err)
	}
	read, tid := make(chan error, 1), make(chan int, 1)
	buf := directBuffer(t, 4096)
	go func() {
		runtime.LockOSThread()
		tid <- unix.Gettid()
		_, err := unix.Pread(fd, buf, 0)
		read <- err
	}()
	for id := <-tid; !waitsForDisk(t, id); { // there is no event
		if ctx.Err() != nil {
			t.Fatal("the read does not wait for a server")
		}
	}
	if err := Abandon(ctx, info, true); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err == nil {
		t.Error("a read that waited succeeded")
	}
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	gone(t, info.ID)
}
