// Package options is what an operator may say about a connection: the flags of
// connect, their checks and defaults, and the identity of this host.
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

	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
)

// Limits and defaults that are not the initiator's.
const (
	maxQueues           = 65535
	maxTransfer         = 1 << 20
	defaultMaxIO        = 256 << 10
	defaultPollMax      = 16 << 10
	defaultPort         = 4420
	defaultTimeout      = time.Minute
	defaultReconnect    = 10 * time.Second
	defaultLoss         = 600 * time.Second
	maxDevice           = 1<<20 - 1
	maxNSID             = 0xFFFFFFFE
	maxKeepAliveSeconds = 1<<32/1000 - 1 // KATO is 32 bits of milliseconds
)

// Forever is a controller loss timeout that never ends.
const Forever = -1 * time.Second

// Off is a fast I/O fail timeout that is not in use.
const Off = -1 * time.Second

// What becomes of the devices when the server dies.
const (
	Requeue = "requeue"
	Fail    = "fail"
	Remove  = "remove"
)

// Providers of --provider.
const (
	AutoProvider = "auto"
	Verbs        = "verbs"
	RoCE         = "roce"
)

// Front ends.
const (
	Auto      = "auto"
	Ublk      = "ublk"       // /dev/ublkbN
	NBD       = "nbd"        // /dev/nbdN, by the kernel's NBD client
	NBDSocket = "nbd-socket" // a socket for any NBD client
)

// AutoDevice lets the driver choose the number of the ublk device.
const AutoDevice = -1

// Connect is what to connect to, and how.
type Connect struct {
	Transport  string
	Address    string // numeric or a host name, as given
	Port       uint16
	NQN        string
	SourceAddr netip.Addr // zero: the route's

	HostNQN string
	HostID  nvme.UUID

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
	PollMax     int
	Device      int      // AutoDevice, or of the first namespace
	NSIDs       []uint32 // nil: all
	Provider    string
	LoadModules string
	Frontend    string // Auto, Ublk, NBD or NBDSocket
	Socket      string // of NBDSocket: a path or host:port; empty: in the run directory
	TLS         string // of NBDSocket: directory of certificates; empty: no TLS
	OnCrash     string // Requeue, Fail or Remove
	Timeout     time.Duration

	hostID string // as given by the flag
}

// Default is what holds without any flag.
func Default() *Connect {
	return &Connect{
		Transport: "rdma", Port: defaultPort,
		Queues: poller.Request{IO: runtime.NumCPU()}, QueueSize: initiator.DefaultQueueSize,
		KeepAlive: initiator.DefaultKeepAlive, Reconnect: defaultReconnect, Loss: defaultLoss, FastIOFail: Off,
		MaxIO: defaultMaxIO, PollMax: defaultPollMax, Device: AutoDevice,
		Provider: AutoProvider, LoadModules: "auto", Frontend: Auto, OnCrash: Requeue, Timeout: defaultTimeout,
	}
}

