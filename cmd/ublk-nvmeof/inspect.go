package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/output"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
)

// inspectVerbs are the verbs that show what a controller says of itself. Their names,
// flags and output are those of nvme-cli 2.x.
func inspectVerbs(runDir dirFunc) []*cobra.Command {
	return []*cobra.Command{
		newIDCtrl(runDir), newIDNS(runDir), newListNS(runDir), newNSDescs(runDir),
		newSmartLog(runDir), newErrorLog(runDir), newANALog(runDir), newGetLog(runDir),
		newGetFeature(runDir), newShowRegs(runDir), newGetProperty(runDir),
		newReset(runDir), newRescan(runDir), newReauth(runDir), newPolicy(runDir),
	}
}

// write writes data as it is, if that is asked for, or with show.
func (a *asked) write(cmd *cobra.Command, data []byte, show func(io.Writer) error) error {
	if a.raw || a.format == output.Binary {
		_, err := cmd.OutOrStdout().Write(data)
		return err
	}
	return show(cmd.OutOrStdout())
}

func newIDCtrl(runDir dirFunc) *cobra.Command {
	var human bool
	return askVerb(runDir, "id-ctrl DEVICE", "Show the Identify data of a controller", func(cmd *cobra.Command, a *asked) error {
		page, err := a.identify(nvme.CNSController, 0)
		if err != nil {
			return err
		}
		return a.write(cmd, page, func(w io.Writer) error { return output.IdentifyController(w, page, human, a.format) })
	}, rawFlag, humanFlag(&human), pathFlag)
}

func newIDNS(runDir dirFunc) *cobra.Command {
	var human bool
	return askVerb(runDir, "id-ns DEVICE", "Show the Identify data of a namespace", func(cmd *cobra.Command, a *asked) error {
		nsid, err := a.namespace()
		if err != nil {
			return err
		}
		page, err := a.identify(nvme.CNSNamespace, nsid)
		if err != nil {
			return err
		}
		return a.write(cmd, page, func(w io.Writer) error { return output.IdentifyNamespace(w, page, nsid, human, a.format) })
	}, namespaceFlag, rawFlag, humanFlag(&human), pathFlag)
}

func newListNS(runDir dirFunc) *cobra.Command {
	var first uint32
	return askVerb(runDir, "list-ns DEVICE", "List the active namespaces of a controller", func(cmd *cobra.Command, a *asked) error {
		if first < 1 {
			return usage(fmt.Errorf("-n/--namespace-id \"%d\": want the first id of the list, 1 or more", first))
		}
		page, err := a.identify(nvme.CNSActiveNSList, first-1)
		if err != nil {
			return err
		}
		ids, err := nvme.ActiveNSListAt(page).NSIDs()
		if err != nil {
			return err
		}
		return output.NamespaceList(cmd.OutOrStdout(), ids, a.format)
	}, pathFlag, func(cmd *cobra.Command, _ *asked) {
		cmd.Flags().Uint32VarP(&first, "namespace-id", "n", 1, "`id` with which the list begins")
	})
}

func newNSDescs(runDir dirFunc) *cobra.Command {
	return askVerb(runDir, "ns-descs DEVICE", "Show the identifiers of a namespace", func(cmd *cobra.Command, a *asked) error {
		nsid, err := a.namespace()
		if err != nil {
			return err
		}
		page, err := a.identify(nvme.CNSNamespaceDescriptors, nsid)
		if err != nil {
			return err
		}
		return a.write(cmd, page, func(w io.Writer) error { return output.NamespaceDescriptors(w, page, nsid, a.format) })
	}, namespaceFlag, rawFlag, pathFlag)
}

func newSmartLog(runDir dirFunc) *cobra.Command {
	var human bool
	return askVerb(runDir, "smart-log DEVICE", "Show the health log of a controller, or of a namespace if it has one", func(cmd *cobra.Command, a *asked) error {
		nsid := cmp.Or(a.nsid, nvme.NSIDAll)
		log, err := a.readLog(logRequest{lid: nvme.LogSMART, nsid: nsid, length: nvme.SMARTLogSize})
		if err != nil {
			return err
		}
		return a.write(cmd, log, func(w io.Writer) error { return output.SMARTLog(w, log, a.name, nsid, human, a.format) })
	}, wholeFlag, rawFlag, humanFlag(&human), pathFlag)
}

