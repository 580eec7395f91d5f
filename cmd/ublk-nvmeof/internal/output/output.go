// Package output writes the results of the command: tables for people and JSON for
// programs. Names in JSON are those of nvme-cli where it has one; schema_version is
// specific to this program. Tables contain printable text only, whatever a peer
// says; JSON is exact.
package output

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf16"

	"github.com/dustin/go-humanize"
	"github.com/dustin/go-humanize/english"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
)

// SchemaVersion is the version of the JSON that this package writes.
const SchemaVersion = 1

// Values of --output-format.
const (
	Normal = "normal"
	JSON   = "json"
	Binary = "binary" // the bytes of a controller, where they are all that there is
)

// none stands for an unknown value.
const none = "-"

// writeJSON writes v exactly. What cannot be printed is escaped, because a terminal may
// show it.
func writeJSON(w io.Writer, v any) error {
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return err
	}
	_, err := io.WriteString(w, EscapeJSON(text.String()))
	return err
}

// EscapeJSON escapes what encoding/json leaves as it is and cannot be printed, like the
// control characters U+0080 to U+009F, which some terminals obey.
func EscapeJSON(text string) string {
	var b strings.Builder
	for _, r := range text {
		if r < 0x7f || unicode.IsPrint(r) {
			b.WriteRune(r)
			continue
		}
		for _, unit := range utf16.AppendRune(nil, r) {
			fmt.Fprintf(&b, `\u%04x`, unit)
		}
	}
	return b.String()
}

type connected struct {
	Device        string         `json:"device"`
	Devices       []string       `json:"devices"`
	Controller    string         `json:"controller"`
	NQN           string         `json:"subsysnqn"`
	Address       string         `json:"address"`
	Frontend      string         `json:"frontend"`
	FrontReason   string         `json:"frontend_reason,omitempty"`
	ZeroCopy      string         `json:"zero_copy,omitempty"`
	Provider      string         `json:"provider"`
	Reason        string         `json:"provider_reason,omitempty"`
	Queues        control.Queues `json:"queues"`
	SchemaVersion int            `json:"schema_version"`
	Paths         []pathState    `json:"paths,omitempty"`       // if there are several
	Added         []string       `json:"added_paths,omitempty"` // of these, by this command
}

type pathState struct {
	Path      string `json:"path"`
	State     string `json:"state"`
	LastError string `json:"last_error,omitempty"`
}

// Connected writes the devices of a new connection. verbose adds the queues.
func Connected(w io.Writer, s control.Status, format string, verbose bool) error {
	return connection(w, s, nil, format, verbose)
}

// PathsAdded writes the devices of a connection that was there, and the paths that it has got.
func PathsAdded(w io.Writer, s control.Status, added []string, format string, verbose bool) error {
	return connection(w, s, added, format, verbose)
}

func connection(w io.Writer, s control.Status, added []string, format string, verbose bool) error {
	out := connected{
		Devices: []string{}, Controller: s.Name, NQN: s.NQN, Address: Address(s),
		Frontend: s.Frontend, FrontReason: s.FrontendReason, ZeroCopy: s.ZeroCopy, Provider: s.Provider, Reason: s.ProviderReason, Queues: s.Queues, SchemaVersion: SchemaVersion,
		Added: added,
	}
	for _, p := range s.Paths {
		if len(s.Paths) > 1 {
			out.Paths = append(out.Paths, pathState{p.Path, p.State, p.LastError})
		}
	}
	var paths []string
	for _, d := range s.Devices {
		out.Devices = append(out.Devices, d.Device)
		paths = append(paths, d.Path())
	}
	if format == JSON {
		if len(out.Devices) > 0 {
			out.Device = out.Devices[0]
		}
		return writeJSON(w, out)
	}
	s, paths = printable(s), printable(paths)
	if len(added) > 0 {
		if _, err := fmt.Fprintf(w, "added %s to %s, which %s serves: %s\n", strings.Join(added, " and "), s.NQN, s.Name, strings.Join(paths, " ")); err != nil {
			return err
		}
		return unconnected(w, s)
	}
	if s.Frontend != "" && s.Frontend != "ublk" && s.FrontendReason != "" && !verbose {
		// This is not the usual front end, so the reason is given.
		if _, err := fmt.Fprintf(w, "front end %s\n", withReason(s.Frontend, s.FrontendReason)); err != nil {
			return err
		}
	}
	if _, err := fmt.Fprintf(w, "connected %s at %s: %s\n", s.NQN, endpoint(s), strings.Join(paths, " ")); err != nil {
		return err
	}
	if err := unconnected(w, s); err != nil {
		return err
	}
	if s.ZeroCopy != "" {
		if _, err := fmt.Fprintf(w, "zero copy: the target can read and write %s\n", reach(s)); err != nil {
			return err
		}
	}
	if !verbose {
		return nil
	}
	if _, err := fmt.Fprintf(w, "front end %s\nprovider %s\n", withReason(s.Frontend, s.FrontendReason), withReason(s.Provider, s.ProviderReason)); err != nil {
		return err
	}
	return classTable(w, s.Queues)
}

