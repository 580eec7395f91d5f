package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/targetserver"
	"ublk-nvmeof/nvme"
)

// changeTime is what a target gets to carry out a request.
const changeTime = 10 * time.Second

// remote is a verb that asks a running target for something.
type remote struct {
	runDir dirFunc
	target string // its name; empty: the only one
	nqn    string
}

// find finds the target.
func (r *remote) find() (dir, name string, err error) {
	runDir, err := r.runDir()
	if err != nil {
		return "", "", err
	}
	dir = string(runDir)
	names, err := targetserver.List(dir)
	if err != nil {
		return "", "", err
	}
	for _, name := range names {
		if name == r.target || r.target == "" && len(names) == 1 {
			return dir, name, nil
		}
	}
	switch {
	case len(names) == 0:
		return "", "", exit.Errorf(exit.NotFound, "no target runs")
	case r.target == "":
		return "", "", exit.Errorf(exit.Usage, "several targets run; want --target %s", strings.Join(names, " or "))
	}
	return "", "", exit.Errorf(exit.NotFound, "no target %s runs; there is %s", r.target, strings.Join(names, ", "))
}

// gone waits until a target has ended.
func gone(ctx context.Context, dir, name string) error {
	for {
		names, err := targetserver.List(dir)
		if err != nil || !slices.Contains(names, name) {
			return err
		}
		select {
		case <-time.After(clearRetry):
		case <-ctx.Done():
			return exit.Errorf(exit.Timeout, "%s does not end", name)
		}
	}
}

// change makes a verb of a function that turns arguments into a request.
func change(runDir dirFunc, use, short, long string, args cobra.PositionalArgs, request func(r *remote, args []string) (any, error)) *cobra.Command {
	r := &remote{runDir: runDir}
	cmd := &cobra.Command{Use: use, Short: short, Long: long, Args: args}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return verb(strings.TrimPrefix(cmd.CommandPath(), programName+" "), func(cmd *cobra.Command, args []string) error {
			what, err := request(r, args)
			if err != nil {
				return usage(err)
			}
			dir, name, err := r.find()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), changeTime)
			defer cancel()
			done, err := targetserver.NewClient(targetserver.Socket(dir, name)).Do(ctx, what)
			switch {
			case err != nil:
				return err
			case what == any(targetserver.StopRequest{}):
				return gone(ctx, dir, name)
			case done.ID != 0:
				fmt.Fprintf(cmd.OutOrStdout(), "fault %d\n", done.ID)
			case done.NSID != 0:
				fmt.Fprintf(cmd.OutOrStdout(), "namespace %d\n", done.NSID)
			}
			return nil
		})(cmd, args)
	}
	cmd.Flags().StringVar(&r.target, "target", "", "name of the target, as target list shows it (default: the only one that runs)")
	cmd.Flags().StringVarP(&r.nqn, "nqn", "n", "", "NQN of the subsystem (default: the only one)")
	return cmd
}

// without hides --nqn where it means nothing.
func without(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().Lookup("nqn").Hidden = true
	return cmd
}

func number(what, text string, lo, hi uint64) (int, error) {
	n, err := strconv.ParseUint(text, 0, 64)
	if err != nil || n < lo || n > hi {
		return 0, fmt.Errorf("%s %q: want a number, %d to %d", what, text, lo, hi)
	}
	return int(n), nil
}

func onOff(text string) (bool, error) {
	if text != "on" && text != "off" {
		return false, fmt.Errorf("%q: want on or off", text)
	}
	return text == "on", nil
}

