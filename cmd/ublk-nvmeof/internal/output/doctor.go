package output

import (
	"fmt"
	"io"
	"text/tabwriter"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/doctor"
)

type doctorReport struct {
	SchemaVersion int           `json:"schema_version"`
	Status        doctor.Status `json:"status"` // the worst of the checks
	Checks        []doctorCheck `json:"checks"`
}

type doctorCheck struct {
	Check    string        `json:"check"`
	Status   doctor.Status `json:"status"`
	Finding  string        `json:"finding"`
	Remedy   *string       `json:"remedy"`
	ExitCode *int          `json:"exit_code"` // of a check that failed
}

// Doctor writes what the checks of a host came to.
func Doctor(w io.Writer, results []doctor.Result, format string) error {
	if format == JSON {
		return doctorJSON(w, results)
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range results {
		line := Text(r.Finding)
		if r.Remedy != "" {
			line += "; to do: " + Text(r.Remedy)
		}
		fmt.Fprintf(table, "%s\t%s\t%s\n", r.Status, r.Check, line)
	}
	return table.Flush()
}

func doctorJSON(w io.Writer, results []doctor.Result) error {
	out := doctorReport{SchemaVersion: SchemaVersion, Status: doctor.OK, Checks: []doctorCheck{}}
	for _, r := range results {
		c := doctorCheck{Check: r.Check, Status: r.Status, Finding: r.Finding}
		if r.Remedy != "" {
			c.Remedy = &r.Remedy
		}
		switch r.Status {
		case doctor.Fail:
			code := int(r.Code)
			c.ExitCode, out.Status = &code, doctor.Fail
		case doctor.Warn:
			if out.Status == doctor.OK {
				out.Status = doctor.Warn
			}
		}
		out.Checks = append(out.Checks, c)
	}
	return writeJSON(w, out)
}
