package output

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
)

// hostTree is a host with the subsystems that it is connected to.
type hostTree struct {
	nqn, id    string
	subsystems []*subsystemTree
}

// subsystemTree is a subsystem with the servers that are connected to it.
type subsystemTree struct {
	name    string
	nqn     string
	servers []control.Status
}

// tree sorts servers by host and subsystem, each in the order in which it comes first.
func tree(servers []control.Status) []*hostTree {
	var hosts []*hostTree
	subsystems := 0
	for _, s := range servers {
		h := find(hosts, func(h *hostTree) bool {
			return h.nqn == s.HostNQN && (h.id == s.HostID || h.id == "" || s.HostID == "")
		})
		if h == nil {
			h = &hostTree{nqn: s.HostNQN}
			hosts = append(hosts, h)
		}
		if h.id == "" {
			h.id = s.HostID // which a server that has died does not tell
		}
		sub := find(h.subsystems, func(t *subsystemTree) bool { return t.nqn == s.NQN })
		if sub == nil {
			sub = &subsystemTree{name: fmt.Sprintf("subsys%d", subsystems), nqn: s.NQN}
			subsystems++
			h.subsystems = append(h.subsystems, sub)
		}
		sub.servers = append(sub.servers, s)
	}
	return hosts
}

func find[T any](all []*T, match func(*T) bool) *T {
	if i := slices.IndexFunc(all, match); i >= 0 {
		return all[i]
	}
	return nil
}

// orNull is a JSON string, or null if it is empty.
func orNull(s string) any {
	if s == "" {
		return nil
	}
	return s
}

// Subsystems writes the subsystems with the paths to them, as nvme list-subsys.
func Subsystems(w io.Writer, servers []control.Status, format string) error {
	if format == JSON {
		return writeJSON(w, subsystemsJSON(servers, "Paths", paths))
	}
	return writeTree(w, servers, func(w io.Writer, sub *subsystemTree) {
		for _, s := range sub.servers {
			for _, p := range pathsOf(s) {
				fmt.Fprintf(w, " +- %s\n", pathText(s, p))
			}
		}
	})
}

// Topology writes the subsystems with their namespaces and the path to each, as nvme
// show-topology.
func Topology(w io.Writer, servers []control.Status, format string) error {
	if format == JSON {
		return writeJSON(w, subsystemsJSON(servers, "Namespaces", namespaces))
	}
	return writeTree(w, servers, func(w io.Writer, sub *subsystemTree) {
		for _, s := range sub.servers {
			for _, d := range s.Devices {
				fmt.Fprintf(w, " +- ns %d %s\n \\\n", d.NSID, d.Path())
				for _, p := range pathsOf(s) {
					fmt.Fprintf(w, "  +- %s\n", strings.TrimSpace(pathText(s, p)+" "+p.ANA[fmt.Sprint(d.NSID)]))
				}
			}
		}
	})
}

// pathsOf returns the paths of a server. One that has died, or that is of an older build, tells
// only its address.
func pathsOf(s control.Status) []control.Path {
	if len(s.Paths) > 0 {
		return s.Paths
	}
	return []control.Path{{TrAddr: s.TrAddr, TrSvcID: s.TrSvcID, HostTrAddr: s.HostTrAddr, State: s.State}}
}

// pathAddress returns the address of a path as nvme-cli writes it.
func pathAddress(s control.Status, p control.Path) string {
	s.TrAddr, s.TrSvcID, s.HostTrAddr = p.TrAddr, p.TrSvcID, p.HostTrAddr
	return Address(s)
}

// pathText is one path for people.
func pathText(s control.Status, p control.Path) string {
	return strings.TrimSpace(fmt.Sprintf("%s %s %s %s", s.Name, s.Transport, pathAddress(s, p), p.State))
}

func writeTree(w io.Writer, servers []control.Status, below func(io.Writer, *subsystemTree)) error {
	first := true
	for _, h := range tree(printable(servers)) {
		for _, sub := range h.subsystems {
			if !first {
				fmt.Fprintln(w)
			}
			first = false
			if _, err := fmt.Fprintf(w, "%s - NQN=%s\n%*s   hostnqn=%s\n\\\n", sub.name, sub.nqn, len(sub.name), "", h.nqn); err != nil {
				return err
			}
			below(w, sub)
		}
	}
	return nil
}

