package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/discoverer"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

// statusTime is the time limit for a server's answer to a request for its status.
const statusTime = 2 * time.Second

func newList(runDir dirFunc) *cobra.Command {
	var format string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show servers and their devices",
		Long: `Shows the devices of all servers, and for each class how many queues were requested
and granted. "poll 1/0→default" means that one poll queue was requested, none was
granted, and the default queues serve its requests.

A server that died is shown as lost, with the devices that it left: recover starts
a server for them, and disconnect removes them. -v also shows the processes that stay
connected to discovery services (connect-all --persistent).

In JSON, "Devices" is that of nvme list: one object for each device, or, with -v, hosts
with their subsystems, controllers and namespaces. What is not known is null.
"controllers" and "discovery" have all details, with or without -v.`,
		Args: noArgs,
		RunE: verb("list", func(cmd *cobra.Command, _ []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			records, err := dir.List()
			if err != nil {
				return err
			}
			keepers, err := persistentServices(dir)
			if err != nil { // the rest can be shown
				cmd.PrintErrf("%s: list: %s\n", programName, output.Text(err.Error()))
			}
			return output.List(cmd.OutOrStdout(), statuses(cmd.Context(), records, "list", cmd.PrintErrf), keepers, format, verbose)
		}),
	}
	formatFlag(cmd.Flags(), &format)
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "show all details of each server")
	return cmd
}

// persistentServices are the processes that stay connected to discovery services.
func persistentServices(dir state.Dir) (all []output.Keeper, err error) {
	keepers, err := discoverer.Keepers(string(dir))
	for _, k := range keepers {
		o := output.Keeper{Name: k.Name, PID: k.Process.PID}
		for _, s := range k.Services {
			o.Services = append(o.Services, output.Service(s))
		}
		all = append(all, o)
	}
	return all, err
}

// statuses asks all servers for their status at the same time, for a command.
func statuses(ctx context.Context, records []state.Record, verb string, complain func(string, ...any)) []control.Status {
	found := make([]control.Status, len(records))
	var wg sync.WaitGroup
	for i, r := range records {
		if r.Err != nil {
			complain("%s: %s: %s: %s\n", programName, verb, output.Text(r.Name), output.Text(r.Err.Error()))
		}
		wg.Go(func() { found[i] = statusOf(ctx, r) })
	}
	wg.Wait()
	return found
}

// statusOf returns the status that a server reports, or a status made from its record
// if it does not answer.
func statusOf(ctx context.Context, r state.Record) control.Status {
	ctx, cancel := context.WithTimeout(ctx, statusTime)
	defer cancel()
	s := control.Status{
		SchemaVersion: control.SchemaVersion, Name: r.Name, PID: r.Process.PID,
		Transport: "rdma", NQN: r.Target.NQN, HostNQN: r.Target.HostNQN, Outages: control.Outages{Losses: map[string]int{}},
		Devices: []control.Device{}, Lanes: []control.Lane{},
	}
	if a := r.Target.Address; a.IsValid() {
		s.TrAddr, s.TrSvcID = a.Addr().String(), strconv.Itoa(int(a.Port()))
	}
	for _, d := range r.Devices {
		s.Devices = append(s.Devices, control.Device{
			Device: d.Name(), NSID: d.NSID, UUID: d.UUID, Size: d.Told.Size, BlockSize: d.Told.BlockSize, ReadOnly: d.Told.ReadOnly,
		})
	}
	switch {
	case r.Err != nil:
		s.State, s.Reason = "unknown", r.Err.Error()
	case !r.Alive:
		s.State, s.Reason = "lost", fmt.Sprintf("the server, process %d, has died", r.Process.PID)
	default:
		live, err := control.NewClient(r.Socket()).Status(ctx)
		if err == nil {
			return live
		}
		s.State, s.Reason = "unknown", err.Error()
		if errors.Is(err, context.DeadlineExceeded) {
			s.Reason = fmt.Sprintf("%s did not answer within %v", processOf(r), statusTime)
		}
	}
	return s
}
