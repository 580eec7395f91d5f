package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/host"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/server"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/systemd"
	"ublk-nvmeof/identity"
	"ublk-nvmeof/process"
)

// connection holds the options that connect and serve have in common.
type connection struct {
	runDir     dirFunc
	opts       *options.Connect
	shown      *pflag.FlagSet // the flags of opts
	format     string
	verbose    bool
	foreground bool
	retry      time.Duration // how long to try again if the first attempt fails
	flagsFile  string        // of flags that are not on the command line
	idempotent bool
	devidFile  string        // to write the name of the device to; empty: none
	succeed    string        // the running server to take over from
	recover    string        // the dead server to take over from
	within     time.Duration // time limit for everything until the devices are usable; 0: see server.Config
}

func (c *connection) addFlags(cmd *cobra.Command) {
	c.opts = options.Default()
	c.shown = pflag.NewFlagSet("", pflag.ContinueOnError)
	c.opts.AddFlags(c.shown)
	f := cmd.Flags()
	f.SortFlags = false
	f.AddFlagSet(c.shown)
	f.BoolVar(&c.foreground, "foreground", false, "run the server in this process, for a terminal or a service manager (Type=notify)")
	f.DurationVar(&c.retry, "retry", 0, "how long to try again if the target cannot be connected to yet")
	f.BoolVar(&c.idempotent, "idempotent", false, "if this host is connected already, show the connection and succeed")
	f.StringVar(&c.devidFile, "devid-file", "", "`file` to write the name of the device to when it is usable, for disconnect -d")
	formatFlag(f, &c.format)
	f.BoolVarP(&c.verbose, "verbose", "v", false, "show which queues were requested and granted, and log more")
}

// complete checks the flags as a whole.
func (c *connection) complete() error {
	if c.retry < 0 {
		return usage(fmt.Errorf("--retry \"%v\": want a duration of 0 or more, such as 90s", c.retry))
	}
	if c.devidFile != "" {
		if info, err := os.Stat(filepath.Dir(c.devidFile)); err != nil || !info.IsDir() {
			return usage(fmt.Errorf("--devid-file %q: want a file in a directory that exists", c.devidFile))
		}
	}
	return usage(c.opts.Complete(identity.Sources{}))
}

// show reports a connection whose devices are usable.
func (c *connection) show(w io.Writer, s control.Status) error {
	if err := c.writeDevID(s); err != nil {
		return err
	}
	return output.Connected(w, s, c.format, c.verbose)
}

// writeDevID writes the name of the first device to a file, for a service that is to
// disconnect it.
func (c *connection) writeDevID(s control.Status) error {
	if c.devidFile == "" || len(s.Devices) == 0 {
		return nil
	}
	// A pipe that nobody reads is an error, and not a wait.
	f, err := os.OpenFile(c.devidFile, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NONBLOCK, 0o644)
	if err == nil {
		_, err = f.WriteString(s.Devices[0].Device + "\n")
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("--devid-file: %w; %s is connected all the same", err, s.NQN)
	}
	return nil
}

// settle shows the connection that err is about, if it exists already and that is enough.
func (c *connection) settle(cmd *cobra.Command, dir state.Dir, err error) error {
	if !c.idempotent || exit.Of(err) != exit.AlreadyServed {
		return err
	}
	j, jerr := c.join(cmd.Context(), dir)
	if j == nil {
		return cmp.Or(jerr, err) // it has ended meanwhile
	}
	return c.showJoined(cmd.OutOrStdout(), j)
}

// showJoined reports paths that were added to a connection, or a connection that has them.
func (c *connection) showJoined(w io.Writer, j *joined) error {
	if len(j.added) == 0 {
		return c.show(w, j.status)
	}
	if err := c.writeDevID(j.status); err != nil {
		return err
	}
	return output.PathsAdded(w, j.status, j.added, c.format, c.verbose)
}

