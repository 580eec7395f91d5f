// Package options defines the flags of connect and target, with their checks and
// defaults, and finds the identity of this host.
package options

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/identity"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/internal/rundir"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma/provider"
)

// Limits and defaults that do not come from the initiator.
const (
	maxQueues           = 65535
	maxTransfer         = 1 << 20
	defaultMaxIO        = 256 << 10
	defaultPollMax      = 16 << 10
	defaultTimeout      = time.Minute
	defaultReconnect    = 10 * time.Second
	defaultLoss         = 600 * time.Second
	maxDevice           = 1<<20 - 1
	maxNSID             = 0xFFFFFFFE
	maxKeepAliveSeconds = 1<<32/1000 - 1 // KATO is 32 bits of milliseconds
)

// DefaultPort is the port of NVMe over RDMA.
const DefaultPort = 4420

// Forever is a controller loss timeout without a limit.
const Forever = -1 * time.Second

// Off is a fast I/O fail timeout that is not used.
const Off = -1 * time.Second

// Values of --on-crash: what happens to the devices when the server dies.
const (
	Requeue = "requeue"
	Fail    = "fail"
	Remove  = "remove"
)

// Values of --provider.
const (
	AutoProvider = provider.Auto
	Verbs        = provider.Verbs
	RoCE         = provider.RoCE
)

// Values of --frontend.
const (
	Auto         = "auto"
	Ublk         = "ublk"           // /dev/ublkbN
	NBD          = "nbd"            // /dev/nbdN, by the kernel's NBD client
	NBDSocket    = "nbd-socket"     // a socket for any NBD client
	VhostUserBlk = "vhost-user-blk" // sockets for virtual machine monitors
)

// AutoDevice lets the driver choose the number of the ublk device.
const AutoDevice = -1

// Connect holds the flags of connect: the target and the way to connect to it.
type Connect struct {
	Transport  string
	Address    string // as given: numeric or a host name
	Port       uint16
	NQN        string
	SourceAddr netip.Addr // zero: that of the route
	HostIface  string     // the interface that SourceAddr is of; empty: not given
	Paths      []Path     // further paths
	Policy     initiator.Policy
	Preferred  Path   // of the policy initiator.Preferred; zero: the first
	Fence      string // FenceAuto or FenceNone

	HostNQN string
	HostID  nvme.UUID
	// HostIDFile is the file that keeps a generated HostID; empty if it was not
	// generated.
	HostIDFile string
	// Warnings are about values that are accepted but may not be meant. They are
	// for the log.
	Warnings []string

	Secret           *auth.Key // of this host; nil: none
	ControllerSecret *auth.Key // that the target must prove to have; nil: none

	Queues        poller.Request
	QueueSize     int
	KeepAlive     time.Duration
	Reconnect     time.Duration // delay between two attempts
	Loss          time.Duration // < 0: for ever
	FastIOFail    time.Duration // < 0: off
	Duplicate     bool
	TOS           uint8 // 0: unset
	DisableSQFlow bool

	MaxIO       int
	Memory      int64 // bytes of I/O buffers at most; 0: half of what is available
	PollMax     int
	Device      int      // number of the first device, or AutoDevice
	NSIDs       []uint32 // nil: all
	Provider    string
	LoadModules string
	Frontend    string // Auto, Ublk, NBD, NBDSocket or VhostUserBlk
	Socket      string // for NBDSocket: a path or host:port; empty: in the server's directory
	TLS         string // for NBDSocket: directory of certificates; empty: no TLS
	VhostSocket string // for VhostUserBlk: a path, with NSIDField; empty: in the run directory
	VhostMode   fs.FileMode
	VhostOwner  FileOwner
	ZeroCopy    bool   // for VhostUserBlk
	ShmemSocket string // for Ublk: a path, with NSIDField; empty: none
	OnCrash     string // Requeue, Fail or Remove
	Metrics     string // HOST:PORT or :PORT; empty: only the control socket has metrics
	Timeout     time.Duration
	Context     string // who connects, for others to see
	Owner       string

	hostID string // value of the flag
}

// Default returns the values of all flags that are not given.
func Default() *Connect {
	return &Connect{
		Transport: "rdma", Port: DefaultPort,
		Queues: poller.Request{IO: runtime.NumCPU()}, QueueSize: initiator.DefaultQueueSize,
		KeepAlive: initiator.DefaultKeepAlive, Reconnect: defaultReconnect, Loss: defaultLoss, FastIOFail: Off,
		MaxIO: defaultMaxIO, PollMax: defaultPollMax, Device: AutoDevice, VhostMode: defaultVhostMode, VhostOwner: anyOwner,
		Fence: FenceAuto, Provider: AutoProvider, LoadModules: "auto", Frontend: Auto, OnCrash: Requeue, Timeout: defaultTimeout,
	}
}

