package main

import (
	"slices"
	"strings"
	"testing"
)

func TestMoreAllocations(t *testing.T) {
	const base = `pkg: ublk-nvmeof/sq
BenchmarkA-2   	 1000	 10.0 ns/op	 0 B/op	 0 allocs/op
BenchmarkB-2   	 1000	 10.0 ns/op	 64 B/op	 2 allocs/op
BenchmarkC-2   	 1000	 10.0 ns/op	 0 B/op	 0 allocs/op
BenchmarkD-2   	 1000	 10.0 ns/op	 0 B/op	 124 allocs/op
PASS
pkg: ublk-nvmeof/cq
BenchmarkA-2   	 1000	 10.0 ns/op	 9.0 ns/command	 0 B/op	 0 allocs/op
`
	const head = `pkg: ublk-nvmeof/sq
BenchmarkA-2   	 1000	 10.0 ns/op	 48 B/op	 1 allocs/op
BenchmarkA-2   	 1000	 10.0 ns/op	 0 B/op	 0 allocs/op
BenchmarkB-2   	 1000	 10.0 ns/op	 32 B/op	 1 allocs/op
BenchmarkD-2   	 1000	 10.0 ns/op	 0 B/op	 125 allocs/op
BenchmarkNew-2 	 1000	 10.0 ns/op	 32 B/op	 1 allocs/op
pkg: ublk-nvmeof/cq
BenchmarkA-2   	 1000	 10.0 ns/op	 9.0 ns/command	 48 B/op	 1 allocs/op
`
	want := []string{"ublk-nvmeof/cq.BenchmarkA-2 (1, was 0)"}
	if got := moreAllocations(strings.NewReader(base), strings.NewReader(head)); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
