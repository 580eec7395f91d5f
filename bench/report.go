package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"
)

// store writes the result to dir as JSON, as a Markdown table, and as Go
// benchmark results.
func (r result) store(dir string) error {
	name := fmt.Sprintf("%s-%s-%s", r.Env.Date.Format("2006-01-02"), r.Env.Series, r.Env.Mode)
	if r.Env.Label != "" {
		name += "-" + r.Env.Label
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	data, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	for suffix, content := range map[string]string{
		".json": string(data) + "\n", ".md": r.markdown(), ".txt": r.benchmarks(),
	} {
		if err := os.WriteFile(filepath.Join(dir, name+suffix), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// print shows the result: the table, and the samples for benchstat, which
// passes over the rest.
func (r result) print(w io.Writer) error {
	_, err := fmt.Fprintf(w, "%s\n%s", r.markdown(), r.benchmarks())
	return err
}

// benchmarks are the samples in the format of Go benchmarks.
func (r result) benchmarks() string {
	var b strings.Builder
	fmt.Fprintf(&b, "goos: linux\ngoarch: amd64\npkg: ublk-nvmeof/bench\nkernel: %s\nmode: %s\n", r.Env.Guest.Kernel, r.Env.Mode)
	for _, s := range r.Samples {
		fmt.Fprintf(&b, "BenchmarkFio/load=%s/path=%s-%d\t%d\t%.0f ns/op\t%.0f IOPS\t%.0f cpu-ns/op\t%.0f server-ns/op\t%.0f p50-ns\t%.0f p99-ns\n",
			s.Workload, s.Path, r.Env.Plan.CPUs, s.IOs, 1e9/s.IOPS, s.IOPS, s.CPUPerIO, s.ServerPerIO, s.P50, s.P99)
	}
	return b.String()
}

// values of one field, by round.
func (r result) values(workload, path string, field func(sample) float64) map[int]float64 {
	m := make(map[int]float64)
	for _, s := range r.Samples {
		if s.Workload == workload && s.Path == path {
			m[s.Round] = field(s)
		}
	}
	return m
}

func (r result) spread(workload, path string, field func(sample) float64) spread {
	return spreadOf(slices.Collect(maps.Values(r.values(workload, path, field))))
}

func iops(s sample) float64 { return s.IOPS }

// tail is how much longer the slowest in a thousand take than half of them.
func tail(s sample) float64 {
	if s.P50 == 0 {
		return 0
	}
	return s.P999 / s.P50
}

// noValue stands for what was not measured.
const noValue = "–"

func (r result) markdown() string {
	var b strings.Builder
	e := r.Env
	fmt.Fprintf(&b, "# %s, kernel %s\n\n", e.Mode, e.Guest.Kernel)
	fmt.Fprintf(&b, "%s, commit %s, %s, %s, host %s.\n", e.Date.Format("2006-01-02 15:04 MST"), e.Commit, e.Go, e.QEMU, e.Host)
	fmt.Fprintf(&b, "%d CPUs, %d I/O queues, %d rounds of %v after %v, namespace of %s, MTU %d, %s, %s.\n",
		e.Plan.CPUs, e.Plan.Queues, e.Plan.Rounds, e.Plan.Runtime, e.Plan.Ramp,
		humanize.IBytes(uint64(e.Plan.SizeMiB)<<20), e.MTU, e.Guest.Fio, e.Guest.Nvme)
	fmt.Fprintf(&b, "Flags: `%s`. Figures are medians [least..greatest].\n\n", e.Command)

	measured := func(path string) bool {
		return slices.ContainsFunc(r.Samples, func(s sample) bool { return s.Path == path })
	}
	var names []string
	for _, p := range e.Plan.Paths {
		if measured(p) {
			names = append(names, p)
		}
	}
	r.ioTable(&b, names)
	r.cpuTable(&b, names)
	r.serverTable(&b)
	for _, f := range r.Failures {
		fmt.Fprintf(&b, "Failed: %s, %s: %s\n\n", f.Path, f.Where, f.Error)
	}
	return b.String()
}

// comparisons are the pairs of paths whose IOPS are compared: each with the kernel, and
// variants of ours with ours.
func comparisons(names []string) (pairs [][2]string) {
	for _, p := range names {
		if p != pathKernel && slices.Contains(names, pathKernel) {
			pairs = append(pairs, [2]string{p, pathKernel})
		}
	}
	for _, p := range []string{pathScraped, pathBusy, pathTwoPaths, pathTwoPathsWide} {
		if slices.Contains(names, p) && slices.Contains(names, pathOurs) {
			pairs = append(pairs, [2]string{p, pathOurs})
		}
	}
	for _, pair := range [][2]string{
		{pathShared, pathOurs}, {pathSharedHuge, pathOursHuge}, {pathNullShared, pathNull}, {pathNullSharedHuge, pathNullHuge},
	} {
		if slices.Contains(names, pair[0]) && slices.Contains(names, pair[1]) {
			pairs = append(pairs, pair)
		}
	}
	return pairs
}

// ioTable is of IOPS, and of their ratios within each round.
func (r result) ioTable(b *strings.Builder, names []string) {
	head := []string{"fio"}
	for _, p := range names {
		head = append(head, p+" IOPS")
	}
	for _, pair := range comparisons(names) {
		head = append(head, pair[0]+" / "+pair[1])
	}
	head = append(head, "p99 µs: "+strings.Join(names, ", "), "p99.9 / median: "+strings.Join(names, ", "))
	row(b, head)
	rule(b, len(head))
	for _, w := range r.Env.Plan.Workloads {
		cells := []string{w}
		for _, p := range names {
			cells = append(cells, format(r.spread(w, p, iops), rate))
		}
		for _, pair := range comparisons(names) {
			number := ratio
			if pair[1] == pathOurs {
				number = fine // the difference is small
			}
			cells = append(cells, format(spreadOf(ratios(r.values(w, pair[0], iops), r.values(w, pair[1], iops))), number))
		}
		var latencies, tails []string
		for _, p := range names {
			latencies = append(latencies, median(r.spread(w, p, func(s sample) float64 { return s.P99 }), micro))
			tails = append(tails, median(r.spread(w, p, tail), ratio))
		}
		row(b, append(cells, strings.Join(latencies, ", "), strings.Join(tails, ", ")))
	}
	b.WriteString("\n")
}

// cpuTable is of what an I/O costs.
func (r result) cpuTable(b *strings.Builder, names []string) {
	b.WriteString("CPU time per I/O in µs: all CPUs of the guest, host and target side")
	if r.Env.Mode == modeICount {
		b.WriteString(" (the CPUs share one clock, so a CPU that waits for its turn counts as busy)")
	}
	b.WriteString("; in brackets the server process. Context switches per I/O: of all CPUs; in brackets sleeps of the server.\n\n")
	head := []string{"fio"}
	for _, p := range names {
		head = append(head, p+" CPU", p+" switches")
	}
	row(b, head)
	rule(b, len(head))
	for _, w := range r.Env.Plan.Workloads {
		cells := []string{w}
		for _, p := range names {
			cpu := median(r.spread(w, p, func(s sample) float64 { return s.CPUPerIO }), micro)
			switches := median(r.spread(w, p, func(s sample) float64 { return s.SwitchesPerIO }), ratio)
			if p != pathKernel {
				cpu += " (" + median(r.spread(w, p, func(s sample) float64 { return s.ServerPerIO }), micro) + ")"
				switches += " (" + median(r.spread(w, p, func(s sample) float64 { return s.SleepsPerIO }), ratio) + ")"
			}
			cells = append(cells, cpu, switches)
		}
		row(b, cells)
	}
	var others []float64
	for _, s := range r.Samples {
		others = append(others, s.IdlePercent)
	}
	fmt.Fprintf(b, "\nMeanwhile the servers whose turn it was not used, in %% of a CPU: %s.", format(spreadOf(others), ratio))
	if r.Env.Mode == modeICount {
		b.WriteString(" (QEMU sometimes lets a CPU stand still, which is charged to whom it happens.)")
	}
	b.WriteString("\n\n")
}

// serverTable is of the server processes.
func (r result) serverTable(b *strings.Builder) {
	if len(r.Servers) == 0 {
		return
	}
	row(b, []string{"server", "resident memory", "threads", "idle, % of a CPU", "system calls per I/O (" + syscallLoad + ")"})
	rule(b, 5)
	for _, s := range r.Servers {
		cells := []string{s.Path, noValue, noValue, noValue, noValue}
		if s.RSS > 0 {
			cells[1], cells[2] = humanize.IBytes(s.RSS), fmt.Sprint(s.Threads)
		}
		if s.IdlePercent != nil {
			cells[3] = fmt.Sprintf("%.3f", *s.IdlePercent)
		}
		if s.SyscallsPerIO != nil {
			cells[4] = callList(s.SyscallsPerIO)
		}
		row(b, cells)
	}
	fmt.Fprintf(b, "\nIdle: over %v, device up and unused. System calls: trace point raw_syscalls:sys_enter.\n\n", r.Env.Plan.Idle)
}

// callList is the sum, and the calls that matter, most frequent first.
func callList(calls map[string]float64) string {
	const matters = 0.0005 // shows as 0.001
	total := 0.0
	var names []string
	for name, n := range calls {
		total += n
		if n >= matters {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		switch {
		case calls[a] > calls[b]:
			return -1
		case calls[a] < calls[b]:
			return 1
		}
		return strings.Compare(a, b)
	})
	for i, name := range names {
		names[i] = fmt.Sprintf("%s %.3f", name, calls[name])
	}
	return fmt.Sprintf("%.3f: %s", total, strings.Join(names, ", "))
}

func row(b *strings.Builder, cells []string) {
	b.WriteString("| " + strings.Join(cells, " | ") + " |\n")
}

func rule(b *strings.Builder, columns int) {
	b.WriteString("|---" + strings.Repeat("|---:", columns-1) + "|\n")
}

func rate(v float64) string  { return humanize.Comma(int64(v + 0.5)) }
func ratio(v float64) string { return fmt.Sprintf("%.2f", v) }
func fine(v float64) string  { return fmt.Sprintf("%.3f", v) }
func micro(ns float64) string {
	return humanize.CommafWithDigits(ns/1e3, 1)
}

func format(s spread, number func(float64) string) string {
	switch s.n {
	case 0:
		return noValue
	case 1:
		return number(s.median)
	}
	return fmt.Sprintf("%s [%s..%s]", number(s.median), number(s.min), number(s.max))
}

func median(s spread, number func(float64) string) string {
	if s.n == 0 {
		return noValue
	}
	return number(s.median)
}
