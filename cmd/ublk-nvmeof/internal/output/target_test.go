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
