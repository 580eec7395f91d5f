package spin

import "testing"

func TestSpinner(t *testing.T) {
	s := New()
	misses := func() (n int) {
		for ; s.Worth(); n++ {
			s.Record(false)
		}
		return n
	}
	if n := misses(); n != Start {
		t.Errorf("%d spins that find nothing, want %d", n, Start)
	}
	denied := 1
	for ; !s.Worth(); denied++ {
	}
	if denied != Retry-1 {
		t.Errorf("a try after %d denials, want %d", denied, Retry-1)
	}
	s.Record(true)
	if n := misses(); n != 2 {
		t.Errorf("%d spins after one that found something, want 2", n)
	}
	for range 100 {
		s.Record(true)
	}
	if n := misses(); n != credit {
		t.Errorf("%d spins after many that found something, want %d", n, credit)
	}
}
