package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/docs"
	"ublk-nvmeof/identity"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/process"
	"ublk-nvmeof/rdma/provider"
	"ublk-nvmeof/ublk"
)

const (
	testNQN = "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555"
	testID  = "11111111-2222-3333-4444-555555555555"
)

var source = netip.MustParseAddr("10.0.0.2")

// files makes files of their texts.
func files(texts map[string]string) fstest.MapFS {
	out := fstest.MapFS{}
	for name, text := range texts {
		out[name] = &fstest.MapFile{Data: []byte(text), ModTime: time.Unix(1000, 0)}
	}
	return out
}

// fine is a machine on which nothing is wrong: a ublk driver, and an adapter on the route to
// a target.
func fine() (*Machine, fstest.MapFS) {
	root := files(map[string]string{
		"dev/ublk-control": "", "dev/infiniband/uverbs0": "", "dev/infiniband/rdma_cm": "",
		"sys/module/ublk_drv/parameters/ublks_max": "64\n", "sys/class/ublk-char/ublkc0": "",
		"proc/1/comm": "systemd\n", "proc/77/comm": "sanlock\n", "etc/machine-id": "x\n",
		"etc/nvme/hostnqn": testNQN + "\n", "etc/nvme/hostid": testID + "\n",
		"sys/class/nvme/nvme0/model":             "local\n",
		rdmaClass + "/mlx5_0/node_type":          "1: CA\n",
		rdmaClass + "/mlx5_0/ports/1/state":      "4: ACTIVE\n",
		rdmaClass + "/mlx5_0/ports/1/link_layer": "Ethernet\n",
		// The entry of an empty row exists, and cannot be read.
		rdmaClass + "/mlx5_0/ports/1/gid_attrs/types/9": "",
	})
	for i, g := range []struct{ addr, kind string }{
		{"fe80:0000:0000:0000:0000:0000:0000:0001", "IB/RoCE v1"}, {"fe80:0000:0000:0000:0000:0000:0000:0001", roceV2},
		{"0000:0000:0000:0000:0000:ffff:0a00:0002", "IB/RoCE v1"}, {"0000:0000:0000:0000:0000:ffff:0a00:0002", roceV2},
	} {
		port := rdmaClass + "/mlx5_0/ports/1"
		maps.Copy(root, files(map[string]string{
			fmt.Sprintf("%s/gids/%d", port, i): g.addr + "\n", fmt.Sprintf("%s/gid_attrs/types/%d", port, i): g.kind + "\n",
			fmt.Sprintf("%s/gid_attrs/ndevs/%d", port, i): "eth0\n",
		}))
	}
	o := options.Default()
	o.Address, o.Queues, o.TOS = "10.0.0.1", poller.Request{IO: 1}, 26<<2
	o.HostNQN = testNQN
	o.HostID, _ = nvme.ParseUUID(testID)
	m := &Machine{
		Options: o, Release: "6.12.95+deb13-amd64", FS: root,
		Servers: []control.Status{{Name: "ctrl0", HostNQN: testNQN, HostID: testID, KeepAlive: 5}},
		IOUring: func() error { return nil },
		Features: func(context.Context) (ublk.Features, error) {
			return ublk.UserRecovery | ublk.RecoveryReissue | ublk.IoctlEncode, nil
		},
		Admin: func() bool { return true }, NBD: func() bool { return true }, MayLock: func() bool { return false },
		Limit: func(int) (unix.Rlimit, error) { return unix.Rlimit{Cur: 1 << 30, Max: 1 << 30}, nil },
		Route: func(netip.AddrPort, netip.Addr) (provider.Route, error) {
			return provider.Route{Source: source, Netdev: "eth0", RDMA: "mlx5_0"}, nil
		},
		Netdev: func(name string) (*net.Interface, error) {
			return &net.Interface{Name: name, MTU: 4200, Flags: net.FlagUp | net.FlagRunning}, nil
		},
		DCB: func(string) (host.DCB, bool, error) {
			return host.DCB{PFC: 1 << 3, DSCP: map[uint8]uint8{26: 3, 48: 6}}, true, nil
		},
		Holder: func(netip.AddrPort) (host.Holder, bool) { return host.Holder{}, false },
		Echo:   func(context.Context, netip.AddrPort) error { return nil },
	}
	return m, root
}

// look makes the checks of this host and of the way to the target, and returns the results
// by name.
func look(m *Machine) map[string]Result {
	out := map[string]Result{}
	for _, c := range Checks {
		if (c == connection{}) {
			break // there is no target
		}
		if r := c.Look(context.Background(), m); r.Status != "" {
			out[c.Name()] = r
		}
	}
	return out
}

