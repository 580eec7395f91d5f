package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/discoverer"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/systemd"
	"ublk-nvmeof/discovery"
	"ublk-nvmeof/identity"
	"ublk-nvmeof/nvme"
)

// maxServers is how many servers may run for connect-all to start more: a service may
// list thousands of subsystems, also one after the other.
const maxServers = 256

// gatherer is the verb connect-all.
type gatherer struct {
	runDir     dirFunc
	opts       *options.Discovery
	format     string
	verbose    bool
	foreground bool
	stayFD     int

	dir    state.Dir
	named  []discoverer.Service             // subsystems that files name
	errs   func(format string, args ...any) // to standard error; any goroutine may call it
	client *discoverer.Client
}

func newConnectAll(runDir dirFunc) *cobra.Command {
	g := &gatherer{runDir: runDir, opts: options.DefaultDiscovery(), stayFD: -1}
	cmd := &cobra.Command{
		Use:   "connect-all",
		Short: "Connect to all subsystems that discovery services list",
		Long: `Asks a discovery service, and the services that it refers to, for the subsystems that
this host may use, and connects to each as connect does. Without -a, the services of
/etc/nvme/discovery.conf and the services and subsystems of the configuration of nvme-cli
(-J) are used.

A subsystem with several addresses is connected at the first that works. The others become
paths of the same devices, as by connect --path. A subsystem that this host is connected to
gets the paths that it lacks. What fails does not keep the rest from being connected.

With --persistent, a process stays connected to the discovery services. When a service
reports a change, the process connects the subsystems that it lists now and did not list
before, and it tries again what could not be connected, paths included. It never
disconnects anything.
list -v shows it, and disconnect -d discovery0 or disconnect-all ends it.`,
		Args: noArgs,
		RunE: verb("connect-all", func(cmd *cobra.Command, _ []string) error { return g.run(cmd) }),
	}
	f := cmd.Flags()
	g.opts.AddFlags(f)
	f.BoolVar(&g.foreground, "foreground", false, "with --persistent, stay connected in this process, for a terminal or a service manager (Type=notify)")
	f.IntVar(&g.stayFD, "stay-fd", -1, "descriptor on which connect-all --persistent waits for the process that stays")
	f.Lookup("stay-fd").Hidden = true
	formatFlag(f, &g.format)
	f.BoolVarP(&g.verbose, "verbose", "v", false, "show which queues were requested and granted, and what is left out")
	return cmd
}

func (g *gatherer) run(cmd *cobra.Command) (err error) {
	if err := usage(g.opts.Complete(identity.Sources{})); err != nil {
		return err
	}
	if g.foreground && !g.opts.Persistent {
		return usage(errors.New("--foreground: want it with --persistent"))
	}
	if g.dir, err = g.runDir(); err != nil {
		return err
	}
	var mu sync.Mutex
	g.errs = func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(cmd.ErrOrStderr(), "%s: connect-all: %s\n", programName, output.Text(fmt.Sprintf(format, args...)))
	}
	found, err := discoverer.Services(g.opts)
	if err != nil {
		return err
	}
	services, err := g.persistent(found)
	if err != nil {
		return err
	}
	g.named = found.Subsystems
	if g.stayFD >= 0 {
		return g.stayInBackground(services)
	}
	return g.connectAndStay(cmd, found, services)
}

// connectAndStay connects what is found, and then stays connected to services, or has another
// process do so.
func (g *gatherer) connectAndStay(cmd *cobra.Command, found discoverer.Found, services []discoverer.Service) (err error) {
	ctx, stop := interruptible(endSignals...)
	defer stop()
	level := slog.LevelWarn
	if g.verbose {
		level = slog.LevelDebug
	}
	g.client = discoverer.New(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})))
	defer func() { err = errors.Join(err, g.client.Close()) }()
	for _, s := range found.Skipped {
		g.errs("%v", s)
	}
	listed, errs := g.collect(ctx, found)
	results := g.connectAll(ctx, listed.all)
	if err := output.ConnectedAll(cmd.OutOrStdout(), results, g.format, g.verbose); err != nil {
		return err
	}
	for _, r := range results {
		if r.Err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.NQN, r.Err))
		}
	}
	errs = append(found.Errors, errs...)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case len(services) == 0:
		if g.foreground && len(errs) == 0 { // for a service manager, the connections are all
			return systemd.Notify(systemd.Ready)
		}
		return errors.Join(errs...)
	case !g.foreground:
		return errors.Join(append(errs, g.startKeeper(cmd))...)
	}
	for _, err := range errs {
		g.errs("%v", err)
	}
	return g.stayInForeground(ctx, services)
}

// subsystem is what one host may connect to, and where.
type subsystem struct {
	subsystemID
	paths []path
	tried time.Time // when it could not be connected the last time
}

type subsystemID struct{ nqn, hostNQN string }

