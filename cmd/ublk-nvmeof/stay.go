package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/discoverer"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/metrics"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/systemd"
	"ublk-nvmeof/discovery"
	"ublk-nvmeof/internal/rundir"
)

// persistent returns the services that are to be kept and that nobody keeps yet.
func (g *gatherer) persistent(found discoverer.Found) ([]discoverer.Service, error) {
	var wanted []discoverer.Service
	for _, s := range found.Discovery {
		if s.Options.Persistent {
			wanted = append(wanted, s)
		}
	}
	if len(wanted) == 0 {
		return nil, nil
	}
	keepers, err := discoverer.Keepers(string(g.dir))
	if err != nil {
		return nil, err
	}
	return discoverer.Unkept(keepers, wanted), nil
}

// startKeeper runs the same command line in a session of its own, to stay connected. It
// returns when that process has taken its place.
func (g *gatherer) startKeeper(cmd *cobra.Command) error {
	out := cmd.OutOrStdout()
	if g.format == output.JSON {
		out = nil // the result is all of the output
	}
	return startInBackground(out, "keeper of the discovery services", cmd.Flags(), os.Args[1:], "--run-dir="+string(g.dir), "--stay-fd=3")
}

// keeper stays connected to discovery services, and connects what they list.
type keeper struct {
	*gatherer
	log     *slog.Logger
	news    chan news
	known   map[newsFrom][]discovery.Entry
	pending subsystems // that could not be connected yet
}

// newsFrom is a service, and the one that was asked for it.
type newsFrom struct {
	root *options.Discovery
	at   discovery.Endpoint
}

type news struct {
	from *options.Discovery
	page discovery.Page
}

// stay keeps connections to the services until ctx is done. ready is called once the process
// has its place, with a sentence that says so.
func (g *gatherer) stay(ctx context.Context, services []discoverer.Service, log *slog.Logger, ready func(*rundir.Place, string) error) (err error) {
	place, record, err := discoverer.Keep(string(g.dir), services)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, place.Leave()) }()
	closeScrapes, err := g.serveScrapes(ctx, log)
	if err != nil {
		return err
	}
	defer closeScrapes()
	var at []string
	for _, s := range record.Services {
		at = append(at, s.Address)
	}
	if err := ready(place, fmt.Sprintf("%s, process %d, stays connected to %s", record.Name, record.Process.PID, strings.Join(at, ", "))); err != nil {
		return err
	}
	if err := systemd.Notify(systemd.Ready, systemd.Status("connected to discovery services")); err != nil {
		log.Warn("cannot notify the service manager", "error", err)
	}
	g.errs = func(format string, args ...any) {
		log.Warn("part of a pass failed", "error", fmt.Sprintf(format, args...))
	}
	k := &keeper{gatherer: g, log: log, news: make(chan news), known: map[newsFrom][]discovery.Entry{}}
	for _, err := range collectNamed(ctx, g.named, &k.pending) { // those that are not connected yet
		g.errs("%v", err)
	}
	var watches sync.WaitGroup
	defer watches.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, s := range services {
		watches.Go(func() { k.watch(ctx, s.Options) })
	}
	k.act(ctx)
	return nil
}

