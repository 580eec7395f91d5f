package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/server"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

// Bounds on disconnecting one server. With --force all of them together are
// below 5 s: asked, exited, killed, cleared.
const (
	orderlyTime = 30 * time.Second // a server's own bounds are shorter
	exitTime    = 5 * time.Second

	forcedTime = 3 * time.Second
	forcedExit = 300 * time.Millisecond
	killTime   = 300 * time.Millisecond
	clearTime  = 1200 * time.Millisecond
	clearRetry = 20 * time.Millisecond
)

func newDisconnect(runDir dirFunc) *cobra.Command {
	var nqns, devices []string
	var force bool
	cmd := &cobra.Command{
		Use:   "disconnect {-n NQN | -d DEVICE | NQN | DEVICE}…",
		Short: "End the servers of subsystems, and remove their devices",
		Long: `Ends the servers of a subsystem, by its NQN, or the server of a device: /dev/ublkb0,
ublkb0, or the name that list -v shows, as ctrl0. A server with a device in use
is left alone, unless --force is given: then users of the device get I/O errors,
and a server that does not end within seconds is killed. Either way it has
happened, or is refused, when this returns.

As with nvme-cli, it is no error if no server has the NQN; it is one if there is
no such device.`,
		RunE: verb("disconnect", func(cmd *cobra.Command, args []string) error {
			for _, a := range args {
				if isDevice(a) {
					devices = append(devices, a)
				} else {
					nqns = append(nqns, a)
				}
			}
			if len(nqns)+len(devices) == 0 {
				return usage(errors.New("nothing is given; want -n NQN or -d DEVICE"))
			}
			dir, err := runDir()
			if err != nil {
				return err
			}
			return disconnect(cmd, dir, nqns, devices, force)
		}),
	}
	f := cmd.Flags()
	f.StringSliceVarP(&nqns, "nqn", "n", nil, "NQN of the subsystem")
	f.StringSliceVarP(&devices, "device", "d", nil, "block device or server name")
	f.BoolVar(&force, "force", false, "even if a device is in use; returns within 5 s")
	complete := func(pick func(state.Record) []string) cobra.CompletionFunc {
		return func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			var words []string
			if dir, err := runDir(); err == nil {
				records, _ := dir.List() // a shell wants no errors
				for _, r := range records {
					words = append(words, pick(r)...)
				}
			}
			return words, cobra.ShellCompDirectiveNoFileComp
		}
	}
	byNQN := complete(func(r state.Record) []string { return []string{r.Target.NQN} })
	byDevice := complete(func(r state.Record) []string {
		names := []string{r.Name}
		for _, d := range r.Devices {
			names = append(names, d.Path())
		}
		return names
	})
	cobra.CheckErr(cmd.RegisterFlagCompletionFunc("nqn", byNQN))
	cobra.CheckErr(cmd.RegisterFlagCompletionFunc("device", byDevice))
	cmd.ValidArgsFunction = byNQN
	return cmd
}

// isDevice tells a device or a server from an NQN.
func isDevice(s string) bool {
	s = strings.TrimPrefix(s, "/dev/")
	for _, prefix := range []string{"ublkb", "ublkc", "ctrl"} {
		if n, ok := strings.CutPrefix(s, prefix); ok {
			if _, err := strconv.ParseUint(n, 10, 32); err == nil {
				return true
			}
		}
	}
	return false
}

// disconnect ends what was named, as much as it can, and reports the first
// thing that it could not.
func disconnect(cmd *cobra.Command, dir state.Dir, nqns, devices []string, force bool) error {
	records, err := dir.List()
	if err != nil {
		return err
	}
	var errs []error
	// each counts, per NQN, the servers that it ended.
	each := func(nqn string, match func(state.Record) bool) {
		n := 0
		for _, r := range records {
			if !match(r) {
				continue
			}
			if err := end(cmd.Context(), dir, r, force); err != nil {
				errs = append(errs, err)
				continue
			}
			n++
		}
		fmt.Fprintf(cmd.OutOrStdout(), "NQN:%s disconnected %d controller(s)\n", nqn, n)
	}
	for _, nqn := range nqns {
		each(nqn, func(r state.Record) bool { return r.Target.NQN == nqn })
	}
	for _, name := range devices {
		i := slices.IndexFunc(records, func(r state.Record) bool { return serves(r, name) })
		if i < 0 {
			errs = append(errs, exit.Errorf(exit.NotFound, "%s: no server has such a device", name))
			continue
		}
		each(records[i].Target.NQN, func(r state.Record) bool { return r.Name == records[i].Name })
	}
	return errors.Join(errs...)
}

// serves says whether a device, or the server itself, has a name.
func serves(r state.Record, name string) bool {
	name = strings.TrimPrefix(name, "/dev/")
	return r.Name == name || slices.ContainsFunc(r.Devices, func(d state.Device) bool {
		id := strconv.Itoa(d.ID)
		return name == "ublkb"+id || name == "ublkc"+id
	})
}

// end ends a server and returns when it has ended.
func end(ctx context.Context, dir state.Dir, r state.Record, force bool) error {
	err := endServer(ctx, r, force)
	if err != nil {
		return fmt.Errorf("%s: %w", r.Name, err)
	}
	if err := clearUp(ctx, dir, r); err != nil {
		return fmt.Errorf("%s: %w", r.Name, err)
	}
	return nil
}

// endServer asks the server to end, and waits for it. With force it does not
// ask twice.
func endServer(ctx context.Context, r state.Record, force bool) error {
	p, err := r.Process.Open()
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	limit, patience := orderlyTime, exitTime
	if force {
		limit, patience = forcedTime, forcedExit
	}
	asked, cancel := context.WithTimeout(ctx, limit)
	err = control.NewClient(r.Socket()).Disconnect(asked, force)
	cancel()
	if err != nil && !force && p.Wait(expired) != nil {
		if exit.Of(err) == exit.Busy {
			return fmt.Errorf("%w; --force ends it all the same", err)
		}
		return err
	}
	if wait(ctx, p, patience) == nil {
		return nil
	}
	if !force {
		return exit.Errorf(exit.Timeout, "process %d does not end", r.Process.PID)
	}
	if err := p.Kill(); err != nil {
		return fmt.Errorf("kill process %d: %w", r.Process.PID, err)
	}
	if wait(ctx, p, killTime) != nil {
		return exit.Errorf(exit.Timeout, "process %d does not die", r.Process.PID)
	}
	return nil
}

// expired is for a look without waiting.
var expired = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

func wait(ctx context.Context, p *state.Handle, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return p.Wait(ctx)
}

// clearUp takes away what the server left, if anything. The kernel may take a
// moment after its end.
func clearUp(ctx context.Context, dir state.Dir, r state.Record) error {
	ctx, cancel := context.WithTimeout(ctx, clearTime)
	defer cancel()
	for {
		done, err := server.Clear(ctx, dir, r.Name, slog.New(slog.DiscardHandler))
		switch {
		case err != nil && ctx.Err() == nil:
			return err
		case done:
			return nil
		}
		select {
		case <-time.After(clearRetry):
		case <-ctx.Done():
			return exit.Errorf(exit.Busy, "its devices are still there")
		}
	}
}
