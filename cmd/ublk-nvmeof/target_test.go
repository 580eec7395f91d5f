package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/targetserver"
	"ublk-nvmeof/nvme"
)

// loopback is an address of this process alone: others may test at the same time.
func loopback() string {
	pid := os.Getpid()
	return fmt.Sprintf("127.%d.%d.%d", 1+pid>>16&0x7f, pid>>8&0xff, 1+pid%250)
}

// calls counts the calls of anotherLoopback.
var calls atomic.Uint32

// anotherLoopback is an address of its caller alone, for tests that run in parallel.
func anotherLoopback() netip.Addr {
	pid := os.Getpid()
	return netip.AddrFrom4([4]byte{127, byte(128 + calls.Add(1)%127), byte(pid >> 8), byte(pid)})
}

// TestTarget is a target in the background and everything that changes it.
func TestTarget(t *testing.T) {
	dir := runDir(t)
	un := func(args ...string) (string, string, exit.Code) {
		t.Helper()
		return execProgram(t, append([]string{"--run-dir", dir, "target"}, args...)...)
	}
	ok := func(args ...string) string {
		t.Helper()
		out, errs, code := un(args...)
		if code != exit.OK || errs != "" {
			t.Errorf("%q: exit code %d, %s", args, code, errs)
		}
		return out
	}
	if out := ok("list"); out != "" {
		t.Errorf("at first there is %q", out)
	}
	if _, errs, code := un("stall", "on"); code != exit.NotFound || !strings.Contains(errs, "no target runs") {
		t.Errorf("exit code %d, %s", code, errs)
	}
	out := ok("-a", loopback(), "--provider", "roce", "--background", "-n", "nqn.a", "--namespace", "ram=64MiB", "--max-queues", "3",
		"-n", "nqn.b", "--allow-host", "nqn.h", "--namespace", "ram=1MiB,nsid=7,block-size=4KiB,read-only", "--fault", "delay=1ms,count=1")
	defer un("stop")
	if !strings.Contains(out, "target0: roce at "+loopback()+":4420") {
		t.Errorf("ready: %s", out)
	}
	status := func() targetserver.Status {
		t.Helper()
		var s struct{ Targets []targetserver.Status }
		if err := json.Unmarshal([]byte(ok("list", "-o", "json")), &s); err != nil || len(s.Targets) != 1 {
			t.Fatalf("%v, %+v", err, s)
		}
		return s.Targets[0]
	}
	s := status()
	ram := s.Subsystems[1].Namespaces[0]
	if _, err := nvme.ParseUUID(ram.UUID); err != nil || !ram.NewAtStart {
		t.Errorf("%+v, %v", ram, err)
	}
	ram.UUID, ram.NewAtStart = "", false
	if len(s.Subsystems) != 2 || s.Subsystems[0].MaxQueues != 3 || s.Subsystems[1].AllowHosts[0] != "nqn.h" ||
		ram != (targetserver.NamespaceStatus{NSID: 7, Data: "ram", Size: 1 << 20, BlockSize: 4096, ReadOnly: true}) ||
		len(s.Faults.Commands) != 1 || s.Provider != "roce" || s.ProviderReason != "asked for" {
		t.Errorf("%+v", s)
	}
	// The second target on the address.
	if _, errs, code := un("-a", loopback(), "-n", "nqn.c", "--provider", "roce"); code != exit.Other ||
		!strings.Contains(errs, "UDP port 4791 of "+loopback()+" is taken by target0, process ") || !strings.Contains(errs, "address already in use") || strings.Contains(errs, "rxe") {
		t.Errorf("exit code %d, %s", code, errs)
	}

	ok("grant", "2", "-n", "nqn.a")
	ok("grant", "none")
	if got := ok("fault", "opcode=write,status=0x6,dnr"); got != "fault 2\n" {
		t.Errorf("%q", got)
	}
	ok("clear", "1")
	ok("stall", "on")
	ok("reject", "6")
	ok("refuse", "0x182", "--dnr")
	ok("ana", "1", "inaccessible", "-n", "nqn.a")
	if got := ok("namespace", "add", "ram=2MiB", "-n", "nqn.b"); got != "namespace 1\n" {
		t.Errorf("%q", got)
	}
	_, key := newKeyFile(t)
	ok("auth", "nqn.h", "-n", "nqn.b", "--dhchap-key", "@"+key, "--dhchap-ctrl-key", "@"+key)
	ok("auth", "nqn.h", "-n", "nqn.b", "--dhchap-dhgroup", "ffdhe2048")
	ok("ana", "2", "inaccessible", "-n", "nqn.a", "--port", "1")
	ok("namespace", "remove", "7", "-n", "nqn.b")
	ok("namespace", "resize", "1", "128MiB", "-n", "nqn.a")
	ok("namespace", "read-only", "1", "on", "-n", "nqn.a")
	ok("namespace", "hide", "1h")
	ok("freeze", "1h")
	ok("drop")
	s = status()
	a, b := s.Subsystems[0], s.Subsystems[1]
	if a.MaxQueues != 2 || a.ANA["1"] != "inaccessible" || len(a.Namespaces) != 1 || a.Namespaces[0].Size != 128<<20 || !a.Namespaces[0].ReadOnly ||
		len(b.Namespaces) != 1 || b.Namespaces[0].NSID != 1 {
		t.Errorf("%+v", s.Subsystems)
	}
	if f := s.Faults; f.Grant != "none" || !f.Stalled || !f.Frozen || !f.Hidden || f.Reject != "no resources" || !strings.HasPrefix(f.Refuse, "182h") ||
		len(f.Commands) != 1 || f.Commands[0].ID != 2 {
		t.Errorf("%+v", f)
	}
	for _, tt := range []struct {
		args, want string
		code       exit.Code
	}{
		{"namespace add ram=1MiB", "there are 2 subsystems; want --nqn", exit.Usage},
		{"namespace add file=/nonexistent -n nqn.a", "no such file", exit.NotFound},
		{"namespace remove 9 -n nqn.a", "subsystem nqn.a has no namespace 9", exit.NotFound},
		{"grant 5 -n nqn.x", "no subsystem nqn.x", exit.NotFound},
		{"clear 9", "no fault 9", exit.NotFound},
		{"namespace add ram=100TiB -n nqn.a", "exceed the limit", exit.Usage},
		{"namespace add ram=1000B -n nqn.a", `"ram=1000B": namespace: size of 1000 bytes is not a positive multiple of the block size`, exit.Other},
		{"namespace resize 1 1PiB -n nqn.a", "exceed the limit", exit.Usage},
		{"namespace resize 1 1EiB -n nqn.a", "want at most 1.0 PiB", exit.Usage},
		{"namespace hide 0", "want a duration like 10s", exit.Usage},
		{"freeze 2h", "want a duration like 10s", exit.Usage},
		{"drop --qid 70000", "want a number, 0 to 65535", exit.Usage},
		{"drop --qid 1 -n nqn.a", "want --nqn or --qid", exit.Usage},
		{"ana 33 change -n nqn.a", "ana group 33", exit.Usage},
		{"auth nqn.i -n nqn.b --dhchap-key @" + key, "subsystem nqn.b does not admit host nqn.i; it admits nqn.h", exit.NotFound},
		{"auth nqn.h -n nqn.b", "nothing is given to change", exit.Usage},
		{"stall on --target target9", "no target target9 runs; running targets: target0", exit.NotFound},
	} {
		if _, errs, code := un(strings.Fields(tt.args)...); code != tt.code || !strings.Contains(errs, tt.want) {
			t.Errorf("%s: exit code %d, %s", tt.args, code, errs)
		}
	}
	ok("clear")
	if f := status().Faults; f.Grant != "" || f.Stalled || f.Frozen || f.Hidden || f.Reject != "" || f.Refuse != "" || len(f.Commands) != 0 {
		t.Errorf("%+v", f)
	}
	shown := strings.Join(strings.Fields(ok("list", "-v")), " ")
	for _, want := range []string{"namespace 1", "ana group 1 inaccessible", "ana group 2 over port 1 inaccessible", "port 1 " + loopback() + ":4420", "connections", "commands",
		"authentication nqn.b host nqn.h, hashes all, groups ffdhe2048, queues all, with a controller key"} {
		if !strings.Contains(shown, want) {
			t.Errorf("no %q in %s", want, shown)
		}
	}
	ok("ana", "2", "optimized", "-n", "nqn.a")
	if states := status().Subsystems[0].ANA; len(states) != 2 || states["2"] != "optimized" {
		t.Errorf("%v", states)
	}
	ok("stop")
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// Whoever has the UDP port is named, not suspected.
func TestTargetNamesWhoHasThePort(t *testing.T) {
	pid := os.Getpid()
	addr := fmt.Sprintf("127.%d.%d.%d", 200+pid>>16&0x1f, pid>>8&0xff, 1+pid%250)
	c, err := net.ListenPacket("udp", addr+":4791")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, errs, code := execProgram(t, "--run-dir", runDir(t), "target", "-a", "192.0.2.99", "--provider", "roce", "-n", "nqn.a"); code != exit.Usage ||
		!strings.Contains(errs, `target: -a/--traddr "192.0.2.99": this host does not have the address`) {
		t.Errorf("exit code %d, %s", code, errs)
	}
	_, errs, code := execProgram(t, "--run-dir", runDir(t), "target", "-a", addr, "--provider", "roce", "-n", "nqn.a", "--namespace", "ram=1MiB")
	want := fmt.Sprintf("ublk-nvmeof: target: UDP port 4791 of %s is taken by process %d (", addr, pid)
	if code != exit.Other || !strings.HasPrefix(errs, want) || strings.Contains(errs, "rxe") {
		t.Errorf("exit code %d, %s, want %s", code, errs, want)
	}
}
