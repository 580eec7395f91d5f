package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

func newRecover(runDir dirFunc) *cobra.Command {
	var all bool
	r := restart{}
	cmd := &cobra.Command{
		Use:   "recover {--all | NQN | DEVICE…}",
		Short: "Start a server for the devices of one that died",
		Long: `Starts a new server in place of one that died, with the same flags. The new server
connects again, waits until the target has ended the controllers of the dead server,
takes over the devices, and serves the requests that wait. The dead server is given by
the NQN of its subsystem, by one of its devices, or by its name, such as ctrl0 (see
list -v). connect to the same target does the same.

The target ends the controllers of a dead server two or three keep alive timeouts
after it died at the latest. The command says so if it has to wait for that.

A device is recovered only with the namespace that it was made for. What cannot be
recovered stays as it is, and recover can be tried again. disconnect gives it up.`,
		RunE: verb("recover", func(cmd *cobra.Command, args []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			records, errs := dead(dir, all, args)
			if !all && len(errs) > 0 {
				return errors.Join(errs...)
			}
			return errors.Join(append(errs, r.each(cmd, dir, "--recover=", records)...)...)
		}),
	}
	cmd.Flags().BoolVar(&all, "all", false, "recover all servers that died, several at the same time")
	r.addFlags(cmd.Flags())
	return cmd
}

// dead returns the records of the dead servers that a command line names, each once.
// Its errors are about names without a server, servers that have not died, and records
// that cannot be read.
func dead(dir state.Dir, all bool, names []string) ([]state.Record, []error) {
	if all == (len(names) > 0) {
		return nil, []error{usage(errors.New("want --all, or the NQN of a subsystem, a device or the name of a server"))}
	}
	records, err := dir.List()
	if err != nil {
		return nil, []error{err}
	}
	var chosen []state.Record
	var errs []error
	take := func(r state.Record) {
		switch {
		case slices.ContainsFunc(chosen, func(c state.Record) bool { return c.Name == r.Name }):
		case r.Err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", r.Name, r.Err))
		default:
			chosen = append(chosen, r)
		}
	}
	if all {
		for _, r := range records {
			if !r.Alive {
				take(r)
			}
		}
		return chosen, errs
	}
	for _, name := range names {
		found := deadOf(records, name)
		if len(found) == 0 {
			errs = append(errs, noDead(records, name))
		}
		for _, r := range found {
			take(r)
		}
	}
	return chosen, errs
}

// deadOf returns the records of the dead servers with a name: that of the server or of
// one of its devices, or the NQN.
func deadOf(records []state.Record, name string) []state.Record {
	return slices.DeleteFunc(slices.Clone(records), func(r state.Record) bool {
		return r.Alive || !serves(r, name) && r.Target.NQN != name
	})
}

// noDead returns the error for a name without a dead server.
func noDead(records []state.Record, name string) error {
	for _, r := range records {
		if r.Alive && serves(r, name) {
			return exit.Errorf(exit.AlreadyServed, "%s: its server, %s, has not died (process %d); if it has given up its target (dead in list), disconnect and connect make the device anew", name, r.Name, r.Process.PID)
		}
	}
	return exit.Errorf(exit.NotFound, "%s: no dead server has this name, device or NQN", name)
}
