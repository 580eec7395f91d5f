package provider

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Route is the network device through which a target is reached.
type Route struct {
	Source netip.Addr // address of this host
	Netdev string     // that has it
	RDMA   string     // RDMA device on it; empty if there is none
}

// described is where the kernel describes RDMA devices.
const described = "/sys/class/infiniband"

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
	return Route{Source: addr.Unmap(), Netdev: netdev, RDMA: deviceOn(described, netdev)}, nil
}

// devices returns the names of the RDMA devices of this host.
func devices() []string { return entries(described) }

// deviceOn returns the RDMA device of which a port has an address (GID) of a network device,
// or "". dir is where the kernel describes RDMA devices.
func deviceOn(dir, netdev string) string {
	for _, device := range entries(dir) {
		ports := filepath.Join(dir, device, "ports")
		for _, port := range entries(ports) {
			if hasAddressOf(filepath.Join(ports, port, "gid_attrs/ndevs"), netdev) {
				return device
			}
		}
	}
	return ""
}

// maxAddresses is the largest number of entries that a port's table of addresses has: they are
// numbered with 16 bits.
const maxAddresses = 1 << 16

// hasAddressOf reports whether a port's table of addresses names a network device. It does not
// list the table, which can have more than a thousand entries: usually the first one is enough.
func hasAddressOf(table, netdev string) bool {
	for i := range maxAddresses {
		name, err := os.ReadFile(filepath.Join(table, strconv.Itoa(i)))
		switch {
		case err == nil && strings.TrimSpace(string(name)) == netdev:
			return true
		case errors.Is(err, fs.ErrNotExist):
			return false
		} // an unused entry is another error
	}
	return false
}

// entries returns the names in a directory of the kernel, or nothing if it does not exist.
func entries(dir string) []string {
	all, _ := os.ReadDir(dir)
	var names []string
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
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
