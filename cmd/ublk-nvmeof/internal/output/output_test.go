package output

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s:\ngot\n%s\nwant\n%s", name, got, want)
	}
}

// live is a server whose target granted two queues of the four asked for.
var live = control.Status{
	SchemaVersion: 1, Name: "ctrl0", PID: 1234,
	Transport: "rdma", TrAddr: "10.0.2.15", TrSvcID: "4420", HostTrAddr: "10.0.2.16",
	NQN: "nqn.2026-01.org.example:lab", HostNQN: "nqn.2014-08.org.nvmexpress:uuid:11111111-1111-1111-1111-111111111111",
	HostID: "11111111-1111-1111-1111-111111111111",
	State:  "live",
	Paths: []control.Path{
		{Path: "10.0.2.15,4420,10.0.2.16", TrAddr: "10.0.2.15", TrSvcID: "4420", HostTrAddr: "10.0.2.16", State: "live", CNTLID: 1, Provider: "verbs", RDMADevice: "rxe0",
			ANA: map[string]string{"1": "optimized", "7": "inaccessible"}, InFlight: 3, Vouched: []string{"10.0.2.17:4421"}},
		{Path: "10.0.2.17,4421", TrAddr: "10.0.2.17", TrSvcID: "4421", State: "connecting", Provider: "verbs", RDMADevice: "rxe1", Preferred: true,
			ANA: map[string]string{}, Failovers: 12, Held: 2, Losses: 1, Attempts: 4, Vouched: []string{}, LastError: "queue 0: peer disconnected"},
	},
	Policy: "preferred", Fence: "auto",
	Fences: []control.Fence{{Path: "10.0.2.17:4421", CNTLID: 2, Since: "2026-01-02T03:04:05Z", Changes: 2,
		WaitsFor: "path 10.0.2.15:4420, which knows the controller, to say that it is gone"}},
	CNTLID: 1, Version: "2.1.0", Model: "Linux", Serial: "0123456789abcdef0123", Firmware: "6.12.95+",
	Frontend: "ublk", FrontendReason: "the ublk driver is there",
	Provider: "verbs", ProviderReason: "RDMA device rxe0 is on eth0, which leads to 10.0.2.15", RDMADevice: "rxe0", Memory: "registered", InCapsule: 4096, SQFlow: true, QueueSize: 128,
	Queues: control.Queues{
		Requested: 4, Granted: 3,
		Read:    control.Class{Requested: 2, Granted: 2, Mapped: "read"},
		Default: control.Class{Requested: 1, Granted: 1, Mapped: "default"},
		Poll:    control.Class{Requested: 1, Granted: 0, Mapped: "default"},
	},
	KeepAlive: 5, Reconnect: 10, Loss: 600, FastFail: -1, PollMax: 16384, BufferBytes: 128 << 20,
	Devices: []control.Device{
		{Device: "ublkb0", NSID: 1, UUID: "22222222-2222-2222-2222-222222222222", Size: 256 << 20, Used: new(uint64(192 << 20)), BlockSize: 512,
			WriteCache: true, Queues: 2, QueueDepth: 128, MaxIO: 256 << 10, BufferBytes: 64 << 20,
			Counters: control.IO{Reads: 10, ReadBytes: 40960, Writes: 3, WrittenBytes: 1 << 20, Flushes: 1, Errors: 2, Batches: 9}},
		{Device: "ublkb1", NSID: 7, Size: 5 << 40, BlockSize: 4096, ReadOnly: true, Queues: 2, QueueDepth: 128,
			MaxIO: 256 << 10, BufferBytes: 64 << 20},
	},
	Lanes: []control.Lane{
		{Submitted: 14, Completed: 14, HandedOver: 3, Retried: 1, Passes: 99, Enters: 20, Waits: 12, BlockingWaits: 5, Spins: 7},
		{Submitted: 2, Completed: 2},
	},
}

// plain is what connect gives without any wishes, over IPv6.
var plain = control.Status{
	SchemaVersion: 1, Name: "ctrl1", PID: 1300, Transport: "rdma", TrAddr: "fe80::1%eth0", TrSvcID: "4421",
	NQN: "nqn.b", HostNQN: "nqn.h", HostID: "33333333-3333-3333-3333-333333333333",
	State: "dead", Since: "2026-01-02T03:04:05Z", Losses: 2, Attempts: 60, Reason: "keep alive: deadline exceeded", Provider: "roce", RDMADevice: "roce", Memory: "registered",
	Model: "M", Serial: "S", Firmware: "F", Version: "1.4.0", QueueSize: 16,
	Queues: control.Queues{Requested: 8, Granted: 8, Read: control.Class{Mapped: "default"},
		Default: control.Class{Requested: 8, Granted: 8, Mapped: "default"}, Poll: control.Class{Mapped: "default"}},
	Packets:   &control.Packets{Sent: 1000, Received: 900, Retransmitted: 12, Timeouts: 3, NAKsReceived: 5, Dropped: 1},
	KeepAlive: 5, Reconnect: 10, Loss: -1, FastFail: 3, BufferBytes: 4 << 20,
	Devices: []control.Device{{Device: "ublkb2", NSID: 1, Size: 1 << 30, BlockSize: 512, Queues: 8, QueueDepth: 16, MaxIO: 32 << 10, BufferBytes: 4 << 20}},
}

// lost is a server that is no more: only what its state file says is known.
var lost = control.Status{
	SchemaVersion: 1, Name: "ctrl2", PID: 1400, Transport: "rdma", TrAddr: "10.0.2.17", TrSvcID: "4420", NQN: "nqn.c", HostNQN: "nqn.h",
	State: "lost", Reason: "the server has died", Devices: []control.Device{{Device: "ublkb3", NSID: 1}},
}

