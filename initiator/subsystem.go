package initiator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/internal/loglimit"
	"ublk-nvmeof/nvme"
)

// Subsystem is the host's view of an NVM subsystem, or of a discovery subsystem. It owns
// what the controllers share: the namespaces, the lanes with their requests, and the I/O
// memory. Each of its controllers is a path to the namespaces.
type Subsystem struct {
	cfg     Config
	reports *slog.Logger // cfg.Log with a limit, for what a target can cause at any rate
	pollMax uint32
	lanes   []*lane
	start   time.Time               // origin of now
	clock   atomic.Uint32           // seconds; lanes stamp commands with it
	suspect atomic.Pointer[request] // the request that may be the cause of the losses

	mem memory

	// life ends with Close (cause errClosed), with Abort (cause: its reason), or when the
	// subsystem is given up (cause: *givenUpError).
	life    context.Context
	end     context.CancelCauseFunc
	running sync.WaitGroup // the goroutine of tick, and that of each path
	dead    chan struct{}  // closed in StateDead
	queries chan struct{}  // holds a token for each query in progress
	proving chan struct{}  // holds a token while Reauthenticate runs

	reservations sync.WaitGroup // commands of Namespace.Reserve; none is added while closing
	settling     sync.WaitGroup // closed queues whose buffers are not free yet

	recording sync.Mutex // held while the controllers are recorded; taken before mu
	placing   sync.Mutex // held while the namespaces are compared with what a path says; taken before mu

	mu         sync.Mutex // guards what follows; taken before Controller.mu
	slots      [MaxPaths]*Controller
	removed    time.Time // when a path that had an association was last removed
	keys       Credentials
	policy     Policy
	preferred  int // slot of the policy Preferred
	namespaces []*Namespace
	leftOut    map[uint32]string // reasons why namespaces cannot be used, by their ids; at most maxLeftOut
	remnants   []*remnant        // controllers that may still execute commands, oldest first
	connected  bool              // Connect has returned, so changes are reported
	closing    bool              // Close was called
	err        error             // why the subsystem is dead
	since      time.Time         // of the state, if it is dead or closing
	outage     outages           // times without any association
	failing    *time.Timer
	giving     *time.Timer
}

// MaxPaths is the largest number of paths of a subsystem. Namespaces and lanes have an
// entry for each.
const MaxPaths = 16

// Connect connects to a subsystem over its first path and identifies its namespaces, if it
// can have any. ctx bounds the whole of it. Errors: *StepError, whose cause is a
// *rdma.StepError, a *rdma.RejectError, a ConnectStatus, an nvme.Status, ErrNoQueues or a
// context error.
func Connect(ctx context.Context, cfg Config) (*Subsystem, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	s := newSubsystem(cfg)
	c := s.newController(0, cfg.Path)
	a, err := c.connect(ctx)
	if err != nil {
		return nil, errors.Join(err, s.mem.close())
	}
	for _, l := range s.lanes {
		if err := l.loop.Call(func() { l.loop.Attach(l) }); err != nil {
			return nil, errors.Join(err, s.detachLanes(), a.close(), s.mem.close())
		}
	}
	s.slots[0] = c
	if err := c.use(a); err != nil {
		return nil, errors.Join(err, s.detachLanes(), s.mem.close())
	}
	s.mu.Lock()
	s.connected = true
	s.mu.Unlock()
	s.running.Go(s.tick)
	s.running.Go(func() { c.supervise(a) })
	return s, nil
}

func newSubsystem(cfg Config) *Subsystem {
	if !cfg.Discovery {
		cfg.Queues = cfg.Queues.Clip(runtime.NumCPU())
	}
	cfg.Loops = cfg.Loops[:cfg.Queues.Loops()]
	s := &Subsystem{
		cfg: cfg, reports: loglimit.New(cfg.Log), pollMax: uint32(cfg.PollMaxBytes), start: time.Now(), since: time.Now(),
		policy: cfg.Policy, dead: make(chan struct{}), mem: memory{chunk: chunkSize, turns: spareTurns, limit: cfg.MaxMemory, limited: lockLimited()}, queries: make(chan struct{}, maxQueries), proving: make(chan struct{}, 1), keys: cfg.Credentials,
	}
	s.life, s.end = context.WithCancelCause(context.Background())
	for i, loop := range cfg.Loops {
		s.lanes = append(s.lanes, &lane{sub: s, loop: loop, index: i, policy: cfg.Policy, turn: -1})
	}
	return s
}

// now returns the time since the subsystem was connected.
func (s *Subsystem) now() time.Duration { return time.Since(s.start) }

func (s *Subsystem) detachLanes() error {
	var errs []error
	for _, l := range s.lanes {
		errs = append(errs, l.loop.Call(func() { l.loop.Detach(l) }))
	}
	return errors.Join(errs...)
}

