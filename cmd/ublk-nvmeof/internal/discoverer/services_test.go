package discoverer

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/configfile"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/identity"
)

// services runs Services with these files; an empty text is no file.
func services(t *testing.T, conf, config string, args ...string) (Found, error) {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if text != "" {
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return file
	}
	t.Setenv("LIBNVME_HOSTNQN", "nqn.this-host")
	t.Setenv("LIBNVME_HOSTID", "12345678-1234-1234-1234-123456789abc")
	before := confFile
	confFile = write("discovery.conf", conf)
	defer func() { confFile = before }()
	o := options.DefaultDiscovery()
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	o.AddFlags(f)
	if err := f.Parse(append([]string{"--config=" + write("config.json", config)}, args...)); err != nil {
		t.Fatal(err)
	}
	if err := o.Complete(identity.Sources{}); err != nil {
		t.Fatal(err)
	}
	return Services(o)
}

// summary is one line for each thing that was found.
func summary(f Found) string {
	var b strings.Builder
	name := func(from string) string { // without the directory, which is a new one each time
		for _, file := range []string{"discovery.conf", "config.json"} {
			if i := strings.Index(from, file); i >= 0 {
				return from[i:]
			}
		}
		return from
	}
	for _, group := range []struct {
		what string
		all  []Service
	}{{"discovery", f.Discovery}, {"subsystem", f.Subsystems}} {
		for _, s := range group.all {
			c := s.Options.Connect
			fmt.Fprintf(&b, "%s %s %s %s as %s, %d queues, persistent %t", name(s.From), group.what, c.Peer(), c.NQN, c.HostNQN, c.Queues.IO, s.Options.Persistent)
			if c.HostIface != "" {
				fmt.Fprintf(&b, ", on %s from %s", c.HostIface, c.SourceAddr)
			}
			b.WriteByte('\n')
		}
	}
	for _, err := range f.Skipped {
		fmt.Fprintf(&b, "skipped %s\n", name(err.Error()))
	}
	for _, err := range f.Errors {
		fmt.Fprintf(&b, "error %s\n", name(err.Error()))
	}
	return b.String()
}

const wellKnown = "nqn.2014-08.org.nvmexpress.discovery"

