package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma/roce"
	"ublk-nvmeof/target"
)

// after returns the loopback address that is n after an address.
func after(t *testing.T, address string, n int) string {
	t.Helper()
	a := netip.MustParseAddr(address)
	for range n {
		a = a.Next()
	}
	return a.String()
}

// twoPorts is a target with two ports, to which nothing is connected yet.
type twoPorts struct {
	*inspected
	dir, first, second string
}

func newTwoPorts(t *testing.T, flags ...string) *twoPorts {
	t.Helper()
	dir, near, second := runDir(t), anotherLoopback().String(), anotherLoopback().String()
	run := func(args ...string) (string, string, exit.Code) {
		t.Helper()
		return execProgram(t, append([]string{"--run-dir", dir}, args...)...)
	}
	if _, stderr, code := run(append([]string{"target", "--background", "-a", near, "--port", second, "--provider", "roce", "-n", inspectedNQN, "--namespace", "ram=8MiB"}, flags...)...); code != exit.OK {
		t.Fatal(stderr)
	}
	p := &twoPorts{dir: dir, first: near, second: second}
	p.inspected = &inspected{t: t, run: run, close: func() {
		run("disconnect", "--force", "-n", inspectedNQN)
		run("target", "stop", "--target", "target0")
	}}
	return p
}

// connectFlags are for any connection to it.
func (p *twoPorts) connectFlags(flags ...string) []string {
	return append([]string{"connect", "-n", inspectedNQN, "-i", "1", "-Q", "16", "-c", "1", "-k", "2", "--provider", "roce", "--frontend", "nbd-socket"}, flags...)
}

// live waits until n paths are live, and returns the status.
func (p *twoPorts) live(n int) control.Status {
	p.t.Helper()
	for limit := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		s := p.status()
		got := 0
		for _, path := range s.Paths {
			if path.State == "live" {
				got++
			}
		}
		if got == n && len(s.Paths) == n {
			return s
		}
		if time.Now().After(limit) {
			p.t.Fatalf("%d of %d paths are live, want %d: %+v", got, len(s.Paths), n, s.Paths)
		}
	}
}

// kill ends a server as a crash does.
func (p *twoPorts) kill(name string) {
	p.t.Helper()
	r, err := state.Dir(p.dir).Find(name)
	if err != nil {
		p.t.Fatal(err)
	}
	h, err := r.Process.Open()
	if err != nil {
		p.t.Fatal(err)
	}
	defer h.Close()
	if err := h.Kill(); err != nil {
		p.t.Fatal(err)
	}
	if err := h.Wait(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
}

// recover recovers the dead server, which says what it waits for.
func (p *twoPorts) recover() {
	p.t.Helper()
	if _, stderr, code := p.run("recover", inspectedNQN); code != exit.OK {
		p.t.Fatal(stderr)
	}
}

// TestRemovePathWithoutFarewell removes a path whose target does not answer the shutdown. The path
// is gone for this server and for the next one.
func TestRemovePathWithoutFarewell(t *testing.T) {
	t.Parallel()
	p := newTwoPorts(t)
	defer p.close()
	p.ok(p.connectFlags("-a", p.first, "--path", p.second)...)
	s := p.live(2)
	p.ok("target", "fault", "admin,opcode=fabrics,port=2,status=0x6")
	p.ok("disconnect", "-n", inspectedNQN, "--path", p.second)
	p.live(1)
	p.ok("target", "clear")
	p.kill(s.Name)
	p.recover()
	if s := p.live(1); s.Paths[0].TrAddr != p.first {
		t.Errorf("%+v", s.Paths)
	}
}

// TestConnectRecoversByAnotherAddress kills a server and connects to its subsystem by another
// address, which its record may have as a path. The new server has the same device.
func TestConnectRecoversByAnotherAddress(t *testing.T) {
	for name, flags := range map[string]func(*twoPorts) []string{
		"second path": func(p *twoPorts) []string { return []string{"--path", p.second} },
		"new address": func(*twoPorts) []string { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTwoPorts(t)
			defer p.close()
			p.ok(p.connectFlags(append(flags(p), "-a", p.first)...)...)
			before := p.status()
			p.kill(before.Name)
			if out, stderr, code := p.run(p.connectFlags("-a", p.second)...); code != exit.OK || !strings.Contains(out, before.Devices[0].Device) {
				t.Errorf("connect: exit code %d, %q, %s; the device is %s", code, out, stderr, before.Devices[0].Device)
			}
			if now := p.live(1); now.Name != before.Name || now.Paths[0].TrAddr != p.second {
				t.Errorf("%s, was %s: %+v", now.Name, before.Name, now.Paths)
			}
			p.kill(before.Name)
			p.recover()
			if now := p.live(1); now.Paths[0].TrAddr != p.second {
				t.Errorf("recovered: %+v", now.Paths)
			}
		})
	}
}

