package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/rdma/provider"
)

// addresses resolves the name of the target.
type addresses struct{}

func (addresses) Name() string { return "resolve" }

func (addresses) Look(ctx context.Context, m *Machine) Result {
	o := m.Options
	if o.Address == "" {
		return Result{}
	}
	var err error
	m.remote, err = o.Resolve(ctx)
	switch {
	case err != nil:
		return fail(exit.Unreachable, "check the name, and the name servers of this host", "%v", err)
	case !o.Named():
		return Result{}
	}
	return ok("%s is %v", o.Address, m.remote)
}

// route looks the target up in the routing table.
type route struct{}

func (route) Name() string { return "route" }

func (route) Look(_ context.Context, m *Machine) Result {
	var errs []error
	for _, remote := range m.remote {
		r, err := m.Route(remote, m.Options.SourceAddr)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", remote.Addr(), err))
			continue
		}
		m.way = &way{remote, r, provider.Choose(m.Options.Provider, remote.Addr(), r, nil)}
		return ok("%s by %s, from %s", remote.Addr(), r.Netdev, r.Source)
	}
	if len(errs) == 0 {
		return Result{}
	}
	return fail(exit.Unreachable, "check the address and the routes (ip route get "+m.remote[0].Addr().String()+")", "no route: %v", errors.Join(errs...))
}

// lost reports whether a target was given and no way to it is known, so that nothing on
// the way can be looked at.
func (m *Machine) lost() bool { return m.Options.Address != "" && m.way == nil }

// rdmaDevice looks for the RDMA device on the route.
type rdmaDevice struct{}

func (rdmaDevice) Name() string { return "rdma_device" }

