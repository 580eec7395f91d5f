package target

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// Match says which commands a fault hits.
type Match struct {
	Admin   bool          // those of admin queues, instead of those of I/O queues
	QID     uint16        // with Admin unset: those of this queue; 0: of every I/O queue
	NSID    uint32        // those to this namespace; 0: to any
	Opcodes []nvme.Opcode // those with one of these opcodes; empty: all but Fabrics commands
	// Selectors are what an Identify, Get Log Page, Set or Get Features asks for:
	// its CNS, LID or FID, which share the low byte of CDW10; empty: any. With
	// others they mean nothing.
	Selectors []uint8
}

func (m *Match) hits(qid uint16, cmd *nvme.Command) bool {
	if m.Admin != (qid == 0) || m.QID != 0 && m.QID != qid || m.NSID != 0 && m.NSID != cmd.NSID() {
		return false
	}
	if len(m.Selectors) > 0 && !slices.Contains(m.Selectors, uint8(cmd.CDW10())) {
		return false
	}
	if len(m.Opcodes) == 0 {
		return cmd.Opcode() != nvme.OpFabrics
	}
	return slices.Contains(m.Opcodes, cmd.Opcode())
}

// Corruption is something wrong with the answer to a command.
type Corruption uint8

// Corruptions.
const (
	CorruptNone      Corruption = iota
	CorruptID                   // the command id is of no command
	CorruptDuplicate            // it is sent twice
	CorruptShort                // its last 8 bytes are missing
	CorruptSQHead               // the submission queue head is beyond the queue
	// CorruptKey: it invalidates a key that the command did not name. The RDMA
	// layer of a host that does not have such a key breaks the connection.
	CorruptKey
	CorruptData // the data that goes to the host is noise
	// CorruptLost: the command is carried out, but neither its data nor its
	// completion goes to the host.
	CorruptLost
)

var corruptions = [...]string{"none", "wrong id", "duplicate", "short", "wrong sq head", "wrong key", "data", "lost"}

func (c Corruption) String() string {
	if int(c) < len(corruptions) {
		return corruptions[c]
	}
	return fmt.Sprintf("corruption %d", uint8(c))
}

// Fault is what happens to the commands that match. Of Drop, Disconnect and
// Status the first that is set counts; the command is then not carried out. A
// Status may have a CRD field, see [Config.RetryDelays].
type Fault struct {
	Match
	Skip  int // spare so many that match first
	Count int // hit so many after those; 0: all

	Delay time.Duration // before anything else; a queue delays no more commands than it has entries
	Drop  bool          // never answer
	// Hold keeps an I/O command inside its store for so long. It is carried out
	// then even if its connection, or its controller, has ended meanwhile. Its
	// queue does nothing else.
	Hold       time.Duration
	Disconnect bool        // end the connection
	Status     nvme.Status // answer with this, with or without nvme.StatusDNR
	Corrupt    Corruption  // of the completion or the data
}

// rule is a fault that was added.
type rule struct {
	Fault
	mu   sync.Mutex // guards seen
	seen int
}

// strikes counts a command that matches, and says whether it is hit.
func (r *rule) strikes() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen++
	return r.seen > r.Skip && (r.Count == 0 || r.seen <= r.Skip+r.Count)
}

// Faults makes a target misbehave. All methods may be called from any
// goroutine at any time; nothing is wrong until one is.
type Faults struct {
	target  *Target
	mu      sync.Mutex // for changes of rules, of what is hidden, and of frozen
	unhide  *time.Timer
	rules   atomic.Pointer[[]*rule] // nil: none
	stalled atomic.Bool
	frozen  atomic.Pointer[freeze] // nil: not frozen
	hidden  atomic.Bool            // no namespace is listed
	grant   atomic.Int32           // 0: unset, -1: refuse
	reject  atomic.Uint32
	connect atomic.Uint32
}

// Add adds a fault, which the returned function takes away again. The first
// that hits a command counts, in the order of adding.
func (f *Faults) Add(fault Fault) (remove func()) {
	fault.Opcodes, fault.Selectors = slices.Clone(fault.Opcodes), slices.Clone(fault.Selectors)
	added := &rule{Fault: fault}
	f.change(func(rules []*rule) []*rule { return append(rules, added) })
	return func() {
		f.change(func(rules []*rule) []*rule {
			return slices.DeleteFunc(rules, func(r *rule) bool { return r == added })
		})
	}
}

