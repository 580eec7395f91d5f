package vhost

import (
	"sync/atomic"

	"golang.org/x/sys/cpu"

	"ublk-nvmeof/block"
)

// Stats holds the counts of a server since New.
type Stats struct {
	Reads, Writes           uint64 // requests, including failed ones
	ReadBytes, WrittenBytes uint64 // bytes of requests that succeeded
	Flushes                 uint64
	Discards                uint64
	WriteZeroes             uint64
	Errors                  uint64 // requests that were answered with an error
	Failed                  Failures
	Batches                 uint64 // calls of block.Queue.Submit
}

// Failures are the requests among Stats.Errors, by operation. Errors also has those of no
// known operation.
type Failures struct {
	Reads, Writes, Flushes, Discards, WriteZeroes uint64
}

func (s *Stats) add(t Stats) {
	s.Reads += t.Reads
	s.Writes += t.Writes
	s.ReadBytes += t.ReadBytes
	s.WrittenBytes += t.WrittenBytes
	s.Flushes += t.Flushes
	s.Discards += t.Discards
	s.WriteZeroes += t.WriteZeroes
	s.Errors += t.Errors
	s.Batches += t.Batches
	s.Failed.Reads += t.Failed.Reads
	s.Failed.Writes += t.Failed.Writes
	s.Failed.Flushes += t.Failed.Flushes
	s.Failed.Discards += t.Failed.Discards
	s.Failed.WriteZeroes += t.Failed.WriteZeroes
}

// counter is the index of a counter of a worker.
type counter int

const (
	nOther counter = iota // requests of no known operation, and GET_ID
	nReads
	nWrites
	nReadBytes
	nWrittenBytes
	nFlushes
	nDiscards
	nWriteZeroes
	nErrors
	nBatches
	nFailed   // first of the failures, by block.Op
	nCounters = nFailed + counter(block.OpWriteZeroes) + 1
)

// counterOf maps operations to counters.
var counterOf = [...]counter{
	block.OpUnset: nOther, block.OpRead: nReads, block.OpWrite: nWrites, block.OpFlush: nFlushes,
	block.OpDiscard: nDiscards, block.OpWriteZeroes: nWriteZeroes,
}

// counters holds the counters of a worker. The loop counts in now, and copies now to seen
// once per batch, for other goroutines.
type counters struct {
	now  [nCounters]uint64
	_    cpu.CacheLinePad
	seen [nCounters]atomic.Uint64
	_    cpu.CacheLinePad
}

// publish copies the counters to seen. Only the loop calls it.
func (c *counters) publish() {
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

func (c *counters) failed(op block.Op) uint64 { return c.seen[nFailed+counter(op)].Load() }

// snapshot returns the counters as of the last publish. Any goroutine may call it.
func (c *counters) snapshot() Stats {
	return Stats{
		Reads: c.seen[nReads].Load(), Writes: c.seen[nWrites].Load(),
		ReadBytes: c.seen[nReadBytes].Load(), WrittenBytes: c.seen[nWrittenBytes].Load(),
		Flushes: c.seen[nFlushes].Load(), Discards: c.seen[nDiscards].Load(), WriteZeroes: c.seen[nWriteZeroes].Load(),
		Errors: c.seen[nErrors].Load(), Batches: c.seen[nBatches].Load(),
		Failed: Failures{
			Reads: c.failed(block.OpRead), Writes: c.failed(block.OpWrite), Flushes: c.failed(block.OpFlush),
			Discards: c.failed(block.OpDiscard), WriteZeroes: c.failed(block.OpWriteZeroes),
		},
	}
}

// count counts a request that is answered.
func (w *worker) count(t *task, status byte) {
	w.now[counterOf[t.op]]++
	switch {
	case status != statusOK:
		w.now[nErrors]++
		w.now[nFailed+counter(t.op)]++
	case t.op == block.OpRead:
		w.now[nReadBytes] += t.total
	case t.op == block.OpWrite:
		w.now[nWrittenBytes] += t.total
	}
}