// TestConnectsAtOnce connects to a subsystem by two addresses at the same time: one server has
// both paths, and its successor, too.
func TestConnectsAtOnce(t *testing.T) {
	t.Parallel()
	p := newTwoPorts(t)
	defer p.close()
	var both sync.WaitGroup
	for _, address := range []string{p.first, p.second} {
		both.Go(func() {
			if _, stderr, code := p.run(p.connectFlags("-a", address)...); code != exit.OK {
				t.Errorf("connect to %s: %s", address, stderr)
			}
		})
	}
	both.Wait()
	s := p.live(2)
	p.kill(s.Name)
	p.recover()
	p.live(2)
}

// TestPathWithoutNamespace: a request whose path does not have the namespace any more goes over
// another one. It fails if no path has it.
func TestPathWithoutNamespace(t *testing.T) {
	p := newTwoPorts(t)
	defer p.close()
	p.ok(p.connectFlags("-a", p.first, "--path", p.second, "--policy", "preferred")...)
	s := p.live(2)
	_, path, _ := strings.Cut(s.Devices[0].Device, "?socket=")
	c, err := dialNBD("unix", path, "1")
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	p.ok("target", "fault", "opcode=write,status=0xb,dnr,count=1,port=1")
	if err := c.write("new"); err != nil {
		t.Errorf("the first path lacks the namespace: %v", err)
	}
	p.ok("target", "fault", "opcode=write,status=0xb,dnr")
	if err := c.write("newer"); err == nil {
		t.Error("no path has the namespace, and the write succeeds")
	}
}

// TestConnectAddsPath checks that connect of a subsystem that is served adds a path, and what
// shows and removes it.
func TestConnectAddsPath(t *testing.T) {
	p := newTwoPorts(t)
	defer p.close()
	p.ok(p.connectFlags("-a", p.first)...)
	one := p.live(1)
	p.refuse(exit.AlreadyServed, "already connected", p.connectFlags("-a", p.first)...)
	if out := p.ok(p.connectFlags("-a", p.second)...); !strings.Contains(out, one.Devices[0].Device) {
		t.Errorf("connect printed %q, the device is %s", out, one.Devices[0].Device)
	}
	s := p.live(2)
	if s.PID != one.PID || s.Paths[1].TrAddr != p.second || s.Paths[0].CNTLID == s.Paths[1].CNTLID || s.Policy != "queue-depth" || s.Fence != "auto" || s.Paths[1].ANA["1"] != "optimized" {
		t.Errorf("%+v", s)
	}
	if out := p.ok("list-subsys"); !strings.Contains(out, "traddr="+p.first+",trsvcid=4420 live") || !strings.Contains(out, "traddr="+p.second+",trsvcid=4420 live") {
		t.Errorf("%s", out)
	}
	if out := p.ok("list", "-v"); !strings.Contains(out, "path 0") || !strings.Contains(out, "namespace 1 optimized") || !strings.Contains(out, "queue-depth, fence auto") {
		t.Errorf("%s", out)
	}
	p.ok("target", "ana", "1", "inaccessible", "--port", "1")
	for limit := time.Now().Add(time.Minute); p.status().Paths[0].ANA["1"] != "inaccessible"; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("the ANA state does not change")
		}
	}
	for path, state := range map[string]string{p.first: "inaccessible", p.second: "optimized"} {
		if out := p.ok("ana-log", inspectedNQN, "--path", path); !strings.Contains(out, "over path: "+path+"\n") || !strings.Contains(out, "state\t:\t"+state) {
			t.Errorf("%s", out)
		}
	}
	p.refuse(exit.NotFound, "there is no path 192.0.2.9", "id-ctrl", inspectedNQN, "--path", "192.0.2.9")
	before := p.status().Paths
	p.ok("target", "drop", "--port", "2")
	p.refuse(exit.NotFound, "no port 9", "target", "drop", "--port", "9")
	p.ok("target", "fault", "status=0x302,port=1,count=1")
	for limit := time.Now().Add(time.Minute); p.status().Paths[1].Losses != before[1].Losses+1; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("the second path is not lost")
		}
	}
	p.live(2)
	p.ok("policy", inspectedNQN, "--policy", "preferred", "--preferred", p.second)
	if s := p.status(); s.Policy != "preferred" || !s.Paths[1].Preferred {
		t.Errorf("%+v", s)
	}
	p.refuse(exit.Usage, "want queue-depth, round-robin or preferred", "policy", inspectedNQN, "--policy", "numa")
	p.refuse(exit.NotFound, "there is no path", "policy", inspectedNQN, "--policy", "preferred", "--preferred", "192.0.2.9")
	p.refuse(exit.Usage, `"99999" is no port, 1 to 65535; want ADDRESS[,PORT[,HOST_TRADDR]]`, "disconnect", "-n", inspectedNQN, "--path", p.second+",99999")
	p.ok("disconnect", "-n", inspectedNQN, "--path", p.first)
	p.live(1)
	p.refuse(exit.Busy, "last path", "disconnect", "-n", inspectedNQN, "--path", p.second)
}