var errClosed = errors.New("controller was closed")

// redispatch makes every lane dispatch its parked requests again. It must not be called
// on a loop.
func (s *Subsystem) redispatch() {
	for _, l := range s.lanes {
		// A loop that has ended holds no requests.
		_ = l.loop.Call(l.redispatch)
	}
}

// tick advances the clock and looks after the commands in flight, once a second.
func (s *Subsystem) tick() {
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for {
		select {
		case <-second.C:
			s.clock.Add(1)
			for _, c := range s.paths() {
				c.tend()
			}
			s.expire(time.Now())
		case <-s.life.Done():
			return
		}
	}
}

// paths returns the controllers of the subsystem, in the order of their slots.
func (s *Subsystem) paths() []*Controller {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lockedPaths()
}

func (s *Subsystem) lockedPaths() []*Controller {
	var all []*Controller
	for _, c := range s.slots {
		if c != nil {
			all = append(all, c)
		}
	}
	return all
}

// givenUpError is why a subsystem is dead that could not be reached for too long.
type givenUpError struct {
	after time.Duration
	err   error // of the last attempt to reach it
}

func (e *givenUpError) Error() string { return fmt.Sprintf("given up after %v: %v", e.after, e.err) }
func (e *givenUpError) Unwrap() error { return e.err }

// limitOutage starts or stops the timers that fail the requests and give up the subsystem.
// They run while no path has an association. An outage begins with the latest of the
// outages of the paths, or with the removal of the last path that had an association.
func (s *Subsystem) limitOutage() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range []*time.Timer{s.failing, s.giving} {
		if t != nil {
			t.Stop()
		}
	}
	s.failing, s.giving = nil, nil
	began, out := s.outageBegan()
	if !out {
		s.outage.end(time.Now())
		return
	}
	s.outage.begin(time.Now())
	if s.cfg.FastIOFail > 0 {
		s.failing = time.AfterFunc(time.Until(began.Add(s.cfg.FastIOFail)), s.failWaiting)
	}
	if s.cfg.CtrlLoss > 0 {
		s.giving = time.AfterFunc(time.Until(began.Add(s.cfg.CtrlLoss)), s.giveUp)
	}
}

// outageBegan returns when the present outage began. It returns false if a path has an
// association. The caller holds the lock.
func (s *Subsystem) outageBegan() (time.Time, bool) {
	began := s.removed
	for _, c := range s.lockedPaths() {
		when, out := c.outageBegan()
		if !out {
			return time.Time{}, false
		}
		if when.After(began) {
			began = when
		}
	}
	return began, true
}

// failWaiting fails the requests that have waited for an association for too long.
func (s *Subsystem) failWaiting() {
	s.mu.Lock()
	began, out := s.outageBegan()
	s.mu.Unlock()
	if out && time.Since(began) >= s.cfg.FastIOFail {
		s.failFast()
	}
}

// failFast fails the requests that wait for an association, unless there is one by now.
func (s *Subsystem) failFast() {
	for _, l := range s.lanes {
		// A loop that has ended holds no requests.
		_ = l.loop.Call(func() {
			if !l.connected() {
				l.failFast()
			}
		})
	}
}

// giveUp ends the subsystem because no path could be reached for too long.
func (s *Subsystem) giveUp() {
	s.mu.Lock()
	began, out := s.outageBegan()
	paths := s.lockedPaths()
	s.mu.Unlock()
	if !out || time.Since(began) < s.cfg.CtrlLoss {
		return // the outage that the timer was for has ended
	}
	var errs []error
	for _, c := range paths {
		errs = append(errs, c.trouble())
	}
	s.end(&givenUpError{s.cfg.CtrlLoss, errors.Join(errs...)})
}

// die makes all requests fail. The paths have ended, or end because life has ended.
func (s *Subsystem) die(err error) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.err, s.since = err, time.Now()
	s.mu.Unlock()
	s.cfg.Log.Error("subsystem is given up", "reason", err)
	close(s.dead)
	s.failFast()
	s.stateChanged()
}

func (s *Subsystem) stateChanged() {
	if s.cfg.StateChanged != nil {
		s.cfg.StateChanged()
	}
}

// Namespaces returns the namespaces that were seen since the subsystem was connected,
// including those that are gone. Of the gone ones without an open queue, only the last 64
// are kept.
func (s *Subsystem) Namespaces() []*Namespace {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.namespaces)
}

// Done returns a channel that is closed when the subsystem is dead. Err then returns the
// reason.
func (s *Subsystem) Done() <-chan struct{} { return s.dead }

