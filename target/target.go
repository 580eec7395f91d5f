package target

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// Limits and defaults, nvmet's where it has them.
const (
	DefaultInCapsule      = 4096
	DefaultQueueSize      = 128
	DefaultMaxTransfer    = 1 << 20
	DefaultMaxQueues      = 128
	DefaultMaxConnections = 1024
	DefaultConnectTimeout = 10 * time.Second

	maxInCapsule = 16384
	minQueueSize = 16
	maxQueueSize = 1024
	adminDepth   = 32
	minTransfer  = 4096
	backlog      = 128
	readDepth    = 16 // RDMA READs outstanding per queue, clipped by the provider
)

// Config describes a Target.
type Config struct {
	Provider rdma.Provider  // required
	AddrPort netip.AddrPort // to listen on; a port of 0 picks one
	Log      *slog.Logger   // nil: nothing is logged

	InCapsule      int // bytes of in-capsule data on I/O queues, a multiple of 16 up to 16384; 0: 4096, negative: none
	QueueSize      int // entries of the largest I/O queue, 16..1024; 0: 128
	MaxTransfer    int // bytes per command, a power of two from 4096 to 1 MiB (MDTS); 0: 1 MiB
	MaxConnections int // connections at a time; 0: 1024

	// QuiesceTime is what controllers announce as their command quiesce time (CQT),
	// whole milliseconds up to 65535; 0 is not reported. The target cannot keep
	// such a promise by itself: a store may take any time. Hosts that ask for a
	// controller's id are told the truth whatever is announced.
	QuiesceTime time.Duration
	// CommandKeepAlive makes Keep Alive commands the only ones that keep a
	// controller alive. Without it all commands do, and CTRATT says so (TBKAS).
	CommandKeepAlive bool
	// NoWriteCache makes every write durable before it is answered, and controllers
	// say that there is no volatile write cache (VWC).
	NoWriteCache bool
	// RetryDelays are CRDT1 to CRDT3, whole multiples of 100 ms up to 6553.5 s. A
	// status with a CRD field (see [nvme.Status.CRD]) refers to them.
	RetryDelays [3]time.Duration

	// ConnectTimeout is how long a host may take to establish a connection, and
	// then to send the Connect command; 0: 10 s.
	ConnectTimeout time.Duration
}

