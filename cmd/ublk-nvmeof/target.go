package main

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/targetserver"
)

// exporter holds the options of the command target.
type exporter struct {
	runDir     dirFunc
	opts       *options.Target
	format     string
	verbose    bool
	background bool
	readyFD    int
}

func newTarget(runDir dirFunc) *cobra.Command {
	x := &exporter{runDir: runDir, opts: options.DefaultTarget(), readyFD: -1}
	cmd := &cobra.Command{
		Use:   "target -n NQN --namespace ram=SIZE",
		Short: "Run an NVMe over RDMA target for tests and demonstrations",
		Long: `Serves namespaces in memory, in files or on block devices to hosts. With an RDMA
device, every host can connect. Without one, hosts that speak RoCEv2 can connect,
such as "connect --provider roce" on any machine. The target needs no kernel module,
and without an RDMA device it needs no privilege. SIGTERM or SIGINT ends it; in the
background it ignores SIGHUP.

The commands below change a running target or make it misbehave. If several targets
run, --target selects one. Hosts are notified of changes as the specification
requires. They see a new queue limit when they connect again.`,
		Args: noArgs,
		RunE: verb("target", func(cmd *cobra.Command, _ []string) error { return x.run(cmd) }),
	}
	f := cmd.Flags()
	x.opts.AddFlags(f)
	f.BoolVar(&x.background, "background", false, "return when hosts can connect, and leave the target running")
	formatFlag(f, &x.format)
	f.BoolVarP(&x.verbose, "verbose", "v", false, "log more")
	f.IntVar(&x.readyFD, "ready-fd", -1, "descriptor on which target --background waits for the report")
	f.Lookup("ready-fd").Hidden = true
	cmd.AddCommand(targetVerbs(runDir)...)
	return cmd
}

func (x *exporter) run(cmd *cobra.Command) error {
	if err := usage(x.opts.Complete()); err != nil {
		return err
	}
	runDir, err := x.runDir()
	if err != nil {
		return err
	}
	dir := string(runDir)
	if x.background {
		return startTarget(cmd, dir)
	}
	signals := endSignals
	if x.readyFD >= 0 {
		unix.CloseOnExec(x.readyFD)
		// Relative paths of the flags have been resolved. The target must not keep a
		// file system busy.
		if err := os.Chdir("/"); err != nil {
			return err
		}
		signals = []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	}
	level := slog.LevelInfo
	if x.verbose {
		level = slog.LevelDebug
	}
	log := &logFile{}
	cfg := targetserver.Config{
		Options: x.opts, RunDir: dir,
		Log: foregroundLog(log, level),
	}
	if x.readyFD < 0 {
		cfg.Ready = func(s targetserver.Status) error {
			return output.Targets(cmd.OutOrStdout(), []targetserver.Status{s}, x.format, false)
		}
	} else {
		ready := os.NewFile(uintptr(x.readyFD), "ready")
		defer surviveHangup(cfg.Log)()
		cfg.Ready = func(s targetserver.Status) error {
			err := output.Targets(ready, []targetserver.Status{s}, x.format, false)
			err = errors.Join(err, ready.Close())
			if err == nil {
				err = log.open(filepath.Join(dir, s.Name, "log"))
			}
			return err
		}
	}
	ctx, stop := interruptible(signals...)
	defer stop()
	return targetserver.Run(ctx, cfg)
}

// startTarget runs the same command line in its own session, and returns when the
// target is ready. Until then the target reports errors itself.
func startTarget(cmd *cobra.Command, dir string) error {
	return startInBackground(cmd.OutOrStdout(), "target", cmd.Flags(), os.Args[1:], "--background=false", "--run-dir="+dir, "--ready-fd=3")
}
