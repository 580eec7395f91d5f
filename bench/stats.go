package main

import (
	"math"
	"slices"
)

// spread is a median with its extremes; the zero value is of no samples.
type spread struct {
	n                int
	median, min, max float64
}

// spreadOf summarises samples. They are not changed.
func spreadOf(samples []float64) spread {
	if len(samples) == 0 {
		return spread{}
	}
	s := slices.Sorted(slices.Values(samples))
	mid := len(s) / 2
	m := s[mid]
	if len(s)%2 == 0 {
		m = (s[mid-1] + s[mid]) / 2
	}
	return spread{n: len(s), median: m, min: s[0], max: s[len(s)-1]}
}

// ratios pairs samples by their round and gives numerator / denominator of each
// pair, in the order of rounds. A round that one of them lacks, or whose
// denominator is 0, gives none.
func ratios(numerator, denominator map[int]float64) []float64 {
	var rounds []int
	for r := range numerator {
		if d, ok := denominator[r]; ok && d != 0 {
			rounds = append(rounds, r)
		}
	}
	slices.Sort(rounds)
	var out []float64
	for _, r := range rounds {
		out = append(out, numerator[r]/denominator[r])
	}
	return out
}

// perIO divides, and gives 0 rather than an infinity JSON cannot hold.
func perIO(total float64, ios uint64) float64 {
	v := total / float64(ios)
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return 0
	}
	return v
}
