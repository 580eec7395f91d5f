package discoverer

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/configfile"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/identity"
	"ublk-nvmeof/nvme"
)

// ConfFile names discovery services, one line of flags for each.
const ConfFile = "/etc/nvme/discovery.conf"

// These are the constants outside of tests.
var (
	confFile    = ConfFile
	fabricsConf = configfile.FabricsConf
)

// Service is a discovery service, or a subsystem, that flags or a file name.
type Service struct {
	From    string // the file, and where in it; empty: the command line
	Options *options.Discovery
}

// Error adds to an error where the service comes from.
func (s Service) Error(err error) error {
	if s.From == "" {
		return err
	}
	return fmt.Errorf("%s: %w", s.From, err)
}

// Found is what flags and files name.
type Found struct {
	Discovery  []Service // discovery services
	Subsystems []Service // subsystems at an address, whose NQN is known
	Skipped    []error   // what is not for this program, because it is not reached by RDMA
	Errors     []error   // what makes no sense
}

// Services returns what the flags name, or, without an address, what the configuration of
// nvme-cli and discovery.conf name. It is an error if there is neither a flag nor a file.
func Services(o *options.Discovery) (Found, error) {
	var found Found
	if o.Connect.Address != "" {
		found.Discovery = []Service{{Options: o}}
		return found, nil
	}
	var missing []string
	for _, source := range []struct {
		file string
		read func(*Found, *options.Discovery, string, []byte) error
	}{{o.Config, readJSON}, {confFile, readConf}} {
		if source.file == options.NoConfig {
			continue
		}
		text, err := options.ReadFile(source.file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			missing = append(missing, source.file)
			continue
		case err == nil:
			err = source.read(&found, o, source.file, text)
		}
		if err != nil {
			found.Errors = append(found.Errors, err)
		}
	}
	if _, err := os.Stat(confFile); errors.Is(err, fs.ErrNotExist) && len(found.Discovery)+len(found.Subsystems)+len(found.Skipped)+len(found.Errors) == 0 {
		hint := ""
		if _, err := os.Stat(fabricsConf); err == nil {
			hint = fmt.Sprintf(" (%s: %v)", fabricsConf, configfile.ErrFabricsConf)
		}
		return found, exit.Errorf(exit.Usage, "-a/--traddr: no value is given, and there is no %s; want the address of a discovery service%s", strings.Join(missing, " and no "), hint)
	}
	return found, nil
}

// ReadConf returns what a file like ConfFile names.
func ReadConf(o *options.Discovery, file string) (found Found, err error) {
	text, err := options.ReadFile(file)
	if err != nil {
		return found, err
	}
	return found, readConf(&found, o, file, text)
}

// add adds a service that a file names by flags.
func (f *Found) add(o *options.Discovery, from string, args []string, discovery bool) {
	with, err := o.With(args, identity.Sources{})
	if err == nil && with.Connect.Address == "" {
		err = errors.New("-a/--traddr: no value is given; want the address of the target")
	}
	s := Service{from, with}
	switch {
	case errors.Is(err, options.ErrOtherTransport):
		f.Skipped = append(f.Skipped, fmt.Errorf("%s: skipped: %w", from, err))
	case err != nil:
		f.Errors = append(f.Errors, exit.Errorf(exit.Usage, "%s: %v", from, err))
	case discovery:
		f.Discovery = append(f.Discovery, s)
	default:
		f.Subsystems = append(f.Subsystems, s)
	}
}

// readConf reads discovery.conf: in each line the flags of a discover command. A flag and
// its value are separated by a space or by "=".
func readConf(f *Found, o *options.Discovery, file string, text []byte) error {
	if err := configfile.CheckForm(text); err != nil {
		return exit.Errorf(exit.Usage, "%s: %v", file, err)
	}
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		f.add(o, fmt.Sprintf("%s:%d", file, n), words(line), true)
	}
	return nil
}

// words splits a line at spaces, and at the first "=" of each word. A key may have more.
func words(line string) (out []string) {
	for field := range strings.FieldsSeq(line) {
		name, value, _ := strings.Cut(field, "=")
		for _, word := range []string{name, value} {
			if word != "" {
				out = append(out, word)
			}
		}
	}
	return out
}

// jsonHost, jsonSubsystem and jsonPort are nvme-cli's configuration. Fields of jsonPort
// have the names of flags, with "_" for "-".
type jsonHost struct {
	HostNQN    string          `json:"hostnqn"`
	HostID     string          `json:"hostid"`
	DHCHAPKey  string          `json:"dhchap_key"`
	Persistent bool            `json:"persistent_discovery_ctrl"`
	Subsystems []jsonSubsystem `json:"subsystems"`
}