// AddFlags defines the flags of connect. Names, short forms, units and defaults
// of the first block are nvme-cli's.
func (c *Connect) AddFlags(f *pflag.FlagSet) {
	f.SortFlags = false
	f.VarP(OneOf(&c.Transport, "rdma"), "transport", "t", "transport type")
	f.VarP(text(&c.Address, "address", "an IPv4 or IPv6 address (with %zone) or a host name", checkAddress),
		"traddr", "a", "address of the target (required)")
	f.VarP(number(&c.Port, 1, 65535, "a port"), "trsvcid", "s", "port of the target")
	f.VarP(text(&c.NQN, "nqn", "the name of an I/O subsystem, 1 to 223 bytes", checkSubsystem),
		"nqn", "n", "NQN of the subsystem (required)")
	f.VarP(sourceAddr(&c.SourceAddr), "host-traddr", "w", "source address (default: the route's)")
	f.VarP(text(&c.HostNQN, "nqn", "a name of 1 to 223 bytes", nvme.ValidateNQN),
		"hostnqn", "q", "NQN of this host (default: $LIBNVME_HOSTNQN, /etc/nvme/hostnqn, or made from the host id)")
	f.VarP(text(&c.hostID, "uuid", "a UUID like 12345678-1234-1234-1234-123456789abc", checkUUID),
		"hostid", "I", "identifier of this host (default: $LIBNVME_HOSTID, /etc/nvme/hostid, or the machine's)")
	f.VarP(number(&c.Queues.IO, 1, maxQueues, "a number"), "nr-io-queues", "i",
		"I/O queues; those for reads if there are write queues (default: one per online CPU, which is also the most)")
	f.Lookup("nr-io-queues").DefValue = "" // it is in the text
	f.VarP(number(&c.Queues.Write, 0, maxQueues, "a number"), "nr-write-queues", "W", "queues for everything but reads")
	f.VarP(number(&c.Queues.Poll, 0, maxQueues, "a number"), "nr-poll-queues", "P", "queues that are polled without interrupts")
	f.VarP(number(&c.QueueSize, initiator.MinQueueSize, initiator.MaxQueueSize, "a number"), "queue-size", "Q", "entries per I/O queue")
	f.VarP(seconds(&c.KeepAlive, 0, maxKeepAliveSeconds, fmt.Sprintf("seconds, 0 (which is %d) to %d", initiator.DefaultKeepAlive/time.Second, maxKeepAliveSeconds)),
		"keep-alive-tmo", "k", "keep alive timeout")
	f.VarP(seconds(&c.Reconnect, 1, 1<<31-1, "seconds, 1 or more"), "reconnect-delay", "c", "time between two attempts to reconnect")
	f.VarP(seconds(&c.Loss, -1<<31, 1<<31-1, "seconds, or a negative number for no limit"), "ctrl-loss-tmo", "l",
		"time after which a lost controller is given up")
	f.VarP(seconds(&c.FastIOFail, -1<<31, 1<<31-1, "seconds, or a negative number for never"), "fast-io-fail-tmo", "F",
		"time after which requests of a lost controller fail instead of waiting")
	f.BoolVarP(&c.Duplicate, "duplicate-connect", "D", false, "connect even if this host is connected to the subsystem at this address")
	f.VarP(number(&c.TOS, 0, 255, "a number"), "tos", "T", "type of service; 0 leaves it to the system")
	f.BoolVarP(&c.DisableSQFlow, "disable-sqflow", "d", false, "ask the target to do without submission queue flow control")

	page := os.Getpagesize()
	f.Var(size(&c.MaxIO, page, page, maxTransfer), "max-io-size", "largest request; each queue has queue-size buffers of it")
	f.Var(size(&c.PollMax, 1, 512, maxTransfer), "poll-max-size", "largest read or write that goes to the poll queues")
	f.Var(OneOf(&c.Frontend, Auto, Ublk, NBD, NBDSocket), "frontend", "what makes the devices: the ublk driver, the kernel's NBD client, or a socket for NBD clients; auto takes the first that the machine has")
	f.Var(text(&c.Socket, "address", "an absolute path of at most 107 bytes, or HOST:PORT", checkSocket), "nbd-socket",
		"where the front end nbd-socket listens, and chooses it (default: a socket in the run directory that only this target has)")
	f.Var(text(&c.TLS, "directory", "an absolute path", checkAbsolute), "nbd-tls",
		"serve only NBD clients that speak TLS, with server-cert.pem and server-key.pem in this directory; with ca-cert.pem there, only those that it has certified")
	f.Var(deviceID(&c.Device), "device-id", "number N of /dev/ublkbN, or /dev/nbdN, for the first namespace, N+1 for the second, … (default: free ones)")
	f.Var(&numbers{&c.NSIDs, 1, maxNSID, "namespace ids"}, "namespace", "only these namespaces (default: all)")
	f.Var(OneOf(&c.Provider, AutoProvider, Verbs, RoCE), "provider", "how to do RDMA: with an RDMA device, or by RoCEv2 over UDP without one; auto looks for a device on the route")
	f.Var(OneOf(&c.LoadModules, "auto", "never"), "load-modules", "load ublk_drv, nbd, rdma_ucm and ib_uverbs when they are missing")
	f.Var(OneOf(&c.OnCrash, Requeue, Fail, Remove), "on-crash", "what becomes of the devices when the server dies: requests wait for recover, or fail until then, or the devices go away")
	f.Var(duration(&c.Timeout, time.Second, time.Hour), "timeout", "limit for connecting")
}

