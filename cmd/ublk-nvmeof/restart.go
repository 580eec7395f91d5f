package main

import (
	"cmp"
	"context"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
)

// maxRestarts is the largest number of servers that are started at the same time.
const maxRestarts = 8

// succeed is the flag that names a running server.
const succeed = "--succeed="

// restart starts servers in place of others, for recover and upgrade.
type restart struct {
	format string
	within time.Duration // time limit for each server; 0: derived from its flags and its target
}

func (s *restart) addFlags(f *pflag.FlagSet) {
	formatFlag(f, &s.format)
	f.Var(options.Duration(&s.within, time.Second, 24*time.Hour), "timeout",
		"time limit for each server (default: connect --timeout, and as long as its target may need to end old controllers)")
	f.Lookup("timeout").DefValue = "" // the description says it
}

// each starts a new server in place of each recorded one. how is the flag to which the
// name of the old server is appended. It prints each result when it is known, and
// returns an error for each server that did not start.
func (s *restart) each(cmd *cobra.Command, dir state.Dir, how string, records []state.Record) []error {
	ctx, stop := interruptible(endSignals...)
	defer stop()
	errs := make([]error, len(records))
	free := make(chan struct{}, maxRestarts)
	tell := say(cmd)
	var out sync.Mutex
	var wg sync.WaitGroup
	for i, r := range records {
		free <- struct{}{}
		wg.Go(func() {
			defer func() { <-free }()
			status, err := s.one(ctx, dir, how, r, tell)
			out.Lock()
			defer out.Unlock()
			if err == nil {
				err = output.Connected(cmd.OutOrStdout(), status, s.format, false)
			}
			if err != nil {
				errs[i] = fmt.Errorf("%s: %w", r.Name, err)
			}
		})
	}
	wg.Wait()
	return errs
}

// one starts a server with the flags of another server.
func (s *restart) one(ctx context.Context, dir state.Dir, how string, r state.Record, tell func(string)) (control.Status, error) {
	if ctx.Err() != nil {
		return control.Status{}, context.Cause(ctx)
	}
	if how == succeed {
		limit := cmp.Or(s.within, timeoutOf(r)+3*time.Duration(r.KeepAlive)*time.Second) + undoTime
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		if now, err := control.NewClient(r.Socket()).Status(ctx); err == nil && now.Managed {
			return replaceManaged(ctx, dir, r)
		}
	}
	// The server inherits a mark of this thread. The thread ends with the
	// goroutine.
	runtime.LockOSThread()
	args := append(append(serveArgs(dir), how+r.Name), r.Args...)
	if s.within != 0 {
		args = append(args, "--within="+s.within.String())
	}
	k, err := keysFrom(r)
	if err != nil {
		return control.Status{}, err
	}
	return startServer(ctx, args, k, cmp.Or(s.within, timeoutOf(r)), tell)
}

// timeoutOf returns the time limit for connecting in the flags of a recorded server.
func timeoutOf(r state.Record) time.Duration {
	opts := options.Default()
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	opts.AddFlags(f)
	_ = f.Parse(r.Args) // the server reports errors in its flags
	return opts.Timeout
}
