// Bench compares the initiator with the kernel's, end to end. It boots one VM for
// each measuring mode. Inside the VM it runs fio in interleaved rounds on
//
//	kernel  nvme-rdma, connected by nvme connect
//	ours    ublk-nvmeof connect
//	null    the ublk front end with a back end that does nothing, as the upper limit
//
// and, with -paths, on ours-poll, which has poll queues besides, on scraped, whose metrics are
// read each second, on shared and null-shared, whose memory fio shares so that
// nothing is copied, on ours-huge, null-huge, shared-huge and null-shared-huge, where this memory is in
// pages of 2 MiB, on busy, beside which each second devices are listed, and another one is
// connected and disconnected, on two-paths, which is connected to two ports of the target, with as many
// queue pairs over both of them together as ours has, and on two-paths-wide, with as many over
// each of them.
//
// kernel and ours use the same target, nvmet-rdma over rdma_rxe with a memory-backed
// null_blk, in the same VM. two-paths uses another subsystem of it.
//
// # Modes
//
// The mode icount is deterministic: virtual time follows the executed instructions,
// on one clock for all CPUs. It measures the instructions of the whole path, host and
// target. Repeated runs agree within a few per cent, whatever else the machine does.
// It says nothing about the latency of busy polling, because a spinning CPU takes its
// time from the others. QEMU also sometimes stops one of the CPUs for up to a second
// while another works. So the times charged to processes and CPUs are rough; the
// throughput is not.
//
// The mode parallel emulates every CPU on a thread of its own, or runs under KVM if
// that is available. It shows latency and polling, and is noisy: only the ratio of
// neighboring runs is meaningful, over many rounds.
//
// # Rounds
//
// All paths are connected at the start of a round and disconnected at its end, so that
// a lucky or unlucky placement of interrupts lasts for one round. Within a round the
// paths take turns on each workload, in an order that rotates from round to round. The
// other paths are connected and idle. What their servers use in the meantime is
// recorded and reported, so that they cannot slow down the others unnoticed.
//
// # Output
//
// The output is a Markdown table, and every sample in the format of Go benchmarks for
// benchstat. Both are kept in bench/results, with the samples and their environment as
// JSON.
//
// # NBD
//
// With the argument "nbd" the program measures NBD sockets instead, directly on this
// machine: see nbdMain.
//
// # Scale
//
// With the argument "scale" it measures one server with 1 to 64 devices and 1 to 4 queues, in one
// VM of mode icount, and draws docs/scale.svg.
//
// # Profile
//
// With the argument "profile" it counts the instructions for an I/O by function, in the kernel and
// in the program, with a plugin of QEMU (plugin/instructions.c), which needs a C compiler.
//
// # Micro-benchmarks
//
// With the argument "compare" it compares the micro-benchmarks of two revisions, and with
// "allocations" how often they allocate with allocations.txt.
//
// The program also is the guest: the host part starts the same program in the VM with
// the arguments "guest", "scale-guest", "profile-guest" and "null".
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 {
		switch args[0] {
		case "guest":
			return guestMain(ctx, args[1:])
		case "null":
			return nullMain(ctx, args[1:])
		case "nbd":
			return nbdMain(ctx, args[1:])
		case "profile":
			return profileMain(ctx, args[1:])
		case "profile-guest":
			return profileGuest(ctx, args[1:])
		case "scale":
			return scaleMain(ctx, args[1:])
		case "scale-guest":
			return scaleGuest(ctx, args[1:])
		case "compare":
			return compareMain(ctx, args[1:])
		case "allocations":
			return allocationsMain(ctx, args[1:])
		}
	}
	o, err := parseOptions(args)
	if err != nil {
		return err
	}
	return hostMain(ctx, o)
}

// options are the host's flags.
type options struct {
	kernel  string
	modes   []string
	label   string
	mtu     int
	memory  string
	params  string // of the guest's kernel
	timeout time.Duration
	command string // as the user gave it, for the record
	plan    plan   // the same for all modes, but for Rounds
	rounds  int    // 0 = the mode's default
}

// defaultRounds by mode: repeats of icount agree anyway.
var defaultRounds = map[string]int{modeICount: 2, modeParallel: 7}

const (
	modeICount   = "icount"
	modeParallel = "parallel"
)

