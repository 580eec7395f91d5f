package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/provider"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nbd"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/ublk"
)

// Config is what to serve, and who hears of it.
type Config struct {
	Options *options.Connect // complete
	Args    []string         // flags that give Options again
	Dir     state.Dir
	Log     *slog.Logger
	// Succeeds is the name of a server that runs, whose devices this one takes
	// over once it is connected. Empty: none.
	Succeeds string
	// Reserved is called once the server has its state directory, where it may
	// keep a log. nil: nobody wants to know.
	Reserved func(*state.Entry) error
	// Ready is called once the devices are usable. An error ends the server.
	Ready func(control.Status) error
	// Hurry, when closed, shortens an end that is under way.
	Hurry <-chan struct{}
}

// Run serves until ctx is done (which is an orderly end, and no error), a
// control request ends it, or nothing is left to serve. Errors have an
// exit.Code; whatever was made until then has been undone.
func Run(ctx context.Context, cfg Config) error { return run(ctx, cfg, actual) }

// server is a running server. The goroutine of run builds it and takes it
// apart, or a control request does the latter; turn keeps them apart.
type server struct {
	cfg    Config
	opts   *options.Connect
	log    *slog.Logger
	back   backend
	remote netip.AddrPort
	entry  *state.Entry
	sock   *socket
	depth  int // of the devices

	nbd     *nbd.Server // of the front ends nbd and nbd-socket
	address net.Addr    // where that listens

	// waiting are the devices of a dead server that this one takes over. Until
	// all of them are served, nothing is ended: they wait on, for the next.
	waiting []state.Device

	recording sync.Mutex // guards what follows, and the entry's state while controllers and devices come and go
	// before are the controllers of dead servers at the target, until they have ended.
	before []uint16
	// predecessor is the server that has to leave; the entry is a copy of its
	// record until then.
	predecessor *state.Record

	cancel context.CancelCauseFunc // ends start
	turn   chan struct{}           // holds a token while nobody starts or ends
	over   bool                    // guarded by turn: everything has ended
	ended  chan struct{}           // closed when over

	mu       sync.Mutex // guards what follows
	front    front
	provider provider.Choice
	closer   io.Closer                // the provider, if it has to be closed
	packets  func() provider.Counters // nil: hardware has them
	loops    []*poller.Loop
	ctrl     controller
	info     initiator.Info // when it was last seen connected
	serving  []*serving
	changes  []change // to be carried out

	news chan struct{} // there are changes
	idle sync.Once     // of none
	none chan struct{} // closed when a device ended by itself and none is left
}

// serving is a namespace with the device that makes it visible.
type serving struct {
	namespace
	dev    device
	orphan bool // its namespace is gone; guarded by turn
}

func run(ctx context.Context, cfg Config, back backend) error {
	s := &server{
		cfg: cfg, opts: cfg.Options, log: cfg.Log, back: back,
		turn: make(chan struct{}, 1), ended: make(chan struct{}),
		news: make(chan struct{}, 1), none: make(chan struct{}),
	}
	starting, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.cancel = cancel
	starting, stop := context.WithTimeout(starting, s.opts.Timeout)
	defer stop()

	if err := s.reserve(starting); err != nil {
		return exit.From(err)
	}
	if s.predecessor == nil {
		if err := s.listen(); err != nil {
			return exit.From(errors.Join(err, s.forget()))
		}
	}
	err := s.start(starting)
	if err != nil && len(s.waiting) > 0 {
		// The end of the process gives back what was taken over already.
		return exit.From(errors.Join(err, s.sock.close()))
	}
	s.turn <- struct{}{}
	if err == nil {
		err = s.announce()
	}
	if err == nil {
		following, stop := context.WithCancel(ctx)
		var follower sync.WaitGroup
		follower.Go(func() { s.follow(following) })
		s.wait(ctx)
		stop()
		follower.Wait()
	}
	if nerr := host.Notify("STOPPING=1"); nerr != nil {
		s.log.Warn("service manager not told", "error", nerr)
	}
	if eerr := s.end(context.WithoutCancel(ctx), true, orderly); err == nil {
		err = eerr
	}
	if err := s.sock.close(); err != nil {
		s.log.Warn("close control socket", "error", err)
	}
	// What could not be ended stays on record.
	if rerr := s.forget(); rerr != nil {
		s.log.Error("remove state", "error", rerr)
	}
	if err != nil {
		return exit.From(err)
	}
	return nil
}

