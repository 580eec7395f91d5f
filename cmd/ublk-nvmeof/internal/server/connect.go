package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/process"
)

// reserve finds the target's address and takes a name: a new one, the name of a dead
// server, or, until it has left, the name of the running server that this one replaces.
func (s *server) reserve(ctx context.Context) error {
	found, err := s.opts.Resolve(ctx)
	if err != nil {
		return exit.Errorf(exit.Unreachable, "%v", err)
	}
	if s.remote, err = s.address(found); err != nil {
		return err
	}
	if s.cfg.Succeeds != "" {
		err = s.succeed()
	} else {
		err = s.take(ctx)
	}
	if err != nil {
		return err
	}
	if s.cfg.Reserved != nil {
		if err := s.cfg.Reserved(s.record.entry); err != nil {
			return errors.Join(err, s.forget(ctx))
		}
	}
	s.logTaken()
	return nil
}

// address returns the target's address that a server has recorded, so that a host name
// with several addresses always means the same target, or the first reachable address.
func (s *server) address(found []netip.AddrPort) (netip.AddrPort, error) {
	if len(found) > 1 {
		records, err := s.cfg.Dir.List()
		if err != nil {
			return netip.AddrPort{}, err
		}
		for _, r := range records {
			t := r.Target
			if r.Err == nil && t.NQN == s.opts.NQN && t.HostNQN == s.opts.HostNQN && slices.Contains(found, t.Address) {
				return t.Address, nil
			}
		}
	}
	return s.reachable(found), nil
}

// target returns the target for the record.
func (s *server) target() state.Target {
	return state.Target{Address: s.remote, NQN: s.opts.NQN, HostNQN: s.opts.HostNQN}
}

// start makes all parts, bottom up. They are in s even if start fails. No I/O is
// possible before the controllers of earlier servers have ended. connecting is ctx with
// the time limit for connecting, which does not include the wait for these controllers.
func (s *server) start(ctx, connecting context.Context) error {
	chosen, err := s.chooseFront()
	if err != nil {
		return err
	}
	s.log.Info("front end chosen", "frontend", chosen.name, "because", chosen.reason)
	s.mu.Lock()
	s.front = chosen
	s.mu.Unlock()
	found, err := s.connect(connecting)
	if err != nil {
		return err
	}
	if !s.record.isOwn() {
		if err := s.relieve(connecting); err != nil {
			return err
		}
	}
	waited, err := s.outlive(ctx)
	if err != nil {
		return err
	}
	if waited {
		again, stop := context.WithTimeout(ctx, s.opts.Timeout)
		defer stop()
		connecting = again
	}
	return s.serveNamespaces(connecting, found)
}

// connect makes the loops and the controller, and returns the namespaces.
func (s *server) connect(ctx context.Context) ([]namespace, error) {
	cfg, err := s.initiatorConfig()
	if err != nil {
		return nil, err
	}
	s.log.Info("connecting", "nqn", s.opts.NQN, "address", s.remote.String(), "provider", s.provider.Name, "because", s.provider.Reason)
	sub, found, further, err := s.connectFirst(ctx, cfg)
	if err != nil {
		return nil, s.explain(ctx, err)
	}
	path := sub.Info().Paths[0]
	s.mu.Lock()
	s.sub, s.path = sub, path
	s.policy, s.preferred = s.opts.Policy, s.opts.Preferred
	s.keys = secretsOf(s.opts.Secret, s.opts.ControllerSecret)
	s.mu.Unlock()
	close(s.linked)
	s.depth = path.QueueSize
	if err := s.connectPaths(ctx, further); err != nil {
		return nil, s.explain(ctx, err)
	}
	if err := s.prefer(); err != nil {
		return nil, err
	}
	s.log.Info("connected", "controller", path.CNTLID, "queues", path.Plan.String(), "authentication", cmp.Or(path.Auth, "none"))
	return found, nil
}

func (s *server) initiatorConfig() (initiator.Config, error) {
	provider, err := s.providerFor(s.remote, s.opts.SourceAddr)
	if err != nil {
		return initiator.Config{}, err
	}
	s.mu.Lock()
	s.provider = provider.choice
	s.mu.Unlock()
	queues := s.opts.Queues.Clip(runtime.NumCPU())
	if err := s.back.prepare(queues.Loops()); err != nil {
		s.log.Warn("process is not fully protected", "error", err)
	}
	if !process.IsIOFlusher() {
		s.log.Warn("process is not marked as I/O flusher; swapping to this device may deadlock")
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
		Path:   initiator.Path{Provider: provider.rdma, Address: s.remote, Source: s.opts.SourceAddr},
		SubNQN: s.opts.NQN, HostNQN: s.opts.HostNQN, HostID: s.opts.HostID,
		Policy: s.opts.Policy, NoFence: s.opts.Fence == options.FenceNone,
		Credentials: initiator.Credentials{Host: s.opts.Secret, Controller: s.opts.ControllerSecret},
		Queues:      queues, Loops: loops, QueueSize: s.opts.QueueSize,
		KeepAlive: s.opts.KeepAlive, TOS: s.opts.TOS, DisableSQFlow: s.opts.DisableSQFlow, PollMaxBytes: s.opts.PollMax,
		ReconnectDelay: s.opts.Reconnect, CtrlLoss: cmp.Or(s.opts.Loss, initiator.AtOnce),
		MaxMemory: s.opts.Memory, Associated: s.record.associated, Connected: s.record.connected,
		Made: s.made, Superseded: s.superseded, Log: s.log,
	}
	if s.opts.Named() {
		cfg.Resolve = s.opts.Resolve
	}
	if s.opts.FastIOFail != options.Off {
		cfg.FastIOFail = max(s.opts.FastIOFail, initiator.AtOnce) // in initiator.Config 0 means off
	}
	return cfg, nil
}

