package vhost

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/vhost/vhosttest"
)

// pair is a connection of a front end that the server has accepted.
func pair(t testing.TB, s *Server) *net.UnixConn {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
	}
	s.accept(ends[0])
	return ends[1]
}

// FuzzMessages makes a front end send any messages after it has set up its rings. Each
// message takes three bytes of its description: the number, the way to change its payload,
// and the file. The server's clean-up checks that nothing is lost.
func FuzzMessages(f *testing.F) {
	f.Add([]byte{5, 0, 1, 18, 0, 0})
	f.Add([]byte{37, 1, 1, 38, 1, 0, 11, 0, 0, 8, 0, 0, 12, 0, 2, 13, 0, 2, 18, 4, 0})
	f.Add([]byte{34, 0, 0, 31, 2, 0, 32, 2, 1, 6, 3, 1, 2, 0, 0, 9, 0, 0, 24, 0, 0})
	s := newServer(f, Config{Device: newRAM(f, block.Geometry{}), Loops: newLoops(f, 2)})
	f.Fuzz(func(t *testing.T, script []byte) { playMessages(t, s.Server, script) })
}

// TestRandomMessages sends messages as FuzzMessages does, mostly ones that the server knows.
func TestRandomMessages(t *testing.T) {
	s := newServer(t, Config{Device: newRAM(t, block.Geometry{})})
	rnd := rand.New(rand.NewPCG(3, 4))
	known := []byte{2, 5, 6, 8, 9, 10, 11, 12, 13, 16, 18, 24, 31, 32, 34, 37, 38}
	for range 300 {
		script := make([]byte, 3*(1+rnd.IntN(30)))
		for i := range script {
			script[i] = byte(rnd.Uint32())
			if i%3 == 0 {
				script[i] = known[rnd.IntN(len(known))]
			}
		}
		playMessages(t, s.Server, script)
	}
}

