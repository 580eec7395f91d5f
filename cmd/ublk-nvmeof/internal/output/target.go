package output

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/dustin/go-humanize"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/targetserver"
)

type targets struct {
	SchemaVersion int                   `json:"schema_version"`
	Targets       []targetserver.Status `json:"targets"`
}

// Targets shows targets and what they serve. JSON has everything; verbose is for
// people.
func Targets(out io.Writer, all []targetserver.Status, format string, verbose bool) error {
	if format == JSON {
		return writeJSON(out, targets{SchemaVersion, all})
	}
	for _, t := range printable(all) {
		address := t.TrAddr + ":" + t.TrSvcID
		if strings.Contains(t.TrAddr, ":") {
			address = "[" + t.TrAddr + "]:" + t.TrSvcID
		}
		fmt.Fprintf(out, "%s: %s at %s, process %d (%s)\n", t.Name, t.Provider, address, t.PID, t.ProviderReason)
		w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
		for _, s := range t.Subsystems {
			hosts := "any host"
			if len(s.AllowHosts) > 0 {
				hosts = "host " + strings.Join(s.AllowHosts, ", ")
			}
			fmt.Fprintf(w, "  %s\t%s\tup to %s\n", s.NQN, hosts, count(s.MaxQueues, "I/O queue"))
			for _, n := range s.Namespaces {
				mode := "read-write"
				if n.ReadOnly {
					mode = "read-only"
				}
				fmt.Fprintf(w, "    namespace %d\t%s\t%s, blocks of %d, %s, %s\n", n.NSID, n.Data, humanize.IBytes(uint64(n.Size)), n.BlockSize, mode, identity(n))
			}
		}
		for _, to := range t.Referrals {
			fmt.Fprintf(w, "  referral to %s\n", to)
		}
		if verbose {
			describeTarget(w, t)
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// identity says how hosts recognize a namespace.
func identity(n targetserver.NamespaceStatus) string {
	switch {
	case n.UUID == "":
		return "no uuid"
	case n.NewAtStart:
		return "uuid " + n.UUID + ", a new one at each start"
	}
	return "uuid " + n.UUID
}

// describeTarget shows controllers, faults and counters.
func describeTarget(w io.Writer, t targetserver.Status) {
	for _, p := range t.Ports {
		fmt.Fprintf(w, "  port %d\t%s\n", p.ID, net.JoinHostPort(p.TrAddr, p.TrSvcID))
	}
	for _, s := range t.Subsystems {
		for _, group := range slices.SortedFunc(maps.Keys(s.ANA), byNumbers) {
			fmt.Fprintf(w, "  ana group %s\t%s\t%s\n", group, s.ANA[group], s.NQN)
		}
		for _, a := range s.Auth {
			fmt.Fprintf(w, "  authentication\t%s\t%s\n", s.NQN, authText(a))
		}
	}
	for _, c := range t.Controllers {
		ending := ""
		if c.Ending {
			ending = ", ending"
		}
		fmt.Fprintf(w, "  controller %d\t%s\t%s, %s%s\n", c.CNTLID, c.HostNQN, c.NQN, count(c.Queues, "I/O queue"), ending)
	}
	f, on := t.Faults, map[bool]string{true: "on"}
	for _, row := range [][2]string{
		{"grant", f.Grant}, {"reject", f.Reject}, {"refuse", f.Refuse}, {"stall", on[f.Stalled]},
		{"freeze", on[f.Frozen]}, {"namespaces hidden", on[f.Hidden]},
	} {
		if row[1] != "" {
			fmt.Fprintf(w, "  %s\t%s\n", row[0], row[1])
		}
	}
	for _, c := range f.Commands {
		used := ""
		if c.UsedUp {
			used = " (used up)"
		}
		fmt.Fprintf(w, "  fault %d\t%s%s\n", c.ID, c.What, used)
	}
	fmt.Fprintf(w, "  connections\t%d with %s of queues, %d accepted, %d rejected\n",
		t.Connections, humanize.IBytes(uint64(max(0, t.QueueMemory))), t.Connects, t.Rejects)
	for _, why := range slices.Sorted(maps.Keys(t.Refusals)) {
		fmt.Fprintf(w, "  refused\t%d, %s\n", t.Refusals[why], why)
	}
	fmt.Fprintf(w, "  commands\t%s (%s), %s (%s), %s\n",
		count(t.Reads, "read"), humanize.IBytes(t.ReadBytes), count(t.Writes, "write"), humanize.IBytes(t.WriteBytes), count(t.Errors, "error"))
}

// authText says how a host must authenticate.
func authText(a targetserver.HostAuth) string {
	orAll := func(names []string) string {
		if len(names) == 0 {
			return "all"
		}
		return strings.Join(names, " ")
	}
	text := fmt.Sprintf("host %s, hashes %s, groups %s, queues %s", a.HostNQN, orAll(a.Hashes), orAll(a.Groups), a.Queues)
	if a.ControllerKey {
		text += ", with a controller key"
	}
	return text
}

// byNumbers sorts texts that begin with a number by that.
func byNumbers(a, b string) int {
	number := func(s string) int {
		n, _ := strconv.Atoi(s[:len(s)-len(strings.TrimLeft(s, "0123456789"))])
		return n
	}
	return cmp.Or(cmp.Compare(number(a), number(b)), strings.Compare(a, b))
}
