package targetserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/provider"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/target"
)

// Config is what to serve, and who hears of it.
type Config struct {
	Options *options.Target
	RunDir  string
	Log     *slog.Logger
	// Reserved is called with the directory of the target, where it may keep a
	// log. nil: nobody wants to know.
	Reserved func(dir string) error
	// Ready is called once hosts may connect. An error ends the target.
	Ready func(Status) error

	open func(name string, addr netip.Addr) (rdma.Provider, error)
}

// server is a running target.
type server struct {
	cfg    Config
	opts   *options.Target
	log    *slog.Logger
	choice provider.Choice
	place  *place
	target *target.Target
	stop   chan struct{} // closed when a request ends the target
	once   sync.Once

	mu         sync.Mutex // guards what follows
	subsystems []*subsystem
	faults     []*fault
	lastFault  int
	standing   Faults // without Commands
	stores     []io.Closer
}

type subsystem struct {
	*target.Subsystem
	cfg        options.Subsystem
	ana        map[string]string
	namespaces []*namespace
}

type namespace struct {
	*target.Namespace
	spec  options.Namespace
	store target.Store
}

type fault struct {
	Fault
	remove func()
}

// Run serves until ctx is done, which is an orderly end, and no error, or a
// request ends it. Errors have an exit.Code.
func Run(ctx context.Context, cfg Config) error {
	if cfg.open == nil {
		cfg.open = provider.ForTarget
	}
	s := &server{cfg: cfg, opts: cfg.Options, log: cfg.Log, stop: make(chan struct{})}
	if err := s.run(ctx); err != nil {
		return exit.From(err)
	}
	return nil
}

// run makes everything, waits, and undoes it in the reverse order.
func (s *server) run(ctx context.Context) (err error) {
	undo := func(what string, fn func() error) {
		if uerr := fn(); uerr != nil {
			s.log.Error("end", "of", what, "error", uerr)
			err = errors.Join(err, fmt.Errorf("%s: %w", what, uerr))
		}
	}
	if s.place, err = takePlace(s.cfg.RunDir); err != nil {
		return err
	}
	defer undo("remove directory", s.place.leave)
	if s.cfg.Reserved != nil {
		if err := s.cfg.Reserved(s.place.dir); err != nil {
			return err
		}
	}

	p, err := s.provider()
	if err != nil {
		return err
	}
	if c, ok := p.(io.Closer); ok {
		defer undo("close provider", c.Close)
	}
	s.target, err = target.New(target.Config{
		Provider: p, AddrPort: s.opts.Address, Log: s.log,
		InCapsule: s.opts.InCapsule, QueueSize: s.opts.QueueSize, MaxTransfer: s.opts.MaxIO,
	})
	if err != nil {
		return err
	}
	defer undo("close stores", s.closeStores)
	defer undo("close target", s.target.Close)
	for _, c := range s.opts.Subsystems {
		if err := s.addSubsystem(c); err != nil {
			return err
		}
	}
	for _, f := range s.opts.Faults {
		if _, err := s.addFault(FaultRequest{f}); err != nil {
			return err
		}
	}
	l, err := control.Listen(s.place.socket())
	if err != nil {
		return err
	}
	web := &http.Server{Handler: s.mux(), ReadHeaderTimeout: 5 * time.Second, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelWarn)}
	served := make(chan error, 1)
	go func() { served <- web.Serve(l) }()
	defer undo("close control socket", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		err := web.Shutdown(ctx)
		if serr := <-served; !errors.Is(serr, http.ErrServerClosed) {
			err = errors.Join(err, serr)
		}
		return err
	})
	if err := host.Notify("READY=1"); err != nil {
		s.log.Warn("service manager not told", "error", err)
	}
	if s.cfg.Ready != nil {
		if err := s.cfg.Ready(s.status()); err != nil {
			return fmt.Errorf("report that hosts may connect: %w", err)
		}
	}
	s.log.Info("target listens", "address", s.target.Addr().String(), "provider", s.choice.Name, "because", s.choice.Reason)
	select {
	case <-ctx.Done():
	case <-s.stop:
	}
	s.log.Info("target ends")
	if err := host.Notify("STOPPING=1"); err != nil {
		s.log.Warn("service manager not told", "error", err)
	}
	return nil
}

// provider opens what --provider means for the address to listen on.
func (s *server) provider() (rdma.Provider, error) {
	addr := s.opts.Address.Addr()
	route, err := host.RouteTo(s.opts.Address, netip.Addr{})
	s.choice = provider.Choose(s.opts.Provider, addr, route, err)
	p, err := s.cfg.open(s.choice.Name, addr)
	if err == nil || s.choice.Name != options.Verbs || exit.Of(err) == exit.Permission {
		return p, err
	}
	return nil, exit.Errorf(exit.NoRDMA, "no RDMA device can be used (%v); --provider %s needs none", err, options.RoCE)
}

