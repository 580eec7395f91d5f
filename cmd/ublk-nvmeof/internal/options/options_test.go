package options

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
)

// parse reads a command line as connect does.
func parse(t *testing.T, args ...string) (*Connect, *pflag.FlagSet, error) {
	t.Helper()
	c := Default()
	f := pflag.NewFlagSet("connect", pflag.ContinueOnError)
	c.AddFlags(f)
	if err := f.Parse(args); err != nil {
		return c, f, FlagError(err)
	}
	return c, f, nil
}

// Every flag with values that it must not accept. The message names the flag
// and the value and says what is accepted, in one line.
func TestWrongValues(t *testing.T) {
	long := strings.Repeat("x", 224)
	for _, tt := range []struct {
		flag   string // as in messages
		values []string
		want   string // what is accepted
	}{
		{"-t/--transport", []string{"tcp", "", "RDMA"}, "want rdma"},
		{"-a/--traddr", []string{"", "10.0.2.300", "1.2.3", "fe80::zz", "10.0.2.15:4420", "a b", "-x", "x..y", "host:1"},
			"want an IPv4 or IPv6 address (with %zone) or a host name"},
		{"-a/--traddr", []string{"0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255"}, "is not the address of a target; want an IPv4"},
		{"-s/--trsvcid", []string{"0", "65536", "-1", "x", "", "4420.0", "0x10"}, "want a port, 1 to 65535"},
		{"-n/--nqn", []string{"", long, "a\x00b", "\xff"}, "want the name of an I/O subsystem, 1 to 223 bytes"},
		{"-n/--nqn", []string{nvme.DiscoveryNQN}, "a discovery subsystem has no namespaces; want"},
		{"-w/--host-traddr", []string{"", "host", "10.0.2", "::", "224.0.0.1"}, "want an IPv4 or IPv6 address (with %zone) of this host"},
		{"--path", []string{manyPaths(16)}, "want at most 15 paths besides the first"},
		{"--path", []string{"", "host", "10.0.2.15,0", "10.0.2.15,x", "10.0.2.15,4420,x", "10.0.2.15,1,10.0.2.1,2", "10.0.2.15;"}, "want ADDRESS[,PORT[,HOST_TRADDR]] with numeric addresses"},
		{"--path", []string{"10.0.2.15,99999", "10.0.2.15,99999,10.0.2.1"}, `"99999" is no port, 1 to 65535; want ADDRESS`},
		{"--preferred", []string{"", "host", "0.0.0.0", "10.0.2.15,0", "10.0.2.15;10.0.3.15"}, "want ADDRESS[,PORT[,HOST_TRADDR]]"},
		{"--path", []string{"0.0.0.0", "10.0.2.15,4420,224.0.0.1", "10.0.2.15,4420,fe80::1"}, "; want ADDRESS[,PORT[,HOST_TRADDR]]"},
		{"--policy", []string{"", "numa", "rr"}, "want queue-depth, round-robin or preferred"},
		{"--fence", []string{"", "off"}, "want auto or none"},
		{"-f/--host-iface", []string{"", "a b", "\n"}, "want the name of a network interface"},
		{"--context", []string{"", strings.Repeat("x", 256), "a b"}, "want 1 to 255 printable characters"},
		{"--owner", []string{"", "\x1b"}, "want 1 to 255 printable characters"},
		{"-q/--hostnqn", []string{"", long}, "want a name of 1 to 223 bytes"},
		{"-S/--dhchap-secret", []string{"", "DHHC-1:", "none ", "DHHC-1:00:x:", "@"}, "want a key like DHHC-1:00:BASE64:, @FILE"},
		{"-C/--dhchap-ctrl-secret", []string{"DHHC-1:00:Jc/My1o0qtLCWRp+sHhAVafdfaS7YQOMYhk9zSmlatobqB8C:"}, "the checksum does not match the secret, so a character is wrong; want a key like"},
		{"-I/--hostid", []string{"", "x", "12345678-1234-1234-1234-123456789ab", "00000000-0000-0000-0000-000000000000"}, "want a UUID like"},
		{"-i/--nr-io-queues", []string{"0", "-1", "65536", "x", "", "1.5"}, "want a number, 1 to 65535"},
		{"-W/--nr-write-queues", []string{"-1", "65536", "x", ""}, "want a number, 0 to 65535"},
		{"-P/--nr-poll-queues", []string{"-1", "65536", "x", ""}, "want a number, 0 to 65535"},
		{"-Q/--queue-size", []string{"15", "1025", "0", "-1", "x", "128k", ""}, "want a number, 16 to 1024"},
		{"-k/--keep-alive-tmo", []string{"-1", "4294967", "x", "5s", ""}, "want seconds, 0 (which is 5) to 4294966"},
		{"-c/--reconnect-delay", []string{"0", "-1", "x", "10s", ""}, "want seconds, 1 or more"},
		{"-l/--ctrl-loss-tmo", []string{"x", "", "1.5", "off"}, "want seconds, or a negative number for no limit"},
		{"-F/--fast-io-fail-tmo", []string{"x", "", "1.5", "off"}, "want seconds, or a negative number for never"},
		{"-D/--duplicate-connect", []string{"maybe"}, "want true or false"},
		{"-T/--tos", []string{"-1", "256", "x", ""}, "want a number, 0 to 255"},
		{"-d/--disable-sqflow", []string{"2"}, "want true or false"},
		{"--max-io-size", []string{"", "x", "-4KiB", "4 parsecs", "1,024KiB"}, "want a size like 64KiB, 4KiB to 1MiB"},
		{"--max-io-size", []string{"0", "2MiB", "1GiB", "512"}, "bytes; want a size like 64KiB, 4KiB to 1MiB"},
		{"--max-io-size", []string{"128k", "1M", "5000"}, "is not a multiple of 4096; want a size"},
		{"--memory-limit", []string{"", "x", "0", "-1GiB", "2PiB"}, "want a size like 64MiB, up to 1PiB"},
		{"--poll-max-size", []string{"0", "511", "2MiB"}, "bytes; want a size like 64KiB, 512B to 1MiB"},
		{"--device-id", []string{"-1", "-2", "1048576", "x", "", "ublkb0"}, "want a number, 0 to 1048575"},
		{"--namespace", []string{"0", "4294967295", "x", "", "1,", "1,,2", "-1"}, "want namespace ids, 1 to 4294967294, several"},
		{"--provider", []string{"rxe", "", "tcp"}, "want auto, verbs or roce"},
		{"--on-crash", []string{"wait", ""}, "want requeue, fail or remove"},
		{"--frontend", []string{"", "vhost", "nbd,ublk"}, "want auto, ublk, nbd, nbd-socket or vhost-user-blk"},
		{"--nbd-socket", []string{"", "nbd.sock", "localhost", ":10809", "a:b", "a:0", "a:65536", "/" + strings.Repeat("x", 107)}, "want an absolute path of at most 107 bytes, or HOST:PORT"},
		{"--nbd-tls", []string{"", "certificates"}, "want an absolute path"},
		{"--vhost-socket", []string{"", "vm.sock", "h:1", "/{nsid}/s", "/" + strings.Repeat("x", 107), "/{nsid}" + strings.Repeat("x", 98)}, "want an absolute path of at most 107 bytes; {nsid} in"},
		{"--vhost-socket-mode", []string{"", "x", "888", "1777", "0060", "0460", "-1"}, "want an octal number up to 0777 that lets the owner read and write"},
		{"--shmem-socket", []string{"relative", "/{nsid}/socket"}, "want an absolute path of at most 107 bytes"},
		{"--zero-copy", []string{"2"}, "want true or false"},
		{"--vhost-socket-owner", []string{"", ":", "root:", "no such user", ":no such group", "-1"}, "want USER, USER:GROUP or :GROUP"},
		{"--metrics-listen", []string{"", "9471", "localhost", ":0", ":65536", ":http", "1.2.3:9471", "a b:9471", "[::1]", "::1:9471", "/run/x"},
			"want HOST:PORT, or :PORT for the loopback address"},
		{"--load-modules", []string{"always", ""}, "want auto or never"},
		{"--timeout", []string{"0", "-1", "x", "", "61m", "999ms"}, "want seconds, or a time like 1m30s, 1s to 1h0m0s"},
	} {
		name := tt.flag[strings.Index(tt.flag, "--")+2:]
		for _, value := range tt.values {
			_, _, err := parse(t, "--"+name+"="+value)
			if err == nil {
				t.Errorf("--%s=%q was accepted", name, value)
				continue
			}
			got := err.Error()
			quoted := " "
			if strings.HasSuffix(tt.flag, "-secret") { // whose values are not to be shown
				quoted = ":"
			}
			if !strings.HasPrefix(got, tt.flag+quoted) || !strings.Contains(got, tt.want) || strings.Contains(got, "\n") {
				t.Errorf("--%s=%q: message %q, want %s …%q", name, value, got, tt.flag, tt.want)
			}
		}
	}
}

