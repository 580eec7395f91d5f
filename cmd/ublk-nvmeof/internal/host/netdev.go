package host

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/Mellanox/rdmamap"
)

// Route is the network device through which a target is reached.
type Route struct {
	Source netip.Addr // address of this host
	Netdev string     // that has it
	RDMA   string     // RDMA device on it; empty if there is none
}

// RouteTo looks a target up in the routing table. It sends nothing. source may be
// zero.
func RouteTo(remote netip.AddrPort, source netip.Addr) (Route, error) {
	var local *net.UDPAddr
	if source.IsValid() {
		local = net.UDPAddrFromAddrPort(netip.AddrPortFrom(source, 0))
	}
	c, err := net.DialUDP("udp", local, net.UDPAddrFromAddrPort(remote))
	if err != nil {
		return Route{}, err
	}
	defer c.Close()
	addr, ok := netip.AddrFromSlice(c.LocalAddr().(*net.UDPAddr).IP)
	if !ok {
		return Route{}, fmt.Errorf("route to %s: no source address", remote)
	}
	netdev, err := owner(addr.Unmap())
	if err != nil {
		return Route{}, err
	}
	// If there is none, the library returns an error or an empty name. It has no other
	// errors that matter here.
	dev, _ := rdmamap.GetRdmaDeviceForNetdevice(netdev)
	return Route{Source: addr.Unmap(), Netdev: netdev, RDMA: dev}, nil
}

// RDMADevices returns the names of the RDMA devices of this host.
func RDMADevices() []string { return rdmamap.GetRdmaDeviceList() }

// owner returns the name of the network device that has an address.
func owner(addr netip.Addr) (string, error) {
	devs, err := net.Interfaces()
	if err != nil {
		return "", fmt.Errorf("list network devices: %w", err)
	}
	for _, dev := range devs {
		addrs, err := dev.Addrs()
		if err != nil {
			continue // gone since
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok {
				if own, ok := netip.AddrFromSlice(n.IP); ok && own.Unmap() == addr {
					return dev.Name, nil
				}
			}
		}
	}
	return "", fmt.Errorf("no network device has the address %s", addr)
}