// reserve finds the target's address and takes a name.
func (s *server) reserve(ctx context.Context) error {
	found, err := s.opts.Resolve(ctx)
	if err != nil {
		return exit.Errorf(exit.Unreachable, "%v", err)
	}
	s.remote = s.reachable(found)
	if s.cfg.Succeeds != "" {
		err = s.succeed()
	} else {
		err = s.take(ctx)
	}
	if err != nil {
		return err
	}
	if s.cfg.Reserved != nil {
		if err := s.cfg.Reserved(s.entry); err != nil {
			return errors.Join(err, s.forget())
		}
	}
	return nil
}

// take takes a name, perhaps that of a dead server with its devices.
func (s *server) take(ctx context.Context) (err error) {
	target := state.Target{Address: s.remote, NQN: s.opts.NQN, HostNQN: s.opts.HostNQN}
	s.entry, err = s.cfg.Dir.Reserve(ctx, target, s.cfg.Args, s.opts.Duplicate, s.back.reap(s.log, Keep))
	if dup := (*state.DuplicateError)(nil); errors.As(err, &dup) {
		return exit.Errorf(exit.AlreadyServed, "already connected: %v; --duplicate-connect allows another", err)
	}
	if err != nil {
		return err
	}
	s.waiting, s.before = s.entry.Devices, s.entry.Controllers
	if len(s.waiting) > 0 {
		s.log.Info("takes over what a dead server left", "server", s.entry.Name, "devices", len(s.waiting))
	}
	return nil
}

// forget removes the record, unless something on it is still there.
func (s *server) forget() error {
	if len(s.entry.Devices) > 0 {
		return nil
	}
	return s.entry.Remove()
}

// record changes what is on record of the server. Any goroutine.
func (s *server) record(change func(*state.State)) error {
	s.recording.Lock()
	defer s.recording.Unlock()
	change(&s.entry.State)
	if s.predecessor != nil {
		return nil
	}
	return s.entry.Save()
}

// associated notes a controller that is about to get commands, for whoever takes
// over from this server. A controller that is not on record is not used.
func (s *server) associated(cntlid uint16) error {
	return s.record(func(r *state.State) { r.Controllers = append(slices.Clone(s.before), cntlid) })
}

// outlive waits for the end of what dead servers have at the target.
func (s *server) outlive(ctx context.Context) error {
	if err := s.ctrl.Outlive(ctx, s.before...); err != nil {
		return fmt.Errorf("wait for the end of the dead server's controller: %w", err)
	}
	return s.record(func(r *state.State) {
		r.Controllers, s.before = r.Controllers[len(s.before):], nil
	})
}

// socket is the control socket while it is served.
type socket struct {
	http   *http.Server
	served chan error
}

func (s *server) listen() error {
	l, err := control.Listen(s.entry.Socket())
	if err != nil {
		return err
	}
	sock := &socket{control.NewServer(s, s.log), make(chan error, 1)}
	go func(l net.Listener) { sock.served <- sock.http.Serve(l) }(l)
	s.sock = sock
	return nil
}

// close lets answers that are being written out.
func (k *socket) close() error {
	if k == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), answerTime)
	defer cancel()
	err := k.http.Shutdown(ctx)
	if serr := <-k.served; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}

