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
	"sync"
	"time"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/discoverer"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/server"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

// orderlyTime is the time limit for a server to end its devices in order. Its own limits
// are shorter. Tests shorten it.
var orderlyTime = 30 * time.Second

// Time limits for the steps after that, and the pause between two attempts to clear up
const (
	exitTime   = 5 * time.Second
	clearTime  = 5 * time.Second
	clearRetry = 20 * time.Millisecond
)

// Deadlines of the steps of disconnect --force, from its beginning. They apply to all
// servers at the same time, so that the command always returns within 5 s.
const (
	probedBy  = 800 * time.Millisecond  // a server that has not answered is killed
	askedBy   = 3000 * time.Millisecond // a server that has not ended by itself is killed
	diedBy    = 3700 * time.Millisecond
	clearedBy = 4400 * time.Millisecond
)

func newDisconnect(runDir dirFunc) *cobra.Command {
	var nqns, devices, paths []string
	var force bool
	cmd := &cobra.Command{
		Use:   "disconnect {-n NQN | -d DEVICE | NQN | DEVICE}…",
		Short: "End the servers of subsystems, and remove their devices",
		Long: `Ends all servers of a subsystem, given by its NQN, or the server of one device. A
device is given as /dev/ublkb0, ublkb0, /dev/nbd0 or an NBD URI; the name of a
server, such as ctrl0, is accepted as well (see list -v), and that of a process that stays
connected to discovery services, such as discovery0.

A server whose device is in use is not ended unless --force is given. With --force
the users of the device get I/O errors, and a server that does not end within
seconds is killed. When the command returns, the server has ended, or the error
says why it has not. A server that does not answer is given up after 30 s.

With --path, only a path of a server is removed. The last path goes only with the devices.

As with nvme-cli, it is no error if no server has the NQN. It is an error if there
is no such device.`,
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
			if err := checkPaths(paths); err != nil {
				return err
			}
			dir, err := runDir()
			if err != nil {
				return err
			}
			return disconnect(cmd, dir, nqns, devices, paths, force)
		}),
	}
	f := cmd.Flags()
	f.StringArrayVarP(&nqns, "nqn", "n", nil, "`NQN` of the subsystem; may be repeated")
	f.StringArrayVarP(&devices, "device", "d", nil, "block `device`, NBD URI or name of a server; may be repeated")
	f.StringArrayVar(&paths, "path", nil, "remove only the path to an address, `ADDRESS[,PORT[,HOST_TRADDR]]`, and leave the devices; may be repeated")
	f.BoolVar(&force, "force", false, "end the server even if a device is in use, and return within 5 s")
	byNQN := completeServers(runDir, func(r state.Record) []string { return []string{r.Target.NQN} })
	cobra.CheckErr(cmd.RegisterFlagCompletionFunc("nqn", byNQN))
	cobra.CheckErr(cmd.RegisterFlagCompletionFunc("device", completeDevices(runDir)))
	cmd.ValidArgsFunction = byNQN
	return cmd
}