func newErrorLog(runDir dirFunc) *cobra.Command {
	entries := uint32(64)
	return askVerb(runDir, "error-log DEVICE", "Show the last errors of a controller", func(cmd *cobra.Command, a *asked) error {
		if entries < 1 {
			return usage(fmt.Errorf("-e/--log-entries \"%d\": want a number, 1 or more", entries))
		}
		page, err := a.identify(nvme.CNSController, 0)
		if err != nil {
			return err
		}
		n := min(entries, uint32(nvme.IdentifyControllerAt(page).ELPE())+1)
		log, err := a.readLog(logRequest{lid: nvme.LogError, nsid: nvme.NSIDAll, length: int(n) * nvme.ErrorLogEntrySize})
		if err != nil {
			return err
		}
		return a.write(cmd, log, func(w io.Writer) error { return output.ErrorLog(w, log, a.name, a.format) })
	}, func(cmd *cobra.Command, _ *asked) {
		cmd.Flags().Uint32VarP(&entries, "log-entries", "e", entries, "`number` of entries; a controller may have fewer")
	}, rawFlag, pathFlag)
}

func newANALog(runDir dirFunc) *cobra.Command {
	var groups bool
	return askVerb(runDir, "ana-log DEVICE", "Show which ANA state the groups of namespaces have on the path to a controller", func(cmd *cobra.Command, a *asked) error {
		page, err := a.identify(nvme.CNSController, 0)
		if err != nil {
			return err
		}
		log, parsed, err := a.readANALog(nvme.IdentifyControllerAt(page), groups)
		if err != nil {
			return err
		}
		return a.write(cmd, log, func(w io.Writer) error { return output.ANALog(w, parsed, a.name, a.path, a.format) })
	}, func(cmd *cobra.Command, _ *asked) {
		cmd.Flags().BoolVarP(&groups, "groups", "g", false, "show the groups without their namespaces")
	}, rawFlag, pathFlag)
}

// maxANAReads is how often the ANA log is read if it changes meanwhile.
const maxANAReads = 10

// readANALog reads the ANA log of a controller.
func (a *asked) readANALog(id *nvme.IdentifyController, groupsOnly bool) ([]byte, nvme.ANALog, error) {
	r := logRequest{lid: nvme.LogANA, nsid: nvme.NSIDAll}
	most := nvme.ANALogSize(id.NANAGRPID(), id.MNAN())
	if groupsOnly {
		r.lsp, most = 1, nvme.ANALogSize(id.NANAGRPID(), 0) // return groups only
	}
	for range maxANAReads {
		log, parsed, err := a.readGroups(r, min(most, maxLog))
		if err != nil || len(log) <= nvme.IdentifySize {
			return log, parsed, err
		}
		r.offset, r.length = 0, nvme.ANAHeaderSize
		header, err := a.readLog(r)
		if err != nil || bytes.Equal(header, log[:len(header)]) {
			return log, parsed, err
		}
	}
	return nil, nvme.ANALog{}, errors.New("the ANA log changed each time that it was read")
}

// readGroups reads as much of the ANA log as its groups take. A controller can have much
// more room for groups than it has groups.
func (a *asked) readGroups(r logRequest, most uint64) (log []byte, parsed nvme.ANALog, err error) {
	for uint64(len(log)) < most {
		r.offset, r.length = uint64(len(log)), int(min(initiator.MaxQuery, (most-uint64(len(log))+3)&^3))
		piece, qerr := a.readLog(r)
		if qerr != nil {
			if err == nil || !refusedBy(qerr) {
				err = qerr
			}
			return nil, parsed, err // what was wrong with the log before its end, if anything
		}
		log = append(log, piece...)
		if parsed, err = nvme.ParseANALog(log); err == nil {
			return log, parsed, nil
		}
	}
	return nil, parsed, err
}

