package disk

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"

	"ublk-nvmeof/identity"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/poller"
	"ublk-nvmeof/process"
	"ublk-nvmeof/rdma/provider"
)

// opening is a call of Open.
type opening struct {
	cfg   Config
	sub   *initiator.Subsystem
	frees []func() error // in the order in which to call them, after the end of the subsystem
	disk  atomic.Pointer[Disk]
}

// undo frees everything after an error.
func (o *opening) undo() error {
	var errs []error
	if o.sub != nil {
		ctx, cancel := context.WithTimeout(context.Background(), CloseTimeout)
		defer cancel()
		errs = append(errs, o.sub.Close(ctx))
	}
	for _, free := range o.frees {
		errs = append(errs, free())
	}
	return errors.Join(errs...)
}

// identify finds out who this host is.
func (o *opening) identify() error {
	if len(o.cfg.Paths) == 0 {
		return errors.New("no path")
	}
	id := ""
	if !o.cfg.HostID.IsZero() {
		id = o.cfg.HostID.String()
	}
	host, err := identity.Find(o.cfg.HostNQN, id, identity.Sources{})
	if err != nil {
		return err
	}
	o.cfg.HostNQN, o.cfg.HostID = host.NQN, host.ID
	if o.cfg.Log != nil {
		for _, w := range host.Warnings {
			o.cfg.Log.Warn("unusual host identity", "reason", w)
		}
	}
	return nil
}

// queues returns what to ask the target for.
func (o *opening) queues() poller.Request {
	q := poller.Request{IO: max(1, o.cfg.Queues)}
	if o.cfg.PollQueue {
		q.Poll = q.IO
	}
	return q
}

// makeLoops makes the loops that the caller has not given.
func (o *opening) makeLoops() error {
	if len(o.cfg.Loops) > 0 {
		return nil
	}
	if err := process.CheckIOUring(); err != nil {
		return err
	}
	for i := range o.queues().Loops() {
		l, err := poller.New(poller.Config{Name: fmt.Sprintf("disk-%d", i)})
		if err != nil {
			return process.ExplainMemlock(err)
		}
		o.cfg.Loops = append(o.cfg.Loops, l)
		o.frees = append(o.frees, l.Stop)
	}
	return nil
}

// connect connects over the first path that can be reached, and adds the others.
func (o *opening) connect(ctx context.Context) error {
	var paths []initiator.Path
	var errs []error
	for i := range o.cfg.Paths {
		p, err := o.path(ctx, &o.cfg.Paths[i])
		if err == nil && o.sub == nil {
			if o.sub, err = initiator.Connect(ctx, o.initiatorConfig(p)); err == nil {
				continue
			}
		}
		if err != nil && p.Provider == nil {
			return err // what the caller has to change
		}
		if err != nil {
			errs = append(errs, err)
		}
		paths = append(paths, p)
	}
	if o.sub == nil {
		return process.ExplainMemlock(errors.Join(errs...))
	}
	for _, p := range paths {
		if _, err := o.sub.KeepPath(p); err != nil {
			return err
		}
	}
	return nil
}

// path returns a path with its provider.
func (o *opening) path(ctx context.Context, p *Path) (initiator.Path, error) {
	port := cmp.Or(p.Port, DefaultPort)
	resolve := func(ctx context.Context) ([]netip.AddrPort, error) {
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", p.Host)
		var all []netip.AddrPort
		for _, a := range addrs {
			all = append(all, netip.AddrPortFrom(a.Unmap(), port))
		}
		return all, err
	}
	found, err := resolve(ctx)
	if err != nil {
		return initiator.Path{}, fmt.Errorf("path to %s: %w", p.Host, err)
	}
	out := initiator.Path{Provider: p.Provider, Address: found[0], Source: p.Source}
	if _, err := netip.ParseAddr(p.Host); err != nil {
		out.Resolve = resolve
	}
	if p.Provider == nil {
		route, err := provider.RouteTo(found[0], p.Source)
		choice := provider.Choose(cmp.Or(p.ProviderName, provider.Auto), found[0].Addr(), route, err)
		var release func() error
		if out.Provider, release, err = providers.get(choice); err != nil {
			return initiator.Path{}, err
		}
		o.frees = append(o.frees, release)
	}
	return out, nil
}

func (o *opening) initiatorConfig(p initiator.Path) initiator.Config {
	c := &o.cfg
	return initiator.Config{
		Path: p, SubNQN: c.NQN, HostNQN: c.HostNQN, HostID: c.HostID, Credentials: c.Credentials,
		Queues: o.queues(), Loops: c.Loops, Policy: c.Policy, KeepAlive: c.KeepAlive,
		ReconnectDelay: c.ReconnectDelay, FastIOFail: c.FailAfter, CtrlLoss: c.GiveUpAfter,
		StateChanged: o.changed,
		Changed:      func(*initiator.Namespace, initiator.Change) { o.changed() },
		Log:          c.Log,
	}
}

// changed tells the disk that its state has changed, if it is open already.
func (o *opening) changed() {
	if d := o.disk.Load(); d != nil {
		d.watch.notify()
	}
}

// NamespaceError means that the subsystem does not have the namespace, or that Config.NSID must
// say which one.
type NamespaceError struct {
	Want uint32   // 0: the only one
	Have []uint32 // usable namespaces
}

func (e *NamespaceError) Error() string {
	if e.Want == 0 && len(e.Have) > 1 {
		return fmt.Sprintf("the subsystem has the namespaces %v; name one of them", e.Have)
	}
	return fmt.Sprintf("the subsystem does not have namespace %d; it has %v", e.Want, e.Have)
}

func (o *opening) namespace() (*initiator.Namespace, error) {
	var have []uint32
	all := o.sub.Namespaces()
	for _, ns := range all {
		if ns.NSID() == o.cfg.NSID || o.cfg.NSID == 0 && len(all) == 1 {
			return ns, nil
		}
		have = append(have, ns.NSID())
	}
	return nil, &NamespaceError{o.cfg.NSID, have}
}
