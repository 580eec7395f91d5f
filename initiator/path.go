package initiator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"ublk-nvmeof/nvme"
)

// Policy says which of several paths a request takes. Every policy uses the paths with the
// best access to the namespace only: optimized ones, or non-optimized ones if there is no
// other. Among these, the preferred one of the policy Preferred comes first, then a path of which
// the loop has a queue pair. The policy decides what is left.
type Policy uint8

// Policies, with the names of Linux (nvme_core.iopolicy)
const (
	QueueDepth Policy = iota // the path with the fewest requests in flight
	RoundRobin               // the next path in turn
	Preferred                // the preferred path while it can be used; otherwise the same path until it fails
	nPolicies
)

var policyNames = [nPolicies]string{"queue-depth", "round-robin", "preferred"}

func (p Policy) String() string {
	if p < nPolicies {
		return policyNames[p]
	}
	return fmt.Sprintf("policy %d", p)
}

// ParsePolicy returns the policy with a name.
func ParsePolicy(name string) (Policy, error) {
	for p, n := range policyNames {
		if n == name {
			return Policy(p), nil
		}
	}
	return 0, fmt.Errorf("policy %q: want queue-depth, round-robin or preferred", name)
}

// access is how good a path to a namespace is.
type access uint8

const (
	noAccess access = iota
	nonOptimized
	optimized
)

// pick returns the queue pair for a request: that of its class on the path that the policy
// chooses. It returns nil if no path leads to the namespace.
func (l *lane) pick(r *request) *queuePair {
	var best *queuePair
	score := 0
	ns, turn := r.home.ns, l.turn
	for range l.slots {
		if turn++; turn >= l.slots {
			turn = 0
		}
		p := l.routes[turn][r.class]
		if p == nil || r.troubled && r.avoid&(1<<turn) != 0 {
			continue
		}
		if p.lane == l && p.lost {
			if !p.abandoned && r.changes() {
				return p // which keeps it: a change in flight may be to the same blocks
			}
			continue
		}
		v := ns.views[turn].Load()
		if v == nil || v.access == noAccess {
			continue
		}
		s := int(v.access) << 4
		if p.lane == l {
			s |= 4
		}
		if l.policy == Preferred {
			if turn == l.preferred {
				s |= 8
			}
			if turn == l.last {
				s |= 1
			}
		}
		if s > score || s == score && l.policy == QueueDepth && p.inflight.Load() < best.inflight.Load() {
			best, score = p, s
		}
	}
	return best
}

// took records that a request takes a path.
func (l *lane) took(slot int) {
	l.last = slot
	if l.policy == RoundRobin {
		l.turn = slot
	}
}

// SetPolicy changes how paths are chosen. preferred is one of Paths, for the policy
// Preferred. Any goroutine but the loops' may call it.
func (s *Subsystem) SetPolicy(p Policy, preferred *Controller) error {
	if p >= nPolicies {
		return fmt.Errorf("%v is not a policy", p)
	}
	slot := 0 // that of the path that was connected first
	if preferred != nil {
		slot = preferred.slot
	}
	return s.setPolicy(p, slot)
}

// setPolicy is SetPolicy for the path in a slot. With slot -1 no path is preferred.
func (s *Subsystem) setPolicy(p Policy, slot int) error {
	s.mu.Lock()
	s.policy, s.preferred = p, slot
	s.mu.Unlock()
	var errs []error
	for _, l := range s.lanes {
		errs = append(errs, l.loop.Call(func() {
			l.policy, l.preferred, l.turn = p, slot, -1
			l.redispatch()
		}))
	}
	return errors.Join(errs...)
}

// ErrPathExists is the error of adding a path that the subsystem has.
var ErrPathExists = errors.New("the subsystem has this path already")

// AddPath adds a controller over another path. It fails if the path cannot be connected, if
// the controller is not of the same subsystem, or if it has another namespace under the id of
// a namespace that the subsystem has. ctx bounds the whole of it.
func (s *Subsystem) AddPath(ctx context.Context, p Path) (*Controller, error) {
	c, err := s.reservePath(p)
	if err != nil {
		return nil, err
	}
	a, err := c.connect(ctx)
	if err == nil {
		if err = c.refusal(a); err != nil {
			err = errors.Join(err, a.close())
		} else {
			err = c.use(a)
		}
	}
	if err != nil {
		return nil, errors.Join(err, s.dropPath(c))
	}
	if !s.supervise(c, a) {
		return nil, errors.Join(errClosed, c.release(a), s.dropPath(c))
	}
	return c, nil
}

// KeepPath adds a path that need not be reachable yet: it is connected at once if it can be,
// and tried again like a path that was lost.
func (s *Subsystem) KeepPath(p Path) (*Controller, error) {
	c, err := s.reservePath(p)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.state, c.outage = StateConnecting, time.Now()
	c.mu.Unlock()
	if !s.supervise(c, nil) {
		return nil, errors.Join(errClosed, s.dropPath(c))
	}
	return c, nil
}

