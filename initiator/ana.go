package initiator

import (
	"context"
	"fmt"
	"time"

	"ublk-nvmeof/nvme"
)

// anaStates is what a controller says of its ANA groups. Only the goroutine that looks at
// namespaces over the association uses it.
type anaStates struct {
	groups   map[uint32]nvme.ANAState // nil: the controller does not report ANA, or not in a way that makes sense
	changing time.Time                // since when a group has been in the change state; zero: none is
}

// maxANALog is the largest ANA log that is read, in bytes: 32767 groups without namespace
// ids.
const maxANALog = 1 << 20

// updateANA reads the ANA log and gives the views of the path's namespaces their access.
// complete is false if the log must be read again soon, and changed is true if a view changed.
func (c *Controller) updateANA(ctx context.Context, a *association) (complete, changed bool, err error) {
	if a.identify.CMIC()&nvme.CMICANA != 0 && !c.cfg.Discovery {
		groups, err := c.anaGroups(ctx, a)
		switch {
		case err == nil:
			a.ana.groups = groups
		default:
			// Without the log, what the I/O queues answer still tells.
			if err := c.tolerate(a, "read ANA log", err); err != nil {
				return false, false, err
			}
			a.ana.groups = nil
		}
	}
	complete = true
	changing := false
	for _, ns := range c.sub.Namespaces() {
		group, found := ns.groupOn(c.slot)
		if !found {
			continue
		}
		got, state := a.ana.accessOf(group)
		changing = changing || state == nvme.ANAChange
		complete = complete && got != noAccess
		changed = ns.setAccess(c.slot, got, state) || changed
	}
	return complete, changed, c.limitChange(a, changing)
}

// anaGroups reads the states of the groups. It returns an error that tolerate accepts if the
// log makes no sense.
//
// The log is read with one command, as by Linux (nvme_read_ana_log): nvmet ignores the offset,
// and the parts of a log may be of different states. A controller may announce far more groups
// than it has. So the log is read again, into memory of its own, only if it is
// larger than a buffer.
func (c *Controller) anaGroups(ctx context.Context, a *association) (map[uint32]nvme.ANAState, error) {
	most := min(nvme.ANALogSize(a.identify.NANAGRPID(), 0), maxANALog)
	r := LogRequest{Page: nvme.LogANA, NSID: nvme.NSIDAll, Specific: anaGroupsOnly}
	log := make([]byte, min(most, adminBuffer))
	if err := a.admin.logPage(ctx, r, log); err != nil {
		return nil, err
	}
	if need := min(nvme.ANALogSize(nvme.ANAGroupCount(log), 0), most); need > uint64(len(log)) {
		log = make([]byte, need)
		if err := a.admin.logPage(ctx, r, log); err != nil {
			return nil, err
		}
	}
	groups, err := groupsOf(log, a.identify.ANAGRPMAX())
	if err != nil {
		return nil, badData("%w", err)
	}
	return groups, nil
}

// anaGroupsOnly is the log specific parameter for groups without namespace ids (RGO).
const anaGroupsOnly = 1

// groupsOf returns the states of the groups in a log. A group whose state is not defined, or
// whose id is above most, is an error, and so is a group that is there twice.
func groupsOf(log []byte, most uint32) (map[uint32]nvme.ANAState, error) {
	parsed, err := nvme.ParseANALog(log)
	if err != nil {
		return nil, err
	}
	groups := make(map[uint32]nvme.ANAState, parsed.NumGroups())
	for g := range parsed.Groups() {
		_, twice := groups[g.ID]
		switch {
		case g.ID > most:
			return nil, fmt.Errorf("ana log: group %d is above the %d that there can be", g.ID, most)
		case twice:
			return nil, fmt.Errorf("ana log: group %d is there twice", g.ID)
		}
		switch g.State {
		case nvme.ANAOptimized, nvme.ANANonOptimized, nvme.ANAInaccessible, nvme.ANAPersistentLoss, nvme.ANAChange:
		default:
			return nil, fmt.Errorf("ana log: group %d: %v is not defined", g.ID, g.State)
		}
		groups[g.ID] = g.State
	}
	return groups, nil
}

