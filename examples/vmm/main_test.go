package main

import (
	"bytes"
	"context"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ublk-nvmeof/disk"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/target"
	"ublk-nvmeof/vhost/vhosttest"
)

// output is what serve prints, with a channel that is closed at the first state.
type output struct {
	mu      sync.Mutex
	text    strings.Builder
	serving chan struct{}
	once    sync.Once
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if bytes.HasPrefix(p, []byte("connection live")) {
		o.once.Do(func() { close(o.serving) })
	}
	return o.text.Write(p)
}

// TestServe writes as a guest, and finds the data at the target.
func TestServe(t *testing.T) {
	fabric, at := rdmatest.NewFabric(), netip.MustParseAddr("192.0.2.1")
	tgt, err := target.New(target.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer tgt.Close()
	if _, err := tgt.AddPorts(target.PortConfig{Provider: fabric.Provider(at), Addr: netip.AddrPortFrom(at, 4420)}); err != nil {
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
	if _, err := store.WriteAt([]byte{0x55, 0xAA}, 510); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, socket := &output{serving: make(chan struct{})}, filepath.Join(t.TempDir(), "s")
	ended := make(chan error, 1)
	go func() {
		ended <- serve(ctx, disk.Config{
			NQN: s.NQN(), HostNQN: "nqn.2026-01.org.example:host",
			Paths: []disk.Path{{Host: at.String(), Provider: fabric.Provider(netip.MustParseAddr("192.0.2.2"))}},
		}, socket, out)
	}()
	select {
	case <-out.serving:
	case err := <-ended:
		t.Fatal(err)
	}
	guest, err := vhosttest.NewGuest(vhosttest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	if err := guest.Connect(socket); err != nil {
		t.Fatal(err)
	}
	ring := guest.Rings[0]
	copy(ring.Data(0), "from the guest")
	if status, err := ring.Do(0, vhosttest.Out, 8, 4096); status != 0 || err != nil {
		t.Fatalf("write: status %d, %v", status, err)
	}
	p := make([]byte, 14)
	if _, err := store.ReadAt(p, 4096); err != nil || string(p) != "from the guest" {
		t.Errorf("%q, %v", p, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if text := out.text.String(); !strings.HasPrefix(text, "disk of 1048576 bytes with a partition table\nconnection live, 1048576 bytes\n") {
		t.Errorf("%q", text)
	}
}
