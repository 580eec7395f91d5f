package provider

import (
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
)

func TestChoose(t *testing.T) {
	addr, unreachable := netip.MustParseAddr("10.0.0.1"), errors.New("no route")
	with, without := host.Route{Netdev: "eth0", RDMA: "mlx5_0"}, host.Route{Netdev: "eth0"}
	for _, tt := range []struct {
		flag               string
		route              host.Route
		err                error
		supported, devices bool
		name, reason       string
	}{
		{options.Verbs, without, nil, true, false, options.Verbs, "asked for"},
		{options.RoCE, with, nil, true, true, options.RoCE, "asked for"},
		{options.AutoProvider, with, nil, true, true, options.Verbs, "RDMA device mlx5_0 is on eth0, which leads to 10.0.0.1"},
		{options.AutoProvider, without, nil, true, true, options.RoCE, "no RDMA device is on eth0, which leads to 10.0.0.1"},
		{options.AutoProvider, with, nil, false, true, options.RoCE, "this build has no verbs"},
		{options.AutoProvider, host.Route{}, unreachable, true, true, options.Verbs, "no route leads to 10.0.0.1"},
		{options.AutoProvider, host.Route{}, unreachable, true, false, options.RoCE, "no RDMA device leads to 10.0.0.1"},
		{options.AutoProvider, host.Route{}, unreachable, false, true, options.RoCE, "no RDMA device leads to 10.0.0.1"},
	} {
		got := choose(tt.flag, addr, tt.route, tt.err, tt.supported, tt.devices)
		if got.Name != tt.name || !strings.Contains(got.Reason, tt.reason) {
			t.Errorf("%+v: %+v", tt, got)
		}
	}
}

// TestRoCE: it needs nothing, so it can be opened everywhere, and has to be closed.
func TestRoCE(t *testing.T) {
	p, err := ForHost(options.RoCE)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.(io.Closer).Close(); err != nil || p.Name() != options.RoCE {
		t.Errorf("%s, %v", p.Name(), err)
	}
}