func (s *server) closeStores() error {
	var errs []error
	for _, c := range s.stores {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

func (s *server) addSubsystem(c options.Subsystem) error {
	t, err := s.target.AddSubsystem(target.SubsystemConfig{
		NQN: c.NQN, MaxQueues: c.MaxQueues, AllowAny: len(c.AllowHosts) == 0, AllowHosts: c.AllowHosts,
	})
	if err != nil {
		return err
	}
	if c.MaxQueues == 0 {
		c.MaxQueues = target.DefaultMaxQueues
	}
	sub := &subsystem{Subsystem: t, cfg: c, ana: map[string]string{}}
	s.subsystems = append(s.subsystems, sub)
	for _, n := range c.Namespaces {
		if _, err := s.addNamespace(sub, n); err != nil {
			return err
		}
	}
	return nil
}

// addNamespace opens a store and adds it. The lock is held, or nobody else is
// there yet.
func (s *server) addNamespace(sub *subsystem, spec options.Namespace) (*namespace, error) {
	n := &namespace{spec: spec}
	var closer io.Closer
	if spec.File == "" {
		n.store = target.NewRAM(spec.RAM)
	} else {
		info, err := os.Stat(spec.File)
		if err != nil {
			return nil, exit.Errorf(exit.NotFound, "open store: %v", err)
		}
		if isDevice := info.Mode()&fs.ModeType == fs.ModeDevice; isDevice != spec.Device {
			return nil, exit.Errorf(exit.Usage, "%s: is a block device: %t", spec.File, isDevice)
		}
		f, err := target.OpenFile(spec.File, spec.ReadOnly)
		if err != nil {
			return nil, err
		}
		n.store, closer = f, f
	}
	store := n.store
	if spec.Cache != 0 {
		c := target.NewCache(store, spec.Cache)
		store, closer = c, c // which closes what is under it
	}
	var err error
	n.Namespace, err = sub.AddNamespace(target.NamespaceConfig{
		NSID: spec.NSID, Store: store, BlockSize: spec.BlockSize, UUID: spec.UUID, ReadOnly: spec.ReadOnly, ANAGroup: spec.ANAGroup,
	})
	if err != nil {
		if closer != nil {
			err = errors.Join(err, closer.Close())
		}
		return nil, err
	}
	if closer != nil {
		s.stores = append(s.stores, closer)
	}
	sub.namespaces = append(sub.namespaces, n)
	return n, nil
}

// maxBody bounds a request.
const maxBody = 64 << 10

// handle makes a handler of a function that carries out a request.
func handle[T any](mux *http.ServeMux, s *server, do func(T) (Done, error)) {
	var zero T
	mux.HandleFunc("POST "+path(zero), func(w http.ResponseWriter, r *http.Request) {
		var request T
		var done Done
		decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
		decoder.DisallowUnknownFields()
		err := decoder.Decode(&request)
		if err != nil {
			err = exit.Errorf(exit.Usage, "%v", err)
		} else {
			s.mu.Lock()
			done, err = do(request)
			s.mu.Unlock()
		}
		if e := exit.From(err); e != nil {
			control.Answer(w, http.StatusBadRequest, e)
			return
		}
		s.log.Info("request", "path", r.URL.Path, "request", fmt.Sprintf("%+v", request))
		control.Answer(w, http.StatusOK, done)
	})
}

func (s *server) mux() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { control.Answer(w, http.StatusOK, s.status()) })
	handle(mux, s, s.grant)
	handle(mux, s, s.drop)
	handle(mux, s, s.stall)
	handle(mux, s, s.addFault)
	handle(mux, s, s.unfault)
	handle(mux, s, s.reject)
	handle(mux, s, s.refuse)
	handle(mux, s, s.ana)
	handle(mux, s, s.add)
	handle(mux, s, s.remove)
	handle(mux, s, s.resize)
	handle(mux, s, s.readOnly)
	handle(mux, s, func(StopRequest) (Done, error) {
		s.once.Do(func() { close(s.stop) })
		return Done{}, nil
	})
	return mux
}

// Requests. The lock is held in all of them.

// named are the subsystems that a request means.
func (s *server) named(nqn string) ([]*subsystem, error) {
	if nqn == "" {
		return s.subsystems, nil
	}
	i := slices.IndexFunc(s.subsystems, func(sub *subsystem) bool { return sub.cfg.NQN == nqn })
	if i < 0 {
		return nil, exit.Errorf(exit.NotFound, "no subsystem %s", nqn)
	}
	return s.subsystems[i : i+1], nil
}

