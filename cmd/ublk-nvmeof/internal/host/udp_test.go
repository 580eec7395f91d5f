package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestUDPHolder(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", "0.0.0.0:0"} {
		c, err := net.ListenPacket("udp", address)
		if err != nil {
			t.Log(err) // no IPv6 here
			continue
		}
		local := c.LocalAddr().(*net.UDPAddr).AddrPort()
		h, ok := UDPHolder(local)
		if want := fmt.Sprintf("process %d (%s", os.Getpid(), os.Args[0][:10]); !ok || h.PID != os.Getpid() || !strings.HasPrefix(h.String(), want) {
			t.Errorf("%s: %v, %t, want %s", local, h, ok, want)
		}
		c.Close()
		if h, ok := UDPHolder(local); ok {
			t.Errorf("%s is closed, and %v has it", local, h)
		}
	}
}

func TestFindUDP(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the tables are those of a little-endian machine")
	}
	const v4 = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n" +
		"  1: 0100007F:12B7 00000000:0000 07 00000000:00000000 00:00000000 00000000  1000        0 77 2 0000000000000000 0\n" +
		"  2: 0200007F:12B8 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 78 2 0000000000000000 0\n"
	const v6 = "  sl  local_address remote_address st\n" +
		"  3: 00000000000000000000000000000000:12B7 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 79 2 0 0\n" +
		"  4: 000080FE000000000000000001000000:12B9 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000     5        0 80 2 0 0\n"
	for _, tt := range []struct {
		table, address, inode string
	}{
		{v4, "127.0.0.1:4791", "77"}, {v4, "0.0.0.0:4791", "77"}, {v4, "127.0.0.2:4791", ""}, {v4, "127.0.0.2:4792", "78"}, {v4, "127.0.0.1:1", ""},
		{strings.ReplaceAll(v4, "0100007F", "00000000"), "127.0.0.9:4791", "77"}, {strings.ReplaceAll(v4, "0100007F", "00000000"), "[::1]:4791", ""},
		{v6, "127.0.0.1:4791", "79"}, {v6, "[::1]:4791", "79"}, {v6, "[fe80::1%lo]:4793", "80"}, {v6, "[fe80::2]:4793", ""}, {"x\n", "127.0.0.1:4791", ""},
	} {
		if _, inode, ok := findUDP(tt.table, netip.MustParseAddrPort(tt.address)); inode != tt.inode || ok != (tt.inode != "") {
			t.Errorf("%s: %q, %t, want %q", tt.address, inode, ok, tt.inode)
		}
	}
}

func TestTryUDP(t *testing.T) {
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	taken := c.LocalAddr().(*net.UDPAddr).AddrPort()
	if err := TryUDP(t.Context(), taken); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a port that is taken: %v", err)
	}
	c.Close()
	if err := TryUDP(t.Context(), taken); err != nil {
		t.Error(err)
	}
	if err := TryUDP(t.Context(), netip.MustParseAddrPort("192.0.2.1:4791")); err == nil {
		t.Error("an address of another host works")
	}
}
