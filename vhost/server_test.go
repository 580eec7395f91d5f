package vhost

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/ram"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/vhost/vhosttest"
)

// served is a server with its socket.
type served struct {
	*Server
	path string
	log  *logged
}

// logged keeps what is logged.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{} // has a token when something was logged
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.more <- struct{}{}:
	default:
	}
	return l.text.Write(p)
}

// await waits until the log has a text.
func (l *logged) await(t testing.TB, text string) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		l.mu.Lock()
		all := l.text.String()
		l.mu.Unlock()
		if strings.Contains(all, text) {
			return
		}
		select {
		case <-l.more:
		case <-limit:
			t.Fatalf("the log has no %q:\n%s", text, all)
		}
	}
}

func newLoops(t testing.TB, n int) []*poller.Loop {
	t.Helper()
	if was := runtime.GOMAXPROCS(0); was < n+2 { // see the hazards of package poller
		runtime.GOMAXPROCS(n + 2)
		t.Cleanup(func() { runtime.GOMAXPROCS(was) })
	}
	var loops []*poller.Loop
	for i := range n {
		l, err := poller.New(poller.Config{Name: fmt.Sprintf("test-%d", i)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := l.Stop(); err != nil {
				t.Error(err)
			}
		})
		loops = append(loops, l)
	}
	return loops
}

// newServer serves a configuration until the end of the test, and checks that nothing is
// left then. Without loops it gets two.
func newServer(t testing.TB, cfg Config) *served {
	t.Helper()
	if cfg.Loops == nil {
		cfg.Loops = newLoops(t, 2)
	}
	log := &logged{more: make(chan struct{}, 1)}
	cfg.Log = slog.New(slog.NewTextHandler(log, nil))
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	end := make(chan error, 1)
	go func() { end <- s.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := s.Stop(ctx, true); err != nil {
			t.Error(err)
		}
		if err := <-end; err != nil {
			t.Error(err)
		}
		for i, w := range s.workers {
			w.check(t, i)
		}
	})
	return &served{s, path, log}
}

// check checks that a worker that has ended has lost nothing.
func (w *worker) check(t testing.TB, i int) {
	t.Helper()
	free, tasks := 0, 0
	for g := w.freeTag; g != none; g = w.tags[g].next {
		free++
	}
	for x := w.freeTask; x != nil; x = x.next {
		tasks++
	}
	if free != len(w.tags) || tasks != len(w.tasks) || w.running != 0 || len(w.rings) != 0 || len(w.reqs) != 0 || w.inflight != 0 || w.polled != 0 {
		t.Errorf("loop %d: %d of %d tags and %d of %d tasks are free, %d run, %d rings, %d requests, %d in flight, %d polled",
			i, free, len(w.tags), tasks, len(w.tasks), w.running, len(w.rings), len(w.reqs), w.inflight, w.polled)
	}
	if n := w.server.orphans.Load(); n != 0 {
		t.Errorf("%d orphans", n)
	}
}

func newRAM(t testing.TB, g block.Geometry) *ram.Device {
	t.Helper()
	d, err := ram.New(ram.Config{Geometry: g})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func newGuest(t testing.TB, cfg vhosttest.Config) *vhosttest.Guest {
	t.Helper()
	g, err := vhosttest.NewGuest(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() })
	return g
}

func connect(t testing.TB, s *served, cfg vhosttest.Config) *vhosttest.Guest {
	t.Helper()
	g := newGuest(t, cfg)
	if err := g.Connect(s.path); err != nil {
		t.Fatal(err)
	}
	return g
}

// do executes a request in slot 0 of a ring.
func do(t testing.TB, r *vhosttest.Ring, kind uint32, sector uint64, n int) byte {
	t.Helper()
	status, err := r.Do(0, kind, sector, uint32(n))
	if err != nil {
		t.Fatal(err)
	}
	return status
}

// configs are ways to use the rings.
var configs = map[string]vhosttest.Config{
	"all":          {Ack: true},
	"no ack":       {},
	"slots":        {Ack: true, Slots: true},
	"no indirect":  {Features: ^uint64(vhosttest.FeatIndirect)},
	"no event idx": {Features: ^uint64(vhosttest.FeatEventIdx)},
	"no record":    {NoTrack: true},
	"polled":       {Polled: true},
	"small ring":   {RingSize: 4},
	"four rings":   {Rings: 4},
}

