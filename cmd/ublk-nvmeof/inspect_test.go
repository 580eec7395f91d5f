package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

// inspected is a server that is connected to a target with two namespaces, on a socket.
type inspected struct {
	t     *testing.T
	run   func(args ...string) (stdout, stderr string, code exit.Code)
	close func()
}

const inspectedNQN = "nqn.2026-01.org.example:inspected"

// newInspected starts a target with some flags, and connects to it.
func newInspected(t *testing.T, target ...string) *inspected {
	t.Helper()
	dir := runDir(t)
	run := func(args ...string) (string, string, exit.Code) {
		t.Helper()
		return execProgram(t, append([]string{"--run-dir", dir}, args...)...)
	}
	start := append([]string{"target", "--background", "-a", loopback(), "--provider", "roce", "-n", inspectedNQN}, target...)
	if _, stderr, code := run(start...); code != exit.OK {
		t.Fatal(stderr)
	}
	end := func() {
		run("disconnect", "--force", "-n", inspectedNQN)
		run("target", "stop")
	}
	if _, stderr, code := run("connect", "-a", loopback(), "-n", inspectedNQN, "-i", "1", "-Q", "16", "--provider", "roce", "--frontend", "nbd-socket", "--namespace", "1,7"); code != exit.OK {
		end()
		t.Fatal(stderr)
	}
	return &inspected{t, run, end}
}

func (i *inspected) ok(args ...string) string {
	i.t.Helper()
	stdout, stderr, code := i.run(args...)
	if code != exit.OK || stderr != "" {
		i.t.Errorf("%q: exit code %d, %s", args, code, stderr)
	}
	return stdout
}

// json runs a verb with -o json and reads its output.
func (i *inspected) json(v any, args ...string) {
	i.t.Helper()
	text := i.ok(append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(text), v); err != nil {
		i.t.Errorf("%q: %v\n%s", args, err, text)
	}
}

// refuse runs a verb that must fail with one line.
func (i *inspected) refuse(code exit.Code, want string, args ...string) {
	i.t.Helper()
	stdout, stderr, got := i.run(args...)
	if got != code || stdout != "" || !strings.Contains(stderr, want) || strings.Count(stderr, "\n") != 1 {
		i.t.Errorf("%q: exit code %d, want %d; %q %q, want %q", args, got, code, stdout, stderr, want)
	}
}

func (i *inspected) status() control.Status {
	i.t.Helper()
	var l struct{ Controllers []control.Status }
	if i.json(&l, "list"); len(l.Controllers) != 1 {
		i.t.Fatalf("%d servers", len(l.Controllers))
	}
	return l.Controllers[0]
}

