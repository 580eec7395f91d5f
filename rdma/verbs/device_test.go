//go:build linux && cgo && !noverbs

package verbs

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/rdma"
	_ "ublk-nvmeof/rdma/verbs/prepare" // these tests remove devices
)

const patience = 60 * time.Second

// tool runs ip(8) or rdma(8).
func tool(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// withDevice runs a test in its own process, with the address of an rdma_rxe device that
// the test may break: rxe0un on dummy0un. Before Linux 7, rdma_rxe cannot detach from its
// users, so the device disappears only with the process.
func withDevice(t *testing.T, test func(*testing.T, *Provider, netip.Addr)) {
	t.Helper()
	addr := netip.MustParseAddr("192.0.2.77")
	if os.Getenv("UN_DEVICE_TEST") != "" {
		p, err := New()
		if err != nil {
			t.Fatal(err)
		}
		test(t, p, addr)
		return
	}
	rxeAddr(t) // has rxe at all
	tool(t, "ip", "link", "add", "dummy0un", "type", "dummy")
	t.Cleanup(func() { tool(t, "ip", "link", "delete", "dummy0un") })
	tool(t, "ip", "address", "add", addr.String()+"/24", "dev", "dummy0un")
	tool(t, "ip", "link", "set", "dummy0un", "up")
	tool(t, "rdma", "link", "add", "rxe0un", "type", "rxe", "netdev", "dummy0un")
	cmd := exec.Command(os.Args[0], "-test.v", "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "UN_DEVICE_TEST=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	} else {
		t.Logf("%s", out)
	}
}

// half is one side of a connection.
type half struct {
	id rdma.ID
	pd rdma.PD
	cq rdma.CQ
	mr rdma.MR
	qp rdma.QP
}

func newHalf(t *testing.T, id rdma.ID) *half {
	t.Helper()
	h := &half{id: id}
	var err error
	must := func() {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	h.pd, err = id.Device().AllocPD()
	must()
	h.mr, err = h.pd.AllocMR(4096, rdma.AccessLocalWrite)
	must()
	h.cq, err = id.Device().CreateCQ(64, true, 0)
	must()
	h.qp, err = id.CreateQP(h.pd, rdma.QPConfig{SendCQ: h.cq, RecvCQ: h.cq, MaxSendWR: 8, MaxRecvWR: 8, MaxSendSGE: 1, MaxRecvSGE: 1})
	must()
	return h
}

func (h *half) close() error {
	return errors.Join(h.id.Close(), h.cq.Close(), h.mr.Close(), h.pd.Close())
}

// connectPair connects p to itself.
func connectPair(t *testing.T, p *Provider, addr netip.Addr) (active, passive *half) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := p.Listen(netip.AddrPortFrom(addr, 0), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	id, err := p.Resolve(ctx, netip.Addr{}, l.Addr(), -1)
	if err != nil {
		t.Fatal(err)
	}
	active = newHalf(t, id)
	done := make(chan error, 1)
	go func() {
		_, err := id.Connect(ctx, rdma.ConnParam{RetryCount: 2})
		done <- err
	}()
	other, err := l.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	passive = newHalf(t, other)
	if err := other.Accept(ctx, rdma.ConnParam{}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return active, passive
}

func waitEvent(t *testing.T, id rdma.ID, want rdma.EventType) {
	t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case ev := <-id.Events():
			t.Logf("event %q (%s)", ev.Type, ev.Detail)
			if ev.Type == want {
				return
			}
		case <-timeout:
			t.Fatalf("no event %q", want)
		}
	}
}

func TestPortDown(t *testing.T) {
	withDevice(t, func(t *testing.T, p *Provider, addr netip.Addr) {
		a, b := connectPair(t, p, addr)
		tool(t, "ip", "link", "set", "dummy0un", "down")
		waitEvent(t, a.id, rdma.EventPortDown)
		waitEvent(t, b.id, rdma.EventPortDown)
		if err := errors.Join(a.close(), b.close()); err != nil {
			t.Error(err)
		}
	})
}

// removeDevice deletes the RDMA device, which waits for the processes that use it. The result
// arrives when it is gone.
func removeDevice() chan error {
	gone := make(chan error, 1)
	go func() { gone <- exec.Command("rdma", "link", "delete", "rxe0un").Run() }()
	return gone
}

// waitRemoved waits until the deleted device is gone, and makes it anew.
func waitRemoved(t *testing.T, gone chan error) {
	t.Helper()
	select {
	case err := <-gone:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("rdma_rxe still waits for this process")
	}
	tool(t, "rdma", "link", "add", "rxe0un", "type", "rxe", "netdev", "dummy0un")
}

func TestDeviceRemoved(t *testing.T) {
	withDevice(t, func(t *testing.T, p *Provider, addr netip.Addr) {
		for range 3 {
			a, b := connectPair(t, p, addr)
			gone := removeDevice()
			waitEvent(t, a.id, rdma.EventDeviceRemoved)
			waitEvent(t, b.id, rdma.EventDeviceRemoved)
			if err := errors.Join(a.close(), b.close()); err != nil {
				t.Error(err)
			}
			waitRemoved(t, gone)
		}
	})
}

// TestUnusedDeviceRemoved removes a device that was used before, and one of which only memory
// is left.
func TestUnusedDeviceRemoved(t *testing.T) {
	withDevice(t, func(t *testing.T, p *Provider, addr netip.Addr) {
		for range 2 {
			a, b := connectPair(t, p, addr)
			if err := errors.Join(a.close(), b.close()); err != nil {
				t.Error(err)
			}
			waitRemoved(t, removeDevice())
		}
		a, b := connectPair(t, p, addr)
		if err := errors.Join(b.close(), a.id.Close(), a.cq.Close()); err != nil {
			t.Error(err)
		}
		gone := removeDevice()
		select {
		case <-a.id.Device().Removed():
		case <-time.After(patience):
			t.Fatal("the removal was not noticed")
		}
		if err := errors.Join(a.mr.Close(), a.pd.Close()); err != nil {
			t.Error(err)
		}
		waitRemoved(t, gone)
	})
}

// TestDeviceOfListenerRemoved removes a device on which a listener waits.
func TestDeviceOfListenerRemoved(t *testing.T) {
	withDevice(t, func(t *testing.T, p *Provider, addr netip.Addr) {
		l, err := p.Listen(netip.AddrPortFrom(addr, 0), 1)
		if err != nil {
			t.Fatal(err)
		}
		gone := removeDevice()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if _, err := l.Accept(ctx); !errors.Is(err, rdma.ErrClosed) {
			t.Errorf("accept: %v", err)
		}
		waitRemoved(t, gone)
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestOtherDeviceRemoved removes a device, and then another one that was never used.
func TestOtherDeviceRemoved(t *testing.T) {
	withDevice(t, func(t *testing.T, p *Provider, addr netip.Addr) {
		tool(t, "ip", "link", "add", "dummy1un", "type", "dummy")
		defer tool(t, "ip", "link", "delete", "dummy1un")
		tool(t, "ip", "link", "set", "dummy1un", "up")
		tool(t, "rdma", "link", "add", "rxe1un", "type", "rxe", "netdev", "dummy1un")
		a, b := connectPair(t, p, addr)
		gone := removeDevice()
		waitEvent(t, a.id, rdma.EventDeviceRemoved)
		if err := errors.Join(a.close(), b.close()); err != nil {
			t.Error(err)
		}
		waitRemoved(t, gone)
		other := make(chan error, 1)
		go func() { other <- exec.Command("rdma", "link", "delete", "rxe1un").Run() }()
		select {
		case err := <-other:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("rdma_rxe waits for this process, which does not use the device")
		}
	})
}

func TestMemoryLimit(t *testing.T) {
	addr := rxeAddr(t)
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	l, err := p.Listen(netip.AddrPortFrom(addr, 0), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	id, err := p.Resolve(t.Context(), netip.Addr{}, l.Addr(), -1)
	if err != nil {
		t.Fatal(err)
	}
	defer id.Close()
	pd, err := id.Device().AllocPD()
	if err != nil {
		t.Fatal(err)
	}
	defer pd.Close()

	// A thread without CAP_IPC_LOCK, which ends with the goroutine
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- func() error {
			header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var caps [2]unix.CapUserData
			if err := unix.Capget(&header, &caps[0]); err != nil {
				return err
			}
			caps[0].Effective &^= 1 << unix.CAP_IPC_LOCK
			if err := unix.Capset(&header, &caps[0]); err != nil {
				return err
			}
			var limit unix.Rlimit
			if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
				return err
			}
			_, err := pd.AllocMR(int(min(limit.Cur, 1<<30))+1, rdma.AccessLocalWrite)
			return err
		}()
	}()
	if err := <-done; !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "RLIMIT_MEMLOCK") {
		t.Errorf("register more than may be locked: %v", err)
	}
}

func TestDescriptorsCloseOnExec(t *testing.T) {
	addr := rxeAddr(t)
	before := testenv.OpenFiles(t)
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	a, b := connectPair(t, p, addr)
	for fd, name := range testenv.OpenFiles(t) {
		if before[fd] == name {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor %d (%s) would go to children", fd, name)
		}
	}
	if err := errors.Join(a.close(), b.close()); err != nil {
		t.Error(err)
	}
}
