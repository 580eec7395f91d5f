package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// hostMain builds what is to be measured and runs each mode in a VM of its own.
func hostMain(ctx context.Context, o options) error {
	root, err := repository()
	if err != nil {
		return err
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := build(ctx, o.plan.Paths); err != nil {
		return err
	}
	o.plan.Lab = filepath.Join(root, "e2e", "lab.sh")
	o.plan.Ours = filepath.Join(root, "build", "ublk-nvmeof")
	var failed error
	for _, mode := range o.modes {
		r, err := o.boot(ctx, mode)
		if len(r.Samples)+len(r.Servers) > 0 {
			err = errors.Join(err, r.store(filepath.Join(root, "bench", "results")), r.print(os.Stdout))
		}
		if err == nil && len(r.Failures) > 0 {
			err = fmt.Errorf("%d measurements failed", len(r.Failures))
		}
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("mode %s: %w", mode, err))
		}
	}
	return failed
}

// repository is the root of the source tree around the current directory.
func repository() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find repository: %w", err)
	}
	root := filepath.Dir(strings.TrimSpace(string(out)))
	if _, err := os.Stat(filepath.Join(root, "e2e", "vm", "main.go")); err != nil {
		return "", fmt.Errorf("find repository: %w", err)
	}
	return root, nil
}

// build makes the VM runner, unless it is there, and the program if a path needs
// it.
func build(ctx context.Context, paths []string) error {
	steps := [][]string{{"e2e/setup"}}
	if _, err := os.Stat("build/vm"); err != nil {
		steps = append(steps, []string{"go", "-C", "e2e", "build", "-o", "../build/vm", "./vm"})
	}
	if slices.ContainsFunc(paths, func(p string) bool { return p != pathKernel && !strings.HasPrefix(p, pathNull) }) {
		steps = append(steps, []string{"go", "build", "-o", "build/ublk-nvmeof", "./cmd/ublk-nvmeof"})
	}
	if slices.Contains(paths, pathShared) || slices.Contains(paths, pathSharedHuge) {
		steps = append(steps, []string{"go", "build", "-o", "build/sharemem", "./examples/sharemem"})
	}
	for _, s := range steps {
		cmd := exec.CommandContext(ctx, s[0], s[1:]...)
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w", strings.Join(s, " "), err)
		}
	}
	return nil
}

// boot runs the plan in a VM. The result holds what was measured until an
// error.
func (o options) boot(ctx context.Context, mode string) (result, error) {
	o.plan.Rounds = o.rounds
	if o.rounds == 0 {
		o.plan.Rounds = defaultRounds[mode]
	}
	o.plan.HoldClock = mode == modeICount
	r := result{Env: o.environment(mode)}
	plan, err := json.Marshal(o.plan)
	if err != nil {
		return r, err
	}
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	args := []string{"--kernel", o.kernel, "--cpus", strconv.Itoa(o.plan.CPUs), "--mem", o.memory,
		"--mtu", strconv.Itoa(o.mtu), "--append", o.params, "--timeout", o.timeout.String()}
	switch mode {
	case modeICount:
		args = append(args, "--icount")
	case modeParallel:
		args = append(args, "--parallel")
	}
	args = append(args, "--", self, "guest", string(plan))

	start := time.Now()
	cmd := exec.CommandContext(ctx, "build/vm", args...)
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return r, err
	}
	if err := cmd.Start(); err != nil {
		return r, err
	}
	done := false
	err = readEvents(out, func(e event) {
		done = done || e.Done
		r.add(e)
		progress(os.Stderr, time.Since(start), e)
	}, os.Stderr)
	err = errors.Join(err, cmd.Wait())
	if err == nil && !done {
		err = errors.New("the guest ended too early")
	}
	return r, err
}

// readEvents calls do for each event of a guest's output. Lines that are no
// events go to other.
func readEvents(r io.Reader, do func(event), other io.Writer) error {
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if line[0] == '{' && json.Unmarshal(line, &e) == nil {
				do(e)
			} else {
				fmt.Fprintf(other, "%s\n", bytes.TrimRight(line, "\r\n"))
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// add files an event. What is known of a server comes in parts.
func (r *result) add(e event) {
	switch {
	case e.Guest != nil:
		r.Env.Guest = *e.Guest
	case e.Sample != nil:
		r.Samples = append(r.Samples, *e.Sample)
	case e.Failure != nil:
		r.Failures = append(r.Failures, *e.Failure)
	case e.Server != nil:
		s := r.server(e.Server.Path)
		if e.Server.RSS > 0 {
			s.RSS, s.Threads = e.Server.RSS, e.Server.Threads
		}
		if e.Server.SyscallsPerIO != nil {
			s.SyscallsPerIO, s.SyscallLoad = e.Server.SyscallsPerIO, e.Server.SyscallLoad
		}
		if e.Server.IdlePercent != nil {
			s.IdlePercent = e.Server.IdlePercent
		}
	}
}

// server is the entry of a path, made if it is not there.
func (r *result) server(path string) *serverInfo {
	for i := range r.Servers {
		if r.Servers[i].Path == path {
			return &r.Servers[i]
		}
	}
	r.Servers = append(r.Servers, serverInfo{Path: path})
	return &r.Servers[len(r.Servers)-1]
}

// progress tells who waits what happens.
func progress(w io.Writer, after time.Duration, e event) {
	at := after.Round(time.Second)
	switch {
	case e.Guest != nil:
		fmt.Fprintf(w, "%5v  %s\n", at, e.Guest.Kernel)
	case e.Sample != nil:
		s := e.Sample
		fmt.Fprintf(w, "%5v  round %d  %-24s %-9s %9.0f IOPS\n", at, s.Round, s.Workload, s.Path, s.IOPS)
	case e.Failure != nil:
		fmt.Fprintf(w, "%5v  %s, %s: %s\n", at, e.Failure.Path, e.Failure.Where, e.Failure.Error)
	}
}

func (o options) environment(mode string) environment {
	return environment{
		Date: time.Now().UTC().Truncate(time.Second), Mode: mode, Series: o.kernel, Label: o.label,
		Commit: commit(), Command: o.command, Go: runtime.Version(),
		QEMU: firstLine("qemu-system-x86_64", "--version"), Host: hostCPU(), MTU: o.mtu, Plan: o.plan.anywhere(),
	}
}

// commit is the revision of the source, marked if files differ from it.
func commit() string {
	return firstLine("git", "describe", "--always", "--dirty")
}

// firstLine of a program's output; "unknown" without one.
func firstLine(name string, args ...string) string {
	out, err := exec.Command(name, args...).Output()
	line, _, _ := strings.Cut(string(out), "\n")
	if err != nil || line == "" {
		return "unknown"
	}
	return line
}

// hostCPU is the host's processor and how many of it there are.
func hostCPU() string {
	model := "unknown CPU"
	data, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
			break
		}
	}
	return fmt.Sprintf("%d × %s", runtime.NumCPU(), model)
}
