package server

import (
	"errors"
	"net/netip"
	"strings"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/provider"
)

// reachable returns the first of the target's addresses that has a route, or the first
// address if none has.
func (s *server) reachable(addresses []netip.AddrPort) netip.AddrPort {
	if len(addresses) == 1 {
		return addresses[0]
	}
	for _, a := range addresses {
		if _, err := s.back.route(a, s.opts.SourceAddr); err == nil {
			return a
		}
	}
	return addresses[0]
}

// openProvider opens the chosen provider for the path to an address.
func (s *server) openProvider(choice provider.Choice, remote netip.AddrPort, source netip.Addr) (rdma.Provider, error) {
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
		return nil, s.noRDMA(remote, source, errors.Join(append([]error{err}, loading...)...))
	}
	return p, nil
}

// noRDMA returns an error that names the network device on the route to the target.
func (s *server) noRDMA(remote netip.AddrPort, source netip.Addr, err error) error {
	route, rerr := s.back.route(remote, source)
	switch {
	case rerr != nil:
		return exit.Errorf(exit.NoRDMA, "no RDMA device leads to %s (%v; %v)", remote, rerr, err)
	case route.RDMA != "":
		return exit.Errorf(exit.NoRDMA, "RDMA device %s on %s, which leads to %s, cannot be used (%v)", route.RDMA, route.Netdev, remote, err)
	}
	have := "this host has none"
	if all := host.RDMADevices(); len(all) > 0 {
		have = "this host has " + strings.Join(all, ", ")
	}
	return exit.Errorf(exit.NoRDMA, "no RDMA device on %s, which leads to %s; %s (%v)", route.Netdev, remote, have, err)
}
