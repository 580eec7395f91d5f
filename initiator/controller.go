package initiator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
)

// State is the state of a controller, or the best state of the controllers of a subsystem.
type State uint8

// States, with the names of Linux (enum nvme_ctrl_state)
const (
	StateUnset      State = iota
	StateNew              // made, never connected
	StateLive             // I/O goes to the target
	StateConnecting       // the association was lost and is being made again; I/O waits
	StateDeleting         // Close was called
	StateDead             // given up; I/O fails
)

var stateNames = [...]string{"unset", "new", "live", "connecting", "deleting", "dead"}

func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("state %d", s)
}

// Controller is the host's side of an NVMe controller: a path to the namespaces of a
// subsystem. It outlives its associations.
type Controller struct {
	sub  *Subsystem
	slot int    // in the subsystem and in its lanes
	cfg  Config // of the subsystem, with the Path of this controller
	mem  *domain

	// Only the goroutine that makes associations uses these.
	unfenced []*remnant // earlier controllers that may hold commands; see await
	brief    int        // number of consecutive associations that were lost early
	excused  bool       // the last loss says nothing about the target

	life      context.Context // ends with that of the subsystem
	end       context.CancelCauseFunc
	announced ControllerID  // of the last association that was recorded; guarded by the subsystem's recording
	traces    []string      // of its connections; guarded by the same
	blamed    atomic.Bool   // the last association was lost with the suspect in flight
	stopped   chan struct{} // supervise has ended

	transactions atomic.Uint32  // runs of authentication, for their ids
	borrowed     sync.WaitGroup // uses of the device by other goroutines; none is added without an association

	removing  bool          // RemovePath was called; guarded by the subsystem's mu
	tentative bool          // the path is being added, which may fail; guarded by the subsystem's mu
	failovers atomic.Uint64 // requests that were in flight when an association was lost

	mu           sync.Mutex // guards what follows
	state        State
	since        time.Time // of the state
	outage       time.Time // start of the current outage, and of the last one while there is an association; see countLoss
	reason       error     // why it is not live, or was not the last time
	losses       int       // associations lost
	attempts     int       // to make one since the last was lost
	failure      error     // of the last of these attempts
	outages      outages
	remote       netip.AddrPort // of the last association
	lastPatience time.Duration  // with it
	assoc        *association
	attached     chan struct{} // closed, and replaced, when an association is attached
}

func (s *Subsystem) newController(slot int, p Path) *Controller {
	cfg := s.cfg
	cfg.Path = p
	cfg.Log = s.cfg.Log.With("path", p.Address.String())
	c := &Controller{
		sub: s, slot: slot, cfg: cfg, mem: s.mem.domain(slot), state: StateNew, since: time.Now(),
		stopped: make(chan struct{}), attached: make(chan struct{}),
	}
	c.life, c.end = context.WithCancelCause(s.life)
	return c
}

// connect makes the first association and identifies the namespaces. Nothing uses the
// association yet.
func (c *Controller) connect(ctx context.Context) (*association, error) {
	a, err := c.associate(ctx)
	if err != nil {
		return nil, err
	}
	during, cancel := a.during(ctx)
	defer cancel()
	if err := c.firstLook(during, a); err != nil {
		return nil, errors.Join(&StepError{"identify namespaces", err}, a.close())
	}
	return a, nil
}

// use records the controller of an association and gives the association to the lanes.
// After an error it is closed.
func (c *Controller) use(a *association) error {
	if err := c.announce(a); err != nil {
		return errors.Join(err, a.close())
	}
	if err := c.attach(a); err != nil {
		c.leaveBehind(a, time.Now()) // some lanes may have used it
		return errors.Join(err, c.release(a))
	}
	return nil
}

// attach gives each lane its part of the association. All lanes have released the
// previous association of the path already.
func (c *Controller) attach(a *association) error {
	for _, l := range c.sub.lanes {
		var own []*queuePair
		var route [nClasses]*queuePair
		for i, p := range a.pairs {
			if a.plan.Owner[i] == l.index {
				own = append(own, p)
			}
		}
		for class, qid := range a.plan.Queue[l.index] {
			route[class] = a.pairs[qid-1]
		}
		var err error
		if e := l.loop.Call(func() {
			for _, p := range own {
				if err == nil {
					err = p.attach()
				}
			}
			l.connect(c.slot, own, route)
		}); e != nil {
			err = e
		}
		if err != nil {
			return fmt.Errorf("attach queues to loop %d: %w", l.index, err)
		}
	}
	c.mu.Lock()
	now := time.Now()
	if c.state != StateDeleting {
		c.state, c.since = StateLive, now
	}
	c.failure = nil
	c.outages.end(now)
	c.assoc, c.remote, c.lastPatience = a, a.remote, c.patience(a, c.cfg.KeepAlive)
	close(c.attached)
	c.attached = make(chan struct{})
	c.mu.Unlock()
	c.sub.limitOutage()
	c.sub.stateChanged()
	return nil
}

