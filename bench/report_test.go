package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func example() result {
	r := result{Env: environment{
		Date: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), Mode: modeParallel, Series: "7.3",
		Plan: plan{CPUs: 2, Workloads: []string{"4k-randread-qd32", "128k-read-qd8"}, Paths: []string{pathKernel, pathOurs, pathNull}},
	}}
	for i, pair := range [][2]float64{{1000, 500}, {2000, 1600}, {4000, 3000}} {
		r.Samples = append(r.Samples,
			sample{Round: i + 1, Workload: "4k-randread-qd32", Path: pathKernel, IOs: 100, IOPS: pair[0]},
			sample{Round: i + 1, Workload: "4k-randread-qd32", Path: pathOurs, IOs: 100, IOPS: pair[1], ServerPerIO: 12_340})
	}
	return r
}

func TestMarkdownComparesWithinRounds(t *testing.T) {
	text := example().markdown()
	// The ratio is the median of 0.5, 0.8 and 0.75, not that of the medians, 0.8.
	for _, want := range []string{"| 2,000 [1,000..4,000] | 1,600 [500..3,000] | 0.75 [0.50..0.80] |", "(12.3)", "| 128k-read-qd8 | – | – | – |"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
	if strings.Contains(text, "null IOPS") {
		t.Errorf("a path without samples has a column in\n%s", text)
	}
}

func TestTablesAreRectangular(t *testing.T) {
	r := example()
	idle := 0.012
	r.Servers = []serverInfo{{Path: pathOurs, RSS: 64 << 20, IdlePercent: &idle,
		SyscallsPerIO: map[string]float64{"futex": 0.01, "io_uring_enter": 0.4, "read": 0.0001}}}
	columns := 0
	for line := range strings.Lines(r.markdown()) {
		if !strings.HasPrefix(line, "|") {
			columns = 0
			continue
		}
		n := strings.Count(line, "|")
		if columns != 0 && n != columns {
			t.Errorf("%d columns, want %d: %s", n, columns, line)
		}
		columns = n
	}
	if want := "| ours | 64 MiB | 0 | 0.012 | 0.410: io_uring_enter 0.400, futex 0.010 |"; !strings.Contains(r.markdown(), want) {
		t.Errorf("%q is missing in\n%s", want, r.markdown())
	}
}

func TestBenchmarkLines(t *testing.T) {
	lines := strings.Split(strings.TrimSpace(example().benchmarks()), "\n")
	if got := len(slices.DeleteFunc(slices.Clone(lines), func(s string) bool { return !strings.HasPrefix(s, "Benchmark") })); got != 6 {
		t.Errorf("%d lines of results, want 6", got)
	}
	last := strings.Fields(lines[len(lines)-1])
	if last[0] != "BenchmarkFio/load=4k-randread-qd32/path=ours-2" || last[1] != "100" || len(last)%2 != 0 {
		t.Errorf("not a benchmark line: %q", last)
	}
}

func TestStore(t *testing.T) {
	dir := t.TempDir()
	r := example()
	r.Env.Label = "x"
	if err := r.store(dir); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "2026-03-01-7.3-parallel-x.json"))
	if err != nil {
		t.Fatal(err)
	}
	var back result
	if err := json.Unmarshal(data, &back); err != nil || !reflect.DeepEqual(back, r) {
		t.Errorf("read back: %+v, %v", back, err)
	}
}

func TestReadEvents(t *testing.T) {
	in := "lab: noise\n{\"sample\":{\"round\":1,\"iops\":5}}\r\n{broken\n{\"server\":{\"path\":\"ours\",\"rss_bytes\":7}}\n{\"server\":{\"path\":\"ours\",\"idle_percent\":0}}\n{\"done\":true}"
	var r result
	done := false
	var other strings.Builder
	if err := readEvents(strings.NewReader(in), func(e event) { r.add(e); done = done || e.Done }, &other); err != nil {
		t.Fatal(err)
	}
	if !done || len(r.Samples) != 1 || r.Samples[0].IOPS != 5 {
		t.Errorf("events: done %v, %+v", done, r)
	}
	if len(r.Servers) != 1 || r.Servers[0].RSS != 7 || r.Servers[0].IdlePercent == nil {
		t.Errorf("parts of a server are not joined: %+v", r.Servers)
	}
	if got := other.String(); got != "lab: noise\n{broken\n" {
		t.Errorf("other output %q", got)
	}
}

func TestOptions(t *testing.T) {
	o, err := parseOptions([]string{"--mode", "both", "--only", "128k-read-qd8, 4k-randread-qd1", "--paths", "kernel"})
	if err != nil || !slices.Equal(o.modes, []string{modeICount, modeParallel}) || !slices.Equal(o.plan.Paths, []string{pathKernel}) ||
		!slices.Equal(o.plan.Workloads, []string{"128k-read-qd8", "4k-randread-qd1"}) {
		t.Errorf("parseOptions = %+v, %v", o, err)
	}
	for _, bad := range [][]string{{"--mode", "x"}, {"--only", "x"}, {"--paths", "kernel,x"}, {"--rounds", "-1"}, {"--cpus", "0"}, {"x"}} {
		if _, err := parseOptions(bad); err == nil {
			t.Errorf("%v is accepted", bad)
		}
	}
}

// TestComparisons: shared memory is compared with a copy from the same kind of pages.
func TestComparisons(t *testing.T) {
	names := []string{pathOurs, pathShared, pathSharedHuge, pathNull, pathNullHuge, pathNullSharedHuge}
	want := [][2]string{{pathShared, pathOurs}, {pathNullSharedHuge, pathNullHuge}}
	if got := comparisons(names); !slices.Equal(got, want) {
		t.Errorf("comparisons of %v: %v, want %v", names, got, want)
	}
}
