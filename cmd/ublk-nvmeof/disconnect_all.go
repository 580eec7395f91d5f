package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/discoverer"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

func newDisconnectAll(runDir dirFunc) *cobra.Command {
	var force, verbose bool
	transport := "rdma"
	cmd := &cobra.Command{
		Use:   "disconnect-all",
		Short: "End all servers, and remove their devices",
		Long: `Ends all servers, as disconnect does: a server whose device is in use is not ended
unless --force is given. Processes that stay connected to discovery services (connect-all
--persistent) are ended first. What cannot be ended does not keep the rest from being
ended.`,
		Args: noArgs,
		RunE: verb("disconnect-all", func(cmd *cobra.Command, _ []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			return disconnectAll(cmd, dir, force, verbose)
		}),
	}
	f := cmd.Flags()
	f.VarP(options.OneOf(&transport, "rdma"), "transport", "r", "transport type of the servers to end")
	f.BoolVar(&force, "force", false, "end servers even if a device is in use, and return within 5 s")
	f.BoolVarP(&verbose, "verbose", "v", false, "say what was ended")
	return cmd
}

// disconnectAll ends every server, as much as it can, and reports what it could not.
func disconnectAll(cmd *cobra.Command, dir state.Dir, force, verbose bool) error {
	began := time.Now()
	keepers, err := discoverer.Keepers(string(dir))
	if err != nil {
		return err
	}
	var errs []error
	for _, k := range keepers {
		switch err := endKeeper(cmd.Context(), k); {
		case err != nil:
			errs = append(errs, err)
		case verbose:
			fmt.Fprintf(cmd.OutOrStdout(), "%s ended\n", k.Name)
		}
	}
	records, err := dir.List() // now that no keeper connects one more
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	var chosen []wanted
	for _, r := range records {
		if r.Err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.Name, r.Err))
			continue
		}
		chosen = append(chosen, wanted{nqn: r.Target.NQN, records: []state.Record{r}})
	}
	for i, results := range endAll(cmd, dir, chosen, force, began) {
		name := chosen[i].records[0].Name
		switch err := results[0]; {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		case verbose:
			fmt.Fprintf(cmd.OutOrStdout(), "%s disconnected from %s\n", name, output.Text(chosen[i].nqn))
		}
	}
	return errors.Join(errs...)
}

// keeperTime is how long a keeper may take to end. It may be about to connect a subsystem.
const keeperTime = 10 * time.Second

// endKeeper ends a process that stays connected to discovery services.
func endKeeper(ctx context.Context, k discoverer.Keeper) error {
	ctx, cancel := context.WithTimeout(ctx, keeperTime)
	defer cancel()
	if err := k.End(ctx); err != nil {
		return fmt.Errorf("%s, process %d: %w", k.Name, k.Process.PID, err)
	}
	return nil
}
