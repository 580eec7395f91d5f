package server

import (
	"net"
	"testing"
)

func TestExportURI(t *testing.T) {
	unix := func(path string) net.Addr { return &net.UnixAddr{Name: path, Net: "unix"} }
	for _, tt := range []struct {
		at     net.Addr
		name   string
		secure bool
		want   string
	}{
		{unix("/run/ublk-nvmeof/ctrl0/nbd.sock"), "1", false, "nbd+unix:///1?socket=/run/ublk-nvmeof/ctrl0/nbd.sock"},
		{unix("/tmp/a b&c=d+e%f#g?h\"\n;ü"), "1", true, "nbds+unix:///1?socket=/tmp/a%20b%26c%3Dd%2Be%25f%23g%3Fh%22%0A%3B%C3%BC"},
		{unix("/s"), "disk a/b?c%d#e", false, "nbd+unix:///disk%20a/b%3Fc%25d%23e?socket=/s"},
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 10809}, "1", false, "nbd://127.0.0.1:10809/1"},
		{&net.TCPAddr{IP: net.ParseIP("fe80::1"), Port: 10809, Zone: "eth0"}, "2", true, "nbds://[fe80::1%25eth0]:10809/2"},
	} {
		got := exportURI(tt.at, tt.name, tt.secure)
		if got != tt.want {
			t.Errorf("%s %q: %s, want %s", tt.at, tt.name, got, tt.want)
		}
		want := ""
		if tt.at.Network() == "unix" {
			want = tt.at.String()
		}
		if path := socketOf(got); path != want {
			t.Errorf("%s: socket %q, want %q", got, path, want)
		}
	}
}
