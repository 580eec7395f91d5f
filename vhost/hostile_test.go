package vhost

import (
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/vhost/vhosttest"
)

// ends checks that the server hangs up with a reason, and then serves another front end.
func ends(t *testing.T, s *served, g *vhosttest.Guest, reason string) {
	t.Helper()
	if err := g.Conn.AwaitEnd(); err != nil {
		t.Fatalf("the session does not end: %v", err)
	}
	s.log.await(t, reason)
	other := connect(t, s, vhosttest.Config{Rings: 2})
	for _, r := range other.Rings {
		if got := do(t, r, vhosttest.In, 0, 512); got != vhosttest.OK {
			t.Fatalf("the next front end: status %d", got)
		}
	}
	other.Conn.Close()
}

const (
	next     = 1
	write    = 2
	indirect = 4
)

// TestMalformedRings has a guest that writes nonsense to its rings.
func TestMalformedRings(t *testing.T) {
	// address of the data of slot i, for descriptors
	data := func(r *vhosttest.Ring, i uint16) uint64 {
		_, at := r.Slot(i)
		return vhosttest.GuestBase + at
	}
	loops, disk := newLoops(t, 2), newRAM(t, block.Geometry{})
	for _, c := range []struct {
		name     string
		features uint64
		do       func(g *vhosttest.Guest, r *vhosttest.Ring)
		reason   string
	}{
		{"index jumps", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) { r.SetAvail(129); r.Notify() }, "129 ahead"},
		{"index goes back", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) { r.SetAvail(0xFFFF); r.Notify() }, "65535 ahead"},
		{"no such descriptor", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) { r.Offer(128) }, "names descriptor 128 of 128"},
		{"no such next", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, data(r, 0), 16, next, 128)
			r.Offer(0)
		}, "descriptor 128 of 128"},
		{"loop of one", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, data(r, 0), 16, next, 0)
			r.Offer(0)
		}, "is a loop"},
		{"loop of two", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, data(r, 0), 16, next, 1)
			r.SetDesc(1, data(r, 0), 16, next, 0)
			r.Offer(0)
		}, "is a loop"},
		{"empty descriptor", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, data(r, 0), 0, next, 1)
			r.Offer(0)
		}, "length 0"},
		{"below memory", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, 0, 16, 0, 0)
			r.Offer(0)
		}, "16 bytes at 0x0 are not"},
		{"beyond memory", 0, func(g *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, vhosttest.GuestBase+uint64(len(g.Mem))-8, 16, 0, 0)
			r.Offer(0)
		}, "are not in a memory region"},
		{"around the end", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, ^uint64(0)-3, 16, 0, 0)
			r.Offer(0)
		}, "are not in a memory region"},
		{"huge length", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, data(r, 0), 0xFFFFFFFF, 0, 0)
			r.Offer(0)
		}, "are not in a memory region"},
		{"written before read", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, data(r, 0), 16, write|next, 1)
			r.SetDesc(1, data(r, 0), 16, 0, 0)
			r.Offer(0)
		}, "only read follows"},
		{"short header", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, data(r, 0), 15, next, 1)
			r.SetDesc(1, data(r, 0), 1, write, 0)
			r.Offer(0)
		}, "fewer than its header"},
		{"no status", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, data(r, 0), 16, 0, 0)
			r.Offer(0)
		}, "no room for its status"},
		{"table of part of a descriptor", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, data(r, 0), 24, indirect, 0)
			r.Offer(0)
		}, "has 24 bytes"},
		{"empty table", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, data(r, 0), 0, indirect, 0)
			r.Offer(0)
		}, "has 0 bytes"},
		{"table beyond memory", 0, func(g *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, vhosttest.GuestBase+uint64(len(g.Mem))-16, 32, indirect, 0)
			r.Offer(0)
		}, "are not in a memory region"},
		{"table in a table", 0, func(g *vhosttest.Guest, r *vhosttest.Ring) {
			g.PutDesc(data(r, 0)-vhosttest.GuestBase, data(r, 0), 16, indirect, 0)
			r.SetDesc(0, data(r, 0), 16, indirect, 0)
			r.Offer(0)
		}, "reference to another table"},
		{"table and next", 0, func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, data(r, 0), 16, indirect|next, 1)
			r.Offer(0)
		}, "and to a next descriptor"},
		{"table that was not negotiated", ^uint64(vhosttest.FeatIndirect), func(_ *vhosttest.Guest, r *vhosttest.Ring) {
			r.SetDesc(0, data(r, 0), 16, indirect, 0)
			r.Offer(0)
		}, "was not negotiated"},
		{"table of 65536", 0, func(g *vhosttest.Guest, r *vhosttest.Ring) {
			at := data(r, 1)
			for i := range 65536 {
				g.PutDesc(at-vhosttest.GuestBase+16*uint64(i), at, 16, next, uint16(i+1))
			}
			r.SetDesc(0, at, 16*65536, indirect, 0)
			r.Offer(0)
		}, "more than 256 descriptors"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(t, Config{Device: disk, Loops: loops})
			g := connect(t, s, vhosttest.Config{Features: c.features, Data: 2 << 20, Rings: 2, RingSize: 128})
			c.do(g, g.Rings[0])
			ends(t, s, g, c.reason)
		})
	}
}

