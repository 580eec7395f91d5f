package target

import (
	"math/rand/v2"
	"testing"
)

// TestChunks checks that extents consist of free chunks, and that an extent is found
// whenever there are enough adjacent free chunks.
func TestChunks(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	const size = 100
	var c chunks
	c.flip(extent{n: size})
	var used [maxChunks]bool
	for i := size; i < maxChunks; i++ {
		used[i] = true
	}
	first := func(n int) int {
		in := 0
		for i, u := range used {
			if in++; u {
				in = 0
			}
			if in == n {
				return i - n + 1
			}
		}
		return -1
	}
	var taken []extent
	flip := func(r extent, to bool) {
		for i := range int(r.n) {
			if used[int(r.first)+i] == to {
				t.Fatalf("chunk %d of %+v twice", i, r)
			}
			used[int(r.first)+i] = to
		}
	}
	for range 20000 {
		n := 1 + rnd.IntN(32)
		if want, got := first(n), c.find(n); got != want {
			t.Fatalf("found %d for %d chunks, want %d", got, n, want)
		}
		if c.find(n) >= 0 && rnd.IntN(3) > 0 {
			r := c.take(uint32(n*chunkSize - rnd.IntN(chunkSize)))
			flip(r, true)
			taken = append(taken, r)
		} else if len(taken) > 0 {
			i := rnd.IntN(len(taken))
			c.flip(taken[i])
			flip(taken[i], false)
			taken[i] = taken[len(taken)-1]
			taken = taken[:len(taken)-1]
		}
	}
	if r := c.take(0); r != (extent{}) {
		t.Errorf("no bytes take %+v", r)
	}
}
