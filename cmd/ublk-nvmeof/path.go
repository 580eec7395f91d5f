package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
)

// joined is what became of a connect to a subsystem that is served.
type joined struct {
	status control.Status
	added  []string // paths
}

// join adds the address and the further paths of the options to the server that serves the
// subsystem, or is connecting to it, as far as it lacks them. The result is nil without an error if
// there is no such server, if it has given up or ends meanwhile, or if another device is wanted.
func (c *connection) join(ctx context.Context, dir state.Dir) (*joined, error) {
	if c.opts.Duplicate {
		return nil, nil
	}
	records, err := dir.List()
	if err != nil {
		return nil, nil // the server that is started says so
	}
	i := slices.IndexFunc(records, func(r state.Record) bool { return c.isServer(r) })
	if i < 0 {
		return nil, nil
	}
	r := records[i]
	limited, cancel := context.WithTimeout(ctx, c.opts.Timeout)
	defer cancel()
	found, err := c.opts.Resolve(limited)
	if err != nil {
		return nil, exit.Errorf(exit.Unreachable, "%v", err)
	}
	client := control.NewClient(r.Socket())
	status, err := client.Status(limited)
	if err != nil || status.State == initiator.StateDead.String() {
		return nil, nil // the server that is started says what there is
	}
	missing := c.missing(status, r, found)
	if len(missing) == 0 && !c.idempotent {
		return nil, exit.Errorf(exit.AlreadyServed, "already connected: %s serves %s at %s already (process %d); --duplicate-connect makes another device",
			r.Name, c.opts.NQN, addresses(c.wanted(found)), r.Process.PID)
	}
	if err := c.suits(limited, client, status, r, found); err != nil {
		return nil, err
	}
	j := &joined{}
	for n, p := range missing {
		err := client.AddPath(limited, c.pathRequest(p, n > 0 || p.Address != found[0]))
		if c.idempotent && exit.Of(err) == exit.AlreadyServed {
			continue // the server has added it meanwhile
		}
		if err != nil {
			if now, ferr := dir.Find(r.Name); ferr != nil || !now.Alive || now.Process != r.Process {
				return nil, nil
			}
			return nil, fmt.Errorf("%s serves %s already, and path %v cannot be added: %w%s; --duplicate-connect makes another device", r.Name, c.opts.NQN, p, err, alsoAdded(j.added))
		}
		j.added = append(j.added, p.String())
	}
	j.status, err = client.Status(limited)
	return j, err
}

// isServer reports whether a record is of a running server of the wanted subsystem and host.
func (c *connection) isServer(r state.Record) bool {
	return r.Alive && r.Err == nil && r.Target.NQN == c.opts.NQN && r.Target.HostNQN == c.opts.HostNQN
}

// wanted are the paths of the options. found are the addresses of the first one.
func (c *connection) wanted(found []netip.AddrPort) []options.Path {
	return append([]options.Path{{Address: found[0], Source: c.opts.SourceAddr}}, c.opts.Paths...)
}