func parseOptions(args []string) (options, error) {
	o := options{command: strings.Join(args, " ")}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.StringVar(&o.kernel, "kernel", "7.3", "kernel `series` to boot, one of the VM runner's")
	mode := fs.String("mode", modeICount, "icount, parallel or both")
	fs.IntVar(&o.rounds, "rounds", 0, "interleaved rounds; 0 = 2 for icount, 7 for parallel")
	fs.DurationVar(&o.plan.Runtime, "runtime", 2*time.Second, "measured `time` of one fio run, on the guest's clock")
	fs.DurationVar(&o.plan.Ramp, "ramp", time.Second, "`time` before it that does not count")
	only := fs.String("only", "", "`workloads` to run, comma-separated; default all: "+strings.Join(workloadNames(), ","))
	paths := fs.String("paths", "kernel,ours,null", "`paths` to run, comma-separated, of "+strings.Join(pathNames(), ","))
	fs.StringVar(&o.label, "label", "", "`text` added to the names of the result files; without it, the day's last run stays")
	fs.IntVar(&o.plan.CPUs, "cpus", 2, "virtual CPUs")
	fs.IntVar(&o.plan.Queues, "queues", 2, "I/O queues of each path")
	fs.IntVar(&o.plan.SizeMiB, "size", 256, "size of the namespace in `MiB`")
	fs.IntVar(&o.plan.Devices, "devices", 1, "namespaces of the target, of which the first is under load")
	fs.DurationVar(&o.plan.Idle, "idle", 10*time.Second, "`time` over which idle servers are watched; 0 = not at all")
	fs.BoolVar(&o.plan.Syscalls, "syscalls", true, "count the servers' system calls in a run of their own")
	fs.IntVar(&o.mtu, "mtu", 4200, "MTU of the VM's network interface in `bytes`; 4200 makes it 4096 for RDMA")
	fs.StringVar(&o.memory, "mem", "4G", "memory `size` of the VM")
	fs.StringVar(&o.params, "append", "", "more `parameters` of the VM's kernel; clearcpuid=erms,fsrm makes it copy by words, because mode icount counts each byte that one string instruction copies")
	fs.DurationVar(&o.timeout, "timeout", time.Hour, "longest `time` for one VM")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	var err error
	switch {
	case fs.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case *mode == "both":
		o.modes = []string{modeICount, modeParallel}
	case defaultRounds[*mode] > 0:
		o.modes = []string{*mode}
	default:
		return o, fmt.Errorf("--mode %q: want icount, parallel or both", *mode)
	}
	switch {
	case o.rounds < 0:
		return o, fmt.Errorf("--rounds %d: want 0 or more", o.rounds)
	case o.plan.Runtime < 100*time.Millisecond:
		return o, fmt.Errorf("--runtime %v: want 100ms or more", o.plan.Runtime)
	case o.plan.Ramp < 0 || o.plan.Idle < 0:
		return o, errors.New("--ramp and --idle: want 0 or more")
	case o.plan.CPUs < 1 || o.plan.Queues < 1:
		return o, errors.New("--cpus and --queues: want 1 or more")
	case o.plan.SizeMiB < 1:
		return o, fmt.Errorf("--size %d: want 1 or more", o.plan.SizeMiB)
	case o.plan.Devices < 1:
		return o, fmt.Errorf("--devices %d: want 1 or more", o.plan.Devices)
	}
	if o.plan.Workloads, err = choose("--only", *only, workloadNames()); err != nil {
		return o, err
	}
	if o.plan.Paths, err = choose("--paths", *paths, pathNames()); err != nil {
		return o, err
	}
	if slices.Contains(o.plan.Paths, pathTwoPaths) && o.plan.Queues%2 != 0 {
		return o, fmt.Errorf("--queues %d: %s needs an even number", o.plan.Queues, pathTwoPaths)
	}
	return o, nil
}

// choose splits a list whose elements have to be among known; "" is all.
func choose(name, list string, known []string) ([]string, error) {
	if list == "" {
		return known, nil
	}
	var chosen []string
	for _, s := range strings.Split(list, ",") {
		s = strings.TrimSpace(s)
		found := false
		for _, k := range known {
			found = found || k == s
		}
		if !found {
			return nil, fmt.Errorf("%s %q: want some of %s", name, s, strings.Join(known, ","))
		}
		chosen = append(chosen, s)
	}
	return chosen, nil
}
