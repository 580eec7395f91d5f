package target

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// Match selects the commands that a fault applies to.
type Match struct {
	Port    uint16        // match commands that arrive at the port with this id; 0: at any
	Admin   bool          // match commands of admin queues instead of I/O queues
	QID     uint16        // without Admin: match commands of this queue; 0: of every I/O queue
	NSID    uint32        // match commands to this namespace; 0: to any
	Opcodes []nvme.Opcode // match commands with these opcodes; empty: all except Fabrics commands
	// Selectors are the values of the low byte of CDW10 to match, which is the CNS
	// of Identify, the LID of Get Log Page and the FID of Set and Get Features;
	// empty: any.
	Selectors []uint8
	// Messages selects authentication commands by the message that is due; empty: it
	// does not matter, and Fabrics commands must be in Opcodes.
	Messages []auth.Kind
}

func (m *Match) hits(q *queuePair, cmd *nvme.Command) bool {
	if m.Port != 0 && m.Port != q.port.ID() || m.Admin != (q.qid == 0) || m.QID != 0 && m.QID != q.qid || m.NSID != 0 && m.NSID != cmd.NSID() {
		return false
	}
	if len(m.Messages) > 0 {
		return isAuth(cmd) && slices.Contains(m.Messages, q.authDue())
	}
	if len(m.Selectors) > 0 && !slices.Contains(m.Selectors, uint8(cmd.CDW10())) {
		return false
	}
	if len(m.Opcodes) == 0 {
		return cmd.Opcode() != nvme.OpFabrics
	}
	return slices.Contains(m.Opcodes, cmd.Opcode())
}

// Corruption is an error in the completion or the data of a command.
type Corruption uint8

// Corruptions.
const (
	CorruptNone      Corruption = iota
	CorruptID                   // the completion has the command id of no command
	CorruptDuplicate            // the completion is sent twice
	CorruptShort                // the last 8 bytes of the completion are missing
	CorruptSQHead               // the submission queue head of the completion is beyond the end of the queue
	// CorruptKey invalidates a key that the command did not name. The RDMA layer of
	// a host that does not have such a key breaks the connection.
	CorruptKey
	CorruptData // the data for the host is random
	// CorruptLost executes the command, but sends neither its data nor its
	// completion.
	CorruptLost
)

var corruptions = [...]string{"none", "wrong id", "duplicate", "short", "wrong sq head", "wrong key", "data", "lost"}

func (c Corruption) String() string {
	if int(c) < len(corruptions) {
		return corruptions[c]
	}
	return fmt.Sprintf("corruption %d", uint8(c))
}

// Fault describes what happens to the commands that match. If Drop, Disconnect or
// Status is set, the command is not executed. If several are set, the first in this
// order counts. Status may have a CRD field, see [Config.RetryDelays].
type Fault struct {
	Match
	Skip  int // number of matching commands that are spared first
	Count int // number of matching commands that are hit after those; 0: all

	Delay time.Duration // before anything else; a queue delays at most as many commands as it has entries
	Drop  bool          // do not complete the command
	// Hold keeps an I/O command inside its store for this time. Then the command is
	// executed, even if its connection or its controller has ended by then. Its
	// queue executes no other command meanwhile. If the target is closed, the
	// command is not executed.
	Hold       time.Duration
	Disconnect bool        // end the connection
	Status     nvme.Status // complete the command with this status, with or without nvme.StatusDNR
	Corrupt    Corruption  // corrupt the completion or the data

	// The rest changes the data that an admin command or an authentication returns, in
	// this order.

	// Replay returns the data of the first command that the fault applied to.
	Replay bool
	// Patches overwrite bytes, such as fields of Identify. They have no effect beyond
	// the end of the data.
	Patches []Patch
	// Truncate transfers only so many bytes; 0: all, negative: none.
	Truncate int
}

// Patch is a number of bytes and their offset in the data.
type Patch struct {
	Offset int
	Bytes  []byte
}

// apply writes the bytes of the patch into data.
func (p Patch) apply(data []byte) {
	if p.Offset >= 0 && p.Offset < len(data) {
		copy(data[p.Offset:], p.Bytes)
	}
}

// rule is a fault that was added.
type rule struct {
	Fault
	mu    sync.Mutex // guards seen and first
	seen  int
	first []byte // what Replay returns
}

// strikes counts a command that matches, and reports whether the fault applies to it.
func (r *rule) strikes() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen++
	return r.seen > r.Skip && (r.Count == 0 || r.seen <= r.Skip+r.Count)
}

// falsify changes the data that a command returns, and returns how many bytes of them the
// host gets.
func (r *rule) falsify(data []byte) int {
	if r.Replay {
		r.replay(data)
	}
	for _, p := range r.Patches {
		p.apply(data)
	}
	switch {
	case r.Truncate < 0:
		return 0
	case r.Truncate > 0:
		return min(r.Truncate, len(data))
	}
	return len(data)
}

