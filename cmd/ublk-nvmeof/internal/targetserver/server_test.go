package targetserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/roce"
)

const (
	hostNQN  = "nqn.2026-01.org.example:host"
	subNQN   = "nqn.2026-01.org.example:disk"
	patience = 30 * time.Second
)

// address differs between processes, because other processes may run tests at the same
// time.
func address() netip.AddrPort {
	pid := os.Getpid()
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, byte(1 + pid>>16&0x7f), byte(pid >> 8), byte(1 + pid%250)}), 4420)
}

// begin runs a target until the test ends, and returns a client for it.
func begin(t *testing.T, o *options.Target) (*Client, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "run") // the path of t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background()) // the hosts disconnect first
	ready, ended := make(chan Status, 1), make(chan error, 1)
	o.Address, o.Provider = address(), options.RoCE
	go func() {
		ended <- Run(ctx, Config{
			Options: o, RunDir: dir, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
			Ready: func(s Status) error { ready <- s; return nil },
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	select {
	case s := <-ready:
		return NewClient(Socket(dir, s.Name)), dir
	case err := <-ended:
		ended <- nil
		t.Fatal(err)
	}
	panic("unreachable")
}

// connect connects to the target.
func connect(t *testing.T, io int) (*initiator.Subsystem, error) {
	t.Helper()
	p, err := roce.New(roce.Config{OnDemand: true})
	if err != nil {
		t.Fatal(err)
	}
	queues := poller.Request{IO: io}
	loops := make([]*poller.Loop, queues.Loops())
	for i := range loops {
		if loops[i], err = poller.New(poller.Config{}); err != nil {
			t.Skip(err) // no io_uring
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := initiator.Connect(ctx, initiator.Config{
		Path: initiator.Path{Provider: p, Address: address()}, SubNQN: subNQN, HostNQN: hostNQN, HostID: nvme.NewUUID(),
		Queues: queues, Loops: loops, ReconnectDelay: 10 * time.Millisecond,
	})
	t.Cleanup(func() {
		var err error
		if c != nil {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if err := c.Close(ctx); err != nil {
				t.Error(err)
			}
		}
		for _, l := range loops {
			err = errors.Join(err, l.Stop())
		}
		if err = errors.Join(err, p.Close()); err != nil {
			t.Error(err)
		}
	})
	return c, err
}

func disk(t *testing.T, words ...string) *options.Target {
	t.Helper()
	o := options.DefaultTarget()
	sub := options.Subsystem{NQN: subNQN, MaxQueues: 1}
	for _, w := range words {
		n, err := options.ParseNamespace(w)
		if err != nil {
			t.Fatal(err)
		}
		sub.Namespaces = append(sub.Namespaces, n)
	}
	o.Subsystems = []options.Subsystem{sub}
	return o
}

func do(t *testing.T, c *Client, request any) Done {
	t.Helper()
	d, err := c.Do(t.Context(), request)
	if err != nil {
		t.Errorf("%+v: %v", request, err)
	}
	return d
}

// eventually waits until a condition is true.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not so", what)
		}
	}
}

// TestHost: a connected host sees changes of the target.
func TestHost(t *testing.T) {
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	client, _ := begin(t, disk(t, "ram=1MiB", "file="+file+",block-size=4KiB"))
	c, err := connect(t, 2)
	if err != nil {
		t.Fatal(err)
	}
	if g := c.Info().Paths[0].Plan.Granted; g != 1 || len(c.Namespaces()) != 2 || c.Info().Paths[0].Device != "roce" {
		t.Errorf("%+v, %d namespaces", c.Info(), len(c.Namespaces()))
	}
	s, err := client.Status(t.Context())
	if err != nil || len(s.Controllers) != 1 || s.Controllers[0].HostNQN != hostNQN || s.Controllers[0].Queues != 1 || s.Connections != 2 {
		t.Errorf("%+v, %v", s, err)
	}
	do(t, client, GrantRequest{Limit: 3})
	do(t, client, DropRequest{QID: -1})
	want := min(2, runtime.NumCPU()) // the host requests no more
	eventually(t, "more queues after the connection was dropped", func() bool {
		i := c.Info().Paths[0]
		return i.State == initiator.StateLive && i.Losses == 1 && i.Plan.Granted == want
	})
	do(t, client, ResizeRequest{NSID: 2, Size: 2 << 20})
	if info, err := os.Stat(file); err != nil || info.Size() != 2<<20 {
		t.Errorf("the file: %v, %v", info, err)
	}
}

// TestRefusals: a host learns why it must not connect.
func TestRefusals(t *testing.T) {
	o := disk(t, "ram=1MiB")
	o.Subsystems[0].AllowHosts = []string{hostNQN + "2"}
	client, _ := begin(t, o)
	for _, tt := range []struct {
		request any
		code    exit.Code
		text    string
	}{
		{UnfaultRequest{}, exit.HostNotAllowed, "invalid host"},
		{RejectRequest{Status: 6}, exit.Rejected, "no resources"},
		{RefuseRequest{Status: int(nvme.StatusInternal | nvme.StatusDNR)}, exit.Negotiation, "internal error"},
	} {
		do(t, client, tt.request)
		if _, err := connect(t, 1); exit.Of(err) != tt.code || !strings.Contains(fmt.Sprint(err), tt.text) {
			t.Errorf("%+v: %v (%d)", tt.request, err, exit.Of(err))
		}
		do(t, client, UnfaultRequest{})
	}
}

func TestNoQueues(t *testing.T) {
	client, _ := begin(t, disk(t, "ram=1MiB"))
	do(t, client, GrantRequest{Exactly: true})
	if _, err := connect(t, 1); exit.Of(err) != exit.Negotiation {
		t.Error(err)
	}
	do(t, client, GrantRequest{Exactly: true, Limit: nvme.MaxQueues})
	c, err := connect(t, 2)
	if err != nil {
		t.Fatal(err)
	}
	if g := c.Info().Paths[0].Plan.Granted; g != min(2, runtime.NumCPU()) {
		t.Errorf("granted %d", g)
	}
}

// TestStop: a request ends the target after it was answered, and the directories of
// dead targets are removed.
func TestStop(t *testing.T) {
	client, dir := begin(t, disk(t, "ram=1MiB"))
	dead := filepath.Join(dir, "target7")
	if err := os.MkdirAll(dead, 0o755); err != nil {
		t.Fatal(err)
	}
	if names, err := List(dir); err != nil || !slices.Equal(names, []string{"target0"}) {
		t.Errorf("%q, %v", names, err)
	}
	do(t, client, StopRequest{})
	eventually(t, "it has ended", func() bool {
		names, err := List(dir)
		return err == nil && len(names) == 0
	})
}

func TestStartFails(t *testing.T) {
	for _, tt := range []struct {
		words string
		code  exit.Code
	}{
		{"file=/nonexistent", exit.NotFound},
		{"device=" + t.TempDir(), exit.Usage},
		{"ram=1MiB,nsid=1", exit.Other}, // the id is taken
	} {
		o := disk(t, "ram=1MiB,nsid=1", tt.words)
		o.Address, o.Provider = address(), options.RoCE
		dir := t.TempDir()
		err := Run(t.Context(), Config{Options: o, RunDir: dir, Log: slog.New(slog.DiscardHandler)})
		if exit.Of(err) != tt.code {
			t.Errorf("%s: %v (%d)", tt.words, err, exit.Of(err))
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
}

// TestUsedUpFault: the status shows when a fault applies to no more commands.
func TestUsedUpFault(t *testing.T) {
	client, _ := begin(t, disk(t, "ram=1MiB"))
	do(t, client, FaultRequest{Fault: "cns=1,status=0x6,count=1"}) // Identify Controller
	if _, err := connect(t, 1); err == nil {
		t.Error("the fault did not apply")
	}
	do(t, client, FaultRequest{Fault: "drop,count=1"})
	s, err := client.Status(t.Context())
	if want := []Fault{{1, "cns=1,status=0x6,count=1", true}, {2, "drop,count=1", false}}; err != nil || !slices.Equal(s.Faults.Commands, want) {
		t.Errorf("%+v, %v", s.Faults.Commands, err)
	}
}