// Complete checks what no single flag can, and finds the identity of the host.
func (c *Connect) Complete(from Sources) error {
	switch {
	case c.Address == "":
		return errors.New("-a/--traddr: no value is given; want the address of the target")
	case c.NQN == "":
		return errors.New("-n/--nqn: no value is given; want the name of the subsystem")
	}
	if a, err := netip.ParseAddr(c.Address); err == nil && c.SourceAddr.IsValid() && a.Unmap().Is4() != c.SourceAddr.Is4() {
		return fmt.Errorf("-w/--host-traddr %q: want an address of the family of %s", c.SourceAddr, c.Address)
	}
	if c.KeepAlive == 0 {
		c.KeepAlive = initiator.DefaultKeepAlive
	}
	if c.Loss < 0 {
		c.Loss = Forever
	}
	if c.FastIOFail < 0 {
		c.FastIOFail = Off
	}
	if c.Device != AutoDevice && len(c.NSIDs) > 0 && c.Device+len(c.NSIDs)-1 > maxDevice {
		return fmt.Errorf("--device-id \"%d\": want a number that leaves %d numbers up to %d", c.Device, len(c.NSIDs), maxDevice)
	}
	if c.Socket != "" && c.Frontend == Auto {
		c.Frontend = NBDSocket
	}
	switch {
	case c.Socket != "" && c.Frontend != NBDSocket:
		return fmt.Errorf("--nbd-socket %q: want it with --frontend %s, not %s", c.Socket, NBDSocket, c.Frontend)
	case c.Device != AutoDevice && c.Frontend == NBDSocket:
		return fmt.Errorf("--device-id \"%d\": a socket has no number", c.Device)
	case c.TLS != "" && c.Frontend != NBDSocket:
		return fmt.Errorf("--nbd-tls %q: want it with --frontend %s, not %s", c.TLS, NBDSocket, c.Frontend)
	}
	_, err := c.TLSConfig()
	if err != nil {
		return err
	}
	c.HostNQN, c.HostID, err = identity(c.HostNQN, c.hostID, from)
	return err
}

// TLSConfig reads the certificates for NBD clients, which have the names that other
// programs look for, too. It is nil without TLS.
func (c *Connect) TLSConfig() (*tls.Config, error) {
	if c.TLS == "" {
		return nil, nil
	}
	fail := func(err error) (*tls.Config, error) { return nil, fmt.Errorf("--nbd-tls %q: %w", c.TLS, err) }
	own, err := tls.LoadX509KeyPair(filepath.Join(c.TLS, "server-cert.pem"), filepath.Join(c.TLS, "server-key.pem"))
	if err != nil {
		return fail(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{own}}
	authority := filepath.Join(c.TLS, "ca-cert.pem")
	text, err := os.ReadFile(authority)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return config, nil
	case err != nil:
		return fail(err)
	}
	config.ClientCAs, config.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
	if !config.ClientCAs.AppendCertsFromPEM(text) {
		return fail(fmt.Errorf("%s: no certificate is in it", authority))
	}
	return config, nil
}

// Resolve finds the numeric address of the target.
func (c *Connect) Resolve(ctx context.Context) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(c.Address); err == nil {
		return netip.AddrPortFrom(a.Unmap(), c.Port), nil
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
		return netip.AddrPort{}, fmt.Errorf("resolve %s: %w", c.Address, err)
	}
	return netip.AddrPortFrom(found[0].Unmap(), c.Port), nil
}

// Args writes the flags of f that were set as arguments again.
func Args(f *pflag.FlagSet) []string {
	var args []string
	// Visit would only see what f itself has parsed.
	f.VisitAll(func(flag *pflag.Flag) {
		if flag.Changed {
			args = append(args, "--"+flag.Name+"="+flag.Value.String())
		}
	})
	return args
}

func checkAddress(s string) error {
	if a, err := netip.ParseAddr(s); err == nil {
		return checkUnicast(a)
	}
	if !hostName(s) {
		return errUnwanted
	}
	return nil
}

func checkUnicast(a netip.Addr) error {
	switch a := a.Unmap(); {
	case a.IsUnspecified():
		return errors.New("the unspecified address is nobody's")
	case a.IsMulticast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return errors.New("a multicast or broadcast address is nobody's")
	}
	return nil
}

// hostName says whether s may be a host name: labels of letters, digits and
// hyphens, the last one not of digits only, which would be a mistyped address.
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

// maxSocketPath is what struct sockaddr_un has room for.
const maxSocketPath = 107

func checkSocket(s string) error {
	if strings.HasPrefix(s, "/") {
		if len(s) > maxSocketPath {
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
			return a.Unmap(), checkUnicast(a)
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
