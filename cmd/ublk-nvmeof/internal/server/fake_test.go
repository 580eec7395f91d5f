package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ublk-nvmeof/block"
	"ublk-nvmeof/block/null"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nbd"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/provider"
	"ublk-nvmeof/ublk"
)

// world is a machine with a driver and a target that do as they are told, and
// note in what order they are told what.
type world struct {
	mu     sync.Mutex // guards what follows
	events []string

	missing      []string              // modules
	kernel       []host.NVMeController // of the kernel's initiator
	leftOut      map[uint32]string     // why namespaces cannot be used
	memory       int64                 // bytes of I/O buffers at most; 0: enough
	loadErr      error
	ublkErr      error
	nbdErr       error
	keepAlive    time.Duration // of controllers that were waited for
	outliveLimit time.Duration // time limit of that wait
	nbdLeft      bool          // a device of a dead server is connected
	rdmaErr      error         // of verbs
	provider     []string      // those that were tried
	route        provider.Route
	routeErr     error
	pathErr      error // of adding a path
	connectErr   error
	queryErr     error // of queries, resets and rescans
	nsids        []uint32
	change       func(*namespace) // what the target's namespaces are, if not the usual
	startErr     map[uint32]error // by namespace id
	busy         map[int]bool     // by device id
	stuck        map[int]bool     // Stop does not return until Abort
	wedged       map[int]bool     // nor after it
	left         map[int]ublk.Info
	sub          *fakeSubsystem
	devices      map[int]*fakeDevice
	connected    initiator.Config
	changed      func(namespace, initiator.Change)
	started      []ublk.Config
	stopping     func() bool   // the machine is being shut down; nil: it is not
	connecting   chan struct{} // closed when connect is called; it then waits for its context
}

func newWorld() *world {
	return &world{
		route:  provider.Route{Netdev: "lo", RDMA: "rxe0"},
		nbdErr: nbd.ErrNoDriver, nsids: []uint32{1}, startErr: map[uint32]error{}, busy: map[int]bool{}, stuck: map[int]bool{}, wedged: map[int]bool{},
		left: map[int]ublk.Info{}, devices: map[int]*fakeDevice{},
	}
}

func (w *world) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events = append(w.events, fmt.Sprintf(format, args...))
}

func (w *world) setBusy(id int, busy bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.busy[id] = busy
}

// failQueries makes queries, resets and rescans fail.
func (w *world) failQueries(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.queryErr = err
}

func (w *world) queriesFail() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.queryErr
}

func (w *world) happened() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.events)
}

func (w *world) backend() backend {
	return backend{
		load: func(m host.Module) error {
			if slices.Contains(w.missing, m.Name) {
				w.note("load %s", m.Name)
				return w.loadErr
			}
			return nil
		},
		available:    func() error { return w.ublkErr },
		nbd:          func() error { return w.nbdErr },
		nbdConnected: func(int, uint64) (bool, error) { return w.nbdLeft, nil },
		route:        func(netip.AddrPort, netip.Addr) (provider.Route, error) { return w.route, w.routeErr },
		provider: func(name string) (rdma.Provider, error) {
			w.provider = append(w.provider, name)
			if name == options.RoCE {
				return &fakeRoCE{fakeProvider{name}, w}, nil
			}
			return fakeProvider{name}, w.rdmaErr
		},
		kernelHas: func(_ context.Context, c host.NVMeController) bool { return slices.Contains(w.kernel, c) },
		prepare:   func(int) error { return errors.New("not as root") },
		loop: func(cfg poller.Config) (*poller.Loop, error) {
			w.note("loop")
			return poller.New(cfg)
		},
		connect: w.connect,
		start:   w.start,
		get: func(_ context.Context, id int) (ublk.Info, error) {
			if i, ok := w.left[id]; ok {
				return i, nil
			}
			return ublk.Info{}, ublk.ErrNoDevice
		},
		uevent:   func(string) error { return nil },
		stopping: func(context.Context) (bool, error) { return w.stopping != nil && w.stopping(), nil },
		remove: func(_ context.Context, i ublk.Info) error {
			w.note("remove %d", i.ID)
			delete(w.left, i.ID)
			return nil
		},
		recover: w.recover,
		abandon: func(_ context.Context, i ublk.Info, force bool) error {
			w.note("abandon %d, force %t", i.ID, force)
			if w.busy[i.ID] && !force {
				return ublk.ErrBusy
			}
			delete(w.left, i.ID)
			return nil
		},
	}
}

