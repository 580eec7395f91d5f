package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/control"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
)

// askTime is how long a verb waits for its server, which waits for the controller.
const askTime = 70 * time.Second

// asked is a controller that a verb asks, by way of the server that has it.
type asked struct {
	ctx    context.Context
	client *control.Client
	record state.Record
	name   string // what the command line calls it
	format string // of the output
	raw    bool   // output is the bytes of the controller
	nsid   uint32 // value of --namespace-id; 0: not given
	path   string // over which the controller is asked; empty: the server chooses, or has only one
}

// askVerb makes a verb that asks one controller. flags adds what only this verb has.
func askVerb(runDir dirFunc, use, short string, run func(*cobra.Command, *asked) error, flags ...func(*cobra.Command, *asked)) *cobra.Command {
	a := &asked{}
	name := firstField(use)
	cmd := &cobra.Command{
		Use: use, Short: short, Long: short + `.

The controller is named by its device (/dev/ublkb0, /dev/nbd0, or the socket of its NBD
server), by the NQN of its subsystem, or by the name of its server, such as ctrl0 (see
list -v). The server that is connected to the controller sends the commands.`,
		Args: wantArgs(1, 1),
		RunE: verb(name, func(cmd *cobra.Command, args []string) error {
			dir, err := runDir()
			if err != nil {
				return err
			}
			ctx, stop := context.WithTimeout(cmd.Context(), askTime)
			defer stop()
			if a.path != "" {
				if err := checkPaths([]string{a.path}); err != nil {
					return err
				}
			}
			if err := a.find(ctx, dir, args[0]); err != nil {
				return err
			}
			return run(cmd, a)
		}),
	}
	formatFlag(cmd.Flags(), &a.format)
	for _, add := range flags {
		add(cmd, a)
	}
	cmd.ValidArgsFunction = completeDevices(runDir)
	return cmd
}

// firstField is the name of the verb in a line of usage.
func firstField(use string) string {
	name, _, _ := strings.Cut(use, " ")
	return name
}

// rawFlag adds --raw-binary, and the output format that means the same.
func rawFlag(cmd *cobra.Command, a *asked) {
	f := cmd.Flags().Lookup("output-format")
	f.Value = options.OneOf(&a.format, output.Normal, output.JSON, output.Binary)
	cmd.Flags().BoolVarP(&a.raw, "raw-binary", "b", false, "write the bytes as they are")
}

// pathFlag adds --path.
func pathFlag(cmd *cobra.Command, a *asked) {
	cmd.Flags().StringVar(&a.path, "path", "", "ask the controller of one `path`, in the form of connect --path (default: of the first path that is connected)")
}

// humanFlag adds --human-readable, and --verbose, which means the same.
func humanFlag(human *bool) func(*cobra.Command, *asked) {
	return func(cmd *cobra.Command, _ *asked) {
		cmd.Flags().BoolVarP(human, "human-readable", "H", false, "explain the values")
		cmd.Flags().BoolVarP(human, "verbose", "v", false, "the same")
	}
}

// namespaceFlag adds --namespace-id.
func namespaceFlag(cmd *cobra.Command, a *asked) {
	cmd.Flags().Uint32VarP(&a.nsid, "namespace-id", "n", 0, "`id` of a namespace (default: that of the device)")
}

// wholeFlag adds --namespace-id for a verb about the whole controller.
func wholeFlag(cmd *cobra.Command, a *asked) {
	cmd.Flags().Uint32VarP(&a.nsid, "namespace-id", "n", 0, "`id` of a namespace (default: the whole controller)")
}

// find finds the running server that a name means.
func (a *asked) find(ctx context.Context, dir state.Dir, name string) error {
	records, err := dir.List()
	if err != nil {
		return err
	}
	found := slices.DeleteFunc(records, func(r state.Record) bool {
		return r.Err != nil || !serves(r, name) && r.Target.NQN != name
	})
	alive := slices.DeleteFunc(slices.Clone(found), func(r state.Record) bool { return !r.Alive })
	switch {
	case len(alive) == 1:
	case len(alive) > 1:
		var names []string
		for _, r := range alive {
			names = append(names, r.Name)
		}
		return usage(fmt.Errorf("%s: several servers have it; want one of %s", name, strings.Join(names, ", ")))
	case len(found) > 0:
		return exit.Errorf(exit.NotFound, "%s: its server, %s, has died; recover starts another one", name, found[0].Name)
	default:
		return exit.Errorf(exit.NotFound, "%s: no running server has it", name)
	}
	a.ctx, a.record, a.name = ctx, alive[0], name
	a.client = control.NewClient(alive[0].Socket())
	return nil
}

