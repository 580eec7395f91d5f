package ublk

import (
	"sync/atomic"

	"golang.org/x/sys/cpu"

	"ublk-nvmeof/block"
)

// QueueStats are the counters of one hardware queue since this process began to serve it.
type QueueStats struct {
	Reads, Writes           uint64 // completed requests, including failed ones
	ReadBytes, WrittenBytes uint64 // of successful requests
	Flushes                 uint64
	Discards                uint64
	WriteZeroes             uint64
	Errors                  uint64 // requests that ended with an errno
	Failed                  Failures
	Batches                 uint64 // calls of block.Queue.Submit
}

// Failures are the requests among QueueStats.Errors that the back end failed, by operation.
type Failures struct {
	Reads, Writes, Flushes, Discards, WriteZeroes uint64
}

// Stats are the counters of a device.
type Stats struct {
	Queues []QueueStats
}

// Total returns the sum over all queues.
func (s Stats) Total() QueueStats {
	var t QueueStats
	for _, q := range s.Queues {
		t.Reads += q.Reads
		t.Writes += q.Writes
		t.ReadBytes += q.ReadBytes
		t.WrittenBytes += q.WrittenBytes
		t.Flushes += q.Flushes
		t.Discards += q.Discards
		t.WriteZeroes += q.WriteZeroes
		t.Errors += q.Errors
		t.Batches += q.Batches
		t.Failed.Reads += q.Failed.Reads
		t.Failed.Writes += q.Failed.Writes
		t.Failed.Flushes += q.Failed.Flushes
		t.Failed.Discards += q.Failed.Discards
		t.Failed.WriteZeroes += q.Failed.WriteZeroes
	}
	return t
}

// counter is the index of a counter of a queue.
type counter int

const (
	nReads counter = iota
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

// counters are the counters of a queue. The loop adds to now, and once per batch it
// publishes the changed counters in seen. So a request costs a plain addition, and a
// batch one atomic store for each changed counter.
type counters struct {
	now  [nCounters]uint64
	_    cpu.CacheLinePad
	seen [nCounters]atomic.Uint64
	_    cpu.CacheLinePad
}

// publish publishes the counters. Only the loop calls it.
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

// snapshot returns the published counters. Any goroutine may call it.
func (c *counters) snapshot() QueueStats {
	return QueueStats{
		Reads: c.seen[nReads].Load(), Writes: c.seen[nWrites].Load(),
		ReadBytes: c.seen[nReadBytes].Load(), WrittenBytes: c.seen[nWrittenBytes].Load(),
		Flushes: c.seen[nFlushes].Load(), Discards: c.seen[nDiscards].Load(),
		WriteZeroes: c.seen[nWriteZeroes].Load(), Errors: c.seen[nErrors].Load(),
		Batches: c.seen[nBatches].Load(),
		Failed: Failures{
			Reads: c.failed(block.OpRead), Writes: c.failed(block.OpWrite), Flushes: c.failed(block.OpFlush),
			Discards: c.failed(block.OpDiscard), WriteZeroes: c.failed(block.OpWriteZeroes),
		},
	}
}