// TestTableOf65536 executes a request in a table of the largest size.
func TestTableOf65536(t *testing.T) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{})})
	g := connect(t, s, vhosttest.Config{Data: 2 << 20})
	r := g.Rings[0]
	head := r.Prepare(0, vhosttest.In, 0, 512)
	header, _ := r.Slot(0)
	_, table := r.Slot(1)
	copy(g.Mem[table:], g.Mem[header+64:][:3*16])
	r.SetDesc(head, vhosttest.GuestBase+table, 16*65536, indirect, 0)
	r.Submit(head)
	if _, status, err := r.Wait(); err != nil || status != vhosttest.OK {
		t.Fatalf("status %d: %v", status, err)
	}
}

// file makes a file of a kind that the protocol does not expect.
func file(t *testing.T, kind string) int {
	t.Helper()
	var fd int
	var err error
	switch kind {
	case "pipe":
		var p [2]int
		err = unix.Pipe2(p[:], unix.O_CLOEXEC)
		unix.Close(p[1])
		fd = p[0]
	case "device":
		fd, err = unix.Open("/dev/zero", unix.O_RDWR|unix.O_CLOEXEC, 0)
	case "directory":
		fd, err = unix.Open("/", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	case "eventfd":
		fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	case "epoll":
		fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	case "short":
		if fd, err = unix.MemfdCreate("short", unix.MFD_CLOEXEC); err == nil {
			err = unix.Ftruncate(fd, 4096)
		}
	case "read only":
		if fd, err = unix.MemfdCreate("sealed", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING); err == nil {
			err = unix.Ftruncate(fd, 1<<20)
			_, _ = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// TestMalformedMessages sends wrong messages to a session that works.
func TestMalformedMessages(t *testing.T) {
	loops, disk := newLoops(t, 2), newRAM(t, block.Geometry{})
	area := func(guest, size, user, offset uint64) []byte {
		le := binary.LittleEndian
		return le.AppendUint64(le.AppendUint64(le.AppendUint64(le.AppendUint64(nil, guest), size), user), offset)
	}
	header := vhosttest.Header
	for _, c := range []struct {
		name   string
		bytes  []byte
		files  []string
		reason string
	}{
		{"version", header(vhosttest.GetFeatures, 2, 0), nil, "want version 1"},
		{"a reply", header(vhosttest.GetFeatures, 1|4, 0), nil, "no reply"},
		{"large", header(vhosttest.GetFeatures, 1, 513), nil, "want up to 512"},
		{"huge", header(vhosttest.GetFeatures, 1, 1<<31), nil, "want up to 512"},
		{"unknown", header(99, 1, 0), nil, "message 99: the message was not negotiated"},
		{"cut off", header(vhosttest.SetFeatures, 1, 8)[:6], nil, "unexpected EOF"},
		{"payload cut off", append(header(vhosttest.SetFeatures, 1, 8), 1, 2), nil, "unexpected EOF"},
		{"short payload", append(header(vhosttest.SetFeatures, 1, 4), make([]byte, 4)...), nil, "payload of 4 bytes"},
		{"unknown feature", append(header(vhosttest.SetFeatures, 1, 8), vhosttest.U64(1<<63)...), nil, "were not offered"},
		{"unknown protocol feature", append(header(vhosttest.SetProtocolFeatures, 1, 8), vhosttest.U64(1<<8)...), nil, "were not offered"},
		{"nine files", header(vhosttest.GetFeatures, 1, 0), []string{"pipe", "pipe", "pipe", "pipe", "pipe", "pipe", "pipe", "pipe", "pipe", "pipe"}, "more than 8 file descriptors"},
		{"ring 256", append(header(vhosttest.SetVringNum, 1, 8), vhosttest.State(256, 128)...), nil, "want one below 256"},
		{"size of a served ring", append(header(vhosttest.SetVringNum, 1, 8), vhosttest.State(0, 64)...), nil, "is being served"},
		{"base of a served ring", append(header(vhosttest.SetVringBase, 1, 8), vhosttest.State(0, 64)...), nil, "is being served"},
		{"size 100", append(header(vhosttest.SetVringNum, 1, 8), vhosttest.State(7, 100)...), nil, "power of two"},
		{"size 0", append(header(vhosttest.SetVringNum, 1, 8), vhosttest.State(7, 0)...), nil, "power of two"},
		{"size 65536", append(header(vhosttest.SetVringNum, 1, 8), vhosttest.State(7, 65536)...), nil, "power of two"},
		{"base 65536", append(header(vhosttest.SetVringBase, 1, 8), vhosttest.State(7, 65536)...), nil, "want up to 65535"},
		{"enable 2", append(header(vhosttest.SetVringEnable, 1, 8), vhosttest.State(0, 2)...), nil, "want 0 or 1"},
		{"ring beyond memory", append(header(vhosttest.SetVringAddr, 1, 40), make([]byte, 40)...), nil, "not within a memory region"},
		{"ring not aligned", append(header(vhosttest.SetVringAddr, 1, 40), append(make([]byte, 8), append(vhosttest.U64(vhosttest.UserBase+8), make([]byte, 24)...)...)...), nil, "not aligned to 16"},
		{"kick is a pipe", append(header(vhosttest.SetVringKick, 1, 8), vhosttest.U64(7)...), []string{"pipe"}, "not an eventfd"},
		{"kick is an epoll", append(header(vhosttest.SetVringKick, 1, 8), vhosttest.U64(7)...), []string{"epoll"}, "not an eventfd"},
		{"call is a device", append(header(vhosttest.SetVringCall, 1, 8), vhosttest.U64(0)...), []string{"device"}, "not an eventfd"},
		{"no kick", append(header(vhosttest.SetVringKick, 1, 8), vhosttest.U64(7)...), nil, "0 file descriptors, want 1"},
		{"a kick too much", append(header(vhosttest.SetVringKick, 1, 8), vhosttest.U64(7|1<<8)...), []string{"eventfd"}, "there is none"},
		{"bits of a kick", append(header(vhosttest.SetVringKick, 1, 8), vhosttest.U64(1<<9)...), nil, "unknown bits"},
		{"table without files", append(header(vhosttest.SetMemTable, 1, 40), vhosttest.Table(area(0, 4096, 0, 0))...), nil, "do not fit together"},
		{"nine regions", append(header(vhosttest.SetMemTable, 1, 8), vhosttest.U64(9)...), nil, "do not fit together"},
		{"memory is a pipe", append(header(vhosttest.SetMemTable, 1, 40), vhosttest.Table(area(0, 4096, 0, 0))...), []string{"pipe"}, "not a memfd"},
		{"memory is a device", append(header(vhosttest.AddMemReg, 1, 40), vhosttest.Single(area(0, 4096, 0, 0))...), []string{"device"}, "not a memfd"},
		{"memory is a directory", append(header(vhosttest.AddMemReg, 1, 40), vhosttest.Single(area(0, 4096, 0, 0))...), []string{"directory"}, "not a memfd"},
		{"memory is an eventfd", append(header(vhosttest.AddMemReg, 1, 40), vhosttest.Single(area(0, 4096, 0, 0))...), []string{"eventfd"}, "not a memfd"},
		{"memory is read only", append(header(vhosttest.AddMemReg, 1, 40), vhosttest.Single(area(0, 4096, 0, 0))...), []string{"read only"}, "map 4096 bytes"},
		{"short file", append(header(vhosttest.AddMemReg, 1, 40), vhosttest.Single(area(0, 8192, 0, 0))...), []string{"short"}, "beyond the end of the file"},
		{"offset beyond the file", append(header(vhosttest.AddMemReg, 1, 40), vhosttest.Single(area(0, 4096, 0, 4096))...), []string{"short"}, "beyond the end of the file"},
		{"offset overflows", append(header(vhosttest.AddMemReg, 1, 40), vhosttest.Single(area(0, 4096, 0, ^uint64(4095)))...), []string{"short"}, "is too large"},
		{"size overflows", append(header(vhosttest.AddMemReg, 1, 40), vhosttest.Single(area(0, ^uint64(4095), 0, 4096))...), []string{"short"}, "is too large"},
		{"empty region", append(header(vhosttest.AddMemReg, 1, 40), vhosttest.Single(area(0, 0, 0, 0))...), []string{"short"}, "is empty"},
		{"overlap", append(header(vhosttest.AddMemReg, 1, 40), vhosttest.Single(area(vhosttest.GuestBase+4096, 4096, 0, 0))...), []string{"short"}, "overlap"},
		{"no such region", append(header(vhosttest.RemMemReg, 1, 40), vhosttest.Single(area(0, 4096, 0, 0))...), []string{"short"}, "there is no region"},
		{"memory of the rings vanishes", append(header(vhosttest.SetMemTable, 1, 40), vhosttest.Table(area(0, 4096, 0, 0))...), []string{"short"}, "not within a memory region"},
		{"record of no queue", append(header(vhosttest.GetInflightFD, 1, 20), make([]byte, 20)...), nil, "0 queues of 0 entries"},
		{"record while rings are served", append(header(vhosttest.SetInflightFD, 1, 20), make([]byte, 20)...), []string{"short"}, "is being served"},
		{"log is a pipe", append(header(vhosttest.SetLogBase, 1, 16), append(vhosttest.U64(4096), vhosttest.U64(0)...)...), []string{"pipe"}, "not a memfd"},
		{"log is short", append(header(vhosttest.SetLogBase, 1, 16), append(vhosttest.U64(8192), vhosttest.U64(0)...)...), []string{"short"}, "beyond the end of the file"},
		{"channel is a pipe", header(vhosttest.SetBackendReqFD, 1, 0), []string{"pipe"}, "not a socket"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(t, Config{Device: disk, Loops: loops})
			g := connect(t, s, vhosttest.Config{Rings: 2})
			if got := do(t, g.Rings[0], vhosttest.In, 0, 512); got != vhosttest.OK {
				t.Fatalf("status %d", got)
			}
			var fds []int
			for _, kind := range c.files {
				fds = append(fds, file(t, kind))
			}
			if err := g.Conn.Raw(c.bytes, fds...); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(c.reason, "EOF") {
				g.Conn.CloseWrite()
			}
			ends(t, s, g, c.reason)
		})
	}
}

// TestTruncated has a front end that truncates the guest's memory.
func TestTruncated(t *testing.T) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{})})
	for _, keep := range []int64{0, 4096, 64 << 10} {
		g := connect(t, s, vhosttest.Config{Rings: 2, Features: ^uint64(vhosttest.FeatIndirect), RingSize: 1024})
		r := g.Rings[0]
		if got := do(t, r, vhosttest.In, 0, 512); got != vhosttest.OK {
			t.Fatalf("status %d", got)
		}
		head := r.Prepare(0, vhosttest.Out, 0, 32<<10)
		r.Submit(head)
		if _, _, err := r.Wait(); err != nil {
			t.Fatal(err)
		}
		if keep > 0 { // the rings remain, but not the buffers
			r.Submit(head)
		}
		if err := unix.Ftruncate(g.FD, keep); err != nil {
			t.Fatal(err)
		}
		r.Notify()
		ends(t, s, g, "is gone: its file was truncated")
	}
}