// TestFlagsOfFurtherPath: flags of a connect to a subsystem that is served are used for the path, or
// refused by name, and nothing has happened then. What is printed says what has.
func TestFlagsOfFurtherPath(t *testing.T) {
	t.Parallel()
	p := newTwoPorts(t)
	defer p.close()
	p.ok(p.connectFlags("-a", p.first)...)
	_, key := newKeyFile(t)
	for _, c := range []struct {
		code  exit.Code
		want  string
		flags []string
	}{
		{exit.Usage, `--policy "round-robin": ctrl0 has queue-depth; "policy ctrl0 --policy round-robin" changes it`, []string{"-a", p.second, "--policy", "round-robin"}},
		{exit.Usage, `-k/--keep-alive-tmo "33": ctrl0 has 2; disconnect and connect change it; --fence "none": ctrl0 has auto`, []string{"-a", p.second, "-k", "33", "--fence", "none"}},
		{exit.Usage, `--frontend "ublk": ctrl0 has nbd-socket`, []string{"-a", p.second, "--frontend", "ublk"}},
		{exit.Usage, `--policy "preferred": ctrl0 has queue-depth`, []string{"-a", p.first, "--idempotent", "--policy", "preferred"}},
		{exit.Usage, `--policy "preferred": ctrl0 has queue-depth`, []string{"-a", p.first, "--idempotent", "--foreground", "--policy", "preferred"}},
		{exit.NotProved, `-S/--dhchap-secret: ctrl0 has no such key`, []string{"-a", p.second, "-S", "@" + key}},
		{exit.NotProved, `-S/--dhchap-secret: ctrl0 has no such key`, []string{"-a", p.first, "--idempotent", "-S", "@" + key}},
		{exit.AlreadyServed, "ctrl0 serves " + inspectedNQN + " at " + p.first + ":4420 already", []string{"-a", p.first}},
	} {
		p.refuse(c.code, c.want, p.connectFlags(c.flags...)...)
	}
	config := filepath.Join(t.TempDir(), "config.json")
	text := fmt.Sprintf(`[{"hostnqn": %q, "subsystems": [{"nqn": %q, "ports": [{"transport": "rdma", "traddr": %q}, {"transport": "rdma", "traddr": %q, "dhchap_key": "@%s", "keep_alive_tmo": 33}]}]}]`,
		p.live(1).HostNQN, inspectedNQN, p.first, p.second, key)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, stderr, _ := p.run("connect-all", "-J", config, "--provider", "roce", "--frontend", "nbd-socket"); !strings.Contains(stderr, "path "+p.second+" is not used: -S/--dhchap-secret: ctrl0 has no such key") ||
		!strings.Contains(stderr, `flags are not used: -k/--keep-alive-tmo "33": ctrl0 has 2; disconnect and connect change it`) {
		t.Errorf("connect-all: %s", stderr)
	}
	p.live(1)
	const nowhere = "127.200.0.1,4999"
	if out := p.ok(p.connectFlags("-a", p.first, "--path", nowhere, "--frontend", "auto")...); !strings.Contains(out, "added "+nowhere+" to "+inspectedNQN+", which ctrl0 serves: ") ||
		!strings.Contains(out, "path "+nowhere+" is not connected, and is tried again: ") {
		t.Errorf("%s", out)
	}
	var added struct {
		Added []string `json:"added_paths"`
		Paths []control.Path
	}
	p.json(&added, p.connectFlags("-a", p.second, "-S", "none")...)
	if len(added.Added) != 1 || added.Added[0] != p.second || len(added.Paths) != 3 {
		t.Errorf("%+v", added)
	}
	p.ok("disconnect", "-n", inspectedNQN, "--path", nowhere, "--path", p.first)
	p.refuse(exit.AlreadyServed, " at "+p.second+":4420 already", p.connectFlags("-a", p.second)...)
	p.ok(p.connectFlags("-a", p.second, "--idempotent")...)
	s := p.live(1)
	if s.TrAddr != p.second || s.Paths[0].TrAddr != p.second {
		t.Errorf("the first path is gone, and the server is at %s", s.TrAddr)
	}
	// Another host gets no path.
	if _, stderr, code := p.run(p.connectFlags("-a", p.first, "-q", "nqn.other")...); code != exit.OK || !strings.Contains(stderr, "and no path; -q "+s.HostNQN+" adds a path to ctrl0") {
		t.Errorf("exit code %d, %s", code, stderr)
	}
	p.kill(s.Name)
	p.refuse(exit.NotFound, s.Name+" has died, so no path can be removed", "disconnect", "-d", s.Name, "--path", p.first)
}