// serveScrapes answers Prometheus at the address of --metrics-listen, if it was given, with the
// metrics of all servers.
func (g *gatherer) serveScrapes(ctx context.Context, log *slog.Logger) (end func(), err error) {
	address := g.opts.Connect.MetricsAddress()
	if address == "" {
		return func() {}, nil
	}
	complain := func(format string, args ...any) {
		log.Warn("a server is left out", "error", fmt.Sprintf(format, args...))
	}
	all := metrics.HandlerOfAll(func() []control.Status {
		records, err := g.dir.List()
		if err != nil {
			log.Error("metrics lack all servers", "error", err)
		}
		return statuses(ctx, records, "metrics", complain)
	})
	srv, l, err := metrics.Listen(address, metrics.Scrapes(all), log)
	if err != nil {
		return nil, exit.Errorf(exit.Other, "--metrics-listen %q: %v", g.opts.Connect.Metrics, err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = srv.Serve(l) // until it is closed
	}()
	return func() {
		_ = srv.Close()
		<-served
	}, nil
}

// watch stays connected to one service. Each time that it has to be connected to anew, its
// name is resolved anew, and the first of its addresses that answers is taken.
func (k *keeper) watch(ctx context.Context, o *options.Discovery) {
	root, ok := k.resolve(ctx, o)
	if !ok {
		return
	}
	open := func(ctx context.Context, at discovery.Endpoint, changed func()) (discovery.Conn, error) {
		if at != root {
			return k.client.OpenToStay(ctx, o, at, changed)
		}
		endpoints, err := discoverer.Endpoints(ctx, o)
		if err != nil {
			return nil, err
		}
		var errs []error
		for _, at := range endpoints {
			conn, err := k.client.OpenToStay(ctx, o, at, changed)
			if err == nil {
				return conn, nil
			}
			errs = append(errs, err)
		}
		return nil, errors.Join(errs...)
	}
	discovery.Watch(ctx, root, discovery.WatchConfig{
		Open: open, Retry: o.Connect.Reconnect,
		Report: func(p discovery.Page) {
			select {
			case k.news <- news{o, p}:
			case <-ctx.Done():
			}
		},
	})
}

// maxKnown is how many logs a keeper remembers: services may refer to other ones each time.
const maxKnown = 256

// resolve finds the address of a service, again and again if it must. It returns false if
// ctx is done.
func (k *keeper) resolve(ctx context.Context, o *options.Discovery) (discovery.Endpoint, bool) {
	for {
		endpoints, err := discoverer.Endpoints(ctx, o)
		if err == nil {
			return endpoints[0], true
		}
		k.log.Warn("discovery service cannot be resolved", "error", err)
		select {
		case <-time.After(o.Connect.Reconnect):
		case <-ctx.Done():
			return discovery.Endpoint{}, false
		}
	}
}

// act connects what appears, and tries again what failed, until ctx is done.
func (k *keeper) act(ctx context.Context) {
	for {
		var next <-chan time.Time
		if len(k.pending.all) > 0 {
			next = time.After(time.Until(k.due()))
		}
		select {
		case n := <-k.news:
			k.learn(n)
		case <-next:
		case <-ctx.Done():
			k.log.Info("the connections to the discovery services end; devices stay", "because", context.Cause(ctx))
			return
		}
		k.connectPending(ctx)
	}
}

// maxBatch is how many subsystems are tried before news is looked at again.
const maxBatch = 8

// due is when the next subsystem is to be tried.
func (k *keeper) due() time.Time {
	first := slices.MinFunc(k.pending.all, func(a, b *subsystem) int { return a.tried.Compare(b.tried) })
	if first.tried.IsZero() {
		return first.tried
	}
	return first.tried.Add(k.opts.Connect.Reconnect)
}

// connectPending tries subsystems that are due, those first that have waited longest.
func (k *keeper) connectPending(ctx context.Context) {
	var batch []*subsystem
	for _, s := range slices.SortedStableFunc(slices.Values(k.pending.all), func(a, b *subsystem) int { return a.tried.Compare(b.tried) }) {
		if len(batch) < maxBatch && (s.tried.IsZero() || time.Since(s.tried) >= k.opts.Connect.Reconnect) {
			batch = append(batch, s)
		}
	}
	for i, r := range k.connectAll(ctx, batch) {
		s := batch[i]
		if r.Err != nil {
			k.log.Warn("subsystem is not connected yet", "nqn", s.nqn, "error", r.Err)
			s.tried = time.Now()
			continue
		}
		k.log.Info("subsystem", "nqn", s.nqn, "outcome", string(r.Outcome), "server", r.Status.Name, "unused_paths", r.Further)
		if r.Again {
			s.tried = time.Now()
			continue
		}
		k.pending.drop(s)
	}
}

// learn finds what appeared in a log, or vanished from it. What vanished stays connected:
// it may be in use, and comes back when the target does.
func (k *keeper) learn(n news) {
	from := newsFrom{n.from, n.page.From}
	name := n.page.From.Address.String()
	if n.page.Err != nil {
		k.log.Warn("discovery log cannot be read", "service", name, "error", n.page.Err)
		return
	}
	appeared, vanished := discovery.Diff(k.known[from], n.page.Log.Entries)
	if len(k.known) >= maxKnown {
		clear(k.known) // what they list is found to be connected already
	}
	k.known[from] = n.page.Log.Entries
	k.log.Info("discovery log", "service", name, "entries", len(n.page.Log.Entries), "appeared", len(appeared), "vanished", len(vanished))
	for i := range vanished {
		if at, err := n.page.Endpoint(&vanished[i]); err == nil {
			k.pending.remove(at, n.from.Connect.HostNQN)
		}
	}
	k.take(discovery.Page{From: n.page.From, Log: &discovery.Log{Entries: appeared}}, n.from, &k.pending)
}

// stayInForeground is connect-all --persistent --foreground after the first pass.
func (g *gatherer) stayInForeground(ctx context.Context, services []discoverer.Service) error {
	log := foregroundLog(os.Stderr, g.level())
	if err := g.client.Close(); err != nil { // its log is for a command that ends
		return err
	}
	g.client = discoverer.New(log)
	return g.stay(ctx, services, log, func(_ *rundir.Place, what string) error {
		log.Info("stays connected", "services", what)
		return nil
	})
}

// stayInBackground is the process that connect-all --persistent leaves behind.
func (g *gatherer) stayInBackground(services []discoverer.Service) error {
	unix.CloseOnExec(g.stayFD)
	pipe := os.NewFile(uintptr(g.stayFD), "ready")
	if len(services) == 0 {
		_, err := fmt.Fprintln(pipe, "the discovery services are kept already")
		return errors.Join(err, pipe.Close())
	}
	if err := os.Chdir("/"); err != nil { // it must not keep a file system busy
		return err
	}
	file := &logFile{}
	log := slog.New(slog.NewTextHandler(file, &slog.HandlerOptions{Level: g.level()}))
	g.client = discoverer.New(log)
	defer surviveHangup(log)()
	ctx, stop := interruptible(syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := g.stay(ctx, services, log, func(place *rundir.Place, what string) error {
		_, err := fmt.Fprintln(pipe, what)
		return errors.Join(err, pipe.Close(), file.open(filepath.Join(place.Dir, "log")))
	})
	return errors.Join(err, g.client.Close())
}

func (g *gatherer) level() slog.Level {
	if g.verbose {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}