// TestData writes, reads, discards and zeroes random ranges on all rings, and compares with
// a copy. Requests are up to 4 times as large as a buffer.
func TestData(t *testing.T) {
	for name, cfg := range configs {
		for _, lb := range []uint32{512, 4096} {
			t.Run(fmt.Sprintf("%s/%d", name, lb), func(t *testing.T) {
				s := newServer(t, Config{Device: newRAM(t, dataGeometry(lb)), MaxIO: 16 << 10})
				testData(t, connect(t, s, cfg), lb)
			})
		}
	}
}

func dataGeometry(lb uint32) block.Geometry {
	return block.Geometry{Sectors: 8192, LogicalBlock: lb, ChunkSectors: 24, MaxDiscardSectors: 40, MaxZeroesSectors: 16, VolatileCache: true}
}

// testData uses a disk of dataGeometry.
func testData(t *testing.T, g *vhosttest.Guest, lb uint32) {
	const sectors = 8192
	rnd := rand.New(rand.NewPCG(1, 2))
	want := make([]byte, sectors<<9)
	unit := uint64(lb >> 9)
	for i := range 300 {
		r := g.Rings[i%len(g.Rings)]
		n := (1 + rnd.Uint64N(128/unit)) * unit
		sector := rnd.Uint64N((sectors-n)/unit) * unit
		data, disk := r.Data(0)[:n<<9], want[sector<<9:][:n<<9]
		kind := []uint32{vhosttest.In, vhosttest.Out, vhosttest.Discard, vhosttest.WriteZeroes, vhosttest.Flush}[rnd.IntN(5)]
		size := len(data)
		switch kind {
		case vhosttest.Out:
			for j := range data {
				data[j] = byte(rnd.Uint32())
			}
			copy(disk, data)
		case vhosttest.In:
			clear(data)
		case vhosttest.Flush:
			size = 0
		default: // two ranges
			half := n / 2 / unit * unit
			clear(disk)
			size = copy(data, rangeBytes(sector, uint32(half), 0))
			size += copy(data[size:], rangeBytes(sector+half, uint32(n-half), 0))
		}
		if status := do(t, r, kind, sector, size); status != vhosttest.OK {
			t.Fatalf("request %d of type %d: status %d", i, kind, status)
		}
		if kind == vhosttest.In && !bytes.Equal(data, disk) {
			t.Fatalf("request %d: wrong data", i)
		}
	}
}

// rangeBytes is a struct virtio_blk_discard_write_zeroes.
func rangeBytes(sector uint64, sectors, flags uint32) []byte {
	le := binary.LittleEndian
	return le.AppendUint32(le.AppendUint32(le.AppendUint64(nil, sector), sectors), flags)
}