// unconnected writes the paths that were asked for and are not connected yet.
func unconnected(w io.Writer, s control.Status) error {
	for _, p := range s.Paths {
		if p.CNTLID != 0 || len(s.Paths) < 2 {
			continue
		}
		if _, err := fmt.Fprintf(w, "  path %s is not connected, and is tried again: %s\n", p.Path, orNone(p.LastError)); err != nil {
			return err
		}
	}
	return nil
}

// reach says what memory the target can access with zero copy.
func reach(s control.Status) string {
	now := "none"
	if s.RegionBytes > 0 {
		now = size(uint64(s.RegionBytes))
	}
	return fmt.Sprintf("the I/O buffers and the memory of %s (%s at present)", s.ZeroCopy, now)
}

// uncopied says what data is not copied with zero copy, as far as it depends on the targets.
func uncopied(s control.Status) string {
	switch s.Places {
	case 0:
		return ""
	case 1:
		return "; contiguous data is not copied"
	}
	return fmt.Sprintf("; data in up to %d places is not copied", s.Places)
}

// withReason writes a choice with its reason.
func withReason(what, reason string) string {
	if reason == "" {
		return orNone(what)
	}
	return what + " (" + reason + ")"
}

// classTable writes for each class how many queues were requested and granted, and
// which class serves it.
func classTable(out io.Writer, q control.Queues) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "class\trequested\tgranted\tmapped")
	for _, c := range classes(q) {
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\n", c.name, c.Requested, c.Granted, c.Mapped)
	}
	fmt.Fprintf(w, "total\t%d\t%d\n", q.Requested, q.Granted)
	return w.Flush()
}

type class struct {
	name string
	control.Class
}

func classes(q control.Queues) []class {
	return []class{{"read", q.Read}, {"default", q.Default}, {"poll", q.Poll}}
}

// summary writes the queues on one line: requested/granted for each class, followed by
// the class that serves it if it was granted none. Classes without a request are
// left out.
func summary(q control.Queues) string {
	var parts []string
	for _, c := range classes(q) {
		if c.Requested == 0 && c.Granted == 0 {
			continue
		}
		p := fmt.Sprintf("%s %d/%d", c.name, c.Requested, c.Granted)
		if c.Mapped != c.name {
			p += "→" + c.Mapped
		}
		parts = append(parts, p)
	}
	if len(parts) == 0 {
		return none
	}
	return strings.Join(parts, ", ")
}

// Address returns the address of a target as nvme-cli writes it.
func Address(s control.Status) string {
	a := "traddr=" + s.TrAddr + ",trsvcid=" + s.TrSvcID
	if s.HostTrAddr != "" {
		a += ",host_traddr=" + s.HostTrAddr
	}
	if s.HostIface != "" {
		a += ",host_iface=" + s.HostIface
	}
	return a
}

func endpoint(s control.Status) string {
	if s.TrAddr == "" {
		return none
	}
	if strings.Contains(s.TrAddr, ":") {
		return "[" + s.TrAddr + "]:" + s.TrSvcID
	}
	return s.TrAddr + ":" + s.TrSvcID
}