type jsonSubsystem struct {
	NQN         string     `json:"nqn"`
	Application string     `json:"application"`
	Ports       []jsonPort `json:"ports"`
}

type jsonPort map[string]any

// readJSON reads nvme-cli's configuration: an array of hosts, or an object with one.
func readJSON(f *Found, o *options.Discovery, file string, text []byte) error {
	hosts, err := parseJSON(text)
	if err != nil {
		return exit.Errorf(exit.Usage, "%s: %v", file, err)
	}
	for _, h := range hosts {
		for _, s := range h.Subsystems {
			for i, p := range s.Ports {
				from := fmt.Sprintf("%s: subsystem %s: port %d", file, s.NQN, i)
				args, discovery, err := p.flags(h, s)
				if err != nil {
					f.Errors = append(f.Errors, exit.Errorf(exit.Usage, "%s: %v", from, err))
					continue
				}
				f.add(o, from, args, discovery)
			}
		}
	}
	return nil
}

func parseJSON(text []byte) (hosts []jsonHost, err error) {
	text = bytes.TrimSpace(text)
	if len(text) == 0 {
		return nil, nil
	}
	if err := configfile.CheckForm(text); err != nil {
		return nil, err
	}
	if text[0] == '{' {
		var object struct {
			Hosts []jsonHost `json:"hosts"`
		}
		err = json.Unmarshal(text, &object)
		return object.Hosts, err
	}
	err = json.Unmarshal(text, &hosts)
	return hosts, err
}

// portFlags are the keys of a port that are flags of connect, and refusedKeys those that
// mean what this program does not have.
var (
	portFlags = []string{
		"transport", "traddr", "trsvcid", "host_traddr", "host_iface", "nr_io_queues", "nr_write_queues", "nr_poll_queues", "queue_size",
		"keep_alive_tmo", "reconnect_delay", "ctrl_loss_tmo", "fast_io_fail_tmo", "tos", "duplicate_connect", "disable_sqflow",
	}
	refusedKeys = []string{"hdr_digest", "data_digest", "tls", "tls_key", "keyring", "concat"}
)

// flags translates a port into flags of connect.
func (p jsonPort) flags(h jsonHost, s jsonSubsystem) (args []string, discovery bool, err error) {
	if transport, ok := p["transport"].(string); ok && transport != "rdma" {
		return []string{"--transport=" + transport}, false, nil // it is skipped, whatever else it has
	}
	for _, key := range refusedKeys {
		switch v := p[key].(type) {
		case nil:
		case bool:
			if v {
				return nil, false, fmt.Errorf("%s: this is not supported", key)
			}
		case string:
			if v != "" && v != "none" {
				return nil, false, fmt.Errorf("%s: this is not supported", key)
			}
		default:
			return nil, false, fmt.Errorf("%s: this is not supported", key)
		}
	}
	for flag, value := range map[string]string{"hostnqn": h.HostNQN, "hostid": h.HostID, "nqn": s.NQN} {
		if value != "" {
			args = append(args, "--"+flag+"="+value)
		}
	}
	if args, err = p.secrets(h, args); err != nil {
		return nil, false, err
	}
	for _, key := range portFlags {
		flag := "--" + strings.ReplaceAll(key, "_", "-")
		switch v := p[key].(type) {
		case nil:
		case string:
			if key == "host_iface" && (v == "" || v == "none") { // not set
				continue
			}
			args = append(args, flag+"="+v)
		case bool:
			args = append(args, fmt.Sprintf("%s=%t", flag, v))
		case float64:
			if key == "tos" && v < 0 { // not set
				continue
			}
			args = append(args, fmt.Sprintf("%s=%.0f", flag, v))
		default:
			return nil, false, fmt.Errorf("%s: want a text, a number, true or false", key)
		}
	}
	if on, _ := p["persistent"].(bool); on || h.Persistent {
		args = append(args, "--persistent")
	}
	discovery, _ = p["discovery"].(bool)
	return args, discovery || s.NQN == nvme.DiscoveryNQN, nil
}

// secrets adds the keys of a port, or of its host, to flags of connect.
func (p jsonPort) secrets(h jsonHost, args []string) ([]string, error) {
	for _, s := range []struct{ key, flag, inherited string }{
		{"dhchap_key", options.HostSecret, h.DHCHAPKey}, {"dhchap_ctrl_key", options.ControllerSecret, ""},
	} {
		text, ok := p[s.key].(string)
		if !ok && p[s.key] != nil {
			return nil, fmt.Errorf("%s: want a text", s.key)
		}
		if text == "" || text == options.NoSecret { // what nvme-cli writes if there is none
			text = s.inherited
		}
		if text != "" {
			args = append(args, "--"+s.flag+"="+text)
		}
	}
	return args, nil
}
