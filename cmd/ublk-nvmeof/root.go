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
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/internal/rundir"
)

const programName = "ublk-nvmeof"

const longHelp = `Serves the namespaces of an NVMe over RDMA subsystem as block devices
/dev/ublkbN from userspace. Each subsystem has a server process, which connect
starts and disconnect ends. The flags are those of nvme-cli 2.x as far as they
apply.`

// execute runs a command line.
func execute(args []string, out, errs io.Writer) error {
	root := rootFor(args)
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
	// All other errors come from parsing the command line.
	return exit.Errorf(exit.Usage, "%v", err)
}

// base is the command of the program, without verbs at first, and what verbs need.
type base struct {
	root    *cobra.Command
	runDir  dirFunc
	visible dirFunc // the run directory whose servers a user sees
}

// rootFor returns the command with the verb that a command line begins with alone, for verbs on
// whose time others wait. To make all of them takes longer than most of them do.
func rootFor(args []string) *cobra.Command {
	t := newProgram()
	var verb *cobra.Command
	switch {
	case len(args) == 0:
	case args[0] == "connect":
		verb = newConnect(t.runDir)
	case args[0] == "serve":
		verb = newServe(t.runDir)
	case args[0] == "udev":
		verb = newUdev(t.runDir)
	case args[0] == "disconnect":
		verb = newDisconnect(t.visible)
	}
	if verb == nil {
		return newRoot()
	}
	t.root.CompletionOptions.DisableDefaultCmd = true
	t.root.AddCommand(verb)
	return t.root
}

// newRoot returns the command with all verbs.
func newRoot() *cobra.Command {
	t := newProgram()
	root, runDir, visible := t.root, t.runDir, t.visible
	root.Long = longHelp + "\n\nExit codes:\n" + exit.Table()
	root.AddCommand(newConnect(runDir), newDiscover(), newConnectAll(runDir), newServe(runDir), newDisconnect(visible), newDisconnectAll(visible), newConfig(visible), newRecover(visible), newUpgrade(visible),
		newGC(visible), newList(visible), newMetrics(visible), newTop(visible), newTarget(runDir), newVersion(), newUdev(runDir), newDocumentation())
	root.AddCommand(inspectVerbs(visible)...)
	root.AddCommand(reservationVerbs(visible)...)
	root.AddCommand(newListSubsys(visible), newShowTopology(visible), newGenHostNQN(), newShowHostNQN(), newGenDHCHAPKey(), newCheckDHCHAPKey(), newDoctor(visible))
	return root
}

func newProgram() base {
	root := &cobra.Command{
		Use:           programName,
		Short:         "NVMe over RDMA block devices from userspace",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	version := root.Flags().BoolP("version", "V", false, "print the version of this build")
	root.RunE = func(cmd *cobra.Command, _ []string) error {
		if *version {
			return output.Version(cmd.OutOrStdout(), programName, thisBuild(), output.Normal)
		}
		return fmt.Errorf("no verb is given; see %s --help", programName)
	}
	root.SetFlagErrorFunc(flagError)
	root.SetGlobalNormalizationFunc(options.Underscores)
	dir := rundir.Default()
	root.PersistentFlags().StringVar(&dir, "run-dir", dir,
		"`DIRECTORY` of the records, logs and sockets of servers and targets (default: "+rundir.System+
			" for root, "+programName+" in $XDG_RUNTIME_DIR or "+programName+"-UID in $TMPDIR for other users)")
	root.PersistentFlags().Lookup("run-dir").DefValue = "" // the description says it
	runDir := func() (state.Dir, error) {
		if dir == "" {
			return "", usage(errors.New("--run-dir: no path is given; want DIRECTORY"))
		}
		d, err := filepath.Abs(dir) // the working directory of a server is another one
		if err == nil {
			err = checkRunDir(d)
		}
		return state.Dir(d), err
	}
	// A user without servers sees those of root.
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
	return base{root, runDir, visible}
}

// systemDir is the run directory of root. Tests have another one.
var systemDir = rundir.System

// sharedDirs returns the directories that servers of all run directories share. Tests have
// others.
var sharedDirs = func() state.Host { return rundir.Shared() }

// dirFunc returns the run directory. It is called after the flags have been parsed.
type dirFunc func() (state.Dir, error)

// maxRunDir is the longest run directory, in bytes, that leaves room for the
// sockets in it.
const maxRunDir = rundir.MaxSocketPath - len("/target9999/control.sock")

// checkRunDir returns an error for a run directory that another user could have
// prepared, or whose path is too long for the sockets in it. The directory need not
// exist.
func checkRunDir(dir string) error {
	if len(dir) > maxRunDir {
		return fmt.Errorf("run directory %q: it has %d bytes; want at most %d, because the path of a socket in it has at most %d",
			dir, len(dir), maxRunDir, rundir.MaxSocketPath)
	}
	var unsafe *rundir.UnsafeError
	if errors.As(rundir.Check(dir), &unsafe) {
		if unsafe.Path != dir {
			return fmt.Errorf("run directory %s is not safe from other users because of %w; --run-dir chooses another directory", dir, unsafe)
		}
		return fmt.Errorf("run directory %w; --run-dir chooses another directory", unsafe)
	}
	return nil // the use of the directory reports other errors
}

// verb returns a RunE function for cobra that calls run and puts the name of the
// command before its error. The error becomes an *exit.Error, so that execute does not
// treat it as an error of the command line.
func verb(name string, run func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		for _, file := range options.OpenKeyFiles(cmd.Flags()) {
			cmd.PrintErrf("%s: %s: key file %s: others than its owner can read or change it; chmod 600 ends that\n", programName, name, output.Text(file))
		}
		e := exit.From(run(cmd, args))
		if e == nil {
			return nil
		}
		e.Message = name + ": " + e.Message
		return e
	}
}

// usage returns err as an error of the command line, with the code exit.Usage.
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

// interruptible returns a context that ends when one of the signals arrives. Its cause
// names the signal.
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