// overRoCE makes the way of a machine one without an RDMA device.
func overRoCE(m *Machine) { m.Options.Provider = options.RoCE }

func TestNothingIsWrong(t *testing.T) {
	for name, change := range map[string]func(*Machine){
		"verbs": func(*Machine) {}, "roce": overRoCE, "no target": func(m *Machine) { m.Options.Address = "" },
	} {
		m, _ := fine()
		change(m)
		got := look(m)
		for check, r := range got {
			if r.Status != OK || r.Finding == "" || r.Remedy != "" || r.Code != 0 {
				t.Errorf("%s: %s: %+v", name, check, r)
			}
		}
		if len(got) < 14 {
			t.Errorf("%s: only %d checks", name, len(got))
		}
	}
}

// TestEachCheckFails makes each check find something, one at a time.
func TestEachCheckFails(t *testing.T) {
	set := func(name, text string) func(*Machine, fstest.MapFS) {
		return func(_ *Machine, root fstest.MapFS) { maps.Copy(root, files(map[string]string{name: text})) }
	}
	on := func(change func(*Machine)) func(*Machine, fstest.MapFS) {
		return func(m *Machine, _ fstest.MapFS) { change(m) }
	}
	limit := func(resource int, value uint64) func(*Machine, fstest.MapFS) {
		return on(func(m *Machine) {
			others := m.Limit
			m.Limit = func(r int) (unix.Rlimit, error) {
				if r == resource {
					return unix.Rlimit{Cur: value, Max: value}, nil
				}
				return others(r)
			}
		})
	}
	netdev := func(change func(*net.Interface)) func(*Machine, fstest.MapFS) {
		return on(func(m *Machine) {
			others := m.Netdev
			m.Netdev = func(name string) (*net.Interface, error) {
				dev, err := others(name)
				change(dev)
				return dev, err
			}
		})
	}
	echo := func(err error) func(*Machine, fstest.MapFS) {
		return on(func(m *Machine) {
			overRoCE(m)
			m.Echo = func(context.Context, netip.AddrPort) error { return err }
		})
	}
	dcb := func(d host.DCB) func(*Machine, fstest.MapFS) {
		return on(func(m *Machine) { m.DCB = func(string) (host.DCB, bool, error) { return d, true, nil } })
	}
	tested := map[string]bool{}
	for _, tt := range []struct {
		check  string
		what   string
		change func(*Machine, fstest.MapFS)
		status Status
		code   exit.Code
		want   string // in the finding or the remedy
	}{
		{"kernel", "known bad", on(func(m *Machine) { m.Release = "6.18.4-arch1-1" }), Fail, exit.NoUblk, "ublk_init_queues"},
		{"kernel", "too old", on(func(m *Machine) { m.Release = "5.15.0-1-amd64" }), Warn, 0, "older than 6.1"},
		{"kernel", "a module that is loaded", set("sys/module/rdma_rxe/refcnt", "1"), Warn, 0, "--provider roce at this end"},
		{"kernel", "two of them", func(m *Machine, root fstest.MapFS) {
			maps.Copy(root, files(map[string]string{"sys/module/rdma_rxe/refcnt": "1", "sys/module/nvme_rdma/refcnt": "0"}))
		}, Warn, 0, "; nvme_rdma: "},
		{"io_uring", "disabled", on(func(m *Machine) {
			m.IOUring = func() error {
				return &process.RingError{Why: "the administrator has disabled it", Remedy: "sysctl", Err: unix.EPERM}
			}
		}), Fail, exit.Permission, "cannot be used: the administrator has disabled it; sysctl"},
		{"io_uring", "no memory", on(func(m *Machine) { m.IOUring = func() error { return unix.ENOMEM } }), Fail, exit.Other, "cannot allocate"},
		{"ublk", "no module", func(m *Machine, root fstest.MapFS) { delete(root, "dev/ublk-control") }, Warn, 0, "so devices are /dev/nbdN"},
		{"ublk", "no module, and it is asked for", func(m *Machine, root fstest.MapFS) {
			delete(root, "dev/ublk-control")
			m.Options.Frontend = options.Ublk
		}, Fail, exit.NoUblk, "has no module ublk_drv"},
		{"ublk", "neither ublk nor NBD", func(m *Machine, root fstest.MapFS) {
			delete(root, "dev/ublk-control")
			m.NBD = func() bool { return false }
		}, Warn, 0, "only sockets"},
		{"ublk", "not loaded, and not to be", func(m *Machine, root fstest.MapFS) {
			delete(root, "dev/ublk-control")
			maps.Copy(root, files(map[string]string{"lib/modules/6.12.95+deb13-amd64/modules.builtin": "kernel/drivers/block/ublk_drv.ko\n"}))
			m.Options.LoadModules = "never"
		}, Warn, 0, "modprobe ublk_drv"},
		{"ublk", "not root", on(func(m *Machine) { m.Admin = func() bool { return false } }), Warn, 0, "CAP_SYS_ADMIN"},
		{"ublk", "too old", on(func(m *Machine) {
			m.Options.Frontend = options.Ublk
			m.Features = func(context.Context) (ublk.Features, error) { return 0, ublk.ErrNoDriver }
		}), Fail, exit.NoUblk, "6.5"},
		{"ublk", "no recovery", on(func(m *Machine) {
			m.Features = func(context.Context) (ublk.Features, error) { return ublk.IoctlEncode, nil }
		}), Fail, exit.Other, "no USER_RECOVERY USER_RECOVERY_REISSUE, which --on-crash requeue needs"},
		{"ublks_max", "full", set("sys/module/ublk_drv/parameters/ublks_max", "1"), Warn, 0, "1 ublk devices exist, and 1 may"},
		{"ublks_max", "nearly full", func(_ *Machine, root fstest.MapFS) {
			for i := range 60 {
				maps.Copy(root, files(map[string]string{fmt.Sprintf("sys/class/ublk-char/ublkc%d", i): ""}))
			}
		}, Warn, 0, "60 ublk devices exist, and 64 may, if this driver counts those of root (before Linux 6.15 it can); echo 256 > /sys/module"},
		{"ublks_max", "full, but root's do not count", func(m *Machine, root fstest.MapFS) {
			m.Release = "6.15.1"
			maps.Copy(root, files(map[string]string{"sys/module/ublk_drv/parameters/ublks_max": "1"}))
		}, OK, 0, "does not count"},
		{"memlock", "low", limit(unix.RLIMIT_MEMLOCK, 64<<10), Fail, exit.Other, "may lock 64 KiB"},
		{"nofile", "very low", limit(unix.RLIMIT_NOFILE, 40), Fail, exit.Other, "may open 40 files"},
		{"nofile", "low", limit(unix.RLIMIT_NOFILE, 256), Warn, 0, "LimitNOFILE"},
		{"host_identity", "of a server", on(func(m *Machine) { m.Servers[0].HostID = "21111111-2222-3333-4444-555555555555" }), Fail, exit.Other, "ctrl0 has host NQN"},
		{"host_identity", "of the kernel", func(_ *Machine, root fstest.MapFS) {
			maps.Copy(root, files(map[string]string{"sys/class/nvme/nvme1/hostnqn": "nqn.other\n", "sys/class/nvme/nvme1/hostid": strings.ToUpper(testID) + "\n"}))
		}, Fail, exit.Other, "the kernel's nvme1 has host NQN nqn.other"},
		{"host_identity", "in itself", on(func(m *Machine) { m.Options.Warnings = []string{"host NQN x has another UUID"} }), Warn, 0, "another UUID"},
		{"host_clone", "image", func(_ *Machine, root fstest.MapFS) { root["etc/machine-id"].ModTime = time.Unix(2000, 0) }, Warn, 0, "/etc/nvme/hostid is older"},
		{"host_clone", "firmware", on(func(m *Machine) { m.Options.HostID, _ = nvme.ParseUUID(commonIDs[0]) }), Fail, exit.Other, "placeholder"},
		{"lease_times", "flags", on(func(m *Machine) { m.Options.KeepAlive = 30 * time.Second }), Warn, 0, "sanlock gives up when I/O stands still for 80 s, and after a silent outage it can do so for 90 s"},
		{"lease_times", "server", on(func(m *Machine) { m.Servers[0].KeepAlive = 120 }), Warn, 0, "--keep-alive-tmo 26"},
		{"lease_times", "sanlock.conf", set("etc/sanlock/sanlock.conf", "# io_timeout = 9\n io_timeout = 1\n"), Warn, 0, "still for 8 s"},
		{"lease_times", "sbd", set("proc/78/comm", "sbd\n"), Warn, 0, "sbd gives up when I/O stands still for 5 s"},
		{"resolve", "no such name", on(func(m *Machine) { m.Options.Address = "no.such.host.invalid" }), Fail, exit.Unreachable, "no.such.host.invalid"},
		{"route", "none", on(func(m *Machine) {
			m.Route = func(netip.AddrPort, netip.Addr) (provider.Route, error) { return provider.Route{}, unix.ENETUNREACH }
		}), Fail, exit.Unreachable, "ip route get 10.0.0.1"},
		{"rdma_device", "none on the route", on(func(m *Machine) {
			m.Options.Provider = options.Verbs
			m.Route = func(netip.AddrPort, netip.Addr) (provider.Route, error) {
				return provider.Route{Source: source, Netdev: "eth1"}, nil
			}
		}), Fail, exit.NoRDMA, "no RDMA device is on eth1; this host has mlx5_0"},
		{"rdma_device", "none at all", func(m *Machine, root fstest.MapFS) {
			m.Options.Provider, m.Options.Address = options.Verbs, ""
			maps.DeleteFunc(root, func(name string, _ *fstest.MapFile) bool { return strings.HasPrefix(name, rdmaClass) })
		}, Fail, exit.NoRDMA, "this host has no RDMA device"},
		{"rdma_device", "no node", func(m *Machine, root fstest.MapFS) { delete(root, "dev/infiniband/rdma_cm") }, Fail, exit.NoRDMA, "modprobe rdma_ucm"},
		{"link", "down", netdev(func(d *net.Interface) { d.Flags = 0 }), Fail, exit.Unreachable, "ip link set eth0 up"},
		{"link", "no carrier", netdev(func(d *net.Interface) { d.Flags = net.FlagUp }), Fail, exit.Unreachable, "eth0 has no carrier"},
		{"link", "port", set(rdmaClass+"/mlx5_0/ports/1/state", "1: DOWN\n"), Fail, exit.NoRDMA, `port 1 of mlx5_0 is "1: DOWN"`},
		{"gid", "version 1 only", set(rdmaClass+"/mlx5_0/ports/1/gid_attrs/types/3", "IB/RoCE v1\n"), Fail, exit.NoRDMA, "no GID of RoCE v2 of 10.0.0.2"},
		{"gid", "another address", on(func(m *Machine) {
			m.Route = func(netip.AddrPort, netip.Addr) (provider.Route, error) {
				return provider.Route{Source: source.Next(), Netdev: "eth0", RDMA: "mlx5_0"}, nil
			}
		}), Fail, exit.NoRDMA, "no GID of 10.0.0.3 on eth0"},
		{"mtu", "tiny", netdev(func(d *net.Interface) { d.MTU = 300 }), Fail, exit.Unreachable, "too small for any packet"},
		{"mtu", "small", netdev(func(d *net.Interface) { d.MTU = 1000 }), Warn, 0, "carry 512 bytes"},
		{"tos", "ECN", on(func(m *Machine) { m.Options.TOS = 5 }), Warn, 0, "use --tos 4"},
		{"tos", "priority without flow control", on(func(m *Machine) { m.Options.TOS = 0 }), Warn, 0, "has priority 0 on eth0, which has no flow control; priorities that have it: [3]; use --tos 104"},
		{"tos", "no such DSCP", dcb(host.DCB{PFC: 1}), OK, 0, "which has flow control"},
		{"tos", "flow control nowhere", dcb(host.DCB{}), Warn, 0, "no priority has flow control"},
		{"tos", "no ECN", set("sys/class/net/eth0/ecn/roce_rp/enable/3", "0\n"), Warn, 0, "no ECN (roce_rp)"},
		{"udp_port", "taken", on(func(m *Machine) {
			overRoCE(m)
			m.Holder = func(netip.AddrPort) (host.Holder, bool) { return host.Holder{UID: 5}, true }
		}), Warn, 0, "UDP port 4791 of 10.0.0.2 is taken by a process of user 5"},
		{"udp_filter", "dropped", echo(os.ErrDeadlineExceeded), Fail, exit.Timeout, "does not arrive"},
		{"udp_filter", "refused", echo(&net.OpError{Op: "write", Err: syscall.EPERM}), Fail, exit.Timeout, "refuses to send"},
		{"udp_filter", "otherwise", echo(errors.New("rain")), Warn, 0, "rain"},
	} {
		tested[tt.check] = tested[tt.check] || tt.status != OK
		t.Run(tt.check+"/"+tt.what, func(t *testing.T) {
			m, root := fine()
			tt.change(m, root)
			r := look(m)[tt.check]
			if text := r.Finding + "; " + r.Remedy; r.Status != tt.status || r.Code != tt.code || !strings.Contains(text, tt.want) {
				t.Errorf("%s (%d): %s", r.Status, r.Code, text)
			}
		})
	}
	for _, c := range Checks {
		if (c == connection{}) {
			break // the test of the command has the rest
		}
		if !tested[c.Name()] {
			t.Errorf("%s was not made to fail", c.Name())
		}
	}
}

