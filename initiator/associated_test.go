package initiator

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/block"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/rdmatest"
)

// TestAssociatedFails checks that an association whose controller id could not be
// recorded is not used. Connect fails, and a later association is tried again.
func TestAssociatedFails(t *testing.T) {
	fabric := rdmatest.NewFabric()
	target := newFakeTarget(t, fabric, 1<<20)
	loops := newLoops(t, 1)
	cfg := testConfig(fabric.Provider(hostAddr), loops, poller.Request{IO: 1})
	cfg.ReconnectDelay = 10 * time.Millisecond
	full := unix.ENOSPC

	cfg.Associated = func([]ControllerID) error { return full }
	if _, err := Connect(t.Context(), cfg); !errors.Is(err, full) {
		t.Fatalf("connect: %v, want %v", err, full)
	}

	var mu sync.Mutex // guards what follows
	var noted []uint16
	refuse, refused := 0, 0
	cfg.Associated = func(all []ControllerID) error {
		mu.Lock()
		defer mu.Unlock()
		if refuse > 0 {
			refuse--
			refused++
			return full
		}
		if len(all) != 1 || all[0].Address != cfg.Address {
			t.Errorf("controllers %v", all)
		}
		noted = append(noted, all[len(all)-1].CNTLID)
		return nil
	}
	c := connect(t, cfg)
	write := block.Request{Op: block.OpWrite, Sectors: 8}
	if got := single(t, loops[0], c.Namespaces()[0], write, "a"); got != 0 {
		t.Fatalf("write: %v", unix.Errno(got))
	}
	mu.Lock()
	refuse = 2
	mu.Unlock()
	fabric.KillAll(hostAddr)
	if got := single(t, loops[0], c.Namespaces()[0], write, "b"); got != 0 {
		t.Errorf("write after the loss: %v", unix.Errno(got))
	}
	waitFor(t, "the association", func() bool { return c.Info().State == StateLive })
	mu.Lock()
	if refused != 2 || len(noted) != 2 || !slices.Contains(noted, c.Info().Paths[0].CNTLID) {
		t.Errorf("refused %d times, noted %v, in use %d", refused, noted, c.Info().Paths[0].CNTLID)
	}
	mu.Unlock()
	target.mu.Lock()
	if n := target.commands[nvme.OpWrite]; n != 2 {
		t.Errorf("%d writes arrived, want 2", n)
	}
	target.mu.Unlock()
	closeSubsystem(t, c)
}
