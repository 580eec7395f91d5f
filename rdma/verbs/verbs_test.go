//go:build linux && cgo && !noverbs

package verbs

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

func TestSockaddr(t *testing.T) {
	for _, text := range []string{"192.0.2.1:4420", "[2001:db8::1]:4420", "[fe80::1%lo]:1", "0.0.0.0:0", "[::]:65535"} {
		want := netip.MustParseAddrPort(text)
		s, err := newSockaddr(want)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := addrPort(s.c()); got != want {
			t.Errorf("%s came back as %s", text, got)
		}
	}
	s, err := newSockaddr(netip.MustParseAddrPort("[::ffff:192.0.2.1]:4420"))
	if err != nil {
		t.Fatal(err)
	}
	if got := addrPort(s.c()); got != netip.MustParseAddrPort("192.0.2.1:4420") {
		t.Errorf("mapped address came back as %s", got)
	}
	if _, err := newSockaddr(netip.AddrPort{}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("unset address: %v", err)
	}
	if _, err := newSockaddr(netip.MustParseAddrPort("[fe80::1%nosuchinterface]:1")); err == nil || !strings.Contains(err.Error(), "nosuchinterface") {
		t.Errorf("unknown zone: %v", err)
	}
}

func TestNewNamesWhatIsMissing(t *testing.T) {
	_, err := New()
	for _, c := range []struct{ path, word string }{
		{"/sys/class/infiniband_verbs", "ib_uverbs"},
		{"/dev/infiniband/rdma_cm", "rdma_ucm"},
	} {
		if _, missing := os.Stat(c.path); missing != nil {
			if err == nil || !strings.Contains(err.Error(), c.word) {
				t.Errorf("without %s: %v, want an error that names %s", c.path, err, c.word)
			}
			return
		}
	}
	if err != nil && !errors.Is(err, rdma.ErrNoDevice) {
		t.Error(err)
	}
}
