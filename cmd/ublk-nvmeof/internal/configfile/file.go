// Package configfile reads, changes and writes the configuration of nvme-cli 2 (config.json):
// hosts with their subsystems and the ports at which these are reached. It keeps everything
// in a file that it does not change.
package configfile

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode"

	"github.com/spf13/pflag"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
)

// File is the content of a configuration.
type File struct {
	root  any // what is written: hosts, or an object that has them
	hosts *array
}

// New returns a configuration without hosts.
func New() *File {
	hosts := &array{}
	return &File{hosts, hosts}
}

// Parse decodes a configuration: an array of hosts, or an object whose member hosts is one.
// An empty text is a configuration without hosts.
func Parse(text []byte) (*File, error) {
	if len(bytes.TrimSpace(text)) == 0 {
		return New(), nil
	}
	if err := CheckForm(text); err != nil {
		return nil, err
	}
	root, err := parse(text)
	if err != nil {
		return nil, err
	}
	f := &File{root: root}
	switch root := root.(type) {
	case *array:
		f.hosts = root
	case *object:
		if f.hosts, err = root.list("hosts"); err != nil {
			return nil, err
		}
	default:
		return nil, errors.New("want an array of hosts")
	}
	_, err = f.hosts.objects("host")
	return f, err
}

// FabricsConf is the configuration of nvme-cli 3, which its release candidates still change.
const FabricsConf = "/etc/nvme/nvme-fabrics.conf"

// ErrFabricsConf means that a text has the form of FabricsConf.
var ErrFabricsConf = errors.New("it has the form of nvme-cli 3's nvme-fabrics.conf, which is not supported; want that of nvme-cli 2")

// CheckForm returns ErrFabricsConf for a text of sections: its first line that is neither blank
// nor a comment is a name in brackets.
func CheckForm(text []byte) error {
	for line := range bytes.Lines(text) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' || line[0] == ';' {
			continue
		}
		if name, ok := bytes.CutPrefix(line, []byte("[")); ok && len(name) > 0 && unicode.IsLetter(rune(name[0])) && bytes.HasSuffix(name, []byte("]")) {
			return ErrFabricsConf
		}
		return nil
	}
	return nil
}

// Bytes encodes the configuration in the layout of nvme-cli.
func (f *File) Bytes() []byte {
	var b strings.Builder
	write(&b, f.root, "")
	b.WriteByte('\n')
	return []byte(b.String())
}

// Connection is a port of a subsystem, and the host that is connected to it.
type Connection struct {
	HostNQN, HostID, NQN string
	port                 []member
}

// keys are the members of a port that are flags of connect, in nvme-cli's order.
var keys = []string{
	"transport", "traddr", "host_traddr", "host_iface", "trsvcid", "nr_io_queues", "nr_write_queues", "nr_poll_queues", "queue_size",
	"keep_alive_tmo", "reconnect_delay", "ctrl_loss_tmo", "fast_io_fail_tmo", "tos", "duplicate_connect", "disable_sqflow",
}

// textKeys are those whose values are strings.
var textKeys = map[string]bool{"transport": true, "traddr": true, "host_traddr": true, "host_iface": true, "trsvcid": true}

// Connect describes the connection that flags of connect make, as one port for each path. Flags
// that nvme-cli does not have are left out.
func Connect(args []string) ([]Connection, error) {
	o := options.Default()
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	o.AddFlags(f)
	if err := f.Parse(args); err != nil {
		return nil, options.FlagError(err)
	}
	all := []Connection{connection(f, f.Lookup("hostid").Value.String(), o.HostNQN, o.NQN)}
	for _, p := range o.Paths {
		further, err := Connect(options.WithPaths(args, []options.Path{p})) // which has no further one
		if err != nil {
			return nil, err
		}
		all = append(all, further...)
	}
	return all, nil
}