// start makes everything, bottom up. What it made is in s, also when it fails.
func (s *server) start(ctx context.Context) error {
	chosen, err := s.chooseFront()
	if err != nil {
		return err
	}
	s.log.Info("front end chosen", "frontend", chosen.name, "because", chosen.reason)
	s.mu.Lock()
	s.front = chosen
	s.mu.Unlock()
	cfg, err := s.initiatorConfig()
	if err != nil {
		return err
	}
	s.log.Info("connecting", "nqn", s.opts.NQN, "address", s.remote.String(), "provider", s.provider.Name, "because", s.provider.Reason)
	ctrl, found, err := s.back.connect(ctx, cfg, s.changed)
	if err != nil {
		return s.explain(ctx, err)
	}
	info := ctrl.Info()
	s.mu.Lock()
	s.ctrl, s.info = ctrl, info
	s.mu.Unlock()
	s.depth = info.QueueSize
	s.log.Info("connected", "controller", info.CNTLID, "queues", info.Plan.String())
	if s.predecessor != nil {
		if err := s.relieve(ctx); err != nil {
			return err
		}
	}
	if len(s.waiting) > 0 {
		if err := s.outlive(ctx); err != nil {
			return err
		}
		return s.recoverDevices(ctx, found)
	}
	if found, err = s.choose(found); err != nil {
		return err
	}
	return s.startDevices(ctx, found)
}

func (s *server) initiatorConfig() (initiator.Config, error) {
	rdmaProvider, err := s.chooseProvider()
	if err != nil {
		return initiator.Config{}, err
	}
	queues := s.opts.Queues.Clip(runtime.NumCPU())
	if err := s.back.prepare(queues.Loops()); err != nil {
		s.log.Warn("process is not as protected as it should be", "error", err)
	}
	if !host.IsIOFlusher() {
		s.log.Warn("not marked as I/O flusher: swapping to this device may deadlock")
	}
	var loops []*poller.Loop
	for i := range queues.Loops() {
		l, err := s.back.loop(poller.Config{Name: fmt.Sprintf("nvmeof-loop-%d", i)})
		if err != nil {
			return initiator.Config{}, err
		}
		loops = append(loops, l)
		s.mu.Lock()
		s.loops = loops
		s.mu.Unlock()
	}
	cfg := initiator.Config{
		Provider: rdmaProvider, Address: s.remote, Source: s.opts.SourceAddr,
		SubNQN: s.opts.NQN, HostNQN: s.opts.HostNQN, HostID: s.opts.HostID,
		Queues: queues, Loops: loops, QueueSize: s.opts.QueueSize,
		KeepAlive: s.opts.KeepAlive, TOS: s.opts.TOS, DisableSQFlow: s.opts.DisableSQFlow, PollMaxBytes: s.opts.PollMax,
		ReconnectDelay: s.opts.Reconnect, CtrlLoss: cmp.Or(s.opts.Loss, time.Nanosecond),
		Associated: s.associated, Log: s.log,
	}
	if s.opts.Named() {
		cfg.Resolve = s.opts.Resolve
	}
	if s.opts.FastIOFail != options.Off {
		cfg.FastIOFail = max(s.opts.FastIOFail, time.Nanosecond) // 0 is off there, and at once here
	}
	return cfg, nil
}

// explain says in words why the target could not be connected to.
func (s *server) explain(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.DeadlineExceeded) {
		return cause // told to end
	}
	if exit.Of(err) == exit.NoRDMA {
		return s.noRDMA(err)
	}
	return exit.Connecting(s.opts.Peer(), s.opts.NQN, s.opts.HostNQN, err)
}

// choose takes the namespaces that are wanted.
func (s *server) choose(found []namespace) ([]namespace, error) {
	if len(s.opts.NSIDs) == 0 {
		if len(found) == 0 {
			return nil, exit.Errorf(exit.NotFound, "subsystem %s has no namespace that can be used", s.opts.NQN)
		}
		return found, nil
	}
	var chosen []namespace
	for _, id := range s.opts.NSIDs {
		i := slices.IndexFunc(found, func(n namespace) bool { return n.nsid == id })
		if i < 0 {
			return nil, exit.Errorf(exit.NotFound, "--namespace \"%d\": subsystem %s has %s", id, s.opts.NQN, nsids(found))
		}
		chosen = append(chosen, found[i])
	}
	return chosen, nil
}

func nsids(found []namespace) string {
	if len(found) == 0 {
		return "no namespace that can be used"
	}
	var ids []string
	for _, n := range found {
		ids = append(ids, fmt.Sprint(n.nsid))
	}
	return "only " + strings.Join(ids, ", ")
}