func (w *world) recover(_ context.Context, i ublk.Info, cfg ublk.Config) (device, error) {
	if err := w.startErr[cfg.Device.(disk).nsid]; err != nil {
		return nil, err
	}
	w.note("recover ublkb%d", i.ID)
	cfg.Depth, cfg.MaxIO = i.Depth, i.MaxIO
	d := &fakeDevice{world: w, id: i.ID, cfg: cfg, done: make(chan struct{})}
	w.devices[i.ID] = d
	return d, nil
}

type fakeProvider struct{ name string }

func (p fakeProvider) Name() string { return p.name }
func (fakeProvider) Resolve(context.Context, netip.Addr, netip.AddrPort, int) (rdma.ID, error) {
	return nil, rdma.ErrUnsupported
}
func (fakeProvider) Listen(netip.AddrPort, int) (rdma.Listener, error) {
	return nil, rdma.ErrUnsupported
}

// fakeRoCE has to be closed.
type fakeRoCE struct {
	fakeProvider
	world *world
}

func (p *fakeRoCE) Close() error {
	p.world.note("close provider")
	return nil
}

func (w *world) connect(ctx context.Context, cfg initiator.Config, changed func(namespace, initiator.Change)) (subsystem, []namespace, error) {
	w.note("connect")
	w.connected, w.changed = cfg, changed
	if w.connecting != nil {
		close(w.connecting)
		<-ctx.Done()
		return nil, nil, &initiator.StepError{Step: "connect admin queue", Err: ctx.Err()}
	}
	if w.connectErr != nil {
		return nil, nil, w.connectErr
	}
	if err := cfg.Associated([]initiator.ControllerID{{CNTLID: 5}}); err != nil {
		return nil, nil, err
	}
	w.sub = &fakeSubsystem{world: w, plan: poller.Split(cfg.Queues, cfg.Queues.Total()-1), done: make(chan struct{}), aborted: make(chan struct{})}
	var found []namespace
	for _, id := range w.nsids {
		found = append(found, w.namespace(id))
	}
	return w.sub, found, nil
}

// namespace is what the target has behind a namespace id.
func (w *world) namespace(id uint32) namespace {
	ns := namespace{nsid: id, uuid: fmt.Sprintf("uuid-%d", id), device: disk{nsid: id}, timed: disk{nsid: id}}
	if w.change != nil {
		w.change(&ns)
	}
	return ns
}

// described is a device of a namespace, as it is on record.
func (w *world) described(id uint32, d state.Device) state.Device {
	r := describeRecord(w.namespace(id), d)
	r.Model = "M"
	return r
}

type disk struct {
	nsid  uint32
	block uint32 // 0: 512
	dry   bool   // without a volatile cache
}

// someBuckets are of a histogram.
var someBuckets = [22]uint64{1, 21: 3}

// Durations implements timed.
func (d disk) Durations() (all initiator.OpHistograms) {
	all[block.OpRead] = initiator.Histogram{Buckets: someBuckets, Sum: 2 * time.Second}
	return all
}

// Present implements timed.
func (d disk) Present() bool { return true }

func (d disk) Wait() (initiator.Wait, bool) { return initiator.Wait{}, false }

func (d disk) Geometry() block.Geometry {
	size := max(512, d.block)
	return block.Geometry{Sectors: 2048 * uint64(d.nsid), LogicalBlock: size, PhysicalBlock: size, MaxIO: 1 << 20, VolatileCache: !d.dry}
}
func (d disk) OpenQueue(i int, cfg block.QueueConfig) (block.Queue, error) {
	n, err := null.New(null.Config{Geometry: d.Geometry()})
	if err != nil {
		return nil, err
	}
	return n.OpenQueue(i, cfg)
}

