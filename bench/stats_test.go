package main

import (
	"slices"
	"testing"
)

func TestSpreadOf(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want spread
	}{
		{nil, spread{}},
		{[]float64{3}, spread{1, 3, 3, 3}},
		{[]float64{9, 1, 5}, spread{3, 5, 1, 9}},
		{[]float64{4, 1, 2, 100}, spread{4, 3, 1, 100}},
	} {
		in := slices.Clone(c.in)
		if got := spreadOf(c.in); got != c.want {
			t.Errorf("spreadOf(%v) = %+v, want %+v", c.in, got, c.want)
		}
		if !slices.Equal(in, c.in) {
			t.Errorf("spreadOf changed %v to %v", in, c.in)
		}
	}
}

func TestRatiosArePaired(t *testing.T) {
	ours := map[int]float64{1: 10, 2: 30, 3: 50, 5: 1}
	kernel := map[int]float64{1: 20, 2: 10, 4: 7, 5: 0}
	// Rounds 3 and 4 have no partner, round 5 nothing to divide by.
	if got, want := ratios(ours, kernel), []float64{0.5, 3}; !slices.Equal(got, want) {
		t.Errorf("ratios = %v, want %v", got, want)
	}
}

func TestPerIO(t *testing.T) {
	if got := perIO(10, 4); got != 2.5 {
		t.Errorf("perIO(10, 4) = %v", got)
	}
	if a, b := perIO(10, 0), perIO(0, 0); a != 0 || b != 0 {
		t.Errorf("without I/O: %v and %v, want 0", a, b)
	}
}