func playMessages(t *testing.T, s *Server, script []byte) {
	t.Helper()
	g, err := vhosttest.NewGuest(vhosttest.Config{Rings: 2, RingSize: 8, Data: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	c := vhosttest.NewConn(pair(t, s))
	if err := g.Attach(c); err != nil {
		t.Fatal(err)
	}
	files := []int{-1, g.FD, g.Rings[0].Kick, g.Rings[1].Call}
	for ; len(script) >= 3; script = script[3:] {
		request, how, file := uint32(script[0]%45), script[1], files[script[2]%4]
		payload := fuzzPayload(g, request, how)
		var fds []int
		if file >= 0 {
			fds = append(fds, file)
		}
		if c.Raw(append(vhosttest.Header(request, 1|uint32(how&8), len(payload)), payload...), fds...) != nil {
			break
		}
	}
	c.CloseWrite()
	if err := c.AwaitEnd(); err != nil {
		t.Fatal(err)
	}
}

// fuzzPayload returns a valid payload for a message, changed in some way.
func fuzzPayload(g *vhosttest.Guest, request uint32, how byte) []byte {
	first, second := g.Halves()
	var p []byte
	switch request {
	case vhosttest.SetMemTable:
		p = vhosttest.Table(append([]byte{}, first...))
	case vhosttest.AddMemReg, vhosttest.RemMemReg:
		p = vhosttest.Single(second)
	case vhosttest.SetVringAddr:
		p = g.Rings[how&1].Addr(uint32(how>>1) & 1)
	case vhosttest.GetConfig:
		p = make([]byte, 12+60)
		p[4] = 60
	case vhosttest.GetInflightFD, vhosttest.SetInflightFD:
		le := binary.LittleEndian
		p = le.AppendUint16(le.AppendUint16(append(vhosttest.U64(4096), vhosttest.U64(0)...), 2), 8)
	case vhosttest.SetLogBase:
		p = append(vhosttest.U64(4096), vhosttest.U64(0)...)
	case vhosttest.SetFeatures:
		p = vhosttest.U64(g.Features ^ vhosttest.FeatLogAll)
	default:
		p = vhosttest.State(uint32(how&1), uint32(how>>4))
	}
	switch how % 5 {
	case 1:
		if len(p) > 0 {
			p[int(how)%len(p)] ^= 1 << (how >> 5)
		}
	case 2:
		p = p[:len(p)/2]
	case 3:
		p = append(p, how)
	}
	return p
}

// FuzzRing makes a guest write anything into its descriptors, its available ring and a table
// of descriptors. Addresses are mostly those of the guest's memory.
func FuzzRing(f *testing.F) {
	for _, zeroCopy := range []bool{false, true} {
		f.Add([]byte{0, 0, 0, 0, 16, 0, 0, 0, 1, 1, 0, 1}, []byte{0}, zeroCopy)
		f.Add([]byte{0, 9, 9, 9, 255, 255, 255, 255, 4, 0, 0, 0}, []byte{0, 1, 2, 200}, zeroCopy)
		// A read of 16 KiB whose data is in several places, twice.
		var chain []byte
		le := binary.LittleEndian
		for i, d := range []struct {
			at, length uint32
			flags      uint16
		}{{28672, 16, 1}, {36864, 4096, 3}, {49152, 8192, 3}, {65536, 512, 3}, {70000, 3584, 3}, {12304, 1, 2}} {
			chain = le.AppendUint32(le.AppendUint32(chain, d.at), d.length)
			chain = le.AppendUint16(le.AppendUint16(chain, d.flags), uint16(i+1))
		}
		f.Add(chain, []byte{0, 0}, zeroCopy)
	}
	device := newRAM(f, block.Geometry{})
	servers := map[bool]*served{}
	for _, zeroCopy := range []bool{false, true} {
		servers[zeroCopy] = newServer(f, Config{Device: device, Loops: newLoops(f, 1), Depth: 4, MaxIO: 16 << 10, ZeroCopy: zeroCopy})
	}
	f.Fuzz(func(t *testing.T, descs, heads []byte, zeroCopy bool) {
		g := newGuest(t, vhosttest.Config{RingSize: 16, Data: 4096, Sealed: zeroCopy})
		c := vhosttest.NewConn(pair(t, servers[zeroCopy].Server))
		if err := g.Attach(c); err != nil {
			t.Fatal(err)
		}
		r := g.Rings[0]
		le := binary.LittleEndian
		_, table := r.Slot(1)
		for i := 0; len(descs) >= 12; i++ {
			at := uint64(le.Uint32(descs))
			addr := at
			if at%8 != 7 {
				addr = vhosttest.GuestBase + at%uint64(len(g.Mem)+64)
			}
			length := le.Uint32(descs[4:])
			if length%4 != 3 {
				length %= 20000
			}
			flags, nx := le.Uint16(descs[8:]), le.Uint16(descs[10:])
			if flags&4 != 0 && at%2 == 0 {
				addr = vhosttest.GuestBase + table
			}
			if i < 16 {
				r.SetDesc(uint16(i), addr, length, flags, nx%17)
			} else if i < 256 {
				g.PutDesc(table+16*uint64(i-16), addr, length, flags, nx)
			}
			descs = descs[12:]
		}
		for _, h := range heads {
			if h == 255 {
				r.SetAvail(r.AvailIdx() + 20)
				r.Notify()
				continue
			}
			r.Offer(uint16(h % 17))
		}
		c.CloseWrite()
		if err := c.AwaitEnd(); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzRecord restores any record of requests in flight.
func FuzzRecord(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 3, 0, 1, 0, 1})
	s := newServer(f, Config{Device: newRAM(f, block.Geometry{}), Loops: newLoops(f, 1)})
	f.Fuzz(func(t *testing.T, record []byte) {
		g := newGuest(t, vhosttest.Config{RingSize: 8, Data: 4096})
		fd, err := unix.MemfdCreate("record", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		page := make([]byte, 4096)
		copy(page, record)
		if _, err := unix.Write(fd, page); err != nil {
			t.Fatal(err)
		}
		le := binary.LittleEndian
		g.SetRecord(fd, le.AppendUint16(le.AppendUint16(append(vhosttest.U64(4096), vhosttest.U64(0)...), 1), 8))
		c := vhosttest.NewConn(pair(t, s.Server))
		if err := g.Attach(c); err != nil {
			return // the record is refused
		}
		c.CloseWrite()
		if err := c.AwaitEnd(); err != nil {
			t.Fatal(err)
		}
	})
}