// Keeper is a process that stays connected to discovery services.
type Keeper struct {
	Name     string    `json:"name"`
	PID      int       `json:"pid"`
	Services []Service `json:"services"`
}

// Service is a discovery service. Its address has the port.
type Service struct {
	Address string `json:"address"`
	NQN     string `json:"subsysnqn"`
	HostNQN string `json:"hostnqn"`
	HostID  string `json:"hostid"`
}

// List writes servers and their devices. JSON has "Devices" in the form of nvme list:
// flat, or with verbose nested in hosts, subsystems and controllers. Beside it, both have
// "controllers" and "discovery" with all details.
func List(w io.Writer, servers []control.Status, keepers []Keeper, format string, verbose bool) error {
	if format == JSON {
		devices := deviceList(servers)
		if verbose {
			devices = hostList(servers)
		}
		return writeJSON(w, object{
			{name: "schema_version", value: SchemaVersion}, {name: "Devices", value: devices},
			{name: "controllers", value: append([]control.Status{}, servers...)},
			{name: "discovery", value: append([]Keeper{}, keepers...)},
		})
	}
	servers = printable(servers)
	if !verbose {
		return listTable(w, servers)
	}
	if err := listVerbose(w, servers); err != nil {
		return err
	}
	for i, k := range printable(keepers) {
		if i == 0 && len(servers) > 0 {
			fmt.Fprintln(w)
		}
		for _, s := range k.Services {
			if _, err := fmt.Fprintf(w, "%s: process %d stays connected to discovery service %s, %s\n", k.Name, k.PID, s.Address, s.NQN); err != nil {
				return err
			}
		}
	}
	return nil
}

// deviceList is the flat list of nvme list, with fields of this program after those of
// nvme-cli. What is not known is null, and so is the generic device, which does not exist.
func deviceList(servers []control.Status) []object {
	out := []object{}
	for _, s := range servers {
		for _, d := range s.Devices {
			o := object{
				{name: "NameSpace", value: d.NSID}, {name: "DevicePath", value: d.Path()}, {name: "GenericPath"},
				{name: "Firmware", value: orNull(s.Firmware)}, {name: "ModelNumber", value: orNull(s.Model)}, {name: "SerialNumber", value: orNull(s.Serial)},
			}
			o = append(o, sizes(d)...)
			out = append(out, append(o, object{
				{name: "SubsystemNQN", value: s.NQN}, {name: "Transport", value: s.Transport}, {name: "Address", value: Address(s)},
				{name: "State", value: s.State}, {name: "Controller", value: s.Name},
			}...))
		}
	}
	return out
}

func listTable(out io.Writer, servers []control.Status) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "DEVICE\tNSID\tSIZE\tNQN\tADDRESS\tSTATE\tQUEUES (REQUESTED/GRANTED)")
	for _, s := range servers {
		rest := fmt.Sprintf("%s\t%s\t%s\t%s", orNone(s.NQN), endpoint(s), stateOfPaths(s), summary(s.Queues))
		if len(s.Devices) == 0 {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", none, none, none, rest)
		}
		for _, d := range s.Devices {
			fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", d.Path(), d.NSID, size(d.Size), rest)
		}
	}
	return w.Flush()
}

// stateOfPaths is the state, and how many of several paths are connected if some are not.
func stateOfPaths(s control.Status) string {
	live := 0
	for _, p := range s.Paths {
		if p.State == "live" {
			live++
		}
	}
	if n := len(s.Paths); n > 1 && live < n {
		return fmt.Sprintf("%s (%d of %d paths)", s.State, live, n)
	}
	return s.State
}

func size(n uint64) string {
	if n == 0 {
		return none
	}
	return humanize.IBytes(n)
}

