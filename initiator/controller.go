package initiator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
)

// State is the state of a controller.
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

// Controller is the host's side of an NVMe controller.
type Controller struct {
	cfg     Config
	pollMax uint32
	lanes   []*lane
	start   time.Time               // origin of now
	clock   atomic.Uint32           // seconds with an association; lanes stamp commands with it
	suspect atomic.Pointer[request] // the request that may be the cause of the losses
	blamed  atomic.Bool             // the last association was lost with that request in flight

	mem memory

	// Only the goroutine that makes associations uses these.
	unfenced []uint16  // ids of earlier controllers that may hold commands; see fence
	outage   time.Time // start of the current outage; see countLoss
	brief    int       // number of consecutive associations that were lost early

	// life ends with Close (cause errClosed) or Abort (cause: its reason).
	life    context.Context
	end     context.CancelCauseFunc
	stopped chan struct{} // supervise has ended
	dead    chan struct{} // closed in StateDead
	queries chan struct{} // holds a token for each query in progress

	reservations sync.WaitGroup // commands of Namespace.Reserve; none is added while closing

	mu           sync.Mutex // guards what follows
	state        State
	since        time.Time // of the state
	reason       error     // why it is not live, or was not the last time
	losses       int       // associations lost
	attempts     int       // to make one since the last was lost
	failure      error     // of the last of these attempts
	outages      outages
	remote       netip.AddrPort // of the last association
	lastPatience time.Duration  // with it
	assoc        *association
	namespaces   []*Namespace
	closing      bool          // Close was called
	attached     chan struct{} // closed, and replaced, when an association is attached
}

// Connect connects to a subsystem and identifies its namespaces, if it can have any. ctx
// bounds the whole of it. Errors: *StepError, whose cause is a *rdma.StepError, a
// *rdma.RejectError, a ConnectStatus, an nvme.Status, ErrNoQueues or a context
// error.
func Connect(ctx context.Context, cfg Config) (*Controller, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	if !cfg.Discovery {
		cfg.Queues = cfg.Queues.Clip(runtime.NumCPU())
	}
	cfg.Loops = cfg.Loops[:cfg.Queues.Loops()]
	c := &Controller{
		cfg: cfg, pollMax: uint32(cfg.PollMaxBytes), state: StateNew, since: time.Now(), start: time.Now(),
		stopped: make(chan struct{}), dead: make(chan struct{}), mem: memory{limit: cfg.MaxMemory},
		queries: make(chan struct{}, maxQueries), attached: make(chan struct{}),
	}
	c.life, c.end = context.WithCancelCause(context.Background())
	for i, loop := range cfg.Loops {
		c.lanes = append(c.lanes, &lane{ctrl: c, loop: loop, index: i})
	}
	a, err := c.associate(ctx)
	if err != nil {
		return nil, errors.Join(err, c.mem.close())
	}
	during, cancel := a.during(ctx)
	defer cancel()
	if err := c.firstLook(during, a); err != nil {
		return nil, errors.Join(&StepError{"identify namespaces", err}, a.close(), c.mem.close())
	}
	for _, l := range c.lanes {
		if err := l.loop.Call(func() { l.loop.Attach(l) }); err != nil {
			return nil, errors.Join(err, c.detachLanes(), a.close(), c.mem.close())
		}
	}
	if err := c.announce(a); err != nil {
		return nil, errors.Join(err, c.detachLanes(), a.close(), c.mem.close())
	}
	if err := c.attach(a); err != nil {
		return nil, errors.Join(err, c.release(a), c.detachLanes(), c.mem.close())
	}
	go c.supervise(a)
	return c, nil
}

