package target

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ublk-nvmeof/internal/loglimit"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// Limits and defaults. They are those of nvmet where it has such a limit.
const (
	DefaultInCapsule      = 4096
	DefaultQueueSize      = 128
	DefaultMaxTransfer    = 1 << 20
	DefaultMaxQueues      = 128
	DefaultMaxConnections = 1024
	DefaultConnectTimeout = 10 * time.Second
	DefaultMaxDescriptors = 16 // as of SPDK; nvmet has 1

	// MinTransfer is the smallest limit that MDTS can express: two memory pages of the
	// smallest size. MDTS 0 means that there is no limit.
	MinTransfer = 2 * pageSize

	pageSize     = 4096 // CAP.MPSMIN
	maxInCapsule = 16384
	minQueueSize = 16
	maxQueueSize = 1024
	adminDepth   = 32
	backlog      = 128
	readDepth    = 16 // RDMA READs outstanding per queue, clipped by the provider
)

// Config describes a Target.
type Config struct {
	Log *slog.Logger // nil: nothing is logged

	InCapsule   int // bytes of in-capsule data on I/O queues, a multiple of 16 up to 16384; 0: 4096, negative: none
	QueueSize   int // entries of the largest I/O queue, 16..1024; 0: 128
	MaxTransfer int // bytes per command, a power of two from MinTransfer to 1 MiB (MDTS); 0: 1 MiB
	// MaxDescriptors is how many keyed descriptors the data of an I/O command may have, 1..16
	// (MSDBD); 0: 16. It is at most what fits into InCapsule, 16 bytes each, and 1 if only one does.
	MaxDescriptors int
	MaxConnections int // simultaneous connections; 0: 1024
	MaxPerHost     int // simultaneous connections of one address; 0: three quarters of MaxConnections

	// QueueMemory is the largest sum of the memory of all connected queues, in bytes.
	// An I/O queue takes (64 + InCapsule) bytes and 32 KiB for each of its entries,
	// where the second part is between twice MaxTransfer, or 2 MiB, and 4 MiB; an admin
	// queue takes about 1 MiB. 0: a quarter of the machine's memory, at least 256 MiB.
	QueueMemory int64

	// The ids of controllers are between these, 1..nvme.CNTLIDMax; 0: the smallest and the
	// largest. The targets of one subsystem must not give the same ids.
	MinControllerID, MaxControllerID uint16

	// DiscoveryNQN is a name of the discovery subsystem beside the well-known one, which
	// its controllers and its log give; empty: there is none.
	DiscoveryNQN string

	// QuiesceTime is the command quiesce time that controllers announce (CQT),
	// whole milliseconds up to 65535; 0: not reported. The target does not enforce
	// it, because a store may take any time. The answer to a host that connects to
	// a controller by its id does not depend on it.
	QuiesceTime time.Duration
	// ANATransition is the longest time in the ANA change state that controllers
	// announce (ANATT), whole seconds up to 255; 0: 10 s. The target does not
	// enforce it. Only [Subsystem.SetANAState] ends the state.
	ANATransition time.Duration
	// CommandKeepAlive makes Keep Alive commands the only ones that restart the keep
	// alive timer. Without it every command does, and CTRATT announces that (TBKAS).
	CommandKeepAlive bool
	// NoWriteCache makes every write durable before its completion, and controllers
	// announce that there is no volatile write cache (VWC 0).
	NoWriteCache bool
	// RetryDelays are CRDT1 to CRDT3, whole multiples of 100 ms up to 6553.5 s. A
	// status with a CRD field (see [nvme.Status.CRD]) refers to them.
	RetryDelays [3]time.Duration

	// ConnectTimeout is the time that a host has to establish a connection, and
	// again to send the Connect command; 0: 10 s.
	ConnectTimeout time.Duration
}

