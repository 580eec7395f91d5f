package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/discoverer"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/identity"
)

func newDiscover() *cobra.Command {
	opts := options.DefaultDiscovery()
	var format string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "discover -a ADDRESS",
		Short: "Show what a discovery service lists",
		Long: `Reads the log of a discovery service and shows its entries: the subsystems that this
host may use, and other services. The output is that of "nvme discover", as text and as
JSON. The connection ends with the command.

Without -a, the services of /etc/nvme/discovery.conf and of the configuration of nvme-cli
(-J) are asked, one after the other.`,
		Args: noArgs,
		RunE: verb("discover", func(cmd *cobra.Command, _ []string) error {
			if err := usage(opts.Complete(identity.Sources{})); err != nil {
				return err
			}
			ctx, stop := interruptible(endSignals...)
			defer stop()
			return discover(ctx, cmd, opts, format, verbose)
		}),
	}
	f := cmd.Flags()
	opts.AddDiscoverFlags(f)
	formatFlag(f, &format)
	f.BoolVarP(&verbose, "verbose", "v", false, "log what happens to standard error")
	return cmd
}

// discover shows the log of each service.
func discover(ctx context.Context, cmd *cobra.Command, opts *options.Discovery, format string, verbose bool) (err error) {
	log := slog.New(slog.DiscardHandler)
	if verbose {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	client := discoverer.New(log)
	defer func() { err = errors.Join(err, client.Close()) }()
	services, err := discoverer.Services(opts)
	if err != nil {
		return err
	}
	var errs []error
	for _, s := range services.Discovery {
		within, cancel := context.WithTimeout(ctx, s.Options.Connect.Timeout)
		log, err := client.Read(within, s.Options)
		cancel()
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			errs = append(errs, s.Error(err))
			continue
		}
		if err := output.Discovery(cmd.OutOrStdout(), log, format); err != nil {
			return err
		}
	}
	for _, s := range services.Skipped {
		fmt.Fprintf(cmd.ErrOrStderr(), "%s: discover: %s\n", programName, output.Text(s.Error()))
	}
	return errors.Join(append(errs, services.Errors...)...)
}
