package options

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/pflag"

	"ublk-nvmeof/identity"
	"ublk-nvmeof/nvme"
)

// ErrOtherTransport is a target that is reached by another transport than RDMA.
var ErrOtherTransport = errors.New("not RDMA")

// PersistentKeepAlive is the keep alive timeout of a connection to a discovery service that
// is kept, as in nvme-cli.
const PersistentKeepAlive = 30 * time.Second

// Discovery holds the flags of discover and connect-all: a discovery service, and how to
// connect to what it lists.
type Discovery struct {
	// Connect has the address and the NQN of the service. The rest is for the service and
	// for the subsystems. Without an address, files name the services.
	Connect    *Connect
	Config     string // config.json to read
	Persistent bool
	Quiet      bool // say nothing about subsystems that are connected already

	flags *pflag.FlagSet // of Connect
}

// DefaultConfig is where nvme-cli keeps its configuration.
const DefaultConfig = "/etc/nvme/config.json"

// NoConfig is a Discovery.Config that means no file.
const NoConfig = "none"

// DefaultDiscovery returns the values of all flags that are not given.
func DefaultDiscovery() *Discovery {
	d := &Discovery{Connect: Default(), Config: DefaultConfig}
	d.Connect.NQN = nvme.DiscoveryNQN
	d.flags = pflag.NewFlagSet("", pflag.ContinueOnError)
	d.flags.SortFlags = false
	d.Connect.addTarget(d.flags, "(default: the services that /etc/nvme/discovery.conf and the configuration name)")
	d.flags.VarP(text(&d.Connect.NQN, "nqn", "the name of a discovery subsystem, 1 to 223 bytes", nvme.ValidateNQN),
		"nqn", "n", "NQN of the discovery subsystem")
	d.Connect.addHost(d.flags)
	d.Connect.addConnection(d.flags)
	d.Connect.addProvider(d.flags)
	return d
}

// AddFlags defines the flags of connect-all.
func (d *Discovery) AddFlags(f *pflag.FlagSet) {
	d.addCommon(f)
	f.BoolVarP(&d.Persistent, "persistent", "p", false, "stay connected to the discovery services, and connect what they list later")
	d.Connect.addMetrics(f, "all servers of the run directory, served by the process of --persistent")
	f.BoolVar(&d.Quiet, "quiet", false, "say nothing about subsystems that are connected already")
}

// AddDiscoverFlags defines the flags of discover. Those that only matter to connect-all are
// accepted, as in nvme-cli, and not shown.
func (d *Discovery) AddDiscoverFlags(f *pflag.FlagSet) {
	d.addCommon(f)
	var connection pflag.FlagSet
	Default().addConnection(&connection)
	connection.VisitAll(func(flag *pflag.Flag) {
		if !slices.Contains([]string{"keep-alive-tmo", "tos"}, flag.Name) {
			f.Lookup(flag.Name).Hidden = true
		}
	})
	f.VarPF(&refused[bool]{want: "connect-all --persistent, which stays and connects what appears"},
		"persistent", "p", "").NoOptDefVal = "true"
	f.VarP(&refused[string]{want: "-o json, which has all fields"}, "raw", "r", "")
	for _, name := range []string{"persistent", "raw"} {
		f.Lookup(name).Hidden = true
	}
	f.Lookup("keep-alive-tmo").Usage, f.Lookup("keep-alive-tmo").DefValue = "keep alive timeout (default: none, because the connection does not last)", ""
}

func (d *Discovery) addCommon(f *pflag.FlagSet) {
	f.SortFlags = false
	f.AddFlagSet(d.flags)
	f.VarP(text(&d.Config, "file", "a path, or "+NoConfig, func(s string) error {
		if s == "" {
			return errUnwanted
		}
		return nil
	}), "config", "J", "configuration of nvme-cli to read if no address is given; "+NoConfig+" for no file")
}

// refused is a flag of nvme-cli that is not supported. Its error says what to use instead.
type refused[T any] struct{ want string }