// TestInspect asks our own target for everything that there is a verb for.
func TestInspect(t *testing.T) {
	i := newInspected(t, "--namespace", "ram=8MiB", "--namespace", "ram=16MiB,nsid=7,block-size=4KiB")
	defer i.close()
	var ctrl struct {
		MN     string
		CNTLID int
		ELPE   int
		SUBNQN string
		PSDS   []any
	}
	i.json(&ctrl, "id-ctrl", inspectedNQN)
	if strings.TrimSpace(ctrl.MN) != "ublk-nvmeof target" || ctrl.CNTLID != int(i.status().CNTLID) || ctrl.SUBNQN != inspectedNQN || len(ctrl.PSDS) != 1 {
		t.Errorf("id-ctrl: %+v", ctrl)
	}
	var ns struct {
		NSZE  uint64
		LBAFs []struct{ DS int }
	}
	second := i.status().Devices[1].Device
	i.json(&ns, "id-ns", second)
	if ns.NSZE != 4096 || len(ns.LBAFs) != 1 || ns.LBAFs[0].DS != 12 {
		t.Errorf("id-ns of a device: %+v", ns)
	}
	i.json(&ns, "id-ns", "ctrl0", "-n", "0x1")
	if ns.NSZE != 16384 {
		t.Errorf("id-ns of a namespace: %+v", ns)
	}
	var list struct {
		NSIDs []struct{ NSID int } `json:"nsid_list"`
	}
	if i.json(&list, "list-ns", "ctrl0"); len(list.NSIDs) != 2 || list.NSIDs[1].NSID != 7 {
		t.Errorf("list-ns: %+v", list)
	}
	if i.json(&list, "list-ns", "ctrl0", "-n", "2"); len(list.NSIDs) != 1 {
		t.Errorf("list-ns from 2: %+v", list)
	}
	var descs struct {
		Descs []struct{ Type, UUID string } `json:"ns-descs"`
	}
	if i.json(&descs, "ns-descs", second); len(descs.Descs) != 2 || descs.Descs[0].UUID != i.status().Devices[1].UUID {
		t.Errorf("ns-descs: %+v", descs)
	}
	var smart struct {
		Errors int `json:"num_err_log_entries"`
	}
	i.json(&smart, "smart-log", "ctrl0")
	i.refuse(exit.Negotiation, "get-log: get log page: the target answered: nvme status 002h: invalid field", "get-log", "ctrl0", "-i", "0xC0", "-l", "512")
	before := smart.Errors
	if i.json(&smart, "smart-log", "ctrl0"); smart.Errors != before+1 {
		t.Errorf("smart-log counts %d errors, and %d after one more", before, smart.Errors)
	}
	var errors struct {
		Errors []struct {
			Status int `json:"status_field"`
			Opcode int
		}
	}
	if i.json(&errors, "error-log", "ctrl0", "-e", "3"); len(errors.Errors) != 3 || errors.Errors[0].Status&0x7FF != 2 || errors.Errors[0].Opcode != 2 {
		t.Errorf("error-log: %+v", errors)
	}
	var ana struct {
		Groups []struct {
			State string
			NSIDS []any
		} `json:"ANA DESC LIST "`
	}
	if i.json(&ana, "ana-log", "ctrl0"); len(ana.Groups) != 1 || ana.Groups[0].State != "optimized" || len(ana.Groups[0].NSIDS) != 2 {
		t.Errorf("ana-log: %+v", ana)
	}
	if i.json(&ana, "ana-log", "ctrl0", "--groups"); len(ana.Groups) != 1 || len(ana.Groups[0].NSIDS) != 0 {
		t.Errorf("ana-log --groups: %+v", ana)
	}
	if raw := i.ok("get-log", "ctrl0", "-i", "2", "-l", "512", "-b"); len(raw) != 512 || raw[3] != 100 {
		t.Errorf("get-log: %d bytes", len(raw))
	}
	for _, flag := range []string{"-b", "--output-format=binary"} {
		if raw := i.ok("id-ctrl", "ctrl0", flag); len(raw) != 4096 || raw[24:28] != "ublk" {
			t.Errorf("id-ctrl %s: %d bytes", flag, len(raw))
		}
	}
	for _, flag := range []string{"-H", "-v"} {
		if text := i.ok("id-ns", second, flag); !strings.Contains(text, "nmic    : 0x1\n  [0:0] : 0x1\tmay be shared by controllers\n") {
			t.Errorf("id-ns %s: %s", flag, text)
		}
	}
	if text := i.ok("get-feature", "ctrl0", "-f", "0x0f", "-H"); text != "get-feature:0x0f (Keep Alive Timer), Current value:0x00001388\n\tKeep Alive Timeout (KATO) in milliseconds: 5000\n" {
		t.Errorf("get-feature: %q", text)
	}
	if text := i.ok("get-feature", "ctrl0"); strings.Count(text, "get-feature:") != 5 {
		t.Errorf("all features: %s", text)
	}
	var regs map[string]*uint64
	if i.json(&regs, "show-regs", "ctrl0"); regs["csts"] == nil || *regs["csts"] != 1 || regs["asq"] != nil {
		t.Errorf("show-regs: %v", regs)
	}
	if text := i.ok("get-property", "ctrl0", "-O", "8", "-H"); text != "property: 0x08 (vs), value: 20100 (2.1)\n" {
		t.Errorf("get-property: %q", text)
	}
	i.ok("reset", "ctrl0")
	if s := i.status(); s.State != "live" || s.Losses != 1 || !strings.Contains(s.Reason, "reset") {
		t.Errorf("after a reset: %s, lost %d times: %s", s.State, s.Losses, s.Reason)
	}
	i.ok("ns-rescan", "ctrl0")
	if text := i.ok("list-subsys"); !strings.Contains(text, "subsys0 - NQN="+inspectedNQN) || !strings.Contains(text, "\n +- ctrl0 rdma traddr="+loopback()+",trsvcid=4420 live\n") {
		t.Errorf("list-subsys:\n%s", text)
	}
	var topology []struct {
		Subsystems []struct{ Namespaces []struct{ NSID int } }
	}
	if i.json(&topology, "show-topology", second); len(topology) != 1 || len(topology[0].Subsystems[0].Namespaces) != 2 {
		t.Errorf("show-topology: %+v", topology)
	}
}

