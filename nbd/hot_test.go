package nbd

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/null"
)

// pipe is a client that does not allocate. It is one end of a socket pair, whose other
// end the server has in the transmission phase.
type pipe struct {
	fd  int
	buf []byte
}

func newPipe(t testing.TB, s *Server, export string, structured bool) *pipe {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	gone := make(chan error, 1)
	go func() { gone <- s.transmit(nil, fds[0], s.find(export).offer(structured), stallTicks) }()
	t.Cleanup(func() {
		_ = unix.Close(fds[1])
		if err := <-gone; err != nil {
			t.Error(err)
		}
	})
	return &pipe{fds[1], make([]byte, 1<<20)}
}

// do sends the prepared bytes and reads n bytes.
func (p *pipe) do(out []byte, n int) {
	for len(out) > 0 {
		k, err := unix.Write(p.fd, out)
		if err != nil {
			panic(err)
		}
		out = out[k:]
	}
	for n > 0 {
		k, err := unix.Read(p.fd, p.buf[:min(n, len(p.buf))])
		if err != nil || k == 0 {
			panic("server hung up")
		}
		n -= k
	}
}

// batch returns n requests of a kind, and the size of the replies.
func batch(n int, r request, structured bool) (out []byte, replies int) {
	r.magic = magicRequest
	for range n {
		out = append(out, requestBytes(r)...)
		switch {
		case r.kind == cmdWrite:
			out = append(out, make([]byte, r.length)...)
		case r.kind == cmdRead && structured:
			replies += int(r.length) + dataHeader - simpleSize
		case r.kind == cmdRead:
			replies += int(r.length)
		}
		replies += simpleSize
		r.offset += uint64(r.length)
	}
	return out, replies
}

func newNull(t testing.TB, g block.Geometry) *null.Device {
	t.Helper()
	d, err := null.New(null.Config{Geometry: g})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestNoAllocation sends requests of every kind. Some of them need several tags, wait for
// tags, are streamed, or are merged with a block.
func TestNoAllocation(t *testing.T) {
	g := block.Geometry{VolatileCache: true, MaxDiscardSectors: 8, MaxZeroesSectors: 8}
	s, _ := newServer(t, Config{Exports: []Export{{Device: newNull(t, g)}}, Depth: 16, MaxIO: 16 << 10, Loops: newLoops(t, 1)})
	for name, r := range map[string]request{
		"read": {kind: cmdRead, length: 4096}, "large read": {kind: cmdRead, length: 100 << 10},
		"write": {kind: cmdWrite, length: 4096}, "large write": {kind: cmdWrite, length: 100 << 10},
		"flush": {kind: cmdFlush}, "trim": {kind: cmdTrim, length: 64 << 10}, "zeroes": {kind: cmdZeroes, flags: cmdFlagFUA, length: 64 << 10},
		"huge read": {kind: cmdRead, length: 1 << 20}, "huge write": {kind: cmdWrite, length: 1 << 20},
		"unaligned read": {kind: cmdRead, offset: 100, length: 5000}, "unaligned write": {kind: cmdWrite, offset: 100, length: 5000},
		"unaligned zeroes": {kind: cmdZeroes, offset: 100, length: 5000},
		"refused":          {kind: cmdWrite, offset: 1 << 60, length: 512},
	} {
		for _, structured := range []bool{false, true} {
			n := 20
			if r.length >= 1<<20 {
				n = 4
			}
			if structured && r.kind == cmdRead {
				r.flags = cmdFlagDF // else a huge one is cut into chunks, depending on how fast it is read
			}
			out, in := batch(n, r, structured)
			p := newPipe(t, s, "", structured)
			if allocs := testing.AllocsPerRun(50, func() { p.do(out, in) }); allocs > 0 {
				t.Errorf("%s, structured %t: %v allocations in %d requests", name, structured, allocs, n)
			}
		}
	}
}

func BenchmarkServer(b *testing.B) {
	s, _ := newServer(b, Config{Exports: []Export{{Device: newNull(b, block.Geometry{})}}})
	for _, bb := range []struct {
		name  string
		depth int
		r     request
	}{
		{"read4k/1", 1, request{kind: cmdRead, length: 4096}},
		{"read4k/32", 32, request{kind: cmdRead, length: 4096}},
		{"write4k/32", 32, request{kind: cmdWrite, length: 4096}},
		{"read128k/8", 8, request{kind: cmdRead, length: 128 << 10}},
		{"write128k/8", 8, request{kind: cmdWrite, length: 128 << 10}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			p := newPipe(b, s, "", false)
			out, in := batch(bb.depth, bb.r, false)
			b.SetBytes(int64(bb.r.length))
			b.ReportAllocs()
			for i := 0; i < b.N; i += bb.depth {
				p.do(out, in)
			}
		})
	}
}

// FuzzTransmission makes a client send anything in the transmission phase, in two pieces,
// and then hang up. The server's clean-up checks that nothing is lost.
func FuzzTransmission(f *testing.F) {
	var all []byte
	for _, r := range []request{
		{kind: cmdWrite, length: 4096}, {kind: cmdRead, length: 4096}, {kind: cmdFlush}, {kind: cmdTrim, length: 4096},
		{kind: cmdZeroes, length: 512}, {kind: cmdWrite, offset: 1, length: 100}, {kind: 99}, {kind: cmdDisc},
	} {
		out, _ := batch(2, r, true)
		f.Add(out, uint16(30))
		all = append(all, out...)
	}
	f.Add(all, uint16(4000))
	runtime.GOMAXPROCS(max(3, runtime.GOMAXPROCS(0))) // a worker of go test -fuzz has 1; see package poller
	s, _ := newServer(f, Config{Exports: []Export{{Device: newRAM(f, block.Geometry{Sectors: 256})}}, Depth: 16, MaxIO: 4096, Loops: newLoops(f, 1)})
	f.Fuzz(func(t *testing.T, in []byte, cut uint16) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		gone := make(chan error, 1)
		go func() { gone <- s.transmit(nil, fds[0], s.find("").offer(true), stallTicks) }()
		go func() { // the replies
			b := make([]byte, 64<<10)
			for {
				if n, err := unix.Read(fds[1], b); n <= 0 && err != unix.EINTR {
					return
				}
			}
		}()
		at := min(int(cut), len(in))
		for _, b := range [][]byte{in[:at], in[at:]} {
			for len(b) > 0 {
				n, err := unix.SendmsgN(fds[1], b, nil, nil, unix.MSG_NOSIGNAL)
				if err != nil {
					break // it hung up
				}
				b = b[n:]
			}
		}
		_ = unix.Shutdown(fds[1], unix.SHUT_WR)
		<-gone
		_ = unix.Shutdown(fds[1], unix.SHUT_RDWR)
		_ = unix.Close(fds[1])
		var free int
		_ = s.loops[0].Call(func() { free = s.loops[0].worker.shards[0].nFree })
		if free != 16 {
			t.Errorf("%d of 16 tags are free", free)
		}
	})
}