// TestStatus checks the status of requests that are wrong, but not malformed.
func TestStatus(t *testing.T) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{Sectors: 1024, LogicalBlock: 4096}), ID: "disk of a test"})
	g := connect(t, s, vhosttest.Config{})
	r := g.Rings[0]
	for _, c := range []struct {
		name   string
		kind   uint32
		sector uint64
		n      int
		data   []byte
		want   byte
	}{
		{name: "unknown", kind: 99, want: vhosttest.Unsupported},
		{name: "part of a sector", kind: vhosttest.Out, n: 100, want: vhosttest.IOErr},
		{name: "part of a block", kind: vhosttest.In, n: 512, want: vhosttest.IOErr},
		{name: "within a block", kind: vhosttest.In, sector: 1, n: 4096, want: vhosttest.IOErr},
		{name: "no data", kind: vhosttest.In, want: vhosttest.IOErr},
		{name: "last block", kind: vhosttest.In, sector: 1016, n: 4096, want: vhosttest.OK},
		{name: "across the end", kind: vhosttest.In, sector: 1016, n: 8192, want: vhosttest.IOErr},
		{name: "overflow", kind: vhosttest.Out, sector: ^uint64(7), n: 8192, want: vhosttest.IOErr},
		{name: "no range", kind: vhosttest.Discard, want: vhosttest.IOErr},
		{name: "part of a range", kind: vhosttest.Discard, n: 15, want: vhosttest.IOErr},
		{name: "many ranges", kind: vhosttest.Discard, n: 33 * 16, data: make([]byte, 33*16), want: vhosttest.IOErr},
		{name: "empty range", kind: vhosttest.Discard, n: 16, data: rangeBytes(0, 0, 0), want: vhosttest.OK},
		{name: "discard with unmap", kind: vhosttest.Discard, n: 16, data: rangeBytes(0, 8, 1), want: vhosttest.Unsupported},
		{name: "zeroes with unmap", kind: vhosttest.WriteZeroes, n: 16, data: rangeBytes(0, 8, 1), want: vhosttest.OK},
		{name: "zeroes with a flag", kind: vhosttest.WriteZeroes, n: 16, data: rangeBytes(0, 8, 2), want: vhosttest.Unsupported},
		{name: "range beyond the end", kind: vhosttest.WriteZeroes, n: 16, data: rangeBytes(1016, 16, 0), want: vhosttest.IOErr},
		{name: "id", kind: vhosttest.GetID, n: 20, want: vhosttest.OK},
	} {
		copy(r.Data(0), c.data)
		if got := do(t, r, c.kind, c.sector, c.n); got != c.want {
			t.Errorf("%s: status %d, want %d", c.name, got, c.want)
		}
	}
	if id := string(bytes.TrimRight(r.Data(0)[:20], "\x00")); id != "disk of a test" {
		t.Errorf("id %q", id)
	}
	stats := s.Snapshot()
	if stats.Errors != 13 || stats.Discards != 6-1 || stats.Failed.Discards != 4 {
		t.Errorf("%+v", stats)
	}
}

// TestReadOnly checks the feature, and that writes fail.
func TestReadOnly(t *testing.T) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{ReadOnly: true})})
	g := connect(t, s, vhosttest.Config{})
	if g.Offered&vhosttest.FeatReadOnly == 0 {
		t.Errorf("features %#x", g.Offered)
	}
	if got := do(t, g.Rings[0], vhosttest.Out, 0, 512); got != vhosttest.IOErr {
		t.Errorf("write: status %d", got)
	}
	if got := do(t, g.Rings[0], vhosttest.In, 0, 512); got != vhosttest.OK {
		t.Errorf("read: status %d", got)
	}
}

// resizable is a device whose size changes.
type resizable struct {
	block.Device
	mu       sync.Mutex
	geometry block.Geometry
}

func (d *resizable) Geometry() block.Geometry {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.geometry
}

