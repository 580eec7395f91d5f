package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
)

// join adds the address of the options as a path to the server that serves the subsystem, or
// is connecting to it. It returns false if there is no such server, if it has this address, if
// it ends meanwhile, or if another device is wanted.
func (c *connection) join(ctx context.Context, dir state.Dir) (control.Status, bool, error) {
	none := control.Status{}
	if c.opts.Duplicate {
		return none, false, nil
	}
	records, err := dir.List()
	if err != nil {
		return none, false, nil // the server that is started says so
	}
	i := slices.IndexFunc(records, func(r state.Record) bool {
		return r.Alive && r.Err == nil && r.Target.NQN == c.opts.NQN && r.Target.HostNQN == c.opts.HostNQN
	})
	if i < 0 {
		return none, false, nil
	}
	r := records[i]
	limited, cancel := context.WithTimeout(ctx, c.opts.Timeout)
	defer cancel()
	found, err := c.opts.Resolve(limited)
	if err != nil {
		return none, false, exit.Errorf(exit.Unreachable, "%v", err)
	}
	client := control.NewClient(r.Socket())
	status, err := client.Status(limited)
	if err != nil || slices.ContainsFunc(found, func(a netip.AddrPort) bool { return hasPath(status, r, a) }) {
		return none, false, nil // the server that is started says what there is
	}
	for _, p := range append([]options.Path{{Address: found[0], Source: c.opts.SourceAddr}}, c.opts.Paths...) {
		if hasPath(status, r, p.Address) {
			continue
		}
		if err := client.AddPath(limited, p.String()); err != nil {
			if now, ferr := dir.Find(r.Name); ferr != nil || !now.Alive || now.Process != r.Process {
				return none, false, nil
			}
			return none, true, fmt.Errorf("%s serves %s already, and the path cannot be added: %w; --duplicate-connect makes another device", r.Name, c.opts.NQN, err)
		}
	}
	status, err = client.Status(limited)
	return status, true, err
}

// hasPath reports whether a server uses an address.
func hasPath(s control.Status, r state.Record, a netip.AddrPort) bool {
	if len(s.Paths) == 0 { // it is connecting, or of an older build
		return r.Target.Address == a
	}
	return slices.ContainsFunc(s.Paths, func(p control.Path) bool {
		return p.TrAddr == a.Addr().String() && p.TrSvcID == fmt.Sprint(a.Port())
	})
}

// removePaths removes paths of servers.
func removePaths(cmd *cobra.Command, chosen []wanted, paths []string) error {
	var errs []error
	for _, w := range chosen {
		for _, r := range w.records {
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
			if _, err := options.ParsePath(r.Preferred); err != nil {
				return usage(fmt.Errorf("--preferred %q: want ADDRESS[,PORT[,HOST_TRADDR]] with numeric addresses", r.Preferred))
			}
		}
		return a.client.SetPolicy(a.ctx, r)
	}, func(cmd *cobra.Command, _ *asked) {
		cmd.Flags().StringVarP(&policy, "policy", "p", "", "`policy`: queue-depth, round-robin or preferred (required)")
		cmd.Flags().StringVar(&r.Preferred, "preferred", "", "`path` that is used while it can be, in the form of connect --path (default: the first)")
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
	client := control.NewClient(record.Socket())
	added := false
	for _, p := range s.paths {
		if hasPath(r.Status, record, p.to) {
			continue
		}
		path := options.Path{Address: p.to, Source: p.with.Connect.SourceAddr}
		limited, cancel := context.WithTimeout(ctx, p.with.Connect.Timeout)
		err := client.AddPath(limited, path.String())
		cancel()
		code := exit.Of(err)
		// What is no path to the same disks does not become one.
		r.Again = r.Again || code.MayPass() && code != exit.Negotiation && code != exit.NotFound
		switch {
		case err == nil:
			added = true
		case !r.Quiet:
			g.errs("%s: path %v is not used: %v", s.nqn, path, err)
		}
	}
	if !added {
		return
	}
	if now := statusOf(ctx, record); now.Name != "" {
		r.Status = now
	}
}

// checkPaths checks paths of a command line.
func checkPaths(paths []string) error {
	for _, p := range paths {
		if _, err := options.ParsePath(p); err != nil {
			return usage(fmt.Errorf("--path %q: want ADDRESS[,PORT[,HOST_TRADDR]] with numeric addresses", strings.TrimSpace(p)))
		}
	}
	return nil
}