// change replaces the rules by what edit makes of a copy.
func (f *Faults) change(edit func([]*rule) []*rule) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var rules []*rule
	if old := f.rules.Load(); old != nil {
		rules = slices.Clone(*old)
	}
	if rules = edit(rules); len(rules) == 0 {
		f.rules.Store(nil)
		return
	}
	f.rules.Store(&rules)
}

// Clear ends all faults: stalls, freezes and hidden namespaces, too.
func (f *Faults) Clear() {
	f.change(func([]*rule) []*rule { return nil })
	f.grant.Store(0)
	f.reject.Store(0)
	f.connect.Store(0)
	f.Stall(false)
	f.Freeze(0)
	f.HideNamespaces(0)
}

// Grant makes the answer to a host that asks for I/O queues n (1..65535); 0
// ends it, and a negative n makes it an error.
func (f *Faults) Grant(n int) {
	f.grant.Store(int32(max(-1, min(n, nvme.MaxQueues))))
}

// RejectConnects refuses connect requests for this reason; 0 ends it.
func (f *Faults) RejectConnects(reason nvme.RDMARejectStatus) { f.reject.Store(uint32(reason)) }

// FailConnects answers the Connect commands of all queues with a status;
// success ends it.
func (f *Faults) FailConnects(s nvme.Status) { f.connect.Store(uint32(s)) }

// Stall makes the target begin no command until it ends. Connections stay.
func (f *Faults) Stall(on bool) {
	f.stalled.Store(on)
	if on {
		return
	}
	f.target.mu.Lock()
	defer f.target.mu.Unlock()
	for q := range f.target.queues {
		q.wake()
	}
}

// Disconnect ends the connections of all controllers' queues with this id, or
// all connections if qid is negative, and says how many.
func (f *Faults) Disconnect(qid int) int {
	return f.target.disconnect(func(q *queue) bool { return qid < 0 || int(q.qid) == qid }, "fault: disconnect")
}

// HideNamespaces makes the target look for so long as if no namespace had been
// added yet, as a target does that opens its port first. Then hosts are told of
// each. 0 ends it.
func (f *Faults) HideNamespaces(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.unhide != nil {
		f.unhide.Stop()
		f.unhide = nil
	}
	if d > 0 {
		f.unhide = time.AfterFunc(d, func() { f.HideNamespaces(0) })
	}
	if f.hidden.Swap(d > 0) != (d > 0) {
		for _, s := range f.target.all() {
			s.republish()
		}
	}
}

// Hidden says whether namespaces are hidden.
func (f *Faults) Hidden() bool { return f.hidden.Load() }

// judge looks whether a fault hits a command. It reports true if the command
// is not to be carried out now.
func (q *queue) judge(i int, rules []*rule) bool {
	r, cmd := &q.reqs[i], q.command(i)
	for _, rule := range rules {
		if !rule.hits(q.qid, cmd) || !rule.strikes() {
			continue
		}
		r.corrupt, r.rule = rule.Corrupt, rule
		if rule.Delay > 0 {
			r.due = time.Now().Add(rule.Delay)
			q.delayed = append(q.delayed, uint16(i))
			return true
		}
		return q.strike(i)
	}
	return false
}

// strike does to a command what its fault says. It reports true if the command
// is not to be carried out.
func (q *queue) strike(i int) bool {
	switch rule := q.reqs[i].rule; {
	case rule.Drop:
		q.drop(i)
	case rule.Disconnect:
		q.drop(i)
		q.kill("fault: disconnect")
	case !rule.Status.OK():
		q.respond(i, 0, rule.Status)
	default:
		return false
	}
	return true
}

// spoil makes noise of a command's data.
func (q *queue) spoil(r *request) {
	b := q.bytes(r.data)
	for i := 0; i < len(b); i += 8 {
		binary.NativeEndian.PutUint64(b[i:], rand.Uint64())
	}
}

// corrupt spoils a completion that is about to be sent as wr.
func (q *queue) corrupt(r *request, wr *rdma.SendWR, done *nvme.Completion) {
	switch r.corrupt {
	case CorruptID:
		done.SetCID(^done.CID())
	case CorruptShort:
		wr.SGE[0].Length = nvme.CompletionSize / 2
	case CorruptSQHead:
		done.SetSQHead(q.sqSize + 1)
	case CorruptKey:
		wr.Op, wr.RKey = rdma.SendInvalidate, ^r.key
	case CorruptDuplicate:
		if q.reserved == len(q.responses) {
			return // the host is behind with its receives
		}
		q.reserved++
		first := *done
		duplicate, at := q.completion(extent{})
		*nvme.CompletionAt(q.out.Bytes()[at:]) = first
		q.answers = append(q.answers, duplicate)
	}
}