// release takes an association from the lanes and closes it. Afterwards, the requests
// that were in flight are with their lanes again, and no adapter accesses their buffers
// any more.
func (c *Controller) release(a *association) error {
	var errs []error
	for _, p := range a.pairs {
		errs = append(errs, p.lane.loop.Call(p.abandon))
	}
	for _, l := range c.sub.lanes {
		errs = append(errs, l.loop.Call(func() { l.disconnect(c.slot) }))
	}
	for _, p := range a.pairs {
		errs = append(errs, p.detach())
	}
	errs = append(errs, a.close())
	for _, p := range a.pairs {
		errs = append(errs, p.lane.loop.Call(func() { p.lane.recover(p) }))
	}
	c.sub.follow(a.remnant)
	return errors.Join(errs...)
}

// supervise serves one association after the other, until the path ends.
func (c *Controller) supervise(a *association) {
	defer close(c.stopped)
	for {
		if a == nil { // the path has not been connected yet
			var err error
			if a, err = c.reconnect(time.Now()); err != nil {
				c.stop(err)
				return
			}
		}
		live := time.Now()
		reason := c.serve(a)
		if errors.Is(reason, errClosed) || errors.Is(reason, errRemoved) {
			return // leave goes on with the association
		}
		lost := time.Now()
		c.leaveBehind(a, lost)
		before := c.lose(reason, lost)
		c.cfg.Log.Warn("association lost", "reason", reason)
		if err := c.release(a); err != nil {
			c.cfg.Log.Warn("end association", "error", err)
		}
		c.countLoss(before, lost.Sub(live), errors.Is(reason, errReset))
		var err error
		if a, err = c.reconnect(lost); err != nil {
			c.stop(err)
			return
		}
		c.discoveryChanged() // its events were lost with the association
	}
}

// discoveryChanged says that the discovery log may have changed.
func (c *Controller) discoveryChanged() {
	if c.cfg.DiscoveryChanged != nil {
		c.cfg.DiscoveryChanged()
	}
}

// countLoss says when the outage began that an association ends which has lived for some
// time; before is the start of the outage before. An association that has not lived for long
// has not proved to be better than the one before, and leaves the outage as it was, unless a
// request is what ended it: the target is there for all others, and they must not fail for
// that request. Reset says nothing about the target either. The outage of such a loss ends
// with the next association, which has nothing to prove.
func (c *Controller) countLoss(before time.Time, lived time.Duration, reset bool) {
	blamed, excused := c.blamed.Swap(false), c.excused
	c.excused = blamed || reset
	switch {
	case reset || lived >= max(c.cfg.KeepAlive, time.Second): // without keep alive, an association must still prove itself
		c.brief = 0
	case blamed:
		c.brief = 1
	default:
		c.brief++
		if !before.IsZero() && !excused {
			c.mu.Lock()
			c.outage = before
			c.mu.Unlock()
		}
	}
	c.sub.limitOutage()
}

// serve runs an association until it is lost, and returns the reason.
func (c *Controller) serve(a *association) error {
	a.admin.setTimeout(c.cfg.AdminTimeout)
	var helpers sync.WaitGroup
	helpers.Go(func() { c.listen(a.life, a) })
	helpers.Go(func() { c.watchNamespaces(a.life, a) })
	helpers.Go(func() { c.vouch(a) })
	defer helpers.Wait()
	<-a.life.Done()
	return context.Cause(a.life)
}

// backoffMin is the first pause between associations that are lost at once. Each further
// pause is twice as long, up to the reconnect delay.
const backoffMin = 100 * time.Millisecond

// pause returns the time to wait before the next association is made. It is zero unless
// the last one was lost early.
func (c *Controller) pause() time.Duration {
	if c.brief == 0 {
		return 0
	}
	return min(backoffMin<<min(c.brief-1, 16), c.cfg.ReconnectDelay)
}

