package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

func newRecover(runDir dirFunc) *cobra.Command {
	var all bool
	var format string
	cmd := &cobra.Command{
		Use:   "recover {--all | NQN | DEVICE…}",
		Short: "Start a server for the devices of one that died",
		Long: `Starts a new server in place of one that died, with the same flags. The new server
connects again, takes over the devices, and serves the requests that wait. The dead
server is given by the NQN of its subsystem, by one of its devices, or by its name,
such as ctrl0 (see list -v). connect to the same target does the same.`,
		RunE: verb("recover", func(cmd *cobra.Command, args []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			records, err := dead(dir, all, args)
			if err != nil {
				return err
			}
			var errs []error
			for _, r := range records {
				if err := serveOn(cmd, dir, r, format); err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", r.Name, err))
				}
			}
			return errors.Join(errs...)
		}),
	}
	cmd.Flags().BoolVar(&all, "all", false, "recover all servers that died")
	formatFlag(cmd.Flags(), &format)
	return cmd
}

// dead are the records of dead servers that a command line names.
func dead(dir state.Dir, all bool, names []string) ([]state.Record, error) {
	if all == (len(names) > 0) {
		return nil, usage(errors.New("want --all, or what to recover"))
	}
	records, err := dir.List()
	if err != nil {
		return nil, err
	}
	if all {
		return slices.DeleteFunc(records, func(r state.Record) bool { return r.Alive || r.Err != nil }), nil
	}
	var chosen []state.Record
	for _, name := range names {
		i := slices.IndexFunc(records, func(r state.Record) bool {
			return serves(r, name) || r.Err == nil && r.Target.NQN == name && !r.Alive
		})
		switch {
		case i < 0:
			return nil, exit.Errorf(exit.NotFound, "%s: no dead server has it", name)
		case records[i].Err != nil:
			return nil, fmt.Errorf("%s: %w", name, records[i].Err)
		case records[i].Alive:
			return nil, exit.Errorf(exit.AlreadyServed, "%s: %s serves it, process %d", name, records[i].Name, records[i].Process.PID)
		}
		chosen = append(chosen, records[i])
	}
	return chosen, nil
}

// serveOn starts a server with a dead one's flags.
func serveOn(cmd *cobra.Command, dir state.Dir, r state.Record, format string) error {
	_ = host.SetIOFlusher() // the server says if it is not
	args := append([]string{programName, "serve", "--run-dir=" + string(dir)}, r.Args...)
	s, err := launch(self(), args, options.Default().Timeout)
	if err != nil {
		return err
	}
	return output.Connected(cmd.OutOrStdout(), s, format, false)
}
