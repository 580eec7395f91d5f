package doctor

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/docs"
)

// kernelRelease compares the release of the kernel with those that are known to be bad.
type kernelRelease struct{}

func (kernelRelease) Name() string { return "kernel" }

// oldest is the oldest kernel that the program is tested with.
const oldest = "6.1"

func (kernelRelease) Look(_ context.Context, m *Machine) Result {
	bugs, err := parseKernelBugs(docs.KernelBugs)
	if err != nil {
		return fail(exit.Other, "", "%v", err)
	}
	if slices.Compare(versionOf(m.Release), versionOf(oldest)) < 0 {
		return warn("use "+oldest+" or newer", "Linux %s is older than %s, the oldest that is tested", m.Release, oldest)
	}
	worst := ok("Linux %s: no bug is known that matters here", m.Release)
	for _, b := range bugs {
		if !b.concerns(m.Release) || b.module != "ublk_drv" && !m.loaded(b.module) {
			continue
		}
		r := Result{Status: b.severity, Finding: fmt.Sprintf("Linux %s, %s: %s", m.Release, b.module, b.what), Remedy: b.remedy}
		switch {
		case r.Status == Fail:
			r.Code = exit.NoUblk
			return r
		case worst.Status == OK:
			worst = r
		default:
			worst.Finding += "; " + b.module + ": " + b.what
			worst.Remedy += "; " + b.remedy
		}
	}
	return worst
}

// kernelBug is a row of the table in docs/kernel-bugs.md.
type kernelBug struct {
	module   string
	releases []string // patterns
	severity Status
	what     string // without the final period
	remedy   string
}

// kernelBugsHeader is the first row of the table.
const kernelBugsHeader = "| module | releases | severity | what happens | what to do | seen |"

// parseKernelBugs reads the table. Errors name the row.
func parseKernelBugs(text string) ([]kernelBug, error) {
	_, rows, found := strings.Cut(text, kernelBugsHeader+"\n")
	if !found {
		return nil, fmt.Errorf("the table of kernels has no row %q", kernelBugsHeader)
	}
	var bugs []kernelBug
	for row := range strings.Lines(rows) {
		row = strings.TrimSpace(row)
		switch {
		case row == "":
			return bugs, nil
		case strings.HasPrefix(row, "|-"):
			continue
		}
		cells := strings.Split(strings.Trim(row, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if len(cells) != 6 || slices.Contains(cells, "") {
			return nil, fmt.Errorf("table of kernels: row %q: want 6 cells that are not empty", row)
		}
		b := kernelBug{module: cells[0], releases: strings.Split(cells[1], ", "), severity: Status(cells[2]),
			what: strings.TrimSuffix(cells[3], "."), remedy: cells[4]}
		if b.severity != Warn && b.severity != Fail {
			return nil, fmt.Errorf("table of kernels: severity %q: want warn or fail", b.severity)
		}
		bugs = append(bugs, b)
	}
	return bugs, nil
}

// concerns reports whether one of the patterns matches a release.
func (b kernelBug) concerns(release string) bool {
	return slices.ContainsFunc(b.releases, func(pattern string) bool { return matches(pattern, release) })
}

// matches compares a release with "6.12" (and all of its patch levels), "6.12 to 7.3", or a
// pattern for all of it, such as "6.8.0-*".
func matches(pattern, release string) bool {
	v := versionOf(release)
	if from, to, found := strings.Cut(pattern, " to "); found {
		lo, hi := versionOf(from), versionOf(to)
		return slices.Compare(v, lo) >= 0 && slices.Compare(v[:min(len(v), len(hi))], hi) <= 0
	}
	if strings.Trim(pattern, "0123456789.") == "" {
		p := versionOf(pattern)
		return len(v) >= len(p) && slices.Equal(v[:len(p)], p)
	}
	found, err := path.Match(pattern, release)
	return err == nil && found
}

// versionOf returns the numbers at the beginning of a release.
func versionOf(release string) (v []int) {
	end := strings.IndexFunc(release, func(r rune) bool { return r != '.' && (r < '0' || r > '9') })
	if end >= 0 {
		release = release[:end]
	}
	for part := range strings.SplitSeq(release, ".") {
		n, err := strconv.Atoi(part)
		if err != nil {
			break
		}
		v = append(v, n)
	}
	return v
}