// attach gives each lane its part of the association. All lanes have released the
// previous association already.
func (c *Controller) attach(a *association) error {
	for _, l := range c.lanes {
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
			l.connect(own, route)
		}); e != nil {
			err = e
		}
		if err != nil {
			return fmt.Errorf("attach queues to loop %d: %w", l.index, err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if c.state != StateDeleting {
		c.state, c.since = StateLive, now
	}
	c.failure = nil
	c.outages.end(now)
	c.assoc, c.remote, c.lastPatience = a, a.remote, c.patience(a, c.cfg.KeepAlive)
	close(c.attached)
	c.attached = make(chan struct{})
	return nil
}

// release takes an association from the lanes and closes it. Afterwards, the requests
// that were in flight are parked on their lanes, and no adapter accesses their buffers
// any more.
func (c *Controller) release(a *association) error {
	var errs []error
	for _, l := range c.lanes {
		errs = append(errs, l.loop.Call(l.disconnect))
	}
	for _, p := range a.pairs {
		errs = append(errs, p.detach())
	}
	errs = append(errs, a.close())
	for _, p := range a.pairs {
		errs = append(errs, p.lane.loop.Call(func() { p.lane.recover(p) }))
	}
	return errors.Join(errs...)
}

func (c *Controller) detachLanes() error {
	var errs []error
	for _, l := range c.lanes {
		errs = append(errs, l.loop.Call(func() { l.loop.Detach(l) }))
	}
	return errors.Join(errs...)
}

var errClosed = errors.New("controller was closed")

// now returns the time since the controller was made.
func (c *Controller) now() time.Duration { return time.Since(c.start) }

// redispatch makes every lane dispatch its parked requests again. It must not be called
// on a loop.
func (c *Controller) redispatch() {
	for _, l := range c.lanes {
		// A loop that has ended holds no requests.
		_ = l.loop.Call(l.redispatch)
	}
}

// supervise serves one association after the other, until Close or until no further one
// can be made.
func (c *Controller) supervise(a *association) {
	defer close(c.stopped)
	for {
		live := time.Now()
		reason := c.serve(a)
		if errors.Is(reason, errClosed) {
			return // Close goes on with the association
		}
		lost := time.Now()
		c.lose(reason, lost)
		c.cfg.Log.Warn("association lost", "reason", reason)
		if err := c.release(a); err != nil {
			c.cfg.Log.Warn("end association", "error", err)
		}
		c.countLoss(lost, lost.Sub(live), errors.Is(reason, errReset))
		c.leaveDevice(a.removed.Load())
		var err error
		if a, err = c.reconnect(lost, reason); err != nil {
			if !errors.Is(err, errClosed) {
				c.die(err)
			}
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
// time. An association that has not lived for long has not proved to be better than the
// one before, and leaves the outage as it was, unless a request is what ended it: the
// target is there for all others, and they must not fail for that request. Reset says
// nothing about the target either.
func (c *Controller) countLoss(lost time.Time, lived time.Duration, reset bool) {
	blamed := c.blamed.Swap(false)
	switch {
	case reset || lived >= max(c.cfg.KeepAlive, time.Second): // without keep alive, an association must still prove itself
		c.outage, c.brief = lost, 0
	case blamed:
		c.outage, c.brief = lost, 1
	default:
		c.brief++
		if c.outage.IsZero() {
			c.outage = lost
		}
	}
}

// serve runs an association until it is lost, and returns the reason.
func (c *Controller) serve(a *association) error {
	a.admin.setTimeout(c.cfg.AdminTimeout)
	var helpers sync.WaitGroup
	helpers.Go(func() { c.listen(a.life, a) })
	helpers.Go(func() { c.watchNamespaces(a.life, a) })
	defer helpers.Wait()
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for {
		select {
		case <-second.C:
			c.clock.Add(1)
			c.tend(a)
		case <-a.life.Done():
			return context.Cause(a.life)
		}
	}
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

// reconnect makes the next association: at once, and then at intervals. The loss timeouts
// count from the beginning of the outage. err is the reason of the loss. If reconnect
// returns an error, the controller must end.
func (c *Controller) reconnect(lost time.Time, err error) (*association, error) {
	ctx := c.life
	giveUp := make(<-chan time.Time) // never
	if c.cfg.CtrlLoss > 0 {
		end := c.outage.Add(c.cfg.CtrlLoss)
		limited, cancel := context.WithDeadline(ctx, end)
		defer cancel()
		ctx, giveUp = limited, time.After(time.Until(end))
	}
	if c.cfg.FastIOFail > 0 {
		fast := time.AfterFunc(time.Until(c.outage.Add(c.cfg.FastIOFail)), c.failFast)
		defer fast.Stop()
	}
	for pause := c.pause(); ; pause = c.cfg.ReconnectDelay {
		select {
		case <-time.After(pause):
		case <-giveUp:
			return nil, fmt.Errorf("given up after %v: %w", c.cfg.CtrlLoss, err)
		case <-c.life.Done():
			return nil, context.Cause(c.life)
		}
		var a *association
		if a, err = c.attempt(ctx); err == nil {
			c.cfg.Log.Info("association made again", "after", time.Since(lost).Round(time.Millisecond), "queues", a.plan.String())
			return a, nil
		}
		c.mu.Lock()
		c.failure = err
		c.mu.Unlock()
		c.cfg.Log.Warn("reconnect", "error", err, "next_in", c.cfg.ReconnectDelay)
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
	ctx, cancel := a.during(ctx)
	defer cancel()
	if _, err := c.look(ctx, a); err != nil {
		return nil, errors.Join(&StepError{"identify namespaces", err}, a.close())
	}
	if err := c.fenceAll(ctx, a); err != nil {
		return nil, errors.Join(err, a.close())
	}
	if err := c.announce(a); err != nil {
		return nil, errors.Join(err, a.close())
	}
	if err := c.attach(a); err != nil {
		return nil, errors.Join(err, c.release(a))
	}
	return a, nil
}

// announce records the controller of an association before commands are sent to it. A
// controller that could not be recorded is not used.
func (c *Controller) announce(a *association) error {
	if c.cfg.Associated != nil {
		if err := c.cfg.Associated(a.cntlid); err != nil {
			return &StepError{"record controller id", err}
		}
	}
	if !c.cfg.Discovery { // whose commands write nothing
		c.unfenced = append(c.unfenced, a.cntlid)
	}
	return nil
}

func (c *Controller) lose(reason error, when time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.assoc, c.reason, c.attempts, c.failure = nil, reason, 0, nil
	c.losses++
	c.outages.begin(when, c.reasonOf(reason))
	if c.state != StateDeleting {
		c.state, c.since = StateConnecting, when
	}
	for _, ns := range c.namespaces {
		ns.doubt(when)
	}
}

// failFast fails the requests that wait for an association.
func (c *Controller) failFast() {
	for _, l := range c.lanes {
		// A loop that has ended holds no requests.
		_ = l.loop.Call(func() {
			if l.route[poller.Default] == nil {
				l.failFast()
			}
		})
	}
}

// die gives up the controller.
func (c *Controller) die(err error) {
	c.cfg.Log.Error("controller is given up", "reason", err)
	c.mu.Lock()
	c.state, c.since, c.reason, c.failure = StateDead, time.Now(), err, nil // err has the last failure
	c.mu.Unlock()
	close(c.dead)
	c.failFast()
}

// tend makes the queue pairs check their commands in flight. It does not disturb loops
// whose queue pairs have none.
func (c *Controller) tend(a *association) {
	limit := uint32(max(1, c.cfg.IOTimeout/time.Second))
	now := c.clock.Load()
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
				c.cfg.Log.Warn("target refused an asynchronous event request", "error", err)
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
	c.cfg.Log.Info("asynchronous event", "event", ev.String())
	if page := ev.LogPage(); page != 0 {
		// Reading the page enables the event again. The namespaces are looked at
		// even if this fails.
		if err := c.readLog(ctx, a, page); err != nil && ctx.Err() == nil {
			c.cfg.Log.Warn("read log page of an event", "page", page, "error", err)
		}
	}
	switch {
	case ev.Type() == nvme.EventError && ev.Info() == nvme.ErrorPersistentInternal:
		a.fail(because(LossTargetError, errors.New("controller reports a persistent internal error")))
	case ev.Type() == nvme.EventNotice && ev.Info() == nvme.NoticeNamespaceChanged:
		a.lookAtNamespaces()
	case ev.Type() == nvme.EventNotice && ev.Info() == nvme.NoticeDiscoveryChanged:
		c.discoveryChanged()
	}
}

func (c *Controller) readLog(ctx context.Context, a *association, page uint8) error {
	var out [adminPage]byte
	return a.admin.logPage(ctx, LogRequest{Page: page, NSID: nvme.NSIDAll}, out[:])
}

// reportStatus logs a request that fails with an error status.
func (c *Controller) reportStatus(r *request, s nvme.Status) {
	c.cfg.Log.Error("I/O error", "op", r.io.Op.String(), "nsid", r.home.ns.id,
		"sector", r.io.Sector, "sectors", r.io.Sectors, "status", s.String(), "tries", r.tries)
}

// reportBlame logs a request that fails because it is blamed for lost associations.
func (c *Controller) reportBlame(r *request) {
	c.cfg.Log.Error("I/O error: the association was lost each time that the request was sent", "op", r.io.Op.String(),
		"nsid", r.home.ns.id, "sector", r.io.Sector, "sectors", r.io.Sectors, "losses", r.losses)
}

// Namespaces returns the namespaces that were seen since the controller connected,
// including those that are gone. Of the gone ones without an open queue, only the last 64
// are kept.
func (c *Controller) Namespaces() []*Namespace {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.namespaces)
}

// Done returns a channel that is closed when the controller is dead. Err then returns the
// reason.
func (c *Controller) Done() <-chan struct{} { return c.dead }

// Err returns the reason why the controller is dead, or nil if it is not.
func (c *Controller) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != StateDead {
		return nil
	}
	return c.reason
}

// Abort gives up the association for good. A front end calls it if it must end while the
// target does not answer. The controller dies with the given reason. Every request fails
// as soon as the target can no longer access its buffer, whether it waits, is in flight
// or comes later. The caller must still call Close. Any goroutine may call Abort.
func (c *Controller) Abort(reason error) { c.end(reason) }

// Close leaves the subsystem in order: it notifies the controller of the shutdown, and
// then closes the I/O queues and the admin queue. The shutdown ends when ctx is done, or
// before. The queues of the namespaces must be closed before.
func (c *Controller) Close(ctx context.Context) error {
	c.mu.Lock()
	if c.state != StateDead {
		c.state, c.since = StateDeleting, time.Now()
	}
	c.closing = true
	c.mu.Unlock()
	c.end(errClosed)
	<-c.stopped
	c.mu.Lock()
	a := c.assoc
	c.assoc = nil
	c.mu.Unlock()
	var errs []error
	if a != nil {
		if err := a.shutdown(ctx); err != nil {
			errs = append(errs, fmt.Errorf("shut down controller: %w", err))
		}
		errs = append(errs, c.release(a))
	}
	errs = append(errs, c.detachLanes())
	c.reservations.Wait()
	errs = append(errs, c.mem.close())
	return errors.Join(errs...)
}

// Info describes a controller at one moment.
type Info struct {
	State     State
	Since     time.Time      // start of the state
	Reason    error          // why the association was lost the last time
	Losses    int            // number of associations lost
	Attempts  int            // attempts to reconnect since then
	Failure   error          // error of the last attempt, while there is no association
	Address   netip.AddrPort // of the target
	SubNQN    string         // name by which the subsystem was connected to
	CNTLID    uint16
	Version   nvme.Version
	Model     string
	Serial    string
	Firmware  string
	QueueSize int         // entries per I/O queue in use
	Plan      poller.Plan // requested and granted queues per class
	Device    string      // RDMA device
	InCapsule int         // bytes of data that travel with a command; 0 = none
	SQFlow    bool        // SQ flow control is on
	Lanes     []LaneStats
	Memory    MemoryInfo
	Outages   Outages
	Oldest    time.Duration // age of the oldest command in flight, in whole seconds
	Stages    [nStages]OpHistograms
}

// Outages are the times without an association since the controller first connected.
type Outages struct {
	// Time is their total duration, including that of the present one. An outage begins
	// when the loss is noticed: of a silent target at most KeepAlive after its last
	// answer.
	Time     time.Duration
	Losses   map[LossReason]int // associations lost, by reason; those without a loss are 0
	Attempts int                // to make an association again
	Made     int                // of those, successful ones
}

// LaneStats holds the counters of one loop.
type LaneStats struct {
	Submitted, Completed uint64 // requests
	HandedOver           uint64 // requests that a queue pair of another loop served
	Retried              uint64 // commands sent again after an error status
	Held                 int64  // requests that cannot be sent at present
}

// Info returns a snapshot.
func (c *Controller) Info() Info {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := Info{SubNQN: c.cfg.SubNQN, State: c.state, Since: c.since, Reason: c.reason, Losses: c.losses, Attempts: c.attempts, Failure: c.failure, Device: c.mem.device(), Memory: c.mem.info()}
	if a := c.assoc; a != nil {
		i.Address = a.remote
		i.CNTLID, i.Version, i.QueueSize, i.Plan = a.cntlid, a.version, a.depth, a.plan.Plan
		i.Model, i.Serial, i.Firmware = a.identify.MN(), a.identify.SN(), a.identify.FR()
		if len(a.pairs) > 0 {
			i.InCapsule, i.SQFlow = int(a.pairs[0].inCapsule), a.pairs[0].checkHead
		}
		for _, p := range a.pairs {
			i.Oldest = max(i.Oldest, time.Duration(p.oldest.Load())*time.Second)
		}
	}
	for _, l := range c.lanes {
		i.Lanes = append(i.Lanes, LaneStats{
			Submitted: l.submitted.Load(), Completed: l.completed.Load(),
			HandedOver: l.handedOver.Load(), Retried: l.retried.Load(), Held: l.held.Load(),
		})
		for s := range l.stages {
			l.stages[s].addTo(&i.Stages[s])
		}
	}
	i.Outages = Outages{Time: c.outages.time(), Losses: map[LossReason]int{}, Attempts: c.outages.tries, Made: c.outages.made}
	for r, n := range c.outages.lost {
		i.Outages.Losses[LossReason(r)] = n
	}
	return i
}