func TestServices(t *testing.T) {
	for _, c := range []struct {
		name, conf, config string
		args               []string
		want               string
	}{
		{"address", "-t rdma -a 10.0.0.9\n", "", []string{"-a", "10.0.0.1", "-i", "2"}, " discovery 10.0.0.1:4420 " + wellKnown + " as nqn.this-host, 2 queues, persistent false\n"},
		{"conf", `# a comment
	
  # another
-t rdma -a 10.0.0.1 -s 4421
--transport=rdma --traddr=10.0.0.2	--hostnqn=nqn.other -p
--transport=tcp --traddr=10.0.0.3 --host-iface=eth0
-t rdma
-t rdma -a 10.0.0.4 --nonsense
-t rdma -a 10.0.0.5 -i 9`, "", []string{"-i", "2"},
			"discovery.conf:4 discovery 10.0.0.1:4421 " + wellKnown + " as nqn.this-host, 2 queues, persistent false\n" +
				"discovery.conf:5 discovery 10.0.0.2:4420 " + wellKnown + " as nqn.other, 2 queues, persistent true\n" +
				"discovery.conf:9 discovery 10.0.0.5:4420 " + wellKnown + " as nqn.this-host, 9 queues, persistent false\n" +
				"skipped discovery.conf:6: skipped: transport tcp: not RDMA\n" +
				"error discovery.conf:7: -a/--traddr: no value is given; want the address of the target\n" +
				"error discovery.conf:8: unknown flag: --nonsense\n"},
		{"only comments", "# nothing\n", "", nil, ""},
		{"array", "", `[{"hostnqn": "nqn.h", "hostid": "12345678-1234-1234-1234-123456789abd", "subsystems": [
			{"nqn": "nqn.disk", "ports": [{"transport": "rdma", "traddr": "10.0.0.1", "trsvcid": "4421", "nr_io_queues": 3, "tos": -1, "duplicate_connect": true, "dhchap_key": "none"},
				{"transport": "tcp", "traddr": "10.0.0.2"}, {"transport": "rdma", "traddr": "10.0.0.3", "tls": true}, {"transport": "rdma"},
				{"transport": "rdma", "traddr": "10.0.0.4", "queue_size": 5}, {"transport": "rdma", "traddr": "10.0.0.5", "queue_size": [1]}]},
			{"nqn": "` + wellKnown + `", "ports": [{"transport": "rdma", "traddr": "10.0.0.6", "persistent": true}]},
			{"nqn": "nqn.unique", "ports": [{"transport": "rdma", "traddr": "10.0.0.7", "discovery": true}]}]},
			{"dhchap_key": "DHHC-1:xx", "subsystems": [{"nqn": "nqn.secret", "ports": [{"transport": "rdma", "traddr": "10.0.0.8"}]}]}]`, []string{"-i", "2"},
			"config.json: subsystem " + wellKnown + ": port 0 discovery 10.0.0.6:4420 " + wellKnown + " as nqn.h, 2 queues, persistent true\n" +
				"config.json: subsystem nqn.unique: port 0 discovery 10.0.0.7:4420 nqn.unique as nqn.h, 2 queues, persistent false\n" +
				"config.json: subsystem nqn.disk: port 0 subsystem 10.0.0.1:4421 nqn.disk as nqn.h, 3 queues, persistent false\n" +
				"skipped config.json: subsystem nqn.disk: port 1: skipped: transport tcp: not RDMA\n" +
				"error config.json: subsystem nqn.disk: port 2: tls: this is not supported\n" +
				"error config.json: subsystem nqn.disk: port 3: -a/--traddr: no value is given; want the address of the target\n" +
				"error config.json: subsystem nqn.disk: port 4: -Q/--queue-size \"5\": want a number, 16 to 1024\n" +
				"error config.json: subsystem nqn.disk: port 5: queue_size: want a text, a number, true or false\n" +
				"error config.json: subsystem nqn.secret: port 0: -S/--dhchap-secret: key: want DHHC-1:hh:BASE64: with hh 00 to 03; want a key like DHHC-1:00:BASE64:, @FILE for a file that contains one, or none\n"},
		{"interface", "", `[{"subsystems": [{"nqn": "nqn.disk", "ports": [{"transport": "rdma", "traddr": "10.0.0.2", "host_iface": "lo"},
				{"transport": "rdma", "traddr": "10.0.0.3", "host_iface": "none"}, {"transport": "rdma", "traddr": "fe80::1", "host_iface": "a b"}]}]}]`, []string{"-i", "2"},
			"config.json: subsystem nqn.disk: port 0 subsystem 10.0.0.2:4420 nqn.disk as nqn.this-host, 2 queues, persistent false, on lo from 127.0.0.1\n" +
				"config.json: subsystem nqn.disk: port 1 subsystem 10.0.0.3:4420 nqn.disk as nqn.this-host, 2 queues, persistent false\n" +
				"error config.json: subsystem nqn.disk: port 2: -f/--host-iface \"a b\": want the name of a network interface\n"},
		{"object", "", `{"hosts": [{"subsystems": [{"nqn": "nqn.disk", "ports": [{"transport": "rdma", "traddr": "fd00::1"}]}]}]}`, []string{"-i", "2"},
			"config.json: subsystem nqn.disk: port 0 subsystem [fd00::1]:4420 nqn.disk as nqn.this-host, 2 queues, persistent false\n"},
		{"both", "-t rdma -a 10.0.0.1 -i 2", `[{"subsystems": [{"nqn": "nqn.disk", "ports": [{"transport": "rdma", "traddr": "10.0.0.2", "nr_io_queues": "3"}]}]}]`, nil,
			"discovery.conf:1 discovery 10.0.0.1:4420 " + wellKnown + " as nqn.this-host, 2 queues, persistent false\n" +
				"config.json: subsystem nqn.disk: port 0 subsystem 10.0.0.2:4420 nqn.disk as nqn.this-host, 3 queues, persistent false\n"},
		{"bad JSON", "# no service\n", "[{", nil, "error config.json: unexpected end of JSON input\n"},
		{"form of nvme-cli 3", "[Discovery Controller]\ncontroller = transport=rdma;traddr=10.0.0.1\n", "# a comment\n\n[Host]\nhostnqn = nqn.x\n", nil,
			"error config.json: it has the form of nvme-cli 3's nvme-fabrics.conf, which is not supported; want that of nvme-cli 2\n" +
				"error discovery.conf: it has the form of nvme-cli 3's nvme-fabrics.conf, which is not supported; want that of nvme-cli 2\n"},
		{"bad type", "", `[{"hostnqn": 7}]`, nil, "error config.json: json: cannot unmarshal number into Go struct field jsonHost.hostnqn of type string\n"},
	} {
		found, err := services(t, c.conf, c.config, c.args...)
		if got := summary(found); err != nil || got != c.want {
			t.Errorf("%s: %v\n%s\nwant\n%s", c.name, err, got, c.want)
		}
	}
	if _, err := services(t, "", ""); exit.Of(err) != exit.Usage || !strings.Contains(err.Error(), "no value is given, and there is no ") {
		t.Errorf("without anything: %v", err)
	}
}

// TestFabricsConf: a user of nvme-cli 3 is told that its configuration is not read.
func TestFabricsConf(t *testing.T) {
	before := fabricsConf
	fabricsConf = filepath.Join(t.TempDir(), "nvme-fabrics.conf")
	defer func() { fabricsConf = before }()
	if err := os.WriteFile(fabricsConf, []byte("[Host]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := services(t, "", ""); exit.Of(err) != exit.Usage || !strings.Contains(err.Error(), fabricsConf+": "+configfile.ErrFabricsConf.Error()) {
		t.Error(err)
	}
}

// FuzzFiles: no file makes Services panic.
func FuzzFiles(f *testing.F) {
	f.Add("-t rdma -a 10.0.0.1", `[{"subsystems": [{"nqn": "x", "ports": [{"traddr": "10.0.0.1"}]}]}]`)
	f.Fuzz(func(t *testing.T, conf, config string) {
		o := options.DefaultDiscovery()
		var found Found
		_ = readConf(&found, o, "discovery.conf", []byte(conf))
		_ = readJSON(&found, o, "config.json", []byte(config))
		for _, s := range append(found.Discovery, found.Subsystems...) {
			if s.Options.Connect.Address == "" || s.Options.Connect.NQN == "" {
				t.Fatalf("%+v", s.Options.Connect)
			}
		}
	})
}
