//go:build !(linux && cgo && !noverbs)

package verbs

import (
	"context"
	"fmt"
	"net/netip"

	"ublk-nvmeof/rdma"
)

// Supported reports whether this build has the provider.
const Supported = false

// Provider has no instances in this build.
type Provider struct{}

// New returns an error that wraps rdma.ErrUnsupported.
func New() (*Provider, error) {
	return nil, fmt.Errorf("verbs: built without cgo or with the tag noverbs: %w", rdma.ErrUnsupported)
}

// Name implements rdma.Provider.
func (*Provider) Name() string { return "verbs" }

// Resolve implements rdma.Provider.
func (*Provider) Resolve(context.Context, netip.Addr, netip.AddrPort, int) (rdma.ID, error) {
	return nil, rdma.ErrUnsupported
}

// Listen implements rdma.Provider.
func (*Provider) Listen(netip.AddrPort, int) (rdma.Listener, error) {
	return nil, rdma.ErrUnsupported
}
