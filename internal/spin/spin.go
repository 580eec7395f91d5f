// Package spin decides whether to poll for an answer before a sleep. A sleep costs two
// switches, and the wake-up of a CPU that has gone idle. A spin that finds nothing costs CPU
// time that others may need, such as the one who is to answer.
package spin

const (
	// Polls is the number of polls of a spin. A poll of rdma/roce is a system call, so this
	// is about 50 µs, which is about what a sleep costs.
	Polls = 64
	// Retry is the number of sleeps without credit after which a spin is tried.
	Retry = 64
	// Start is the credit of a new Spinner.
	Start  = 4
	credit = 16 // the largest credit
)

// Spinner spins as long as that pays: a hit earns the credit of two misses. Without credit, it
// tries once in a while. One goroutine uses it.
type Spinner struct {
	credit int
	denied int // number of denials since the last try
}

// New returns a Spinner.
func New() Spinner { return Spinner{credit: Start} }

// Worth reports whether to spin now. If so, Record must follow.
func (s *Spinner) Worth() bool {
	if s.credit > 0 {
		return true
	}
	if s.denied++; s.denied < Retry {
		return false
	}
	s.denied = 0
	return true
}

// Record says whether the spin has found something.
func (s *Spinner) Record(hit bool) {
	if hit {
		s.credit = min(s.credit+2, credit)
	} else {
		s.credit = max(s.credit-1, 0)
	}
}
