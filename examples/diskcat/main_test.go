package main

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"ublk-nvmeof/rdma/roce"
	"ublk-nvmeof/target"
)

// TestRun copies from a target over UDP on the loopback interface.
func TestRun(t *testing.T) {
	at := netip.MustParseAddr("127.0.24.1")
	provider, err := roce.New(roce.Config{Addrs: []netip.Addr{at}})
	if err != nil {
		t.Fatal(err)
	}
	defer provider.Close()
	tgt, err := target.New(target.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer tgt.Close()
	if _, err := tgt.AddPorts(target.PortConfig{Provider: provider, Addr: netip.AddrPortFrom(at, 4420)}); err != nil {
		t.Fatal(err)
	}
	s, err := tgt.AddSubsystem(target.SubsystemConfig{NQN: "nqn.2026-01.org.example:disk", AllowAny: true})
	if err != nil {
		t.Fatal(err)
	}
	store := target.NewRAM(1 << 20)
	if _, err := s.AddNamespace(target.NamespaceConfig{Store: store}); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	if _, err := store.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	url := fmt.Sprintf("nvmeof+rdma://%s/%s?provider=roce&hostnqn=nqn.2026-01.org.example:host", at, s.NQN())
	for _, c := range []struct {
		args []string
		want []byte
	}{
		{nil, want}, {[]string{"512"}, want[512:]}, {[]string{"0x400", "100"}, want[1024:1124]}, {[]string{"1048064", "1000"}, want[1048064:]},
	} {
		var out bytes.Buffer
		if err := run(t.Context(), append([]string{url}, c.args...), &out); err != nil || !bytes.Equal(out.Bytes(), c.want) {
			t.Errorf("%v: %d bytes, %v; want %d", c.args, out.Len(), err, len(c.want))
		}
	}
	if err := run(t.Context(), []string{url, "100"}, new(bytes.Buffer)); err == nil || !strings.Contains(err.Error(), "not whole blocks of 512 bytes") {
		t.Errorf("offset 100: %v", err)
	}
}
