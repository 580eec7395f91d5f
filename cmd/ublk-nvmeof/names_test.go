package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/internal/testenv"
)

// A name with a comma is one name.
func TestDisconnectNamesWithCommas(t *testing.T) {
	dir := runDir(t)
	p, kill := startProcess(t)
	kill()
	const uri = "nbd+unix:///1?socket=/tmp/a,b"
	record(t, dir, "nqn.a,nqn.b", p)
	record(t, dir, "nqn.c", p, state.Device{Kind: state.NBDSocket, URI: uri, NSID: 1})
	record(t, dir, "nqn.a", state.Process{})
	stdout, stderr, code := program(t, "disconnect", "--run-dir", dir, "-n", "nqn.a,nqn.b", "-d", uri)
	if code != exit.OK || stdout != "NQN:nqn.a,nqn.b disconnected 1 controller(s)\nNQN:nqn.c disconnected 1 controller(s)\n" {
		t.Errorf("exit code %d, %q %q", code, stdout, stderr)
	}
}

// rude is a server that says what a terminal must not see.
type rude struct {
	control.Controlled // panics if it is used
	says               control.Status
}

const escape = "\x1b]0;owned\x07\r\nublk-nvmeof: all is well"

func (r rude) Status() control.Status { return r.says }

func (r rude) HandOver(context.Context, string) error { return nil }

func (r rude) Disconnect(context.Context, bool) error {
	return &exit.Error{Code: exit.Busy, Message: "busy" + escape}
}

// What a peer, a record or a command line says comes to a terminal as text: no
// control sequence, and no line of its own.
func TestNothingRawOnTheTerminal(t *testing.T) {
	dir := runDir(t)
	e := record(t, dir, "nqn.a"+escape, state.Process{}, state.Device{ID: 3, NSID: 1})
	l, err := control.Listen(e.Socket())
	if err != nil {
		t.Fatal(err)
	}
	s := control.NewServer(rude{says: control.Status{
		SchemaVersion: control.SchemaVersion, Name: "ctrl0", NQN: "nqn.a" + escape, Model: escape, Serial: escape, Firmware: escape, State: "live",
		Reason: escape, Devices: []control.Device{{Device: "ublkb3", UUID: escape}}, RDMADevice: escape, Provider: "x", ProviderReason: escape,
	}}, slog.New(slog.DiscardHandler))
	served := make(chan error, 1)
	go func(l net.Listener) { served <- s.Serve(l) }(l)
	defer func() {
		s.Close()
		testenv.Receive(t, served, "the end of the server")
	}()
	bad := record(t, dir, "nqn.bad", state.Process{})
	if err := os.WriteFile(filepath.Join(dir, bad.Name, "state.json"), []byte(escape), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"list"}, {"list", "-v"}, {"disconnect", "-n", "nqn.a" + escape}, {"disconnect", "-d", "ublkb3"}, {"disconnect", "-d", escape},
		{"recover", escape}, {"upgrade", escape}, {"connect", "-a", escape, "-n", "x"}, {"connect", escape}, {escape}, {"list", "--" + escape},
		{"target", "list", escape}, {"target", "-n", "nqn.x", "--namespace", "file=" + escape + ",nsid=0"},
	} {
		stdout, stderr, _ := program(t, append(args, "--run-dir", dir)...)
		for _, out := range []string{stdout, stderr} {
			if strings.ContainsAny(out, "\x1b\x07\r") || strings.Contains(out, "\nublk-nvmeof: all is well") {
				t.Errorf("%q: %q", args, out)
			}
		}
		if stdout+stderr == "" {
			t.Errorf("%q says nothing", args)
		}
	}
}

// The URI that connect prints of a socket leads to the socket, whatever its name.
func TestURIOfASocketWithAnyName(t *testing.T) {
	tmp := stickyDir(t)
	un := func(args ...string) (string, string, exit.Code) { return execAs(t, victim, tmp, args...) }
	if _, stderr, code := un("target", "--background", "-a", loopback(), "--provider", "roce", "-n", "nqn.a", "--namespace", "ram=1MiB"); code != exit.OK {
		t.Fatal(stderr)
	}
	defer un("target", "stop")
	defer un("disconnect", "--force", "-n", "nqn.a") // if it is not ended below
	path := filepath.Join(tmp, "a b&c=d+e%2Ff#g?h\"\n,ü")
	stdout, stderr, code := un("connect", "-a", loopback(), "-n", "nqn.a", "-i", "1", "--provider", "roce", "--nbd-socket", path)
	if code != exit.OK {
		t.Fatal(stderr)
	}
	_, text, _ := strings.Cut(strings.TrimSpace(stdout), ": ")
	uri, err := url.Parse(text)
	if err != nil || strings.ContainsAny(text, " \n\"") || !strings.HasPrefix(text, "nbd+unix:///1?socket=") {
		t.Fatalf("%q, %v", stdout, err)
	}
	got := uri.Query().Get("socket")
	c, err := net.Dial("unix", got)
	if err != nil || got != path {
		t.Fatalf("%q leads to %q: %v", text, got, err)
	}
	greeting := make([]byte, 8)
	if _, err := io.ReadFull(c, greeting); err != nil || string(greeting) != "NBDMAGIC" {
		t.Errorf("%q, %v", greeting, err)
	}
	c.Close()
	if out, _, code := un("disconnect", "-d", text); code != exit.OK || !strings.Contains(out, "disconnected 1 ") {
		t.Errorf("exit code %d, %s", code, out)
	}
}

// TestConfigurationForATerminal checks that what a configuration has and a terminal would obey is
// escaped where it is printed.
func TestConfigurationForATerminal(t *testing.T) {
	file := filepath.Join(t.TempDir(), "discovery.conf")
	if err := os.WriteFile(file, []byte("-t rdma -a 127.0.0.1 -q nqn.host:a\u009b31mb"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, errs, code := program(t, "config", "convert", file)
	if code != exit.OK || !strings.Contains(out, `"nqn.host:a\u009b31mb"`) {
		t.Errorf("exit code %d, %q %q", code, out, errs)
	}
}