// Err returns the reason why the subsystem is dead, or nil if it is not.
func (s *Subsystem) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Abort gives up all associations for good. A front end calls it if it must end while the
// target does not answer. The subsystem dies with the given reason. Every request fails
// as soon as the target can no longer access its buffer, whether it waits, is in flight
// or comes later. The caller must still call Close. Any goroutine may call Abort.
func (s *Subsystem) Abort(reason error) { s.end(reason) }

// Close leaves the subsystem in order: it notifies each controller of the shutdown, and
// then closes its I/O queues and its admin queue. The shutdown ends when ctx is done, or
// before. The queues and the
// regions of the namespaces must be closed before.
func (s *Subsystem) Close(ctx context.Context) error {
	s.mu.Lock()
	if s.err == nil {
		s.since = time.Now()
	}
	s.closing = true
	for _, t := range []*time.Timer{s.failing, s.giving} {
		if t != nil {
			t.Stop()
		}
	}
	s.mu.Unlock()
	s.end(errClosed)
	s.running.Wait()
	var errs []error
	for _, c := range s.paths() {
		errs = append(errs, c.leave(ctx))
	}
	errs = append(errs, s.detachLanes())
	s.reservations.Wait()
	s.settling.Wait()
	errs = append(errs, s.mem.close())
	return errors.Join(errs...)
}

// Info describes a subsystem at one moment.
type Info struct {
	State  State // of the best of its paths
	Since  time.Time
	SubNQN string // name by which the subsystem was connected to
	Paths  []PathInfo
	Lanes  []LaneStats
	Memory MemoryInfo
	Policy Policy
	// Preferred is the index in Paths of the preferred path, with the policy Preferred.
	Preferred int
	Fences    []FenceInfo   // old controllers for whose end changes wait
	Outages   Outages       // times without any association
	Oldest    time.Duration // age of the oldest command in flight, in whole seconds
	Stages    [nStages]OpHistograms
	// LeftOut has the reasons why namespaces cannot be used, by their ids: at most
	// 8 of them.
	LeftOut map[uint32]string
}

// Outages are the times without an association since the first one was made.
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
func (s *Subsystem) Info() Info {
	i := Info{SubNQN: s.cfg.SubNQN, Memory: s.mem.info(), Fences: s.fences(), Outages: Outages{Losses: map[LossReason]int{}}}
	s.mu.Lock()
	paths, preferred := s.lockedPaths(), s.preferred
	i.Policy, i.LeftOut = s.policy, maps.Clone(s.leftOut)
	s.mu.Unlock()
	for n, c := range paths {
		if c.slot == preferred {
			i.Preferred = n
		}
		p := c.Info()
		i.Paths = append(i.Paths, p)
		i.Oldest = max(i.Oldest, p.Oldest)
		i.Outages.Attempts += p.Outages.Attempts
		i.Outages.Made += p.Outages.Made
		for r, n := range p.Outages.Losses {
			i.Outages.Losses[r] += n
		}
	}
	s.mu.Lock()
	i.State, i.Since = s.stateOf(i.Paths)
	i.Outages.Time = s.outage.time()
	s.mu.Unlock()
	for _, l := range s.lanes {
		i.Lanes = append(i.Lanes, LaneStats{
			Submitted: l.submitted.Load(), Completed: l.completed.Load(),
			HandedOver: l.handedOver.Load(), Retried: l.retried.Load(), Held: l.held.Load(),
		})
		for stage := range l.stages {
			l.stages[stage].addTo(&i.Stages[stage])
		}
	}
	return i
}

// stateOf returns the state of the subsystem. It is live since the first of its live paths
// became live, and connecting since the last of its paths was lost. The caller holds the lock.
func (s *Subsystem) stateOf(paths []PathInfo) (State, time.Time) {
	switch {
	case s.err != nil:
		return StateDead, s.since
	case s.closing:
		return StateDeleting, s.since
	}
	state, since := StateNew, s.since
	for _, p := range paths {
		switch {
		case p.State == StateLive && (state != StateLive || p.Since.Before(since)):
			state, since = StateLive, p.Since
		case p.State == StateConnecting && (state == StateNew || state == StateConnecting && p.Since.After(since)):
			state, since = StateConnecting, p.Since
		}
	}
	return state, since
}

// reportStatus logs a request that fails with an error status.
func (s *Subsystem) reportStatus(r *request, status nvme.Status) {
	s.reports.Error("I/O error", "op", r.io.Op.String(), "nsid", r.home.ns.id,
		"sector", r.io.Sector, "sectors", r.io.Sectors, "status", status.String(), "tries", r.tries)
}

// reportBlame logs a request that fails because it is blamed for lost associations.
func (s *Subsystem) reportBlame(r *request) {
	s.reports.Error("I/O error: the association was lost each time that the request was sent", "op", r.io.Op.String(),
		"nsid", r.home.ns.id, "sector", r.io.Sector, "sectors", r.io.Sectors, "losses", r.losses)
}
