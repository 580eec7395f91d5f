package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/rdma/roce"
	"ublk-nvmeof/target"
)

// until waits until a command's output matches.
func (s *services) until(want string, args ...string) {
	s.t.Helper()
	limit := time.Now().Add(time.Minute)
	for {
		out, errs, _ := s.run(args...)
		if regexp.MustCompile(want).MatchString(out) {
			return
		}
		if time.Now().After(limit) {
			s.t.Fatalf("%q: no %q in\n%s%s\nlog:\n%s", args, want, out, errs, s.keeperLog())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// kept waits until the process that stays has connected a subsystem. The server is live before
// that process knows, and when it ends, it undoes a connection that it is still making.
func (s *services) kept(nqn string) {
	s.t.Helper()
	limit := time.Now().Add(time.Minute)
	for !strings.Contains(s.keeperLog(), "nqn="+nqn+" outcome=connected") {
		if time.Now().After(limit) {
			s.t.Fatalf("%s is not connected:\n%s", nqn, s.keeperLog())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// keeperLog is the log of the process that stays.
func (s *services) keeperLog() string {
	log, err := os.ReadFile(filepath.Join(s.dir, "discovery0", "log"))
	if err != nil {
		return err.Error()
	}
	return string(log)
}

// TestPersistent: a process stays, connects what appears, tries again what failed, and ends
// nothing.
func TestPersistent(t *testing.T) {
	s := &services{t: t, dir: runDir(t), near: loopback()}
	at := netip.AddrPortFrom(netip.MustParseAddr(s.near), 4432)
	p, err := roce.New(roce.Config{Addrs: []netip.Addr{at.Addr()}})
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
	add := func(nqn string, disk bool) *target.Subsystem {
		t.Helper()
		sub, err := tg.AddSubsystem(target.SubsystemConfig{NQN: nqn, AllowAny: true})
		if err == nil && disk {
			_, err = sub.AddNamespace(target.NamespaceConfig{Store: target.NewRAM(1 << 20)})
		}
		if err != nil {
			t.Fatal(err)
		}
		return sub
	}
	add("nqn.first", true)
	// The limit for waiting for the first namespace is the server's, 2 s.
	args := append([]string{"-a", s.near, "-s", "4432", "-c", "1", "-k", "3"}, how...)
	// One address shows all servers, those that are started later as well.
	scrapes := s.near + ":9471"
	out, errs, code := s.connectAll(append(args, "--persistent", "--metrics-listen", scrapes)...)
	if code != exit.OK || errs != "" || !strings.Contains(out, "connected nqn.first at "+at.String()) || !strings.Contains(out, "discovery0, process ") ||
		!strings.Contains(out, "stays connected to "+at.String()+"\n") {
		t.Fatalf("exit code %d, %s%s", code, out, errs)
	}
	add("nqn.second", true)
	s.until(`nqn.second .* live`, "list")

	// Once more starts no other process, and a subsystem that was disconnected stays so.
	if out, errs, code := s.connectAll(append(args, "-p", "-o", "json")...); code != exit.OK || errs != "" || strings.Count(connectedAll(t, out), "already connected") != 2 {
		t.Errorf("exit code %d, %s%s", code, out, errs)
	}
	s.ok("disconnect", "-n", "nqn.first")
	empty := add("nqn.third", false) // which has no namespace yet
	s.until("nqn.third", "discover", "-a", s.near, "-s", "4432", "--provider", "roce")
	add("nqn.fourth", true)
	s.until(`nqn.fourth .* live`, "list")
	if _, err := empty.AddNamespace(target.NamespaceConfig{Store: target.NewRAM(1 << 20)}); err != nil {
		t.Fatal(err)
	}
	s.until(`nqn.third .* live`, "list")

	// A subsystem that vanishes keeps its device, and what appears during an outage is found.
	if err := tg.RemoveSubsystem("nqn.second"); err != nil {
		t.Fatal(err)
	}
	tg.Faults().Disconnect(0)
	add("nqn.fifth", true)
	s.until(`nqn.fifth .* live`, "list")
	text, _ := scrape(t, "tcp", scrapes, "/metrics")
	for _, nqn := range []string{"nqn.second", "nqn.third", "nqn.fourth", "nqn.fifth"} {
		if up, found := sum(text, "ublk_nvmeof_up", `nqn="`+nqn+`"`); !found || up != 1 {
			t.Errorf("%s: up is %v in the metrics of all servers", nqn, up)
		}
	}
	list := s.ok("list", "-v")
	if !strings.Contains(list, "nqn.second") || strings.Contains(list, "nqn.first") ||
		!strings.Contains(list, "stays connected to discovery service "+at.String()+", nqn.2014-08.org.nvmexpress.discovery\n") || strings.Contains(list, "discovery1") {
		t.Errorf("%s\nlog:\n%s", list, s.keeperLog())
	}
	s.kept("nqn.fifth")
	if out := s.ok("disconnect", "-d", "discovery0"); out != "discovery0 ended\n" {
		t.Errorf("%s", out)
	}
	if list := s.ok("list", "-v"); strings.Contains(list, "discovery0") || !strings.Contains(list, "nqn.fifth") {
		t.Errorf("%s", list)
	}
	if left, err := os.ReadDir(filepath.Join(s.dir, "discovery0")); err == nil {
		t.Errorf("left: %v", left)
	}
	if _, errs, code := s.run("disconnect", "-d", "discovery0"); code != exit.NotFound || !strings.Contains(errs, "no server has such a device") {
		t.Errorf("exit code %d, %s", code, errs)
	}

	// A service that is not there yet is waited for, and disconnect-all ends everything.
	absent := fmt.Sprint(at.Port() + 1)
	out, errs, code = s.connectAll(append([]string{"-a", s.near, "-s", absent, "-c", "1", "-p"}, how...)...)
	if code != exit.Rejected || !strings.Contains(errs, "nobody listens") || !strings.Contains(out, "discovery0, process") {
		t.Fatalf("exit code %d, %s%s", code, out, errs)
	}
	late, err := target.New(target.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	if _, err := late.AddPorts(target.PortConfig{Provider: p, Addr: netip.AddrPortFrom(at.Addr(), at.Port()+1)}); err != nil {
		t.Fatal(err)
	}
	sub, err := late.AddSubsystem(target.SubsystemConfig{NQN: "nqn.late", AllowAny: true})
	if err == nil {
		_, err = sub.AddNamespace(target.NamespaceConfig{Store: target.NewRAM(1 << 20)})
	}
	if err != nil {
		t.Fatal(err)
	}
	s.until(`nqn.late .* live`, "list")
	s.kept("nqn.late")
	if out := s.ok("disconnect-all", "-v", "--force"); !strings.Contains(out, "discovery0 ended\n") || !strings.Contains(out, "disconnected from nqn.late\n") {
		t.Errorf("%s", out)
	}
	if list := s.ok("list", "-v"); list != "" {
		t.Errorf("%s", list)
	}
}
