package iostats

import (
	"testing"

	"ublk-nvmeof/block"
)

// TestCounters counts every operation, with and without an error.
func TestCounters(t *testing.T) {
	var c Counters
	for op := block.OpUnset; op <= block.OpWriteZeroes; op++ {
		for range int(op) + 1 {
			c.Count(op, false, 512)
		}
		c.Count(op, true, 512)
	}
	c.CountDirect(512)
	c.CountDirect(1024)
	c.CountBatch()
	if got := c.Snapshot(); got != (block.Stats{}) {
		t.Errorf("visible before Publish: %+v", got)
	}
	want := block.Stats{
		Reads: 3, Writes: 4, Flushes: 5, Discards: 6, WriteZeroes: 7, ReadBytes: 2 * 512, WrittenBytes: 3 * 512, DirectBytes: 3 * 512,
		Errors: 6, Batches: 1, Failed: block.Failures{Reads: 1, Writes: 1, Flushes: 1, Discards: 1, WriteZeroes: 1},
	}
	c.Publish()
	if got := c.Snapshot(); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	sum := c.Snapshot()
	sum.Add(c.Snapshot())
	if sum.Reads != 6 || sum.Failed.WriteZeroes != 2 || sum.Batches != 2 || sum.DirectBytes != 6*512 {
		t.Errorf("sum %+v", sum)
	}
}
