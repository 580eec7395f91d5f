// Package discoverer connects to the discovery services that flags and files name.
package discoverer

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"sync"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/discovery"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/provider"
)

// Client opens connections to discovery services. Any goroutine may call its methods.
type Client struct {
	log       *slog.Logger
	mu        sync.Mutex               // guards what follows
	providers map[string]rdma.Provider // that are open, by name
}

// New returns a client, which the caller closes after all its connections.
func New(log *slog.Logger) *Client { return &Client{log: log, providers: map[string]rdma.Provider{}} }

// Close closes the providers.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for name, p := range c.providers {
		if closer, ok := p.(io.Closer); ok {
			errs = append(errs, closer.Close())
		}
		delete(c.providers, name)
	}
	return errors.Join(errs...)
}

// provider opens what fits the route to a service, once.
func (c *Client) provider(o *options.Connect, to netip.AddrPort) (rdma.Provider, error) {
	route, err := provider.RouteTo(to, o.SourceAddr)
	choice := provider.Choose(o.Provider, to.Addr(), route, err)
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.providers[choice.Name]; p != nil {
		return p, nil
	}
	var loading []error
	if choice.Name == options.Verbs && o.LoadModules == "auto" {
		for _, m := range []host.Module{host.IBUverbs, host.RDMAUCM} {
			if !m.Present() {
				loading = append(loading, m.Load())
			}
		}
	}
	p, err := provider.ForHost(choice.Name)
	switch {
	case err == nil:
		c.providers[choice.Name] = p
		return p, nil
	case choice.Name != options.Verbs, exit.Of(err) == exit.Permission:
		return nil, err
	}
	return nil, exit.Errorf(exit.NoRDMA, "no RDMA device can be used (%v); --provider %s needs none", errors.Join(append([]error{err}, loading...)...), options.RoCE)
}

// config is how to connect to a service.
func (c *Client) config(o *options.Discovery, at discovery.Endpoint) (initiator.Config, error) {
	p, err := c.provider(o.Connect, at.Address)
	if err != nil {
		return initiator.Config{}, err
	}
	return initiator.Config{
		Path:        initiator.Path{Provider: p, Address: at.Address, Source: o.Connect.SourceAddr},
		SubNQN:      at.NQN,
		Credentials: initiator.Credentials{Host: o.Connect.Secret, Controller: o.Connect.ControllerSecret},
		HostNQN:     o.Connect.HostNQN, HostID: o.Connect.HostID, TOS: o.Connect.TOS,
		KeepAlive: o.KeepAlive(), Log: c.log,
	}, nil
}

// Open connects to a service in order to read its log.
func (c *Client) Open(ctx context.Context, o *options.Discovery, at discovery.Endpoint) (discovery.Conn, error) {
	cfg, err := c.config(o, at)
	if err != nil {
		return nil, err
	}
	conn, err := discovery.Open(ctx, cfg)
	if err != nil {
		return nil, exit.Connecting(at.Address.String(), at.NQN, cfg.HostNQN, err)
	}
	return conn, nil
}

// OpenToStay connects to a service, and again whenever the connection is lost. changed is
// called when its log may have changed.
func (c *Client) OpenToStay(ctx context.Context, o *options.Discovery, at discovery.Endpoint, changed func()) (discovery.Conn, error) {
	cfg, err := c.config(o, at)
	if err != nil {
		return nil, err
	}
	cfg.CtrlLoss, cfg.ReconnectDelay, cfg.DiscoveryChanged = options.Forever, o.Connect.Reconnect, changed
	conn, err := discovery.OpenUnique(ctx, cfg)
	if err != nil {
		return nil, exit.Connecting(at.Address.String(), at.NQN, cfg.HostNQN, err)
	}
	c.log.Info("connected to discovery service", "address", at.Address.String(), "nqn", conn.Info().SubNQN)
	return conn, nil
}

// Endpoints are the addresses of the service that the flags name, in the order in which they
// are to be tried.
func Endpoints(ctx context.Context, o *options.Discovery) ([]discovery.Endpoint, error) {
	found, err := o.Connect.Resolve(ctx)
	if err != nil {
		return nil, exit.Errorf(exit.Unreachable, "%v", err)
	}
	var out []discovery.Endpoint
	for _, a := range found {
		out = append(out, discovery.Endpoint{Address: a, NQN: o.Connect.NQN})
	}
	return out, nil
}

// Read reads the log of the service that the flags name, at its first address that answers.
func (c *Client) Read(ctx context.Context, o *options.Discovery) (*discovery.Log, error) {
	endpoints, err := Endpoints(ctx, o)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, at := range endpoints {
		// The first page of a walk is the log of its root.
		for p := range discovery.Walk(ctx, at, func(ctx context.Context, at discovery.Endpoint) (discovery.Conn, error) { return c.Open(ctx, o, at) }, discovery.Limits{Services: 1}) {
			if p.Err == nil {
				return p.Log, nil
			}
			errs = append(errs, p.Err)
			break
		}
	}
	return nil, errors.Join(errs...)
}