// missing are the paths of the options that a server lacks.
func (c *connection) missing(s control.Status, r state.Record, found []netip.AddrPort) (out []options.Path) {
	for i, p := range c.wanted(found) {
		have := hasPath(s, r, p)
		for _, other := range found[1:] { // further addresses of the same name
			have = have || i == 0 && hasPath(s, r, options.Path{Address: other, Source: p.Source})
		}
		if !have && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

// suits returns an error if flags were given that a server goes on without, because it has others.
func (c *connection) suits(ctx context.Context, client *control.Client, s control.Status, r state.Record, found []netip.AddrPort) error {
	words, err := differs(c.shown, s, r)
	if err != nil {
		return err
	}
	if words != "" {
		return exit.Errorf(exit.Usage, "%s serves %s already, with other flags, so nothing was done: %s", r.Name, r.Target.NQN, words)
	}
	p := c.pathRequest(c.wanted(found)[0], true)
	if p.Host == "" && p.Controller == "" {
		return nil
	}
	if missing := c.missing(s, r, found); len(missing) > 0 {
		return nil // adding it checks the keys
	}
	// The path exists, so the keys are all that is looked at.
	if err := client.AddPath(ctx, p); exit.Of(err) != exit.AlreadyServed {
		return err
	}
	return nil
}

// differs names the flags of a connect that a running server has with other values.
func differs(given *pflag.FlagSet, s control.Status, r state.Record) (string, error) {
	found, err := options.Differences(given, r.Args, map[string]string{"frontend": s.Frontend, "provider": s.Provider})
	if err != nil {
		return "", fmt.Errorf("%s: %w", r.Name, err)
	}
	var words []string
	for _, d := range found {
		words = append(words, d.Explain(r.Name))
	}
	return strings.Join(words, "; "), nil
}

// pathRequest asks for a path with the keys of the options.
func (c *connection) pathRequest(p options.Path, keep bool) control.PathRequest {
	request := keyRequest(c.opts, c.shown.Changed)
	request.Path, request.Keep = p.String(), keep
	return request
}

// keyRequest has the keys of a connect, as far as they were given.
func keyRequest(o *options.Connect, given func(flag string) bool) (r control.PathRequest) {
	for _, k := range []struct {
		flag string
		key  *auth.Key
		to   *string
	}{{options.HostSecret, o.Secret, &r.Host}, {options.ControllerSecret, o.ControllerSecret, &r.Controller}} {
		switch {
		case !given(k.flag):
		case k.key == nil:
			*k.to = options.NoSecret
		default:
			*k.to = k.key.Text()
		}
	}
	return r
}

func addresses(all []options.Path) string {
	var words []string
	for _, p := range all {
		words = append(words, p.Address.String())
	}
	return strings.Join(words, " and ")
}

// alsoAdded says what has happened before an error.
func alsoAdded(paths []string) string {
	if len(paths) == 0 {
		return ""
	}
	return fmt.Sprintf("; %s was added", strings.Join(paths, " and "))
}

// otherHost says that a server of the subsystem is another host to the target, so that it gets no
// path. It is empty if there is no such server, or one of this host.
func (c *connection) otherHost(dir state.Dir) string {
	records, err := dir.List()
	if err != nil || c.opts.Duplicate {
		return "" // the server that is started says more
	}
	if slices.ContainsFunc(records, func(r state.Record) bool { return r.Target.NQN == c.opts.NQN && r.Target.HostNQN == c.opts.HostNQN }) {
		return "" // its devices are meant
	}
	for _, r := range records {
		if r.Alive && r.Err == nil && r.Target.NQN == c.opts.NQN {
			return fmt.Sprintf("%s serves %s as host %s, and this is host %s, which gets devices of its own of the same disks, and no path; -q %s adds a path to %s",
				r.Name, c.opts.NQN, r.Target.HostNQN, c.opts.HostNQN, r.Target.HostNQN, r.Name)
		}
	}
	return ""
}

// hasPath reports whether a server uses an address, from the source if the path has one.
func hasPath(s control.Status, r state.Record, p options.Path) bool {
	if len(s.Paths) == 0 { // it is connecting, or of an older build
		return r.Target.Address == p.Address
	}
	return slices.ContainsFunc(s.Paths, func(have control.Path) bool {
		return have.TrAddr == p.Address.Addr().String() && have.TrSvcID == fmt.Sprint(p.Address.Port()) &&
			(!p.Source.IsValid() || have.HostTrAddr == "" || have.HostTrAddr == p.Source.String())
	})
}

// removePaths removes paths of servers.
func removePaths(cmd *cobra.Command, chosen []wanted, paths []string) error {
	var errs []error
	for _, w := range chosen {
		for _, r := range w.records {
			if !r.Alive {
				errs = append(errs, exit.Errorf(exit.NotFound, "%s has died, so no path can be removed; recover starts another server, and connect one with the paths that it names", r.Name))
				continue
			}
			for _, p := range paths {
				limited, cancel := context.WithTimeout(cmd.Context(), orderlyTime)
				err := control.NewClient(r.Socket()).RemovePath(limited, p)
				cancel()
				if err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", r.Name, err))
					continue
				}
				fmt.Fprintf(cmd.OutOrStdout(), "NQN:%s path %s removed\n", output.Text(w.nqn), p)
			}
		}
	}
	return errors.Join(errs...)
}

func newPolicy(runDir dirFunc) *cobra.Command {
	var r control.PolicyRequest
	var policy string
	cmd := askVerb(runDir, "policy DEVICE", "Change how requests choose one of several paths", func(_ *cobra.Command, a *asked) error {
		if _, err := initiator.ParsePolicy(policy); err != nil {
			return usage(fmt.Errorf("-p/--policy %q: want queue-depth, round-robin or preferred", policy))
		}
		r.Policy = policy
		if r.Preferred != "" {
			if policy != initiator.Preferred.String() {
				return usage(fmt.Errorf("--preferred %q: want it with --policy preferred, not %s", r.Preferred, policy))
			}
			if err := options.CheckPath(r.Preferred); err != nil {
				return usage(fmt.Errorf("--preferred %q: %w", r.Preferred, err))
			}
		}
		return a.client.SetPolicy(a.ctx, r)
	}, func(cmd *cobra.Command, _ *asked) {
		cmd.Flags().StringVarP(&policy, "policy", "p", "", "`policy`: queue-depth, round-robin or preferred (required)")
		cmd.Flags().StringVar(&r.Preferred, "preferred", "", "`path` that is used while it can be, in the form of connect --path (default: that of connect -a)")
	})
	cmd.Long += `

queue-depth takes the path with the fewest requests in flight, round-robin the next in
turn, and preferred one path while it can be used. Paths that the target calls
non-optimized are used only if there is no optimized one.`
	return cmd
}

// joinAll adds the other addresses of a subsystem as paths to its server. Those that cannot be
// added stay in the list of further addresses.
func (g *gatherer) joinAll(ctx context.Context, s *subsystem, r *output.SubsystemResult) {
	if r.Status.Name == "" || len(s.paths) == 0 || s.paths[0].with.Connect.Duplicate {
		return
	}
	record, err := g.dir.Find(r.Status.Name)
	if err != nil {
		return
	}
	if !r.Quiet && s.tried.IsZero() { // once
		g.warnOfFlags(s, r.Status, record)
	}
	client := control.NewClient(record.Socket())
	for _, p := range s.paths {
		path := p.path()
		if hasPath(r.Status, record, path) {
			continue
		}
		request := keyRequest(p.with.Connect, p.with.Flags().Changed)
		request.Path = path.String()
		limited, cancel := context.WithTimeout(ctx, p.with.Connect.Timeout)
		err := client.AddPath(limited, request)
		cancel()
		code := exit.Of(err)
		// What is no path to the same disks does not become one.
		r.Again = r.Again || code.MayPass() && code != exit.Negotiation && code != exit.NotFound
		switch {
		case err == nil:
			r.Added = append(r.Added, path.String())
		case !r.Quiet:
			g.errs("%s: path %v is not used: %v", s.nqn, path, err)
		}
	}
	if len(r.Added) == 0 {
		return
	}
	if now := statusOf(ctx, record); now.Name != "" {
		r.Status = now
	}
}

// warnOfFlags names the flags of a subsystem, or of one of its ports, that its server goes on
// without, because it has others.
func (g *gatherer) warnOfFlags(s *subsystem, now control.Status, record state.Record) {
	told := map[string]bool{"": true}
	for _, p := range s.paths {
		words, err := differs(p.with.Flags(), now, record)
		if err != nil {
			words = err.Error()
		}
		if !told[words] {
			g.errs("%s: flags are not used: %s", s.nqn, words)
		}
		told[words] = true
	}
}

// checkPaths checks paths of a command line.
func checkPaths(paths []string) error {
	for _, p := range paths {
		if err := options.CheckPath(p); err != nil {
			return usage(fmt.Errorf("--path %q: %w", p, err))
		}
	}
	return nil
}