// one is the subsystem that a request means.
func (s *server) one(nqn string) (*subsystem, error) {
	found, err := s.named(nqn)
	if err == nil && len(found) != 1 {
		err = exit.Errorf(exit.Usage, "there are %d subsystems; want --nqn", len(found))
	}
	if err != nil {
		return nil, err
	}
	return found[0], nil
}

// namespace is the namespace that a request means.
func (s *server) namespace(nqn string, nsid uint32) (*subsystem, *namespace, error) {
	sub, err := s.one(nqn)
	if err != nil {
		return nil, nil, err
	}
	for _, n := range sub.namespaces {
		if n.NSID() == nsid {
			return sub, n, nil
		}
	}
	return nil, nil, exit.Errorf(exit.NotFound, "subsystem %s has no namespace %d", sub.cfg.NQN, nsid)
}

func (s *server) grant(r GrantRequest) (Done, error) {
	if r.Exactly {
		if r.Limit < 0 || r.Limit > nvme.MaxQueues {
			return Done{}, exit.Errorf(exit.Usage, "%d queues; want 0 to %d", r.Limit, nvme.MaxQueues)
		}
		s.standing.Grant = strconv.Itoa(r.Limit)
		if r.Limit == 0 {
			s.standing.Grant = "none"
			r.Limit = -1
		}
		s.target.Faults().Grant(r.Limit)
		return Done{}, nil
	}
	found, err := s.named(r.NQN)
	if err != nil {
		return Done{}, err
	}
	for _, sub := range found {
		if err := sub.SetMaxQueues(r.Limit); err != nil {
			return Done{}, exit.Errorf(exit.Usage, "%v", err)
		}
		sub.cfg.MaxQueues = r.Limit
	}
	s.target.Faults().Grant(0)
	s.standing.Grant = ""
	return Done{}, nil
}

func (s *server) drop(r DropRequest) (Done, error) {
	if r.NQN == "" {
		s.target.Faults().Disconnect(r.QID)
		return Done{}, nil
	}
	sub, err := s.one(r.NQN)
	switch {
	case err != nil:
		return Done{}, err
	case r.QID >= 0:
		return Done{}, exit.Errorf(exit.Usage, "a queue of one subsystem cannot be dropped; want --nqn or --qid")
	}
	sub.DropControllers()
	return Done{}, nil
}

func (s *server) stall(r StallRequest) (Done, error) {
	s.target.Faults().Stall(r.On)
	s.standing.Stalled = r.On
	return Done{}, nil
}

func (s *server) addFault(r FaultRequest) (Done, error) {
	f, err := options.ParseFault(r.Fault)
	if err != nil {
		return Done{}, exit.Errorf(exit.Usage, "fault %q: %v; want %s", r.Fault, err, options.FaultWords)
	}
	s.lastFault++
	s.faults = append(s.faults, &fault{Fault{s.lastFault, r.Fault}, s.target.Faults().Add(f)})
	return Done{ID: s.lastFault}, nil
}

func (s *server) unfault(r UnfaultRequest) (Done, error) {
	if r.ID == 0 {
		s.target.Faults().Clear()
		s.faults, s.standing = nil, Faults{}
		return Done{}, nil
	}
	i := slices.IndexFunc(s.faults, func(f *fault) bool { return f.ID == r.ID })
	if i < 0 {
		return Done{}, exit.Errorf(exit.NotFound, "no fault %d", r.ID)
	}
	s.faults[i].remove()
	s.faults = slices.Delete(s.faults, i, i+1)
	return Done{}, nil
}

func (s *server) reject(r RejectRequest) (Done, error) {
	reason := nvme.RDMARejectStatus(r.Status)
	if r.Status < 0 || reason > nvme.RDMARejectInvalidCNTLID {
		return Done{}, exit.Errorf(exit.Usage, "reject status %d; want 1 to %d, or 0 for none", r.Status, nvme.RDMARejectInvalidCNTLID)
	}
	s.target.Faults().RejectConnects(reason)
	s.standing.Reject = ""
	if reason != 0 {
		s.standing.Reject = reason.String()
	}
	return Done{}, nil
}

func (s *server) refuse(r RefuseRequest) (Done, error) {
	status := nvme.Status(r.Status)
	if r.Status < 0 || status.Code()|nvme.StatusDNR|status != nvme.StatusDNR|status.Code() {
		return Done{}, exit.Errorf(exit.Usage, "status %#x; want a status code type and code, and 0x4000 for dnr", r.Status)
	}
	s.target.Faults().FailConnects(status)
	s.standing.Refuse = ""
	if !status.OK() {
		s.standing.Refuse = status.FabricsString()
	}
	return Done{}, nil
}

