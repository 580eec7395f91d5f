package main

import (
	"io"
	"slices"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

func newListSubsys(runDir dirFunc) *cobra.Command {
	return newTree(runDir, "list-subsys [DEVICE]", "Show subsystems and the paths to them", output.Subsystems)
}

func newShowTopology(runDir dirFunc) *cobra.Command {
	return newTree(runDir, "show-topology [DEVICE]", "Show subsystems, their namespaces, and the path to each", output.Topology)
}

// newTree makes a verb that shows all servers in the order of their subsystems, or those of
// one subsystem.
func newTree(runDir dirFunc, use, short string, show func(io.Writer, []control.Status, string) error) *cobra.Command {
	var format string
	name := firstField(use)
	cmd := &cobra.Command{
		Use: use, Short: short,
		Long: short + `. With a device, an NQN, or the name of a server, only its
subsystem is shown.`,
		Args: wantArgs(0, 1),
		RunE: verb(name, func(cmd *cobra.Command, args []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			records, err := dir.List()
			if err != nil {
				return err
			}
			if len(args) == 1 {
				if records = sameSubsystem(records, args[0]); len(records) == 0 {
					return exit.Errorf(exit.NotFound, "%s: no server has it", args[0])
				}
			}
			return show(cmd.OutOrStdout(), statuses(cmd.Context(), records, name, cmd.PrintErrf), format)
		}),
	}
	formatFlag(cmd.Flags(), &format)
	cmd.ValidArgsFunction = completeDevices(runDir)
	return cmd
}

// sameSubsystem are the records of the subsystem that a name means.
func sameSubsystem(records []state.Record, name string) []state.Record {
	nqn := name
	if i := slices.IndexFunc(records, func(r state.Record) bool { return r.Err == nil && serves(r, name) }); i >= 0 {
		nqn = records[i].Target.NQN
	}
	return slices.DeleteFunc(slices.Clone(records), func(r state.Record) bool { return r.Err != nil || r.Target.NQN != nqn })
}
