package output

import (
	"bytes"
	"strings"
	"testing"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/targetserver"
)

// TestTargetsEscapes: names of hosts and files are escaped.
func TestTargetsEscapes(t *testing.T) {
	const evil = "x\x1b[2J\ny\u202e"
	var out bytes.Buffer
	err := Targets(&out, []targetserver.Status{{
		Name: "target0",
		Subsystems: []targetserver.Subsystem{{NQN: evil, AllowHosts: []string{evil}, ANA: map[string]string{"1": "change"}, Namespaces: []targetserver.NamespaceStatus{
			{NSID: 1, Data: "/" + evil}, {NSID: 2, Data: "ram", UUID: "u2", NewAtStart: true}, {NSID: 3, Data: "/x", UUID: "u3"},
		}}},
		Controllers: []targetserver.Controller{{NQN: evil, HostNQN: evil, Ending: true}},
		Refusals:    map[string]uint64{"unknown subsystem": 3},
		Faults:      targetserver.Faults{Commands: []targetserver.Fault{{ID: 1, What: evil}, {ID: 2, What: "drop,count=1", UsedUp: true}}},
	}}, Normal, true)
	if err != nil {
		t.Fatal(err)
	}
	text := out.String()
	if strings.ContainsAny(text, "\x1b\u202e") || strings.Contains(text, "\ny") {
		t.Errorf("%q", text)
	}
	for _, want := range []string{`/x\x1b[2J\ny\u202e`, "no uuid", "uuid u2, a new one at each start", "uuid u3\n", "ending", "3, unknown subsystem", "drop,count=1 (used up)"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %s", want, text)
		}
	}
}

func TestTargetsGolden(t *testing.T) {
	all := []targetserver.Status{
		{
			SchemaVersion: 1, Name: "target0", PID: 1234, TrAddr: "10.0.2.15", TrSvcID: "4420", Provider: "roce", ProviderReason: "asked for",
			Subsystems: []targetserver.Subsystem{
				{NQN: "nqn.a", MaxQueues: 128, AllowHosts: []string{"nqn.h"}, ANA: map[string]string{"1": "inaccessible", "1 over port 2": "optimized", "10": "change", "2": "optimized"}, Namespaces: []targetserver.NamespaceStatus{
					{NSID: 1, Data: "ram", Size: 1 << 20, BlockSize: 512, UUID: "22222222-2222-2222-2222-222222222222", NewAtStart: true},
					{NSID: 2, Data: "/data", Size: 1 << 30, BlockSize: 4096, ReadOnly: true},
				}},
				{NQN: "nqn.b", MaxQueues: 2, Auth: []targetserver.HostAuth{{HostNQN: "nqn.h", Groups: []string{"ffdhe2048", "null"}, Queues: "all"}}, Namespaces: []targetserver.NamespaceStatus{}},
			},
			Ports:       []targetserver.Port{{ID: 1, TrAddr: "10.0.2.15", TrSvcID: "4420"}, {ID: 2, TrAddr: "fe80::1%eth0", TrSvcID: "4420"}},
			Referrals:   []string{"10.0.2.16:8009"},
			Controllers: []targetserver.Controller{{CNTLID: 1, NQN: "nqn.a", HostNQN: "nqn.h", Queues: 3}, {CNTLID: 2, NQN: "nqn.a", HostNQN: "nqn.h", Ending: true}},
			Faults: targetserver.Faults{Grant: "none", Stalled: true, Frozen: true, Hidden: true, Reject: "no resources", Refuse: "182h: busy",
				Commands: []targetserver.Fault{{ID: 1, What: "drop"}, {ID: 2, What: "delay=1s,count=1", UsedUp: true}}},
			Connections: 4, QueueMemory: 1 << 20, Connects: 9, Rejects: 1, Refusals: map[string]uint64{"unknown subsystem": 1},
			Reads: 10, Writes: 20, ReadBytes: 40960, WriteBytes: 81920, Errors: 1,
		},
		{
			SchemaVersion: 1, Name: "target1", PID: 1235, TrAddr: "fe80::1%eth0", TrSvcID: "4420", Provider: "verbs", ProviderReason: "RDMA device rxe0 has the address",
			Subsystems: []targetserver.Subsystem{}, Controllers: []targetserver.Controller{}, Faults: targetserver.Faults{Commands: []targetserver.Fault{}}, Refusals: map[string]uint64{},
		},
	}
	for file, format := range map[string]string{"target-list.txt": Normal, "target-list.json": JSON} {
		var b bytes.Buffer
		if err := Targets(&b, all, format, true); err != nil {
			t.Fatal(err)
		}
		golden(t, file, b.Bytes())
	}
}
