package provider

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
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
	return Route{Source: addr.Unmap(), Netdev: netdev, RDMA: deviceOn("/sys/class/infiniband", netdev)}, nil
}

// devices returns the names of the RDMA devices of this host.
func devices() []string {
	entries, _ := os.ReadDir("/sys/class/infiniband") // without the directory there are none
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// deviceOn returns the RDMA device of which a port has an address (GID) of a network device,
// or "". dir is where the kernel describes RDMA devices.
func deviceOn(dir, netdev string) string {
	ndevs, _ := filepath.Glob(filepath.Join(dir, "*/ports/*/gid_attrs/ndevs/*"))
	for _, file := range ndevs {
		name, err := os.ReadFile(file)
		if err == nil && strings.TrimSpace(string(name)) == netdev { // an unused entry is an error
			device, _ := filepath.Rel(dir, file)
			first, _, _ := strings.Cut(device, "/")
			return first
		}
	}
	return ""
}

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