// TestBadPathSpoilsNothing: a path that is refused does not keep a device from being made over the
// others. The command names it, and why.
func TestBadPathSpoilsNothing(t *testing.T) {
	t.Parallel()
	p := newTwoPorts(t, "--min-cntlid", "7", "--max-cntlid", "7")
	defer p.close()
	p.ok("target", "--background", "-a", after(t, p.second, 1), "--provider", "roce", "-n", inspectedNQN, "--namespace", "ram=8MiB", "--min-cntlid", "7", "--max-cntlid", "7")
	defer p.run("target", "stop", "--target", "target1")
	bad := after(t, p.second, 1)
	if out := p.ok(p.connectFlags("-a", p.first, "--path", bad)...); !strings.Contains(out, "path "+bad+" is not connected, and is tried again: ") || !strings.Contains(out, "path refused: its controller has id 7, as that of "+p.first) ||
		!strings.Contains(out, "connected "+inspectedNQN) {
		t.Errorf("%s", out)
	}
	if out := p.ok("list"); !strings.Contains(out, "live (1 of 2 paths)") {
		t.Errorf("%s", out)
	}
}

// TestRecoverKeepsPaths checks that recover, connect and upgrade keep all paths, also when one
// cannot be reached.
func TestRecoverKeepsPaths(t *testing.T) {
	t.Parallel()
	p := newTwoPorts(t)
	defer p.close()
	p.ok(p.connectFlags("-a", p.first, "--path", p.second, "--path", "127.200.0.1,4999", "--policy", "round-robin")...)
	s := p.status()
	if len(s.Paths) != 3 || s.Paths[2].State != "connecting" {
		t.Errorf("%+v", s.Paths)
	}
	p.ok("disconnect", "-n", inspectedNQN, "--path", "127.200.0.1,4999")
	s = p.live(2)
	p.kill(s.Name)
	if out, stderr, code := p.run("recover", "--all"); code != exit.OK {
		t.Fatalf("recover: %s%s", out, stderr)
	}
	again := p.live(2)
	// The path that connect was given first may be the one that is down.
	p.ok("target", "drop") // so that recover does not wait for the old controllers
	p.kill(again.Name)
	p.ok("target", "stop")
	if _, stderr, code := p.run("target", "--background", "-a", p.second, "--provider", "roce", "-n", inspectedNQN, "--namespace", "ram=8MiB,uuid="+s.Devices[0].UUID); code != exit.OK {
		t.Fatal(stderr)
	}
	if out, stderr, code := p.run("recover", "--all"); code != exit.OK {
		t.Fatalf("recover over the second path: %s%s", out, stderr)
	}
	if s := p.status(); len(s.Paths) != 2 || s.Paths[0].State != "live" || s.Paths[0].TrAddr != p.second || s.Paths[1].TrAddr != p.first || s.Paths[1].State != "connecting" {
		t.Errorf("%+v", s.Paths)
	}
	if again.PID == s.PID || again.Policy != "round-robin" || again.Paths[0].TrAddr != p.first || again.Paths[1].TrAddr != p.second {
		t.Errorf("%+v", again)
	}
}