// connecting has no devices yet.
var connecting = control.Status{
	SchemaVersion: 1, Name: "ctrl3", PID: 1500, Transport: "rdma", TrAddr: "10.0.2.18", TrSvcID: "4420", NQN: "nqn.d", HostNQN: "nqn.h",
	State: "connecting",
}

var keepers = []Keeper{{Name: "discovery0", PID: 1600, Services: []Service{{Address: "10.0.2.19:8009", NQN: "nqn.2014-08.org.nvmexpress.discovery", HostNQN: "nqn.h"}}}}

// TestStateText: why an association was lost, and why the last attempt to make it again
// failed, are both shown if they differ.
func TestStateText(t *testing.T) {
	for want, s := range map[string]control.Status{
		"connecting, lost 1 time, 2 attempts since then: keep alive: deadline exceeded; last attempt: rejected": {
			State: "connecting", Losses: 1, Attempts: 2, Reason: "keep alive: deadline exceeded", Failure: "rejected"},
		"connecting, lost 1 time, 2 attempts since then: rejected":    {State: "connecting", Losses: 1, Attempts: 2, Reason: "rejected", Failure: "rejected"},
		"live, lost 1 time, 2 attempts since then: peer disconnected": {State: "live", Losses: 1, Attempts: 2, Reason: "peer disconnected"},
	} {
		if got := stateText(s); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestGolden(t *testing.T) {
	// other is another path to the subsystem of live.
	other := connecting
	other.HostIface, other.Owner, other.Context = "eth1", "csi", "node"
	// other has what only some servers have.
	durations := map[string]control.Durations{"read": {Buckets: []uint64{1, 0}, Sum: 0.5}}
	other.Outages.Losses = map[string]int{"keep_alive": 1}
	other.DurationBounds, other.Stages = []float64{0.5}, map[string]map[string]control.Durations{"wire": durations}
	other.Failure, other.Packets = "rejected", &control.Packets{DroppedBy: map[string]uint64{"icrc": 2}}
	other.Devices = []control.Device{{Device: "ublkb4", NSID: 1, Present: true, Durations: durations, Wait: &control.Wait{Since: "2026-01-02T03:04:05Z", Reason: "no path gives access", FailIn: new(int64(3))}}}
	other.Name, other.TrAddr, other.NQN, other.HostNQN, other.HostID = "ctrl4", "10.0.3.15", live.NQN, live.HostNQN, live.HostID
	all := []control.Status{live, plain, lost, connecting, other}
	results := []SubsystemResult{
		{NQN: live.NQN, Outcome: New, Status: live, Further: []string{"10.0.3.15:4420"}},
		{NQN: plain.NQN, Outcome: Already, Status: plain},
		{NQN: "nqn.none", Outcome: Failed, Err: errors.Join(errors.New("10.0.2.15:4420: nobody listens"), errors.New("10.0.3.15:4420: no route"))},
	}
	built := Build{Version: "1.2.3", Commit: "0123456789abcdef", Go: "go1.26.0", Platform: "linux/amd64"}
	for _, tt := range []struct {
		file  string
		write func(*bytes.Buffer) error
	}{
		{"list.txt", func(b *bytes.Buffer) error { return List(b, all, keepers, Normal, false) }},
		{"list-verbose.txt", func(b *bytes.Buffer) error { return List(b, all, keepers, Normal, true) }},
		{"list.json", func(b *bytes.Buffer) error { return List(b, all, keepers, JSON, false) }},
		{"list-verbose.json", func(b *bytes.Buffer) error { return List(b, all, keepers, JSON, true) }},
		{"list-subsys.txt", func(b *bytes.Buffer) error { return Subsystems(b, all, Normal) }},
		{"list-subsys.json", func(b *bytes.Buffer) error { return Subsystems(b, all, JSON) }},
		{"show-topology.txt", func(b *bytes.Buffer) error { return Topology(b, all, Normal) }},
		{"show-topology.json", func(b *bytes.Buffer) error { return Topology(b, all, JSON) }},
		{"list-subsys-empty.json", func(b *bytes.Buffer) error { return Subsystems(b, nil, JSON) }},
		{"list-empty.txt", func(b *bytes.Buffer) error { return List(b, nil, nil, Normal, false) }},
		{"list-empty.json", func(b *bytes.Buffer) error { return List(b, nil, nil, JSON, true) }},
		{"connect.txt", func(b *bytes.Buffer) error { return Connected(b, live, Normal, false) }},
		{"connect-verbose.txt", func(b *bytes.Buffer) error { return Connected(b, live, Normal, true) }},
		{"connect.json", func(b *bytes.Buffer) error { return Connected(b, live, JSON, true) }},
		{"connect-ipv6.txt", func(b *bytes.Buffer) error { return Connected(b, plain, Normal, false) }},
		{"connect-all.txt", func(b *bytes.Buffer) error { return ConnectedAll(b, results, Normal, false) }},
		{"connect-all.json", func(b *bytes.Buffer) error { return ConnectedAll(b, results, JSON, false) }},
		{"connect-all-empty.json", func(b *bytes.Buffer) error { return ConnectedAll(b, nil, JSON, false) }},
		{"version.txt", func(b *bytes.Buffer) error { return Version(b, "ublk-nvmeof", built, Normal) }},
		{"version.json", func(b *bytes.Buffer) error { return Version(b, "ublk-nvmeof", built, JSON) }},
	} {
		t.Run(tt.file, func(t *testing.T) {
			var b bytes.Buffer
			if err := tt.write(&b); err != nil {
				t.Fatal(err)
			}
			golden(t, tt.file, b.Bytes())
			if strings.HasSuffix(tt.file, ".json") && !json.Valid(b.Bytes()) {
				t.Error("not JSON")
			}
		})
	}
}