// TestTruncatedRecord truncates the record of requests in flight.
func TestTruncatedRecord(t *testing.T) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{})})
	g := newGuest(t, vhosttest.Config{NoTrack: true})
	fd, err := unix.MemfdCreate("record", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 1<<20); err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	g.SetRecord(fd, le.AppendUint16(le.AppendUint16(append(vhosttest.U64(1<<20), vhosttest.U64(0)...), 1), 128))
	if err := g.Connect(s.path); err != nil {
		t.Fatal(err)
	}
	if got := do(t, g.Rings[0], vhosttest.In, 0, 512); got != vhosttest.OK {
		t.Fatalf("status %d", got)
	}
	if err := unix.Ftruncate(fd, 0); err != nil {
		t.Fatal(err)
	}
	g.Rings[0].Submit(g.Rings[0].Prepare(0, vhosttest.In, 0, 512))
	ends(t, s, g, "is gone: its file was truncated")
}

// TestFiles checks that sessions close all files that they got.
func TestFiles(t *testing.T) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{})})
	maps := func() int {
		text, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(text), "memfd:guest") + strings.Count(string(text), "memfd:vhost-inflight")
	}
	files, mapped := 0, 0
	for i := range 20 {
		g := newGuest(t, vhosttest.Config{Rings: 3})
		if err := g.Connect(s.path); err != nil {
			t.Fatal(err)
		}
		do(t, g.Rings[2], vhosttest.In, 0, 512)
		for range 3 { // files that nobody expects
			if err := g.Conn.Send(vhosttest.SetOwner, nil, g.FD, g.Rings[0].Kick); err != nil {
				t.Fatal(err)
			}
		}
		if err := g.Conn.Send(vhosttest.SetVringCall, vhosttest.U64(0), g.Rings[0].Call); err != nil {
			t.Fatal(err)
		}
		if err := g.Conn.Send(vhosttest.SetVringKick, vhosttest.U64(0), g.Rings[0].Kick); err != nil {
			t.Fatal(err)
		}
		do(t, g.Rings[0], vhosttest.In, 0, 512)
		g.Conn.Close()
		// The next session begins when nothing of this one is left.
		if err := g.Connect(s.path); err != nil {
			t.Fatal(err)
		}
		g.Conn.Close()
		other := connect(t, s, vhosttest.Config{Ack: true}) // so nothing is still in progress
		if i == 0 {
			files, mapped = len(testenv.OpenFiles(t)), maps()
		} else if f, m := len(testenv.OpenFiles(t)), maps(); f != files+8*i || m != mapped+i {
			t.Fatalf("round %d: %d files and %d mappings more", i, f-files, m-mapped)
		}
		_ = other.Close()
	}
}
