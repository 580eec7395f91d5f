package nbd

import (
	"sync/atomic"

	"golang.org/x/sys/cpu"
)

// Stats holds the counts of an export since it was added.
type Stats struct {
	Reads, Writes           uint64 // requests, including failed and refused ones
	ReadBytes, WrittenBytes uint64 // bytes of requests that succeeded
	Flushes                 uint64
	Trims                   uint64
	WriteZeroes             uint64
	Errors                  uint64 // requests that were answered with an error
	Failed                  Failures
	Batches                 uint64 // calls of block.Queue.Submit
}

// Failures are the requests among Stats.Errors, by kind. Errors also has those of no known
// kind.
type Failures struct {
	Reads, Writes, Flushes, Trims, WriteZeroes uint64
}

func (s *Stats) add(t Stats) {
	s.Reads += t.Reads
	s.Writes += t.Writes
	s.ReadBytes += t.ReadBytes
	s.WrittenBytes += t.WrittenBytes
	s.Flushes += t.Flushes
	s.Trims += t.Trims
	s.WriteZeroes += t.WriteZeroes
	s.Errors += t.Errors
	s.Batches += t.Batches
	s.Failed.Reads += t.Failed.Reads
	s.Failed.Writes += t.Failed.Writes
	s.Failed.Flushes += t.Failed.Flushes
	s.Failed.Trims += t.Failed.Trims
	s.Failed.WriteZeroes += t.Failed.WriteZeroes
}

// counter is the index of a counter of a shard.
type counter int

const (
	nUnknown counter = iota // requests of an unknown kind; they are errors as well
	nReads
	nWrites
	nReadBytes
	nWrittenBytes
	nFlushes
	nTrims
	nZeroes
	nErrors
	nBatches
	nFailed   // first of the failures, by command
	nCounters = nFailed + counter(cmdZeroes) + 1
)

// counterOf holds the counters by command.
var counterOf = [...]counter{
	cmdRead: nReads, cmdWrite: nWrites, cmdFlush: nFlushes, cmdTrim: nTrims, cmdZeroes: nZeroes,
}

// counters holds the counters of a shard. The loop counts in now, and copies now to seen
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

func (c *counters) failed(kind command) uint64 { return c.seen[nFailed+counter(kind)].Load() }

// snapshot returns the counters as of the last publish. Any goroutine may call it.
func (c *counters) snapshot() Stats {
	return Stats{
		Reads: c.seen[nReads].Load(), Writes: c.seen[nWrites].Load(),
		ReadBytes: c.seen[nReadBytes].Load(), WrittenBytes: c.seen[nWrittenBytes].Load(),
		Flushes: c.seen[nFlushes].Load(), Trims: c.seen[nTrims].Load(), WriteZeroes: c.seen[nZeroes].Load(),
		Errors: c.seen[nErrors].Load(), Batches: c.seen[nBatches].Load(),
		Failed: Failures{
			Reads: c.failed(cmdRead), Writes: c.failed(cmdWrite), Flushes: c.failed(cmdFlush),
			Trims: c.failed(cmdTrim), WriteZeroes: c.failed(cmdZeroes),
		},
	}
}

// count counts a request that is answered.
func (s *shard) count(t *task) {
	if int(t.kind) < len(counterOf) {
		s.now[counterOf[t.kind]]++
	}
	switch {
	case t.code != 0:
		s.now[nErrors]++
		if t.kind <= cmdZeroes {
			s.now[nFailed+counter(t.kind)]++
		}
	case t.kind == cmdRead:
		s.now[nReadBytes] += uint64(t.length)
	case t.kind == cmdWrite:
		s.now[nWrittenBytes] += uint64(t.length)
	}
}