func listVerbose(out io.Writer, servers []control.Status) error {
	for i, s := range servers {
		if i > 0 {
			fmt.Fprintln(out)
		}
		fmt.Fprintf(out, "%s: %s\n", s.Name, s.NQN)
		w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
		row := func(name, format string, args ...any) {
			fmt.Fprintf(w, "  %s\t%s\n", name, fmt.Sprintf(format, args...))
		}
		row("state", "%s", stateText(s))
		source := ""
		if s.HostTrAddr != "" {
			source = " from " + s.HostTrAddr
		}
		row("address", "%s %s%s", s.Transport, endpoint(s), source)
		if s.Policy != "" {
			row("policy", "%s, fence %s", s.Policy, orNone(s.Fence))
		}
		for j, p := range s.Paths {
			if len(s.Paths) > 1 {
				row(fmt.Sprintf("path %d", j), "%s", pathLine(s, p))
			}
		}
		for _, f := range s.Fences {
			row("held", "%s of controller %d at %s, since %s: waiting for %s", count(f.Changes, "write"), f.CNTLID, f.Path, f.Since, f.WaitsFor)
		}
		row("host", "%s, id %s", s.HostNQN, orNone(s.HostID))
		row("process", "%d", s.PID)
		if s.Owner != "" || s.Context != "" {
			row("owner", "%s, context %s", orNone(s.Owner), orNone(s.Context))
		}
		if s.Model != "" {
			if s.Authentication != "" {
				row("authentication", "%s", s.Authentication)
			}
			row("controller", "id %d, model \"%s\", serial \"%s\", firmware \"%s\", NVMe %s", s.CNTLID, s.Model, s.Serial, s.Firmware, s.Version)
		}
		if s.Provider != "" {
			row("front end", "%s", withReason(s.Frontend, s.FrontendReason))
			row("provider", "%s", withReason(s.Provider, s.ProviderReason))
		}
		if s.RDMADevice != "" {
			row("rdma", "device %s, memory %s, in-capsule data %s, submission queue flow control %s",
				s.RDMADevice, s.Memory, inCapsule(s.InCapsule), onOff(s.SQFlow))
		}
		if s.Queues.Requested > 0 {
			row("queues", "%s, %d entries each", summary(s.Queues), s.QueueSize)
			row("timeouts", "keep alive %s, reconnect delay %s, controller loss %s, fast I/O fail %s",
				seconds(s.KeepAlive), seconds(s.Reconnect), seconds(s.Loss), seconds(s.FastFail))
			reserved := max(s.ReservedBytes, int64(s.BufferBytes)) // an older server does not say what it reserves
			row("buffers", "%s, of which %s are registered", size(uint64(reserved)), size(uint64(s.RegisteredBytes)))
		}
		if s.ZeroCopy != "" {
			row("zero copy", "the target can read and write %s%s", reach(s), uncopied(s))
		}
		if p := s.Packets; p != nil {
			row("packets", "%d sent, %d of them again, %d received; %d timeouts, %d out of sequence, %d duplicates, %d/%d NAKs sent/received, %d RNR NAKs, %d bad ICRCs, %d dropped, %d congestion",
				p.Sent, p.Retransmitted, p.Received, p.Timeouts, p.OutOfSequence, p.Duplicates, p.NAKsSent, p.NAKsReceived, p.RNRNAKs, p.BadICRC, p.Dropped, p.Congestion)
		}
		for _, d := range s.Devices {
			row(d.Path(), "%s", deviceText(d))
			if d.Queues > 0 {
				row("", "%s", countersText(d.Counters))
			}
			if d.Wait != nil {
				row("", "%s", waitText(*d.Wait))
			}
		}
		for j, l := range s.Lanes {
			row(fmt.Sprintf("loop %d", j), "%d submitted, %d completed, %d handed over, %d retried; %d passes, %d enters, %d waits, %d blocking, %d spins",
				l.Submitted, l.Completed, l.HandedOver, l.Retried, l.Passes, l.Enters, l.Waits, l.BlockingWaits, l.Spins)
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// waitText says why requests are not sent.
func waitText(w control.Wait) string {
	what := "requests wait until the server gives up"
	switch {
	case w.FailIn == nil:
	case *w.FailIn == 0:
		what = "requests fail"
	default:
		what = "requests wait, and fail in " + count(int(*w.FailIn), "second")
	}
	return fmt.Sprintf("%s: %s since %s", what, w.Reason, w.Since)
}

// stateText writes the state with its history.
func stateText(s control.Status) string {
	text := s.State
	if s.Since != "" {
		text += " since " + s.Since
	}
	if s.Losses > 0 {
		text += fmt.Sprintf(", lost %s, %s since then", count(s.Losses, "time"), count(s.Attempts, "attempt"))
	}
	if s.Reason != "" {
		text += ": " + s.Reason
	}
	if s.Failure != "" && s.Failure != s.Reason {
		text += "; last attempt: " + s.Failure
	}
	return text
}

// pathLine is what is known of one of several paths.
func pathLine(s control.Status, p control.Path) string {
	s.TrAddr, s.TrSvcID = p.TrAddr, p.TrSvcID
	at := endpoint(s)
	if p.HostTrAddr != "" {
		at += " from " + p.HostTrAddr
	}
	parts := []string{at + " " + p.State}
	if p.CNTLID != 0 {
		parts = append(parts, fmt.Sprintf("controller %d", p.CNTLID))
	}
	for _, nsid := range slices.Sorted(maps.Keys(p.ANA)) {
		parts = append(parts, fmt.Sprintf("namespace %s %s", nsid, p.ANA[nsid]))
	}
	if p.Preferred {
		parts = append(parts, "preferred")
	}
	parts = append(parts, fmt.Sprintf("%d in flight, %d failed over, %d held, %s", p.InFlight, p.Failovers, p.Held, lossesText(p.Losses)))
	if len(p.Vouched) > 0 {
		parts = append(parts, "vouches for "+strings.Join(p.Vouched, " "))
	}
	if p.LastError != "" {
		parts = append(parts, "last error: "+p.LastError)
	}
	return strings.Join(parts, ", ")
}

func lossesText(n int) string {
	if n == 1 {
		return "1 loss"
	}
	return fmt.Sprintf("%d losses", n)
}

func deviceText(d control.Device) string {
	parts := []string{fmt.Sprintf("namespace %d", d.NSID)}
	if d.Size > 0 {
		parts = append(parts, size(d.Size), fmt.Sprintf("blocks of %d", d.BlockSize),
			fmt.Sprintf("%s of %s up to %s", count(d.Queues, "queue"), count(d.QueueDepth, "request"), size(uint64(d.MaxIO))))
	}
	if d.ReadOnly {
		parts = append(parts, "read-only")
	}
	if d.WriteCache {
		parts = append(parts, "write cache")
	}
	if d.UUID != "" {
		parts = append(parts, "uuid "+d.UUID)
	}
	if d.User != "" {
		parts = append(parts, "used by "+d.User)
	}
	return strings.Join(parts, ", ")
}

func countersText(c control.IO) string {
	direct := ""
	if c.DirectBytes > 0 {
		direct = fmt.Sprintf(", %s not copied", humanize.IBytes(c.DirectBytes))
	}
	return fmt.Sprintf("%s (%s), %s (%s)%s, %s, %s, %d write zeroes, %s, %s",
		count(c.Reads, "read"), humanize.IBytes(c.ReadBytes), count(c.Writes, "write"), humanize.IBytes(c.WrittenBytes), direct,
		count(c.Flushes, "flush"), count(c.Discards, "discard"), c.WriteZeroes, count(c.Errors, "error"), count(c.Batches, "batch"))
}

// count writes a number of things. one is the English word for a single one.
func count[N int | uint64](n N, one string) string {
	return fmt.Sprintf("%d %s", n, english.PluralWord(int(n), one, ""))
}

func seconds(n int) string {
	if n < 0 {
		return "never"
	}
	return (time.Duration(n) * time.Second).String()
}

func inCapsule(n int) string {
	if n == 0 {
		return "off"
	}
	return "up to " + humanize.IBytes(uint64(n))
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

func orNone(s string) string {
	if s == "" {
		return none
	}
	return s
}