// TestNames: each check has a name of its own, and is documented.
func TestNames(t *testing.T) {
	names := Names()
	if slices.Sort(names); len(slices.Compact(slices.Clone(names))) != len(names) {
		t.Errorf("a name comes twice: %q", names)
	}
	text, err := os.ReadFile("../../../../docs/doctor.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if !strings.Contains(string(text), "| `"+n+"` |") {
			t.Errorf("docs/doctor.md does not have the check %s", n)
		}
	}
}

// TestLost: if no way to the target is known, nothing on the way is looked at, and the
// target is not connected to.
func TestLost(t *testing.T) {
	m, _ := fine()
	m.Route = func(netip.AddrPort, netip.Addr) (provider.Route, error) { return provider.Route{}, unix.ENETUNREACH }
	results := Run(t.Context(), m)
	if last := results[len(results)-1]; last.Check != "route" || last.Status != Fail {
		t.Errorf("%+v", last)
	}
}

func TestKernelBugs(t *testing.T) {
	bugs, err := parseKernelBugs(docs.KernelBugs)
	if err != nil || len(bugs) < 5 {
		t.Fatalf("%d rows, %v", len(bugs), err)
	}
	severity := func(module, release string) (worst Status) {
		for _, b := range bugs {
			if b.module == module && b.concerns(release) && worst != Fail {
				worst = b.severity
			}
		}
		return worst
	}
	for _, tt := range []struct {
		module, release string
		want            Status
	}{
		{"ublk_drv", "6.18.3", ""}, {"ublk_drv", "6.18.4-zabbly+", Fail}, {"ublk_drv", "6.18.5", Fail}, {"ublk_drv", "6.18.6", ""}, {"ublk_drv", "6.18.44-x", ""},
		{"ublk_drv", "6.17.0-1017-aws", Fail}, {"ublk_drv", "6.17.0-7-generic", ""},
		{"ublk_drv", "7.0.0-28-generic", Fail}, {"ublk_drv", "7.0.0-29-generic", ""},
		{"ublk_drv", "6.8.0-137-generic", Warn}, {"ublk_drv", "6.8.9", ""},
		{"rdma_rxe", "6.1.0-40-amd64", ""}, {"rdma_rxe", "6.12.95+deb13-amd64", Warn}, {"rdma_rxe", "7.3.4", Warn}, {"rdma_rxe", "7.4.0", ""},
	} {
		if got := severity(tt.module, tt.release); got != tt.want {
			t.Errorf("%s of %s: %q, want %q", tt.module, tt.release, got, tt.want)
		}
	}
	for _, bad := range []string{
		"no table", kernelBugsHeader + "\n| a | b |\n", kernelBugsHeader + "\n| a | 6.1 | bad | x | y | z |\n", kernelBugsHeader + "\n| a | 6.1 | warn | | y | z |\n",
	} {
		if _, err := parseKernelBugs(bad + "\n"); err == nil {
			t.Errorf("%q is a table", bad)
		}
	}
}

