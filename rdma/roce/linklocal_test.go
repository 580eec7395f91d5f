package roce

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/internal/testenv"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/rdmatest"
)

// inNetwork runs a test in a process and a network namespace of its own, with two
// connected interfaces.
func inNetwork(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	const env = "UN_ROCE_NETWORK"
	if os.Getenv(env) != "" {
		for _, args := range []string{
			"link set lo up",
			"link add left0 type veth peer name right0",
			"address add fe80::1/64 dev left0 nodad", "address add fe80::2/64 dev left0 nodad",
			"address add fe80::a/64 dev left0 nodad", "address add fe80::b/64 dev right0 nodad",
			"link set left0 up", "link set right0 up",
		} {
			if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
				t.Fatalf("ip %s: %v\n%s", args, err, out)
			}
		}
		test(t)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.v", "-test.run", "^"+t.Name()+"$", "-test.timeout", "10m")
	cmd.Env = append(os.Environ(), env+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Start()
	testenv.Need(t, "netns", err)
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, out.String())
	}
}

// TestLinkLocal connects with link-local addresses, whose zone is an interface.
func TestLinkLocal(t *testing.T) {
	inNetwork(t, func(t *testing.T) {
		one, two := netip.MustParseAddr("fe80::1%left0"), netip.MustParseAddr("fe80::2%left0")
		for _, c := range []struct {
			name          string
			host, passive Config
			listen        netip.Addr
		}{
			{"several receivers", Config{Addrs: []netip.Addr{one}, Receivers: 3}, Config{Addrs: []netip.Addr{two}, Receivers: 3}, two},
			{"on demand, all addresses", Config{OnDemand: true}, Config{}, one},
		} {
			t.Run(c.name, func(t *testing.T) {
				rdmatest.Run(t, func(t *testing.T) rdmatest.Setup {
					passive := open(t, c.passive)
					return rdmatest.Setup{Active: open(t, c.host), Passive: passive, Listen: c.listen, Invalidate: true}
				})
			})
		}
		t.Run("two interfaces", testTwoInterfaces)
		t.Run("errors", testZoneErrors)
	})
}

// testTwoInterfaces checks two ends that have each other's address on their own
// interfaces.
func testTwoInterfaces(t *testing.T) {
	near, far := netip.MustParseAddr("fe80::a%left0"), netip.MustParseAddr("fe80::b%right0")
	for _, cfg := range []Config{{Addrs: []netip.Addr{near}}, {OnDemand: true}} {
		target := open(t, Config{Addrs: []netip.Addr{far}})
		host := open(t, cfg)
		l, err := target.Listen(netip.AddrPortFrom(far, 0), 4)
		check(t, err)
		t.Cleanup(func() { check(t, l.Close()) })
		id, err := host.Resolve(t.Context(), near, netip.AddrPortFrom(far.WithZone(""), l.Addr().Port()), -1) // of the network of near
		check(t, err)
		a := newEnd(t, id, 64, 2*area, false)
		done := make(chan error, 1)
		go func() {
			_, err := id.Connect(t.Context(), param)
			done <- err
		}()
		request, err := l.Accept(t.Context())
		check(t, err)
		b := newEnd(t, request, 64, 2*area, false)
		check(t, request.Accept(t.Context(), param))
		check(t, <-done)
		if id.LocalAddr().Addr() != near || id.RemoteAddr().Addr() != far.WithZone("left0") {
			t.Errorf("from %s to %s", id.LocalAddr(), id.RemoteAddr())
		}
		if request.LocalAddr().Addr() != far || request.RemoteAddr().Addr() != near.WithZone("right0") {
			t.Errorf("accepted on %s from %s", request.LocalAddr(), request.RemoteAddr())
		}
		exchange(t, a, b, 2, rand.New(rand.NewPCG(1, 2)))
		check(t, errors.Join(a.id.Close(), b.id.Close(), l.Close()))
		check(t, errors.Join(host.Close(), target.Close()))
	}
}

func testZoneErrors(t *testing.T) {
	host := open(t, Config{})
	for _, c := range []struct {
		addr string
		err  error
		says string
	}{
		{"fe80::1", unix.EINVAL, "needs the interface"},
		{"fe80::1%nowhere", unix.ENODEV, `no interface "nowhere"`},
		{"fe80::1%0", unix.ENODEV, `no interface "0"`},
	} {
		to := netip.AddrPortFrom(netip.MustParseAddr(c.addr), 1)
		_, resolve := host.Resolve(t.Context(), netip.Addr{}, to, -1)
		_, listen := host.Listen(to, 1)
		_, bind := New(Config{Addrs: []netip.Addr{to.Addr()}, Port: testPort + 1})
		for _, err := range []error{resolve, listen, bind} {
			if !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v", c.addr, err)
			}
		}
	}
	// A zone without a meaning does no harm.
	l, err := host.Listen(netip.MustParseAddrPort("[::1%lo]:0"), 1)
	check(t, err)
	check(t, l.Close())
	var step *rdma.StepError
	if _, err := host.Listen(netip.MustParseAddrPort("[fe80::9%left0]:0"), 1); !errors.As(err, &step) || !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Errorf("an address that is nobody's: %v", err)
	}
}