// replay replaces data by those of the first command.
func (r *rule) replay(data []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.first == nil {
		r.first = slices.Clone(data)
	}
	clear(data[copy(data, r.first):])
}

// Faults makes a target misbehave. Any goroutine may call its methods at any time.
type Faults struct {
	target  *Target
	mu      sync.Mutex // guards unhide and changes of rules, hidden and frozen
	unhide  *time.Timer
	rules   atomic.Pointer[[]*rule] // nil: none
	stalled atomic.Bool
	frozen  atomic.Pointer[freeze] // nil: not frozen
	hidden  atomic.Bool            // no namespace is listed
	grant   atomic.Int32           // 0: unset, -1: refuse
	reject  atomic.Uint32
	connect atomic.Uint32
}

// AddedFault is a fault that was added. Any goroutine may call its methods.
type AddedFault struct {
	faults *Faults
	rule   *rule
}

// Remove removes the fault.
func (a AddedFault) Remove() {
	a.faults.change(func(rules []*rule) []*rule {
		return slices.DeleteFunc(rules, func(r *rule) bool { return r == a.rule })
	})
}

// UsedUp reports whether the fault has applied to Count commands and applies to no more.
func (a AddedFault) UsedUp() bool {
	a.rule.mu.Lock()
	defer a.rule.mu.Unlock()
	return a.rule.Count != 0 && a.rule.seen >= a.rule.Skip+a.rule.Count
}

// Add adds a fault. Only the first fault that applies to a command counts, in the order
// in which they were added.
func (f *Faults) Add(fault Fault) AddedFault {
	fault.Opcodes, fault.Selectors = slices.Clone(fault.Opcodes), slices.Clone(fault.Selectors)
	fault.Patches, fault.Messages = slices.Clone(fault.Patches), slices.Clone(fault.Messages)
	added := &rule{Fault: fault}
	f.change(func(rules []*rule) []*rule { return append(rules, added) })
	return AddedFault{f, added}
}

// change replaces the rules by the result of edit, which gets a copy of them.
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

// Clear ends all faults, including stalls, freezes and hidden namespaces.
func (f *Faults) Clear() {
	f.change(func([]*rule) []*rule { return nil })
	f.grant.Store(0)
	f.reject.Store(0)
	f.connect.Store(0)
	f.Stall(false)
	f.Freeze(0)
	f.HideNamespaces(0)
}

// Grant sets the number of I/O queues that every host is granted, 1..65535. An n of 0
// ends this fault. If n is negative, requests for queues fail.
func (f *Faults) Grant(n int) {
	f.grant.Store(int32(max(-1, min(n, nvme.MaxQueues))))
}

// RejectConnects rejects all connect requests with this reason. A reason of 0 ends this
// fault.
func (f *Faults) RejectConnects(reason nvme.RDMARejectStatus) { f.reject.Store(uint32(reason)) }

// FailConnects completes all Connect commands with this status. nvme.StatusSuccess ends
// this fault.
func (f *Faults) FailConnects(s nvme.Status) { f.connect.Store(uint32(s)) }

// Stall makes the target begin no commands until Stall(false) is called. Connections
// continue to exist.
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

// Disconnect ends the connections of the queues with this id, of all controllers; if
// qid is negative, it ends all connections. It returns their number.
func (f *Faults) Disconnect(qid int) int {
	return f.target.disconnect(func(q *queuePair) bool { return qid < 0 || int(q.qid) == qid }, "fault: disconnect")
}

// HideNamespaces hides all namespaces for the time d, like a target that opens its port
// before it adds its namespaces. After that hosts are notified of each namespace. If d
// is 0, the namespaces are shown at once.
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

// Hidden reports whether namespaces are hidden.
func (f *Faults) Hidden() bool { return f.hidden.Load() }

// judge applies the first fault that matches a command. It returns true if the command
// must not be executed now.
func (q *queuePair) judge(i int, rules []*rule) bool {
	r, cmd := &q.reqs[i], q.command(i)
	for _, rule := range rules {
		if !rule.hits(q, cmd) || !rule.strikes() {
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

// strike applies the fault of a command whose delay is over. It returns true if the
// command must not be executed.
func (q *queuePair) strike(i int) bool {
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

// spoil overwrites a command's data with random bytes.
func (q *queuePair) spoil(r *request) {
	b := q.bytes(r.data)
	for i := 0; i < len(b); i += 8 {
		binary.NativeEndian.PutUint64(b[i:], rand.Uint64())
	}
}

// corrupt changes a completion, and the work request that sends it.
func (q *queuePair) corrupt(r *request, wr *rdma.SendWR, done *nvme.Completion) {
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
			return // there is no room in the ring for a second completion
		}
		q.reserved++
		first := *done
		duplicate, at := q.completion(response{})
		*nvme.CompletionAt(q.out.Bytes()[at:]) = first
		q.answers = append(q.answers, duplicate)
	}
}
