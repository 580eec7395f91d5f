package targetserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/systemd"
	"ublk-nvmeof/internal/rundir"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/provider"
	"ublk-nvmeof/target"
)

// Config configures Run.
type Config struct {
	Options *options.Target
	RunDir  string
	Log     *slog.Logger
	// Reserved, if not nil, is called with the directory of the target, which may
	// contain a log.
	Reserved func(dir string) error
	// Ready, if not nil, is called once hosts can connect. An error ends the
	// target.
	Ready func(Status) error

	open func(name string, addr netip.Addr) (rdma.Provider, error)
}

// server is a running target.
type server struct {
	closers []io.Closer // providers of further ports
	cfg     Config
	opts    *options.Target
	log     *slog.Logger
	choice  provider.Choice
	place   *rundir.Place
	target  *target.Target
	stop    chan struct{} // closed when a request ends the target
	ended   chan struct{} // closed when the target has ended
	once    sync.Once

	changes    sync.Mutex // held by requests that change namespaces, which may wait; taken before mu
	mu         sync.Mutex // guards what follows
	subsystems []*subsystem
	faults     []*fault
	lastFault  int
	standing   Faults // without Commands
	memory     budget
}

type fault struct {
	id    int
	what  string
	added target.AddedFault
}

// Run serves until ctx is done or a request ends the target. It returns nil after an
// orderly end. Errors have an exit.Code.
func Run(ctx context.Context, cfg Config) error {
	if cfg.open == nil {
		cfg.open = provider.ForTarget
	}
	s := &server{cfg: cfg, opts: cfg.Options, log: cfg.Log, stop: make(chan struct{}), ended: make(chan struct{})}
	if err := s.run(ctx); err != nil {
		return exit.From(err)
	}
	return nil
}

