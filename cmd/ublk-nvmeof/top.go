package main

import (
	"context"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
)

// clearScreen moves the cursor to the upper left corner and clears what follows.
const clearScreen = "\x1b[H\x1b[J"

func newTop(runDir dirFunc) *cobra.Command {
	var format string
	interval, count := time.Second, 0
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show what servers, devices and loops are doing",
		Long: `Shows the rates of all devices, and how their loops spend the time, once in each
interval until it is interrupted. On a terminal each sample replaces the one before.
Otherwise samples follow each other. With -o json there is one sample.

P50 and P99 are estimates, because about one request in 64 is timed.`,
		Args: noArgs,
		RunE: verb("top", func(cmd *cobra.Command, _ []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			if format == output.JSON {
				count = 1
			}
			ctx, stop := interruptible(syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			look := func() (output.Sample, error) {
				records, err := dir.List()
				if err != nil {
					return output.Sample{}, err
				}
				return output.Sample{Time: time.Now(), Servers: statuses(ctx, records, "top", cmd.PrintErrf)}, nil
			}
			return watch(ctx, cmd.OutOrStdout(), look, interval, count, format)
		}),
	}
	formatFlag(cmd.Flags(), &format)
	cmd.Flags().Var(options.Interval(&interval), "interval", "time between two samples")
	cmd.Flags().Var(options.Count(&count), "count", "number of samples (default: no limit)")
	return cmd
}

// watch writes count samples, or samples until ctx is done if count is 0.
func watch(ctx context.Context, out io.Writer, look func() (output.Sample, error), interval time.Duration, count int, format string) error {
	last, err := look()
	if err != nil {
		return err
	}
	terminal := isTerminal(out)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for n := 0; count == 0 || n < count; n++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		now, err := look()
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil // servers may not have been asked
		}
		if terminal && format != output.JSON {
			if _, err := io.WriteString(out, clearScreen); err != nil {
				return err
			}
		}
		if err := output.Top(out, last, now, format); err != nil {
			return err
		}
		last = now
	}
	return nil
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
