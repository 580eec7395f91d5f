package roce

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// A link-local address of IPv6 means something on one network only, which its zone names. In
// this package the zone is the number of the interface, whatever the caller wrote, so that
// addresses can be compared; packets have it apart from their addresses (arrival.scope).

// canonical gives an address the zone that this package uses: none, or a number. An address
// that needs a zone and has none is an error.
func canonical(a netip.Addr) (netip.Addr, error) {
	a = a.Unmap()
	if !a.Is6() || !a.IsLinkLocalUnicast() {
		return a.WithZone(""), nil // elsewhere it says nothing
	}
	zone := a.Zone()
	if zone == "" {
		return a, fmt.Errorf("link-local address %s needs the interface, as in %s%%eth0: %w", a, a, unix.EINVAL)
	}
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil && n > 0 {
		return withScope(a, uint32(n)), nil
	}
	i, err := net.InterfaceByName(zone)
	if err != nil {
		return a, fmt.Errorf("no interface %q of %q: %w", zone, a.String(), unix.ENODEV)
	}
	return withScope(a, uint32(i.Index)), nil
}

// withScope gives a link-local address its zone, and others none.
func withScope(a netip.Addr, scope uint32) netip.Addr {
	if scope == 0 || !a.Is6() || !a.IsLinkLocalUnicast() {
		return a.WithZone("")
	}
	return a.WithZone(strconv.FormatUint(uint64(scope), 10))
}

// scopeOf is the interface of a canonical address; 0 if it needs none.
func scopeOf(a netip.Addr) uint32 {
	if a.Zone() == "" { // an error would cost memory
		return 0
	}
	n, _ := strconv.ParseUint(a.Zone(), 10, 32) // it is canonical
	return uint32(n)
}

// named gives the zone of a canonical address the interface's name, if it still has one: what
// callers see.
func named(a netip.Addr) netip.Addr {
	scope := scopeOf(a)
	if scope == 0 {
		return a
	}
	i, err := net.InterfaceByIndex(int(scope))
	if err != nil {
		return a
	}
	return a.WithZone(i.Name)
}