func (s *server) ana(r ANARequest) (Done, error) {
	state, err := options.ParseANAState(r.State)
	if err != nil {
		return Done{}, exit.Errorf(exit.Usage, "%v", err)
	}
	found, err := s.named(r.NQN)
	if err != nil {
		return Done{}, err
	}
	for _, sub := range found {
		if err := sub.SetANAState(r.Group, state); err != nil {
			return Done{}, exit.Errorf(exit.Usage, "%v", err)
		}
		sub.ana[strconv.Itoa(int(r.Group))] = r.State
	}
	return Done{}, nil
}

func (s *server) add(r AddRequest) (Done, error) {
	spec, err := options.ParseNamespace(r.Namespace)
	if err != nil {
		return Done{}, exit.Errorf(exit.Usage, "namespace %q: %v; want %s", r.Namespace, err, options.NamespaceWords)
	}
	sub, err := s.one(r.NQN)
	if err != nil {
		return Done{}, err
	}
	n, err := s.addNamespace(sub, spec)
	if err != nil {
		return Done{}, err
	}
	return Done{NSID: n.NSID()}, nil
}

func (s *server) remove(r RemoveRequest) (Done, error) {
	sub, n, err := s.namespace(r.NQN, r.NSID)
	if err != nil {
		return Done{}, err
	}
	// Commands that have begun go on to use the store.
	sub.namespaces = slices.DeleteFunc(sub.namespaces, func(have *namespace) bool { return have == n })
	return Done{}, sub.RemoveNamespace(r.NSID)
}

func (s *server) resize(r ResizeRequest) (Done, error) {
	_, n, err := s.namespace(r.NQN, r.NSID)
	switch {
	case err != nil:
		return Done{}, err
	case r.Size < 0 || r.Size == 0 && n.spec.File == "":
		return Done{}, exit.Errorf(exit.Usage, "a size is needed")
	case r.Size > 0 && n.spec.Device:
		return Done{}, exit.Errorf(exit.Usage, "%s is a device, which has the size that it has", n.spec.File)
	}
	if ram, ok := n.store.(*target.RAM); ok {
		ram.Resize(r.Size)
	} else if r.Size > 0 {
		if err := os.Truncate(n.spec.File, r.Size); err != nil {
			return Done{}, fmt.Errorf("resize: %w", err)
		}
	}
	n.Revalidate()
	return Done{}, nil
}

func (s *server) readOnly(r ReadOnlyRequest) (Done, error) {
	_, n, err := s.namespace(r.NQN, r.NSID)
	if err != nil {
		return Done{}, err
	}
	n.SetReadOnly(r.On)
	return Done{}, nil
}

// status describes everything.
func (s *server) status() Status {
	snap := s.target.Snapshot()
	addr := s.target.Addr()
	out := Status{
		SchemaVersion: SchemaVersion, Name: s.place.name, PID: os.Getpid(),
		TrAddr: addr.Addr().String(), TrSvcID: strconv.Itoa(int(addr.Port())),
		Provider: s.choice.Name, ProviderReason: s.choice.Reason,
		Subsystems: []Subsystem{}, Controllers: []Controller{},
		Connections: snap.Connections, Connects: snap.Connects, Rejects: snap.Rejects,
		Reads: snap.IO.Commands[nvme.OpRead], Writes: snap.IO.Commands[nvme.OpWrite],
		ReadBytes: snap.IO.BytesRead, WriteBytes: snap.IO.BytesWritten, Errors: snap.IO.Errors,
	}
	for _, c := range snap.Controllers {
		io := slices.DeleteFunc(slices.Clone(c.Queues), func(q target.QueueStats) bool { return q.QID == 0 })
		out.Controllers = append(out.Controllers, Controller{CNTLID: c.CNTLID, NQN: c.SubNQN, HostNQN: c.HostNQN, Queues: len(io)})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out.Faults = s.standing
	out.Faults.Commands = []Fault{}
	for _, f := range s.faults {
		out.Faults.Commands = append(out.Faults.Commands, f.Fault)
	}
	for _, sub := range s.subsystems {
		d := Subsystem{NQN: sub.cfg.NQN, MaxQueues: sub.cfg.MaxQueues, AllowHosts: sub.cfg.AllowHosts, ANA: map[string]string{}, Namespaces: []NamespaceStatus{}}
		for group, state := range sub.ana {
			d.ANA[group] = state
		}
		for _, n := range sub.namespaces {
			d.Namespaces = append(d.Namespaces, n.status())
		}
		out.Subsystems = append(out.Subsystems, d)
	}
	return out
}

func (n *namespace) status() NamespaceStatus {
	out := NamespaceStatus{NSID: n.NSID(), Data: n.spec.File, Size: n.store.Size(), BlockSize: n.spec.BlockSize, ReadOnly: n.ReadOnly()}
	if out.Data == "" {
		out.Data = "ram"
	}
	if out.BlockSize == 0 {
		out.BlockSize = 512
	}
	return out
}
