package initiator

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/rdmatest"
	"ublk-nvmeof/target"
)

// TestReadLogWithoutData: a target that answers and writes nothing does not make the data of
// an earlier command those of this one.
func TestReadLogWithoutData(t *testing.T) {
	fabric := rdmatest.NewFabric()
	target := newFakeTarget(t, fabric, 1<<20)
	target.intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
		return nvme.StatusSuccess, qid == 0 && cmd.Opcode() == nvme.AdminGetLogPage
	}
	c := connect(t, testConfig(fabric.Provider(hostAddr), newLoops(t, 1), poller.Request{IO: 1}))
	for i := range 2 * adminBuffers {
		out := bytes.Repeat([]byte{0xFF}, 3*adminPage)
		if err := c.ReadLog(t.Context(), LogRequest{Page: nvme.LogSMART}, out); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out, make([]byte, len(out))) {
			t.Fatalf("read %d has data", i)
		}
	}
	for _, n := range []int{0, 3, 4098} {
		if err := c.ReadLog(t.Context(), LogRequest{}, make([]byte, n)); err == nil {
			t.Errorf("%d bytes were read", n)
		}
	}
	if err := c.ReadLog(t.Context(), LogRequest{Offset: 2}, make([]byte, 4)); err == nil {
		t.Error("an offset of 2 was read")
	}
	closeSubsystem(t, c)
	if err := c.ReadLog(t.Context(), LogRequest{}, make([]byte, 4)); !errors.Is(err, ErrNotConnected) {
		t.Errorf("after Close: %v", err)
	}
}

// TestReadLogAtTheEnd: logs are read while associations end, and the controller.
func TestReadLogAtTheEnd(t *testing.T) {
	for range 20 {
		fabric := rdmatest.NewFabric()
		newFakeTarget(t, fabric, 1<<20).intercept = func(qid uint16, cmd *nvme.Command) (nvme.Status, bool) {
			return nvme.StatusSuccess, qid == 0 && cmd.Opcode() == nvme.AdminGetLogPage
		}
		cfg := testConfig(fabric.Provider(hostAddr), newLoops(t, 1), poller.Request{IO: 1})
		cfg.ReconnectDelay = time.Millisecond
		c := connect(t, cfg)
		var readers sync.WaitGroup
		stop := make(chan struct{})
		for range 4 {
			readers.Go(func() {
				out := make([]byte, adminPage)
				for {
					_ = c.ReadLog(t.Context(), LogRequest{Page: nvme.LogSMART}, out) // the connection may be lost
					select {
					case <-stop:
						return
					default:
					}
				}
			})
		}
		for losses := range 3 {
			fabric.KillAll(hostAddr)
			waitFor(t, "the next association", func() bool { i := c.Info().Paths[0]; return i.Losses > losses && i.State == StateLive })
		}
		closeSubsystem(t, c)
		close(stop)
		readers.Wait()
	}
}

// TestDiscoveryController: a controller without I/O queues lives without keep alive, hears of
// changes, and comes back.
func TestDiscoveryController(t *testing.T) {
	fabric := rdmatest.NewFabric()
	tg, err := target.New(target.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer tg.Close()
	if _, err := tg.AddPorts(target.PortConfig{Provider: fabric.Provider(targetAddr), Addr: netip.AddrPortFrom(targetAddr, 4420)}); err != nil {
		t.Fatal(err)
	}
	changes := make(chan struct{}, 100)
	cfg := testConfig(fabric.Provider(hostAddr), nil, poller.Request{})
	cfg.SubNQN, cfg.Discovery, cfg.KeepAlive = nvme.DiscoveryNQN, true, 0
	cfg.DiscoveryChanged = func() { changes <- struct{}{} }
	cfg.ReconnectDelay = 10 * time.Millisecond
	c, err := Connect(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	change := func(what string) {
		t.Helper()
		select {
		case <-changes:
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: nobody was told", what)
		}
	}
	for range 2 { // the event is enabled again
		if err := tg.AddReferral(netip.MustParseAddrPort("192.0.2.9:4420")); err != nil {
			t.Fatal(err)
		}
		change("a referral")
		if err := tg.RemoveReferral(netip.MustParseAddrPort("192.0.2.9:4420")); err != nil {
			t.Fatal(err)
		}
		change("its end")
	}
	fabric.KillAll(hostAddr)
	change("a loss")
	if i := c.Info().Paths[0]; i.State != StateLive || i.Losses != 1 {
		t.Errorf("%+v", i)
	}
	if id, err := c.Identify(); err != nil || id.SUBNQN() != nvme.DiscoveryNQN {
		t.Errorf("%q, %v", id.SUBNQN(), err)
	}
	if err := c.Close(t.Context()); err != nil {
		t.Error(err)
	}

	// Without the wish, it is none to connect to; with it, queues are a contradiction.
	cfg = testConfig(fabric.Provider(hostAddr), newLoops(t, 1), poller.Request{IO: 1})
	cfg.SubNQN = nvme.DiscoveryNQN
	if _, err := Connect(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "is a discovery controller, which has no namespaces") {
		t.Errorf("connect: %v", err)
	}
	cfg.Discovery = true
	if _, err := Connect(context.Background(), cfg); err == nil || !strings.Contains(err.Error(), "a discovery controller has no I/O queues") {
		t.Errorf("with queues: %v", err)
	}
}
