package discovery

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"ublk-nvmeof/nvme"
)

// Entry is an entry of a discovery log.
type Entry struct {
	nvme.DiscoveryEntry
	Attributes []nvme.ExtendedAttribute // of an entry in an extended log
}

// Endpoint is a subsystem at one address of the RDMA transport.
type Endpoint struct {
	Address netip.AddrPort
	NQN     string
}

// String returns the address and the NQN.
func (e Endpoint) String() string { return e.Address.String() + " " + e.NQN }

// NQN returns the name of the subsystem. Some services pad it with spaces.
func (e *Entry) NQN() string { return strings.TrimRight(e.SUBNQN(), " ") }

// Check reports why the entry cannot be used to connect. The error names the field.
func (e *Entry) Check() error {
	_, err := e.Endpoint()
	return err
}

// Endpoint returns where the entry leads to. The error names the field that is wrong, or
// says that the transport is not RDMA.
func (e *Entry) Endpoint() (Endpoint, error) {
	switch e.SUBTYPE() {
	case nvme.SubsystemReferral, nvme.SubsystemNVMe, nvme.SubsystemCurrentDiscovery:
	default:
		return Endpoint{}, fmt.Errorf("subsystem type %d: want 1, 2 or 3", e.SUBTYPE())
	}
	if t := e.TRTYPE(); t != nvme.TransportRDMA {
		return Endpoint{}, fmt.Errorf("transport %s (%d): want rdma", t, uint8(t))
	}
	nqn := e.NQN()
	if err := nvme.ValidateNQN(nqn); err != nil {
		return Endpoint{}, fmt.Errorf("subsystem NQN %q: %w", nqn, err)
	}
	address, err := netip.ParseAddr(e.TRADDR())
	switch {
	case err != nil:
		return Endpoint{}, fmt.Errorf("address %q: want an IP address", e.TRADDR())
	case e.ADRFAM() == nvme.AddressIPv4 && !address.Is4(), e.ADRFAM() == nvme.AddressIPv6 && !address.Is6():
		return Endpoint{}, fmt.Errorf("address %s: want one of the family %s", address, e.ADRFAM())
	case e.ADRFAM() != nvme.AddressIPv4 && e.ADRFAM() != nvme.AddressIPv6:
		return Endpoint{}, fmt.Errorf("address family %s (%d): want ipv4 or ipv6", e.ADRFAM(), uint8(e.ADRFAM()))
	case address.IsUnspecified(), address.IsMulticast():
		return Endpoint{}, fmt.Errorf("address %s: want the address of a host", address)
	}
	port, err := strconv.ParseUint(e.TRSVCID(), 10, 16)
	if err != nil || port == 0 {
		return Endpoint{}, fmt.Errorf("transport service id %q: want a port, 1 to 65535", e.TRSVCID())
	}
	return Endpoint{netip.AddrPortFrom(address.Unmap(), uint16(port)), nqn}, nil
}

// Key identifies an entry among those of a service, whatever else changes in it.
type Key struct {
	Transport nvme.TransportType
	Family    nvme.AddressFamily
	Subtype   nvme.SubsystemType
	Port      uint16
	Address   string
	Service   string
	NQN       string
}

// Key returns the identity of the entry.
func (e *Entry) Key() Key {
	return Key{e.TRTYPE(), e.ADRFAM(), e.SUBTYPE(), e.PORTID(), e.TRADDR(), e.TRSVCID(), e.NQN()}
}

// Diff returns the entries that are in only one of two logs of a service.
func Diff(before, after []Entry) (appeared, vanished []Entry) {
	return without(after, before), without(before, after)
}

// without returns the entries of a whose keys are not in b.
func without(a, b []Entry) (out []Entry) {
	have := make(map[Key]bool, len(b))
	for i := range b {
		have[b[i].Key()] = true
	}
	for i := range a {
		if !have[a[i].Key()] {
			out = append(out, a[i])
		}
	}
	return out
}
