package main

import (
	"context"
	"errors"
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

// changeTime is the time limit for a target to carry out a request.
const changeTime = 10 * time.Second

// remote holds the options of a command that sends a request to a running target.
type remote struct {
	runDir dirFunc
	target string // name of the target; empty: the only one that runs
	nqn    string
}

// find returns the run directory and the name of the target.
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
	return "", "", exit.Errorf(exit.NotFound, "no target %s runs; running targets: %s", r.target, strings.Join(names, ", "))
}

// gone waits until the target has ended.
func gone(ctx context.Context, dir, name string) error {
	for {
		names, err := targetserver.List(dir)
		if err != nil || !slices.Contains(names, name) {
			return err
		}
		select {
		case <-time.After(clearRetry):
		case <-ctx.Done():
			return exit.Errorf(exit.Timeout, "%s did not end in time", name)
		}
	}
}

// change returns a command that sends a request to a target. request makes the request
// from the arguments.
func change(runDir dirFunc, use, short, long string, args cobra.PositionalArgs, request func(r *remote, args []string) (any, error)) *cobra.Command {
	r := &remote{runDir: runDir}
	cmd := &cobra.Command{Use: use, Short: short, Long: long, Args: args}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return verb(commandName(cmd), func(cmd *cobra.Command, args []string) error {
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
			case errors.Is(err, context.DeadlineExceeded):
				return exit.Errorf(exit.Timeout, "%s did not answer within %v", name, changeTime)
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
	cmd.Flags().StringVar(&r.target, "target", "", "`NAME` of the target, as target list shows it (default: the only one that runs)")
	cmd.Flags().StringVarP(&r.nqn, "nqn", "n", "", "`NQN` of the subsystem (default: the only one)")
	return cmd
}

// without hides --nqn of a command that does not use it.
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

// milliseconds parses a time from 1 ms to 1 h, or off, which is 0.
func milliseconds(text string) (int64, error) {
	if text == "off" {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < time.Millisecond || d > time.Hour {
		return 0, fmt.Errorf("time %q: want a duration like 10s, from 1ms to 1h, or off", text)
	}
	return d.Milliseconds(), nil
}

// targetVerbs returns the commands that change or list running targets.
func targetVerbs(runDir dirFunc) []*cobra.Command {
	return []*cobra.Command{
		newTargetList(runDir), grantVerb(runDir), dropVerb(runDir), namespaceVerbs(runDir), anaVerb(runDir), authVerb(runDir), referralVerbs(runDir),
		faultVerb(runDir), clearVerb(runDir), stallVerb(runDir), freezeVerb(runDir), rejectVerb(runDir), refuseVerb(runDir),
		without(change(runDir, "stop", "End a target", "",
			noArgs, func(*remote, []string) (any, error) { return targetserver.StopRequest{}, nil })),
	}
}

func grantVerb(runDir dirFunc) *cobra.Command {
	var exactly bool
	cmd := change(runDir, "grant {N | none}", "Limit the I/O queues of a controller",
		"A host sees the new limit when it connects the next time; \"target drop\" makes it connect again.\nWith none, a host that asks for queues gets an error. The limit N stays until it is changed;\n\"target clear\" does not change it, but ends none and --exactly.",
		wantArgs(1, 1), func(r *remote, args []string) (any, error) {
			if args[0] == "none" {
				return targetserver.GrantRequest{Exactly: true}, nil
			}
			n, err := number("queues", args[0], 1, nvme.MaxQueues)
			if err != nil {
				err = fmt.Errorf("%w, or none", err)
			}
			return targetserver.GrantRequest{NQN: r.nqn, Limit: n, Exactly: exactly}, err
		})
	cmd.Flags().BoolVar(&exactly, "exactly", false, "grant exactly N queues, whatever number the host requests")
	return cmd
}

func dropVerb(runDir dirFunc) *cobra.Command {
	qid, port := -1, 0
	cmd := change(runDir, "drop", "Drop connections", "Drops the connections of all queues, of the queues with one id, or of one port.",
		noArgs, func(r *remote, _ []string) (any, error) {
			if qid < -1 || qid > nvme.MaxQueues {
				return nil, fmt.Errorf("--qid %d: want a number, 0 to %d", qid, nvme.MaxQueues)
			}
			if port < 0 || port > 255 {
				return nil, fmt.Errorf("--port %d: want the number of a port", port)
			}
			return targetserver.DropRequest{NQN: r.nqn, QID: qid, Port: uint16(port)}, nil
		})
	cmd.Flags().IntVar(&port, "port", 0, "`number` of the port whose connections are dropped (default: any)")
	cmd.Flags().IntVar(&qid, "qid", -1, "id of the queues; 0 is the admin queue (default: all queues)")
	return cmd
}

func anaVerb(runDir dirFunc) *cobra.Command {
	port := 0
	cmd := change(runDir, "ana GROUP STATE", "Set the state of an ANA group",
		"STATE is optimized, non-optimized, inaccessible, persistent-loss or change.",
		wantArgs(2, 2), func(r *remote, args []string) (any, error) {
			n, err := number("group", args[0], 1, 1<<32-1)
			if err == nil {
				_, err = options.ParseANAState(args[1])
			}
			if err == nil && (port < 0 || port > 255) {
				err = fmt.Errorf("--port %d: want the number of a port", port)
			}
			return targetserver.ANARequest{NQN: r.nqn, Group: uint32(n), State: args[1], Port: uint16(port)}, err
		})
	cmd.Flags().IntVar(&port, "port", 0, "`number` of the port over which the state is meant (default: all)")
	return cmd
}

func authVerb(runDir dirFunc) *cobra.Command {
	var a options.HostAuth
	var cmd *cobra.Command
	cmd = change(runDir, "auth HOSTNQN", "Change how a host must authenticate",
		"The flags are those of target. What is not given stays as it is. With --dhchap-ctrl-key none,\ncontrollers have no key any more. With --dhchap-key none, the host need not authenticate any\nmore, and its other settings are gone. Connections stay; what is set counts when the host\nauthenticates the next time. \"target list -v\" shows what is set.",
		wantArgs(1, 1), func(r *remote, args []string) (any, error) {
			if err := nvme.ValidateNQN(args[0]); err != nil {
				return nil, err
			}
			text, err := a.Change(cmd.Flags())
			return targetserver.AuthRequest{NQN: r.nqn, Host: args[0], Auth: text}, err
		})
	options.AddHostAuthFlags(cmd.Flags(), &a)
	return cmd
}

func referralVerbs(runDir dirFunc) *cobra.Command {
	cmd := &cobra.Command{Use: "referral", Short: "Add and remove referrals to other discovery services", Args: noArgs}
	request := func(remove bool) func(*remote, []string) (any, error) {
		return func(_ *remote, args []string) (any, error) {
			_, err := options.ParseReferral(args[0])
			if err != nil {
				err = fmt.Errorf("referral %q: want %s", args[0], options.ReferralWords)
			}
			return targetserver.ReferralRequest{Address: args[0], Remove: remove}, err
		}
	}
	cmd.AddCommand(
		without(change(runDir, "add ADDRESS", "Refer hosts to a discovery service", "ADDRESS is "+options.ReferralWords+".", wantArgs(1, 1), request(false))),
		without(change(runDir, "remove ADDRESS", "End a referral", "ADDRESS is as for add.", wantArgs(1, 1), request(true))))
	return cmd
}

func namespaceVerbs(runDir dirFunc) *cobra.Command {
	cmd := &cobra.Command{Use: "namespace", Short: "Add, remove, change and hide namespaces", Args: noArgs}
	cmd.AddCommand(
		change(runDir, "add NAMESPACE", "Add a namespace", "NAMESPACE is "+options.NamespaceWords+".",
			wantArgs(1, 1), func(r *remote, args []string) (any, error) {
				n, err := options.ParseNamespace(args[0])
				if err != nil {
					err = fmt.Errorf("namespace %q: %w; want %s", args[0], err, options.NamespaceWords)
				}
				return targetserver.AddRequest{NQN: r.nqn, Namespace: n.String()}, err
			}),
		change(runDir, "remove NSID", "Remove a namespace", "",
			wantArgs(1, 1), func(r *remote, args []string) (any, error) {
				n, err := number("namespace", args[0], 1, 1<<32-2)
				return targetserver.RemoveRequest{NQN: r.nqn, NSID: uint32(n)}, err
			}),
		change(runDir, "resize NSID [SIZE]", "Change the size of a namespace",
			"Without SIZE, the namespace gets the current size of its file or device.",
			wantArgs(1, 2), func(r *remote, args []string) (any, error) {
				n, err := number("namespace", args[0], 1, 1<<32-2)
				request := targetserver.ResizeRequest{NQN: r.nqn, NSID: uint32(n)}
				if err == nil && len(args) > 1 {
					request.Size, err = options.ParseSize(args[1])
				}
				return request, err
			}),
		change(runDir, "read-only NSID {on | off}", "Protect a namespace from writes", "",
			wantArgs(2, 2), func(r *remote, args []string) (any, error) {
				n, err := number("namespace", args[0], 1, 1<<32-2)
				if err != nil {
					return nil, err
				}
				on, err := onOff(args[1])
				return targetserver.ReadOnlyRequest{NQN: r.nqn, NSID: uint32(n), On: on}, err
			}),
		without(change(runDir, "hide {TIME | off}", "Hide all namespaces for a time",
			"Hosts find no namespaces, as with a target that opens its port before it adds its namespaces.\nWhen the time has passed, hosts are notified of each namespace.",
			wantArgs(1, 1), func(_ *remote, args []string) (any, error) {
				ms, err := milliseconds(args[0])
				return targetserver.HideRequest{Milliseconds: ms}, err
			})),
	)
	return cmd
}

const faultExamples = `

If several faults match a command, the first one applies. For example:

  target fault opcode=write,count=3,status=0x6        three writes fail with "internal error"
  target fault opcode=read,delay=2s                   each read takes 2 s longer
  target fault opcode=read,disconnect                 each read ends its connection
  target fault opcode=write,count=1,hold=6s           one write waits inside the store for 6 s and is
                                                      then carried out, even if its connection ends
  target fault opcode=read,count=1,status=0x82,crd=1  one read fails with "not ready", and the host
                                                      retries it after CRDT1 (target --retry-delays)
  target fault admin,opcode=keep-alive,drop           Keep Alive commands get no answer
  target fault cns=3,status=0x2,dnr                   Identify returns no namespace descriptors
  target fault cns=0,nsid=2,status=0x6                namespace 2 cannot be identified
  target fault cns=1,patch=1792:ffffffff              Identify Controller returns a huge IOCCSZ
  target fault lid=4,count=1,corrupt=lost             the answer to one Get Log Page is lost
  target fault admin,auth=challenge,patch=9:000000
                                                      the target chooses no Diffie-Hellman group
  target fault admin,auth=success1,replay             each proof that the target has its key is a copy of
                                                      the first one`

func faultVerb(runDir dirFunc) *cobra.Command {
	return without(change(runDir, "fault FAULT", "Make commands fail", "FAULT is "+options.FaultWords+"."+faultExamples,
		wantArgs(1, 1), func(_ *remote, args []string) (any, error) {
			_, err := options.ParseFault(args[0])
			if err != nil {
				err = fmt.Errorf("fault %q: %w; want %s", args[0], err, options.FaultWords)
			}
			return targetserver.FaultRequest{Fault: args[0]}, err
		}))
}

func clearVerb(runDir dirFunc) *cobra.Command {
	return without(change(runDir, "clear [FAULT]", "End one fault, or all faults, stalls, freezes and refusals",
		"FAULT is the number that \"target fault\" printed and \"target list -v\" shows. Without it, everything ends\nthat the commands fault, stall, freeze, reject, refuse and namespace hide have begun, and what\n"+
			"\"target grant none\" and \"target grant --exactly\" have set. The limit of \"target grant N\", the states\nof ANA groups and the namespaces stay as they are.",
		wantArgs(0, 1), func(_ *remote, args []string) (any, error) {
			if len(args) == 0 {
				return targetserver.UnfaultRequest{}, nil
			}
			n, err := number("fault", args[0], 1, 1<<31-1)
			return targetserver.UnfaultRequest{ID: n}, err
		}))
}

func stallVerb(runDir dirFunc) *cobra.Command {
	return without(change(runDir, "stall {on | off}", "Start no commands, and keep connections", "",
		wantArgs(1, 1), func(_ *remote, args []string) (any, error) {
			on, err := onOff(args[0])
			return targetserver.StallRequest{On: on}, err
		}))
}

func freezeVerb(runDir dirFunc) *cobra.Command {
	return without(change(runDir, "freeze {TIME | off}", "Freeze the target for a time",
		"Commands and connect requests wait, timers stop and no controller ends, as if the machine\nwere paused. Afterwards the target continues.",
		wantArgs(1, 1), func(_ *remote, args []string) (any, error) {
			ms, err := milliseconds(args[0])
			return targetserver.FreezeRequest{Milliseconds: ms}, err
		}))
}

func rejectVerb(runDir dirFunc) *cobra.Command {
	return without(change(runDir, "reject {STATUS | off}", "Reject connect requests",
		"STATUS is a status code of NVMe/RDMA, for example 6, \"no resources\".",
		wantArgs(1, 1), func(_ *remote, args []string) (any, error) {
			if args[0] == "off" {
				return targetserver.RejectRequest{}, nil
			}
			n, err := number("status", args[0], 1, uint64(nvme.RDMARejectInvalidCNTLID))
			if err != nil {
				err = fmt.Errorf("%w, or off", err)
			}
			return targetserver.RejectRequest{Status: n}, err
		}))
}

func refuseVerb(runDir dirFunc) *cobra.Command {
	var dnr bool
	cmd := change(runDir, "refuse {STATUS | off}", "Answer Connect commands with a status",
		"STATUS combines status code type and status code as nvme-cli does, for example 0x182.",
		wantArgs(1, 1), func(_ *remote, args []string) (any, error) {
			if args[0] == "off" {
				return targetserver.RefuseRequest{}, nil
			}
			s, err := options.ParseStatus(args[0], dnr)
			if err != nil {
				err = fmt.Errorf("%w, or off", err)
			}
			return targetserver.RefuseRequest{Status: int(s)}, err
		})
	cmd.Flags().BoolVar(&dnr, "dnr", false, "set the \"do not retry\" bit")
	return without(cmd)
}

func newTargetList(runDir dirFunc) *cobra.Command {
	var format string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show the running targets",
		Args:  noArgs,
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
				if errors.Is(err, context.DeadlineExceeded) {
					err = fmt.Errorf("it did not answer within %v", statusTime)
				}
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