func (d rdmaDevice) Look(_ context.Context, m *Machine) Result {
	devices := strings.Join(m.rdmaDevices(), ", ")
	switch {
	case m.lost():
		return Result{}
	case m.way == nil && devices == "" && m.Options.Provider == options.Verbs:
		return fail(exit.NoRDMA, "load the driver of the adapter, or use --provider roce", "this host has no RDMA device")
	case m.way == nil && devices == "":
		return ok("this host has none, and --provider roce needs none")
	case m.way == nil:
		return ok("this host has %s", devices)
	case m.way.choice.Name == options.RoCE:
		return ok("none is needed: --provider roce (%s)", m.way.choice.Reason)
	case m.way.RDMA == "":
		return fail(exit.NoRDMA, "load the driver of the adapter, or use --provider roce", "no RDMA device is on %s; this host has %s", m.way.Netdev, orNone(devices))
	}
	for _, module := range []struct{ name, node string }{{"ib_uverbs", "dev/infiniband/uverbs*"}, {"rdma_ucm", "dev/infiniband/rdma_cm"}} {
		if len(m.glob(module.node)) == 0 && (m.Options.LoadModules == "never" || !m.loadable(module.name)) {
			return fail(exit.NoRDMA, "modprobe "+module.name+", or use --provider roce", "%s is on %s, but there is no /%s", m.way.RDMA, m.way.Netdev, module.node)
		}
	}
	return ok("%s on %s", m.way.RDMA, m.way.Netdev)
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

const rdmaClass = "sys/class/infiniband"

// rdmaDevices are the names of the RDMA devices of this host.
func (m *Machine) rdmaDevices() (names []string) {
	for _, dir := range m.glob(rdmaClass + "/*") {
		names = append(names, path.Base(dir))
	}
	return names
}

// gid is an address of a port of an RDMA device.
type gid struct {
	port   string // directory
	index  int
	addr   netip.Addr
	kind   string // "RoCE v2", "IB/RoCE v1"
	netdev string
}

// gids are the addresses of an RDMA device.
func (m *Machine) gids(device string) (out []gid) {
	for _, name := range m.glob(path.Join(rdmaClass, device, "ports/*/gid_attrs/types/*")) {
		kind := m.read(name) // fails where the table is empty
		index, err := strconv.Atoi(path.Base(name))
		if kind == "" || err != nil {
			continue
		}
		port := path.Dir(path.Dir(path.Dir(name)))
		of := func(attribute string) string { return m.read(path.Join(port, attribute, strconv.Itoa(index))) }
		addr, err := netip.ParseAddr(of("gids"))
		if err == nil {
			out = append(out, gid{port, index, addr.Unmap(), kind, of("gid_attrs/ndevs")})
		}
	}
	return out
}

// place is a network device, with the RDMA device on it, if it is used.
type place struct{ netdev, rdma string }

// places are those on the way to the target, or all that have an RDMA device if no target is
// given.
func (m *Machine) places() (out []place) {
	if m.way != nil {
		p := place{netdev: m.way.Netdev}
		if m.way.choice.Name == options.Verbs {
			p.rdma = m.way.RDMA
		}
		return []place{p}
	}
	if m.lost() {
		return nil
	}
	for _, device := range m.rdmaDevices() {
		for _, g := range m.gids(device) {
			if p := (place{g.netdev, device}); g.netdev != "" && !slices.Contains(out, p) {
				out = append(out, p)
			}
		}
	}
	return out
}

// each looks at all places and returns the worst result, or that of all if they are fine.
func (m *Machine) each(look func(place) Result) Result {
	var all Result
	for _, p := range m.places() {
		r := look(p)
		switch {
		case r.Status == "":
		case all.Status == "", all.Status == OK && r.Status != OK, all.Status == Warn && r.Status == Fail:
			all = r
		case all.Status == OK && r.Status == OK:
			all.Finding += "; " + r.Finding
		}
	}
	return all
}

// linkState looks at the links of the network devices and of the ports of RDMA devices.
type linkState struct{}

func (linkState) Name() string { return "link" }

func (linkState) Look(_ context.Context, m *Machine) Result {
	return m.each(func(p place) Result {
		dev, err := m.Netdev(p.netdev)
		switch {
		case err != nil:
			return fail(exit.Unreachable, "", "%v", err)
		case dev.Flags&net.FlagUp == 0:
			return fail(exit.Unreachable, "ip link set "+p.netdev+" up", "%s is down", p.netdev)
		case dev.Flags&net.FlagRunning == 0:
			return fail(exit.Unreachable, "check the cable and the port of the switch", "%s has no carrier", p.netdev)
		case p.rdma == "":
			return ok("%s is up", p.netdev)
		}
		for _, g := range m.gids(p.rdma) {
			if state := m.read(g.port + "/state"); g.netdev == p.netdev && !strings.HasSuffix(state, " ACTIVE") {
				return fail(exit.NoRDMA, "check the cable and the port of the switch (rdma link)", "port %s of %s is %q, not active", path.Base(g.port), p.rdma, state)
			}
		}
		return ok("%s is up, and %s is active", p.netdev, p.rdma)
	})
}

// roceGID looks for an address of the RDMA device that RoCE v2 can use.
type roceGID struct{}

func (roceGID) Name() string { return "gid" }

const roceV2 = "RoCE v2"

func (roceGID) Look(_ context.Context, m *Machine) Result {
	return m.each(func(p place) Result {
		if p.rdma == "" || strings.HasPrefix(m.read(path.Join(rdmaClass, p.rdma, "node_type")), "4") { // RNIC: iWARP
			return Result{}
		}
		var others []string
		for _, g := range m.gids(p.rdma) {
			source := m.way != nil && g.addr == m.way.Source.WithZone("")
			switch {
			case m.read(g.port+"/link_layer") == "InfiniBand":
				return ok("%s is InfiniBand, which has no RoCE", p.rdma)
			case g.netdev != p.netdev:
			case g.kind == roceV2 && (source || m.way == nil && !g.addr.IsLinkLocalUnicast()):
				return ok("GID %d of %s is %s, %s", g.index, p.rdma, g.addr, g.kind)
			case source || m.way == nil:
				others = append(others, fmt.Sprintf("%s (%s)", g.addr, g.kind))
			}
		}
		of := "an address"
		if m.way != nil {
			of = m.way.Source.String()
		}
		if len(others) > 0 {
			return fail(exit.NoRDMA, "enable RoCE v2 at the adapter, or use --provider roce", "%s has no GID of %s of %s on %s, only %s", p.rdma, roceV2, of, p.netdev, strings.Join(others, ", "))
		}
		return fail(exit.NoRDMA, "use another source address (-w), or --provider roce", "%s has no GID of %s on %s", p.rdma, of, p.netdev)
	})
}

// mtu looks at the size of packets.
type mtu struct{}

func (mtu) Name() string { return "mtu" }

// roceOverhead is what the headers of a packet take of the MTU, rounded up.
const roceOverhead = 104

// payload is how many bytes of data the packets of RDMA carry, or 0.
func payload(mtu int) int {
	for _, size := range []int{4096, 2048, 1024, 512, 256} {
		if mtu >= size+roceOverhead {
			return size
		}
	}
	return 0
}

func (mtu) Look(_ context.Context, m *Machine) Result {
	const remedy = "set an MTU of 4200 or more on the whole path, to the target"
	return m.each(func(p place) Result {
		dev, err := m.Netdev(p.netdev)
		if err != nil {
			return Result{} // linkState has said so
		}
		switch size := payload(dev.MTU); {
		case size == 0:
			return fail(exit.Unreachable, remedy, "the MTU of %s is %d, too small for any packet of RDMA", p.netdev, dev.MTU)
		case size < 1024:
			return warn(remedy, "the MTU of %s is %d, so packets carry %d bytes of data", p.netdev, dev.MTU, size)
		case size < 4096:
			return ok("the MTU of %s is %d: packets carry %d bytes (4096 from an MTU of 4200 on)", p.netdev, dev.MTU, size)
		default:
			return ok("the MTU of %s is %d: packets carry %d bytes, if the whole path has it", p.netdev, dev.MTU, size)
		}
	})
}

// priorities compares --tos with the priorities that have flow control and congestion
// notification.
type priorities struct{}

func (priorities) Name() string { return "tos" }

func (priorities) Look(_ context.Context, m *Machine) Result {
	tos := m.Options.TOS
	dscp := tos >> 2
	if tos&3 != 0 {
		return warn(fmt.Sprintf("use --tos %d", tos&^3), "the two low bits of --tos %d are those of ECN, and do not count", tos)
	}
	return m.each(func(p place) Result {
		d, known, err := m.DCB(p.netdev)
		switch {
		case err != nil:
			return warn("", "%v", err)
		case !known:
			return ok("--tos %d is DSCP %d; the driver of %s shows no priorities", tos, dscp, p.netdev)
		}
		priority := d.DSCP[dscp]
		own := fmt.Sprintf("--tos %d (DSCP %d) has priority %d on %s", tos, dscp, priority, p.netdev)
		if d.PFC == 0 {
			return warn("enable PFC or ECN for the priority of RDMA, here and at the switch (dcb pfc)", "%s, and no priority has flow control", own)
		}
		if d.PFC&(1<<priority) == 0 {
			remedy := "map the DSCP to a priority with flow control (dcb app)"
			for _, other := range sortedDSCPs(d.DSCP) {
				if d.PFC&(1<<d.DSCP[other]) != 0 {
					remedy = fmt.Sprintf("use --tos %d", int(other)<<2)
					break
				}
			}
			return warn(remedy, "%s, which has no flow control; priorities that have it: %v", own, setBits(d.PFC))
		}
		for _, point := range []string{"roce_np", "roce_rp"} { // notification and reaction point, of some drivers
			if file := fmt.Sprintf("sys/class/net/%s/ecn/%s/enable/%d", p.netdev, point, priority); m.read(file) == "0" {
				return warn("echo 1 > /"+file, "%s, which has flow control and no ECN (%s)", own, point)
			}
		}
		return ok("%s, which has flow control", own)
	})
}

func sortedDSCPs(of map[uint8]uint8) (dscps []uint8) {
	for d := range of {
		dscps = append(dscps, d)
	}
	slices.Sort(dscps)
	return dscps
}

func setBits(mask uint8) (bits []int) {
	for i := range 8 {
		if mask&(1<<i) != 0 {
			bits = append(bits, i)
		}
	}
	return bits
}

// overUDP returns the local address of RoCEv2 in this process, if the way to the target uses
// it and leaves this host. Connections within a host choose their ports themselves.
func (m *Machine) overUDP() (local netip.AddrPort, used bool) {
	if m.way == nil || m.way.choice.Name != options.RoCE || m.way.Source.IsLoopback() || m.way.Source == m.way.remote.Addr() {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(m.way.Source, provider.UDPPort), true
}

// udpPort looks for somebody else who has the port of RoCEv2.
type udpPort struct{}

func (udpPort) Name() string { return "udp_port" }

func (udpPort) Look(_ context.Context, m *Machine) Result {
	local, used := m.overUDP()
	if !used {
		return Result{}
	}
	if h, taken := m.Holder(local); taken {
		return warn("use --provider verbs, or another source address (-w)",
			"UDP port %d of %s is taken by %v, so --provider roce can connect only to targets of this program", local.Port(), local.Addr(), h)
	}
	return ok("UDP port %d of %s is free", local.Port(), local.Addr())
}

// udpFilter looks for a packet filter of this host.
type udpFilter struct{}

func (udpFilter) Name() string { return "udp_filter" }

func (udpFilter) Look(ctx context.Context, m *Machine) Result {
	const remedy = "let UDP port 4791 in and out (nft list ruleset)"
	local, used := m.overUDP()
	if !used {
		return Result{}
	}
	switch err := m.Echo(ctx, local); {
	case err == nil:
		return ok("packets of this host to its own UDP port %d arrive", local.Port())
	case errors.Is(err, unix.EADDRINUSE):
		return Result{} // udpPort has said so
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fail(exit.Timeout, remedy, "a packet of this host to its own UDP port %d does not arrive", local.Port())
	case errors.Is(err, fs.ErrPermission):
		return fail(exit.Timeout, remedy, "the kernel refuses to send a packet to UDP port %d", local.Port())
	default:
		return warn("", "%v", err)
	}
}
