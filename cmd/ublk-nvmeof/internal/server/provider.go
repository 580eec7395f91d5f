package server

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/provider"
	"ublk-nvmeof/rdma"
)

// reachable returns the first of the target's addresses that has a route, or the first
// address if none has.
func (s *server) reachable(addresses []netip.AddrPort) netip.AddrPort {
	for _, a := range addresses {
		if _, err := s.back.route(a, s.opts.SourceAddr); err == nil {
			return a
		}
	}
	return addresses[0]
}

// chooseProvider opens the requested provider, or the one that fits the route to the
// target. It stores the choice and its reason.
func (s *server) chooseProvider() (rdma.Provider, error) {
	route, err := s.back.route(s.remote, s.opts.SourceAddr)
	choice := provider.Choose(s.opts.Provider, s.remote.Addr(), route, err)
	var loading []error
	if choice.Name == options.Verbs && s.opts.LoadModules == "auto" {
		for _, m := range []host.Module{host.IBUverbs, host.RDMAUCM} {
			loading = append(loading, s.back.load(m))
		}
	}
	p, err := s.back.provider(choice.Name)
	switch {
	case err == nil:
	case choice.Name != options.Verbs, exit.Of(err) == exit.Permission:
		return nil, err
	case errors.Is(err, rdma.ErrUnsupported):
		return nil, exit.Errorf(exit.NoRDMA, "this build has no verbs; want --provider %s (%v)", options.RoCE, err)
	default:
		return nil, s.noRDMA(errors.Join(append([]error{err}, loading...)...))
	}
	s.mu.Lock()
	s.provider = choice
	s.closer, _ = p.(io.Closer)
	s.packets = provider.CountersOf(p)
	s.mu.Unlock()
	return p, nil
}

// noRDMA returns an error that names the network device on the route to the target.
func (s *server) noRDMA(err error) error {
	route, rerr := s.back.route(s.remote, s.opts.SourceAddr)
	switch {
	case rerr != nil:
		return exit.Errorf(exit.NoRDMA, "no RDMA device leads to %s (%v; %v)", s.remote, rerr, err)
	case route.RDMA != "":
		return exit.Errorf(exit.NoRDMA, "RDMA device %s on %s, which leads to %s, cannot be used (%v)", route.RDMA, route.Netdev, s.remote, err)
	}
	have := "this host has none"
	if all := host.RDMADevices(); len(all) > 0 {
		have = "this host has " + strings.Join(all, ", ")
	}
	return exit.Errorf(exit.NoRDMA, "no RDMA device on %s, which leads to %s; %s (%v)", route.Netdev, s.remote, have, err)
}

// closeProvider closes the provider, if it has a Close method. Nothing may use the
// provider any more.
func (s *server) closeProvider() error {
	if s.closer == nil {
		return nil
	}
	if err := s.closer.Close(); err != nil {
		return fmt.Errorf("close provider: %w", err)
	}
	return nil
}
