package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/discovery"
	"ublk-nvmeof/nvme"
)

// services is two targets without an RDMA device that refer to each other. Both have the
// subsystem nqn.both; near and far are their addresses.
type services struct {
	t         *testing.T
	dir       string
	near, far string
	targets   []string // that run
}

func newServices(t *testing.T) *services {
	t.Helper()
	near := loopback()
	s := &services{t: t, dir: runDir(t), near: near, far: netip.MustParseAddr(near).Next().String()}
	for i, target := range []string{
		fmt.Sprintf("-a %s -s 4431 --referral %s:4431 -n nqn.both --namespace ram=1MiB -n nqn.near --namespace ram=1MiB -n nqn.hidden --allow-host nqn.other", s.near, s.far),
		fmt.Sprintf("-a %s -s 4431 --referral %s:4431 -n nqn.both --namespace ram=1MiB -n nqn.far --namespace ram=1MiB", s.far, s.near),
	} {
		s.ok(append([]string{"target", "--provider", "roce", "--background"}, strings.Fields(target)...)...)
		s.targets = append(s.targets, fmt.Sprintf("target%d", i))
	}
	return s
}

// stop ends everything.
func (s *services) stop() {
	s.t.Helper()
	if _, errs, code := s.run("disconnect-all", "--force"); code != exit.OK {
		s.t.Errorf("disconnect-all: exit code %d, %s", code, errs)
	}
	for _, name := range s.targets {
		s.run("target", "stop", "--target", name)
	}
}

func (s *services) run(args ...string) (stdout, stderr string, code exit.Code) {
	s.t.Helper()
	return execProgram(s.t, append([]string{"--run-dir", s.dir}, args...)...)
}

// ok runs a command that must succeed and complain about nothing.
func (s *services) ok(args ...string) string {
	s.t.Helper()
	out, errs, code := s.run(args...)
	if code != exit.OK || errs != "" {
		s.t.Fatalf("%q: exit code %d, %s", args, code, errs)
	}
	return out
}

// how are the flags for a connection in a test.
var how = []string{"--provider", "roce", "--frontend", "nbd-socket", "-i", "1", "-q", "nqn.host", "-I", "12345678-1234-1234-1234-123456789abc"}

func (s *services) connectAll(args ...string) (stdout, stderr string, code exit.Code) {
	s.t.Helper()
	return s.run(append(append([]string{"connect-all"}, args...), how...)...)
}

func TestDiscoverVerb(t *testing.T) {
	s := newServices(t)
	defer s.stop()
	out := s.ok("discover", "-t", "rdma", "-a", s.near, "-s", "4431", "--provider", "roce", "-q", "nqn.host", "-I", "12345678-1234-1234-1234-123456789abc")
	if !strings.Contains(out, "Number of Records 4,") || !strings.Contains(out, "subnqn:  nqn.near\n") || strings.Contains(out, "nqn.hidden") ||
		!strings.Contains(out, "subtype: discovery subsystem referral\n") || !strings.Contains(out, "traddr:  "+s.far+"\n") {
		t.Errorf("%s", out)
	}
	var log struct {
		GenCtr  int
		Records []struct{ SubNQN, TrSvcID string }
	}
	out = s.ok("discover", "-a", s.near, "-s", "4431", "--provider", "roce", "-o", "json", "-q", "nqn.other", "-I", "12345678-1234-1234-1234-123456789abd")
	if err := json.Unmarshal([]byte(out), &log); err != nil || len(log.Records) != 5 || log.Records[2].SubNQN != "nqn.hidden" || log.Records[2].TrSvcID != "4431" {
		t.Errorf("%v: %+v", err, log)
	}
	for args, want := range map[string]struct {
		code  exit.Code
		words string
	}{
		"-a " + s.near + " -s 4432":                {exit.Rejected, "nobody listens at " + s.near + ":4432"},
		"-a " + s.near + " -s 4431 -n nqn.near":    {exit.Negotiation, "no discovery controller (type 1)"},
		"-a " + s.near + " -s 4431 -n nqn.unknown": {exit.UnknownSubsys, "has no subsystem nqn.unknown"},
		"-a no.such.host.invalid":                  {exit.Unreachable, "no.such.host.invalid"},
	} {
		if _, errs, code := s.run(append([]string{"discover", "--provider", "roce"}, strings.Fields(args)...)...); code != want.code || !strings.Contains(errs, want.words) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s: exit code %d, %s", args, code, errs)
		}
	}
	// A subsystem connects by connect, and says what a discovery service is.
	if _, errs, code := s.run(append([]string{"connect", "-a", s.near, "-s", "4431", "-n", "nqn.2014-08.org.nvmexpress.discovery"}, how...)...); code != exit.Usage || !strings.Contains(errs, "a discovery subsystem has no namespaces") {
		t.Errorf("connect: exit code %d, %s", code, errs)
	}
}

