package nbd

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"ublk-nvmeof/block"
)

// TestUnaligned makes clients that do not know the block size write, zero and read bytes
// of the same blocks at the same time, on two loops. Each has its own bytes between those
// of the others, and none may lose any.
func TestUnaligned(t *testing.T) {
	for name, g := range map[string]block.Geometry{
		"4096": {Sectors: 2048, LogicalBlock: 4096}, "512": {Sectors: 2048}, "chunks": {Sectors: 2048, LogicalBlock: 1024, ChunkSectors: 16},
	} {
		t.Run(name, func(t *testing.T) {
			_, path := newServer(t, Config{Exports: []Export{{Device: newRAM(t, g)}}, Depth: 16, MaxIO: 8 << 10})
			const writers = 6
			// Cuts at any byte make spans, which belong to the writers in
			// turn. Whole blocks among them are written without a merge.
			r := rand.New(rand.NewPCG(1, 2))
			cuts := []uint64{0}
			for at := uint64(0); at < 1<<20; {
				at = min(at+1+r.Uint64N([]uint64{50, 700, 20000}[r.IntN(3)]), 1<<20)
				cuts = append(cuts, at)
			}
			content := make([]byte, 1<<20) // each byte is its writer's
			var done sync.WaitGroup
			for w := range writers {
				c := connect(t, path, "", w%2 == 0)
				done.Go(func() {
					r := rand.New(rand.NewPCG(uint64(w), 3))
					for range 4 {
						for i := w; i+1 < len(cuts); i += writers {
							c.change(r, cuts[i], content[cuts[i]:cuts[i+1]])
						}
					}
				})
			}
			done.Wait()
			for _, structured := range []bool{false, true} {
				c := connect(t, path, "", structured)
				for range 200 {
					at := r.Uint64N(1<<20 - 1)
					length := 1 + r.Uint64N(min(30000, 1<<20-at))
					if got := c.load(request{offset: at, length: uint32(length)}, structured); !bytes.Equal(got, content[at:at+length]) {
						t.Fatalf("%d bytes at %d: other data", length, at)
					}
				}
				if got := c.load(request{length: 1 << 20}, structured); !bytes.Equal(got, content) {
					i := slices.Index(got, 0)
					t.Errorf("other data, first zero at %d", i)
				}
			}
		})
	}
}

// change writes random data, or zeroes, to bytes that belong to the caller.
func (c *client) change(r *rand.Rand, offset uint64, content []byte) {
	c.t.Helper()
	if r.IntN(4) == 0 {
		clear(content)
		c.do(request{kind: cmdZeroes, offset: offset, length: uint32(len(content))}, nil)
		return
	}
	for i := range content {
		content[i] = byte(r.Uint32())
	}
	c.write(offset, content)
}

// TestMergeIsExclusive holds a block at the device that is read for a merge with a write
// of another loop's client, and checks that no other change of the block reaches the
// device meanwhile. It also checks the opposite order.
func TestMergeIsExclusive(t *testing.T) {
	part := request{kind: cmdWrite, offset: 4096, length: 512}
	for name, other := range map[string]request{
		"part": {kind: cmdWrite, offset: 4608, length: 512}, "whole": {kind: cmdWrite, offset: 0, length: 16384},
		"zeroes": {kind: cmdZeroes, offset: 4608, length: 100}, "trim": {kind: cmdTrim, offset: 4096, length: 8192},
	} {
		for _, order := range [][2]request{{part, other}, {other, part}} {
			t.Run(name, func(t *testing.T) {
				g := newGate(t, block.Geometry{LogicalBlock: 4096})
				s, path := newServer(t, Config{Exports: []Export{{Device: g}}, Loops: g.loops})
				var clients [2]*client
				for i := range clients {
					clients[i] = connect(t, path, "", false)
					await(t, "the client's service", func() bool { return s.Users("") == i+1 })
				}
				if !slices.Equal(s.Connections(), []int{1, 1}) {
					t.Fatalf("connections %v", s.Connections())
				}
				ask := func(i int) {
					data := bytes.Repeat([]byte{byte(1 + i)}, int(order[i].length))
					if order[i].kind != cmdWrite {
						data = nil
					}
					clients[i].ask(order[i], data)
				}
				g.shut.Store(true)
				ask(0)
				await(t, "the first request at the device", func() bool { return g.inside.Load() == 1 })
				ask(1)
				await(t, "the second one's wait", func() bool { return s.exports[0].shards[0].stripes.parked.Load() == 1 })
				if n := g.inside.Load(); n != 1 {
					t.Errorf("%d requests are at the device", n)
				}
				g.open()
				for _, c := range clients {
					if e := c.simple(0); e != 0 {
						t.Errorf("error %d", e)
					}
				}
			})
		}
	}
}

// TestUnalignedTrim checks that a trim does not change partial blocks.
func TestUnalignedTrim(t *testing.T) {
	_, path := newServer(t, Config{Exports: []Export{{Device: newRAM(t, block.Geometry{LogicalBlock: 4096})}}})
	c := connect(t, path, "", false)
	data := randomBytes(64 << 10)
	c.write(0, data)
	c.do(request{kind: cmdTrim, offset: 100, length: 3000}, nil)
	c.do(request{kind: cmdTrim, offset: 5000, length: 20000, flags: cmdFlagFUA}, nil)
	clear(data[8192:24576])
	if got := c.load(request{length: 64 << 10}, false); !bytes.Equal(got, data) {
		t.Error("other data")
	}
}

