package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/testenv"
)

// The tests of the kernel's client need root and a kernel that has it. They connect
// and disconnect devices.

var loadModule = sync.OnceFunc(func() {
	if os.Getenv("UN_VM") != "" {
		_ = exec.Command("modprobe", "nbd").Run() // Available tells
	}
})

func requireKernel(t testing.TB) {
	t.Helper()
	loadModule()
	testenv.Need(t, "nbd", Available())
}

// startDevice makes a device. It is stopped by force at the end of the test.
func startDevice(t testing.TB, s *Server, cfg DeviceConfig) *Device {
	t.Helper()
	cfg.Server = s
	d, err := Start(testContext(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopDevice(t, d, true) })
	return d
}

func stopDevice(t testing.TB, d *Device, force bool) {
	t.Helper()
	if err := d.Stop(testContext(t), force); err != nil {
		t.Fatal(err)
	}
	await(t, "end of "+d.Path(), func() bool {
		there, err := Connected(d.Index(), d.Cookie())
		return err == nil && !there && sysfs(t, d, "size") == "0"
	})
}

func sysfs(t testing.TB, d *Device, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.Path()), name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

func TestKernelDevice(t *testing.T) {
	requireKernel(t)
	s, _ := newServer(t, Config{Exports: []Export{
		{Name: "rw", Device: newRAM(t, block.Geometry{LogicalBlock: 4096, VolatileCache: true})},
		{Name: "ro", Device: newRAM(t, block.Geometry{Sectors: 2048}), ReadOnly: true},
	}})
	d := startDevice(t, s, DeviceConfig{Index: -1, Export: "rw", Connections: 4})
	for name, want := range map[string]string{
		"size": "131072", "ro": "0", "queue/logical_block_size": "4096", "queue/write_cache": "write back", "queue/fua": "1",
	} {
		if got := sysfs(t, d, name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	if _, err := Start(testContext(t), DeviceConfig{Server: s, Index: d.Index(), Export: "ro"}); !errors.Is(err, ErrTaken) {
		t.Errorf("the same number again: %v", err)
	}
	ro := startDevice(t, s, DeviceConfig{Index: d.Index() + 1, Export: "ro"})
	if got := sysfs(t, ro, "ro"); got != "1" || ro.Index() != d.Index()+1 {
		t.Errorf("%s: read-only %s", ro.Path(), got)
	}

	for _, size := range []uint64{32 << 20, 64 << 20} {
		if err := d.Resize(testContext(t), size); err != nil {
			t.Error(err)
		}
		if got := sysfs(t, d, "size"); got != fmt.Sprint(size>>9) {
			t.Errorf("resized to %d bytes, has %s sectors", size, got)
		}
	}

	mnt := t.TempDir()
	run(t, "mkfs.ext4", "-q", d.Path())
	run(t, "mount", d.Path(), mnt)
	data := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	err := os.WriteFile(filepath.Join(mnt, "file"), data, 0o600)
	if berr := d.Stop(testContext(t), false); !errors.Is(berr, ErrBusy) || !errors.Is(d.InUse(), ErrBusy) {
		t.Errorf("stop of a mounted device: %v", berr)
	}
	run(t, "umount", mnt)
	run(t, "mount", "-o", "ro", d.Path(), mnt)
	got, rerr := os.ReadFile(filepath.Join(mnt, "file"))
	run(t, "umount", mnt)
	if err = errors.Join(err, rerr); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the file has %d bytes, others, or %v", len(got), err)
	}
	run(t, "fsck.ext4", "-fn", d.Path())
	if st := s.Snapshot("rw"); st.Errors != 0 || st.Flushes == 0 {
		t.Errorf("%+v", st)
	}
	stopDevice(t, d, false)
	if err := d.Err(); err != nil {
		t.Error(err)
	}
	stopDevice(t, d, false) // again
}

// TestKernelVerify writes at random over all connections, and reads the data back.
func TestKernelVerify(t *testing.T) {
	requireKernel(t)
	s, _ := newServer(t, Config{Exports: []Export{{Device: newRAM(t, block.Geometry{})}}})
	d := startDevice(t, s, DeviceConfig{Index: -1, Connections: 4})
	out := run(t, "fio", "--name=verify", "--filename="+d.Path(), "--ioengine=io_uring", "--direct=1", "--rw=randwrite", "--bsrange=512-1m",
		"--iodepth=32", "--size=64m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0")
	if !strings.Contains(out, "err= 0") {
		t.Error(out)
	}
	if st := s.Snapshot(""); st.ReadBytes < 64<<20 || st.WrittenBytes < 64<<20 || st.Errors != 0 {
		t.Errorf("%+v", st)
	}
	run(t, "blkdiscard", d.Path())
	if st := s.Snapshot(""); st.Discards == 0 || st.Errors != 0 {
		t.Errorf("%+v", st)
	}
}

// TestKernelLarge makes the kernel send its largest requests, which are much larger than
// all buffers, and checks that the kernel was given a smaller limit.
func TestKernelLarge(t *testing.T) {
	requireKernel(t)
	s, _ := newServer(t, Config{Depth: 16, MaxIO: 4096, Exports: []Export{{Device: newRAM(t, block.Geometry{LogicalBlock: 4096})}}})
	d := startDevice(t, s, DeviceConfig{Index: -1})
	if got := sysfs(t, d, "queue/max_sectors_kb"); got != "96" { // 12 buffers of two blocks
		t.Errorf("max_sectors_kb %s", got)
	}
	if err := d.Resize(testContext(t), 64<<20); err != nil || sysfs(t, d, "queue/max_sectors_kb") != "96" {
		t.Errorf("after a new size: %v, max_sectors_kb %s", err, sysfs(t, d, "queue/max_sectors_kb"))
	}
	file, data := randomFile(t, 32<<20)
	for _, most := range []string{"", "4096", sysfs(t, d, "queue/max_hw_sectors_kb")} {
		if most != "" { // somebody may set it anew
			if err := os.WriteFile(filepath.Join("/sys/block", filepath.Base(d.Path()), "queue/max_sectors_kb"), []byte(most), 0); err != nil {
				t.Fatal(err)
			}
		}
		run(t, "dd", "if="+file, "of="+d.Path(), "bs=16M", "oflag=direct", "conv=fsync")
		back := filepath.Join(t.TempDir(), "back")
		run(t, "dd", "if="+d.Path(), "of="+back, "bs=16M", "count=2", "iflag=direct")
		if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
			t.Errorf("max_sectors_kb %q: %d bytes, others, or %v", most, len(got), err)
		}
	}
	run(t, "blkdiscard", "-z", d.Path())
	run(t, "blkdiscard", d.Path())
	if st := s.Snapshot(""); st.Errors != 0 || st.ReadBytes < 96<<20 {
		t.Errorf("%+v", st)
	}
}