// accessOf returns the access that a path gives to the namespaces of a group, and the state of
// the group, 0 if it is not known. A group that the log lacks is tried when nothing better is
// there: the answers to commands tell.
func (a *anaStates) accessOf(group uint32) (access, nvme.ANAState) {
	if a.groups == nil {
		return optimized, 0
	}
	state := a.groups[group]
	switch state {
	case 0, nvme.ANANonOptimized:
		return nonOptimized, state
	case nvme.ANAOptimized:
		return optimized, state
	}
	return noAccess, state
}

// limitChange ends an association that has had a group in transition for twice the time that
// the controller announces (ANATT).
func (c *Controller) limitChange(a *association, changing bool) error {
	limit := 2 * time.Duration(a.identify.ANATT()) * time.Second
	switch {
	case !changing:
		a.ana.changing = time.Time{}
	case a.ana.changing.IsZero():
		a.ana.changing = time.Now()
	case limit > 0 && time.Since(a.ana.changing) > limit:
		err := because(LossANA, fmt.Errorf("an ANA group has been in transition for more than %v", limit))
		a.fail(err)
		return err
	}
	return nil
}

// groupOn returns the ANA group of the namespace over a path. It returns false if the path has
// not found the namespace.
func (ns *Namespace) groupOn(slot int) (uint32, bool) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	if f := ns.findings[slot]; f != nil {
		return f.group, true
	}
	return 0, false
}

// setAccess changes the access over a path that has found the namespace. It reports whether
// it was another.
func (ns *Namespace) setAccess(slot int, to access, state nvme.ANAState) bool {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	for {
		v := ns.views[slot].Load()
		if v == nil || v.access == to && v.ana == state {
			return false
		}
		next := *v
		next.access, next.ana = to, state
		if ns.views[slot].CompareAndSwap(v, &next) { // deny may have come first
			ns.noteAccess(time.Now())
			return true
		}
	}
}

// deny takes the path out of use for the namespace, because the controller answered a command
// with an ANA status. The log is read then; it may put the path back into use. Any goroutine
// may call it.
func (ns *Namespace) deny(a *association, slot int) {
	v := ns.views[slot].Load()
	if v != nil && v.access != noAccess {
		next := *v
		next.access = noAccess
		ns.views[slot].CompareAndSwap(v, &next)
	}
	a.readANA()
}

// noteAccess records since when no path gives access to the namespace. The caller holds mu.
func (ns *Namespace) noteAccess(now time.Time) {
	for slot := range ns.views {
		if v := ns.views[slot].Load(); v != nil && v.access != noAccess {
			ns.blocked = time.Time{}
			ns.presence.CompareAndSwap(inaccessible, served)
			return
		}
	}
	if ns.blocked.IsZero() {
		ns.blocked = now
	}
}

// expireAccess fails the requests of a namespace to which no path has given access for longer
// than requests may wait. A transition of an ANA group adds the time that it may take. It
// reports whether something changed.
func (s *Subsystem) expireAccess(ns *Namespace, now time.Time) bool {
	limit, bounded := s.lossTime()
	if !bounded || ns.presence.Load() != served {
		return false
	}
	limit += s.transitionTime()
	ns.mu.Lock()
	ns.noteAccess(now)
	blocked := !ns.blocked.IsZero() && now.Sub(ns.blocked) >= limit
	ns.mu.Unlock()
	if !blocked || !ns.presence.CompareAndSwap(served, inaccessible) {
		return false
	}
	s.cfg.Log.Warn("no path gives access to a namespace; its requests fail", "nsid", ns.id, "after", limit)
	return true
}

// transitionTime returns the longest time that a controller announces for the transition of an ANA
// group.
func (s *Subsystem) transitionTime() (longest time.Duration) {
	for _, c := range s.paths() {
		if a := c.current(); a != nil {
			longest = max(longest, time.Duration(a.identify.ANATT())*time.Second)
		}
	}
	return longest
}

// elsewhere takes the path out of use for a request that the controller did not execute
// because of its path. It reports whether the lane is to dispatch the request again at once:
// there is another path, or the request waits for the ANA log.
func (p *queuePair) elsewhere(r *request, status nvme.Status) bool {
	ns := r.home.ns
	if status.IsANAError() && p.assoc.identify.CMIC()&nvme.CMICANA != 0 {
		ns.deny(p.assoc, p.slot)
		return true
	}
	r.troubled = true
	r.avoid |= 1 << p.slot
	if p.lane.pick(r) != nil {
		return true
	}
	r.avoid = 0
	return false
}