// TestUnalignedError checks that a block that could not be read is not written back.
func TestUnalignedError(t *testing.T) {
	dev := &badBlock{Device: newRAM(t, block.Geometry{LogicalBlock: 4096}), sector: 8}
	_, path := newServer(t, Config{Exports: []Export{{Device: dev}}})
	c := connect(t, path, "", false)
	for _, r := range []request{
		{kind: cmdWrite, offset: 4096 + 512, length: 512}, {kind: cmdZeroes, offset: 4096 + 512, length: 512},
		{kind: cmdWrite, offset: 4000, length: 20000}, {kind: cmdZeroes, offset: 4000, length: 20000},
	} {
		c.ask(r, make([]byte, r.length)[:map[bool]uint32{true: r.length}[r.kind == cmdWrite]])
		if e := c.simple(0); e != codeIO {
			t.Errorf("request %d of %d bytes at %d: error %d", r.kind, r.length, r.offset, e)
		}
	}
	c.do(request{kind: cmdFlush}, nil)
}

// TestExtremes sends requests with extreme values in their fields, on devices of extreme
// sizes.
func TestExtremes(t *testing.T) {
	const most = (1<<63 - 4096) >> 9
	dev := newNull(t, block.Geometry{Sectors: most, LogicalBlock: 4096, MaxDiscardSectors: ^uint32(0), MaxZeroesSectors: ^uint32(0), MaxIO: ^uint32(4095)})
	s, path := newServer(t, Config{Exports: []Export{{Name: "a", Device: dev}}, Depth: 16, Loops: newLoops(t, 1)})
	for _, sectors := range []uint64{1 << 54, 1 << 55, 1<<64 - 8} {
		if err := s.Add(Export{Name: "b", Device: newNull(t, block.Geometry{Sectors: sectors, LogicalBlock: 4096})}); err == nil {
			t.Errorf("an export of %d sectors was added", sectors)
		}
	}
	for _, name := range []string{"\x00", "\xff", string(make([]byte, 5000))} {
		if err := s.Add(Export{Name: name, Device: dev}); err == nil {
			t.Errorf("an export of the name %.20q was added", name)
		}
	}
	c := connect(t, path, "a", false)
	const end = most << 9
	for _, tt := range []struct {
		r    request
		want code
	}{
		{request{kind: cmdRead, offset: end - 512, length: 512}, 0},
		{request{kind: cmdRead, offset: end - 1, length: 1}, 0},
		{request{kind: cmdRead, offset: end - 1, length: 2}, codeInval},
		{request{kind: cmdRead, offset: ^uint64(0), length: 1}, codeInval},
		{request{kind: cmdRead, offset: 1<<63 - 1, length: ^uint32(0)}, codeInval},
		{request{kind: cmdWrite, offset: end - 1, length: 1}, 0},
		{request{kind: cmdWrite, offset: ^uint64(0), length: 1}, codeNoSpace},
		{request{kind: cmdTrim, offset: 1, length: ^uint32(0)}, 0},
		{request{kind: cmdTrim, offset: end - 1<<32 + 1, length: ^uint32(0)}, 0},
		{request{kind: cmdTrim, offset: ^uint64(0), length: ^uint32(0)}, codeInval},
		{request{kind: cmdZeroes, offset: 1, length: ^uint32(0)}, 0},
		{request{kind: cmdZeroes, offset: end - 1<<32 + 1, length: ^uint32(0)}, 0},
		{request{kind: cmdZeroes, offset: 1 << 63, length: 1}, codeNoSpace},
		{request{kind: cmdFlush, offset: ^uint64(0), length: ^uint32(0)}, codeInval},
		{request{kind: ^command(0), flags: ^uint16(0), offset: ^uint64(0), length: ^uint32(0)}, codeInval},
	} {
		tt.r.cookie = ^uint64(0)
		var data []byte
		if tt.r.kind == cmdWrite {
			data = make([]byte, tt.r.length)
		}
		c.ask(tt.r, data)
		got := c.simple(tt.r.cookie)
		if got != tt.want {
			t.Errorf("%+v: error %d, want %d", tt.r, got, tt.want)
		}
		if got == 0 && tt.r.kind == cmdRead {
			c.read(int(tt.r.length))
		}
	}
	// A read of 4 GiB is sent piece by piece.
	c.ask(request{kind: cmdRead, offset: 4096, length: 1<<32 - 1}, nil)
	if e := c.simple(0); e != 0 {
		t.Fatalf("error %d", e)
	}
	buf := make([]byte, 1<<20)
	for left := 1<<32 - 1; left > 0; {
		n, err := c.Read(buf[:min(len(buf), left)])
		if left -= n; err != nil {
			t.Fatalf("%v, %d bytes are left", err, left)
		}
	}
	c.do(request{kind: cmdFlush}, nil)
	c = connect(t, path, "a", true)
	c.ask(request{kind: cmdRead, flags: cmdFlagDF, length: 1<<32 - 4096}, nil)
	if kind, data := c.chunk(0); kind != chunkError || code(binary.BigEndian.Uint32(data)) != codeOverflow {
		t.Errorf("chunk %d, %x", kind, data)
	}
}

// TestNbdsh makes Python's libnbd, without block sizes, write anywhere on blocks of 4096
// bytes.
func TestNbdsh(t *testing.T) {
	_, path := newServer(t, Config{Exports: []Export{{Device: newRAM(t, block.Geometry{LogicalBlock: 4096})}}})
	t.Setenv("SOCKET", path)
	run(t, "/usr/bin/python3", filepath.Join("testdata", "unaligned.py"))
}
