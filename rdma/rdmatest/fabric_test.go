package rdmatest

import (
	"net/netip"
	"testing"
)

var (
	hostAddr   = netip.MustParseAddr("192.0.2.1")
	targetAddr = netip.MustParseAddr("192.0.2.2")
	silentAddr = netip.MustParseAddr("192.0.2.3")
)

// newSetup makes a fabric of two endpoints and checks at the end that nothing
// was left open.
func newSetup(t *testing.T) (*Fabric, Setup) {
	f := NewFabric()
	t.Cleanup(func() {
		if open := f.Objects(); open != (Objects{}) {
			t.Errorf("left open: %+v", open)
		}
	})
	return f, Setup{
		Active: f.Provider(hostAddr), Passive: f.Provider(targetAddr),
		Listen: targetAddr, Silent: silentAddr, Invalidate: true,
	}
}

func TestConformance(t *testing.T) {
	Run(t, func(t *testing.T) Setup {
		_, s := newSetup(t)
		return s
	})
}