// AddFlags defines the flags of connect. The names, short forms, units and defaults of
// the first block are those of nvme-cli.
func (c *Connect) AddFlags(f *pflag.FlagSet) {
	f.SortFlags = false
	c.addTarget(f, "(required)")
	f.VarP(text(&c.NQN, "nqn", "the name of an I/O subsystem, 1 to 223 bytes", checkSubsystem),
		"nqn", "n", "NQN of the subsystem (required)")
	c.addHost(f)
	f.Var(paths{&c.Paths}, "path", "a further path to the subsystem: `ADDRESS[,PORT[,HOST_TRADDR]]`; may be repeated. A path that cannot be reached is tried again")
	f.Var(preferred(&c.Preferred), "preferred", "path that --policy preferred uses while it can be: `ADDRESS[,PORT[,HOST_TRADDR]]` (default: that of -a)")
	c.addConnection(f)
	f.Var(text(&c.Socket, "address", "an absolute path of at most 107 bytes, or HOST:PORT", checkSocket), "nbd-socket",
		"path or address of the socket for NBD clients; implies --frontend nbd-socket (default: a socket in the run directory that only this target has)")
	f.Var(text(&c.VhostSocket, "path", "an absolute path of at most 107 bytes; "+NSIDField+" in the last part of it stands for the number of the namespace", checkVhostSocket), "vhost-socket",
		"path of the socket of each namespace for virtual machine monitors, with "+NSIDField+" for the number of the namespace; implies --frontend vhost-user-blk (default: sockets in the run directory that only this target has)")
	f.Var(text(&c.ShmemSocket, "path", "an absolute path of at most 107 bytes; "+NSIDField+" in the last part of it stands for the number of the namespace", checkVhostSocket), "shmem-socket",
		"path of a socket for each namespace that takes the memory of a user of the ublk device: I/O from it is not copied. The target can then read and write all of that memory. Implies --frontend ublk, and needs Linux 7.1 (default: none)")
	f.Var(deviceID(&c.Device), "device-id", "number N of /dev/ublkbN or /dev/nbdN for the first namespace, N+1 for the second, and so on (default: free numbers)")
	f.Var(&numbers{&c.NSIDs, 1, maxNSID, "namespace ids"}, "namespace", "ids of the namespaces to serve (default: all namespaces)")
	c.addProvider(f)
	c.addMetrics(f, "this server")
}

// addTarget defines the flags for the address of a target.
func (c *Connect) addTarget(f *pflag.FlagSet, required string) {
	f.VarP(OneOf(&c.Transport, "rdma"), "transport", "t", "transport type")
	f.VarP(text(&c.Address, "address", "an IPv4 or IPv6 address (with %zone) or a host name", checkAddress),
		"traddr", "a", "address or host name of the target "+required)
	f.VarP(number(&c.Port, 1, 65535, "a port"), "trsvcid", "s", "port of the target")
}

// addHost defines the flags for the identity of this host.
func (c *Connect) addHost(f *pflag.FlagSet) {
	f.VarP(sourceAddr(&c.SourceAddr), "host-traddr", "w", "source address (default: that of the route)")
	f.VarP(text(&c.HostIface, "interface", "the name of a network interface", checkWord), "host-iface", "f",
		"network interface of this host, whose address is the source address")
	f.VarP(text(&c.HostNQN, "nqn", "a name of 1 to 223 bytes", nvme.ValidateNQN),
		"hostnqn", "q", "NQN of this host (default: $LIBNVME_HOSTNQN, /etc/nvme/hostnqn, or an NQN made from the host id)")
	f.VarP(text(&c.hostID, "uuid", "a UUID like 12345678-1234-1234-1234-123456789abc", checkUUID),
		"hostid", "I", "identifier of this host (default: $LIBNVME_HOSTID, /etc/nvme/hostid, that of the firmware, or one that is generated once and kept)")
	c.addSecrets(f)
}

