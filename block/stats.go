package block

// Stats are the counts of a front end since it began to serve. Those of a loop are as of its
// last batch.
type Stats struct {
	Reads, Writes           uint64 // requests that were answered, including failed and refused ones
	ReadBytes, WrittenBytes uint64 // of requests that succeeded
	DirectBytes             uint64 // of both, those that the back end read or wrote in regions, without a copy
	Flushes                 uint64
	Discards                uint64
	WriteZeroes             uint64
	Errors                  uint64 // requests that were answered with an error
	Failed                  Failures
	Batches                 uint64 // calls of Queue.Submit
}

// Failures are the requests among Stats.Errors, by operation. Errors also has those of no
// known operation.
type Failures struct {
	Reads, Writes, Flushes, Discards, WriteZeroes uint64
}

// Add adds the counts of t.
func (s *Stats) Add(t Stats) {
	s.Reads += t.Reads
	s.Writes += t.Writes
	s.ReadBytes += t.ReadBytes
	s.WrittenBytes += t.WrittenBytes
	s.DirectBytes += t.DirectBytes
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