// completeServers completes words that servers are known by.
func completeServers(runDir dirFunc, pick func(state.Record) []string) cobra.CompletionFunc {
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

// completeDevices completes the names of servers and devices.
func completeDevices(runDir dirFunc) cobra.CompletionFunc {
	return completeServers(runDir, func(r state.Record) []string {
		names := []string{r.Name}
		for _, d := range r.Devices {
			names = append(names, d.Path())
		}
		return names
	})
}

// isDevice reports whether s names a device or a server, and not a subsystem.
func isDevice(s string) bool {
	if scheme, _, ok := strings.Cut(s, "://"); ok && slices.Contains([]string{"nbd", "nbds", "nbd+unix", "nbds+unix"}, scheme) {
		return true
	}
	s = strings.TrimPrefix(s, "/dev/")
	for _, prefix := range []string{"ublkb", "ublkc", "nbd", "ctrl", "discovery"} {
		if n, ok := strings.CutPrefix(s, prefix); ok {
			if _, err := strconv.ParseUint(n, 10, 32); err == nil {
				return true
			}
		}
	}
	return false
}

// wanted holds the servers that an argument names: all servers of an NQN, or the server
// of a device.
type wanted struct {
	nqn     string
	records []state.Record
}

// choose returns the servers that a command line names, each once. Its errors are about
// names without a server, and about records that cannot be read.
func choose(records []state.Record, nqns, devices []string) (chosen []wanted, errs []error) {
	taken := map[string]bool{}
	take := func(w wanted, match func(state.Record) bool) wanted {
		for _, r := range records {
			if match(r) && !taken[r.Name] {
				taken[r.Name] = true
				w.records = append(w.records, r)
			}
		}
		return w
	}
	for _, nqn := range nqns {
		chosen = append(chosen, take(wanted{nqn: nqn}, func(r state.Record) bool { return r.Err == nil && r.Target.NQN == nqn }))
	}
	for _, name := range devices {
		i := slices.IndexFunc(records, func(r state.Record) bool { return serves(r, name) })
		switch {
		case i < 0:
			errs = append(errs, exit.Errorf(exit.NotFound, "%s: no server has such a device", name))
		case records[i].Err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", name, records[i].Err))
		case !taken[records[i].Name]:
			chosen = append(chosen, take(wanted{nqn: records[i].Target.NQN}, func(r state.Record) bool { return r.Name == records[i].Name }))
		}
	}
	return chosen, errs
}

// disconnect ends all named servers at the same time. It reports those that it could
// not end.
func disconnect(cmd *cobra.Command, dir state.Dir, nqns, devices, paths []string, force bool) error {
	began := time.Now()
	records, err := dir.List()
	if err != nil {
		return err
	}
	if len(paths) > 0 {
		chosen, errs := choose(records, nqns, devices)
		return errors.Join(append(errs, removePaths(cmd, chosen, paths))...)
	}
	devices, keeperErrs := endKeepers(cmd, dir, devices)
	chosen, errs := choose(records, nqns, devices)
	errs = append(errs, keeperErrs...)
	results := endAll(cmd, dir, chosen, force, began)
	for i, w := range chosen {
		n := 0
		for j, err := range results[i] {
			if err == nil {
				n++
				continue
			}
			errs = append(errs, fmt.Errorf("%s: %w", w.records[j].Name, err))
		}
		fmt.Fprintf(cmd.OutOrStdout(), "NQN:%s disconnected %d controller(s)\n", output.Text(w.nqn), n)
	}
	return errors.Join(errs...)
}

// endKeepers ends the processes among the names that stay connected to discovery services.
// It returns the other names.
func endKeepers(cmd *cobra.Command, dir state.Dir, names []string) (others []string, errs []error) {
	keepers, err := discoverer.Keepers(string(dir))
	if err != nil {
		return names, []error{err}
	}
	for _, name := range names {
		i := slices.IndexFunc(keepers, func(k discoverer.Keeper) bool { return k.Name == name })
		if i < 0 {
			others = append(others, name)
			continue
		}
		if err := endKeeper(cmd.Context(), keepers[i]); err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s ended\n", name)
	}
	return others, errs
}

// endAll ends servers, all at the same time, and returns an error for each.
func endAll(cmd *cobra.Command, dir state.Dir, chosen []wanted, force bool, began time.Time) [][]error {
	results := make([][]error, len(chosen))
	tell := say(cmd)
	var wg sync.WaitGroup
	for i, w := range chosen {
		results[i] = make([]error, len(w.records))
		for j, r := range w.records {
			wg.Go(func() {
				if force {
					results[i][j] = endByForce(cmd.Context(), dir, r, began)
				} else {
					results[i][j] = end(cmd.Context(), dir, r, tell)
				}
			})
		}
	}
	wg.Wait()
	return results
}

// serves reports whether name is that of the server or of one of its devices. Programs for
// nvme-cli put /dev/ before the name of a controller, too.
func serves(r state.Record, name string) bool {
	return r.Name == strings.TrimPrefix(name, "/dev/") || r.Listen != "" && r.Listen == name ||
		slices.ContainsFunc(r.Devices, func(d state.Device) bool { return called(d, name) })
}

// called reports whether a device has a name.
func called(d state.Device, name string) bool {
	name = strings.TrimPrefix(name, "/dev/")
	return name == d.Name() || d.Kind == state.Ublk && name == "ublkc"+strconv.Itoa(d.ID)
}

// end ends a server in order, and returns when it has ended. It tells the user if that
// takes long.
func end(ctx context.Context, dir state.Dir, r state.Record, tell func(string)) error {
	p, err := r.Process.Open()
	switch {
	case errors.Is(err, os.ErrProcessDone):
		return clearUp(ctx, dir, r, server.EndUnused, time.Now().Add(clearTime))
	case err != nil:
		return err
	}
	defer p.Close()
	told := later(sayAfter, func() {
		tell(fmt.Sprintf("%s waits up to %v until %s has ended its devices; --force does not wait", r.Name, orderlyTime, processOf(r)))
	})
	err = askInOrder(ctx, r)
	told()
	switch {
	case exit.Of(err) == exit.Busy:
		return fmt.Errorf("%w; --force ends the server nevertheless", err)
	case err != nil && waitUntil(ctx, p, time.Now()) != nil:
		return err
	case waitUntil(ctx, p, time.Now().Add(exitTime)) != nil:
		if holder := dir.LockHolder(); holder != "" {
			return exit.Errorf(exit.Timeout, "%s does not end: %s has locked run directory %s; --force kills the server", processOf(r), holder, dir)
		}
		return exit.Errorf(exit.Timeout, "%s does not end; --force kills it", processOf(r))
	}
	return clearUp(ctx, dir, r, server.EndUnused, time.Now().Add(clearTime))
}

// askInOrder asks a server to end in order, and waits until it has.
func askInOrder(ctx context.Context, r state.Record) error {
	limited, cancel := context.WithTimeout(ctx, orderlyTime)
	defer cancel()
	err := control.NewClient(r.Socket()).Disconnect(limited, false)
	if errors.Is(err, context.DeadlineExceeded) {
		return exit.Errorf(exit.Timeout, "%s did not answer within %v; --force kills it", processOf(r), orderlyTime)
	}
	return err
}

// processOf describes the process of a server, and says whether it is stopped.
func processOf(r state.Record) string {
	if r.Process.Stopped() {
		return fmt.Sprintf("process %d (which is stopped; SIGCONT continues it)", r.Process.PID)
	}
	return fmt.Sprintf("process %d", r.Process.PID)
}

// later calls fn after d, unless stop is called first. When stop returns, fn does not
// run any more.
func later(d time.Duration, fn func()) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-time.After(d):
			fn()
		case <-done:
		}
	}()
	return func() {
		close(done)
		<-ended
	}
}

