package output

import (
	"fmt"
	"io"
	"strings"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
)

// Outcome is what became of a subsystem that was to be connected.
type Outcome string

// Outcomes.
const (
	New     Outcome = "connected"
	Already Outcome = "already connected"
	Failed  Outcome = "failed"
)

// SubsystemResult is what connect-all did with a subsystem.
type SubsystemResult struct {
	NQN     string
	Outcome Outcome
	Status  control.Status // of its server
	Added   []string       // further paths that this command has added
	Further []string       // addresses that the server does not use
	Again   bool           // one of these may be a path later: it is not there yet
	Err     error
	Quiet   bool // it is no news in text
}

type connectedAll struct {
	SchemaVersion int              `json:"schema_version"`
	Subsystems    []connectedOneOf `json:"subsystems"`
}

type connectedOneOf struct {
	NQN        string   `json:"subsysnqn"`
	Outcome    Outcome  `json:"outcome"`
	Controller string   `json:"controller,omitempty"`
	Address    string   `json:"address,omitempty"`
	Devices    []string `json:"devices"`
	Added      []string `json:"added_paths,omitempty"`
	Further    []string `json:"further_paths"`
	Error      string   `json:"error,omitempty"`
}

// ConnectedAll writes what connect-all did. Errors are in JSON only: in text, they are on
// standard error.
func ConnectedAll(w io.Writer, results []SubsystemResult, format string, verbose bool) error {
	if format == JSON {
		return connectedAllJSON(w, results)
	}
	for _, r := range results {
		switch {
		case r.Outcome == New:
			if err := Connected(w, r.Status, Normal, verbose); err != nil {
				return err
			}
		case r.Outcome == Already && len(r.Added) > 0:
			if err := PathsAdded(w, r.Status, r.Added, Normal, false); err != nil {
				return err
			}
		case r.Outcome == Already && !r.Quiet:
			s := printable(r.Status)
			var paths []string
			for _, d := range s.Devices {
				paths = append(paths, d.Path())
			}
			if _, err := fmt.Fprintf(w, "already connected %s at %s: %s\n", Text(r.NQN), endpoint(s), strings.Join(paths, " ")); err != nil {
				return err
			}
		default:
			continue
		}
		for _, path := range r.Further {
			if _, err := fmt.Fprintf(w, "  further path %s is not used\n", path); err != nil {
				return err
			}
		}
	}
	return nil
}

func connectedAllJSON(w io.Writer, results []SubsystemResult) error {
	out := connectedAll{SchemaVersion: SchemaVersion, Subsystems: []connectedOneOf{}}
	for _, r := range results {
		one := connectedOneOf{NQN: r.NQN, Outcome: r.Outcome, Controller: r.Status.Name, Devices: []string{}, Further: append([]string{}, r.Further...)}
		if r.Outcome == Already {
			one.Added = r.Added
		}
		if r.Status.Name != "" {
			one.Address = Address(r.Status)
		}
		for _, d := range r.Status.Devices {
			one.Devices = append(one.Devices, d.Device)
		}
		if r.Err != nil {
			one.Error = strings.ReplaceAll(r.Err.Error(), "\n", "; ")
		}
		out.Subsystems = append(out.Subsystems, one)
	}
	return writeJSON(w, out)
}

// Endpoint is the address and the port of a server's target.
func Endpoint(s control.Status) string { return endpoint(s) }