type fakeSubsystem struct {
	world   *world
	plan    poller.Plan
	mu      sync.Mutex // guards reason
	reason  error
	done    chan struct{}
	aborted chan struct{}
	once    sync.Once
	hang    bool                      // in Close
	keys    *initiator.Credentials    // of the last Reauthenticate
	reauth  error                     // its error
	lost    atomic.Pointer[time.Time] // when the target was lost; nil: it is there
}

func (c *fakeSubsystem) Info() initiator.Info {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := initiator.PathInfo{State: initiator.StateLive, Device: "rxe0", Provider: "verbs", Configured: c.world.connected.Address, Access: map[uint32]nvme.ANAState{1: nvme.ANAOptimized, 7: 0}}
	i := initiator.Info{State: initiator.StateLive, Lanes: []initiator.LaneStats{{Submitted: 3, Completed: 2, Held: 1}}}
	i.Outages = initiator.Outages{Time: 1500 * time.Millisecond, Losses: map[initiator.LossReason]int{initiator.LossKeepAlive: 2}, Attempts: 3, Made: 2}
	i.Oldest, i.LeftOut = 4*time.Second, c.world.leftOut
	i.Stages[initiator.StageWire][block.OpWriteZeroes] = initiator.Histogram{Buckets: someBuckets, Sum: time.Second}
	i.Memory = initiator.MemoryInfo{Limit: cmp.Or(c.world.memory, 1<<30)}
	if c.reason != nil {
		i.State, p.State, p.Reason = initiator.StateDead, initiator.StateDead, c.reason
		i.Paths = []initiator.PathInfo{p}
		return i
	}
	if t := c.lost.Load(); t != nil {
		i.State, i.Since = initiator.StateConnecting, *t
		p.State, p.Since = i.State, *t
	}
	p.CNTLID, p.Version, p.Model, p.QueueSize, p.Plan, p.InCapsule, p.SQFlow = 5, 0x20100, "M", 64, c.plan, 4096, true
	i.Paths = []initiator.PathInfo{p}
	return i
}

func (c *fakeSubsystem) Done() <-chan struct{} { return c.done }

func (c *fakeSubsystem) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reason
}

func (c *fakeSubsystem) lose(err error) {
	c.mu.Lock()
	c.reason = err
	c.mu.Unlock()
	close(c.done)
}

func (c *fakeSubsystem) Outlive(ctx context.Context, keepAlive time.Duration, ids ...initiator.ControllerID) error {
	var cntlids []uint16
	for _, id := range ids {
		cntlids = append(cntlids, id.CNTLID)
	}
	c.world.note("outlive %v", cntlids)
	c.world.keepAlive = keepAlive
	if deadline, ok := ctx.Deadline(); ok {
		c.world.outliveLimit = time.Until(deadline)
	}
	return nil
}

func (c *fakeSubsystem) QueryOver(_ context.Context, _ *initiator.Controller, cmd *nvme.Command, out []byte) (uint64, error) {
	if err := c.world.queriesFail(); err != nil {
		return 0, err
	}
	for i := range out {
		out[i] = byte(cmd.Opcode())
	}
	return uint64(cmd.CDW10()), nil
}

func (c *fakeSubsystem) Reset(context.Context) error {
	c.world.note("reset")
	return c.world.queriesFail()
}

func (c *fakeSubsystem) Reauthenticate(_ context.Context, keys *initiator.Credentials) error {
	c.keys = keys
	return c.reauth
}

// AddPath implements subsystem. A fake path has an address and nothing else.
func (c *fakeSubsystem) AddPath(_ context.Context, p initiator.Path) (*initiator.Controller, error) {
	c.world.note("add path %v", p.Address)
	return nil, c.world.pathErr
}

func (c *fakeSubsystem) KeepPath(p initiator.Path) (*initiator.Controller, error) {
	c.world.note("keep path %v", p.Address)
	return nil, nil
}

func (c *fakeSubsystem) RemovePath(context.Context, *initiator.Controller) error { return nil }