// path is an address of a subsystem, and the flags to connect with.
type path struct {
	to   netip.AddrPort
	with *options.Discovery
}

// path returns the path as --path takes it.
func (p path) path() options.Path {
	return options.Path{Address: p.to, Source: p.with.Connect.SourceAddr}
}

// same reports whether two paths lead to the same address, and not from different ones.
func (p path) same(q path) bool {
	a, b := p.with.Connect.SourceAddr, q.with.Connect.SourceAddr
	return p.to == q.to && (a == b || !a.IsValid() || !b.IsValid())
}

// subsystems are the subsystems that were found, in their order.
type subsystems struct {
	all  []*subsystem
	byID map[subsystemID]*subsystem
}

// Services can list anything. What is beyond these limits is left out.
const (
	maxSubsystems = 4096
	maxPaths      = 64 // of a subsystem
)

// add adds a path to a subsystem, unless it is there. It returns false if there are too many.
func (l *subsystems) add(nqn string, p path) bool {
	id := subsystemID{nqn, p.with.Connect.HostNQN}
	s := l.byID[id]
	if s == nil {
		if len(l.all) == maxSubsystems {
			return false
		}
		if l.byID == nil {
			l.byID = map[subsystemID]*subsystem{}
		}
		s = &subsystem{subsystemID: id}
		l.byID[id] = s
		l.all = append(l.all, s)
	}
	if slices.ContainsFunc(s.paths, p.same) {
		return true
	}
	if len(s.paths) == maxPaths {
		return false
	}
	s.paths = append(s.paths, p)
	return true
}

// remove removes a path of a subsystem.
func (l *subsystems) remove(at discovery.Endpoint, hostNQN string) {
	s := l.byID[subsystemID{at.NQN, hostNQN}]
	if s == nil {
		return
	}
	s.paths = slices.DeleteFunc(s.paths, func(p path) bool { return p.to == at.Address })
	if len(s.paths) == 0 {
		l.drop(s)
	}
}

// drop removes a subsystem.
func (l *subsystems) drop(s *subsystem) {
	delete(l.byID, s.subsystemID)
	l.all = slices.DeleteFunc(l.all, func(have *subsystem) bool { return have == s })
}

// collect asks all services. The errors are about what could not be asked, or understood.
func (g *gatherer) collect(ctx context.Context, found discoverer.Found) (all subsystems, errs []error) {
	errs = collectNamed(ctx, found.Subsystems, &all)
	for _, s := range found.Discovery {
		if err := g.walk(ctx, s.Options, &all); err != nil {
			errs = append(errs, s.Error(err))
		}
	}
	return all, errs
}

// collectNamed adds the subsystems that files name.
func collectNamed(ctx context.Context, named []discoverer.Service, all *subsystems) (errs []error) {
	for _, s := range named {
		within, cancel := context.WithTimeout(ctx, s.Options.Connect.Timeout)
		endpoints, err := discoverer.Endpoints(within, s.Options)
		cancel()
		if err != nil {
			errs = append(errs, s.Error(err))
			continue
		}
		for _, at := range endpoints {
			if !all.add(at.NQN, path{at.Address, s.Options}) {
				errs = append(errs, s.Error(fmt.Errorf("left out: there are more than %d subsystems, or more than %d addresses of this one", maxSubsystems, maxPaths)))
			}
		}
	}
	return errs
}

// walk asks a service and those that it refers to. If it has several addresses, the first
// that answers is taken.
func (g *gatherer) walk(ctx context.Context, o *options.Discovery, all *subsystems) error {
	within, cancel := context.WithTimeout(ctx, o.Connect.Timeout)
	defer cancel()
	roots, err := discoverer.Endpoints(within, o)
	if err != nil {
		return err
	}
	open := func(ctx context.Context, at discovery.Endpoint) (discovery.Conn, error) {
		return g.client.Open(ctx, o, at)
	}
	var failed []error
	for _, root := range roots {
		var errs []error
		answered := false
		for p := range discovery.Walk(within, root, open, discovery.Limits{}) {
			if p.Err != nil {
				errs = append(errs, p.Err)
				continue
			}
			answered = true
			g.take(p, o, all)
		}
		if answered {
			return errors.Join(errs...)
		}
		failed = append(failed, errs...)
	}
	return errors.Join(failed...)
}

// maxComplaints is how many entries of a log are complained of one by one.
const maxComplaints = 8

