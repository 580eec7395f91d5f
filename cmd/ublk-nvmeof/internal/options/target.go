package options

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/target"
)

// Target holds the options of a target.
type Target struct {
	Address      netip.AddrPort   // to listen on
	Ports        []netip.AddrPort // further ones
	MinID, MaxID uint16           // of controllers; 0: the smallest and the largest
	Provider     string
	InCapsule    int // bytes of in-capsule data; < 0: none
	QueueSize    int
	MaxIO        int   // bytes per command
	Descriptors  int   // keyed descriptors per command
	Memory       int64 // bytes for namespaces in memory and caches; 0: chosen by available memory

	QueueMemory int64 // bytes; 0: chosen by the machine's memory

	Quiesce         time.Duration // CQT
	ANATransition   time.Duration // ANATT
	RetryDelays     [3]time.Duration
	KeepAlive       string // Traffic or Commands
	NoWriteCache    bool
	NamespacesAfter time.Duration // time after the start at which namespaces appear

	Subsystems []Subsystem
	Referrals  []netip.AddrPort // to other discovery services
	Discovery  string           // own NQN of the discovery subsystem; empty: none
	Faults     []string         // see FaultWords

	addr netip.Addr
	port uint16
}

// Values of Target.KeepAlive.
const (
	Traffic  = "traffic"
	Commands = "commands"
)

// Subsystem is a subsystem of a target.
type Subsystem struct {
	NQN        string
	MaxQueues  int      // I/O queues per controller
	AllowHosts []string // none: any
	Auth       []HostAuth
	Namespaces []Namespace
}

// DefaultTarget returns the defaults of all flags.
func DefaultTarget() *Target {
	return &Target{
		addr: netip.AddrFrom4([4]byte{127, 0, 0, 1}), port: DefaultPort, Provider: AutoProvider,
		InCapsule: target.DefaultInCapsule, QueueSize: target.DefaultQueueSize, MaxIO: target.DefaultMaxTransfer,
		Descriptors: target.DefaultMaxDescriptors,
		KeepAlive:   Traffic, ANATransition: 10 * time.Second,
	}
}

// AddFlags defines the flags of target. Each flag of a subsystem applies to the
// subsystem of the last --nqn before it.
func (t *Target) AddFlags(f *pflag.FlagSet) {
	f.SortFlags = false
	f.VarP(listenAddr(&t.addr), "traddr", "a", "address to listen on")
	f.VarP(number(&t.port, 1, 65535, "a port"), "trsvcid", "s", "port to listen on")
	f.Var(&each{kind: "path", want: "ADDRESS[,PORT]", take: func(text string) error {
		p, err := ParsePath(text)
		if err == nil && p.Source.IsValid() {
			err = errUnwanted
		}
		t.Ports = append(t.Ports, p.Address)
		return err
	}}, "port", "a further port to listen on, ADDRESS[,PORT]; may be repeated. Ports have numbers from 2 on")
	f.Var(OneOf(&t.Provider, AutoProvider, Verbs, RoCE), "provider", "use an RDMA device, or RoCEv2 over UDP without one; auto uses the RDMA device that has the address, if there is one")
	f.Var(number(&t.QueueSize, 16, 1024, "a number"), "queue-size", "largest number of entries of an I/O queue")
	f.Var(inCapsuleSize(&t.InCapsule), "in-capsule-size", "largest amount of data that a write carries with its command; 0 for none")
	f.Var(size(&t.MaxIO, target.MinTransfer/2, target.MinTransfer, target.DefaultMaxTransfer), "max-io-size", "largest data transfer of a command, a power of two (MDTS)")
	f.Var(bytesOf(&t.Memory), "memory-limit", "memory limit for namespaces with ram=SIZE and for caches (default: three quarters of the available memory)")
	f.Var(bytesOf(&t.QueueMemory), "queue-memory", "memory limit for the queues of all hosts (default: a quarter of the machine's memory, at least 256MiB)")
	t.addTestFlags(f)

	last := func(flag string, set func(*Subsystem, string) error) func(string) error {
		return func(text string) error {
			if len(t.Subsystems) == 0 {
				return fmt.Errorf("--%s applies to the subsystem of the --nqn before it; want --nqn first", flag)
			}
			return set(&t.Subsystems[len(t.Subsystems)-1], text)
		}
	}
	f.VarP(&each{kind: "nqn", want: "the name of a subsystem", take: func(nqn string) error {
		if err := checkSubsystem(nqn); err != nil {
			return err
		}
		t.Subsystems = append(t.Subsystems, Subsystem{NQN: nqn})
		return nil
	}}, "nqn", "n", "NQN of a subsystem; for several subsystems repeat it, and let the flags of each subsystem follow its --nqn")
	f.Var(&each{kind: "namespace", want: NamespaceWords, take: last("namespace", func(s *Subsystem, text string) error {
		n, err := ParseNamespace(text)
		s.Namespaces = append(s.Namespaces, n)
		return err
	})}, "namespace", "namespace of the subsystem: "+NamespaceWords)
	f.Var(&each{kind: "nqn", want: "the name of a host", take: last("allow-host", func(s *Subsystem, nqn string) error {
		s.AllowHosts = append(s.AllowHosts, nqn)
		return nvme.ValidateNQN(nqn)
	})}, "allow-host", "NQN of a host that may connect to the subsystem (default: any host)")
	addAuthFlags(f, t.hostAuth)
	f.Var(&each{kind: "number", want: fmt.Sprintf("a number, 1 to %d", nvme.MaxQueues), take: last("max-queues", func(s *Subsystem, text string) error {
		return number(&s.MaxQueues, 1, nvme.MaxQueues, "a number").Set(text)
	})}, "max-queues", fmt.Sprintf("largest number of I/O queues of a controller of the subsystem (default %d)", target.DefaultMaxQueues))
	f.Var(&each{kind: "address", want: ReferralWords, take: func(text string) error {
		to, err := ParseReferral(text)
		t.Referrals = append(t.Referrals, to)
		return err
	}}, "referral", "refer hosts that ask for subsystems to the discovery service at an address as well; may be repeated: "+ReferralWords)
	f.Var(text(&t.Discovery, "nqn", "a name of 1 to 223 bytes", nvme.ValidateNQN), "discovery-nqn", "NQN of the discovery subsystem beside the well-known one (default: none)")
	f.Var(&each{kind: "fault", want: FaultWords, take: func(text string) error {
		_, err := ParseFault(text)
		t.Faults = append(t.Faults, text)
		return err
	}}, "fault", "fault to set at the start: "+FaultWords)
}