// reconnect makes the next association: at once, and then at intervals, until the life of
// the path ends. The error is its cause.
func (c *Controller) reconnect(lost time.Time) (*association, error) {
	for pause := c.pause(); ; pause = c.cfg.ReconnectDelay {
		if err := c.rest(pause); err != nil {
			return nil, err
		}
		a, err := c.attempt(c.life)
		if err == nil {
			c.cfg.Log.Info("association made again", "after", time.Since(lost).Round(time.Millisecond), "queues", a.plan.String())
			return a, nil
		}
		c.mu.Lock()
		c.failure = err
		c.mu.Unlock()
		c.cfg.Log.Warn("reconnect", "error", err, "next_in", c.cfg.ReconnectDelay)
	}
}

// rest waits before the next attempt. A device that has been removed, or is removed meanwhile, is
// left at once.
func (c *Controller) rest(pause time.Duration) error {
	for end := time.After(pause); ; {
		c.leaveDevice()
		select {
		case <-end:
			return nil
		case <-c.mem.removed():
		case <-c.life.Done():
			return context.Cause(c.life)
		}
	}
}

// attempt tries once to reconnect. It sends nothing over the association before the
// target has ended the earlier controllers.
func (c *Controller) attempt(ctx context.Context) (*association, error) {
	c.mu.Lock()
	c.attempts++
	c.outages.tries++
	c.mu.Unlock()
	a, err := c.associate(ctx)
	if err != nil {
		return nil, err
	}
	if err := c.resume(ctx, a); err != nil {
		c.sub.doubt(c, time.Now())
		return nil, err
	}
	return a, nil
}

// resume puts an association into use that was made again. After an error it is closed.
func (c *Controller) resume(ctx context.Context, a *association) error {
	ctx, cancel := a.during(ctx)
	defer cancel()
	if _, err := c.look(ctx, a); err != nil {
		return errors.Join(&StepError{"identify namespaces", err}, a.close())
	}
	if err := c.await(ctx, a); err != nil {
		return errors.Join(err, a.close())
	}
	return c.use(a)
}

// announce records the controller of an association before commands are sent to it. A
// controller that could not be recorded is not used.
func (c *Controller) announce(a *association) error {
	if c.cfg.Associated == nil {
		return nil
	}
	s := c.sub
	s.recording.Lock()
	defer s.recording.Unlock()
	last := c.announced
	c.announced = ControllerID{a.remote, a.cntlid}
	if c.cfg.Connected != nil {
		c.traces = a.traces()
		c.cfg.Connected(s.traces())
	}
	if err := c.cfg.Associated(s.holders()); err != nil {
		c.announced = last
		return &StepError{"record controller id", err}
	}
	return nil
}

// lose records the loss of the association. An outage begins with it, for now: countLoss
// decides. lose returns the start of the outage before.
func (c *Controller) lose(reason error, when time.Time) (before time.Time) {
	c.mu.Lock()
	before, c.outage = c.outage, when
	c.assoc, c.reason, c.attempts, c.failure = nil, reason, 0, nil
	c.losses++
	c.outages.lost[c.reasonOf(reason)]++
	c.outages.begin(when)
	if c.state != StateDeleting {
		c.state, c.since = StateConnecting, when
	}
	c.mu.Unlock()
	c.sub.doubt(c, when)
	c.sub.stateChanged()
	return before
}

// stop gives up the path, and the subsystem with its last path, unless it is closed or
// removed.
func (c *Controller) stop(err error) {
	if errors.Is(err, errClosed) || errors.Is(err, errRemoved) {
		return
	}
	c.mu.Lock()
	c.state, c.since, c.reason, c.failure = StateDead, time.Now(), err, nil // err has the last failure
	c.mu.Unlock()
	c.sub.stateChanged()
	for _, other := range c.sub.paths() {
		other.mu.Lock()
		dead := other.state == StateDead
		other.mu.Unlock()
		if !dead {
			return
		}
	}
	c.sub.die(err)
}

// outageBegan returns when the present outage of the path began. It returns false if there is
// an association.
func (c *Controller) outageBegan() (time.Time, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.outage, c.assoc == nil
}

// trouble returns why there is no association: the error of the last attempt to make one, or
// why the last one was lost.
func (c *Controller) trouble() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failure != nil {
		return c.failure
	}
	return c.reason
}

// current returns the association in use, or nil.
func (c *Controller) current() *association {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.assoc
}

