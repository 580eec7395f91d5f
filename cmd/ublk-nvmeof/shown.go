package main

import "ublk-nvmeof/cmd/ublk-nvmeof/internal/control"

// shown is the part of a server's status that the command that started the server shows. The rest
// of it would take several times as long to encode and to decode for the first time in a process.
type shown struct {
	Name           string         `json:"name"`
	NQN            string         `json:"subsysnqn"`
	TrAddr         string         `json:"traddr"`
	TrSvcID        string         `json:"trsvcid"`
	HostTrAddr     string         `json:"host_traddr,omitempty"`
	HostIface      string         `json:"host_iface,omitempty"`
	Frontend       string         `json:"frontend"`
	FrontendReason string         `json:"frontend_reason,omitempty"`
	Provider       string         `json:"provider"`
	ProviderReason string         `json:"provider_reason,omitempty"`
	ZeroCopy       string         `json:"zero_copy,omitempty"`
	RegionBytes    int64          `json:"region_bytes,omitempty"`
	Queues         control.Queues `json:"queues"`
	Paths          []shownPath    `json:"paths"`
	Devices        []shownDevice  `json:"devices"`
}

type shownPath struct {
	Path       string `json:"path"`
	TrAddr     string `json:"traddr"`
	TrSvcID    string `json:"trsvcid"`
	HostTrAddr string `json:"host_traddr,omitempty"`
	State      string `json:"state"`
	CNTLID     uint16 `json:"cntlid"`
	LastError  string `json:"last_error,omitempty"`
}

type shownDevice struct {
	Device string `json:"device"`
}

func shownOf(s control.Status) *shown {
	out := &shown{
		Name: s.Name, NQN: s.NQN, TrAddr: s.TrAddr, TrSvcID: s.TrSvcID, HostTrAddr: s.HostTrAddr, HostIface: s.HostIface,
		Frontend: s.Frontend, FrontendReason: s.FrontendReason, Provider: s.Provider, ProviderReason: s.ProviderReason,
		ZeroCopy: s.ZeroCopy, RegionBytes: s.RegionBytes, Queues: s.Queues,
	}
	for _, p := range s.Paths {
		out.Paths = append(out.Paths, shownPath{p.Path, p.TrAddr, p.TrSvcID, p.HostTrAddr, p.State, p.CNTLID, p.LastError})
	}
	for _, d := range s.Devices {
		out.Devices = append(out.Devices, shownDevice{d.Device})
	}
	return out
}

// status has no fields but those that are shown.
func (s *shown) status() control.Status {
	out := control.Status{
		Name: s.Name, NQN: s.NQN, TrAddr: s.TrAddr, TrSvcID: s.TrSvcID, HostTrAddr: s.HostTrAddr, HostIface: s.HostIface,
		Frontend: s.Frontend, FrontendReason: s.FrontendReason, Provider: s.Provider, ProviderReason: s.ProviderReason,
		ZeroCopy: s.ZeroCopy, RegionBytes: s.RegionBytes, Queues: s.Queues,
	}
	for _, p := range s.Paths {
		out.Paths = append(out.Paths, control.Path{
			Path: p.Path, TrAddr: p.TrAddr, TrSvcID: p.TrSvcID, HostTrAddr: p.HostTrAddr, State: p.State, CNTLID: p.CNTLID, LastError: p.LastError,
		})
	}
	for _, d := range s.Devices {
		out.Devices = append(out.Devices, control.Device{Device: d.Device})
	}
	return out
}