// TestInspectNames: a controller has several names, and an error says what is wrong with
// others.
func TestInspectNames(t *testing.T) {
	i := newInspected(t, "--namespace", "ram=8MiB", "--namespace", "ram=8MiB,nsid=7")
	defer i.close()
	s := i.status()
	_, socket, _ := strings.Cut(s.Devices[0].Device, "socket=")
	for _, name := range []string{"ctrl0", inspectedNQN, s.Devices[0].Device, socket} {
		if text := i.ok("list-ns", name); !strings.Contains(text, "0x7") {
			t.Errorf("%s: %s", name, text)
		}
	}
	i.refuse(exit.NotFound, "id-ctrl: ublkb99: no running server has it", "id-ctrl", "ublkb99")
	i.refuse(exit.NotFound, "list-subsys: nqn.none: no server has it", "list-subsys", "nqn.none")
	i.refuse(exit.Usage, `id-ns: -n/--namespace-id: no value is given; want one of 1, 7`, "id-ns", inspectedNQN)
	i.refuse(exit.Usage, `id-ns: -n/--namespace-id "x": want a number, 0 to 4294967295`, "id-ns", "ctrl0", "-n", "x")
	i.refuse(exit.Usage, `get-log: -i/--log-id: no value is given`, "get-log", "ctrl0", "-l", "4")
	i.refuse(exit.Usage, `get-log: -i/--log-id "300": want a number, 0 to 255`, "get-log", "ctrl0", "-i", "300", "-l", "4")
	i.refuse(exit.Usage, `get-log: length 6 of the log page: want a multiple of 4`, "get-log", "ctrl0", "-i", "2", "-l", "6")
	i.refuse(exit.Usage, `get-log: -L/--lpo "2": want a multiple of 4`, "get-log", "ctrl0", "-i", "2", "-l", "4", "-L", "2")
	i.refuse(exit.Usage, `get-feature: -s/--sel "4": want 0`, "get-feature", "ctrl0", "-s", "4")
	i.refuse(exit.Usage, `get-feature: -l/--data-len "5000": want 0 to 4096`, "get-feature", "ctrl0", "-l", "5000")
	i.refuse(exit.Usage, "", "id-ctrl")
	i.refuse(exit.Negotiation, "id-ns: identify: the target answered: nvme status 00bh: invalid namespace", "id-ns", "ctrl0", "-n", "0xffffffff")
}