// run makes all parts of the server, waits, and undoes everything in the reverse order.
func (s *server) run(ctx context.Context) (err error) {
	undo := func(what string, fn func() error) {
		if uerr := fn(); uerr != nil {
			s.log.Error("target did not end cleanly", "step", what, "error", uerr)
			err = errors.Join(err, fmt.Errorf("%s: %w", what, uerr))
		}
	}
	if s.place, err = rundir.TakePlace(s.cfg.RunDir, namePrefix); err != nil {
		return err
	}
	defer undo("remove directory", s.place.Leave)
	if s.cfg.Reserved != nil {
		if err := s.cfg.Reserved(s.place.Dir); err != nil {
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
	defer undo("close providers of ports", s.closePorts)
	if err := s.open(); err != nil {
		return err
	}
	defer undo("close stores", s.closeStores)
	defer undo("close target", s.target.Close)
	if err := s.configure(); err != nil {
		return err
	}
	if err := s.addPorts(p); err != nil {
		return err
	}
	web, err := s.listen()
	if err != nil {
		return err
	}
	defer undo("close control socket", web.close)
	if err := systemd.Notify(systemd.Ready); err != nil {
		s.log.Warn("service manager not told", "error", err)
	}
	if s.cfg.Ready != nil {
		if err := s.cfg.Ready(s.status()); err != nil {
			return fmt.Errorf("report that hosts may connect: %w", err)
		}
	}
	s.log.Info("target listens", "address", s.target.Ports()[0].Addr().String(), "provider", s.choice.Name, "because", s.choice.Reason)
	select {
	case <-ctx.Done():
	case <-s.stop:
	}
	s.log.Info("target ends")
	if err := systemd.Notify(systemd.Stopping); err != nil {
		s.log.Warn("service manager not told", "error", err)
	}
	return nil
}

// open makes the target, which has no port yet.
func (s *server) open() (err error) {
	o := s.opts
	s.memory.limit = o.Memory
	if o.Memory == 0 {
		if s.memory.limit, err = memoryLimit(); err != nil {
			return err
		}
	}
	s.target, err = target.New(target.Config{
		Log: s.log, DiscoveryNQN: o.Discovery,
		InCapsule: o.InCapsule, QueueSize: o.QueueSize, MaxTransfer: o.MaxIO, MaxDescriptors: o.Descriptors, QueueMemory: o.QueueMemory,
		MinControllerID: o.MinID, MaxControllerID: o.MaxID,
		QuiesceTime: o.Quiesce, ANATransition: o.ANATransition, RetryDelays: o.RetryDelays, CommandKeepAlive: o.KeepAlive == options.Commands, NoWriteCache: o.NoWriteCache,
	})
	return err
}

// addPorts makes the target listen on its addresses. p is the provider of the first one. A
// provider without an RDMA device has one address, so each further address has a provider of
// its own.
func (s *server) addPorts(p rdma.Provider) error {
	ports := []target.PortConfig{{Provider: p, Addr: s.opts.Address}}
	for _, at := range s.opts.Ports {
		port := target.PortConfig{Provider: p, Addr: at}
		if s.choice.Name == options.RoCE && at.Addr() != s.opts.Address.Addr() {
			own, err := s.cfg.open(s.choice.Name, at.Addr())
			if err != nil {
				return exit.Errorf(exit.Usage, "--port \"%s\": %v", at, err)
			}
			port.Provider = own
			if c, ok := own.(io.Closer); ok {
				s.closers = append(s.closers, c)
			}
		}
		ports = append(ports, port)
	}
	_, err := s.target.AddPorts(ports...)
	return err
}

// closePorts closes the providers of further ports.
func (s *server) closePorts() error {
	var errs []error
	for _, c := range s.closers {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// configure adds the subsystems and faults of the command line.
func (s *server) configure() error {
	s.target.Faults().HideNamespaces(s.opts.NamespacesAfter)
	for _, c := range s.opts.Subsystems {
		if err := s.addSubsystem(c); err != nil {
			return err
		}
	}
	for _, to := range s.opts.Referrals {
		if err := s.target.AddReferral(to); err != nil {
			return exit.Errorf(exit.Usage, "--referral: %v", err)
		}
	}
	for _, f := range s.opts.Faults {
		if _, err := s.addFault(FaultRequest{f}); err != nil {
			return err
		}
	}
	return nil
}

// web is the HTTP server on the control socket.
type web struct {
	server *http.Server
	served chan error
}

func (s *server) listen() (*web, error) {
	l, err := control.Listen(Socket(s.cfg.RunDir, s.place.Name))
	if err != nil {
		return nil, err
	}
	w := &web{
		server: &http.Server{
			Handler: s.mux(), ReadHeaderTimeout: 5 * time.Second,
			ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
		},
		served: make(chan error, 1),
	}
	go func() { w.served <- w.server.Serve(l) }()
	return w, nil
}

// close waits until the last answers have been sent, for a second at most.
func (w *web) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := w.server.Shutdown(ctx)
	if serr := <-w.served; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}

// provider opens the requested provider, or the one that fits the address to listen on.
func (s *server) provider() (rdma.Provider, error) {
	addr := s.opts.Address.Addr()
	route, err := provider.RouteTo(s.opts.Address, netip.Addr{})
	s.choice = provider.Choose(s.opts.Provider, addr, route, err)
	p, err := s.cfg.open(s.choice.Name, addr)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return nil, s.portTaken(err)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return nil, exit.Errorf(exit.Usage, "-a/--traddr \"%s\": this host does not have the address (%v)", addr, err)
	}
	if err == nil || s.choice.Name != options.Verbs || exit.Of(err) == exit.Permission {
		return p, err
	}
	return nil, exit.Errorf(exit.NoRDMA, "no RDMA device can be used (%v); --provider %s needs none", err, options.RoCE)
}

// portTaken returns an error that names the process that uses the UDP port of this
// target.
func (s *server) portTaken(err error) error {
	port := netip.AddrPortFrom(s.opts.Address.Addr(), provider.UDPPort)
	holder, ok := host.UDPHolder(port)
	if !ok {
		return err
	}
	who := holder.String()
	if name := s.targetOf(holder.PID); name != "" {
		who = name + ", " + who
	}
	return exit.Errorf(exit.Other, "UDP port %d of %s is taken by %s; end that, or give another address with -a (%v)", port.Port(), port.Addr(), who, err)
}

// targetOf returns the name of the target that runs in a process, or "".
func (s *server) targetOf(pid int) string {
	names, err := List(s.cfg.RunDir)
	if err != nil || pid == 0 {
		return ""
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for _, name := range names {
		if name == s.place.Name {
			continue // it does not answer yet
		}
		if status, err := NewClient(Socket(s.cfg.RunDir, name)).Status(ctx); err == nil && status.PID == pid {
			return name
		}
	}
	return ""
}
