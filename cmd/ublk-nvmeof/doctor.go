package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/doctor"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/identity"
)

func newDoctor(runDir dirFunc) *cobra.Command {
	opts := options.Default()
	var format string
	cmd := &cobra.Command{
		Use:   "doctor [-a ADDRESS [-n NQN]]",
		Short: "Look for what keeps this host from connecting, and say what to do",
		Long: `Checks this host: its kernel, the ublk driver, limits, its identity and its network. Each
check is one line: ok, warn or fail, what was found, and what to do.

With -a, it also looks at the route to the target, connects to its discovery service,
and with -n to the subsystem, step by step, and names the step that fails. It makes no
device, and the connections end with the command.

The flags are those of connect: to find out why a connect fails, replace the verb. If
something failed, the exit code is the one that connect would have.`,
		Args: noArgs,
		RunE: verb("doctor", func(cmd *cobra.Command, _ []string) error {
			if err := usage(opts.CompleteHost(identity.Sources{}.ReadOnly())); err != nil {
				return err
			}
			ctx, stop := interruptible(endSignals...)
			defer stop()
			within, cancel := context.WithTimeout(ctx, opts.Timeout)
			defer cancel()
			results := doctor.Run(within, doctor.This(opts, liveServers(within, runDir)))
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := output.Doctor(cmd.OutOrStdout(), results, format); err != nil {
				return err
			}
			return verdict(results)
		}),
	}
	f := cmd.Flags()
	opts.AddFlags(f)
	f.Lookup("traddr").Usage = "address or host name of a target to connect to (default: only this host is checked)"
	f.Lookup("nqn").Usage = "NQN of the subsystem to connect to (default: only the discovery service)"
	formatFlag(f, &format)
	return cmd
}

// liveServers returns the servers that answer. A run directory that cannot be used has none.
func liveServers(ctx context.Context, runDir dirFunc) (live []control.Status) {
	dir, err := runDir()
	if err != nil {
		return nil
	}
	records, err := dir.List()
	if err != nil {
		return nil
	}
	for _, r := range records {
		if r.Alive && r.Err == nil {
			live = append(live, statusOf(ctx, r))
		}
	}
	return live
}

// verdict is the error for the checks that failed, with the code of the first one.
func verdict(results []doctor.Result) error {
	var failed []string
	code := exit.OK
	for _, r := range results {
		if r.Status == doctor.Fail {
			failed = append(failed, r.Check)
			if code == exit.OK {
				code = r.Code
			}
		}
	}
	if len(failed) == 0 {
		return nil
	}
	return exit.Errorf(code, "failed: %s", strings.Join(failed, ", "))
}