// manyPaths returns the value of --path with n paths.
func manyPaths(n int) string {
	var all []string
	for i := range n {
		all = append(all, fmt.Sprintf("10.0.2.%d", i+1))
	}
	return strings.Join(all, ";")
}

// No flag is missing from TestWrongValues. TestForeignFlags has those of other transports.
func TestEveryFlagIsTested(t *testing.T) {
	src, err := os.ReadFile("options_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, f, _ := parse(t)
	f.VisitAll(func(flag *pflag.Flag) {
		if _, foreign := flag.Value.(foreignValue); !foreign && !strings.Contains(string(src), `{"`+flagName(flag)+`", []string{`) {
			t.Errorf("%s has no wrong values in TestWrongValues", flagName(flag))
		}
	})
}

func TestOtherUsageErrors(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--queue-size"}, "-Q/--queue-size: no value is given; want a number, 16 to 1024"},
		{[]string{"-a"}, "-a/--traddr: no value is given; want an IPv4"},
		{[]string{"--matching"}, "unknown flag: --matching"},
		{[]string{"-x"}, "unknown shorthand flag"},
	} {
		if _, _, err := parse(t, tt.args...); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v, want %q", tt.args, err, tt.want)
		}
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"-n", "nqn.a"}, "-a/--traddr: no value is given"},
		{[]string{"-a", "10.0.2.15"}, "-n/--nqn: no value is given"},
		{[]string{"-a", "10.0.2.15", "-n", "n", "-w", "fe80::1"}, `-w/--host-traddr "fe80::1": want an address of the family`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--device-id", "1048575", "--namespace", "1,2"}, `--device-id "1048575": want`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--nbd-socket", "/s", "--frontend", "nbd"}, `--nbd-socket "/s": want it with --frontend nbd-socket, not nbd`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--nbd-socket", "h:1", "--device-id", "1"}, `--device-id "1": a socket has no number`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--nbd-tls", "/t"}, `--nbd-tls "/t": want it with --frontend nbd-socket, not auto`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--vhost-socket", "/s"}, `--vhost-socket "/s": each namespace has a socket; want a path with {nsid} in it, or --namespace with one id`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--vhost-socket", "/s", "--namespace", "1,2"}, `--vhost-socket "/s": each namespace has a socket`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--vhost-socket", "/s", "--frontend", "nbd"}, `--vhost-socket "/s": want it with --frontend vhost-user-blk, not nbd`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--vhost-socket", "/s{nsid}", "--device-id", "1"}, `--device-id "1": a socket has no number`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--vhost-socket-mode", "660"}, `--vhost-socket-mode "0660": want it with --frontend vhost-user-blk, not auto`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--shmem-socket", "/run/s"}, `--shmem-socket "/run/s": each namespace has a socket; want a path with {nsid} in it, or --namespace with one id`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--shmem-socket", "/run/s{nsid}", "--frontend", "nbd"}, `--shmem-socket "/run/s{nsid}": want it with --frontend ublk, not nbd`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--zero-copy"}, `--zero-copy: want it with --frontend vhost-user-blk, not auto`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--vhost-socket-owner", "root"}, `--vhost-socket-owner "root": want it with --frontend vhost-user-blk, not auto`},
		{[]string{"-a", "10.0.2.15", "-n", "n", "--nbd-socket", "h:1", "--nbd-tls", "/nowhere"}, `--nbd-tls "/nowhere": open /nowhere/server-cert.pem: no such file`},
	} {
		c, _, err := parse(t, tt.args...)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Complete(nobody); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v, want %q", tt.args, err, tt.want)
		}
	}
}

