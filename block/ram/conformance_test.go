package ram

import (
	"testing"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/blocktest"
	"ublk-nvmeof/poller"
)

func TestConformance(t *testing.T) {
	for name, g := range map[string]block.Geometry{
		"512": {}, "4096": {LogicalBlock: 4096}, "small limits": {MaxIO: 8192}, "read-only": {ReadOnly: true},
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.Test(t, func(t *testing.T) blocktest.Backend {
				var loops []*poller.Loop
				for range 2 {
					l, err := poller.New(poller.Config{})
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { l.Stop() })
					loops = append(loops, l)
				}
				d, err := New(Config{Geometry: g})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { d.Close() })
				return blocktest.Backend{Device: d, Loops: loops}
			})
		})
	}
}