// made records a controller that the target has made, and notifies the other servers of
// this host.
func (s *server) made(target netip.AddrPort, cntlid uint16, asked time.Time) {
	all := s.record.made(cntlid, state.JustMade(target, asked))
	s.notified.Store(true)
	if err := s.cfg.Host.Notify(s.opts.NQN, all); err != nil {
		s.log.Warn("other servers cannot learn which controllers were made for this one; they may wait for the end of these", "error", err)
	}
}

// superseded reports whether there is proof that the target has given the id of an old
// controller to another server of this host, or to the kernel's initiator, in the
// meantime.
func (s *server) superseded(ctx context.Context, p initiator.Present) bool {
	c := state.Controller{Address: p.Address, CNTLID: p.CNTLID}
	made, known := s.record.lastMade(c)
	if known && s.cfg.Host.GivenLater(s.opts.NQN, c, made) {
		return true
	}
	return s.back.kernelHas(ctx, host.NVMeController{
		Address: p.Address, NQN: s.opts.NQN, HostNQN: s.opts.HostNQN,
		CNTLID: p.CNTLID, Serial: p.Serial, Model: p.Model,
	})
}

// explain returns the error for a failure to connect to the target.
func (s *server) explain(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.DeadlineExceeded) {
		return cause // the server must end
	}
	if exit.Of(err) == exit.NoRDMA {
		return s.noRDMA(s.remote, s.opts.SourceAddr, err)
	}
	return exit.Connecting(s.opts.Peer(), s.opts.NQN, s.opts.HostNQN, err)
}

// serveNamespaces takes over the devices that wait for a server, or makes devices for
// the chosen namespaces. After a takeover, namespaces without a device get one later,
// as if the target had just added them.
func (s *server) serveNamespaces(ctx context.Context, found []namespace) error {
	known := s.record.state().Devices
	found = s.awaitNamespaces(ctx, found)
	devices, err := s.recoverDevices(ctx, found)
	if err != nil {
		return err
	}
	if len(devices) > 0 {
		if err := s.takenOver(devices); err != nil {
			return err
		}
		s.acceptClients()
		for _, ns := range found {
			if !slices.ContainsFunc(known, func(d state.Device) bool { return d.NSID == ns.nsid }) {
				s.changed(ns, initiator.Added)
			}
		}
		return nil
	}
	if err := s.takenOver(nil); err != nil {
		return err
	}
	chosen, err := s.choose(found)
	if err != nil {
		return err
	}
	return s.startDevices(ctx, chosen)
}

// takenOver records that this server serves all devices of an inherited record, with its own
// flags and the paths that were added or removed on request since it connected.
func (s *server) takenOver(devices []state.Device) error {
	if err := s.record.takenOver(s.target(), s.cfg.Args, secretsOf(s.opts.Secret, s.opts.ControllerSecret), devices); err != nil {
		return err
	}
	s.waiting, s.tookOver = nil, len(devices) > 0
	if len(s.sub.Paths()) == 1+len(s.opts.Paths) {
		return nil
	}
	return s.recordPaths()
}

// choose returns the namespaces to serve.
func (s *server) choose(found []namespace) ([]namespace, error) {
	if len(s.opts.NSIDs) == 0 {
		if len(found) == 0 {
			return nil, exit.Errorf(exit.NotFound, "subsystem %s has %s", s.opts.NQN, s.nsids(found))
		}
		return found, nil
	}
	var chosen []namespace
	for _, id := range s.opts.NSIDs {
		i := slices.IndexFunc(found, func(n namespace) bool { return n.nsid == id })
		if i < 0 {
			return nil, exit.Errorf(exit.NotFound, "--namespace \"%d\": subsystem %s has %s", id, s.opts.NQN, s.nsids(found))
		}
		chosen = append(chosen, found[i])
	}
	return chosen, nil
}

// nsids lists the usable namespaces, or says why there are none.
func (s *server) nsids(found []namespace) string {
	if len(found) == 0 {
		text := "no usable namespace"
		left := s.sub.Info().LeftOut
		for _, id := range slices.Sorted(maps.Keys(left)) {
			text += fmt.Sprintf("; namespace %d: %s", id, left[id])
		}
		return text
	}
	var ids []string
	for _, n := range found {
		ids = append(ids, fmt.Sprint(n.nsid))
	}
	return "only " + strings.Join(ids, ", ")
}