// startDevices makes one device per namespace, all on the same loops. Each is
// on record before the next one is made.
func (s *server) startDevices(ctx context.Context, chosen []namespace) error {
	for i, ns := range chosen {
		id := s.opts.Device
		if id != options.AutoDevice {
			id += i
		}
		if err := s.startDevice(ctx, ns, id, i > 0); err != nil {
			return err
		}
	}
	return s.record(func(r *state.State) { r.Phase = state.Live })
}

// startDevice makes the device of a namespace. later says that the loops have
// served another one.
func (s *server) startDevice(ctx context.Context, ns namespace, id int, later bool) error {
	d, err := s.makeDevice(ctx, ns, id, later)
	if err != nil {
		return fmt.Errorf("namespace %d: %w", ns.nsid, err)
	}
	s.serve(ns, d)
	added := recordOf(ns, d)
	return s.record(func(r *state.State) { r.Devices = append(r.Devices, added) })
}

// recordOf is what is on record of a device.
func recordOf(ns namespace, d device) state.Device {
	r := d.Record()
	r.NSID, r.UUID = ns.nsid, ns.uuid
	return r
}

var policies = map[string]ublk.RecoveryPolicy{
	options.Requeue: ublk.RecoveryRequeue, options.Fail: ublk.RecoveryFail, options.Remove: ublk.RecoveryNone,
}

// recoverDevices serves the devices of a dead server on. Those that went away
// with it are off the record.
func (s *server) recoverDevices(ctx context.Context, found []namespace) error {
	var there []state.Device
	for i, w := range s.waiting {
		gone, err := s.back.gone(ctx, w, Keep)
		if err != nil {
			return err
		}
		if gone {
			s.log.Warn("device is gone", "device", w.Path(), "nsid", w.NSID)
			continue
		}
		k := slices.IndexFunc(found, func(n namespace) bool { return n.nsid == w.NSID })
		if k < 0 {
			return exit.Errorf(exit.NotFound, "%s: subsystem %s has %s, not namespace %d", w.Path(), s.opts.NQN, nsids(found), w.NSID)
		}
		if w.UUID != "" && w.UUID != found[k].uuid {
			return errReplaced(w, found[k].uuid)
		}
		info, err := s.back.get(ctx, w.ID)
		if err != nil {
			return err
		}
		d, err := s.back.recover(ctx, info, ublk.Config{Device: found[k].device, Loops: s.loops, KeepAffinity: i > 0, Log: s.log})
		if err != nil {
			return fmt.Errorf("namespace %d: %w", w.NSID, err)
		}
		s.serve(found[k], d)
		there = append(there, w)
	}
	s.waiting = nil
	return s.record(func(r *state.State) { r.Devices, r.Phase = there, state.Live })
}

func (s *server) serve(ns namespace, d device) {
	v := &serving{namespace: ns, dev: d}
	s.mu.Lock()
	s.serving = append(s.serving, v)
	s.mu.Unlock()
	go s.mind(v)
}

// announce tells everybody that the devices are usable.
func (s *server) announce() error {
	if err := host.Notify("READY=1", "STATUS=serving "+s.opts.NQN); err != nil {
		s.log.Warn("service manager not told", "error", err)
	}
	if s.cfg.Ready == nil {
		return nil
	}
	if err := s.cfg.Ready(s.Status()); err != nil {
		return fmt.Errorf("report that the devices are usable: %w", err)
	}
	return nil
}

// wait returns when something ends the server.
func (s *server) wait(ctx context.Context) {
	lost := s.ctrl.Done()
	for {
		select {
		case <-ctx.Done():
			s.log.Info("told to end")
		case <-s.ended:
		case <-s.none:
			s.log.Info("no device is left")
		case <-lost:
			// The devices stay, their I/O fails, and the status says why.
			s.log.Error("controller is lost; I/O fails until the devices are disconnected", "reason", s.ctrl.Err())
			lost = nil
			continue
		}
		return
	}
}

func (s *server) devices() []*serving {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.serving)
}