// TestPolicyIsKept checks that the policy, the preferred path and the fence are those of the next
// server as well, also if it connects over another path first.
func TestPolicyIsKept(t *testing.T) {
	t.Parallel()
	p := newTwoPorts(t)
	defer p.close()
	p.ok(p.connectFlags("-a", p.first, "--path", p.second, "--policy", "preferred", "--preferred", p.second, "--fence", "none")...)
	check := func(when, path string) {
		t.Helper()
		s := p.status()
		if s.Policy != "preferred" || s.Fence != "none" {
			t.Errorf("%s: policy %s, fence %s", when, s.Policy, s.Fence)
		}
		for _, v := range s.Paths {
			if v.Preferred != (v.TrAddr == path) {
				t.Errorf("%s: path %s: preferred is %v", when, v.Path, v.Preferred)
			}
		}
	}
	again := func() {
		t.Helper()
		p.kill(p.status().Name)
		if out, stderr, code := p.run("recover", "--all"); code != exit.OK {
			t.Fatalf("recover: %s%s", out, stderr)
		}
		p.live(2)
	}
	check("connected", p.second)
	again()
	check("recovered", p.second)
	p.ok("policy", inspectedNQN, "--policy", "preferred")
	check("policy changed", p.first)
	p.ok("disconnect", "-n", inspectedNQN, "--path", p.first)
	p.ok(p.connectFlags("-a", p.first)...)
	p.live(2)
	p.ok("policy", inspectedNQN, "--policy", "preferred", "--preferred", p.first)
	again()
	check("recovered again", p.first)
	p.ok("disconnect", "-n", inspectedNQN, "--path", p.first)
	p.ok(p.connectFlags("-a", p.first)...)
	check("path added again", p.first)
	p.refuse(exit.Usage, "want it with --policy preferred, not queue-depth", p.connectFlags("-a", p.first, "--duplicate-connect", "--preferred", p.second)...)
}

// TestConfigurationHasPaths checks that config write writes a port for each path, and that
// connect-all makes one device with these paths of them.
func TestConfigurationHasPaths(t *testing.T) {
	p := newTwoPorts(t)
	defer p.close()
	p.ok(p.connectFlags("-a", p.first)...)
	p.ok(p.connectFlags("-a", p.second, "-w", p.second)...)
	p.live(2)
	file := filepath.Join(t.TempDir(), "config.json")
	if out := p.ok("config", "write", "--config", file); out != "wrote 1 connection to "+file+"\n" {
		t.Errorf("%s", out)
	}
	if out := p.ok("config", "show"); !strings.Contains(out, p.first) || strings.Count(out, p.second) != 2 || strings.Count(out, `"keep_alive_tmo"`) != 2 {
		t.Errorf("%s", out)
	}
	p.ok("disconnect", "-n", inspectedNQN)
	p.ok("connect-all", "-J", file, "--provider", "roce", "--frontend", "nbd-socket")
	s := p.live(2)
	if len(s.Devices) != 1 || s.Paths[0].TrAddr != p.first || s.Paths[1].HostTrAddr != p.second {
		t.Errorf("%+v", s.Paths)
	}
}

