package output

import (
	"fmt"
	"io"
)

// Build says which build of the program this is.
type Build struct {
	Version       string `json:"version"`
	Commit        string `json:"commit,omitempty"` // empty if it was not built from a repository
	Go            string `json:"go"`               // version of Go
	Platform      string `json:"platform"`         // operating system and architecture
	SchemaVersion int    `json:"schema_version"`
}

// Version writes what a build is.
func Version(w io.Writer, program string, b Build, format string) error {
	if format == JSON {
		b.SchemaVersion = SchemaVersion
		return writeJSON(w, b)
	}
	_, err := fmt.Fprintf(w, "%s %s %s %s\n", program, b.Version, b.Go, b.Platform)
	return err
}