func (c *Config) setDefaults() error {
	for _, f := range []struct {
		field *int
		value int
	}{
		{&c.InCapsule, DefaultInCapsule}, {&c.QueueSize, DefaultQueueSize},
		{&c.MaxTransfer, DefaultMaxTransfer}, {&c.MaxDescriptors, DefaultMaxDescriptors}, {&c.MaxConnections, DefaultMaxConnections},
	} {
		if *f.field == 0 {
			*f.field = f.value
		}
	}
	if c.ANATransition == 0 {
		c.ANATransition = 10 * time.Second
	}
	if c.MaxPerHost == 0 {
		c.MaxPerHost = c.MaxConnections - c.MaxConnections/4
	}
	if c.QueueMemory == 0 {
		c.QueueMemory = defaultQueueMemory()
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = DefaultConnectTimeout
	}
	if c.MinControllerID == 0 {
		c.MinControllerID = 1
	}
	if c.MaxControllerID == 0 {
		c.MaxControllerID = nvme.CNTLIDMax
	}
	c.InCapsule = max(0, c.InCapsule)
	switch {
	case c.InCapsule > maxInCapsule || c.InCapsule%16 != 0:
		return fmt.Errorf("config: in-capsule data of %d bytes is not a multiple of 16 up to %d", c.InCapsule, maxInCapsule)
	case c.QueueSize < minQueueSize || c.QueueSize > maxQueueSize:
		return fmt.Errorf("config: queue size %d; want %d to %d", c.QueueSize, minQueueSize, maxQueueSize)
	case c.MaxTransfer < MinTransfer || c.MaxTransfer > DefaultMaxTransfer || c.MaxTransfer&(c.MaxTransfer-1) != 0:
		return fmt.Errorf("config: transfer size %d is not a power of two from %d to %d", c.MaxTransfer, MinTransfer, DefaultMaxTransfer)
	case c.MaxDescriptors < 1 || c.MaxDescriptors > DefaultMaxDescriptors:
		return fmt.Errorf("config: %d descriptors per command; want 1 to %d", c.MaxDescriptors, DefaultMaxDescriptors)
	case c.MaxConnections < 1:
		return fmt.Errorf("config: limit of %d connections; want at least 1", c.MaxConnections)
	case c.MaxPerHost < 1:
		return fmt.Errorf("config: limit of %d connections of one host; want at least 1", c.MaxPerHost)
	case c.QueueMemory < 0:
		return fmt.Errorf("config: queue memory of %d bytes is negative", c.QueueMemory)
	case c.MinControllerID > c.MaxControllerID || c.MaxControllerID > nvme.CNTLIDMax:
		return fmt.Errorf("config: controller ids %d to %d; want a range within 1 to %d", c.MinControllerID, c.MaxControllerID, nvme.CNTLIDMax)
	case c.ConnectTimeout < 0:
		return fmt.Errorf("config: connect timeout %v is negative", c.ConnectTimeout)
	case !fits(c.ANATransition, time.Second) || c.ANATransition > math.MaxUint8*time.Second:
		return fmt.Errorf("config: ANA transition time %v is not whole seconds up to 255", c.ANATransition)
	case !fits(c.QuiesceTime, time.Millisecond):
		return fmt.Errorf("config: quiesce time %v is not whole milliseconds up to 65535", c.QuiesceTime)
	}
	for i, d := range c.RetryDelays {
		if !fits(d, 100*time.Millisecond) {
			return fmt.Errorf("config: retry delay %d, %v, is not a multiple of 100ms up to 6553.5s", i+1, d)
		}
	}
	c.MaxDescriptors = max(1, min(c.MaxDescriptors, c.InCapsule/nvme.SGLSize))
	if c.DiscoveryNQN == "" {
		c.DiscoveryNQN = nvme.DiscoveryNQN
	}
	if err := nvme.ValidateNQN(c.DiscoveryNQN); err != nil {
		return fmt.Errorf("config: discovery subsystem: %w", err)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// fits reports whether d can be written as a 16-bit number of units.
func fits(d, unit time.Duration) bool { return d >= 0 && d%unit == 0 && d/unit <= math.MaxUint16 }

// Target is an NVMe over Fabrics target. Hosts reach its subsystems over its ports.
type Target struct {
	cfg     Config
	log     *slog.Logger // for events that hosts cause; limited in rate, so that hosts cannot fill a disk
	faults  Faults
	running sync.WaitGroup
	ctx     context.Context // ends with Close
	cancel  context.CancelFunc

	controllers registry
	flushes     atomic.Int64 // flushes of whole subsystems in progress

	mu         sync.Mutex // guards what follows
	ports      [MaxPorts]*Port
	subsystems map[string]*Subsystem
	discovery  *Subsystem
	referrals  []netip.AddrPort // in the discovery log
	genctr     uint64           // of the discovery log
	queues     map[*queuePair]struct{}
	admission  admission
	past       totals
	connects   uint64
	rejects    uint64
	refusals   map[string]uint64 // by reason
}

// New returns a target that has only the discovery subsystem, and no port. The error is about
// the configuration.
func New(cfg Config) (*Target, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	t := &Target{
		cfg: cfg, controllers: newRegistry(cfg.MinControllerID, cfg.MaxControllerID),
		subsystems: map[string]*Subsystem{}, queues: map[*queuePair]struct{}{}, past: newTotals(), refusals: map[string]uint64{},
		admission: admission{hosts: map[netip.Addr]int{}, endingOf: map[netip.Addr]int{}},
	}
	t.log = loglimit.New(cfg.Log)
	t.faults.target = t
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.discovery = newSubsystem(t, SubsystemConfig{NQN: cfg.DiscoveryNQN, Serial: "discovery", Model: defaultModel, AllowAny: true})
	t.discovery.discovery = true
	return t, nil
}

// Discovery returns the discovery subsystem, which every host may use. Hosts with a
// [HostAuth] must authenticate.
func (t *Target) Discovery() *Subsystem { return t.discovery }

// Faults returns the faults of this target.
func (t *Target) Faults() *Faults { return &t.faults }

// Close ends all connections and waits until all goroutines of the target have ended.
func (t *Target) Close() error {
	t.cancel()
	var errs []error
	for _, p := range t.Ports() {
		errs = append(errs, p.Close())
	}
	t.disconnect(func(*queuePair) bool { return true }, "target closes")
	t.running.Wait()
	return errors.Join(errs...)
}

// AddSubsystem adds a subsystem without namespaces. It fails if the configuration is
// wrong or the NQN exists.
func (t *Target) AddSubsystem(cfg SubsystemConfig) (*Subsystem, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	t.mu.Lock()
	if t.subsystems[cfg.NQN] != nil || t.isDiscovery(cfg.NQN) {
		t.mu.Unlock()
		return nil, fmt.Errorf("add subsystem: %s exists", cfg.NQN)
	}
	s := newSubsystem(t, cfg)
	t.subsystems[cfg.NQN] = s
	t.genctr++
	t.mu.Unlock()
	t.notifyDiscovery(s.allows)
	return s, nil
}

// RemoveSubsystem removes a subsystem and ends the connections to it. Commands that
// execute continue; until they have ended, the ids of their controllers stay known,
// also to a new subsystem of the same name.
func (t *Target) RemoveSubsystem(nqn string) error {
	t.mu.Lock()
	s := t.subsystems[nqn]
	if s == nil {
		t.mu.Unlock()
		return fmt.Errorf("remove subsystem: %s does not exist", nqn)
	}
	delete(t.subsystems, nqn)
	t.genctr++
	t.mu.Unlock()
	s.DropControllers()
	t.notifyDiscovery(s.allows)
	return nil
}

// subsystem returns the subsystem with this NQN, or nil.
func (t *Target) subsystem(nqn string) *Subsystem {
	if t.isDiscovery(nqn) {
		return t.discovery
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.subsystems[nqn]
}

// isDiscovery reports whether the discovery subsystem has a name.
func (t *Target) isDiscovery(nqn string) bool {
	return nqn == nvme.DiscoveryNQN || nqn == t.cfg.DiscoveryNQN
}

// all lists all NVM subsystems.
func (t *Target) all() []*Subsystem {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Values(t.subsystems))
}

// accept serves connect requests until the listener closes.
func (p *Port) accept() {
	t := p.target
	for {
		id, err := p.listener.Accept(t.ctx)
		t.faults.awaitThaw(t.ctx)
		switch {
		case t.ctx.Err() != nil:
			if err == nil {
				_ = id.Close() // refuses the request; an error does not matter
			}
			return
		case errors.Is(err, rdma.ErrClosed):
			t.cfg.Log.Info("port is closed", "address", p.Addr().String())
			return
		case err != nil:
			t.log.Warn("connect request failed", "err", err)
			continue
		}
		t.running.Go(func() { t.serve(id, p) })
	}
}

// serve serves a connect request and the connection until it has ended.
func (t *Target) serve(id rdma.ID, p *Port) {
	log := t.log.With("host", id.RemoteAddr())
	q, err := t.open(id, p)
	if err != nil {
		log.Warn("connection refused", "err", err)
		reason := nvme.RDMARejectNoResources
		errors.As(err, &reason)
		t.mu.Lock()
		t.rejects++
		t.mu.Unlock()
		t.refused("connection: " + reason.String())
		private := nvme.RDMAReject{Status: reason}.Marshal()
		if err := id.Reject(private[:]); err != nil {
			log.Debug("reject failed", "err", err)
		}
		_ = id.Close() // no connection was established, so an error does not matter
		return
	}
	err = q.run()
	log.Debug("queue ended", "qid", q.qid, "reason", err)
	q.authEndedEarly(err)
	q.leave()
	if err := q.close(); err != nil {
		log.Warn("queue did not close cleanly", "qid", q.qid, "err", err)
	}
	t.ended(q.host, q)
}

// disconnect ends the connections of the queues that match, and returns their number.
func (t *Target) disconnect(match func(*queuePair) bool, reason string) int {
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
