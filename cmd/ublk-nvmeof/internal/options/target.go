package options

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/pflag"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/target"
)

// Target is what a target serves, and how.
type Target struct {
	Address    netip.AddrPort // to listen on
	Provider   string
	InCapsule  int // bytes of in-capsule data, < 0: none
	QueueSize  int
	MaxIO      int // bytes per command
	Subsystems []Subsystem
	Faults     []string // see FaultWords

	addr netip.Addr
	port uint16
}

// Subsystem is a subsystem of a target.
type Subsystem struct {
	NQN        string
	MaxQueues  int      // I/O queues per controller
	AllowHosts []string // none: any
	Namespaces []Namespace
}

// DefaultTarget is what holds without any flag.
func DefaultTarget() *Target {
	return &Target{
		addr: netip.AddrFrom4([4]byte{127, 0, 0, 1}), port: defaultPort, Provider: AutoProvider,
		InCapsule: target.DefaultInCapsule, QueueSize: target.DefaultQueueSize, MaxIO: target.DefaultMaxTransfer,
	}
}

// AddFlags defines the flags of target. Those about a subsystem are about the
// one that the last --nqn before them names.
func (t *Target) AddFlags(f *pflag.FlagSet) {
	f.SortFlags = false
	f.VarP(listenAddr(&t.addr), "traddr", "a", "address to listen on")
	f.VarP(number(&t.port, 1, 65535, "a port"), "trsvcid", "s", "port to listen on")
	f.Var(OneOf(&t.Provider, AutoProvider, Verbs, RoCE), "provider", "how RDMA is done: verbs uses an RDMA device, roce is RoCEv2 over UDP without one; auto takes verbs if a device has the address")
	f.Var(number(&t.QueueSize, 16, 1024, "a number"), "queue-size", "largest number of entries of an I/O queue")
	f.Var(inCapsuleSize(&t.InCapsule), "in-capsule-size", "largest write whose data travels with the command; 0 for none")
	f.Var(size(&t.MaxIO, target.DefaultMaxTransfer>>8, target.DefaultMaxTransfer>>8, target.DefaultMaxTransfer), "max-io-size", "size of the largest read or write, a power of two")

	last := func(flag string, set func(*Subsystem, string) error) func(string) error {
		return func(text string) error {
			if len(t.Subsystems) == 0 {
				return fmt.Errorf("--%s is about the subsystem of the --nqn before it, and there is none", flag)
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
	}}, "nqn", "n", "NQN of a subsystem; repeat it for several, each followed by its own flags of those below")
	f.Var(&each{kind: "namespace", want: NamespaceWords, take: last("namespace", func(s *Subsystem, text string) error {
		n, err := ParseNamespace(text)
		s.Namespaces = append(s.Namespaces, n)
		return err
	})}, "namespace", "namespace of the subsystem: "+NamespaceWords)
	f.Var(&each{kind: "nqn", want: "the name of a host", take: last("allow-host", func(s *Subsystem, nqn string) error {
		s.AllowHosts = append(s.AllowHosts, nqn)
		return nvme.ValidateNQN(nqn)
	})}, "allow-host", "NQN of a host that may connect to the subsystem (default: any host)")
	f.Var(&each{kind: "number", want: fmt.Sprintf("a number, 1 to %d", nvme.MaxQueues), take: last("max-queues", func(s *Subsystem, text string) error {
		return number(&s.MaxQueues, 1, nvme.MaxQueues, "a number").Set(text)
	})}, "max-queues", fmt.Sprintf("largest number of I/O queues of a controller of the subsystem (default %d)", target.DefaultMaxQueues))
	f.Var(&each{kind: "fault", want: FaultWords, take: func(text string) error {
		_, err := ParseFault(text)
		t.Faults = append(t.Faults, text)
		return err
	}}, "fault", "fault that is set from the start: "+FaultWords)
}

// Complete checks what no single flag can.
func (t *Target) Complete() error {
	if len(t.Subsystems) == 0 {
		return errors.New("-n/--nqn: no value is given; want the name of a subsystem")
	}
	if t.MaxIO&(t.MaxIO-1) != 0 {
		return fmt.Errorf("--max-io-size %q: want a power of two", ibytes(t.MaxIO))
	}
	if t.InCapsule == 0 {
		t.InCapsule = -1
	}
	t.Address = netip.AddrPortFrom(t.addr, t.port)
	return nil
}

// each is a flag that takes every value that it is given, in the order of the
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

// inCapsuleSize is size with 0.
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
