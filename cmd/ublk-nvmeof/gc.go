package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/server"
)

func newGC(runDir dirFunc) *cobra.Command {
	var dry bool
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove what dead servers left and nobody can use any more",
		Long: `Removes ublk devices whose server died and that cannot be recovered, and the records
of servers that no longer exist. Only devices that this program added are removed.
Devices that wait for a server are kept (recover starts one, disconnect removes
them), and so are sockets whose clients may wait for a server, and open devices.`,
		Args: noArgs,
		RunE: verb("gc", func(cmd *cobra.Command, _ []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			found, err := server.Collect(cmd.Context(), dir, !dry)
			if err != nil {
				return err
			}
			var errs []error
			for _, f := range found {
				did := "kept"
				switch {
				case f.Err != nil:
					errs = append(errs, f.Err)
				case f.Remove && dry:
					did = "would remove"
				case f.Remove:
					did = "removed"
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s: %s\n", did, f.What, f.Why)
			}
			return errors.Join(errs...)
		}),
	}
	cmd.Flags().BoolVarP(&dry, "dry-run", "n", false, "only say what would be removed")
	return cmd
}