// leave ends the association in use in order, if there is one. supervise has ended.
func (c *Controller) leave(ctx context.Context) error {
	defer c.borrowed.Wait() // it has memory of the device
	c.mu.Lock()
	a := c.assoc
	c.assoc = nil
	if c.state != StateDead {
		c.state, c.since = StateDeleting, time.Now()
	}
	c.mu.Unlock()
	if a == nil {
		return nil
	}
	var errs []error
	if err := a.shutdown(ctx); err != nil {
		errs = append(errs, fmt.Errorf("shut down controller: %w", err))
		c.leaveBehind(a, time.Now())
	}
	return errors.Join(append(errs, c.release(a))...)
}

// tend makes the queue pairs check their commands in flight. It does not disturb loops
// whose queue pairs have none.
func (c *Controller) tend() {
	a := c.current()
	if a == nil {
		return
	}
	limit := uint32(max(1, c.cfg.IOTimeout/time.Second))
	now := c.sub.clock.Load()
	for _, p := range a.pairs {
		if p.inflight.Load() > 0 {
			// A loop that has ended has no commands.
			_ = p.lane.loop.Call(func() { p.tend(now, limit) })
		} else {
			p.oldest.Store(0)
		}
	}
}

// setUpTimeout returns the time limit of the admin commands that make an association. I/O
// waits when an association is made again, and a lost response must not cost it the whole
// admin timeout. So the limit is short at first, and twice as long at each attempt for a
// target that is slow.
func (c *Controller) setUpTimeout() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.attempts == 0 { // Connect
		return c.cfg.AdminTimeout
	}
	return min(c.cfg.AdminTimeout, c.cfg.ConnectTimeout<<min(c.attempts-1, 10))
}

// startKeepAlive sends Keep Alive commands until the association ends, and ends the
// association if a command is not answered. The controller's timer runs from the moment
// when the controller is enabled, so the commands begin while the association is still
// being made. Until the association is in use, the target has at least the connect
// timeout to answer.
func (c *Controller) startKeepAlive(_ context.Context, a *association) error {
	a.admin.setTimeout(c.setUpTimeout())
	if c.cfg.KeepAlive == 0 {
		return nil
	}
	a.alive.Go(func() {
		// A controller with traffic based keep alive (TBKAS) may notice a command
		// only at the end of an interval of the timeout, so it needs twice as
		// many commands.
		tick := time.NewTicker(c.cfg.KeepAlive / 4)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-a.life.Done():
				return
			}
			limit := c.cfg.KeepAlive
			if !c.serves(a) {
				limit = max(limit, c.cfg.ConnectTimeout)
			}
			if err := c.ping(a.life, a, limit); err != nil {
				a.fail(because(LossKeepAlive, err))
			}
		}
	})
	return nil
}

// ping sends a Keep Alive command, which must be answered within limit.
func (c *Controller) ping(ctx context.Context, a *association, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var cmd nvme.Command
	cmd.SetKeepAlive()
	if _, err := a.admin.exec(ctx, &cmd, nil, nil); err != nil {
		return fmt.Errorf("keep alive: %w", err)
	}
	return nil
}

// eventPause limits the cost of a flood of events. The controller keeps the events that
// occur meanwhile.
const eventPause = 20 * time.Millisecond

// listen keeps one Asynchronous Event Request outstanding at the controller.
func (c *Controller) listen(ctx context.Context, a *association) {
	for {
		var cmd nvme.Command
		cmd.SetAsyncEvent()
		done, err := a.admin.do(ctx, &cmd)
		if err != nil {
			if ctx.Err() == nil && errors.As(err, new(nvme.Status)) {
				c.sub.reports.Warn("target refused an asynchronous event request", "error", err)
			}
			return
		}
		c.handleEvent(ctx, a, nvme.AsyncEvent(done.DW0()))
		select {
		case <-time.After(eventPause):
		case <-ctx.Done():
			return
		}
	}
}

func (c *Controller) handleEvent(ctx context.Context, a *association, ev nvme.AsyncEvent) {
	c.sub.reports.Info("asynchronous event", "event", ev.String())
	if page := ev.LogPage(); page != 0 {
		// Reading the page enables the event again. The namespaces are looked at
		// even if this fails.
		if err := c.readLog(ctx, a, page); err != nil && ctx.Err() == nil {
			c.sub.reports.Warn("read log page of an event", "page", page, "error", err)
		}
	}
	switch {
	case ev.Type() == nvme.EventError && ev.Info() == nvme.ErrorPersistentInternal:
		a.fail(because(LossTargetError, errors.New("controller reports a persistent internal error")))
	case ev.Type() == nvme.EventNotice && (ev.Info() == nvme.NoticeNamespaceChanged || ev.Info() == nvme.NoticeANAChanged):
		a.lookAtNamespaces() // they may have moved to another ANA group
	case ev.Type() == nvme.EventNotice && ev.Info() == nvme.NoticeDiscoveryChanged:
		c.discoveryChanged()
	}
}