// subsystemsJSON is the array of hosts of nvme-cli, with one member of each subsystem.
func subsystemsJSON(servers []control.Status, name string, below func(*subsystemTree) []object) []object {
	out := []object{}
	for _, h := range tree(servers) {
		list := []object{}
		for _, sub := range h.subsystems {
			list = append(list, object{{name: "Name", value: sub.name}, {name: "NQN", value: sub.nqn}, {name: name, value: below(sub)}})
		}
		out = append(out, object{{name: "HostNQN", value: h.nqn}, {name: "HostID", value: orNull(h.id)}, {name: "Subsystems", value: list}})
	}
	return out
}

func paths(sub *subsystemTree) []object {
	out := []object{}
	for _, s := range sub.servers {
		for _, p := range pathsOf(s) {
			out = append(out, path(s, p))
		}
	}
	return out
}

// path is a path with the fields of nvme-cli and, after these, fields of this program. All of
// them are text, because there are programs that read a path as a map of strings (dell/gonvme).
func path(s control.Status, p control.Path) object {
	var states []string
	for _, nsid := range slices.Sorted(maps.Keys(p.ANA)) {
		states = append(states, nsid+" "+p.ANA[nsid])
	}
	return object{
		{name: "Name", value: s.Name}, {name: "Transport", value: s.Transport},
		{name: "Address", value: pathAddress(s, p)}, {name: "State", value: p.State},
		{name: "Cntlid", value: fmt.Sprint(p.CNTLID)}, {name: "ANAStates", value: strings.Join(states, ", ")}, {name: "Preferred", value: fmt.Sprint(p.Preferred)},
		{name: "InFlight", value: fmt.Sprint(p.InFlight)}, {name: "Failovers", value: fmt.Sprint(p.Failovers)}, {name: "Held", value: fmt.Sprint(p.Held)},
		{name: "VouchesFor", value: strings.Join(p.Vouched, " ")}, {name: "LastError", value: p.LastError},
	}
}

func namespaces(sub *subsystemTree) []object {
	out := []object{}
	for _, s := range sub.servers {
		for _, d := range s.Devices {
			var controllers []object
			for _, p := range pathsOf(s) {
				controllers = append(controllers, path(s, p))
			}
			out = append(out, object{{name: "NSID", value: d.NSID}, {name: "Controller", value: controllers}})
		}
	}
	return out
}

// hostList is the nested list of nvme list -v. The namespaces are those of controllers, as
// those of a kernel that does not combine the paths to a namespace.
func hostList(servers []control.Status) []object {
	out := []object{}
	for _, h := range tree(servers) {
		list := []object{}
		for _, sub := range h.subsystems {
			controllers := []object{}
			for _, s := range sub.servers {
				controllers = append(controllers, controller(s))
			}
			list = append(list, object{
				{name: "Subsystem", value: sub.name}, {name: "SubsystemNQN", value: sub.nqn},
				{name: "Controllers", value: controllers}, {name: "Namespaces", value: []object{}},
			})
		}
		out = append(out, object{{name: "HostNQN", value: h.nqn}, {name: "HostID", value: orNull(h.id)}, {name: "Subsystems", value: list}})
	}
	return out
}

func controller(s control.Status) object {
	list := []object{}
	for _, d := range s.Devices {
		list = append(list, append(object{
			{name: "NameSpace", value: d.Device}, {name: "Generic"}, {name: "NSID", value: d.NSID},
		}, sizes(d)...))
	}
	var cntlid any
	if s.Model != "" { // it has connected
		cntlid = fmt.Sprint(s.CNTLID)
	}
	return object{
		{name: "Controller", value: s.Name}, {name: "Cntlid", value: cntlid}, {name: "SerialNumber", value: orNull(s.Serial)},
		{name: "ModelNumber", value: orNull(s.Model)}, {name: "Firmware", value: orNull(s.Firmware)},
		{name: "Transport", value: s.Transport}, {name: "Address", value: Address(s)}, {name: "Slot"},
		{name: "Namespaces", value: list}, {name: "Paths", value: []object{}},
	}
}

// sizes are the sizes of a device as nvme-cli names them; null if they are not known.
func sizes(d control.Device) object {
	if d.BlockSize == 0 {
		return object{{name: "UsedBytes"}, {name: "MaximumLBA"}, {name: "PhysicalSize"}, {name: "SectorSize"}}
	}
	var used any
	if d.Used != nil {
		used = *d.Used
	}
	return object{
		{name: "UsedBytes", value: used}, {name: "MaximumLBA", value: d.Size / uint64(d.BlockSize)},
		{name: "PhysicalSize", value: d.Size}, {name: "SectorSize", value: d.BlockSize},
	}
}
