package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

func newUpgrade(runDir dirFunc) *cobra.Command {
	r := restart{}
	cmd := &cobra.Command{
		Use:   "upgrade {NQN | DEVICE}…",
		Short: "Replace running servers by this program",
		Long: `Starts a server of this program with the flags of a running server, whose devices
it takes over. The new server connects first. The old server then releases the
devices and ends, and the new one continues to serve them. Users of the devices
wait for a moment. If the new server cannot connect, the old one continues.

The running server is given by the NQN of its subsystem, by one of its devices, or
by its name, such as ctrl0 (see list -v). The new server runs in the background, even
if the old one ran in a terminal. If a service manager runs the old server, the new one
becomes the main process of the same service.`,
		Args: wantArgs(1, math.MaxInt),
		RunE: verb("upgrade", func(cmd *cobra.Command, args []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			records, err := running(dir, args)
			if err != nil {
				return err
			}
			return errors.Join(r.each(cmd, dir, succeed, records)...)
		}),
	}
	r.addFlags(cmd.Flags())
	return cmd
}

// running returns the records of the running servers that a command line names, each
// once.
func running(dir state.Dir, names []string) ([]state.Record, error) {
	records, err := dir.List()
	if err != nil {
		return nil, err
	}
	var chosen []state.Record
	for _, name := range names {
		found := slices.DeleteFunc(slices.Clone(records), func(r state.Record) bool {
			return !r.Alive || r.Err != nil || !serves(r, name) && r.Target.NQN != name
		})
		if len(found) == 0 {
			return nil, exit.Errorf(exit.NotFound, "%s: no running server has this name, device or NQN", name)
		}
		for _, r := range found {
			if !slices.ContainsFunc(chosen, func(c state.Record) bool { return c.Name == r.Name }) {
				chosen = append(chosen, r)
			}
		}
	}
	return chosen, nil
}

// takeoverPoll is how often upgrade looks whether a new server serves all devices.
const takeoverPoll = 50 * time.Millisecond

// replaceManaged has a server that a service manager runs start this program in its place,
// so that the new server is part of the same service. It returns the new server's status.
func replaceManaged(ctx context.Context, dir state.Dir, r state.Record) (control.Status, error) {
	program, err := os.Executable()
	if err != nil {
		return control.Status{}, fmt.Errorf("find this program: %w", err)
	}
	pid, err := control.NewClient(r.Socket()).Replace(ctx, program)
	if err != nil {
		return control.Status{}, err
	}
	for {
		now, err := dir.Find(r.Name)
		switch {
		case err != nil:
			return control.Status{}, err
		case now.Process.PID == pid && !now.Alive:
			return control.Status{}, exit.Errorf(exit.Other, "the new server, process %d, died while it took over; the log of its service says why, and recover starts another", pid)
		case now.Process.PID == pid && now.Phase == state.Live:
			return control.NewClient(now.Socket()).Status(ctx)
		}
		select {
		case <-time.After(takeoverPoll):
		case <-ctx.Done():
			return control.Status{}, exit.Errorf(exit.Timeout, "the new server, process %d, has not taken over in time", pid)
		}
	}
}