func (c *Controller) readLog(ctx context.Context, a *association, page uint8) error {
	var out [adminPage]byte
	return a.admin.logPage(ctx, LogRequest{Page: page, NSID: nvme.NSIDAll}, out[:])
}

// PathInfo describes a controller at one moment.
type PathInfo struct {
	State      State
	Since      time.Time      // start of the state
	Reason     error          // why the association was lost the last time
	Losses     int            // number of associations lost
	Attempts   int            // attempts to reconnect since then
	Failure    error          // error of the last attempt, while there is no association
	Address    netip.AddrPort // of the target
	CNTLID     uint16
	Auth       string // how the connection was authenticated; empty: the target did not ask
	Version    nvme.Version
	Model      string
	Serial     string
	Firmware   string
	QueueSize  int                      // entries per I/O queue in use
	Plan       poller.Plan              // requested and granted queues per class
	Device     string                   // RDMA device
	InCapsule  int                      // bytes of data that travel with a command; 0 = none
	SQFlow     bool                     // SQ flow control is on
	Places     int                      // in how many regions or places of them the data of a request should be at most (block.Gatherer)
	InFlight   int                      // requests that its queue pairs have
	Failovers  uint64                   // requests that were in flight when an association was lost
	Held       int                      // changes with unknown outcome, which wait for the end of its old controllers
	Configured netip.AddrPort           // address that the path was added with
	Source     netip.Addr               // local address that the path was added with
	Provider   string                   // name of the RDMA provider
	Access     map[uint32]nvme.ANAState // of each namespace that the path has; 0: the controller does not report it
	Vouched    []netip.AddrPort         // paths whose controllers the target of this one knows
	Refused    error                    // why a namespace is not used over this path
	Outages    Outages
	Oldest     time.Duration // age of the oldest command in flight, in whole seconds
}

// Info returns a snapshot.
func (c *Controller) Info() PathInfo {
	c.mu.Lock()
	i := PathInfo{
		State: c.state, Since: c.since, Reason: c.reason, Losses: c.losses, Attempts: c.attempts, Failure: c.failure,
		Device: c.mem.device(), Failovers: c.failovers.Load(), Configured: c.cfg.Address, Source: c.cfg.Source, Provider: c.cfg.Provider.Name(),
	}
	a := c.assoc
	i.Outages = Outages{Time: c.outages.time(), Losses: map[LossReason]int{}, Attempts: c.outages.tries, Made: c.outages.made}
	for r, n := range c.outages.lost {
		i.Outages.Losses[LossReason(r)] = n
	}
	c.mu.Unlock()
	i.Held = c.sub.heldFor(c)
	if a != nil {
		c.describe(&i, a)
	}
	return i
}

// describe fills in what an association has.
func (c *Controller) describe(i *PathInfo, a *association) {
	i.Address = a.remote
	i.CNTLID, i.Version, i.QueueSize, i.Plan = a.cntlid, a.version, a.depth, a.plan.Plan
	i.Model, i.Serial, i.Firmware = a.identify.MN(), a.identify.SN(), a.identify.FR()
	if len(a.pairs) > 0 {
		i.InCapsule, i.SQFlow, i.Places = int(a.pairs[0].inCapsule), a.pairs[0].checkHead, a.segments()
	}
	for _, p := range a.pairs {
		i.Oldest = max(i.Oldest, time.Duration(p.oldest.Load())*time.Second)
		i.InFlight += int(p.inflight.Load())
	}
	for _, other := range c.sub.paths() {
		if b := other.current(); other != c && a.vouchesFor(b) {
			i.Vouched = append(i.Vouched, b.remote)
		}
	}
	i.Access = make(map[uint32]nvme.ANAState)
	for _, ns := range c.sub.Namespaces() {
		if v := ns.views[c.slot].Load(); v != nil {
			i.Access[ns.id] = v.ana
		}
	}
	c.mu.Lock()
	i.Auth, i.Refused = a.method, a.refusals()
	c.mu.Unlock()
}