// TestInspectNobody asks servers that do not answer.
func TestInspectNobody(t *testing.T) {
	dir := runDir(t)
	dead, kill := startProcess(t)
	kill()
	record(t, dir, "nqn.dead", dead, state.Device{ID: 3, NSID: 1})
	silent := record(t, dir, "nqn.silent", state.Process{}) // no socket
	for range 2 {
		record(t, dir, "nqn.twice", state.Process{})
	}
	for args, want := range map[string]struct {
		code exit.Code
		text string
	}{
		"id-ctrl ublkb3":    {exit.NotFound, "id-ctrl: ublkb3: its server, ctrl0, has died; recover starts another one"},
		"id-ctrl nqn.twice": {exit.Usage, "id-ctrl: nqn.twice: several servers have it; want one of ctrl2, ctrl3"},
		"reset nqn.silent":  {exit.Other, "reset: the server does not run any more, or not yet: dial unix " + silent.Socket()},
	} {
		stdout, stderr, code := program(t, append(strings.Fields(args), "--run-dir", dir)...)
		if code != want.code || stdout != "" || !strings.Contains(stderr, want.text) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit code %d, %q %q", args, code, stdout, stderr)
		}
	}
}

// TestLongANALog reads an ANA log in more than one piece.
func TestLongANALog(t *testing.T) {
	var many []string
	for range 1024 {
		many = append(many, "--namespace", "ram=1MiB")
	}
	i := newInspected(t, many...)
	defer i.close()
	var ana struct {
		Groups []struct{ NSIDS []struct{ NSID int } } `json:"ANA DESC LIST "`
	}
	if i.json(&ana, "ana-log", "ctrl0"); len(ana.Groups) != 1 || len(ana.Groups[0].NSIDS) != 1024 || ana.Groups[0].NSIDS[1023].NSID != 1024 {
		t.Errorf("%d groups", len(ana.Groups))
	}
	var list struct {
		NSIDs []any `json:"nsid_list"`
	}
	if i.json(&list, "list-ns", "ctrl0"); len(list.NSIDs) != 1024 {
		t.Errorf("list-ns: %d", len(list.NSIDs))
	}
}

func TestHostNQN(t *testing.T) {
	if stdout, stderr, code := program(t, "show-hostnqn"); code != exit.OK || stdout != os.Getenv("LIBNVME_HOSTNQN")+"\n" || stderr != "" {
		t.Errorf("show-hostnqn: exit code %d, %q %q", code, stdout, stderr)
	}
	if stdout, _, code := program(t, "gen-hostnqn"); code != exit.OK || !strings.HasPrefix(stdout, "nqn.2014-08.org.nvmexpress:uuid:") {
		t.Errorf("gen-hostnqn: exit code %d, %q", code, stdout)
	}
}

// TestIdempotent connects twice. With --idempotent the second time is a success as well, and
// the device is named in the file.
func TestIdempotent(t *testing.T) {
	i := newInspected(t, "--namespace", "ram=8MiB", "--namespace", "ram=8MiB,nsid=7")
	defer i.close()
	device := i.status().Devices[0].Device
	file := filepath.Join(t.TempDir(), "devid")
	again := []string{"connect", "-a", loopback(), "-n", inspectedNQN, "--provider", "roce", "--devid-file", file}
	i.refuse(exit.AlreadyServed, "ctrl0", again...)
	if _, err := os.Stat(file); err == nil {
		t.Error("a device is named that was not connected")
	}
	for _, more := range [][]string{{}, {"--foreground"}} {
		os.Remove(file)
		var c struct{ Device, Controller string }
		i.json(&c, append(append(again, "--idempotent"), more...)...)
		text, err := os.ReadFile(file)
		if err != nil || string(text) != device+"\n" || c.Device != device || c.Controller != "ctrl0" {
			t.Errorf("%q: file %q, %v; %+v", more, text, err, c)
		}
	}
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	i.refuse(exit.Other, inspectedNQN+" is connected all the same", append(slices.Clone(again[:len(again)-1]), pipe, "--idempotent")...) // nobody reads it
	if s := i.status(); s.PID == 0 || s.State != "live" {
		t.Errorf("%+v", s)
	}
	// Another connection is made as usual, and is its owner's.
	if _, errs, code := i.run("connect", "-a", loopback(), "-n", inspectedNQN, "-i", "1", "--provider", "roce", "--frontend", "nbd-socket", "--namespace", "1",
		"-q", "nqn.other", "-f", "lo", "--idempotent", "--devid-file", file, "--owner", "csi", "--context", "test", "--fast_io_fail_tmo=3"); code != exit.OK || !strings.Contains(errs, "which gets devices of its own") {
		t.Fatalf("exit code %d, %s", code, errs)
	}
	var l struct{ Controllers []control.Status }
	i.json(&l, "list")
	if len(l.Controllers) != 2 {
		t.Fatalf("%d servers", len(l.Controllers))
	}
	other := l.Controllers[1]
	text, err := os.ReadFile(file)
	if err != nil || string(text) != other.Devices[0].Device+"\n" || other.Owner != "csi" || other.Context != "test" || other.FastFail != 3 || other.HostIface != "lo" || other.HostTrAddr != "127.0.0.1" {
		t.Errorf("file %q, %v; %+v", text, err, other)
	}
	i.ok("disconnect", "-d", strings.TrimSpace(string(text)))
}