// TestConfigSpace reads the configuration space, and hears of a new size.
func TestConfigSpace(t *testing.T) {
	back := newRAM(t, block.Geometry{Sectors: 1 << 14, LogicalBlock: 512, PhysicalBlock: 4096, IOMin: 4096, IOOpt: 65536, DiscardGranularity: 8192})
	d := &resizable{Device: back, geometry: back.Geometry()}
	d.geometry.Sectors = 1 << 13
	s := newServer(t, Config{Device: d})
	g := connect(t, s, vhosttest.Config{})
	le := binary.LittleEndian
	get := func(offset, size uint32) []byte {
		ask := le.AppendUint32(le.AppendUint32(le.AppendUint32(nil, offset), size), 0)
		p, _, err := g.Conn.Ask(vhosttest.GetConfig, append(ask, make([]byte, size)...))
		if err != nil {
			t.Fatal(err)
		}
		if len(p) == 0 {
			return nil
		}
		return p[12:]
	}
	p := get(0, 60)
	for _, c := range []struct {
		name      string
		got, want uint64
	}{
		{"capacity", le.Uint64(p), 1 << 13}, {"seg_max", uint64(le.Uint32(p[12:])), 126},
		{"blk_size", uint64(le.Uint32(p[20:])), 512}, {"physical_block_exp", uint64(p[24]), 3},
		{"min_io_size", uint64(le.Uint16(p[26:])), 8}, {"opt_io_size", uint64(le.Uint32(p[28:])), 128},
		{"max_discard_seg", uint64(le.Uint32(p[40:])), 32}, {"discard_sector_alignment", uint64(le.Uint32(p[44:])), 16},
		{"write_zeroes_may_unmap", uint64(p[56]), 1},
	} {
		if c.got != c.want {
			t.Errorf("%s is %d, want %d", c.name, c.got, c.want)
		}
	}
	if got := get(200, 57); got != nil {
		t.Errorf("beyond the end: %d bytes", len(got))
	}
	if got := do(t, g.Rings[0], vhosttest.In, 1<<13, 512); got != vhosttest.IOErr {
		t.Errorf("read beyond the end: status %d", got)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	if err := g.Conn.Send(vhosttest.SetBackendReqFD, nil, fds[1]); err != nil {
		t.Fatal(err)
	}
	unix.Close(fds[1])
	if p := get(0, 8); le.Uint64(p) != 1<<13 { // so the socket has arrived
		t.Errorf("capacity %d", le.Uint64(p))
	}
	d.mu.Lock()
	d.geometry.Sectors = 1 << 14
	d.mu.Unlock()
	if err := s.Changed(); err != nil {
		t.Fatal(err)
	}
	news := make([]byte, 12)
	if n, err := unix.Read(fds[0], news); n != 12 || err != nil || !bytes.Equal(news, vhosttest.Header(2, 1, 0)) {
		t.Fatalf("% x, %d, %v", news, n, err)
	}
	if p := get(0, 8); le.Uint64(p) != 1<<14 {
		t.Errorf("capacity %d", le.Uint64(p))
	}
	if got := do(t, g.Rings[0], vhosttest.In, 1<<13, 512); got != vhosttest.OK {
		t.Errorf("read: status %d", got)
	}
}

// TestDepth has as many requests in flight as the rings allow, and fewer tags.
func TestDepth(t *testing.T) {
	for _, features := range []uint64{^uint64(0), ^uint64(vhosttest.FeatEventIdx)} {
		s := newServer(t, Config{Device: newRAM(t, block.Geometry{}), Depth: 7, MaxIO: 4096})
		g := connect(t, s, vhosttest.Config{Rings: 4, Features: features, Data: 16 << 10})
		var all sync.WaitGroup
		for _, r := range g.Rings {
			all.Go(func() {
				for range 200 {
					var heads []uint16
					for r.Free() > 0 {
						heads = append(heads, r.Prepare(r.Take(), vhosttest.In, uint64(8*len(heads)), uint32(4096*(1+len(heads)%4))))
					}
					r.Submit(heads...)
					for range heads {
						slot, status, err := r.Wait()
						if err != nil || status != vhosttest.OK {
							t.Errorf("ring %d: status %d: %v", r.Index, status, err)
							return
						}
						r.Release(slot)
					}
				}
			})
		}
		all.Wait()
	}
}

// TestStopAndStart stops rings in order and starts them again, as for a guest that is
// paused, and resets the device, as for one that boots again.
func TestStopAndStart(t *testing.T) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{})})
	g := connect(t, s, vhosttest.Config{Rings: 2, Ack: true})
	for i := range 5 {
		for _, r := range g.Rings {
			if got := do(t, r, vhosttest.In, 0, 512); got != vhosttest.OK {
				t.Fatalf("status %d", got)
			}
			base, err := r.Stop()
			if err != nil || base != uint32(i+1) {
				t.Fatalf("base %d, %v", base, err)
			}
			if err := r.Start(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := g.Conn.Send(vhosttest.ResetDevice, nil); err != nil {
		t.Fatal(err)
	}
	for _, r := range g.Rings {
		if err := r.Start(); err != nil {
			t.Fatal(err)
		}
		if got := do(t, r, vhosttest.In, 0, 512); got != vhosttest.OK {
			t.Fatalf("status %d", got)
		}
	}
}

// TestDisabled checks that a disabled ring executes nothing.
func TestDisabled(t *testing.T) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{})})
	g := connect(t, s, vhosttest.Config{Ack: true})
	r := g.Rings[0]
	if err := g.Conn.Send(vhosttest.SetVringEnable, vhosttest.State(0, 0)); err != nil {
		t.Fatal(err)
	}
	r.Submit(r.Prepare(0, vhosttest.In, 0, 512))
	r.Notify()
	// The loop has seen the kick when it has done two calls.
	for range 2 {
		if err := g.Conn.Send(vhosttest.SetVringEnable, vhosttest.State(0, 0)); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, ok := r.Reap(); ok {
		t.Fatal("a disabled ring was served")
	}
	if err := g.Conn.Send(vhosttest.SetVringEnable, vhosttest.State(0, 1)); err != nil {
		t.Fatal(err)
	}
	if _, status, err := r.Wait(); err != nil || status != vhosttest.OK {
		t.Fatalf("status %d: %v", status, err)
	}
}

