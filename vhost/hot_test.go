package vhost

import (
	"testing"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/null"
	"ublk-nvmeof/vhost/vhosttest"
)

func newNull(t testing.TB) *null.Device {
	t.Helper()
	d, err := null.New(null.Config{Geometry: block.Geometry{MaxDiscardSectors: 8, MaxZeroesSectors: 8}})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// round executes as many requests as heads at the same time.
func round(r *vhosttest.Ring, heads []uint16) {
	r.Submit(heads...)
	for range heads {
		if _, status, err := r.Wait(); err != nil || status != vhosttest.OK {
			panic(err)
		}
	}
}

// TestNoAllocation executes requests of every kind. The large ones need several tags.
func TestNoAllocation(t *testing.T) {
	for _, zeroCopy := range []bool{false, true} {
		testNoAllocation(t, newServer(t, Config{Device: newNull(t), Depth: 16, MaxIO: 16 << 10, Loops: newLoops(t, 1), ZeroCopy: zeroCopy}))
	}
}

func testNoAllocation(t *testing.T, s *served) {
	for name, features := range map[string]uint64{
		"all": ^uint64(0), "no event index": ^uint64(vhosttest.FeatEventIdx), "no table": ^uint64(vhosttest.FeatIndirect),
	} {
		g := connect(t, s, vhosttest.Config{Features: features, Sealed: true})
		r := g.Rings[0]
		for kind, size := range map[uint32]uint32{
			vhosttest.In: 64 << 10, vhosttest.Out: 64 << 10, vhosttest.Flush: 0, vhosttest.Discard: 16, vhosttest.WriteZeroes: 16,
			vhosttest.GetID: 20,
		} {
			var heads []uint16
			for slot := range uint16(24) {
				copy(r.Data(slot), rangeBytes(0, 32, 0))
				heads = append(heads, r.Prepare(slot, kind, 0, size))
			}
			if n := testing.AllocsPerRun(50, func() { round(r, heads) }); n > 0 {
				t.Errorf("%s, zero copy %v, type %d: %v allocations in %d requests", name, s.cfg.ZeroCopy, kind, n, len(heads))
			}
		}
		g.Conn.Close()
	}
}

func BenchmarkServer(b *testing.B) {
	s := newServer(b, Config{Device: newNull(b), Loops: newLoops(b, 1)})
	for _, bb := range []struct {
		name  string
		depth int
		kind  uint32
		size  uint32
	}{
		{"read4k/1", 1, vhosttest.In, 4096},
		{"read4k/32", 32, vhosttest.In, 4096},
		{"write4k/32", 32, vhosttest.Out, 4096},
		{"read128k/8", 8, vhosttest.In, 128 << 10},
		{"write128k/8", 8, vhosttest.Out, 128 << 10},
	} {
		b.Run(bb.name, func(b *testing.B) {
			g := connect(b, s, vhosttest.Config{Data: 128 << 10})
			defer g.Conn.Close()
			var heads []uint16
			for slot := range bb.depth {
				heads = append(heads, g.Rings[0].Prepare(uint16(slot), bb.kind, 0, bb.size))
			}
			b.SetBytes(int64(bb.size))
			b.ReportAllocs()
			for i := 0; i < b.N; i += bb.depth {
				round(g.Rings[0], heads)
			}
		})
	}
}
