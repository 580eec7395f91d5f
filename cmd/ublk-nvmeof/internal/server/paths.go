package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/provider"
)

// opened is a provider that paths use, with why it was chosen for the first of them.
type opened struct {
	rdma   rdma.Provider
	choice provider.Choice
}

// providerFor returns the requested provider, or the one that fits the route to an address. All
// paths with the same kind of provider share one.
func (s *server) providerFor(remote netip.AddrPort, source netip.Addr) (opened, error) {
	route, err := s.back.route(remote, source)
	choice := provider.Choose(s.opts.Provider, remote.Addr(), route, err)
	s.mu.Lock()
	have, ok := s.providers[choice.Name]
	s.mu.Unlock()
	if ok {
		return opened{have.rdma, choice}, nil
	}
	p, err := s.openProvider(choice, remote, source)
	if err != nil {
		return opened{}, err
	}
	o := opened{p, choice}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.providers == nil {
		s.providers = map[string]opened{}
	}
	s.providers[choice.Name] = o
	if c := provider.CountersOf(p); c != nil {
		s.packets = c
	}
	return o, nil
}

// closeProviders closes the providers that have a Close method. Nothing may use them any more.
func (s *server) closeProviders() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, o := range s.providers {
		if c, ok := o.rdma.(io.Closer); ok {
			if err := c.Close(); err != nil {
				errs = append(errs, fmt.Errorf("close provider: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

// connectFirst connects over the first path that works, and returns the others.
func (s *server) connectFirst(ctx context.Context, cfg initiator.Config) (sub subsystem, found []namespace, further []options.Path, err error) {
	sub, found, first := s.back.connect(ctx, cfg, s.changed)
	if first == nil {
		return sub, found, s.opts.Paths, nil
	}
	for i, p := range s.opts.Paths {
		s.log.Warn("the first path cannot be connected; another one is tried", "path", p.String(), "error", first)
		if cfg.Path, err = s.initiatorPath(p); err != nil {
			continue
		}
		if sub, found, err = s.back.connect(ctx, cfg, s.changed); err == nil {
			further = slices.Concat([]options.Path{{Address: s.remote, Source: s.opts.SourceAddr}}, s.opts.Paths[:i], s.opts.Paths[i+1:])
			return sub, found, further, nil
		}
	}
	return nil, nil, nil, first
}

// connectPaths adds further paths. One that cannot be connected now, or leads to something else, is
// kept and tried again: it must not keep the other paths from being used.
func (s *server) connectPaths(ctx context.Context, further []options.Path) error {
	for _, p := range further {
		err := s.addPath(ctx, p)
		switch {
		case err == nil, errors.Is(err, initiator.ErrPathExists):
		case ctx.Err() != nil:
			return fmt.Errorf("path %v: %w", p, err)
		default:
			if err := s.keepPath(p, err); err != nil {
				return err
			}
		}
	}
	return nil
}

// keepPath adds a path that cannot be connected, and is tried again.
func (s *server) keepPath(p options.Path, why error) error {
	s.log.Warn("path cannot be connected now; it is tried again", "path", p.String(), "error", why)
	to, err := s.initiatorPath(p)
	if err != nil {
		return fmt.Errorf("path %v: %w", p, err)
	}
	if _, err := s.sub.KeepPath(to); err != nil {
		return fmt.Errorf("path %v: %w", p, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unready == nil {
		s.unready = map[string]string{}
	}
	s.unready[p.String()] = why.Error()
	return nil
}

func (s *server) initiatorPath(p options.Path) (initiator.Path, error) {
	o, err := s.providerFor(p.Address, p.Source)
	if err != nil {
		return initiator.Path{}, err
	}
	return initiator.Path{Provider: o.rdma, Address: p.Address, Source: p.Source}, nil
}

func (s *server) addPath(ctx context.Context, p options.Path) error {
	to, err := s.initiatorPath(p)
	if err != nil {
		return err
	}
	_, err = s.sub.AddPath(ctx, to)
	return err
}

// AddPath implements control.Controlled.
func (s *server) AddPath(ctx context.Context, r control.PathRequest) error {
	p, err := options.ParsePath(r.Path)
	if err != nil {
		return exit.Errorf(exit.Usage, "path %q: %v", r.Path, err)
	}
	within, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	if err := s.awaitConnected(within); err != nil {
		return err
	}
	if err := s.checkKeys(r); err != nil {
		return err
	}
	err = s.addPath(within, p)
	switch {
	case errors.Is(err, initiator.ErrPathExists):
		return exit.Errorf(exit.AlreadyServed, "path %v: %v", p, err)
	case err != nil && r.Keep && within.Err() == nil:
		if err := s.keepPath(p, err); err != nil {
			return err
		}
	case err != nil:
		return exit.Connecting(p.Address.String(), s.opts.NQN, s.opts.HostNQN, err)
	}
	s.log.Info("path added on request", "path", p.String())
	return errors.Join(s.prefer(), s.recordPaths())
}

// checkKeys refuses keys for a path that are not those of the server, which has one pair for all
// paths.
func (s *server) checkKeys(r control.PathRequest) error {
	s.mu.Lock()
	keys := s.keys
	s.mu.Unlock()
	for _, k := range []struct{ flag, wanted, has string }{
		{"-S/--" + options.HostSecret, r.Host, keys.Host}, {"-C/--" + options.ControllerSecret, r.Controller, keys.Controller},
	} {
		if k.wanted == "" || k.wanted == k.has || k.wanted == options.NoSecret && k.has == "" {
			continue
		}
		has := "another key"
		if k.has == "" {
			has = "no such key"
		}
		name := s.record.state().Name
		return exit.Errorf(exit.NotProved, "%s: %s has %s, and uses its keys for all paths; \"reauth %s\" changes them", k.flag, name, has, name)
	}
	return nil
}

// RemovePath implements control.Controlled.
func (s *server) RemovePath(ctx context.Context, r control.PathRequest) error {
	p, err := options.ParsePath(r.Path)
	if err != nil {
		return exit.Errorf(exit.Usage, "path %q: %v", r.Path, err)
	}
	c, err := s.pathTo(p)
	if err != nil {
		return err
	}
	within, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	switch err := s.sub.RemovePath(within, c); {
	case errors.Is(err, initiator.ErrLastPath):
		return exit.Errorf(exit.Busy, "path %v: %v", p, err)
	case err != nil && slices.Contains(s.sub.Paths(), c):
		return fmt.Errorf("path %v: %w", p, err)
	case err != nil:
		s.log.Warn("path is removed, but its target may still have the controller", "path", p.String(), "error", err)
	}
	s.log.Info("path removed on request", "path", p.String())
	return s.recordPaths()
}

// SetPolicy implements control.Controlled.
func (s *server) SetPolicy(_ context.Context, r control.PolicyRequest) error {
	policy, err := initiator.ParsePolicy(r.Policy)
	if err != nil {
		return exit.Errorf(exit.Usage, "%v", err)
	}
	var preferred options.Path
	if r.Preferred != "" {
		if preferred, err = options.ParsePath(r.Preferred); err != nil {
			return exit.Errorf(exit.Usage, "path %q: %v", r.Preferred, err)
		}
		if _, err := s.pathTo(preferred); err != nil {
			return err
		}
	}
	sub, err := s.connected()
	if err != nil {
		return err
	}
	if err := sub.SetPolicy(policy, nil); err != nil {
		return err
	}
	s.log.Info("policy changed on request", "policy", policy.String(), "preferred", r.Preferred)
	s.mu.Lock()
	s.policy, s.preferred = policy, preferred
	s.mu.Unlock()
	return errors.Join(s.prefer(), s.record.update(func(st *state.State) { st.Args = options.WithPolicy(st.Args, policy, preferred) }))
}

// prefer makes the path preferred that is meant to be, if it is there. It may be another one
// than that over which this server has connected first.
func (s *server) prefer() error {
	s.mu.Lock()
	policy, wanted := s.policy, s.preferred
	s.mu.Unlock()
	if policy != initiator.Preferred {
		return nil
	}
	if !wanted.Address.IsValid() {
		wanted = options.Path{Address: s.remote, Source: s.opts.SourceAddr}
	}
	c, err := s.pathTo(wanted)
	if err != nil {
		return nil // it may be added later
	}
	return s.sub.SetPolicy(policy, c)
}

// pathTo returns the path to an address. Without a source address any path to it is meant.
func (s *server) pathTo(p options.Path) (*initiator.Controller, error) {
	sub, err := s.connected()
	if err != nil {
		return nil, err
	}
	var have []string
	for _, c := range sub.Paths() {
		at := pathOf(c.Info())
		if at.Address == p.Address && (!p.Source.IsValid() || at.Source == p.Source) {
			return c, nil
		}
		have = append(have, at.String())
	}
	return nil, exit.Errorf(exit.NotFound, "there is no path %v; there is %v", p, have)
}

// pathOf returns what a path was configured with, or the address that a name led to.
func pathOf(i initiator.PathInfo) options.Path {
	at := i.Configured
	if !at.IsValid() {
		at = i.Address
	}
	return options.Path{Address: at, Source: i.Source}
}

// recordPaths records the present paths for the next server.
func (s *server) recordPaths() error {
	var all []options.Path
	for _, p := range s.sub.Info().Paths {
		all = append(all, pathOf(p))
	}
	// The first path is the one by which the connection is known, as long as it is there.
	if i := slices.IndexFunc(all, func(p options.Path) bool { return p.Address == s.remote }); i > 0 {
		all = slices.Concat(all[i:i+1], all[:i], all[i+1:])
	}
	return s.record.update(func(st *state.State) { st.Args = options.WithPaths(st.Args, all) })
}

// describePaths fills in the paths and what changes wait for. unready says why a path that was never
// connected is not.
func describePaths(out *control.Status, now initiator.Info, unready map[string]string) {
	out.Policy = now.Policy.String()
	out.Paths = []control.Path{}
	for n, p := range now.Paths {
		at := pathOf(p)
		v := control.Path{
			Path: at.String(), TrAddr: at.Address.Addr().String(), TrSvcID: fmt.Sprint(at.Address.Port()),
			State: p.State.String(), CNTLID: p.CNTLID, Provider: p.Provider, RDMADevice: p.Device,
			Preferred: now.Policy == initiator.Preferred && n == now.Preferred,
			InFlight:  p.InFlight, Failovers: p.Failovers, Held: p.Held, Losses: p.Losses, Attempts: p.Attempts,
			ANA: map[string]string{}, Vouched: []string{},
		}
		if at.Source.IsValid() {
			v.HostTrAddr = at.Source.String()
		}
		for nsid, state := range p.Access {
			if state != 0 {
				v.ANA[fmt.Sprint(nsid)] = state.String()
			}
		}
		for _, a := range p.Vouched {
			v.Vouched = append(v.Vouched, a.String())
		}
		for _, err := range []error{p.Reason, p.Failure, p.Refused} {
			if err != nil {
				v.LastError = err.Error()
			}
		}
		if v.LastError == "" && p.CNTLID == 0 {
			v.LastError = unready[v.Path]
		}
		out.Paths = append(out.Paths, v)
	}
	for _, f := range now.Fences {
		out.Fences = append(out.Fences, control.Fence{
			Path: f.Address.String(), CNTLID: f.CNTLID, Since: f.Since.UTC().Format(timeFormat), Changes: f.Changes, WaitsFor: f.WaitsFor,
		})
	}
}