// take adds what a log lists. Entries that cannot be used are reported, but for those of
// other transports, which are somebody else's.
func (g *gatherer) take(p discovery.Page, o *options.Discovery, all *subsystems) {
	complaints := 0
	leaveOut := func(i int, why string) {
		if complaints++; complaints <= maxComplaints {
			g.errs("%s: entry %d is left out: %s", p.From.Address, i, why)
		}
	}
	for i := range p.Log.Entries {
		e := &p.Log.Entries[i]
		at, err := p.Endpoint(e)
		switch {
		case err == nil && e.SUBTYPE() != nvme.SubsystemNVMe:
		case err == nil && at.NQN == nvme.DiscoveryNQN:
			leaveOut(i, "a discovery subsystem has no namespaces")
		case err == nil:
			if !all.add(at.NQN, path{at.Address, o}) {
				leaveOut(i, fmt.Sprintf("there are more than %d subsystems, or more than %d addresses of this one", maxSubsystems, maxPaths))
			}
		case e.TRTYPE() == nvme.TransportRDMA || g.verbose:
			leaveOut(i, err.Error())
		}
	}
	if more := complaints - maxComplaints; more > 0 {
		g.errs("%s: %d more entries are left out", p.From.Address, more)
	}
}

// maxAtOnce is how many subsystems are connected to at the same time. Each has a server of its
// own, which waits for its target most of the time.
const maxAtOnce = 4

// connectAll connects to all subsystems. The results are those of the first of them if ctx ends
// before all were tried.
func (g *gatherer) connectAll(ctx context.Context, all []*subsystem) []output.SubsystemResult {
	results := make([]output.SubsystemResult, len(all))
	var connecting sync.WaitGroup
	defer connecting.Wait()
	slots := make(chan struct{}, maxAtOnce)
	for i, s := range all {
		slots <- struct{}{}
		if ctx.Err() != nil {
			return results[:i]
		}
		connecting.Go(func() {
			defer func() { <-slots }()
			runtime.LockOSThread() // the thread gets the marks of the server, and ends with the goroutine
			results[i] = g.connectOne(ctx, s)
		})
	}
	return results
}

// connectOne connects to a subsystem, at all of its addresses, unless a server does already.
func (g *gatherer) connectOne(ctx context.Context, s *subsystem) output.SubsystemResult {
	r := output.SubsystemResult{NQN: s.nqn}
	switch started, running, err := g.connected(ctx, s); {
	case err != nil:
		r.Err = err
	case started != nil:
		r.Outcome, r.Status = output.Already, *started
		r.Quiet = g.opts.Quiet
	case running >= maxServers:
		r.Err = fmt.Errorf("not connected: %d servers run already, and connect-all starts no more; connect does", running)
	default:
		g.connect(ctx, s, &r)
	}
	if r.Err != nil {
		r.Outcome = output.Failed
	}
	g.joinAll(ctx, s, &r)
	r.Further = further(s, r.Status)
	return r
}

// connected returns the status of the server that serves a subsystem already, or nil if there
// is none or another one is wanted, and the number of servers that run.
func (g *gatherer) connected(ctx context.Context, s *subsystem) (status *control.Status, running int, err error) {
	records, err := g.dir.List()
	if err != nil {
		return nil, 0, err
	}
	for _, r := range records {
		if !r.Alive {
			continue
		}
		running++
		if status == nil && r.Err == nil && r.Target.NQN == s.nqn && r.Target.HostNQN == s.hostNQN && !s.paths[0].with.Connect.Duplicate {
			now := statusOf(ctx, r)
			status = &now
		}
	}
	// A dead server's devices are taken over at the address that they are connected to.
	for _, r := range records {
		if r.Err == nil && !r.Alive && r.Target.NQN == s.nqn && r.Target.HostNQN == s.hostNQN {
			slices.SortStableFunc(s.paths, func(a, b path) int {
				return rank(a.to == r.Target.Address) - rank(b.to == r.Target.Address)
			})
		}
	}
	return status, running, nil
}

func rank(first bool) int {
	if first {
		return 0
	}
	return 1
}

// connect connects to a subsystem at its first address that works.
func (g *gatherer) connect(ctx context.Context, s *subsystem, r *output.SubsystemResult) {
	var errs []error
	for _, p := range s.paths {
		args := append(serveArgs(g.dir), p.with.ConnectArgs(p.to, s.nqn)...)
		args = append(args, fmt.Sprintf("--verbose=%t", g.verbose))
		status, err := startServer(ctx, args, keysOf(p.with.Connect), p.with.Connect.Timeout, func(text string) { g.errs("%s", text) })
		switch {
		case err == nil:
			r.Outcome, r.Status = output.New, status
			return
		case exit.Of(err) == exit.AlreadyServed: // meanwhile, by somebody else
			r.Outcome, r.Quiet = output.Already, g.opts.Quiet
			return
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	r.Err = errors.Join(errs...)
}

// further lists the addresses of a subsystem that its server does not use.
func further(s *subsystem, used control.Status) (out []string) {
	for _, p := range s.paths {
		if used.Name != "" && !(len(used.Paths) == 0 && p.to.String() == output.Endpoint(used)) && !hasPath(used, state.Record{}, p.path()) {
			out = append(out, p.to.String())
		}
	}
	return out
}