// TestConnectAllMakesOneDevice checks that a subsystem with several ports gets one device with
// several paths.
func TestConnectAllMakesOneDevice(t *testing.T) {
	p := newTwoPorts(t)
	defer p.close()
	out, stderr, code := p.run("connect-all", "-a", p.first, "-i", "1", "-Q", "16", "--provider", "roce", "--frontend", "nbd-socket", "-o", "json")
	if code != exit.OK || !json.Valid([]byte(out)) {
		t.Fatalf("connect-all: %s%s", out, stderr)
	}
	if s := p.live(2); len(s.Devices) != 1 {
		t.Errorf("%d devices", len(s.Devices))
	}
	// The configuration that is made of it gives the same again.
	config := filepath.Join(t.TempDir(), "config.json")
	for _, args := range [][]string{
		{"config", "write", "--config", config}, {"disconnect", "-n", inspectedNQN},
		{"connect-all", "-J", config, "-i", "1", "-Q", "16", "--provider", "roce", "--frontend", "nbd-socket"},
	} {
		if _, stderr, code := p.run(args...); code != exit.OK {
			t.Fatalf("%q: %s", args, stderr)
		}
	}
	if s := p.live(2); len(s.Devices) != 1 {
		t.Errorf("%d devices", len(s.Devices))
	}
}

// TestPathsOfOneAddress: ports of a configuration with the same address and different source
// addresses are different paths.
func TestPathsOfOneAddress(t *testing.T) {
	from := func(source string) path {
		o := options.DefaultDiscovery()
		if source != "" {
			o.Connect.SourceAddr = netip.MustParseAddr(source)
		}
		return path{netip.MustParseAddrPort("192.0.2.1:4420"), o}
	}
	var found subsystems
	for _, source := range []string{"192.0.2.100", "192.0.2.101", "192.0.2.100", ""} {
		found.add("nqn.disk", from(source))
	}
	if all := found.all[0].paths; len(all) != 2 || all[1].path().String() != "192.0.2.1,4420,192.0.2.101" {
		t.Errorf("%+v", all)
	}
	served := control.Status{Paths: []control.Path{{TrAddr: "192.0.2.1", TrSvcID: "4420", HostTrAddr: "192.0.2.100"}}}
	for source, want := range map[string]bool{"192.0.2.100": true, "192.0.2.101": false, "": true} {
		if got := hasPath(served, state.Record{}, from(source).path()); got != want {
			t.Errorf("source %q: %v", source, got)
		}
	}
}

// TestPathsAppear checks that connect-all --persistent adds a port that a discovery service lists
// later as a path, also if it cannot be reached when it is listed.
func TestPathsAppear(t *testing.T) {
	s := &services{t: t, dir: runDir(t), near: loopback()}
	at := netip.AddrPortFrom(netip.MustParseAddr(s.near), 4432)
	far := netip.AddrPortFrom(netip.MustParseAddr(after(t, s.near, 1)), 4432)
	farther := netip.AddrPortFrom(far.Addr().Next(), 4432)
	p, err := roce.New(roce.Config{Addrs: []netip.Addr{at.Addr(), far.Addr(), farther.Addr()}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	tg, err := target.New(target.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer tg.Close()
	if _, err := tg.AddPorts(target.PortConfig{Provider: p, Addr: at}); err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	sub, err := tg.AddSubsystem(target.SubsystemConfig{NQN: "nqn.disk", AllowAny: true})
	if err == nil {
		_, err = sub.AddNamespace(target.NamespaceConfig{Store: target.NewRAM(1 << 20)})
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, errs, code := s.connectAll("-a", s.near, "-s", "4432", "-c", "1", "-p"); code != exit.OK {
		t.Fatalf("exit code %d, %s", code, errs)
	}
	if _, err := tg.AddPorts(target.PortConfig{Provider: p, Addr: far}); err != nil {
		t.Fatal(err)
	}
	s.until(far.String()+` live`, "list", "-v")
	if out := s.ok("list"); strings.Count(out, "nqn.disk") != 1 {
		t.Errorf("%s", out)
	}
	// Another port does not let hosts in at first.
	tg.Faults().RejectConnects(nvme.RDMARejectNoResources)
	if _, err := tg.AddPorts(target.PortConfig{Provider: p, Addr: farther}); err != nil {
		t.Fatal(err)
	}
	for limit := time.Now().Add(time.Minute); !strings.Contains(s.keeperLog(), farther.String()); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("no word of %v:\n%s", farther, s.keeperLog())
		}
	}
	tg.Faults().Clear()
	s.until(farther.String()+` live`, "list", "-v")
}