func (r *refused[T]) String() string   { return "" }
func (r *refused[T]) Type() string     { return fmt.Sprintf("%T", *new(T)) }
func (r *refused[T]) Want() string     { return r.want }
func (r *refused[T]) Set(string) error { return &rejected{r.want, errors.New("this is not supported")} }

// Complete checks the flags in combination and finds the identity of the host. It is
// called once, after the flags are parsed.
func (d *Discovery) Complete(from identity.Sources) error {
	if d.Connect.Metrics != "" && !d.Persistent {
		return fmt.Errorf("--metrics-listen %q: want it with --persistent, whose process shows the metrics of all servers; connect --metrics-listen is for one", d.Connect.Metrics)
	}
	return d.Connect.CompleteHost(from)
}

// Flags returns the flags of the service and of the connections.
func (d *Discovery) Flags() *pflag.FlagSet { return d.flags }

// KeepAlive returns the keep alive timeout of a connection to a discovery service: the one
// that was asked for, or else what is usual; 0 for a connection that is not kept.
func (d *Discovery) KeepAlive() time.Duration {
	switch {
	case d.flags.Changed("keep-alive-tmo"):
		return d.Connect.KeepAlive
	case d.Persistent:
		return PersistentKeepAlive
	}
	return 0
}

// The flags that tell what to connect to, which differ for each subsystem.
var targetFlags = []string{"transport", "traddr", "trsvcid", "nqn"}

// With returns the flags of d, but for the target, changed by more of them: those of a line
// of discovery.conf, for example. It is complete if d is. Errors name the flag. The error
// is ErrOtherTransport if the target is not reached by RDMA.
func (d *Discovery) With(args []string, from identity.Sources) (*Discovery, error) {
	n := DefaultDiscovery()
	n.Config, n.Persistent, n.Quiet = d.Config, d.Persistent, d.Quiet
	extra := pflag.NewFlagSet("", pflag.ContinueOnError)
	extra.BoolVarP(&n.Persistent, "persistent", "p", n.Persistent, "")
	n.flags.AddFlagSet(extra)
	var err error
	d.flags.VisitAll(func(f *pflag.Flag) {
		if err == nil && f.Changed && !slices.Contains(targetFlags, f.Name) {
			err = n.flags.Set(f.Name, valueOf(f))
		}
	})
	if err == nil {
		err = n.flags.Parse(args)
	}
	var invalid *pflag.InvalidValueError
	switch {
	case errors.As(err, &invalid) && invalid.GetFlag().Name == "transport":
		return nil, fmt.Errorf("transport %s: %w", invalid.GetValue(), ErrOtherTransport)
	case err != nil:
		return nil, FlagError(err)
	case n.flags.NArg() > 0:
		return nil, fmt.Errorf("%q: want flags", n.flags.Arg(0))
	}
	return n, n.Complete(from)
}

// valueOf returns the value that sets a flag again.
func valueOf(f *pflag.Flag) string {
	if s, ok := f.Value.(*secretFlag); ok {
		return s.text()
	}
	return f.Value.String()
}

// ConnectArgs returns the flags of a connect to a subsystem at an address, with everything
// that was set for all subsystems, but for the keys.
func (d *Discovery) ConnectArgs(to netip.AddrPort, nqn string) []string {
	args := []string{
		"--traddr=" + to.Addr().String(), "--trsvcid=" + strconv.Itoa(int(to.Port())), "--nqn=" + nqn,
		"--hostnqn=" + d.Connect.HostNQN, "--hostid=" + d.Connect.HostID.String(),
	}
	d.flags.VisitAll(func(f *pflag.Flag) {
		if f.Changed && !isSecret(f) && !slices.Contains(targetFlags, f.Name) && !slices.Contains([]string{"hostnqn", "hostid", "persistent"}, f.Name) {
			args = append(args, "--"+f.Name+"="+f.Value.String())
		}
	})
	return args
}
