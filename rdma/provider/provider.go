// Package provider chooses how RDMA is done: rdma/verbs with an RDMA device, or
// rdma/roce without one. The functions may be called from any goroutine.
package provider

import (
	"cmp"
	"fmt"
	"net/netip"
	"runtime"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce"
	"ublk-nvmeof/rdma/verbs"
)

// Names of providers
const (
	Auto  = "auto" // Verbs if an RDMA device leads to the target, else RoCE
	Verbs = "verbs"
	RoCE  = "roce"
)

// Choice is the name of a provider and the reason for it.
type Choice struct{ Name, Reason string }

// Choose chooses a provider. want is one of Auto, Verbs and RoCE. addr is the address of the target, for a host, or
// the own address, for a target; route and err are what RouteTo
// returned for it.
func Choose(want string, addr netip.Addr, route Route, err error) Choice {
	return choose(want, addr, route, err, verbs.Supported, len(devices()) > 0)
}

func choose(want string, addr netip.Addr, route Route, err error, supported, devices bool) Choice {
	switch {
	case want != Auto:
		return Choice{want, "asked for"}
	case err != nil && devices && supported:
		return Choice{Verbs, fmt.Sprintf("this host has RDMA devices, and no route leads to %s", addr)}
	case err != nil:
		return Choice{RoCE, fmt.Sprintf("no RDMA device leads to %s", addr)}
	case route.RDMA == "":
		return Choice{RoCE, fmt.Sprintf("no RDMA device is on %s, which leads to %s", route.Netdev, addr)}
	}
	c := Choice{Verbs, fmt.Sprintf("RDMA device %s is on %s, which leads to %s", route.RDMA, route.Netdev, addr)}
	if !supported {
		return Choice{RoCE, c.Reason + ", but this build has no verbs"}
	}
	return c
}

// Find chooses the provider for the path to a target and opens it. source may be zero. want
// may be empty for Auto. The caller closes the provider if it is an io.Closer.
func Find(want string, to netip.AddrPort, source netip.Addr) (rdma.Provider, Choice, error) {
	route, err := RouteTo(to, source)
	c := Choose(cmp.Or(want, Auto), to.Addr(), route, err)
	p, err := ForHost(c.Name)
	if err != nil {
		err = fmt.Errorf("open provider %s, because %s: %w", c.Name, c.Reason, err)
	}
	return p, c, err
}

// ForHost opens a provider that connects. If it is an io.Closer, the caller closes
// it.
func ForHost(name string) (rdma.Provider, error) {
	return open(name, roce.Config{OnDemand: true, Receivers: receivers()})
}

// Counters are the packet counters of a provider that handles packets itself.
type Counters = roce.Counters

// CountersOf returns a function that reads the counters of a provider, or nil if it has
// none.
func CountersOf(p rdma.Provider) func() Counters {
	if c, ok := p.(interface{ Snapshot() Counters }); ok {
		return c.Snapshot
	}
	return nil
}

// ForTarget opens a provider that listens on addr.
func ForTarget(name string, addr netip.Addr) (rdma.Provider, error) {
	return open(name, roce.Config{Addrs: []netip.Addr{addr}, Receivers: receivers()})
}

// UDPPort is the port of a target whose provider is roce.
const UDPPort = roce.DefaultPort

// receivers is the number of receive loops: one for each CPU, as for I/O queues, but at
// most 8.
func receivers() int { return min(runtime.NumCPU(), 8) }

func open(name string, cfg roce.Config) (rdma.Provider, error) {
	// A nil *Provider is not a nil rdma.Provider.
	switch name {
	case RoCE:
		p, err := roce.New(cfg)
		if err != nil {
			return nil, err
		}
		return p, nil
	case Verbs:
		p, err := verbs.New()
		if err != nil {
			return nil, err
		}
		return p, nil
	}
	return nil, fmt.Errorf("provider %q: want %s or %s", name, Verbs, RoCE)
}