func newGetLog(runDir dirFunc) *cobra.Command {
	var r logRequest
	var length, offsetType uint32
	return askVerb(runDir, "get-log DEVICE", "Read a log page", func(cmd *cobra.Command, a *asked) error {
		switch {
		case r.lid == 0 && !cmd.Flags().Changed("log-id"):
			return usage(fmt.Errorf("-i/--log-id: no value is given; want the number of a log page"))
		case length == 0:
			return usage(fmt.Errorf("-l/--log-len: no value is given; want the length in bytes"))
		case r.offset%4 != 0:
			return usage(fmt.Errorf("-L/--lpo \"%d\": want a multiple of 4", r.offset))
		case offsetType > 1:
			return usage(fmt.Errorf("-O/--ot \"%d\": want 0 for bytes or 1 for entries", offsetType))
		}
		r.length, r.byIndex = int(min(length, maxLog+1)), offsetType == 1
		r.nsid = cmp.Or(a.nsid, nvme.NSIDAll)
		log, err := a.readLog(r)
		if err != nil {
			return err
		}
		return a.write(cmd, log, func(w io.Writer) error { return output.LogPage(w, log, a.name, r.lid, r.nsid, a.format) })
	}, wholeFlag, rawFlag, pathFlag, func(cmd *cobra.Command, _ *asked) {
		f := cmd.Flags()
		f.Uint8VarP(&r.lid, "log-id", "i", 0, "`number` of the log page (required)")
		f.Uint32VarP(&length, "log-len", "l", 0, "`bytes` to read, a multiple of 4 (required)")
		f.Uint64VarP(&r.offset, "lpo", "L", 0, "`offset` of the first byte")
		f.Uint8VarP(&r.lsp, "lsp", "s", 0, "log specific `field`")
		f.Uint16VarP(&r.lsi, "lsi", "S", 0, "log specific `identifier`")
		f.BoolVarP(&r.rae, "rae", "r", false, "keep the event that announced the log page")
		f.Uint8VarP(&r.csi, "csi", "y", 0, "command set `identifier`")
		f.Uint32VarP(&offsetType, "ot", "O", 0, "`type` of the offset: 0 bytes, 1 entries")
		f.Uint8VarP(&r.uuidIndex, "uuid-index", "U", 0, "`index` of a UUID")
	})
}

// featureData is how many bytes of data features have that have any.
var featureData = map[uint8]int{
	0x03:                     4096,
	0x0C:                     256,
	0x0D:                     4096,
	nvme.FeatureTimestamp:    8,
	0x13:                     512,
	nvme.FeatureHostBehavior: 512,
	nvme.FeatureHostID:       16,
}

// featureRequest is a Get Features.
type featureRequest struct {
	id, sel uint8
	nsid    uint32
	cdw11   uint32
	length  int // < 0: what the feature has
}

// getFeature reads a feature. The host identifier is asked for in its long form, which is
// the only one on a fabric.
func (a *asked) getFeature(r featureRequest) (output.Feature, error) {
	if r.length < 0 {
		r.length = featureData[r.id]
		if r.sel == 3 {
			r.length = 0
		}
	}
	if r.id == nvme.FeatureHostID && r.length == 16 {
		r.cdw11 |= 1
	}
	var cmd nvme.Command
	cmd.SetGetFeatures(r.id)
	cmd.SetNSID(r.nsid)
	cmd.SetCDW10(uint32(r.id) | uint32(r.sel&7)<<8)
	cmd.SetCDW11(r.cdw11)
	data, result, err := a.query(&cmd, r.length)
	return output.Feature{ID: r.id, Select: r.sel, Result: uint32(result), Data: data}, err
}