func newConnect(runDir dirFunc) *cobra.Command {
	c := &connection{runDir: runDir}
	cmd := &cobra.Command{
		Use:   "connect -a ADDRESS -n NQN",
		Short: "Connect to a subsystem and make its namespaces block devices",
		Long: `Starts a server for a subsystem, waits until its devices can be used, and prints
their names. The server runs in the background; the end of the session does not end
it. With --foreground this process becomes the server, and logs to standard error.
SIGTERM or SIGINT ends a server; after a second signal it does not wait for requests in
flight. SIGHUP never ends it.

A server in the background gets a systemd scope of its own if root starts it and
systemd runs, so the end of the session or service that started it does not end it.

If the address is a host name, each of its addresses is tried until one accepts
the connection.

If a server serves the subsystem already, as the same host, the addresses that it lacks
become further paths of its devices (see --path). Other flags must be those of the server,
and keys are compared with its own. If such a server has died, the new one takes over its
devices. With --duplicate-connect the subsystem gets another server and other devices.

Invalid values are refused before anything else happens. Sizes are written like
64KiB (units of 1024) or 64k (units of 1000).`,
		Args: noArgs,
		RunE: verb("connect", func(cmd *cobra.Command, _ []string) error {
			if c.flagsFile != "" {
				if err := usage(flagsFrom(c.flagsFile, cmd.Flags())); err != nil {
					return err
				}
			}
			return c.connect(cmd)
		}),
	}
	c.addFlags(cmd)
	cmd.Flags().StringVar(&c.flagsFile, "flags-from", "", "`file` with a flag in each line, such as \"nqn = NAME\"; flags of the command line come first")
	return cmd
}

// connect starts the server in the background, or becomes the server.
func (c *connection) connect(cmd *cobra.Command) error {
	if err := c.complete(); err != nil {
		return err
	}
	dir, err := c.runDir()
	if err != nil {
		return err
	}
	args := append(serveArgs(dir), options.Args(c.shown)...)
	args = append(args, "--output-format="+c.format, fmt.Sprintf("--verbose=%t", c.verbose), "--retry="+c.retry.String())
	if c.shown.Changed("timeout") {
		args = append(args, "--within="+c.opts.Timeout.String())
	}
	if c.foreground {
		if other := c.otherHost(dir); other != "" {
			say(cmd)(other)
		}
		_ = process.SetIOFlusher() // the server works without it and logs a warning
		if err := errors.Join(host.CloseOnExec(), systemd.KeepListeners()); err != nil {
			return err
		}
		secrets, files, err := keysOf(c.opts).keep()
		if err != nil {
			return err
		}
		defer closeAll(files)
		args = append(args, fmt.Sprintf("--idempotent=%t", c.idempotent), "--devid-file="+c.devidFile)
		args = append(args, secrets...)
		return fmt.Errorf("become the server: %w", unix.Exec(self(), args, os.Environ()))
	}
	ctx, stop := interruptible(endSignals...)
	defer stop()
	other := c.otherHost(dir)
	j, err := c.join(ctx, dir)
	switch {
	case err != nil:
		return err
	case j != nil:
		return c.showJoined(cmd.OutOrStdout(), j)
	}
	s, err := startServer(ctx, args, keysOf(c.opts), c.opts.Timeout+c.retry, say(cmd))
	if exit.Of(err) == exit.AlreadyServed {
		// Another connect may have started a server meanwhile, by another address.
		if j, jerr := c.join(ctx, dir); j != nil {
			return c.showJoined(cmd.OutOrStdout(), j)
		} else if jerr != nil {
			return jerr
		}
	}
	switch {
	case err != nil && other != "" && exit.Of(err) == exit.HostNotAllowed:
		return fmt.Errorf("%w; %s", err, other)
	case err != nil:
		return err
	case other != "":
		say(cmd)(other)
	}
	return c.show(cmd.OutOrStdout(), s)
}

// serveArgs returns the first words of a server's command line.
func serveArgs(dir state.Dir) []string {
	return []string{programName, "serve", "--run-dir=" + string(dir)}
}

// startServer starts a server in the background, with keys that are not in its arguments, and
// waits until its devices are usable.
func startServer(ctx context.Context, args []string, k keys, timeout time.Duration, say func(string)) (control.Status, error) {
	_ = process.SetIOFlusher()  // the server works without it and logs a warning
	_ = process.UseSmallPages() // the server starts more slowly without it
	secrets, files, err := k.handOver()
	if err != nil {
		return control.Status{}, err
	}
	defer closeAll(files)
	return launch(ctx, self(), append(args, secrets...), files, timeout, say)
}