// TestKernelFlush checks that the kernel flushes although the device had no volatile
// cache when it was started.
func TestKernelFlush(t *testing.T) {
	requireKernel(t)
	dev := newShrinking(newRAM(t, block.Geometry{}))
	s, _ := newServer(t, Config{Exports: []Export{{Device: dev}}})
	d := startDevice(t, s, DeviceConfig{Index: -1})
	dev.change(func(g *block.Geometry) { g.VolatileCache = true })
	run(t, "dd", "if=/dev/zero", "of="+d.Path(), "bs=64k", "count=1", "conv=fsync")
	if dev.flushes.Load() == 0 {
		t.Error("no flush")
	}
}

// TestKernelUnaligned makes nbd-client connect the kernel to a socket. nbd-client uses
// sectors of 512 bytes, whatever the export's blocks are.
func TestKernelUnaligned(t *testing.T) {
	requireKernel(t)
	s, path := newServer(t, Config{Exports: []Export{{Name: "2", Device: newRAM(t, block.Geometry{LogicalBlock: 4096})}}})
	const disk = "/dev/nbd9"
	run(t, "nbd-client", "-N", "2", "-C", "4", "-unix", path, disk)
	defer run(t, "nbd-client", "-d", disk)
	mnt := t.TempDir()
	run(t, "mkfs.ext4", "-q", "-b", "1024", disk)
	run(t, "mount", disk, mnt)
	data := randomBytes(10 << 20)
	err := os.WriteFile(filepath.Join(mnt, "file"), data, 0o600)
	run(t, "umount", mnt)
	run(t, "fsck.ext4", "-fn", disk)
	run(t, "mount", "-o", "ro", disk, mnt)
	got, rerr := os.ReadFile(filepath.Join(mnt, "file"))
	run(t, "umount", mnt)
	if err = errors.Join(err, rerr); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the file has %d bytes, others, or %v", len(got), err)
	}
	run(t, "fio", "--name=verify", "--filename="+disk, "--ioengine=io_uring", "--direct=1", "--rw=randwrite", "--bsrange=512-64k",
		"--iodepth=32", "--size=32m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0")
	if st := s.Snapshot("2"); st.Errors != 0 || st.Writes == 0 {
		t.Errorf("%+v", st)
	}
}

// TestReconfigure loses one connection and then the others, and makes new ones. The
// kernel sends the lost requests again.
func TestReconfigure(t *testing.T) {
	requireKernel(t)
	s, _ := newServer(t, Config{Exports: []Export{{Device: newRAM(t, block.Geometry{})}}})
	d := startDevice(t, s, DeviceConfig{Index: -1, Connections: 2, DeadConn: time.Minute})
	write := func() error {
		return exec.CommandContext(testContext(t), "dd", "if=/dev/zero", "of="+d.Path(), "bs=64k", "count=16", "oflag=direct").Run()
	}
	cutOne := func() {
		first := true
		s.onConns(nil, func(c *conn) {
			if first {
				c.abandon()
			}
			first = false
		})
	}
	live := func(n int) func() bool {
		return func() bool {
			d.mu.Lock()
			defer d.mu.Unlock()
			return d.live == n
		}
	}
	awaitService(t, s, 2)
	cutOne()
	await(t, "the loss of a connection", live(1))
	if err := write(); err != nil {
		t.Errorf("with one connection left: %v", err)
	}
	await(t, "the kernel's notice of it", func() bool {
		return d.Reconfigure(testContext(t), 0, time.Minute) == nil && live(2)()
	})
	if err := write(); err != nil {
		t.Errorf("with two connections again: %v", err)
	}
}