// milliseconds reads a time from 1 ms to an hour; off is 0.
func milliseconds(text string) (int64, error) {
	if text == "off" {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < time.Millisecond || d > time.Hour {
		return 0, fmt.Errorf("time %q: want one like 10s, from 1ms to 1h, or off", text)
	}
	return d.Milliseconds(), nil
}

// targetVerbs are the verbs about running targets.
func targetVerbs(runDir dirFunc) []*cobra.Command {
	return []*cobra.Command{
		newTargetList(runDir), grantVerb(runDir), dropVerb(runDir), namespaceVerbs(runDir), anaVerb(runDir),
		faultVerb(runDir), clearVerb(runDir), stallVerb(runDir), freezeVerb(runDir), rejectVerb(runDir), refuseVerb(runDir),
		without(change(runDir, "stop", "End a target in order", "",
			cobra.NoArgs, func(*remote, []string) (any, error) { return targetserver.StopRequest{}, nil })),
	}
}

func grantVerb(runDir dirFunc) *cobra.Command {
	var exactly bool
	cmd := change(runDir, "grant {N | none}", "Limit the I/O queues that a controller gets",
		"A host sees it when it connects the next time; target drop makes it. With none a host that asks gets an error.",
		cobra.ExactArgs(1), func(r *remote, args []string) (any, error) {
			if args[0] == "none" {
				return targetserver.GrantRequest{Exactly: true}, nil
			}
			n, err := number("queues", args[0], 1, nvme.MaxQueues)
			return targetserver.GrantRequest{NQN: r.nqn, Limit: n, Exactly: exactly}, err
		})
	cmd.Flags().BoolVar(&exactly, "exactly", false, "so many, whatever the host asks for")
	return cmd
}

func dropVerb(runDir dirFunc) *cobra.Command {
	qid := -1
	cmd := change(runDir, "drop", "Drop connections", "Of all queues, or of those with one id.",
		cobra.NoArgs, func(r *remote, _ []string) (any, error) {
			if qid < -1 || qid > nvme.MaxQueues {
				return nil, fmt.Errorf("--qid %d: want a number, 0 to %d", qid, nvme.MaxQueues)
			}
			return targetserver.DropRequest{NQN: r.nqn, QID: qid}, nil
		})
	cmd.Flags().IntVar(&qid, "qid", -1, "id of the queues, 0 is the admin queue (default: all)")
	return cmd
}

func anaVerb(runDir dirFunc) *cobra.Command {
	return change(runDir, "ana GROUP STATE", "Set the state of an ANA group",
		"STATE: optimized, non-optimized, inaccessible, persistent-loss or change.",
		cobra.ExactArgs(2), func(r *remote, args []string) (any, error) {
			n, err := number("group", args[0], 1, 1<<32-1)
			if err == nil {
				_, err = options.ParseANAState(args[1])
			}
			return targetserver.ANARequest{NQN: r.nqn, Group: uint32(n), State: args[1]}, err
		})
}

func namespaceVerbs(runDir dirFunc) *cobra.Command {
	cmd := &cobra.Command{Use: "namespace", Short: "Add, remove, change and hide namespaces", Args: cobra.NoArgs}
	cmd.AddCommand(
		change(runDir, "add NAMESPACE", "Add a namespace", "NAMESPACE: "+options.NamespaceWords+".",
			cobra.ExactArgs(1), func(r *remote, args []string) (any, error) {
				n, err := options.ParseNamespace(args[0])
				if err != nil {
					err = fmt.Errorf("namespace %q: %w; want %s", args[0], err, options.NamespaceWords)
				}
				return targetserver.AddRequest{NQN: r.nqn, Namespace: n.String()}, err
			}),
		change(runDir, "remove NSID", "Remove a namespace", "",
			cobra.ExactArgs(1), func(r *remote, args []string) (any, error) {
				n, err := number("namespace", args[0], 1, 1<<32-2)
				return targetserver.RemoveRequest{NQN: r.nqn, NSID: uint32(n)}, err
			}),
		change(runDir, "resize NSID [SIZE]", "Change the size of a namespace",
			"Without SIZE, the namespace gets the current size of its file or device.",
			cobra.RangeArgs(1, 2), func(r *remote, args []string) (any, error) {
				n, err := number("namespace", args[0], 1, 1<<32-2)
				request := targetserver.ResizeRequest{NQN: r.nqn, NSID: uint32(n)}
				if err == nil && len(args) > 1 {
					request.Size, err = options.ParseSize(args[1])
				}
				return request, err
			}),
		change(runDir, "read-only NSID {on | off}", "Protect a namespace from writes", "",
			cobra.ExactArgs(2), func(r *remote, args []string) (any, error) {
				n, err := number("namespace", args[0], 1, 1<<32-2)
				if err != nil {
					return nil, err
				}
				on, err := onOff(args[1])
				return targetserver.ReadOnlyRequest{NQN: r.nqn, NSID: uint32(n), On: on}, err
			}),
		without(change(runDir, "hide {TIME | off}", "Hide all namespaces for a time",
			"Hosts find none, as with a target that opens its port before it adds its namespaces, and\nare notified of each when the time is over.",
			cobra.ExactArgs(1), func(_ *remote, args []string) (any, error) {
				ms, err := milliseconds(args[0])
				return targetserver.HideRequest{Milliseconds: ms}, err
			})),
	)
	return cmd
}

const faultExamples = `

The first fault that hits a command counts. For example:

  target fault opcode=write,count=3,status=0x6        three writes end with "internal error"
  target fault opcode=read,delay=2s                   reads are slow
  target fault opcode=read,disconnect                 each read ends its connection
  target fault opcode=write,count=1,hold=6s           a write stays inside the store for 6 s and is
                                                      carried out then, even if its connection ends
  target fault opcode=read,count=1,status=0x82,crd=1  "not ready", to be retried after CRDT1
                                                      (target --retry-delays)
  target fault admin,opcode=keep-alive,drop           keep alive commands get no answer
  target fault cns=3,status=0x2,dnr                   Identify has no namespace descriptors
  target fault cns=0,nsid=2,status=0x6                namespace 2 cannot be identified
  target fault cns=1,patch=1792:ffffffff              Identify Controller has a huge IOCCSZ
  target fault lid=4,count=1,corrupt=lost             the answer to a Get Log Page is lost`

func faultVerb(runDir dirFunc) *cobra.Command {
	return without(change(runDir, "fault FAULT", "Make commands fail", "FAULT: "+options.FaultWords+"."+faultExamples,
		cobra.ExactArgs(1), func(_ *remote, args []string) (any, error) {
			_, err := options.ParseFault(args[0])
			if err != nil {
				err = fmt.Errorf("fault %q: %w; want %s", args[0], err, options.FaultWords)
			}
			return targetserver.FaultRequest{Fault: args[0]}, err
		}))
}

func clearVerb(runDir dirFunc) *cobra.Command {
	return without(change(runDir, "clear [FAULT]", "End a fault, or everything that is wrong on purpose", "",
		cobra.MaximumNArgs(1), func(_ *remote, args []string) (any, error) {
			if len(args) == 0 {
				return targetserver.UnfaultRequest{}, nil
			}
			n, err := number("fault", args[0], 1, 1<<31-1)
			return targetserver.UnfaultRequest{ID: n}, err
		}))
}

func stallVerb(runDir dirFunc) *cobra.Command {
	return without(change(runDir, "stall {on | off}", "Begin no command; connections stay", "",
		cobra.ExactArgs(1), func(_ *remote, args []string) (any, error) {
			on, err := onOff(args[0])
			return targetserver.StallRequest{On: on}, err
		}))
}

func freezeVerb(runDir dirFunc) *cobra.Command {
	return without(change(runDir, "freeze {TIME | off}", "Do nothing for a time",
		"Commands and connect requests wait, timers stop and no controller ends, as if the machine\nwere paused. Then the target continues where it was.",
		cobra.ExactArgs(1), func(_ *remote, args []string) (any, error) {
			ms, err := milliseconds(args[0])
			return targetserver.FreezeRequest{Milliseconds: ms}, err
		}))
}

func rejectVerb(runDir dirFunc) *cobra.Command {
	return without(change(runDir, "reject {STATUS | off}", "Reject connect requests",
		"STATUS is that of NVMe/RDMA, like 6, which is \"no resources\".",
		cobra.ExactArgs(1), func(_ *remote, args []string) (any, error) {
			if args[0] == "off" {
				return targetserver.RejectRequest{}, nil
			}
			n, err := number("status", args[0], 1, uint64(nvme.RDMARejectInvalidCNTLID))
			return targetserver.RejectRequest{Status: n}, err
		}))
}

func refuseVerb(runDir dirFunc) *cobra.Command {
	var dnr bool
	cmd := change(runDir, "refuse {STATUS | off}", "Answer Connect commands with a status",
		"STATUS is status code type and code as in nvme-cli, like 0x182.",
		cobra.ExactArgs(1), func(_ *remote, args []string) (any, error) {
			if args[0] == "off" {
				return targetserver.RefuseRequest{}, nil
			}
			s, err := options.ParseStatus(args[0], dnr)
			return targetserver.RefuseRequest{Status: int(s)}, err
		})
	cmd.Flags().BoolVar(&dnr, "dnr", false, "with \"do not retry\"")
	return without(cmd)
}

func newTargetList(runDir dirFunc) *cobra.Command {
	var format string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show the running targets",
		Args:  cobra.NoArgs,
		RunE: verb("target list", func(cmd *cobra.Command, _ []string) error {
			runDir, err := runDir()
			if err != nil {
				return err
			}
			dir := string(runDir)
			names, err := targetserver.List(dir)
			if err != nil {
				return err
			}
			found := []targetserver.Status{}
			for _, name := range names {
				ctx, cancel := context.WithTimeout(cmd.Context(), statusTime)
				s, err := targetserver.NewClient(targetserver.Socket(dir, name)).Status(ctx)
				cancel()
				if err != nil {
					cmd.PrintErrf("%s: target list: %s: %s\n", programName, name, output.Text(err.Error()))
					continue
				}
				found = append(found, s)
			}
			return output.Targets(cmd.OutOrStdout(), found, format, verbose)
		}),
	}
	formatFlag(cmd.Flags(), &format)
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "also show hosts, faults and counters")
	return cmd
}
