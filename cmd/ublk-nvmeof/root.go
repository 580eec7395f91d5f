package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/rundir"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

const programName = "ublk-nvmeof"

const longHelp = `Serves the namespaces of an NVMe over RDMA subsystem as block devices
/dev/ublkbN from userspace. Each subsystem has a server process, which connect
starts and disconnect ends. The flags are those of nvme-cli 2.x as far as they
apply.`

// execute runs a command line.
func execute(args []string, out, errs io.Writer) error {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errs)
	err := checkVerb(root, args)
	if err == nil {
		err = root.Execute()
	}
	var known *exit.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	// An error that is not from a command itself is from parsing the command line.
	return exit.Errorf(exit.Usage, "%v", err)
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           programName,
		Short:         "NVMe over RDMA block devices from userspace",
		Long:          longHelp + "\n\nExit codes:\n" + exit.Table(),
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return fmt.Errorf("no verb is given; see %s --help", programName)
		},
	}
	root.SetFlagErrorFunc(flagError)
	dir := rundir.Default()
	root.PersistentFlags().StringVar(&dir, "run-dir", dir, "directory of the servers' state, logs and sockets")
	root.PersistentFlags().Lookup("run-dir").Hidden = true
	runDir := func() (state.Dir, error) {
		d, err := filepath.Abs(dir) // a server has its own working directory
		if err == nil {
			err = checkRunDir(d)
		}
		return state.Dir(d), err
	}
	// A user who has no servers sees those of root.
	visible := func() (state.Dir, error) {
		own, err := runDir()
		if err != nil || root.PersistentFlags().Changed("run-dir") {
			return own, err
		}
		if records, err := own.List(); err != nil || len(records) > 0 {
			return own, err
		}
		return state.Dir(systemDir), checkRunDir(systemDir)
	}
	root.AddCommand(newConnect(runDir), newServe(runDir), newDisconnect(visible), newRecover(visible), newUpgrade(visible),
		newGC(visible), newList(visible), newTarget(runDir), newVersion(), newUdev(runDir), newDocumentation())
	return root
}

// systemDir is the run directory of root. Tests have another one.
var systemDir = rundir.System

// dirFunc returns the run directory. It is called after the flags are parsed.
type dirFunc func() (state.Dir, error)

// maxRunDir is the longest run directory, in bytes, that leaves room for the
// sockets in it.
const maxRunDir = rundir.MaxSocketPath - len("/target9999/control.sock")

// checkRunDir refuses a run directory that somebody else could have prepared, or
// whose sockets nobody could connect to. It need not exist.
func checkRunDir(dir string) error {
	if len(dir) > maxRunDir {
		return fmt.Errorf("run directory %q: it has %d bytes; want at most %d, because the path of a socket in it has at most %d",
			dir, len(dir), maxRunDir, rundir.MaxSocketPath)
	}
	var unsafe *rundir.UnsafeError
	if errors.As(rundir.Check(dir), &unsafe) {
		return fmt.Errorf("run directory %w; remove it, or set XDG_RUNTIME_DIR or --run-dir to a directory of your own", unsafe)
	}
	return nil // other errors are those of whoever uses it
}

// verb makes a function for cobra of one whose errors do not concern the command line,
// unless they have the code exit.Usage. Messages begin with the name of the
// command.
func verb(name string, run func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		e := exit.From(run(cmd, args))
		if e == nil {
			return nil
		}
		e.Message = name + ": " + e.Message
		return e
	}
}

// usage makes an error of a command line that is parsed but makes no sense.
func usage(err error) error {
	if err == nil {
		return nil
	}
	return exit.Errorf(exit.Usage, "%v", err)
}

// formatFlag adds --output-format.
func formatFlag(f *pflag.FlagSet, dst *string) {
	*dst = output.Normal
	f.VarP(options.OneOf(dst, output.Normal, output.JSON), "output-format", "o", "output format")
}

// interruptible returns a context that one of the signals ends. The signal is its
// cause.
func interruptible(signals ...os.Signal) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(context.Background())
	c := make(chan os.Signal, 1)
	signal.Notify(c, signals...)
	go func() {
		if s, ok := <-c; ok {
			cancel(exit.Errorf(exit.Other, "interrupted by %v", s))
		}
	}()
	return ctx, func() {
		signal.Stop(c)
		close(c)
		cancel(nil)
	}
}

// endSignals are the signals that end a program in a terminal.
var endSignals = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}