// addTestFlags defines the flags for tests of hosts.
func (t *Target) addTestFlags(f *pflag.FlagSet) {
	f.Var(Duration(&t.NamespacesAfter, 0, time.Hour), "namespaces-after", "hide all namespaces for this time after the start, like a target that opens its port before it adds namespaces")
	f.Var(number(&t.MinID, 1, nvme.CNTLIDMax, "a number"), "min-cntlid", "smallest controller id (default 1)")
	f.Lookup("min-cntlid").DefValue = ""
	f.Var(number(&t.MaxID, 1, nvme.CNTLIDMax, "a number"), "max-cntlid", fmt.Sprintf("largest controller id (default %d); the targets of one subsystem must not give the same ids", nvme.CNTLIDMax))
	f.Lookup("max-cntlid").DefValue = ""
	f.Var(number(&t.Descriptors, 1, target.DefaultMaxDescriptors, "a number"), "max-descriptors", "largest number of places of the host that the data of a command may be in (MSDBD)")
	f.BoolVar(&t.NoWriteCache, "no-write-cache", false, "announce no volatile write cache (VWC), and make every write durable before its completion")
	f.Var(multiple(&t.Quiesce, time.Millisecond), "quiesce-time", "announced command quiesce time (CQT)")
	f.Var(seconds(&t.ANATransition, 1, 255, "seconds, 1 to 255"), "ana-transition-time", "announced limit of the time in ANA state change (ANATT)")
	f.Var(&retryDelays{&t.RetryDelays}, "retry-delays", "announced retry delays for a status with crd=1, 2 and 3 (CRDT1 to CRDT3), separated by commas")
	f.Var(OneOf(&t.KeepAlive, Traffic, Commands), "keep-alive", "restart the keep alive timer at every command, and announce that (TBKAS), or only at Keep Alive commands")
}

// multiple returns a flag for a time of 0 to 65535 units.
func multiple(dst *time.Duration, unit time.Duration) *flagValue[time.Duration] {
	return &flagValue[time.Duration]{
		dst: dst,
		parse: func(s string) (time.Duration, error) {
			d, err := time.ParseDuration(s)
			if err != nil || d < 0 || d%unit != 0 || d/unit > math.MaxUint16 {
				return 0, errUnwanted
			}
			return d, nil
		},
		format: time.Duration.String,
		kind:   "duration",
		want:   fmt.Sprintf("a multiple of %v up to %v", unit, math.MaxUint16*unit),
	}
}

// retryDelays is a flag for up to three times, separated by commas.
type retryDelays struct{ dst *[3]time.Duration }