// addConnection defines the flags that may be the same for several subsystems.
func (c *Connect) addConnection(f *pflag.FlagSet) {
	f.VarP(number(&c.Queues.IO, 1, maxQueues, "a number"), "nr-io-queues", "i",
		"number of I/O queues, or of read queues if there are write queues (default and limit: one per online CPU)")
	f.Lookup("nr-io-queues").DefValue = "" // the description says it
	f.VarP(number(&c.Queues.Write, 0, maxQueues, "a number"), "nr-write-queues", "W", "number of queues for everything but reads")
	f.VarP(number(&c.Queues.Poll, 0, maxQueues, "a number"), "nr-poll-queues", "P", "number of queues that are polled, without interrupts")
	f.VarP(number(&c.QueueSize, initiator.MinQueueSize, initiator.MaxQueueSize, "a number"), "queue-size", "Q", "number of entries of each I/O queue")
	f.VarP(seconds(&c.KeepAlive, 0, maxKeepAliveSeconds, fmt.Sprintf("seconds, 0 (which is %d) to %d", initiator.DefaultKeepAlive/time.Second, maxKeepAliveSeconds)),
		"keep-alive-tmo", "k", "keep alive timeout")
	f.VarP(seconds(&c.Reconnect, 1, 1<<31-1, "seconds, 1 or more"), "reconnect-delay", "c", "time between two attempts to connect again")
	f.VarP(seconds(&c.Loss, -1<<31, 1<<31-1, "seconds, or a negative number for no limit"), "ctrl-loss-tmo", "l",
		"time after which a lost controller is given up, and its requests fail")
	f.VarP(seconds(&c.FastIOFail, -1<<31, 1<<31-1, "seconds, or a negative number for never"), "fast-io-fail-tmo", "F",
		"time after which requests of a lost controller fail, although it is not given up yet")
	f.BoolVarP(&c.Duplicate, "duplicate-connect", "D", false, "connect even if this host is already connected to the subsystem at this address")
	f.VarP(number(&c.TOS, 0, 255, "a number"), "tos", "T", "type of service; 0 is the default of the system")
	f.BoolVarP(&c.DisableSQFlow, "disable-sqflow", "d", false, "ask the target to work without submission queue flow control")
	f.Var(text(&c.Context, "word", "1 to 255 printable characters", checkWord), "context", "who connects, for list to show")
	f.Var(text(&c.Owner, "word", "1 to 255 printable characters", checkWord), "owner", "who owns the connection, for list to show")
	addForeign(f)

	f.Var(policy(&c.Policy), "policy", "which of several paths a request takes: the one with the fewest requests in flight, the next in turn, or the preferred one while it can be used")
	f.Var(OneOf(&c.Fence, FenceAuto, FenceNone), "fence", "what happens to writes whose path was lost: auto holds them until the old controller is known to be gone; none sends them again at once, so that an old write may overwrite a newer one")
	page := os.Getpagesize()
	f.Var(size(&c.MaxIO, page, page, maxTransfer), "max-io-size", "size of the largest request; each queue has --queue-size buffers of this size")
	f.Var(bytesOf(&c.Memory), "memory-limit", "most memory for the buffers of all namespaces (default: half of what is available)")
	f.Var(size(&c.PollMax, 1, 512, maxTransfer), "poll-max-size", "size of the largest read or write that goes to the poll queues")
	f.Var(OneOf(&c.Frontend, Auto, Ublk, NBD, NBDSocket, VhostUserBlk), "frontend", "how namespaces are offered: by the ublk driver, by the kernel's NBD client, on a socket for NBD clients, or on sockets for virtual machine monitors; auto takes the first of the first three that the machine has or can load, and that this user may use")
	f.Var(text(&c.TLS, "directory", "an absolute path", checkAbsolute), "nbd-tls",
		"require TLS of NBD clients, with server-cert.pem and server-key.pem of this directory; if it has ca-cert.pem, require a certificate of that authority as well")
	c.addVhost(f)
	f.Var(OneOf(&c.OnCrash, Requeue, Fail, Remove), "on-crash", "what happens when the server dies: requests wait for recover, requests fail until recover, or the devices are removed")
}

// addProvider defines the flags for the way to a target.
func (c *Connect) addProvider(f *pflag.FlagSet) {
	f.Var(OneOf(&c.Provider, AutoProvider, Verbs, RoCE), "provider", "how RDMA is done: verbs uses an RDMA device, roce is RoCEv2 over UDP without one; auto takes verbs if a device is on the route")
	f.Var(OneOf(&c.LoadModules, "auto", "never"), "load-modules", "whether to load ublk_drv, nbd, rdma_ucm and ib_uverbs if they are missing")
	f.Var(Duration(&c.Timeout, time.Second, time.Hour), "timeout", "time limit for connecting. A wait for the end of an earlier server's controllers comes on top")
}

