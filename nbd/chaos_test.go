package nbd

import (
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"ublk-nvmeof/block"
)

// TestChaos makes many clients send requests of all kinds without waiting, read some of
// the replies, and disconnect at any moment, while the device fails some requests and its
// limits change. The server's clean-up checks that no tag, task or lock is left.
func TestChaos(t *testing.T) {
	for name, g := range map[string]block.Geometry{
		"512": {Sectors: 1 << 14}, "4096": {Sectors: 1 << 14, LogicalBlock: 4096, ChunkSectors: 64, MaxDiscardSectors: 24, MaxZeroesSectors: 40},
	} {
		t.Run(name, func(t *testing.T) {
			dev := newShrinking(&badBlock{Device: newRAM(t, g), sector: 5000})
			s, path := newServer(t, Config{Exports: []Export{{Device: dev}}, Depth: 16, MaxIO: 16 << 10, StallTimeout: time.Second})
			end := time.Now().Add(2 * time.Second)
			var clients sync.WaitGroup
			for i := range 12 {
				clients.Go(func() {
					r := rand.New(rand.NewPCG(uint64(i), 9))
					for time.Now().Before(end) {
						unruly(t, path, r)
					}
				})
			}
			for time.Now().Before(end) {
				dev.change(func(g *block.Geometry) { g.MaxIO = 4096 << rand.IntN(5) })
				time.Sleep(20 * time.Millisecond)
			}
			clients.Wait()
			dev.change(func(g *block.Geometry) { g.MaxIO = 1 << 20 })
			exchange(t, connect(t, path, "", false), false)
			await(t, "the end of all others", func() bool { return s.Users("") <= 1 })
		})
	}
}

// unruly runs a client that keeps to no rules except those of the protocol.
func unruly(t *testing.T, path string, r *rand.Rand) {
	c := connect(t, path, "", r.IntN(2) == 0)
	defer c.Close()
	var sender sync.WaitGroup
	kinds := []command{cmdRead, cmdRead, cmdWrite, cmdWrite, cmdFlush, cmdTrim, cmdZeroes, 9}
	var out []byte
	for range 1 + r.IntN(60) {
		req := request{
			magic: magicRequest, kind: kinds[r.IntN(len(kinds))], flags: uint16(r.IntN(2)),
			offset: r.Uint64N(9 << 20), length: uint32(r.IntN([]int{600, 9000, 100000, 1 << 20}[r.IntN(4)])),
		}
		out = append(out, requestBytes(req)...)
		if req.kind == cmdWrite {
			out = append(out, make([]byte, req.length)...)
		}
	}
	if r.IntN(3) == 0 {
		out = slices.Concat(out, requestBytes(request{magic: magicRequest, kind: cmdDisc}))
	}
	limit := time.Duration(1+r.IntN(300)) * time.Millisecond
	stop := r.IntN(len(out) + len(out)/2)
	sender.Go(func() {
		for b := out[:min(stop, len(out))]; len(b) > 0; {
			n, err := c.Write(b[:min(len(b), 100000)])
			if err != nil {
				return
			}
			b = b[n:]
		}
		if u, ok := c.Conn.(*net.UnixConn); ok && limit%2 == 0 {
			_ = u.CloseWrite()
		}
	})
	_ = c.SetDeadline(time.Now().Add(limit))
	if limit%3 != 0 {
		_, _ = io.Copy(io.Discard, c) // until the server or the time ends it
	}
	sender.Wait()
}