func (v *retryDelays) String() string {
	if v.dst == nil || *v.dst == ([3]time.Duration{}) {
		return ""
	}
	return fmt.Sprintf("%v,%v,%v", v.dst[0], v.dst[1], v.dst[2])
}

func (v *retryDelays) Type() string { return "durations" }

func (v *retryDelays) Want() string {
	return "one to three times, " + multiple(nil, 100*time.Millisecond).want + ", separated by commas"
}

func (v *retryDelays) Set(s string) error {
	var delays [3]time.Duration
	for i, text := range strings.Split(s, ",") {
		if i >= len(delays) || multiple(&delays[i], 100*time.Millisecond).Set(text) != nil {
			return &rejected{want: v.Want(), why: errUnwanted}
		}
	}
	*v.dst = delays
	return nil
}

// bytesOf returns a flag for a size of at least 1.
func bytesOf(dst *int64) *flagValue[int64] {
	return &flagValue[int64]{
		dst: dst, kind: "size", want: "a size like 64MiB, up to 1PiB",
		parse: func(s string) (int64, error) {
			n, err := ParseSize(s)
			if err != nil {
				err = errUnwanted // ParseSize says no more
			}
			return n, err
		},
		format: func(n int64) string {
			if n == 0 {
				return ""
			}
			return ibytes(int(n))
		},
	}
}

// Complete checks the flags as a whole and fills in Address.
func (t *Target) Complete() error {
	if len(t.Subsystems)+len(t.Referrals) == 0 {
		return errors.New("-n/--nqn: no value is given; want the name of a subsystem")
	}
	for _, s := range t.Subsystems {
		for _, a := range s.Auth {
			if err := a.check(); err != nil {
				return err
			}
		}
	}
	if t.MaxIO&(t.MaxIO-1) != 0 {
		return fmt.Errorf("--max-io-size %q: want a power of two", ibytes(t.MaxIO))
	}
	if lo, hi := cmp.Or(t.MinID, 1), cmp.Or(t.MaxID, nvme.CNTLIDMax); lo > hi {
		return fmt.Errorf("--min-cntlid \"%d\": want at most --max-cntlid, %d", lo, hi)
	}
	if t.InCapsule == 0 {
		t.InCapsule = -1
	}
	t.Address = netip.AddrPortFrom(t.addr, t.port)
	return nil
}

// each is a flag that may be repeated. It takes its values in the order of the
// command line.
type each struct {
	kind, want string
	take       func(string) error
	all        []string
}

func (e *each) String() string { return strings.Join(e.all, " ") }

func (e *each) Type() string { return e.kind }

func (e *each) Want() string { return e.want }

func (e *each) Set(s string) error {
	if err := e.take(s); err != nil {
		if r := (*rejected)(nil); errors.As(err, &r) {
			return r
		}
		return &rejected{want: e.want, why: err}
	}
	e.all = append(e.all, s)
	return nil
}

// ReferralWords describe the address of a discovery service.
const ReferralWords = "ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, with port 4420 if none is given"

// ParseReferral parses the address of a discovery service.
func ParseReferral(text string) (netip.AddrPort, error) {
	to, err := netip.ParseAddrPort(text)
	if err != nil {
		var a netip.Addr
		if a, err = netip.ParseAddr(strings.Trim(text, "[]")); err != nil {
			return to, errUnwanted
		}
		to = netip.AddrPortFrom(a, DefaultPort)
	}
	if to.Port() == 0 || to.Addr().Zone() != "" {
		return to, errUnwanted
	}
	return netip.AddrPortFrom(to.Addr().Unmap(), to.Port()), checkUnicast(to.Addr(), "target")
}

func listenAddr(dst *netip.Addr) *flagValue[netip.Addr] {
	return &flagValue[netip.Addr]{
		dst: dst,
		parse: func(s string) (netip.Addr, error) {
			a, err := netip.ParseAddr(s)
			if err != nil || a.IsMulticast() {
				return a, errUnwanted
			}
			return a.Unmap(), nil
		},
		format: netip.Addr.String,
		kind:   "address", want: "an IPv4 or IPv6 address of this host, or 0.0.0.0 or :: for all",
	}
}

// inCapsuleSize returns a flag for a size that may also be 0.
func inCapsuleSize(dst *int) *flagValue[int] {
	v := size(dst, 16, 16, 16<<10)
	some := v.parse
	v.parse = func(s string) (int, error) {
		if s == "0" {
			return 0, nil
		}
		return some(s)
	}
	v.want = "0, or " + v.want
	return v
}