// addMetrics defines the flag for the address at which metrics can be scraped.
func (c *Connect) addMetrics(f *pflag.FlagSet, what string) {
	f.Var(text(&c.Metrics, "address", "HOST:PORT, or :PORT for the loopback address", checkMetrics), "metrics-listen",
		"address at which Prometheus can scrape "+what+", without encryption or authentication; :PORT means 127.0.0.1 (default: only the command metrics can)")
}

// Complete checks the flags in combination and finds the identity of the host. It is
// called once, after the flags are parsed.
func (c *Connect) Complete(from identity.Sources) error {
	switch {
	case c.Address == "":
		return errors.New("-a/--traddr: no value is given; want the address of the target")
	case c.NQN == "":
		return errors.New("-n/--nqn: no value is given; want the name of the subsystem")
	}
	return c.CompleteHost(from)
}

// CompleteHost is Complete for flags that may lack the target.
func (c *Connect) CompleteHost(from identity.Sources) error {
	if err := errors.Join(c.chooseSource(), c.checkSecrets()); err != nil {
		return err
	}
	if a, err := netip.ParseAddr(c.Address); err == nil && c.SourceAddr.IsValid() && a.Unmap().Is4() != c.SourceAddr.Is4() {
		return fmt.Errorf("-w/--host-traddr %q: want an address of the family of %s", c.SourceAddr, c.Address)
	}
	c.normalize()
	if c.Device != AutoDevice && len(c.NSIDs) > 0 && c.Device+len(c.NSIDs)-1 > maxDevice {
		return fmt.Errorf("--device-id \"%d\": want a number that leaves %d numbers up to %d", c.Device, len(c.NSIDs), maxDevice)
	}
	switch {
	case c.Preferred.Address.IsValid() && c.Policy != initiator.Preferred:
		return fmt.Errorf("--preferred %q: want it with --policy preferred, not %v", c.Preferred, c.Policy)
	case c.Socket != "" && c.Frontend != NBDSocket:
		return fmt.Errorf("--nbd-socket %q: want it with --frontend %s, not %s", c.Socket, NBDSocket, c.Frontend)
	case c.Device != AutoDevice && (c.Frontend == NBDSocket || c.Frontend == VhostUserBlk || c.VhostSocket != ""):
		return fmt.Errorf("--device-id \"%d\": a socket has no number", c.Device)
	case c.TLS != "" && c.Frontend != NBDSocket:
		return fmt.Errorf("--nbd-tls %q: want it with --frontend %s, not %s", c.TLS, NBDSocket, c.Frontend)
	}
	if err := c.completeVhost(); err != nil {
		return err
	}
	if _, err := c.TLSConfig(); err != nil {
		return err
	}
	from.NQNName, from.IDName = "-q/--hostnqn", "-I/--hostid"
	host, err := identity.Find(c.HostNQN, c.hostID, from)
	c.HostNQN, c.HostID, c.HostIDFile = host.NQN, host.ID, host.File
	c.Warnings = append(c.Warnings, host.Warnings...)
	return err
}

// normalize gives values that mean the same one form, and chooses the front end that other flags
// imply.
func (c *Connect) normalize() {
	if c.KeepAlive == 0 {
		c.KeepAlive = initiator.DefaultKeepAlive
	}
	if c.Loss < 0 {
		c.Loss = Forever
	}
	if c.FastIOFail < 0 {
		c.FastIOFail = Off
	}
	if c.Frontend != Auto {
		return
	}
	switch {
	case c.Socket != "":
		c.Frontend = NBDSocket
	case c.VhostSocket != "":
		c.Frontend = VhostUserBlk
	case c.ShmemSocket != "":
		c.Frontend = Ublk
	}
}

// TLSConfig reads the certificates for NBD clients. Their files have the names that
// other NBD programs use. Without TLS the result is nil.
func (c *Connect) TLSConfig() (*tls.Config, error) {
	if c.TLS == "" {
		return nil, nil
	}
	fail := func(err error) (*tls.Config, error) { return nil, fmt.Errorf("--nbd-tls %q: %w", c.TLS, err) }
	cert, err := ReadFile(filepath.Join(c.TLS, "server-cert.pem"))
	if err != nil {
		return fail(err)
	}
	key, err := ReadFile(filepath.Join(c.TLS, "server-key.pem"))
	if err != nil {
		return fail(err)
	}
	own, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return fail(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{own}}
	authority := filepath.Join(c.TLS, "ca-cert.pem")
	text, err := ReadFile(authority)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return config, nil
	case err != nil:
		return fail(err)
	}
	config.ClientCAs, config.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
	if !config.ClientCAs.AppendCertsFromPEM(text) {
		return fail(fmt.Errorf("%s contains no certificate", authority))
	}
	return config, nil
}

