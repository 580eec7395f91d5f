// Package iostats counts the requests of a front end on one loop.
package iostats

import (
	"sync/atomic"

	"golang.org/x/sys/cpu"

	"ublk-nvmeof/block"
)

const nOps = int(block.OpWriteZeroes) + 1

// Indices of the counters. The requests come first, by block.Op.
const (
	nReadBytes = nOps + iota
	nWrittenBytes
	nDirectBytes
	nErrors
	nBatches
	nFailed   // first of the failures, by block.Op
	nCounters = nFailed + nOps
)

// Counters are the counters of a loop. The loop counts in now, and copies what has changed
// to seen once per batch, for other goroutines. So a request costs a plain addition.
type Counters struct {
	now  [nCounters]uint64
	_    cpu.CacheLinePad
	seen [nCounters]atomic.Uint64
	_    cpu.CacheLinePad
}

// Count counts a request that is answered. bytes counts if it is a read or write that has
// succeeded. OpUnset stands for requests of no known operation. Only the loop calls it.
func (c *Counters) Count(op block.Op, failed bool, bytes uint64) {
	c.now[op]++
	switch {
	case failed:
		c.now[nErrors]++
		c.now[nFailed+int(op)]++
	case op == block.OpRead:
		c.now[nReadBytes] += bytes
	case op == block.OpWrite:
		c.now[nWrittenBytes] += bytes
	}
}

// CountDirect counts bytes of a read or write that has succeeded, which were not copied. Only the loop
// calls it.
func (c *Counters) CountDirect(bytes uint64) { c.now[nDirectBytes] += bytes }

// CountBatch counts a call of block.Queue.Submit. Only the loop calls it.
func (c *Counters) CountBatch() { c.now[nBatches]++ }

// Publish makes the counts visible to Snapshot. Only the loop calls it.
func (c *Counters) Publish() {
	n := nFailed
	if c.seen[nErrors].Load() != c.now[nErrors] {
		n = nCounters
	}
	for i := range c.now[:n] {
		if c.seen[i].Load() != c.now[i] {
			c.seen[i].Store(c.now[i])
		}
	}
}

// Snapshot returns the counters as of the last Publish. Any goroutine may call it.
func (c *Counters) Snapshot() block.Stats {
	ops := func(first int, op block.Op) uint64 { return c.seen[first+int(op)].Load() }
	return block.Stats{
		Reads: ops(0, block.OpRead), Writes: ops(0, block.OpWrite), Flushes: ops(0, block.OpFlush),
		Discards: ops(0, block.OpDiscard), WriteZeroes: ops(0, block.OpWriteZeroes),
		ReadBytes: c.seen[nReadBytes].Load(), WrittenBytes: c.seen[nWrittenBytes].Load(),
		DirectBytes: c.seen[nDirectBytes].Load(),
		Errors:      c.seen[nErrors].Load(), Batches: c.seen[nBatches].Load(),
		Failed: block.Failures{
			Reads: ops(nFailed, block.OpRead), Writes: ops(nFailed, block.OpWrite), Flushes: ops(nFailed, block.OpFlush),
			Discards: ops(nFailed, block.OpDiscard), WriteZeroes: ops(nFailed, block.OpWriteZeroes),
		},
	}
}