// say returns a function that tells the user of a command what the command waits for.
// Any goroutine may call it.
func say(cmd *cobra.Command) func(string) {
	var mu sync.Mutex
	return func(text string) {
		mu.Lock()
		defer mu.Unlock()
		cmd.PrintErrf("%s: %s: %s\n", programName, cmd.Name(), output.Text(text))
	}
}

func newServe(runDir dirFunc) *cobra.Command {
	c := &connection{runDir: runDir}
	reportFD := -1
	cmd := &cobra.Command{
		Use:    "serve",
		Hidden: true,
		Short:  "Run the server that connect starts",
		Args:   noArgs,
	}
	c.addFlags(cmd)
	cmd.Flags().IntVar(&reportFD, "report-fd", -1, "descriptor on which connect waits for the report")
	cmd.Flags().StringVar(&c.succeed, "succeed", "", "name of the running server to take over from")
	cmd.Flags().StringVar(&c.recover, "recover", "", "name of the dead server to take over from")
	cmd.Flags().DurationVar(&c.within, "within", 0, "time limit for everything until the devices are usable")
	foreground := verb("connect", func(cmd *cobra.Command, _ []string) error { return c.serveForeground(cmd) })
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if reportFD < 0 {
			return foreground(cmd, args)
		}
		r, err := newReporter(reportFD)
		if err != nil {
			return err
		}
		serve := c.serveBackground
		if systemd.Managed() {
			serve = c.serveSucceeding
		}
		failure := exit.From(serve(r))
		if failure == nil {
			return nil
		}
		if r.failed(failure) == nil {
			os.Exit(int(failure.Code)) // connect reports the error, so it is not printed twice
		}
		return failure
	}
	return cmd
}

// serveForeground runs the server for connect --foreground, which has become this
// process.
func (c *connection) serveForeground(cmd *cobra.Command) error {
	cfg := server.Config{
		Log:   foregroundLog(os.Stderr, c.level()),
		Ready: func(s control.Status) error { return c.show(cmd.OutOrStdout(), s) },
	}
	serve := c.serve
	if systemd.Managed() {
		serve = c.serveManaged
	}
	err := serve(cfg)
	if err == nil {
		return nil
	}
	dir, derr := c.runDir()
	if derr != nil {
		return err
	}
	return c.settle(cmd, dir, err)
}

// serveSucceeding is the server that a server under a service manager has started to take
// over from it.
func (c *connection) serveSucceeding(r *reporter) error {
	return c.serveManaged(server.Config{
		Log: foregroundLog(os.Stderr, c.level()),
		// The server that listened to this may have left.
		Ready: func(s control.Status) error { _ = r.ready(s); return nil },
	})
}

// serveManaged serves under a service manager.
func (c *connection) serveManaged(cfg server.Config) error {
	cfg.Patient, cfg.Launch = true, launchSuccessor(c.runDir)
	return c.serve(cfg)
}

// foregroundLog writes to w, or to the journal if that is what standard error leads to.
func foregroundLog(w io.Writer, level slog.Level) *slog.Logger {
	if systemd.ToJournal() {
		return slog.New(systemd.NewJournalHandler(os.Stderr, level, programName))
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// serveBackground runs the server that connect has started. Until there is a log file,
// logs go to the standard error of connect, and so do panics.
func (c *connection) serveBackground(r *reporter) error {
	log := &logFile{}
	cfg := server.Config{
		Log: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: c.level()})),
		Reserved: func(e *state.Entry) error {
			if err := log.open(e.Log()); err != nil {
				return err
			}
			return r.reserved(e.Name, e.Log())
		},
		Waiting:   r.waits,
		Ready:     r.ready,
		Abandoned: r.abandoned(),
	}
	cfg.Patient = systemd.Booted() && systemd.InOwnScope()
	return c.serve(cfg)
}

