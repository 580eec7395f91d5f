package targetserver

import (
	"os"
	"slices"
	"strconv"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/target"
)

// status returns the status of the target.
func (s *server) status() Status {
	snap := s.target.Snapshot()
	addr := s.target.Ports()[0].Addr()
	out := Status{
		SchemaVersion: SchemaVersion, Name: s.place.Name, PID: os.Getpid(),
		TrAddr: addr.Addr().String(), TrSvcID: strconv.Itoa(int(addr.Port())),
		Provider: s.choice.Name, ProviderReason: s.choice.Reason,
		Subsystems: []Subsystem{}, Controllers: []Controller{},
		Connections: snap.Connections, QueueMemory: snap.QueueMemory, Connects: snap.Connects, Rejects: snap.Rejects, Refusals: snap.Refusals,
		Reads: snap.IO.Commands[nvme.OpRead], Writes: snap.IO.Commands[nvme.OpWrite],
		ReadBytes: snap.IO.BytesRead, WriteBytes: snap.IO.BytesWritten, Errors: snap.IO.Errors,
	}
	for _, p := range s.target.Ports() {
		at := p.Addr()
		out.Ports = append(out.Ports, Port{p.ID(), at.Addr().String(), strconv.Itoa(int(at.Port()))})
	}
	for _, to := range s.target.Referrals() {
		out.Referrals = append(out.Referrals, to.String())
	}
	for _, c := range snap.Controllers {
		io := slices.DeleteFunc(slices.Clone(c.Queues), func(q target.QueueStats) bool { return q.QID == 0 })
		out.Controllers = append(out.Controllers, Controller{CNTLID: c.CNTLID, NQN: c.SubNQN, HostNQN: c.HostNQN, Queues: len(io), Ending: c.Ending})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out.Faults = s.standing
	out.Faults.Frozen, out.Faults.Hidden = s.target.Faults().Frozen(), s.target.Faults().Hidden()
	out.Faults.Commands = []Fault{}
	for _, f := range s.faults {
		out.Faults.Commands = append(out.Faults.Commands, Fault{ID: f.id, What: f.what, UsedUp: f.added.UsedUp()})
	}
	for _, sub := range s.subsystems {
		d := Subsystem{NQN: sub.cfg.NQN, MaxQueues: sub.cfg.MaxQueues, AllowHosts: sub.cfg.AllowHosts, ANA: map[string]string{}, Namespaces: []NamespaceStatus{}}
		for group, state := range sub.ana {
			d.ANA[group] = state
		}
		for _, a := range sub.cfg.Auth {
			d.Auth = append(d.Auth, describeAuth(a))
		}
		for _, n := range sub.namespaces {
			d.Namespaces = append(d.Namespaces, n.status())
		}
		out.Subsystems = append(out.Subsystems, d)
	}
	return out
}

func describeAuth(a options.HostAuth) HostAuth {
	out := HostAuth{HostNQN: a.Host, ControllerKey: a.ControllerKey != nil, Queues: "all"}
	if a.AdminOnly {
		out.Queues = "admin"
	}
	for _, h := range a.Hashes {
		out.Hashes = append(out.Hashes, h.String())
	}
	for _, g := range a.Groups {
		out.Groups = append(out.Groups, g.String())
	}
	return out
}

func (n *namespace) status() NamespaceStatus {
	out := NamespaceStatus{
		NSID: n.NSID(), Data: n.spec.File, BlockSize: n.spec.BlockSize, ReadOnly: n.ReadOnly(), NewAtStart: n.newAtStart(),
	}
	if id := n.UUID(); !id.IsZero() {
		out.UUID = id.String()
	}
	if n.ram != nil {
		out.Data, out.Size = "ram", n.ram.Size()
	} else {
		out.Size = n.file.Size()
	}
	if out.BlockSize == 0 {
		out.BlockSize = 512
	}
	return out
}