func (c *Config) setDefaults() error {
	if c.Provider == nil {
		return errors.New("config: no RDMA provider")
	}
	for _, f := range []struct {
		field *int
		value int
	}{
		{&c.InCapsule, DefaultInCapsule}, {&c.QueueSize, DefaultQueueSize},
		{&c.MaxTransfer, DefaultMaxTransfer}, {&c.MaxConnections, DefaultMaxConnections},
	} {
		if *f.field == 0 {
			*f.field = f.value
		}
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = DefaultConnectTimeout
	}
	c.InCapsule = max(0, c.InCapsule)
	switch {
	case c.InCapsule > maxInCapsule || c.InCapsule%16 != 0:
		return fmt.Errorf("config: in-capsule data of %d bytes is no multiple of 16 up to %d", c.InCapsule, maxInCapsule)
	case c.QueueSize < minQueueSize || c.QueueSize > maxQueueSize:
		return fmt.Errorf("config: queue size %d is not %d..%d", c.QueueSize, minQueueSize, maxQueueSize)
	case c.MaxTransfer < minTransfer || c.MaxTransfer > DefaultMaxTransfer || c.MaxTransfer&(c.MaxTransfer-1) != 0:
		return fmt.Errorf("config: transfer size %d is no power of two from %d to %d", c.MaxTransfer, minTransfer, DefaultMaxTransfer)
	case c.MaxConnections < 1:
		return fmt.Errorf("config: %d connections", c.MaxConnections)
	case c.ConnectTimeout < 0:
		return fmt.Errorf("config: connect timeout %v is negative", c.ConnectTimeout)
	case !fits(c.QuiesceTime, time.Millisecond):
		return fmt.Errorf("config: quiesce time %v is not whole milliseconds up to 65535", c.QuiesceTime)
	}
	for i, d := range c.RetryDelays {
		if !fits(d, 100*time.Millisecond) {
			return fmt.Errorf("config: retry delay %d, %v, is no multiple of 100ms up to 6553.5s", i+1, d)
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// fits says whether d can be written as a 16-bit number of units.
func fits(d, unit time.Duration) bool { return d >= 0 && d%unit == 0 && d/unit <= math.MaxUint16 }

// Target listens on one address.
type Target struct {
	cfg      Config
	listener rdma.Listener
	faults   Faults
	running  sync.WaitGroup
	ctx      context.Context // ends with Close
	cancel   context.CancelFunc

	controllers registry

	mu         sync.Mutex // guards what follows
	subsystems map[string]*Subsystem
	discovery  *Subsystem
	genctr     uint64 // of the discovery log
	queues     map[*queue]struct{}
	opening    int // connections without queue yet
	past       totals
	connects   uint64
	rejects    uint64
}

// New listens. Subsystems are added later; until then only the discovery
// subsystem exists.
func New(cfg Config) (*Target, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	t := &Target{
		cfg: cfg, controllers: newRegistry(),
		subsystems: map[string]*Subsystem{}, queues: map[*queue]struct{}{}, past: newTotals(),
	}
	t.faults.target = t
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.discovery = newSubsystem(t, SubsystemConfig{NQN: nvme.DiscoveryNQN, Serial: "discovery", Model: defaultModel, AllowAny: true})
	t.discovery.discovery = true
	var err error
	if t.listener, err = cfg.Provider.Listen(cfg.AddrPort, backlog); err != nil {
		t.cancel()
		return nil, err
	}
	t.running.Go(t.accept)
	return t, nil
}

// Addr is the address that the target listens on.
func (t *Target) Addr() netip.AddrPort { return t.listener.Addr() }

// Faults are the faults of this target.
func (t *Target) Faults() *Faults { return &t.faults }

// Close ends all connections and waits until nothing of the target runs.
func (t *Target) Close() error {
	t.cancel()
	err := t.listener.Close()
	t.disconnect(func(*queue) bool { return true }, "target closes")
	t.running.Wait()
	return err
}

// AddSubsystem adds a subsystem without namespaces. Errors are of the
// configuration, or a NQN that exists.
func (t *Target) AddSubsystem(cfg SubsystemConfig) (*Subsystem, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	t.mu.Lock()
	if t.subsystems[cfg.NQN] != nil || cfg.NQN == nvme.DiscoveryNQN {
		t.mu.Unlock()
		return nil, fmt.Errorf("add subsystem: %s exists", cfg.NQN)
	}
	s := newSubsystem(t, cfg)
	t.subsystems[cfg.NQN] = s
	t.genctr++
	t.mu.Unlock()
	t.discovery.notify(eventDiscovery, 0)
	return s, nil
}

// RemoveSubsystem removes a subsystem and ends the connections to it. Commands
// that are executing go on; the ids of their controllers stay known, also to
// another subsystem of this name, until they have ended.
func (t *Target) RemoveSubsystem(nqn string) error {
	t.mu.Lock()
	s := t.subsystems[nqn]
	if s == nil {
		t.mu.Unlock()
		return fmt.Errorf("remove subsystem: no %s", nqn)
	}
	delete(t.subsystems, nqn)
	t.genctr++
	t.mu.Unlock()
	s.DropControllers()
	t.discovery.notify(eventDiscovery, 0)
	return nil
}

// subsystem finds the subsystem of a Connect; nil if there is none.
func (t *Target) subsystem(nqn string) *Subsystem {
	if nqn == nvme.DiscoveryNQN {
		return t.discovery
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.subsystems[nqn]
}

// all lists all NVM subsystems.
func (t *Target) all() []*Subsystem {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Values(t.subsystems))
}

// accept takes connect requests until the listener closes.
func (t *Target) accept() {
	for {
		id, err := t.listener.Accept(t.ctx)
		t.faults.awaitThaw(t.ctx)
		switch {
		case t.ctx.Err() != nil:
			if err == nil {
				_ = id.Close() // refuses the request; nobody is interested in more
			}
			return
		case errors.Is(err, rdma.ErrClosed):
			t.cfg.Log.Error("listener ended", "err", err)
			return
		case err != nil:
			t.cfg.Log.Warn("connect request failed", "err", err)
			continue
		}
		t.running.Go(func() { t.serve(id) })
	}
}

// serve is the life of one connection.
func (t *Target) serve(id rdma.ID) {
	log := t.cfg.Log.With("host", id.RemoteAddr())
	q, err := t.open(id)
	if err != nil {
		log.Warn("connection refused", "err", err)
		reason := nvme.RDMARejectNoResources
		errors.As(err, &reason)
		t.mu.Lock()
		t.rejects++
		t.mu.Unlock()
		private := nvme.RDMAReject{Status: reason}.Marshal()
		if err := id.Reject(private[:]); err != nil {
			log.Debug("reject failed", "err", err)
		}
		_ = id.Close() // nothing was established that could fail to end
		return
	}
	err = q.run(t.ctx)
	log.Debug("queue ended", "qid", q.qid, "reason", err)
	q.leave()
	if err := q.close(); err != nil {
		log.Warn("queue did not close cleanly", "qid", q.qid, "err", err)
	}
	t.mu.Lock()
	delete(t.queues, q)
	t.past.add(q)
	t.mu.Unlock()
}

// open makes the queue of a connect request. An error that wraps no
// nvme.RDMARejectStatus is want of resources.
func (t *Target) open(id rdma.ID) (*queue, error) {
	if reason := nvme.RDMARejectStatus(t.faults.reject.Load()); reason != 0 {
		return nil, fmt.Errorf("fault: %w", reason)
	}
	req, err := nvme.ParseRDMARequest(id.PrivateData())
	if err != nil {
		return nil, err
	}
	limit := t.cfg.QueueSize
	if req.QID == 0 {
		limit = adminDepth
	}
	if int(req.HSQSize) >= limit {
		return nil, fmt.Errorf("queue %d of %d entries, at most %d: %w", req.QID, int(req.HSQSize)+1, limit, nvme.RDMARejectInvalidHSQSize)
	}
	t.mu.Lock()
	full := len(t.queues)+t.opening >= t.cfg.MaxConnections
	if !full {
		t.opening++
	}
	t.mu.Unlock()
	if full {
		return nil, fmt.Errorf("%d connections: %w", t.cfg.MaxConnections, nvme.RDMARejectNoResources)
	}
	q, err := newQueue(t, id, req)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.opening--
	if err != nil {
		return nil, err
	}
	t.queues[q] = struct{}{}
	t.connects++
	if t.ctx.Err() != nil {
		q.kill("target closes") // Close did not see this queue
	}
	return q, nil
}

// disconnect ends the connections of the queues that match, and says how many.
func (t *Target) disconnect(match func(*queue) bool, reason string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for q := range t.queues {
		if match(q) {
			q.kill(reason)
			n++
		}
	}
	return n
}

// visible lists the subsystems that a host may connect to, by NQN.
func (t *Target) visible(host string) (subsystems []*Subsystem, genctr uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.subsystems {
		if s.allows(host) {
			subsystems = append(subsystems, s)
		}
	}
	slices.SortFunc(subsystems, func(a, b *Subsystem) int {
		return cmp.Compare(a.cfg.NQN, b.cfg.NQN)
	})
	return subsystems, t.genctr
}