// connectedAll is the JSON of connect-all, as lines.
func connectedAll(t *testing.T, out string) string {
	t.Helper()
	var all struct {
		Subsystems []struct {
			NQN     string   `json:"subsysnqn"`
			Outcome string   `json:"outcome"`
			Address string   `json:"address"`
			Devices []string `json:"devices"`
			Further []string `json:"further_paths"`
			Error   string   `json:"error"`
		}
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var b strings.Builder
	for _, s := range all.Subsystems {
		fmt.Fprintf(&b, "%s %s at %s, %d devices, further %v\n", s.NQN, s.Outcome, s.Address, len(s.Devices), s.Further)
	}
	return b.String()
}

func TestConnectAll(t *testing.T) {
	s := newServices(t)
	defer s.stop()
	lines := func(outcome string) string {
		return fmt.Sprintf("nqn.both %[1]s at traddr=%[2]s,trsvcid=4431, 1 devices, further [%[3]s:4431]\n"+
			"nqn.near %[1]s at traddr=%[2]s,trsvcid=4431, 1 devices, further []\n"+
			"nqn.far %[1]s at traddr=%[3]s,trsvcid=4431, 1 devices, further []\n", outcome, s.near, s.far)
	}
	// The two targets have other namespaces under one name, so they are no paths to one device.
	const refused = "another namespace has its id"
	out, errs, code := s.connectAll("-a", s.near, "-s", "4431", "-o", "json")
	if got := connectedAll(t, out); code != exit.OK || !strings.Contains(errs, refused) || strings.Count(errs, "\n") != 1 || got != lines("connected") {
		t.Fatalf("exit code %d, %s\n%s", code, errs, got)
	}
	// Once more changes nothing.
	out, errs, code = s.connectAll("-a", s.near, "-s", "4431", "-o", "json")
	if got := connectedAll(t, out); code != exit.OK || !strings.Contains(errs, refused) || got != lines("already connected") {
		t.Errorf("exit code %d, %s\n%s", code, errs, got)
	}
	if out, errs, code := s.connectAll("-a", s.near, "-s", "4431", "--quiet"); code != exit.OK || out+errs != "" {
		t.Errorf("exit code %d, %s%s", code, out, errs)
	}
	if out := s.ok("list"); strings.Count(out, "live") != 3 {
		t.Errorf("%s", out)
	}
	if out := s.ok("disconnect-all", "-v"); strings.Count(out, "disconnected from nqn.") != 3 {
		t.Errorf("%s", out)
	}
	if out := s.ok("disconnect-all"); out != "" {
		t.Errorf("%s", out)
	}
	// Another address is taken if the first does not work, and the rest is connected
	// although one thing fails.
	s.ok("target", "reject", "3", "--target", "target0")
	s.ok("target", "referral", "add", "127.0.0.1:4439", "--target", "target1")
	out, errs, code = s.connectAll("-a", s.far, "-s", "4431")
	if code != exit.Rejected || !strings.Contains(errs, "nobody listens at 127.0.0.1:4439") || !strings.Contains(errs, s.near+":4431 rejected the connection") ||
		!strings.Contains(out, "connected nqn.both at "+s.far) || !strings.Contains(out, "connected nqn.far at "+s.far) || strings.Contains(out, "nqn.near") {
		t.Errorf("exit code %d, %s\n%s", code, errs, out)
	}
}

// TestConnectAllFiles: discovery.conf cannot be replaced in a test of the program, the
// configuration can.
func TestConnectAllFiles(t *testing.T) {
	s := newServices(t)
	defer s.stop()
	config := filepath.Join(s.dir, "config.json")
	text := fmt.Sprintf(`[{"hostnqn": "nqn.host", "hostid": "12345678-1234-1234-1234-123456789abc", "subsystems": [
		{"nqn": "nqn.both", "ports": [{"transport": "rdma", "traddr": %q, "trsvcid": "4439", "ctrl_loss_tmo": 7}, {"transport": "rdma", "traddr": %q, "trsvcid": "4431", "ctrl_loss_tmo": 9}]},
		{"nqn": "nqn.absent", "ports": [{"transport": "rdma", "traddr": %q, "trsvcid": "4431"}]}]}]`, s.near, s.far, s.near)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out, errs, code := s.connectAll("-J", config)
	if code != exit.UnknownSubsys || !strings.Contains(errs, "has no subsystem nqn.absent") || !strings.Contains(out, "connected nqn.both at "+s.far+":4431") ||
		!strings.Contains(out, "  further path "+s.near+":4439 is not used\n") {
		t.Errorf("exit code %d, %s\n%s", code, errs, out)
	}
	if out := s.ok("list", "-o", "json"); !strings.Contains(out, `"ctrl_loss_tmo": 9,`) {
		t.Errorf("%s", out)
	}
	if err := os.WriteFile(config, []byte("[{]"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := s.connectAll("-J", config); code != exit.Usage || !strings.Contains(errs, config+": invalid character") {
		t.Errorf("exit code %d, %s", code, errs)
	}
}

// TestConnectAllAtOnce: a subsystem whose target does not answer does not keep the others waiting.
func TestConnectAllAtOnce(t *testing.T) {
	silent, err := net.ListenPacket("udp4", loopback()+":4791")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	dir := runDir(t)
	var ports []string
	for i := range maxAtOnce {
		ports = append(ports, fmt.Sprintf(`{"nqn": "nqn.disk%d", "ports": [{"transport": "rdma", "traddr": %q}]}`, i, loopback()))
	}
	config := filepath.Join(dir, "config.json")
	if err := os.WriteFile(config, []byte(`[{"subsystems": [`+strings.Join(ports, ",")+`]}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self(), append([]string{"--run-dir", dir, "connect-all", "-J", config, "--timeout", "5m"}, how...)...)
	cmd.Env = append(os.Environ(), "UBLK_NVMEOF_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all are being connected to", func() bool {
		records, err := state.Dir(dir).List()
		return err == nil && len(records) == maxAtOnce
	})
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("it was interrupted, and succeeded")
	}
	if records, err := state.Dir(dir).List(); err != nil || len(records) != 0 {
		t.Errorf("%d records are left, %v", len(records), err)
	}
}

// TestConfig: what is connected can be written to nvme-cli's configuration, and connected
// again from there.
func TestConfig(t *testing.T) {
	s := newServices(t)
	defer s.stop()
	config := filepath.Join(s.dir, "config.json")
	const before = `[{"hostnqn": "nqn.other", "secret": 1, "subsystems": [{"nqn": "nqn.tcp", "ports": [{"transport": "tcp", "traddr": "10.0.0.1"}]}]}]`
	if err := os.WriteFile(config, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := s.connectAll("-a", s.far, "-s", "4431", "-l", "17", "-p"); code != exit.OK {
		t.Fatalf("exit code %d, %s", code, errs)
	}
	shown := s.ok("config", "show")
	for _, want := range []string{`"nqn":"nqn.both"`, `"nqn":"nqn.near"`, `"nqn":"nqn.far"`, `"ctrl_loss_tmo":17`, `"discovery":true`, `"persistent":true`, `"hostnqn":"nqn.host"`} {
		if !strings.Contains(shown, want) {
			t.Errorf("no %s in %s", want, shown)
		}
	}
	if out := s.ok("config", "write", "-J", config); out != "wrote 4 connections to "+config+"\n" {
		t.Errorf("%s", out)
	}
	text, err := os.ReadFile(config)
	if err != nil || !strings.Contains(string(text), `"secret":1`) || !strings.Contains(string(text), `"transport":"tcp"`) || !strings.Contains(string(text), `"nqn":"nqn.near"`) {
		t.Errorf("%v: %s", err, text)
	}
	s.ok("config", "write", "-J", config)
	if again, err := os.ReadFile(config); err != nil || string(again) != string(text) {
		t.Errorf("written again: %v: %s", err, again)
	}
	s.ok("disconnect-all", "--force")
	out, errs, code := s.run("connect-all", "-J", config, "--provider", "roce", "--frontend", "nbd-socket", "-o", "json")
	if code != exit.OK || strings.Count(connectedAll(t, out), " connected at") != 3 || !strings.Contains(errs, "subsystem nqn.tcp: port 0: skipped: transport tcp: not RDMA") {
		t.Errorf("exit code %d, %s\n%s", code, errs, out)
	}
	if out := s.ok("list", "-v"); !strings.Contains(out, "discovery0: process") {
		t.Errorf("%s", out)
	}

	if err := os.WriteFile(config, []byte("[{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := s.run("config", "write", "-J", config); code == exit.OK || !strings.Contains(errs, config+": unexpected EOF") {
		t.Errorf("exit code %d, %s", code, errs)
	}
	if text, err := os.ReadFile(config); err != nil || string(text) != "[{" {
		t.Errorf("%v: %s", err, text)
	}

	conf := filepath.Join(s.dir, "discovery.conf")
	if err := os.WriteFile(conf, []byte("# services\n-t rdma -a 10.0.0.1 -q nqn.a -I 12345678-1234-1234-1234-123456789abc -p\n-t tcp -a 10.0.0.2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, errs, code = s.run("config", "convert", conf)
	if code != exit.OK || !strings.Contains(errs, "discovery.conf:3: skipped") || !strings.Contains(out, `"traddr":"10.0.0.1"`) || !strings.Contains(out, `"persistent":true`) || !strings.Contains(out, `"hostnqn":"nqn.a"`) {
		t.Errorf("exit code %d, %s\n%s", code, errs, out)
	}
}

// TestTakeHostile: of logs that list whatever they can, little is kept and reported.
func TestTakeHostile(t *testing.T) {
	var lines []string
	g := &gatherer{errs: func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }}
	o := options.DefaultDiscovery()
	entry := func(nqn, address string) (e discovery.Entry) {
		e.SetTRTYPE(nvme.TransportRDMA)
		e.SetADRFAM(nvme.AddressIPv4)
		e.SetSUBTYPE(nvme.SubsystemNVMe)
		if err := errors.Join(e.SetSUBNQN(nqn), e.SetTRADDR(address), e.SetTRSVCID("4420")); err != nil {
			t.Fatal(err)
		}
		return e
	}
	var all subsystems
	for i := range 3 {
		p := discovery.Page{Log: &discovery.Log{}}
		for j := range 4096 {
			p.Log.Entries = append(p.Log.Entries, entry(fmt.Sprintf("nqn.%d", i*4096+j), "10.0.0.1"), entry("nqn.0", fmt.Sprintf("10.1.%d.%d", j>>8, j&0xFF)))
		}
		g.take(p, o, &all)
	}
	bad := entry(nvme.DiscoveryNQN, "10.0.0.1")
	g.take(discovery.Page{Log: &discovery.Log{Entries: slices.Repeat([]discovery.Entry{bad}, 4096)}}, o, &all)
	if len(all.all) != maxSubsystems || len(all.all[0].paths) != maxPaths || len(lines) != 4*(maxComplaints+1) {
		t.Errorf("%d subsystems, %d paths, %d lines", len(all.all), len(all.all[0].paths), len(lines))
	}
	if last := lines[len(lines)-1]; !strings.Contains(last, "4088 more entries are left out") {
		t.Errorf("%s", last)
	}
	// Paths that vanish are forgotten, and a subsystem with its last one.
	for range maxPaths {
		all.remove(discovery.Endpoint{Address: all.all[0].paths[0].to, NQN: "nqn.0"}, o.Connect.HostNQN)
	}
	if len(all.all) != maxSubsystems-1 || all.all[0].nqn != "nqn.1" {
		t.Errorf("%d subsystems, the first is %s", len(all.all), all.all[0].nqn)
	}
}
