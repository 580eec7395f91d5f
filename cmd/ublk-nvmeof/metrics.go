package main

import (
	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/metrics"
)

func newMetrics(runDir dirFunc) *cobra.Command {
	return &cobra.Command{
		Use:   "metrics",
		Short: "Write the metrics of all servers for Prometheus",
		Long: `Asks all servers for their counters and writes them in Prometheus' text format. The
label "server" tells the servers apart. A server that died has ublk_nvmeof_up 0.

Each server can also serve its own metrics: at /metrics on its control socket, and
with connect --metrics-listen at an address. docs/metrics.md describes the metrics.`,
		Args: noArgs,
		RunE: verb("metrics", func(cmd *cobra.Command, _ []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			records, err := dir.List()
			if err != nil {
				return err
			}
			return metrics.Write(cmd.OutOrStdout(), statuses(cmd.Context(), records, "metrics", cmd.PrintErrf))
		}),
	}
}
