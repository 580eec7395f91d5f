package doctor

import (
	"context"
	"io/fs"
	"slices"
	"strings"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// hostIdentity compares the host NQN and the host id of this host with each other, and with
// those that connections of this machine have.
type hostIdentity struct{}

func (hostIdentity) Name() string { return "host_identity" }

func (hostIdentity) Look(_ context.Context, m *Machine) Result {
	nqn, id := m.Options.HostNQN, m.Options.HostID.String()
	const remedy = "use one pair everywhere: /etc/nvme/hostnqn and /etc/nvme/hostid"
	for _, used := range m.identities() {
		if (used.nqn == nqn) != strings.EqualFold(used.id, id) {
			return fail(exit.Other, remedy, "%s has host NQN %s and host id %s, and the next connection would have %s and %s; targets take that for an error or for two hosts",
				used.who, used.nqn, used.id, nqn, id)
		}
	}
	if len(m.Options.Warnings) > 0 {
		return warn(remedy, "%s", strings.Join(m.Options.Warnings, "; "))
	}
	return ok("%s, host id %s", nqn, id)
}

// used is an identity that a connection has.
type used struct{ who, nqn, id string }

// identities are those of the servers and of the controllers of the kernel's initiator.
func (m *Machine) identities() (out []used) {
	for _, s := range m.Servers {
		if s.HostID != "" {
			out = append(out, used{s.Name, s.HostNQN, s.HostID})
		}
	}
	for _, dir := range m.glob("sys/class/nvme/nvme*") {
		c := used{"the kernel's " + strings.TrimPrefix(dir, "sys/class/nvme/"), m.read(dir + "/hostnqn"), m.read(dir + "/hostid")}
		if c.nqn != "" && c.id != "" { // local devices have none
			out = append(out, c)
		}
	}
	return out
}

// clonedIdentity looks for an identity that other machines have as well.
type clonedIdentity struct{}

func (clonedIdentity) Name() string { return "host_clone" }

// commonIDs are placeholders that many machines have in their firmware.
var commonIDs = []string{"03000200-0400-0500-0006-000700080009", "00020003-0004-0005-0006-000700080009"}

func (clonedIdentity) Look(_ context.Context, m *Machine) Result {
	const remedy = "give this machine an identity of its own: ublk-nvmeof gen-hostnqn > /etc/nvme/hostnqn, and its UUID in /etc/nvme/hostid"
	id := m.Options.HostID.String()
	if slices.Contains(commonIDs, id) {
		return fail(exit.Other, remedy, "host id %s is a placeholder that the firmware of many machines has", id)
	}
	// A machine that is made of an image gets a new machine id, and keeps the files of NVMe.
	born := m.modified("etc/machine-id")
	for _, f := range []struct{ name, value string }{{"etc/nvme/hostid", id}, {"etc/nvme/hostnqn", m.Options.HostNQN}} {
		made := m.modified(f.name)
		if !born.IsZero() && !made.IsZero() && made.Before(born) && strings.EqualFold(m.read(f.name), f.value) {
			return warn(remedy, "/%s is older than /etc/machine-id, so it may come from an image that other machines were made of", f.name)
		}
	}
	return ok("nothing suggests that another machine has this identity")
}

// modified returns the time of a file, or the zero time.
func (m *Machine) modified(name string) time.Time {
	info, err := fs.Stat(m.FS, name)
	if err != nil {
		return time.Time{}
	}
	return info.ModTime()
}
