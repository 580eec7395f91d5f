package main

import (
	"testing"
	"time"
)

func TestWindow(t *testing.T) {
	start := time.Now()
	// Each pair is a time in tenths of the measured time, and bytes.
	for name, c := range map[string]struct {
		shots [][2]int
		want  int
	}{
		"nothing":             {nil, 0},
		"one":                 {[][2]int{{0, 5}}, 0},
		"two, maybe too late": {[][2]int{{0, 5}, {5, 9}}, 0},
		"regular":             {[][2]int{{0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 5}, {5, 6}}, 4},
		"not the end":         {[][2]int{{0, 1}, {5, 2}, {9, 3}, {10, 4}, {11, 5}}, 2},
		"ended before":        {[][2]int{{0, 1}, {3, 2}, {6, 3}, {9, 3}, {10, 3}}, 1},
		"watcher was late":    {[][2]int{{0, 1}, {1, 2}, {14, 3}, {15, 3}}, 0},
	} {
		var shots []snapshot
		for _, s := range c.shots {
			at := start.Add(time.Duration(s[0]) * 100 * time.Millisecond)
			shots = append(shots, snapshot{cpu: cpuUse{at: at}, bytes: uint64(s[1])})
		}
		if got := window(shots, time.Second); got != c.want {
			t.Errorf("%s: window = %d, want %d", name, got, c.want)
		}
	}
}