// logIdentity logs the identity that the target knows for this host, and warnings about
// it.
func (c *connection) logIdentity(log *slog.Logger) {
	args := []any{"hostnqn", c.opts.HostNQN, "hostid", c.opts.HostID.String()}
	if c.opts.HostIDFile != "" {
		args = append(args, "generated", "yes", "kept", c.opts.HostIDFile)
	}
	log.Info("host identity", args...)
	for _, w := range c.opts.Warnings {
		log.Warn("unusual host identity", "reason", w)
	}
}

func (c *connection) level() slog.Level {
	if c.verbose {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

// serve runs the server. The first SIGINT or SIGTERM ends it in order, the second does not
// wait for requests in flight, the third does not wait for anything. If the server is
// patient, the second and the third have to be SIGINT. SIGHUP makes it reload.
func (c *connection) serve(cfg server.Config) error {
	reload, stopReloading := hangups()
	defer stopReloading()
	cfg.Reload = reload
	if err := host.SetName(programName); err != nil { // after executing self it may be "exe"
		cfg.Log.Warn("cannot set the name of the process", "error", err)
	}
	if err := c.complete(); err != nil {
		return err
	}
	if err := process.CheckIOUring(); err != nil {
		return err
	}
	dir, err := c.runDir()
	if err != nil {
		return err
	}
	unix.Umask(0o022) // other users may read the records
	// The server must not die because nobody reads its log any more.
	signal.Ignore(syscall.SIGPIPE)
	signals := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	ctx, stop := interruptible(signals...)
	defer stop()
	cfg.Options, cfg.Dir, cfg.Succeeds, cfg.Recovers, cfg.Within = c.opts, dir, c.succeed, c.recover, c.within
	cfg.Host = sharedDirs()
	cfg.Args = append(options.Args(c.shown), "--hostnqn="+c.opts.HostNQN, "--hostid="+c.opts.HostID.String())
	reserved := cfg.Reserved
	cfg.Reserved = func(e *state.Entry) error {
		if reserved != nil {
			if err := reserved(e); err != nil {
				return err
			}
		}
		c.logIdentity(cfg.Log)
		return nil
	}
	// systemd may send SIGTERM several times, and does not mean to hurry.
	if cfg.Patient {
		signals = []os.Signal{syscall.SIGINT}
	}
	hurry := make(chan struct{})
	cfg.Hurry = hurry
	go func() {
		<-ctx.Done()
		more := make(chan os.Signal, 2)
		signal.Notify(more, signals...)
		cfg.Log.Warn("another signal: the server does not wait for requests in flight any more", "signal", (<-more).String())
		close(hurry)
		cfg.Log.Error("a third signal: the server ends at once", "signal", (<-more).String())
		os.Exit(int(exit.Other))
	}()
	if cfg.Listener, err = systemd.Listener(); err != nil {
		return err
	}
	if cfg.Listener != nil && c.opts.Frontend == options.Auto {
		c.opts.Frontend = options.NBDSocket
	}
	return c.runRepeatedly(ctx, cfg)
}

// retryDelay is the time between two attempts to connect at first.
const retryDelay = 2 * time.Second

// runRepeatedly runs the server. If it cannot connect, it is run again until c.retry has
// passed.
func (c *connection) runRepeatedly(ctx context.Context, cfg server.Config) error {
	began := time.Now()
	reserved := cfg.Reserved
	cfg.Reserved = func(e *state.Entry) error {
		if e.Inherited { // the devices stay on this record until they are taken over
			cfg.Recovers, cfg.Again = e.Name, true
		}
		return reserved(e)
	}
	for {
		err := server.Run(ctx, cfg)
		if !exit.Of(err).MayPass() || ctx.Err() != nil || time.Since(began)+retryDelay > c.retry {
			return err
		}
		cfg.Log.Warn("cannot connect yet", "error", err, "next_in", retryDelay)
		if nerr := systemd.Notify(systemd.Status("cannot connect yet: "+err.Error()), systemd.ExtendTimeout(c.opts.Timeout)); nerr != nil {
			cfg.Log.Warn("cannot notify the service manager", "error", nerr)
		}
		select {
		case <-time.After(retryDelay):
		case <-cfg.Abandoned:
			return server.ErrAbandoned
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
