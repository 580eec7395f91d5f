package target

import (
	"context"
	"time"

	"ublk-nvmeof/nvme"
)

// maxPiece is the longest range, in bytes, that a store zeroes or discards in one call.
// A command for terabytes ends between two calls if its connection or its namespace
// ends.
const maxPiece = 64 << 20

// enter begins a command's access to blocks of its namespace, unless the
// namespace was removed or shrunk since the command arrived, or another host has it
// reserved. Only between it and
// exit a queue uses a store.
func (q *queuePair) enter(i int, slba, nlb uint64) nvme.Status {
	r := &q.reqs[i]
	q.access.Add(1) // before the table is read; drained is called after the table was changed
	s := nvme.StatusSuccess
	if r.rule != nil && r.rule.Hold > 0 && !r.held {
		r.held = true
		s = q.target.hold(r.rule.Hold)
	}
	switch {
	case !s.OK():
	case q.ctrl.subsystem.namespace(q.command(i).NSID()) != r.ns:
		s = nvme.StatusInvalidNamespace | dnr
	case !r.ns.within(slba, nlb):
		s = nvme.StatusLBAOutOfRange | dnr
	default:
		if held := r.ns.reservations.current.Load(); held != nil && held.conflicts(q.ctrl.hostID, q.command(i).Opcode()) {
			s = nvme.StatusReservationConflict | dnr
		}
	}
	if !s.OK() {
		q.exit()
	}
	return s
}

// exit ends an access.
func (q *queuePair) exit() { q.access.Add(1) }

// hold keeps a command inside its store for d, even if its connection ends. If the
// target closes, hold returns an error status, and the command must not be executed.
func (t *Target) hold(d time.Duration) nvme.Status {
	select {
	case <-time.After(d):
	case <-t.ctx.Done():
	}
	if t.faults.awaitThaw(t.ctx); t.ctx.Err() != nil {
		return nvme.StatusInternal | dnr
	}
	return nvme.StatusSuccess
}

// drained waits until every access to a store that began before the call has ended, and
// no subsystem is being flushed. It returns an error only if ctx ends first.
func (t *Target) drained(ctx context.Context) error {
	t.mu.Lock()
	busy := map[*queuePair]uint64{}
	for q := range t.queues {
		if n := q.access.Load(); n%2 == 1 {
			busy[q] = n
		}
	}
	t.mu.Unlock()
	for pause := 50 * time.Microsecond; ; pause = min(2*pause, 10*time.Millisecond) {
		for q, n := range busy {
			if q.access.Load() != n {
				delete(busy, q)
			}
		}
		if len(busy) == 0 && t.flushes.Load() == 0 {
			return nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