func TestShortAndLongFlags(t *testing.T) {
	want := Default()
	want.Address, want.NQN, want.Port = "fe80::1%eth0", "nqn.x", 4421
	want.SourceAddr = netip.MustParseAddr("fe80::2")
	want.HostNQN, want.hostID = "nqn.h", "12345678-1234-1234-1234-123456789abc"
	want.Queues = poller.Request{IO: 2, Write: 1, Poll: 3}
	want.QueueSize, want.KeepAlive, want.Reconnect, want.Loss, want.FastIOFail = 16, 7*time.Second, 3*time.Second, -1*time.Second, 2*time.Second
	want.Duplicate, want.TOS, want.DisableSQFlow = true, 46, true
	for _, args := range [][]string{
		{"-t", "rdma", "-a", "fe80::1%eth0", "-s", "4421", "-n", "nqn.x", "-w", "fe80::2", "-q", "nqn.h",
			"-I", "12345678-1234-1234-1234-123456789abc", "-i", "2", "-W", "1", "-P", "3", "-Q", "16", "-k", "7",
			"-c", "3", "-l", "-1", "-F", "2", "-D", "-T", "46", "-d"},
		{"--transport=rdma", "--traddr=fe80::1%eth0", "--trsvcid=4421", "--nqn=nqn.x", "--host-traddr=fe80::2", "--hostnqn=nqn.h",
			"--hostid=12345678-1234-1234-1234-123456789abc", "--nr-io-queues=2", "--nr-write-queues=1", "--nr-poll-queues=3",
			"--queue-size=16", "--keep-alive-tmo=7", "--reconnect-delay=3", "--ctrl-loss-tmo=-1", "--fast-io-fail-tmo=2", "--duplicate-connect",
			"--tos=46", "--disable-sqflow"},
	} {
		got, _, err := parse(t, args...)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q:\ngot  %+v\nwant %+v", args, got, want)
		}
	}
}