// supervise starts the goroutine of a path. It returns false if the subsystem is closing.
func (s *Subsystem) supervise(c *Controller, a *association) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing || s.err != nil {
		return false
	}
	c.tentative = false
	s.running.Go(func() { c.supervise(a) })
	return true
}

// reservePath makes the controller of a path that the subsystem does not have.
func (s *Subsystem) reservePath(p Path) (*Controller, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closing:
		return nil, errClosed
	case s.err != nil:
		return nil, s.err
	}
	free := -1
	for slot, c := range s.slots {
		switch {
		case c == nil && free < 0:
			free = slot
		case c != nil && c.cfg.Address == p.Address && c.cfg.Source == p.Source:
			return nil, ErrPathExists
		}
	}
	if free < 0 {
		return nil, fmt.Errorf("the subsystem has %d paths, which is the limit", MaxPaths)
	}
	c := s.newController(free, p)
	c.tentative = true
	s.slots[free] = c
	return c, nil
}

// dropPath forgets a path that has no association any more.
func (s *Subsystem) dropPath(c *Controller) error {
	c.end(errRemoved)
	s.doubt(c, time.Now())
	err := s.mem.forget(c.slot)
	s.mu.Lock()
	s.slots[c.slot] = nil
	preferred, policy := s.preferred == c.slot, s.policy
	s.mu.Unlock()
	s.limitOutage()
	if preferred && c.removing { // another path may take the slot
		err = errors.Join(err, s.setPolicy(policy, -1))
	}
	return err
}

// errRemoved is why a path ends that is removed.
var errRemoved = errors.New("path was removed")

// ErrLastPath is the error of removing the last path. It goes with the subsystem.
var ErrLastPath = errors.New("this is the last path; it goes when the subsystem is disconnected")

// RemovePath removes a path. Its requests end over it if they can before ctx is done, and are
// sent over other paths otherwise. The last path is not removed, and one that AddPath is still
// connecting does not count.
func (s *Subsystem) RemovePath(ctx context.Context, c *Controller) error {
	s.mu.Lock()
	switch {
	case s.closing:
		s.mu.Unlock()
		return errClosed
	case s.slots[c.slot] != c || c.removing:
		s.mu.Unlock()
		return errRemoved
	}
	left := 0
	for _, other := range s.lockedPaths() {
		if !other.removing && !other.tentative {
			left++
		}
	}
	if left < 2 {
		s.mu.Unlock()
		return ErrLastPath
	}
	c.removing = true
	s.mu.Unlock()
	err := c.drain(ctx)
	if c.current() != nil {
		s.mu.Lock()
		s.removed = time.Now()
		s.mu.Unlock()
	}
	c.end(errRemoved)
	<-c.stopped
	return errors.Join(err, c.leave(ctx), s.dropPath(c))
}

// drain stops the use of the path, and waits until its requests have ended or ctx is done.
func (c *Controller) drain(ctx context.Context) error {
	var errs []error
	for _, l := range c.sub.lanes {
		errs = append(errs, l.loop.Call(func() { l.routes[c.slot] = route{} }))
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for c.Info().InFlight > 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(errs...)
		}
	}
	return errors.Join(errs...)
}

// Paths returns the controllers of the subsystem.
func (s *Subsystem) Paths() []*Controller { return s.paths() }

// Address returns the address of the target for this path: that of the last association, or
// the one that it was configured with.
func (c *Controller) Address() netip.AddrPort {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.remote.IsValid() {
		return c.remote
	}
	return c.cfg.Address
}

// checkSubsystem returns an error if the controller of an association is not of the same
// subsystem as those of the other paths.
func (c *Controller) checkSubsystem(_ context.Context, a *association) error {
	id := &a.identify
	for _, other := range c.sub.paths() {
		b := other.current()
		if other == c || b == nil {
			continue
		}
		has := &b.identify
		switch {
		case id.CMIC()&nvme.CMICMultiController == 0 || has.CMIC()&nvme.CMICMultiController == 0:
			return errors.New("path refused: the subsystem does not announce that it may have several controllers (CMIC)")
		case id.SUBNQN() != has.SUBNQN():
			return fmt.Errorf("path refused: the controller is of subsystem %q, that of %v is of %q", id.SUBNQN(), other.Address(), has.SUBNQN())
		case id.SN() != has.SN():
			return fmt.Errorf("path refused: the serial number is %q, over %v it is %q", id.SN(), other.Address(), has.SN())
		case a.cntlid == b.cntlid:
			return fmt.Errorf("path refused: its controller has id %d, as that of %v has; the targets of a subsystem must not give the same ids", a.cntlid, other.Address())
		case id.MN() != has.MN():
			return fmt.Errorf("path refused: the model number is %q, over %v it is %q", id.MN(), other.Address(), has.MN())
		}
	}
	return nil
}

// refusal returns why no namespace of the subsystem can be used over a path, if that is so.
func (c *Controller) refusal(a *association) error {
	for _, ns := range c.sub.Namespaces() {
		if ns.views[c.slot].Load() != nil {
			return nil
		}
	}
	return c.refusedBecause(a)
}
