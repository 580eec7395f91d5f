package server

import (
	"net"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
)

// TestIPv4Only: the IPv4 wildcard address does not open a port of IPv6.
func TestIPv4Only(t *testing.T) {
	free, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(free.Addr().String())
	free.Close()
	o := lab()
	o.Frontend, o.Socket = options.NBDSocket, net.JoinHostPort("0.0.0.0", port)
	r := begin(t, newWorld(), o, runDir(t))
	r.waitReady()
	if c, err := net.Dial("tcp6", net.JoinHostPort("::1", port)); err == nil {
		c.Close()
		t.Error("a client came in by IPv6")
	}
	c, err := net.Dial("tcp4", net.JoinHostPort("127.0.0.1", port))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
