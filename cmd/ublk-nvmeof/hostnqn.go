package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"ublk-nvmeof/identity"
)

func newGenHostNQN() *cobra.Command {
	return &cobra.Command{
		Use:   "gen-hostnqn",
		Short: "Make an NQN for this host, and write it to standard output",
		Long: `Makes an NQN of the identifier that the firmware of this machine has, or of a random
one. To use it, write it to /etc/nvme/hostnqn.`,
		Args: noArgs,
		RunE: verb("gen-hostnqn", func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), identity.GenerateHostNQN(identity.Sources{}))
			return err
		}),
	}
}

func newShowHostNQN() *cobra.Command {
	return &cobra.Command{
		Use:   "show-hostnqn",
		Short: "Show the NQN that connect uses for this host",
		Args:  noArgs,
		RunE: verb("show-hostnqn", func(cmd *cobra.Command, _ []string) error {
			nqn, err := identity.HostNQN(identity.Sources{})
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), nqn)
			return err
		}),
	}
}