// The defaults are those of nvme-rdma.
func TestDefaults(t *testing.T) {
	c, _, err := parse(t, "-a", "target-1.example", "-n", "n", "-k", "0", "-l", "-7", "-F", "-3")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Complete(nobody); err != nil {
		t.Fatal(err)
	}
	if c.Port != 4420 || c.QueueSize != 128 || c.KeepAlive != 5*time.Second || c.Reconnect != 10*time.Second ||
		c.Loss != Forever || c.FastIOFail != Off || c.Queues != (poller.Request{IO: runtime.NumCPU()}) || c.MaxIO != 256<<10 ||
		c.PollMax != 16<<10 || c.Device != AutoDevice || c.Transport != "rdma" || c.TOS != 0 {
		t.Errorf("%+v", c)
	}
	if d := Default(); d.Loss != 600*time.Second {
		t.Errorf("ctrl-loss-tmo %v", d.Loss)
	}
}

// What Args writes reads the same, so that a server can be started with it.
func TestArgs(t *testing.T) {
	want, f, err := parse(t, "-a", "10.0.2.15", "-n", "nqn.with space,comma", "-i3", "-D", "-l", "-1", "--max-io-size", "1MiB",
		"--poll-max-size", "6001", "--namespace", "3,1", "--namespace", "7", "--timeout", "90", "-T0", "--device-id=4", "-w", "10.0.2.1")
	if err != nil {
		t.Fatal(err)
	}
	args := Args(f)
	got, _, err := parse(t, args...)
	if err != nil {
		t.Fatalf("%q: %v", args, err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%q:\ngot  %+v\nwant %+v", args, got, want)
	}
	if !slices.Equal(got.NSIDs, []uint32{3, 1, 7}) || got.PollMax != 6001 || got.Timeout != 90*time.Second {
		t.Errorf("%+v", got)
	}
}

func TestResolve(t *testing.T) {
	for address, want := range map[string]string{
		"10.0.2.15":        "10.0.2.15:4420",
		"::ffff:10.0.2.15": "10.0.2.15:4420",
		"fe80::1%eth0":     "[fe80::1%eth0]:4420",
	} {
		c := Default()
		c.Address = address
		got, err := c.Resolve(context.Background())
		if err != nil || len(got) != 1 || got[0].String() != want || c.Named() {
			t.Errorf("%s: %v, %v, want %s", address, got, err, want)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	c := Default()
	c.Address = "name.invalid"
	if !c.Named() || c.Peer() != "name.invalid:4420" {
		t.Errorf("%t %s", c.Named(), c.Peer())
	}
	if got, err := c.Resolve(ctx); err == nil {
		t.Errorf("an unknown name resolves to %v", got)
	}
}

// TestHostIface finds the source address of an interface.
func TestHostIface(t *testing.T) {
	for _, tt := range []struct{ args, source, want string }{
		{"-a 127.0.0.2 -f lo", "127.0.0.1", ""},
		{"-a localhost -f lo", "127.0.0.1", ""},
		{"-a 127.0.0.2 -f lo -w 127.0.0.1", "127.0.0.1", ""},
		{"-a 127.0.0.2 -f lo -w 127.0.0.9", "", `-f/--host-iface "lo": it does not have the address 127.0.0.9 of -w/--host-traddr, only [127.0.0.1`},
		{"-a fe80::1 -f lo", "", `-f/--host-iface "lo": none of its addresses [127.0.0.1`},
		{"-a 127.0.0.2 -f eth99", "", `-f/--host-iface "eth99": there is no such interface; want one of `},
	} {
		c, _, err := parse(t, append(strings.Fields(tt.args), "-n", "nqn.x")...)
		if err != nil {
			t.Fatal(err)
		}
		err = c.Complete(nobody)
		switch {
		case tt.want != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.want)):
			t.Errorf("%s: %v, want %s", tt.args, err, tt.want)
		case tt.want == "" && (err != nil || c.SourceAddr.String() != tt.source):
			t.Errorf("%s: %v, %v, want %s", tt.args, c.SourceAddr, err, tt.source)
		}
	}
}

// TestForeignFlags: flags of other transports are named as such, by any name that they have.
func TestForeignFlags(t *testing.T) {
	_, f, _ := parse(t)
	for _, o := range foreign {
		if f.Lookup(o.name) == nil {
			t.Errorf("%s is not defined", o.name)
		}
	}
	for _, args := range []string{"--tls", "--hdr-digest", "-g", "-G", "--data-digest", "--concat", "--tls-key=x", "--keyring=1", "--tls-key-identity=x"} {
		if _, _, err := parse(t, args); err == nil || !strings.Contains(err.Error(), ": only NVMe/TCP has this flag") {
			t.Errorf("%s: %v", args, err)
		}
	}
}

// TestMetricsAddress: without a host the loopback address is meant, never all addresses.
func TestMetricsAddress(t *testing.T) {
	for value, want := range map[string]string{":9471": "127.0.0.1:9471", "0.0.0.0:9471": "0.0.0.0:9471", "[::1]:1": "[::1]:1", "host:9471": "host:9471"} {
		c, _, err := parse(t, "--metrics-listen="+value)
		if err != nil || c.MetricsAddress() != want {
			t.Errorf("%s: %q, %v, want %q", value, c.MetricsAddress(), err, want)
		}
	}
	if got := Default().MetricsAddress(); got != "" {
		t.Errorf("by default metrics are served at %q", got)
	}
}

// TestVhostSocketOwner accepts names and numbers, and gives them again.
func TestVhostSocketOwner(t *testing.T) {
	for value, want := range map[string][2]int{"root": {0, -1}, "root:root": {0, 0}, ":root": {-1, 0}, "1000:50": {1000, 50}} {
		c, f, err := parse(t, "--vhost-socket-owner="+value)
		if err != nil || c.VhostOwner.UID != want[0] || c.VhostOwner.GID != want[1] {
			t.Errorf("%s: %+v, %v", value, c.VhostOwner, err)
		}
		if got := Args(f); len(got) != 1 || got[0] != "--vhost-socket-owner="+value {
			t.Errorf("%s: again %q", value, got)
		}
	}
}
