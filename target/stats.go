package target

import (
	"cmp"
	"maps"
	"slices"
	"sync/atomic"

	"ublk-nvmeof/nvme"
)

// queueStats are the counters of a queue. Only the goroutine of the queue writes them,
// and any goroutine may read them.
type queueStats struct {
	commands [256]atomic.Uint64 // by opcode, when they begin
	errors   atomic.Uint64
	lists    atomic.Uint64
	read     atomic.Uint64 // bytes
	written  atomic.Uint64
}

// Counts are the sums of the counters of one or more queues.
type Counts struct {
	Commands     map[nvme.Opcode]uint64 // commands that have begun, by opcode
	Errors       uint64                 // commands completed with another status than success
	Lists        uint64                 // commands with a list of descriptors, whose data is in several places of the host
	BytesRead    uint64                 // of Read commands
	BytesWritten uint64                 // of Write commands
}

func newCounts() Counts { return Counts{Commands: map[nvme.Opcode]uint64{}} }

func (c Counts) clone() Counts {
	c.Commands = maps.Clone(c.Commands)
	return c
}

func (c *Counts) add(s *queueStats) {
	for op := range s.commands {
		if n := s.commands[op].Load(); n > 0 {
			c.Commands[nvme.Opcode(op)] += n
		}
	}
	c.Errors += s.errors.Load()
	c.Lists += s.lists.Load()
	c.BytesRead += s.read.Load()
	c.BytesWritten += s.written.Load()
}

// totals add up admin and I/O queues, whose opcodes mean different things.
type totals struct{ admin, io Counts }

func newTotals() totals { return totals{newCounts(), newCounts()} }

func (t *totals) add(q *queuePair) {
	if q.qid == 0 {
		t.admin.add(&q.stats)
	} else {
		t.io.add(&q.stats)
	}
}

// QueueStats are the counts of a queue.
type QueueStats struct {
	QID     uint16
	Entries int // of the submission queue
	Counts
}

// ControllerStats describe a controller.
type ControllerStats struct {
	CNTLID  uint16
	SubNQN  string
	HostNQN string
	// Ending says that the controller has ended, but some of its queues and
	// commands have not.
	Ending bool
	Queues []QueueStats // by QID
}

// Snapshot is the state of a target. It is not exact, because counters change while
// they are read.
type Snapshot struct {
	Controllers []ControllerStats
	Admin, IO   Counts // of all queues since New, including those that have ended
	Connections int    // current connections
	QueueMemory int64  // bytes of connected queues, see [Config.QueueMemory]
	Connects    uint64 // connect requests accepted
	Rejects     uint64 // connect requests refused
	// Refusals counts connect requests and Connect commands that were refused, by
	// reason.
	Refusals map[string]uint64
}

// Snapshot returns the state of the target.
func (t *Target) Snapshot() Snapshot {
	t.mu.Lock()
	sum := totals{t.past.admin.clone(), t.past.io.clone()}
	for q := range t.queues {
		sum.add(q)
	}
	snap := Snapshot{Admin: sum.admin, IO: sum.io, Connections: len(t.queues), QueueMemory: t.admission.memory, Connects: t.connects, Rejects: t.rejects, Refusals: maps.Clone(t.refusals)}
	t.mu.Unlock()
	for _, c := range t.controllers.of(nil) {
		snap.Controllers = append(snap.Controllers, c.snapshot())
	}
	slices.SortFunc(snap.Controllers, func(a, b ControllerStats) int {
		if a.SubNQN != b.SubNQN {
			return cmp.Compare(a.SubNQN, b.SubNQN)
		}
		return cmp.Compare(a.CNTLID, b.CNTLID)
	})
	return snap
}

func (c *controller) snapshot() ControllerStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := ControllerStats{CNTLID: c.id, SubNQN: c.subsystem.cfg.NQN, HostNQN: c.hostNQN, Ending: c.ended}
	for _, q := range c.queues {
		s := QueueStats{QID: q.qid, Entries: int(q.sqSize), Counts: newCounts()}
		s.add(&q.stats)
		out.Queues = append(out.Queues, s)
	}
	slices.SortFunc(out.Queues, func(a, b QueueStats) int { return cmp.Compare(a.QID, b.QID) })
	return out
}
