package options

import (
	"errors"
	"io/fs"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"ublk-nvmeof/identity"
	"ublk-nvmeof/nvme"
)

// nobody is a host without files or environment.
var nobody = identity.Sources{
	LookupEnv: func(string) (string, bool) { return "", false },
	ReadFile:  func(string) ([]byte, error) { return nil, fs.ErrNotExist },
	NewUUID:   func() nvme.UUID { return nvme.UUID{1} },
	Keep:      func(text string) (string, string, error) { return "kept", text, nil },
}

func parseDiscovery(t *testing.T, add func(*Discovery, *pflag.FlagSet), args ...string) (*Discovery, error) {
	t.Helper()
	d := DefaultDiscovery()
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	add(d, f)
	if err := f.Parse(args); err != nil {
		return nil, FlagError(err)
	}
	return d, d.Complete(nobody)
}

// TestDiscoveryInterface: an interface gives the source address when the target is known.
func TestDiscoveryInterface(t *testing.T) {
	d, err := parseDiscovery(t, (*Discovery).AddFlags, "-q", "nqn.host", "-f", "lo")
	if err != nil || d.Connect.SourceAddr.IsValid() {
		t.Fatalf("without a target: source %v, %v", d.Connect.SourceAddr, err)
	}
	local, err := d.With([]string{"-a", "127.0.0.2"}, nobody)
	if err != nil || local.Connect.SourceAddr.String() != "127.0.0.1" {
		t.Fatalf("source %v, %v", local.Connect.SourceAddr, err)
	}
	if args := local.ConnectArgs(netip.MustParseAddrPort("127.0.0.3:4420"), "x"); !slices.Contains(args, "--host-iface=lo") {
		t.Errorf("args %q", args)
	}
}

func TestDiscoveryFlags(t *testing.T) {
	d, err := parseDiscovery(t, (*Discovery).AddFlags, "-t", "rdma", "-a", "10.0.0.1", "-q", "nqn.host", "-I", "12345678-1234-1234-1234-123456789abc",
		"-i", "3", "-J", "none", "-p", "--quiet")
	if err != nil {
		t.Fatal(err)
	}
	if d.Connect.Address != "10.0.0.1" || d.Connect.Port != 4420 || d.Connect.NQN != nvme.DiscoveryNQN || d.Config != NoConfig || !d.Persistent || !d.Quiet {
		t.Errorf("%+v", d)
	}
	if d.KeepAlive() != PersistentKeepAlive {
		t.Errorf("keep alive %v", d.KeepAlive())
	}
	got := d.ConnectArgs(netip.MustParseAddrPort("[fd00::1]:4421"), "nqn.disk")
	want := []string{"--traddr=fd00::1", "--trsvcid=4421", "--nqn=nqn.disk", "--hostnqn=nqn.host", "--hostid=12345678-1234-1234-1234-123456789abc", "--nr-io-queues=3"}
	if !slices.Equal(got, want) {
		t.Errorf("args %q", got)
	}

	// A line of a file: its target, its flags over those of the command line.
	line, err := d.With([]string{"-t", "rdma", "-a", "10.0.0.2", "-s", "8009", "-i", "7", "-k", "9"}, nobody)
	if err != nil || line.Connect.Address != "10.0.0.2" || line.Connect.Port != 8009 || line.Connect.Queues.IO != 7 ||
		line.Connect.HostNQN != "nqn.host" || line.KeepAlive() != 9*time.Second || !line.Persistent || !line.Quiet {
		t.Errorf("%+v, %v", line, err)
	}
	if args := line.ConnectArgs(netip.MustParseAddrPort("10.0.0.3:4420"), "x"); !slices.Contains(args, "--nr-io-queues=7") || slices.Contains(args, "--traddr=10.0.0.2") {
		t.Errorf("args %q", args)
	}
	if line, err := d.With(nil, nobody); err != nil || line.Connect.Address != "" {
		t.Errorf("the target is inherited: %+v, %v", line, err)
	}
	if _, err := d.With([]string{"-t", "tcp", "-a", "10.0.0.2"}, nobody); !errors.Is(err, ErrOtherTransport) {
		t.Errorf("tcp: %v", err)
	}
	for args, want := range map[string]string{"-i 0": "-i/--nr-io-queues \"0\": want", "-a x -x": "unknown shorthand flag", "word": "\"word\": want flags", "--device-id=3": "unknown flag: --device-id"} {
		if _, err := d.With(strings.Fields(args), nobody); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", args, err, want)
		}
	}
}

func TestDiscoverFlags(t *testing.T) {
	d, err := parseDiscovery(t, (*Discovery).AddDiscoverFlags, "-a", "10.0.0.1", "-i", "3")
	if err != nil || d.KeepAlive() != 0 {
		t.Errorf("%v, keep alive %v", err, d.KeepAlive())
	}
	for args, want := range map[string]string{
		"-r /tmp/x":    `-r/--raw "/tmp/x": this is not supported; want -o json`,
		"-p":           "-p/--persistent \"true\": this is not supported; want connect-all --persistent",
		"--config=":    `-J/--config "": want a path, or none`,
		"--nqn=":       "-n/--nqn",
		"-a 224.0.0.1": "multicast",
	} {
		if _, err := parseDiscovery(t, (*Discovery).AddDiscoverFlags, strings.Fields(args)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", args, err, want)
		}
	}
}

func TestParseReferral(t *testing.T) {
	for text, want := range map[string]string{
		"10.0.0.1": "10.0.0.1:4420", "10.0.0.1:8009": "10.0.0.1:8009", "fd00::1": "[fd00::1]:4420", "[fd00::1]": "[fd00::1]:4420",
		"[fd00::1]:8009": "[fd00::1]:8009", "::ffff:10.0.0.1": "10.0.0.1:4420",
	} {
		if got, err := ParseReferral(text); err != nil || got.String() != want {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "host", "host:1", "10.0.0.1:0", "10.0.0.1:65536", "0.0.0.0", "224.0.0.1", "[fe80::1%eth0]:4420", "255.255.255.255"} {
		if got, err := ParseReferral(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}