// namespace is the namespace that the command line means: the one that is given, that of
// the device, or the only one.
func (a *asked) namespace() (uint32, error) {
	if a.nsid != 0 {
		return a.nsid, nil
	}
	var ids []string
	for _, d := range a.record.Devices {
		if called(d, a.name) || len(a.record.Devices) == 1 {
			return d.NSID, nil
		}
		ids = append(ids, fmt.Sprint(d.NSID))
	}
	if len(ids) == 0 {
		return 0, usage(errors.New("-n/--namespace-id: no value is given, and the server has no device; want the id of a namespace"))
	}
	return 0, usage(fmt.Errorf("-n/--namespace-id: no value is given; want one of %s", strings.Join(ids, ", ")))
}

// namespaceOfDevice is the namespace that is given, or that of the device; 0 if the command
// line names neither.
func (a *asked) namespaceOfDevice() uint32 {
	for _, d := range a.record.Devices {
		if a.nsid == 0 && called(d, a.name) {
			return d.NSID
		}
	}
	return a.nsid
}

// query sends a command that reads n bytes.
func (a *asked) query(cmd *nvme.Command, n int) (data []byte, result uint64, err error) {
	r, err := a.client.Query(a.ctx, control.Query{Command: cmd[:], Length: n, Path: a.path})
	if err == nil {
		a.path = r.Path // all parts of an answer are of one controller
	}
	return r.Data, r.Result, err
}

// identify reads an identify data structure.
func (a *asked) identify(cns uint8, nsid uint32) ([]byte, error) {
	var cmd nvme.Command
	cmd.SetIdentify(cns, nsid, 0)
	page, _, err := a.query(&cmd, nvme.IdentifySize)
	return page, err
}

// logRequest is a Get Log Page.
type logRequest struct {
	lid       uint8
	nsid      uint32
	offset    uint64
	length    int // a multiple of 4
	rae       bool
	lsp       uint8
	lsi       uint16
	csi       uint8
	uuidIndex uint8
	byIndex   bool // offset counts entries
}

// maxLog is the longest log page that is read.
const maxLog = 16 << 20

// pieceOfLog is how many bytes of a log page to read with one command. It is as much as
// possible: Linux' target says that it can return a page from the middle, and returns the
// beginning.
func (a *asked) pieceOfLog(length int) (int, error) {
	if length <= nvme.IdentifySize {
		return length, nil
	}
	page, err := a.identify(nvme.CNSController, 0)
	if err != nil {
		return 0, err
	}
	most := min(length, initiator.MaxQuery)
	if mdts := nvme.IdentifyControllerAt(page).MaxTransfer(0); mdts > 0 { // of the smallest page that there is
		most = int(min(uint64(most), mdts))
	}
	return most, nil
}

// readLog reads a log page, piece by piece. Only the last piece clears the event that
// announced it, if the request says so.
func (a *asked) readLog(r logRequest) ([]byte, error) {
	if r.length < 4 || r.length > maxLog || r.length%4 != 0 {
		return nil, usage(fmt.Errorf("length %d of the log page: want a multiple of 4, 4 to %d", r.length, maxLog))
	}
	if r.byIndex && r.length > initiator.MaxQuery {
		return nil, usage(fmt.Errorf("length %d of a log page by index: want at most %d", r.length, initiator.MaxQuery))
	}
	most, err := a.pieceOfLog(r.length)
	if err != nil {
		return nil, err
	}
	var log []byte
	for len(log) < r.length {
		n := min(r.length-len(log), most)
		last := len(log)+n == r.length
		var cmd nvme.Command
		cmd.SetGetLogPage(r.lid, r.nsid, uint32(n), r.offset+uint64(len(log)), r.rae || !last)
		cmd.SetCDW10(cmd.CDW10() | uint32(r.lsp&0x7F)<<8)
		cmd.SetCDW11(cmd.CDW11() | uint32(r.lsi)<<16)
		cmd.SetCDW14(uint32(r.csi)<<24 | uint32(r.uuidIndex&0x7F))
		if r.byIndex {
			cmd.SetCDW14(cmd.CDW14() | 1<<23)
		}
		piece, _, err := a.query(&cmd, n)
		if err != nil {
			return nil, err
		}
		log = append(log, piece...)
	}
	return log, nil
}

// refusedBy reports whether the target, and nobody before it, refused a command.
func refusedBy(err error) bool {
	var e *exit.Error
	return errors.As(err, &e) && e.Code == exit.Negotiation
}