func TestMatches(t *testing.T) {
	for _, tt := range []struct {
		pattern, release string
		want             bool
	}{
		{"6.12", "6.12.95+deb13-amd64", true}, {"6.12", "6.1.2", false}, {"6.1", "6.12.0", false}, {"6.12.95", "6.12", false},
		{"6.12 to 7.3", "6.11.9", false}, {"6.12 to 7.3", "6.12", true}, {"6.12 to 7.3", "7.3.99-rc1", true}, {"6.12 to 7.3", "7", true}, {"6.12 to 7.3", "8.0", false},
		{"6.8.0-*", "6.8.0-1-aws", true}, {"6.8.0-*", "6.8.0", false}, {"[", "6", false},
	} {
		if got := matches(tt.pattern, tt.release); got != tt.want {
			t.Errorf("%q, %q: %t", tt.pattern, tt.release, got)
		}
	}
}

// TestThis: the checks of the machine of the test run without an error of their own.
func TestThis(t *testing.T) {
	o := options.Default()
	if err := o.CompleteHost(identity.Sources{}.ReadOnly()); err != nil {
		t.Fatal(err)
	}
	results := Run(t.Context(), This(o, nil))
	if len(results) < 8 {
		t.Errorf("%+v", results)
	}
	for _, r := range results {
		if strings.Contains(r.Finding, fs.ErrInvalid.Error()) {
			t.Errorf("%s: %s", r.Check, r.Finding)
		}
	}
}