func newGetFeature(runDir dirFunc) *cobra.Command {
	r := featureRequest{length: -1}
	var human bool
	return askVerb(runDir, "get-feature DEVICE", "Show a feature, or all that the controller has", func(cmd *cobra.Command, a *asked) error {
		switch {
		case r.sel > 3:
			return usage(fmt.Errorf("-s/--sel \"%d\": want 0 for the current, 1 the default, 2 the saved value, or 3 for what is supported", r.sel))
		case r.length < -1 || r.length > nvme.IdentifySize:
			return usage(fmt.Errorf("-l/--data-len \"%d\": want 0 to %d", r.length, nvme.IdentifySize))
		}
		r.nsid = a.namespaceOfDevice()
		if cmd.Flags().Changed("feature-id") {
			f, err := a.getFeature(r)
			if err != nil {
				return err
			}
			return a.write(cmd, f.Data, func(w io.Writer) error { return output.Features(w, []output.Feature{f}, human, a.format) })
		}
		var all []output.Feature
		for id := 1; id < 256; id++ {
			r.id = uint8(id)
			f, err := a.getFeature(r)
			switch {
			case err == nil:
				all = append(all, f)
			case !refusedBy(err):
				return err
			}
		}
		return output.Features(cmd.OutOrStdout(), all, human, a.format)
	}, namespaceFlag, rawFlag, humanFlag(&human), pathFlag, func(cmd *cobra.Command, _ *asked) {
		f := cmd.Flags()
		f.Uint8VarP(&r.id, "feature-id", "f", 0, "`number` of the feature (default: all)")
		f.Uint8VarP(&r.sel, "sel", "s", 0, "`value` to show: 0 current, 1 default, 2 saved, 3 what is supported")
		f.IntVarP(&r.length, "data-len", "l", -1, "`bytes` of data (default: what the feature has)")
		f.Uint32VarP(&r.cdw11, "cdw11", "c", 0, "`value` of command dword 11")
	})
}

// fabricProperties are the properties of a controller on a fabric that exist.
var fabricProperties = []struct {
	offset uint32
	wide   bool // 8 bytes
}{
	{nvme.PropCAP, true}, {nvme.PropVS, false}, {nvme.PropCC, false}, {nvme.PropCSTS, false}, {nvme.PropNSSR, false}, {nvme.PropCRTO, false},
}

func (a *asked) property(offset uint32, wide bool) (uint64, error) {
	var cmd nvme.Command
	cmd.SetPropertyGet(offset, wide)
	_, v, err := a.query(&cmd, 0)
	if !wide {
		v &= 1<<32 - 1
	}
	return v, err
}

func newShowRegs(runDir dirFunc) *cobra.Command {
	var human bool
	return askVerb(runDir, "show-regs DEVICE", "Show the properties of a controller", func(cmd *cobra.Command, a *asked) error {
		values := map[uint32]uint64{}
		for _, p := range fabricProperties {
			v, err := a.property(p.offset, p.wide)
			switch {
			case err == nil:
				values[p.offset] = v
			case !refusedBy(err):
				return err
			}
		}
		return output.Properties(cmd.OutOrStdout(), values, human, a.format)
	}, humanFlag(&human), pathFlag)
}

func newGetProperty(runDir dirFunc) *cobra.Command {
	var offset uint32
	var human bool
	return askVerb(runDir, "get-property DEVICE", "Show one property of a controller", func(cmd *cobra.Command, a *asked) error {
		if !cmd.Flags().Changed("offset") {
			return usage(fmt.Errorf("-O/--offset: no value is given; want the offset of a property"))
		}
		wide := offset == nvme.PropCAP || offset == 0x28 || offset == 0x30 || offset == 0x50
		v, err := a.property(offset, wide)
		if err != nil {
			return err
		}
		return output.Property(cmd.OutOrStdout(), offset, v, human, a.format)
	}, humanFlag(&human), pathFlag, func(cmd *cobra.Command, _ *asked) {
		cmd.Flags().Uint32VarP(&offset, "offset", "O", 0, "`offset` of the property (required)")
	})
}

func newReset(runDir dirFunc) *cobra.Command {
	return askVerb(runDir, "reset DEVICE", "Drop the connection to a controller and connect again, while requests wait", func(_ *cobra.Command, a *asked) error {
		return a.client.Reset(a.ctx)
	})
}

func newRescan(runDir dirFunc) *cobra.Command {
	return askVerb(runDir, "ns-rescan DEVICE", "Have the namespaces of a controller looked at, which happens soon after", func(_ *cobra.Command, a *asked) error {
		return a.client.Rescan(a.ctx)
	})
}