// Discovery describes the connection to a discovery service that stays, if persistent is set.
func Discovery(d *options.Discovery, persistent bool) Connection {
	c := connection(d.Flags(), d.Connect.HostID.String(), d.Connect.HostNQN, d.Connect.NQN)
	yes, _ := scalarOf(true) // can be encoded
	if persistent {
		c.port = append(c.port, member{"persistent", yes})
	}
	c.port = append(c.port, member{"discovery", yes})
	return c
}

func connection(f *pflag.FlagSet, hostID, hostNQN, nqn string) Connection {
	c := Connection{HostNQN: hostNQN, HostID: hostID, NQN: nqn}
	for _, key := range keys { // without those for authentication, whose flags do not tell them
		flag := f.Lookup(strings.ReplaceAll(key, "_", "-"))
		if key != "transport" && key != "trsvcid" && !flag.Changed {
			continue
		}
		value := flag.Value.String()
		text := scalar(value) // a number or a bool
		if textKeys[key] {
			text, _ = scalarOf(value) // can be encoded
		}
		c.port = append(c.port, member{key, text})
	}
	return c
}

// Set adds a connection. If there is one of the same host to the same address of the same
// subsystem, its members are replaced, and those that the connection lacks stay.
func (f *File) Set(c Connection) error {
	host, err := find(f.hosts, "host", func(h *object) bool {
		return h.text("hostnqn") == c.HostNQN && (h.text("hostid") == c.HostID || h.get("hostid") == nil)
	}, member{"hostnqn", c.HostNQN}, member{"hostid", c.HostID})
	if err != nil {
		return err
	}
	subsystems, err := host.list("subsystems")
	if err != nil {
		return err
	}
	subsystem, err := find(subsystems, "subsystem", func(s *object) bool { return s.text("nqn") == c.NQN }, member{"nqn", c.NQN})
	if err != nil {
		return err
	}
	ports, err := subsystem.list("ports")
	if err != nil {
		return err
	}
	own := &object{members: c.port}
	port, err := find(ports, "port", func(p *object) bool { return address(p) == address(own) })
	if err != nil {
		return err
	}
	for _, m := range c.port {
		port.set(m.key, m.value)
	}
	return nil
}

// address is what tells ports of a subsystem apart.
func address(p *object) [4]string {
	service := p.text("trsvcid")
	if service == "" {
		service = strconv.Itoa(options.DefaultPort)
	}
	return [4]string{p.text("transport"), p.text("traddr"), service, p.text("host_traddr")}
}

// find returns the object of an array that matches, or adds one with these members, whose
// values are strings.
func find(a *array, what string, match func(*object) bool, members ...member) (*object, error) {
	all, err := a.objects(what)
	if err != nil {
		return nil, err
	}
	for _, o := range all {
		if match(o) {
			return o, nil
		}
	}
	o := &object{}
	for _, m := range members {
		text, err := scalarOf(m.value)
		if err != nil {
			return nil, err
		}
		o.set(m.key, text)
	}
	a.values = append(a.values, o)
	return o, nil
}

// Read reads a file. A file that does not exist is a configuration without hosts.
func Read(path string) (*File, error) {
	text, err := options.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return New(), nil
	}
	if err != nil {
		return nil, err
	}
	f, err := Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// Write replaces a file as a whole. It keeps the mode of a file that exists; a new one can
// be read by everybody, like those of nvme-cli.
func (f *File) Write(path string) error {
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target // a link stays one
	}
	mode := fs.FileMode(0o644)
	info, err := os.Stat(path)
	switch {
	case err == nil && !info.Mode().IsRegular():
		return fmt.Errorf("%s: it is no regular file", path)
	case err == nil:
		mode = info.Mode().Perm()
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	temporary, err := os.CreateTemp(filepath.Dir(path), ".config-*")
	if err != nil {
		return err
	}
	_, err = temporary.Write(f.Bytes())
	err = errors.Join(err, temporary.Chmod(mode), temporary.Sync(), temporary.Close())
	if err == nil {
		err = os.Rename(temporary.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temporary.Name()))
	}
	return nil
}
