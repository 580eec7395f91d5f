package options

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// chooseSource makes SourceAddr an address of HostIface, if that and the target are given:
// the first one of the family and the scope of the target's address.
func (c *Connect) chooseSource() error {
	if c.HostIface == "" || c.Address == "" {
		return nil
	}
	own, err := interfaceAddrs(c.HostIface)
	if err != nil {
		return fmt.Errorf("-f/--host-iface %q: %w", c.HostIface, err)
	}
	remote, err := netip.ParseAddr(c.Address)
	named := err != nil
	for _, a := range own {
		switch {
		case c.SourceAddr.IsValid():
			if a.WithZone("") == c.SourceAddr.Unmap().WithZone("") {
				return nil
			}
		case named && !a.IsLinkLocalUnicast(),
			!named && a.Is4() == remote.Unmap().Is4() && a.IsLinkLocalUnicast() == remote.Unmap().IsLinkLocalUnicast():
			c.SourceAddr = a
			return nil
		}
	}
	if c.SourceAddr.IsValid() {
		return fmt.Errorf("-f/--host-iface %q: it does not have the address %s of -w/--host-traddr, only %v", c.HostIface, c.SourceAddr, own)
	}
	return fmt.Errorf("-f/--host-iface %q: none of its addresses %v suits %s", c.HostIface, own, c.Address)
}

// interfaceAddrs are the addresses of an interface, IPv4 first.
func interfaceAddrs(name string) ([]netip.Addr, error) {
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, i := range all {
		if i.Name != name {
			names = append(names, i.Name)
			continue
		}
		found, err := i.Addrs()
		if err != nil {
			return nil, err
		}
		var v4, v6 []netip.Addr
		for _, f := range found {
			p, err := netip.ParsePrefix(f.String())
			switch a := p.Addr().Unmap(); {
			case err != nil:
			case a.Is4():
				v4 = append(v4, a)
			case a.IsLinkLocalUnicast():
				v6 = append(v6, a.WithZone(name))
			default:
				v6 = append(v6, a)
			}
		}
		return append(v4, v6...), nil
	}
	return nil, fmt.Errorf("there is no such interface; want one of %s", strings.Join(names, ", "))
}