// MetricsAddress returns the address to serve metrics at, or "".
func (c *Connect) MetricsAddress() string {
	if strings.HasPrefix(c.Metrics, ":") {
		return "127.0.0.1" + c.Metrics
	}
	return c.Metrics
}

// Peer is the target's address and port as they were given.
func (c *Connect) Peer() string { return net.JoinHostPort(c.Address, strconv.Itoa(int(c.Port))) }

// Named reports whether the target's address is a host name, which may have other
// addresses the next time.
func (c *Connect) Named() bool {
	_, err := netip.ParseAddr(c.Address)
	return err != nil
}

// Resolve finds the numeric addresses of the target, at least one, in the order
// in which they are to be tried.
func (c *Connect) Resolve(ctx context.Context) ([]netip.AddrPort, error) {
	if a, err := netip.ParseAddr(c.Address); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a.Unmap(), c.Port)}, nil
	}
	network := "ip"
	switch {
	case !c.SourceAddr.IsValid():
	case c.SourceAddr.Is4():
		network = "ip4"
	default:
		network = "ip6"
	}
	found, err := net.DefaultResolver.LookupNetIP(ctx, network, c.Address)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", c.Address, err)
	}
	var out []netip.AddrPort
	for _, a := range found {
		if checkUnicast(a, "target") == nil {
			out = append(out, netip.AddrPortFrom(a.Unmap(), c.Port))
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("resolve %s: %v is not the address of a target", c.Address, found)
	}
	return out, nil
}

// Args returns the flags of f that were set, as arguments that set them again. Keys are left
// out.
func Args(f *pflag.FlagSet) []string {
	var args []string
	// Visit would visit only the flags that f itself has parsed.
	f.VisitAll(func(flag *pflag.Flag) {
		if flag.Changed && !isSecret(flag) {
			args = append(args, "--"+flag.Name+"="+flag.Value.String())
		}
	})
	return args
}

func checkAddress(s string) error {
	if a, err := netip.ParseAddr(s); err == nil {
		return checkUnicast(a, "target")
	}
	if !hostName(s) {
		return errUnwanted
	}
	return nil
}

// checkUnicast refuses addresses that are not of one machine, which is a target or a host.
func checkUnicast(a netip.Addr, of string) error {
	switch a := a.Unmap(); {
	case a.IsUnspecified():
		return fmt.Errorf("the unspecified address is not the address of a %s", of)
	case a.IsMulticast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Errorf("a multicast or broadcast address is not the address of a %s", of)
	}
	return nil
}

// hostName reports whether s can be a host name: labels of letters, digits and
// hyphens. A last label of digits only would be a mistyped address.
func hostName(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return false
	}
	var label string
	for label = range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, r := range label {
			if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_') {
				return false
			}
		}
	}
	return strings.Trim(label, "0123456789") != ""
}

func checkSubsystem(s string) error {
	if s == nvme.DiscoveryNQN {
		return errors.New("a discovery subsystem has no namespaces")
	}
	return nvme.ValidateNQN(s)
}

func checkSocket(s string) error {
	if strings.HasPrefix(s, "/") {
		if rundir.CheckSocket(s) != nil {
			return errUnwanted
		}
		return nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil || host == "" {
		return errUnwanted
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return errUnwanted
	}
	return nil
}

func checkMetrics(s string) error {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return errUnwanted
	}
	if _, err := netip.ParseAddr(host); err != nil && host != "" && !hostName(host) {
		return errUnwanted
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return errUnwanted
	}
	return nil
}

func checkAbsolute(s string) error {
	if !filepath.IsAbs(s) {
		return errUnwanted
	}
	return nil
}

func checkUUID(s string) error {
	if id, err := nvme.ParseUUID(s); err != nil || id.IsZero() {
		return errUnwanted
	}
	return nil
}

func sourceAddr(dst *netip.Addr) *flagValue[netip.Addr] {
	return &flagValue[netip.Addr]{
		dst: dst,
		parse: func(s string) (netip.Addr, error) {
			a, err := netip.ParseAddr(s)
			if err != nil {
				return a, errUnwanted
			}
			return a.Unmap(), checkUnicast(a, "host")
		},
		format: func(a netip.Addr) string {
			if !a.IsValid() {
				return ""
			}
			return a.String()
		},
		kind: "address", want: "an IPv4 or IPv6 address (with %zone) of this host",
	}
}

func deviceID(dst *int) *flagValue[int] {
	v := number(dst, 0, maxDevice, "a number")
	plain := v.format
	v.format = func(n int) string {
		if n == AutoDevice {
			return ""
		}
		return plain(n)
	}
	return v
}