// awaitService waits until loops serve n connections.
func awaitService(t *testing.T, s *Server, n int) {
	t.Helper()
	await(t, "the connections' service", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		admitted := 0
		for c := range s.conns {
			if c.admitted {
				admitted++
			}
		}
		return admitted == n
	})
}

// TestDisconnected checks a device that another process disconnects, and then a device
// whose server is dead.
func TestDisconnected(t *testing.T) {
	requireKernel(t)
	s, _ := newServer(t, Config{Exports: twoExports(t)})
	d := startDevice(t, s, DeviceConfig{Index: -1})
	if err := Disconnect(testContext(t), d.Index(), d.Cookie()+1, true); !errors.Is(err, ErrNoDevice) {
		t.Errorf("somebody else's: %v", err)
	}
	run(t, "nbd-client", "-d", d.Path())
	<-d.Done()
	if err := d.Err(); !errors.Is(err, ErrDisconnected) {
		t.Error(err)
	}

	left := startDevice(t, s, DeviceConfig{Index: -1})
	awaitService(t, s, left.cfg.Connections)
	s.onConns(nil, (*conn).abandon)
	<-left.Done()
	if there, err := Connected(left.Index(), left.Cookie()); err != nil || !there {
		t.Errorf("without a server: %t, %v", there, err)
	}
	if err := Disconnect(testContext(t), left.Index(), left.Cookie(), false); err != nil {
		t.Error(err)
	}
}

// TestKernelOrder ends the server before its device.
func TestKernelOrder(t *testing.T) {
	requireKernel(t)
	s, l, _ := plainServer(t, newRAM(t, block.Geometry{}))
	d, err := Start(testContext(t), DeviceConfig{Server: s, Index: -1})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(testContext(t), true); err != nil {
		t.Error(err)
	}
	if err := l.Stop(); err != nil {
		t.Error(err)
	}
	<-d.Done()
	if err := d.Err(); !errors.Is(err, ErrDisconnected) {
		t.Error(err)
	}
	if err := d.Reconfigure(testContext(t), 0, 0); !errors.Is(err, ErrNoDevice) {
		t.Errorf("new connections: %v", err)
	}
	if err := d.Resize(testContext(t), 32<<20); err != nil {
		t.Logf("new size: %v", err) // the kernel may still take it
	}
	stopDevice(t, d, true)
	stopDevice(t, d, false)
}

// TestKernelInFlight stops a device whose back end does not answer.
func TestKernelInFlight(t *testing.T) {
	requireKernel(t)
	g := newGate(t, block.Geometry{})
	s, _ := newServer(t, Config{Exports: []Export{{Device: g}}, Loops: g.loops})
	d := startDevice(t, s, DeviceConfig{Index: -1})
	fd, err := unix.Open(d.Path(), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	g.shut.Store(true) // not before: opening reads partition tables
	read := make(chan error)
	go func() {
		buf := must(unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS))
		_, err := unix.Pread(fd, buf, 0)
		read <- err
	}()
	await(t, "the read", func() bool { return g.inside.Load() > 0 })
	ctx, cancel := context.WithTimeout(testContext(t), time.Second)
	defer cancel()
	if err := d.Stop(ctx, true); err == nil {
		t.Error("stopped with a request at the back end")
	}
	g.open()
	if err := d.Stop(testContext(t), true); err != nil {
		t.Error(err)
	}
	<-read // its fate depends on who was first
}

// TestAttributes builds and reads netlink attributes.
func TestAttributes(t *testing.T) {
	a := attributes(nil).u32(attrIndex, 7).text(attrBackend, "abc").u64(attrSize, 1<<40).sockets([]int{3, 4})
	if len(a)%4 != 0 {
		t.Errorf("%d bytes", len(a))
	}
	ne := binary.NativeEndian
	if v := a.find(attrIndex); len(v) != 4 || ne.Uint32(v) != 7 {
		t.Errorf("index %x", v)
	}
	if v := a.find(attrBackend); string(v) != "abc\x00" {
		t.Errorf("text %q", v)
	}
	if v := a.find(attrSize); len(v) != 8 || ne.Uint64(v) != 1<<40 {
		t.Errorf("size %x", v)
	}
	item := attributes(attributes(a.find(attrSockets)).find(attrSocketItem))
	if v := item.find(attrSocketFD); len(v) != 4 || ne.Uint32(v) != 3 {
		t.Errorf("socket %x", v)
	}
	for n := range a {
		_ = fmt.Sprint(a[:n].find(99)) // nothing is beyond the end
	}
}
