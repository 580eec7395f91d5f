package options

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"ublk-nvmeof/initiator"
)

// Path is a further address of the subsystem, with the local address from which to reach it.
type Path struct {
	Address netip.AddrPort
	Source  netip.Addr // zero: that of the route
}

// String returns the form that --path takes.
func (p Path) String() string {
	text := p.Address.Addr().String()
	if p.Address.Port() != DefaultPort || p.Source.IsValid() {
		text += "," + strconv.Itoa(int(p.Address.Port()))
	}
	if p.Source.IsValid() {
		text += "," + p.Source.String()
	}
	return text
}

const wantPath = "ADDRESS[,PORT[,HOST_TRADDR]] with numeric addresses"

// ParsePath parses ADDRESS[,PORT[,HOST_TRADDR]]. Without a port it is DefaultPort.
func ParsePath(s string) (Path, error) {
	words := strings.Split(s, ",")
	if len(words) > 3 {
		return Path{}, errUnwanted
	}
	address, err := netip.ParseAddr(words[0])
	if err != nil {
		return Path{}, notNumeric(words[0])
	}
	p := Path{Address: netip.AddrPortFrom(address.Unmap(), DefaultPort)}
	if err := checkUnicast(address, "target"); err != nil {
		return Path{}, err
	}
	if len(words) > 1 {
		port, err := strconv.ParseUint(words[1], 10, 16)
		if err != nil || port == 0 {
			return Path{}, fmt.Errorf("%q is no port, 1 to 65535", words[1])
		}
		p.Address = netip.AddrPortFrom(p.Address.Addr(), uint16(port))
	}
	if len(words) > 2 {
		source, err := netip.ParseAddr(words[2])
		if err != nil {
			return Path{}, notNumeric(words[2])
		}
		if err := checkUnicast(source, "host"); err != nil {
			return Path{}, err
		}
		p.Source = source.Unmap()
		if p.Source.Is4() != p.Address.Addr().Is4() {
			return Path{}, fmt.Errorf("%s and %s are of different families", p.Source, p.Address.Addr())
		}
	}
	return p, nil
}

func notNumeric(address string) error { return fmt.Errorf("%q is no numeric address", address) }

// CheckPath returns an error that says what is wrong with a path and what a flag for one accepts.
func CheckPath(s string) error {
	if _, err := ParsePath(s); err != nil {
		return &rejected{want: wantPath, why: err}
	}
	return nil
}

// paths is a flag that may be repeated. Its value in one argument has the paths separated by
// semicolons.
type paths struct{ dst *[]Path }

func (v paths) String() string {
	if v.dst == nil {
		return ""
	}
	return strings.Join(v.GetSlice(), ";")
}

// GetSlice returns the paths, each as --path takes it.
func (v paths) GetSlice() []string {
	var out []string
	for _, p := range *v.dst {
		out = append(out, p.String())
	}
	return out
}

func (paths) Type() string { return "path" }

// Want says what the flag accepts.
func (paths) Want() string { return wantPath }

func (v paths) Set(s string) error {
	for word := range strings.SplitSeq(s, ";") {
		p, err := ParsePath(word)
		if err != nil {
			return &rejected{want: wantPath, why: err}
		}
		if slices.Contains(*v.dst, p) {
			continue
		}
		if len(*v.dst) == initiator.MaxPaths-1 { // the first path is not among them
			return &rejected{want: fmt.Sprintf("at most %d paths besides the first", len(*v.dst)), why: errUnwanted}
		}
		*v.dst = append(*v.dst, p)
	}
	return nil
}

// Values of --fence.
const (
	FenceAuto = "auto"
	FenceNone = "none"
)

// policy is the flag for the policy.
func policy(dst *initiator.Policy) *flagValue[initiator.Policy] {
	return &flagValue[initiator.Policy]{
		dst: dst, parse: func(s string) (initiator.Policy, error) {
			p, err := initiator.ParsePolicy(s)
			if err != nil {
				return p, errUnwanted
			}
			return p, nil
		},
		format: initiator.Policy.String, kind: "policy", want: "queue-depth, round-robin or preferred",
	}
}

// preferred is the flag for the preferred path.
func preferred(dst *Path) *flagValue[Path] {
	return &flagValue[Path]{
		dst: dst, parse: ParsePath, kind: "path", want: wantPath,
		format: func(p Path) string {
			if !p.Address.IsValid() {
				return ""
			}
			return p.String()
		},
	}
}

// without returns args without the given flags, which must have their values in the same argument.
func without(args []string, flags ...string) []string {
	return slices.DeleteFunc(slices.Clone(args), func(a string) bool {
		name, _, _ := strings.Cut(a, "=")
		return slices.Contains(flags, name)
	})
}

// WithPolicy returns arguments that make a connection with another policy than args. Without a
// preferred path it is the first.
func WithPolicy(args []string, p initiator.Policy, preferred Path) []string {
	out := append(without(args, "--policy", "--preferred"), "--policy="+p.String())
	if preferred.Address.IsValid() {
		out = append(out, "--preferred="+preferred.String())
	}
	return out
}

// WithPaths returns arguments that make a connection with other paths than args: the first is
// the address of the target.
func WithPaths(args []string, all []Path) []string {
	out := without(args, "--path", "--traddr", "--trsvcid", "--host-traddr", "--host-iface")
	first := all[0]
	out = append(out, "--traddr="+first.Address.Addr().String(), "--trsvcid="+strconv.Itoa(int(cmp.Or(first.Address.Port(), DefaultPort))))
	if first.Source.IsValid() {
		out = append(out, "--host-traddr="+first.Source.String())
	}
	if further := all[1:]; len(further) > 0 {
		out = append(out, "--path="+paths{&further}.String())
	}
	return out
}
