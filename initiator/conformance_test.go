package initiator

import (
	"net/netip"
	"runtime"
	"testing"

	"ublk-nvmeof/block/blocktest"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/target"
)

// TestConformance runs the suite for back ends with fewer queue pairs than loops, with
// several paths, and with a target of small limits.
func TestConformance(t *testing.T) {
	for name, set := range map[string]func(*target.Config, *target.SubsystemConfig, *target.NamespaceConfig) (paths int){
		"one path": func(*target.Config, *target.SubsystemConfig, *target.NamespaceConfig) int { return 1 },
		"one queue": func(_ *target.Config, s *target.SubsystemConfig, _ *target.NamespaceConfig) int {
			s.MaxQueues = 1
			return 1
		},
		"two paths": func(*target.Config, *target.SubsystemConfig, *target.NamespaceConfig) int { return 2 },
		"chunks":    func(*target.Config, *target.SubsystemConfig, *target.NamespaceConfig) int { return 1 },
		"small limits": func(c *target.Config, _ *target.SubsystemConfig, _ *target.NamespaceConfig) int {
			c.MaxTransfer = 8192
			return 1
		},
		"one descriptor": func(c *target.Config, _ *target.SubsystemConfig, _ *target.NamespaceConfig) int {
			c.MaxDescriptors = 1
			return 1
		},
		"three descriptors": func(c *target.Config, _ *target.SubsystemConfig, _ *target.NamespaceConfig) int {
			c.MaxDescriptors, c.MaxTransfer = 3, 16384
			return 2
		},
		"4096": func(_ *target.Config, _ *target.SubsystemConfig, n *target.NamespaceConfig) int {
			n.BlockSize = 4096
			return 1
		},
		"read-only": func(_ *target.Config, _ *target.SubsystemConfig, n *target.NamespaceConfig) int {
			n.ReadOnly = true
			return 1
		},
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.Test(t, func(t *testing.T) blocktest.Backend {
				fabric := rdmatest.NewFabric()
				var cfg target.Config
				sub := target.SubsystemConfig{NQN: fakeNQN, AllowAny: true}
				ns := target.NamespaceConfig{Store: target.NewRAM(8 << 20)}
				paths := set(&cfg, &sub, &ns)
				tgt, err := target.New(cfg)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { tgt.Close() })
				s, err := tgt.AddSubsystem(sub)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := s.AddNamespace(ns); err != nil {
					t.Fatal(err)
				}
				for port := range uint16(paths) {
					at := target.PortConfig{Provider: fabric.Provider(targetAddr), Addr: netip.AddrPortFrom(targetAddr, 4420+port)}
					if _, err := tgt.AddPorts(at); err != nil {
						t.Fatal(err)
					}
				}
				loops := newLoops(t, min(2, runtime.NumCPU()))
				c := connect(t, testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: len(loops)}))
				t.Cleanup(func() { closeSubsystem(t, c) })
				if name == "chunks" {
					c.mem.chunk = 64 << 10
				}
				for range paths - 1 {
					if _, err := c.AddPath(t.Context(), Path{Provider: fabric.Provider(hostAddr), Address: netip.AddrPortFrom(targetAddr, 4421)}); err != nil {
						t.Fatal(err)
					}
				}
				return blocktest.Backend{Device: c.Namespaces()[0], Loops: loops}
			})
		})
	}
}