// TestReservationVerbs: of two hosts, one reserves a namespace, and the other takes it over.
func TestReservationVerbs(t *testing.T) {
	i := newInspected(t, "--namespace", "ram=8MiB", "--namespace", "ram=8MiB,nsid=7")
	defer i.close()
	if _, errs, code := i.run("connect", "-a", loopback(), "-n", inspectedNQN, "-i", "1", "--provider", "roce", "--frontend", "nbd-socket", "--namespace", "7",
		"-q", "nqn.other", "-I", "11111111-2222-3333-4444-555555555555"); code != exit.OK {
		t.Fatal(errs)
	}
	type report struct {
		RType, RegCtl int
		RegCtlExt     []struct {
			RCSTS, RKey int
			HostID      string
		}
	}
	see := func(kind int, keys ...int) {
		t.Helper()
		var r report
		i.json(&r, "resv-report", "ctrl1")
		if r.RType != kind || r.RegCtl != len(keys) || len(r.RegCtlExt) != len(keys) {
			t.Fatalf("%+v, want type %d, keys %v", r, kind, keys)
		}
		for n, key := range keys {
			if r.RegCtlExt[n].RKey != key {
				t.Fatalf("%+v, want type %d, keys %v", r, kind, keys)
			}
		}
	}
	see(0)
	if text := i.ok("resv-register", "ctrl0", "-n", "7", "-k", "0xa1"); text != "NVME Reservation  success\n" {
		t.Errorf("%q", text)
	}
	i.ok("resv-register", "ctrl1", "--nrkey", "0xb2")
	i.ok("resv-acquire", "ctrl0", "-n", "7", "-c", "0xa1", "-t", "1")
	see(1, 0xa1, 0xb2)
	i.refuse(exit.Negotiation, "resv-acquire: reservation acquire: the target answered: nvme status 083h: reservation conflict", "resv-acquire", "ctrl1", "-c", "0xb2", "-t", "1")
	i.ok("resv-acquire", "ctrl1", "-c", "0xb2", "-p", "0xa1", "-a", "2", "-t", "2")
	see(2, 0xb2)
	i.ok("resv-release", "ctrl1", "-c", "0xb2", "-t", "2")
	see(0, 0xb2)
	i.ok("resv-register", "ctrl1", "-c", "0xb2", "-r", "1")
	see(0)
	i.refuse(exit.Usage, `resv-acquire: -t/--rtype "0": want 1 to 6`, "resv-acquire", "ctrl1")
	i.refuse(exit.Usage, `resv-register: -r/--rrega "3": want 0 to 2`, "resv-register", "ctrl1", "-r", "3")
	i.refuse(exit.Usage, `resv-report: -d/--numd "5": want 6 to 1024`, "resv-report", "ctrl1", "-d", "5")
	i.refuse(exit.NotFound, `resv-report: the server does not serve namespace 1`, "resv-report", "ctrl1", "-n", "1")
	i.refuse(exit.Negotiation, `resv-report: reservation report: the target answered: nvme status 018h`, "resv-report", "ctrl1", "--eds=false")
	i.ok("disconnect", "-d", "ctrl1")
}
