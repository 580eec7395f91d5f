package doctor

import (
	"context"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/process"
	"ublk-nvmeof/rdma/provider"
	"ublk-nvmeof/ublk"
)

// Machine is what checks look at, and through what.
type Machine struct {
	Options *options.Connect // as for a connect; Address and NQN may be empty
	Servers []control.Status // that run
	Release string           // of the kernel, as uname -r shows it
	FS      fs.FS            // of the machine

	IOUring  func() error // makes an io_uring
	Features func(context.Context) (ublk.Features, error)
	Admin    func() bool // the process may make block devices
	NBD      func() bool // the kernel has an NBD client, or can load one
	Limit    func(resource int) (unix.Rlimit, error)
	MayLock  func() bool // there is no limit of locked memory for the process
	Route    func(remote netip.AddrPort, source netip.Addr) (provider.Route, error)
	Netdev   func(name string) (*net.Interface, error)
	DCB      func(netdev string) (d host.DCB, ok bool, err error)
	Holder   func(netip.AddrPort) (host.Holder, bool)
	Echo     func(context.Context, netip.AddrPort) error // see host.TryUDP

	// What checks have found, for later ones.
	remote []netip.AddrPort // addresses of the target
	way    *way             // to the first of them that has a route
	probe  *probe
}

// way is how packets of this host get to the target.
type way struct {
	remote netip.AddrPort
	provider.Route
	choice provider.Choice
}

// This returns the machine that the process runs on.
func This(o *options.Connect, servers []control.Status) *Machine {
	var name unix.Utsname
	_ = unix.Uname(&name) // it cannot fail
	m := &Machine{
		Options: o, Servers: servers, Release: unix.ByteSliceToString(name.Release[:]), FS: os.DirFS("/"),
		IOUring: process.CheckIOUring, Features: ublk.GetFeatures, Admin: process.IsAdmin, MayLock: process.MayLock,
		Limit: func(resource int) (l unix.Rlimit, err error) { return l, unix.Getrlimit(resource, &l) },
		Route: provider.RouteTo, Netdev: net.InterfaceByName, DCB: host.ReadDCB, Holder: host.UDPHolder, Echo: host.TryUDP,
	}
	m.NBD = func() bool { return host.NBD.Present() || m.loadable("nbd") }
	return m
}

// text returns a file, or "" if it cannot be read.
func (m *Machine) text(name string) string {
	text, err := fs.ReadFile(m.FS, name)
	if err != nil {
		return ""
	}
	return string(text)
}

// read returns the first line of a file, or "" if it cannot be read.
func (m *Machine) read(name string) string {
	line, _, _ := strings.Cut(m.text(name), "\n")
	return strings.TrimSpace(line)
}

func (m *Machine) exists(name string) bool {
	_, err := fs.Stat(m.FS, name)
	return err == nil
}

// glob returns the names that match, sorted.
func (m *Machine) glob(pattern string) []string {
	names, err := fs.Glob(m.FS, pattern)
	if err != nil {
		return nil
	}
	slices.Sort(names)
	return names
}

// loaded reports whether a module is loaded, or built in with parameters.
func (m *Machine) loaded(module string) bool { return m.exists("sys/module/" + module) }

// loadable reports whether the kernel has a module that is not loaded, or has it built in.
func (m *Machine) loadable(module string) bool {
	dir := path.Join("lib/modules", m.Release)
	for _, list := range []string{"modules.dep", "modules.builtin"} {
		for line := range strings.Lines(m.text(path.Join(dir, list))) {
			file, _, _ := strings.Cut(strings.TrimSpace(line), ":")
			name, _, _ := strings.Cut(path.Base(file), ".ko")
			// A list can name files of a package that is not installed.
			if strings.ReplaceAll(name, "-", "_") == module && (list == "modules.builtin" || m.exists(path.Join(dir, file))) {
				return true
			}
		}
	}
	return false
}

// loops is how many loops, and so I/O queues at least, a server would have.
func (m *Machine) loops() int { return m.Options.Queues.Clip(runtime.NumCPU()).Loops() }

// end closes what checks have opened.
func (m *Machine) end() {
	if m.probe != nil {
		m.probe.end()
	}
}
