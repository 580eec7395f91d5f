package target

import (
	"testing"

	"ublk-nvmeof/nvme"
)

// hotCommands are commands as a busy queue receives them.
func hotCommands(h *hostQueue) map[string]func(cmd *nvme.Command) []byte {
	inline := make([]byte, 4096)
	return map[string]func(cmd *nvme.Command) []byte{
		"read 4k":   func(c *nvme.Command) []byte { c.SetRead(1, 8, 8, false); h.keyed(c, 4096); return nil },
		"read 128k": func(c *nvme.Command) []byte { c.SetRead(1, 8, 256, false); h.keyed(c, 128<<10); return nil },
		"write 4k": func(c *nvme.Command) []byte {
			c.SetWrite(1, 8, 8, false)
			c.SetInCapsuleSGL(0, 4096)
			return inline
		},
		"write 128k": func(c *nvme.Command) []byte { c.SetWrite(1, 8, 256, false); h.keyed(c, 128<<10); return nil },
		"read list": func(c *nvme.Command) []byte {
			c.SetRead(1, 8, 128, false)
			return h.list(c, scatter(16, 4096)...)
		},
		"write list": func(c *nvme.Command) []byte {
			c.SetWrite(1, 8, 128, false)
			return h.list(c, scatter(16, 4096)...)
		},
		"compare": func(c *nvme.Command) []byte {
			c.SetRead(1, 8, 8, false)
			c.SetOpcode(nvme.OpCompare)
			h.keyed(c, 4096)
			return nil
		},
		"flush":  func(c *nvme.Command) []byte { c.SetFlush(1); return nil },
		"dsm":    func(c *nvme.Command) []byte { c.SetDSM(1, 1); h.keyed(c, 16); return nil },
		"zeroes": func(c *nvme.Command) []byte { c.SetWriteZeroes(1, 8, 8, false, true); return nil },
	}
}

func TestNoAllocations(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 4<<20, NamespaceConfig{})
	h := r.io(r.admin(testNQN), 1, 32)
	for name, set := range hotCommands(h) {
		clear(h.data.Bytes())
		var cmd nvme.Command
		inline := set(&cmd)
		h.do(&cmd, inline)
		if n := testing.AllocsPerRun(200, func() { h.do(&cmd, inline) }); n != 0 {
			t.Errorf("%s: %v allocations per command", name, n)
		}
	}
}

// BenchmarkTarget measures a round trip with one command at a time, including the time
// of the fabric and of the test host.
func BenchmarkTarget(b *testing.B) {
	r, _, _ := newDisk(b, Config{}, 4<<20, NamespaceConfig{})
	h := r.io(r.admin(testNQN), 1, 32)
	for _, name := range []string{"flush", "read 4k", "write 4k", "read 128k", "write 128k"} {
		b.Run(name, func(b *testing.B) {
			var cmd nvme.Command
			inline := hotCommands(h)[name](&cmd)
			b.ReportAllocs()
			for b.Loop() {
				h.do(&cmd, inline)
			}
		})
	}
}

// BenchmarkDepth16 keeps 16 commands in flight.
func BenchmarkDepth16(b *testing.B) {
	r, _, _ := newDisk(b, Config{}, 4<<20, NamespaceConfig{})
	h := r.io(r.admin(testNQN), 1, 32)
	for _, name := range []string{"read 4k", "write 4k", "read 128k", "write 128k"} {
		b.Run(name, func(b *testing.B) {
			var cmd nvme.Command
			inline := hotCommands(h)[name](&cmd)
			b.ReportAllocs()
			flying := 0
			for b.Loop() {
				if flying == 16 {
					h.await()
					flying--
				}
				h.send(&cmd, inline)
				flying++
			}
			for range flying {
				h.await()
			}
		})
	}
}