// endByForce ends a server. It kills the server if it does not answer or does not end.
func endByForce(ctx context.Context, dir state.Dir, r state.Record, began time.Time) error {
	p, err := r.Process.Open()
	switch {
	case errors.Is(err, os.ErrProcessDone):
		return clearUp(ctx, dir, r, server.EndAll, began.Add(clearedBy))
	case err != nil:
		return err
	}
	defer p.Close()
	if askByForce(ctx, r, began) != nil || waitUntil(ctx, p, began.Add(askedBy)) != nil {
		if err := p.Kill(); err != nil {
			return fmt.Errorf("kill process %d: %w", r.Process.PID, err)
		}
		if waitUntil(ctx, p, began.Add(diedBy)) != nil {
			return exit.Errorf(exit.Timeout, "process %d was killed and has not died yet", r.Process.PID)
		}
	}
	return clearUp(ctx, dir, r, server.EndAll, began.Add(clearedBy))
}

// askByForce asks a server to end even if its devices are in use. It fails early if the
// server does not answer a request for its status.
func askByForce(ctx context.Context, r state.Record, began time.Time) error {
	client := control.NewClient(r.Socket())
	probe, cancel := context.WithDeadline(ctx, began.Add(probedBy))
	defer cancel()
	if _, err := client.Status(probe); err != nil {
		return err
	}
	asked, cancel := context.WithDeadline(ctx, began.Add(askedBy))
	defer cancel()
	return client.Disconnect(asked, true)
}

func waitUntil(ctx context.Context, p *state.Handle, t time.Time) error {
	ctx, cancel := context.WithDeadline(ctx, t)
	defer cancel()
	return p.Wait(ctx)
}

// clearUp removes the devices and the record that a server left. It retries until t,
// because the kernel may need a moment after the end of the server.
func clearUp(ctx context.Context, dir state.Dir, r state.Record, waiting server.Waiting, t time.Time) error {
	ctx, cancel := context.WithDeadline(ctx, t)
	defer cancel()
	for {
		done, err := server.Clear(ctx, dir, r.Name, waiting, slog.New(slog.DiscardHandler))
		switch {
		case err != nil && ctx.Err() == nil:
			return err
		case done:
			return nil
		}
		select {
		case <-time.After(clearRetry):
		case <-ctx.Done():
			if err != nil {
				return fmt.Errorf("the server is gone, but its devices and its record are still there: %w", err)
			}
			return exit.Errorf(exit.Busy, "the server is gone, its devices are still there; --force removes them, recover takes them over")
		}
	}
}
