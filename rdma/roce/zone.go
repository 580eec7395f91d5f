package roce

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// A link-local IPv6 address has a meaning on one network only, which its zone names. In
// this package, the zone is always the number of the interface, so that addresses can be
// compared. In packets the zone is separate from the addresses (arrival.scope).

// canonical returns the address with the zone that this package uses: none, or a number.
// It returns an error if the address needs a zone and has none.
func canonical(a netip.Addr) (netip.Addr, error) {
	a = a.Unmap()
	if !a.Is6() || !a.IsLinkLocalUnicast() {
		return a.WithZone(""), nil // other addresses need no zone
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

// withScope returns a link-local address with its zone, and other addresses without one.
func withScope(a netip.Addr, scope uint32) netip.Addr {
	if scope == 0 || !a.Is6() || !a.IsLinkLocalUnicast() {
		return a.WithZone("")
	}
	return a.WithZone(strconv.FormatUint(uint64(scope), 10))
}

// scopeOf returns the interface of a canonical address, or 0 if it needs none.
func scopeOf(a netip.Addr) uint32 {
	if a.Zone() == "" { // the error of ParseUint would allocate
		return 0
	}
	n, _ := strconv.ParseUint(a.Zone(), 10, 32) // it is canonical
	return uint32(n)
}

// named returns a canonical address for callers: its zone is the interface's name, if the
// interface still exists.
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
