package initiator

import (
	"slices"
	"time"
)

// unconfirmed is a queue pair that may have to send again what was pushed before the mark.
type unconfirmed struct {
	*queuePair
	mark uint64
}

// settle waits until no queue pair may have to send data again that were in a capsule before.
// If an acknowledgement was lost, the adapter reads the data again, although the target has
// answered, and the queue pair fails if it cannot (package sq). So the buffers of a queue are
// freed after that. It ends when the SENDs are acknowledged, at the latest when an association
// whose adapter does not acknowledge is lost. It must not be called on a loop.
func (s *Subsystem) settle() {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for _, l := range s.lanes {
		var open []unconfirmed
		// A loop that has ended has no queue pairs that are in use.
		_ = l.loop.Call(func() {
			for _, p := range l.pairs {
				open = append(open, unconfirmed{p, p.sq.Mark()})
			}
			open = slices.DeleteFunc(open, unconfirmed.settled)
		})
		for len(open) > 0 {
			<-tick.C
			if l.loop.Call(func() { open = slices.DeleteFunc(open, unconfirmed.settled) }) != nil {
				break
			}
		}
	}
}

// settled reports whether the queue pair has settled. If it has not, a probe behind the SENDs
// will confirm them. Each pass looks for its completion.
func (u unconfirmed) settled() bool {
	if u.lost || u.gone || u.sq.Confirmed(u.mark) {
		return true
	}
	if err := u.sq.Probe(); err != nil {
		u.fail(err)
	}
	return false
}
