package disk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
)

// DefaultPort is the port of NVMe over RDMA that IANA has assigned.
const DefaultPort = 4420

// Path is a way to the target.
type Path struct {
	Host   string     // address or name of the target; a name is resolved again for each connection
	Port   uint16     // 0: DefaultPort
	Source netip.Addr // local address; zero: chosen by the route

	// Provider does RDMA, and belongs to the caller, who closes it after the disk. nil: Open
	// chooses one by the route to the target (rdma/provider), which its disks share. ProviderName is
	// provider.Verbs or provider.RoCE, or empty for the choice.
	Provider     rdma.Provider
	ProviderName string
}

// Config configures Open. Zero fields have defaults, except NQN and Paths.
type Config struct {
	NQN   string // of the subsystem
	NSID  uint32 // of the namespace; 0: the subsystem has only one
	Paths []Path // at least one of them must be reachable when the disk is opened; the others are tried again until they are

	// HostNQN and HostID are what the target knows this host by. Without them, they are what
	// nvme-cli uses on this machine (package identity).
	HostNQN     string
	HostID      nvme.UUID
	Credentials initiator.Credentials // for targets that require authentication

	Queues    int  // I/O queues, each with a loop, which is a thread; 0: 1. The target may grant fewer
	PollQueue bool // loops poll for small requests instead of waiting for interrupts, which takes a CPU for each while requests are in flight
	Depth     int  // requests in flight on each loop, 1..4096; 0: 64
	MaxIO     int  // see DeviceConfig.MaxIO
	// Loops are loops that the caller has, which then may serve other disks and front ends
	// as well. They must run until the disk is closed. nil: Open makes loops and stops them.
	Loops []*poller.Loop

	Policy    initiator.Policy // how a request chooses its path
	KeepAlive time.Duration    // 0: 5 s
	// A lost path is connected again: at once, and then every ReconnectDelay (0: 10 s).
	// Without any path, requests wait. They fail after FailAfter (0: not before the disk is
	// given up), and the disk is given up after GiveUpAfter (0: 600 s; initiator.Forever: never).
	ReconnectDelay, FailAfter, GiveUpAfter time.Duration

	Log *slog.Logger // nil: nothing is logged
}

// ParseURL returns the configuration for a URL:
//
//	nvmeof+rdma://HOST[:PORT]/NQN[?nsid=N&path=HOST[:PORT]&hostnqn=NQN&provider=verbs|roce&queues=N]
//
// path may be repeated. Fields that the URL does not set are zero.
func ParseURL(text string) (Config, error) {
	fail := func(err error) (Config, error) { return Config{}, fmt.Errorf("disk URL %q: %w", text, err) }
	u, err := url.Parse(text)
	if err != nil {
		return Config{}, err // names the URL
	}
	if u.Scheme != "nvmeof+rdma" || u.User != nil || u.Fragment != "" {
		return fail(errors.New("want nvmeof+rdma://HOST[:PORT]/NQN"))
	}
	cfg := Config{NQN: strings.TrimPrefix(u.Path, "/")}
	if err := nvme.ValidateNQN(cfg.NQN); err != nil {
		return fail(fmt.Errorf("subsystem NQN: %w", err))
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return fail(err)
	}
	name := ""
	hosts := append([]string{u.Host}, query["path"]...)
	for key, values := range query {
		value := values[len(values)-1]
		switch n, err := strconv.ParseUint(value, 0, 32); {
		case key == "path":
		case len(values) > 1:
			return fail(fmt.Errorf("%s is there %d times", key, len(values)))
		case key == "hostnqn":
			cfg.HostNQN = value
		case key == "provider":
			name = value
		case key != "nsid" && key != "queues":
			return fail(fmt.Errorf("unknown parameter %s", key))
		case err != nil || n == 0:
			return fail(fmt.Errorf("%s=%s: want a number above 0", key, value))
		case key == "nsid":
			cfg.NSID = uint32(n)
		default:
			cfg.Queues = int(n)
		}
	}
	for _, host := range hosts {
		p, err := parsePath(host)
		if err != nil {
			return fail(err)
		}
		p.ProviderName = name
		cfg.Paths = append(cfg.Paths, p)
	}
	return cfg, nil
}

func parsePath(text string) (Path, error) {
	host, port, err := net.SplitHostPort(text)
	if err != nil { // there is no port
		host, port = strings.TrimSuffix(strings.TrimPrefix(text, "["), "]"), "0"
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || host == "" {
		return Path{}, fmt.Errorf("%q: want HOST or HOST:PORT", text)
	}
	return Path{Host: host, Port: uint16(n)}, nil
}

// OpenURL opens the disk of a URL; see ParseURL.
func OpenURL(ctx context.Context, text string) (*Disk, error) {
	cfg, err := ParseURL(text)
	if err != nil {
		return nil, err
	}
	return Open(ctx, cfg)
}

// Open connects to a subsystem and opens one of its namespaces. ctx bounds the whole of it.
// It changes nothing of the process; see the package documentation for what may be changed
// before.
//
// Errors are about the configuration, of the provider, and those of initiator.Connect.
func Open(ctx context.Context, cfg Config) (_ *Disk, err error) {
	o := opening{cfg: cfg}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open disk %s: %w", cfg.NQN, err), o.undo())
		}
	}()
	if err := o.identify(); err != nil {
		return nil, err
	}
	if err := o.makeLoops(); err != nil {
		return nil, err
	}
	if err := o.connect(ctx); err != nil {
		return nil, err
	}
	ns, err := o.namespace()
	if err != nil {
		return nil, err
	}
	d, err := New(DeviceConfig{Device: ns, Depth: cfg.Depth, MaxIO: cfg.MaxIO})
	if err != nil {
		return nil, err
	}
	d.sub, d.ns, d.frees = o.sub, ns, o.frees
	o.disk.Store(d)
	return d, nil
}
