package main

import (
	"maps"
	"slices"
	"strings"
	"testing"
)

func TestDifferentAllocations(t *testing.T) {
	want := map[string]int{"sq.BenchmarkSame": 0, "sq.BenchmarkMore": 0, "sq.BenchmarkFewer": 2, "sq.BenchmarkGone": 0}
	got := map[string]int{"sq.BenchmarkSame": 0, "sq.BenchmarkMore": 1, "sq.BenchmarkFewer": 1, "sq.BenchmarkNew": 3}
	differ := []string{
		"sq.BenchmarkFewer allocates 1 times for an operation, want 2",
		"sq.BenchmarkGone is listed, but did not run",
		"sq.BenchmarkMore allocates 1 times for an operation, want 0",
		"sq.BenchmarkNew is not listed; it allocates 3 times for an operation",
	}
	if d := differentAllocations(want, got); !slices.Equal(d, differ) {
		t.Errorf("got %q, want %q", d, differ)
	}
	if d := differentAllocations(want, want); len(d) > 0 {
		t.Errorf("the same: %q", d)
	}
}

func TestReadAllocations(t *testing.T) {
	want := map[string]int{"ublk-nvmeof/sq.BenchmarkSubmit/QD32": 0, "ublk-nvmeof/poller.BenchmarkCall": 3}
	got, err := readAllocations(strings.NewReader(formatAllocations(want)))
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, text := range []string{"ublk-nvmeof/sq.BenchmarkSubmit\n", "ublk-nvmeof/sq.BenchmarkSubmit none\n", "\n"} {
		if _, err := readAllocations(strings.NewReader(text)); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}

// The packages with benchmarks are found in the tree.
func TestBenchmarkPackages(t *testing.T) {
	root, err := repository()
	if err != nil {
		t.Fatal(err)
	}
	found, err := benchmarkPackages(root)
	if err != nil || !slices.Contains(found, "./sq") || !slices.Contains(found, "./rdma/roce/wire") || slices.Contains(found, "./bench") {
		t.Errorf("%q, %v", found, err)
	}
}