// TestReconnect lets a front end go and come back, and others come meanwhile.
func TestReconnect(t *testing.T) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{})})
	g := newGuest(t, vhosttest.Config{Rings: 2})
	for range 20 {
		if err := g.Connect(s.path); err != nil {
			t.Fatal(err)
		}
		for _, r := range g.Rings {
			if got := do(t, r, vhosttest.Out, 0, 512); got != vhosttest.OK {
				t.Fatalf("status %d", got)
			}
		}
		other, err := vhosttest.Dial(s.path)
		if err != nil {
			t.Fatal(err)
		}
		if err := other.AwaitEnd(); err != nil {
			t.Fatal(err)
		}
		other.Close()
		g.Conn.Close()
	}
	s.log.await(t, "refused, because another one is connected")
}

// TestLog checks the log of written pages, with a log that is switched on while the rings
// are served.
func TestLog(t *testing.T) {
	// The data of slot 0 is in two regions, so it is copied. That of slot 1 is not.
	for slot, zeroCopy := range []bool{false, true} {
		t.Run(fmt.Sprintf("zero copy=%v", zeroCopy), func(t *testing.T) { testLog(t, uint16(slot), zeroCopy) })
	}
}

func testLog(t *testing.T, slot uint16, zeroCopy bool) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{}), ZeroCopy: zeroCopy})
	g := connect(t, s, vhosttest.Config{Ack: true, Features: ^uint64(vhosttest.FeatIndirect), Sealed: true})
	do := func(t *testing.T, r *vhosttest.Ring, kind uint32, sector uint64, n int) {
		t.Helper()
		if status, err := r.Do(slot, kind, sector, uint32(n)); err != nil || status != vhosttest.OK {
			t.Fatal(status, err)
		}
	}
	r := g.Rings[0]
	size := uint64(vhosttest.GuestBase+len(g.Mem)) / 4096 / 8
	fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	size = (size + 4096) &^ 4095
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		t.Fatal(err)
	}
	log, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(log)
	base := append(vhosttest.U64(size), vhosttest.U64(0)...)
	g.Conn.Ack = false // it has a reply of its own
	if _, _, err := g.Conn.Ask(vhosttest.SetLogBase, base, fd); err != nil {
		t.Fatal(err)
	}
	g.Conn.Ack = true
	dirty := func() (pages []uint64) {
		for i, b := range log {
			for bit := range 8 {
				if b>>bit&1 != 0 {
					pages = append(pages, uint64(8*i+bit)-vhosttest.GuestBase/4096)
				}
			}
			log[i] = 0
		}
		return pages
	}
	header, data := r.Slot(slot)
	do(t, r, vhosttest.In, 0, 8192)
	if got := dirty(); got != nil {
		t.Fatalf("without LOG_ALL: %v", got)
	}
	if err := g.Conn.Send(vhosttest.SetFeatures, vhosttest.U64(g.Features|vhosttest.FeatLogAll)); err != nil {
		t.Fatal(err)
	}
	if err := g.Conn.Send(vhosttest.SetVringAddr, r.Addr(1)); err != nil {
		t.Fatal(err)
	}
	dirty()
	do(t, r, vhosttest.In, 0, 8192)
	pages := []uint64{r.Used / 4096, header / 4096}
	for page := data / 4096; page <= (data+8191)/4096; page++ {
		pages = append(pages, page)
	}
	want := fmt.Sprint(slices.Compact(pages))
	if got := fmt.Sprint(dirty()); got != want {
		t.Errorf("read: pages %v, want %v", got, want)
	}
	do(t, r, vhosttest.Out, 0, 8192)
	want = fmt.Sprint([]uint64{r.Used / 4096, header / 4096})
	if got := fmt.Sprint(dirty()); got != want {
		t.Errorf("write: pages %v, want %v", got, want)
	}
	if err := g.Conn.Send(vhosttest.SetFeatures, vhosttest.U64(g.Features)); err != nil {
		t.Fatal(err)
	}
	dirty()
	do(t, r, vhosttest.In, 0, 8192)
	if got := dirty(); got != nil {
		t.Errorf("after LOG_ALL: %v", got)
	}
}
