package server

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce"
	"ublk-nvmeof/rdma/verbs"
)

// openProvider opens a provider by the name that options gives it.
func openProvider(name string) (rdma.Provider, error) {
	// A nil *Provider is not a nil rdma.Provider.
	if name == options.RoCE {
		p, err := roce.New(roce.Config{OnDemand: true})
		if err != nil {
			return nil, err
		}
		return p, nil
	}
	p, err := verbs.New()
	if err != nil {
		return nil, err
	}
	return p, nil
}

// chooseProvider opens the provider that was asked for, or the one that the
// route to the target calls for, and notes which it is and why.
func (s *server) chooseProvider() (rdma.Provider, error) {
	name, reason := s.opts.Provider, "asked for"
	if name == options.AutoProvider {
		name, reason = s.suitable()
	}
	var loading []error
	if name == options.Verbs && s.opts.LoadModules == "auto" {
		for _, m := range []host.Module{host.IBUverbs, host.RDMAUCM} {
			loading = append(loading, s.back.load(m))
		}
	}
	p, err := s.back.provider(name)
	if errors.Is(err, rdma.ErrUnsupported) && s.opts.Provider == options.AutoProvider {
		name, reason = options.RoCE, reason+", but this build has no verbs"
		p, err = s.back.provider(name)
	}
	switch {
	case err == nil:
	case name != options.Verbs, exit.Of(err) == exit.Permission:
		return nil, err
	case errors.Is(err, rdma.ErrUnsupported):
		return nil, exit.Errorf(exit.NoRDMA, "this build has no verbs; want --provider %s (%v)", options.RoCE, err)
	default:
		return nil, s.noRDMA(errors.Join(append([]error{err}, loading...)...))
	}
	s.mu.Lock()
	s.provider, s.providerReason, s.closer = p.Name(), reason, nil
	s.closer, _ = p.(io.Closer)
	s.mu.Unlock()
	return p, nil
}

// suitable is the provider that --provider auto means, and why.
func (s *server) suitable() (name, reason string) {
	route, err := s.back.route(s.remote, s.opts.SourceAddr)
	switch {
	case err != nil && len(host.RDMADevices()) > 0:
		return options.Verbs, fmt.Sprintf("this host has RDMA devices, and no route leads to %s", s.remote.Addr())
	case err != nil:
		return options.RoCE, "this host has no RDMA device"
	case route.RDMA != "":
		return options.Verbs, fmt.Sprintf("RDMA device %s is on %s, which leads to %s", route.RDMA, route.Netdev, s.remote.Addr())
	}
	return options.RoCE, fmt.Sprintf("no RDMA device is on %s, which leads to %s", route.Netdev, s.remote.Addr())
}

// noRDMA says which network device would need an RDMA device.
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

// closeProvider ends a provider that has to be ended, when nothing uses it any
// more.
func (s *server) closeProvider() error {
	if s.closer == nil {
		return nil
	}
	if err := s.closer.Close(); err != nil {
		return fmt.Errorf("close provider: %w", err)
	}
	return nil
}