func (c *fakeSubsystem) Paths() []*initiator.Controller { return nil }

func (c *fakeSubsystem) SetPolicy(p initiator.Policy, _ *initiator.Controller) error {
	c.world.note("policy %v", p)
	return nil
}

func (c *fakeSubsystem) Rescan() error {
	c.world.note("rescan")
	return c.world.queriesFail()
}

func (c *fakeSubsystem) OutliveTime(keepAlive time.Duration, n int) time.Duration {
	return time.Duration(3*n) * keepAlive
}

func (c *fakeSubsystem) Abort(reason error) {
	c.world.note("abort")
	c.once.Do(func() { close(c.aborted) })
}

func (c *fakeSubsystem) Close(ctx context.Context) error {
	c.world.note("close controller")
	if c.hang {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

// failStart makes the devices of a namespace fail to start; nil: not any more.
func (w *world) failStart(nsid uint32, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.startErr[nsid] = err
}

func (w *world) start(_ context.Context, cfg ublk.Config) (device, error) {
	nsid := cfg.Device.(disk).nsid
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.startErr[nsid]; err != nil {
		return nil, err
	}
	id := cfg.ID
	if id < 0 {
		id = len(w.started)
	}
	if w.devices[id] != nil {
		return nil, ublk.ErrIDTaken
	}
	w.started = append(w.started, cfg)
	w.events = append(w.events, fmt.Sprintf("start ublkb%d", id))
	d := &fakeDevice{world: w, id: id, cfg: cfg, done: make(chan struct{})}
	w.devices[id] = d
	return d, nil
}

type fakeDevice struct {
	world *world
	id    int
	cfg   ublk.Config
	once  sync.Once
	done  chan struct{}
	err   error
}

func (d *fakeDevice) Record() state.Device {
	return state.Device{ID: d.id, Cookie: uint64(1000 + d.id)}
}

func (d *fakeDevice) Queues() queueInfo {
	return queueInfo{Queues: len(d.cfg.Loops), Depth: d.cfg.Depth, MaxIO: d.cfg.MaxIO}
}

func (d *fakeDevice) Resize(_ context.Context, sectors uint64) error {
	d.world.note("resize ublkb%d to %d", d.id, sectors)
	return nil
}

func (d *fakeDevice) SetReadOnly(ro bool) error {
	d.world.note("ublkb%d read-only %t", d.id, ro)
	return nil
}

func (d *fakeDevice) HandOver(context.Context, string) error {
	d.world.note("hand ublkb%d over", d.id)
	return nil
}

func (d *fakeDevice) Accept() {}

func (d *fakeDevice) InUse() error {
	d.world.mu.Lock()
	defer d.world.mu.Unlock()
	if d.world.busy[d.id] {
		return fmt.Errorf("look for users of ublkb%d: %w", d.id, ublk.ErrBusy)
	}
	return nil
}

func (d *fakeDevice) Stop(ctx context.Context, force bool) error {
	if !force {
		if err := d.InUse(); err != nil {
			return err
		}
	}
	if d.world.stuck[d.id] {
		var aborted <-chan struct{}
		if !d.world.wedged[d.id] {
			aborted = d.world.sub.aborted
		}
		select {
		case <-aborted:
		case <-ctx.Done():
			return fmt.Errorf("stop ublkb%d: %w", d.id, context.Cause(ctx))
		}
	}
	d.end(nil)
	return nil
}

func (d *fakeDevice) end(err error) {
	d.once.Do(func() {
		d.world.note("stop ublkb%d", d.id)
		d.err = err
		close(d.done)
	})
}

func (d *fakeDevice) Done() <-chan struct{} { return d.done }

func (d *fakeDevice) Err() error { return d.err }

func (d *fakeDevice) Snapshot() block.Stats { return block.Stats{Reads: 3, ReadBytes: 12288} }

// leaves checks what is left in the run directory, beside the lock.
func leaves(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if e.Name() != ".lock" {
			names = append(names, e.Name())
		}
	}
	if !slices.Equal(names, want) {
		t.Errorf("the run directory has %s, want %q", strings.Join(names, " "), want)
	}
}
