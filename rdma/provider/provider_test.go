package provider

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	addr, unreachable := netip.MustParseAddr("10.0.0.1"), errors.New("no route")
	with, without := Route{Netdev: "eth0", RDMA: "mlx5_0"}, Route{Netdev: "eth0"}
	for _, tt := range []struct {
		flag               string
		route              Route
		err                error
		supported, devices bool
		name, reason       string
	}{
		{Verbs, without, nil, true, false, Verbs, "asked for"},
		{RoCE, with, nil, true, true, RoCE, "asked for"},
		{Auto, with, nil, true, true, Verbs, "RDMA device mlx5_0 is on eth0, which leads to 10.0.0.1"},
		{Auto, without, nil, true, true, RoCE, "no RDMA device is on eth0, which leads to 10.0.0.1"},
		{Auto, with, nil, false, true, RoCE, "this build has no verbs"},
		{Auto, Route{}, unreachable, true, true, Verbs, "no route leads to 10.0.0.1"},
		{Auto, Route{}, unreachable, true, false, RoCE, "no RDMA device leads to 10.0.0.1"},
		{Auto, Route{}, unreachable, false, true, RoCE, "no RDMA device leads to 10.0.0.1"},
	} {
		got := choose(tt.flag, addr, tt.route, tt.err, tt.supported, tt.devices)
		if got.Name != tt.name || !strings.Contains(got.Reason, tt.reason) {
			t.Errorf("%+v: %+v", tt, got)
		}
	}
}

// TestRoCE: it needs nothing, so it can be opened everywhere, and has to be closed.
func TestRoCE(t *testing.T) {
	p, err := ForHost(RoCE)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.(io.Closer).Close(); err != nil || p.Name() != RoCE {
		t.Errorf("%s, %v", p.Name(), err)
	}
}

func TestRouteTo(t *testing.T) {
	r, err := RouteTo(netip.MustParseAddrPort("127.0.0.1:4420"), netip.Addr{})
	if err != nil || r.Netdev != "lo" || r.RDMA != "" {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := RouteTo(netip.MustParseAddrPort("127.0.0.1:4420"), netip.MustParseAddr("192.0.2.77")); err == nil {
		t.Errorf("a source address that is not ours: %+v", r)
	}
}

func TestUnknown(t *testing.T) {
	if _, err := ForHost("tcp"); err == nil || err.Error() != `provider "tcp": want verbs or roce` {
		t.Error(err)
	}
}

// TestDeviceOn reads what the kernel says of RDMA devices.
func TestDeviceOn(t *testing.T) {
	dir := t.TempDir()
	for file, text := range map[string]string{
		"mlx5_0/ports/1/gid_attrs/ndevs/0": "eth0\n", "mlx5_0/ports/1/gid_attrs/ndevs/1": "eth0.7\n",
		"mlx5_1/ports/1/gid_attrs/ndevs/0": "eth1\n", "mlx5_1/ports/2/gid_attrs/ndevs/3": "eth2\n",
	} {
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 { // an unused entry cannot be read
		if err := os.Mkdir(filepath.Join(dir, "mlx5_1/ports/2/gid_attrs/ndevs", strconv.Itoa(i)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for netdev, want := range map[string]string{"eth0": "mlx5_0", "eth0.7": "mlx5_0", "eth2": "mlx5_1", "eth": "", "lo": ""} {
		if got := deviceOn(dir, netdev); got != want {
			t.Errorf("%s: %q, want %q", netdev, got, want)
		}
	}
}
