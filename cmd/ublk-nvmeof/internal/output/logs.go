package output

import (
	"encoding/hex"
	"fmt"
	"io"

	"ublk-nvmeof/nvme"
)

// smartPlaces are the fields of the SMART log (Base, "SMART / Health Information").
var smartPlaces = []place{
	{name: "critical_warning", at: 0, size: 1, kind: hexadecimal},
	{name: "temperature", at: 1, size: 2, kind: kelvins},
	{name: "avail_spare", at: 3, size: 1, kind: percent, label: "available_spare"},
	{name: "spare_thresh", at: 4, size: 1, kind: percent, label: "available_spare_threshold"},
	{name: "percent_used", at: 5, size: 1, kind: percent, label: "percentage_used"},
	{name: "endurance_grp_critical_warning_summary", at: 6, size: 1, kind: hexadecimal, label: "endurance group critical warning summary"},
	{name: "data_units_read", at: 32, size: 16, label: "Data Units Read"},
	{name: "data_units_written", at: 48, size: 16, label: "Data Units Written"},
	{name: "host_read_commands", at: 64, size: 16},
	{name: "host_write_commands", at: 80, size: 16},
	{name: "controller_busy_time", at: 96, size: 16},
	{name: "power_cycles", at: 112, size: 16},
	{name: "power_on_hours", at: 128, size: 16},
	{name: "unsafe_shutdowns", at: 144, size: 16},
	{name: "media_errors", at: 160, size: 16},
	{name: "num_err_log_entries", at: 176, size: 16},
	{name: "warning_temp_time", at: 192, size: 4, label: "Warning Temperature Time"},
	{name: "critical_comp_time", at: 196, size: 4, label: "Critical Composite Temperature Time"},
}

var thermalPlaces = []place{
	{name: "thm_temp1_trans_count", at: 216, size: 4, label: "Thermal Management T1 Trans Count"},
	{name: "thm_temp2_trans_count", at: 220, size: 4, label: "Thermal Management T2 Trans Count"},
	{name: "thm_temp1_total_time", at: 224, size: 4, label: "Thermal Management T1 Total Time"},
	{name: "thm_temp2_total_time", at: 228, size: 4, label: "Thermal Management T2 Total Time"},
}

// SMARTLog writes the health log of a device. With human, critical_warning has its bits, in
// JSON as well.
func SMARTLog(w io.Writer, log []byte, device string, nsid uint32, human bool, format string) error {
	o := decode(log, smartPlaces)
	for i := range 8 {
		at := 200 + 2*i
		if le.Uint16(log[at:]) == 0 {
			continue // there is no such sensor
		}
		sensor := place{name: fmt.Sprintf("temperature_sensor_%d", i+1), at: at, size: 2, kind: kelvins, label: fmt.Sprintf("Temperature Sensor %d", i+1)}
		o = append(o, decode(log, []place{sensor})...)
	}
	o = append(o, decode(log, thermalPlaces)...)
	if format == JSON {
		if human {
			o[0].value = criticalWarning(log[0])
		}
		return writeJSON(w, o)
	}
	fmt.Fprintf(w, "Smart Log for NVME device:%s namespace-id:%x\n", Text(device), nsid)
	return o.writeText(w, 40, human)
}

// criticalWarning has the bits of the critical warning with nvme-cli's names.
func criticalWarning(v byte) object {
	o := object{{name: "value", value: v}}
	for i, name := range []string{"available_spare", "temp_threshold", "reliability_degraded", "ro", "vmbu_failed", "pmr_ro"} {
		o = append(o, member{name: name, value: v >> i & 1})
	}
	return o
}

// errorPlaces are the fields of an entry of the error log (Base, "Error Information").
// The last three have no place in the JSON of nvme-cli.
var errorPlaces = []place{
	{name: "error_count", at: 0, size: 8},
	{name: "sqid", at: 8, size: 2},
	{name: "cmdid", at: 10, size: 2, kind: hexadecimal},
	{name: "parm_error_location", at: 14, size: 2, kind: hexadecimal, label: "parm_err_loc"},
	{name: "lba", at: 16, size: 8, kind: hexadecimal},
	{name: "nsid", at: 24, size: 4, kind: hexadecimal},
	{name: "vs", at: 28, size: 1},
	{name: "trtype", at: 29, size: 1, kind: hexadecimal},
	{name: "cs", at: 32, size: 8, kind: hexadecimal},
	{name: "trtype_spec_info", at: 40, size: 2, kind: hexadecimal},
	{name: "csi", at: 30, size: 1},
	{name: "opcode", at: 31, size: 1, kind: hexadecimal},
	{name: "log_page_version", at: 63, size: 1},
}

// errorEntry decodes an entry of the error log.
func errorEntry(b []byte) object {
	o := decode(b, errorPlaces)
	field := le.Uint16(b[12:])
	status := nvme.Status(field >> 1)
	between := object{
		{name: "status_field", value: uint16(status), label: "status_field", text: fmt.Sprintf("%s (%s)", hexNumber(uint16(status)), status)},
		{name: "phase_tag", value: field & 1, label: "phase_tag", text: hexNumber(field & 1)},
	}
	return append(append(append(object{}, o[:3]...), between...), o[3:]...)
}

// ErrorLog writes the entries of the error log of a device.
func ErrorLog(w io.Writer, log []byte, device, format string) error {
	entries := []object{}
	for ; len(log) >= nvme.ErrorLogEntrySize; log = log[nvme.ErrorLogEntrySize:] {
		entries = append(entries, errorEntry(log))
	}
	if format == JSON {
		return writeJSON(w, object{{name: "errors", value: entries}})
	}
	fmt.Fprintf(w, "Error Log Entries for device:%s entries:%d\n", Text(device), len(entries))
	for i, e := range entries {
		fmt.Fprintf(w, ".................\n Entry[%2d]\n.................\n", i)
		if err := e.writeText(w, 16, false); err != nil {
			return err
		}
	}
	return nil
}

// ANALog writes the ANA log of a device, and the path over which it was read if that is given.
func ANALog(w io.Writer, log nvme.ANALog, device, path, format string) error {
	groups := []object{}
	for g := range log.Groups() {
		list := []object{}
		for id := range g.NSIDs() {
			list = append(list, object{{name: "nsid", value: id, label: "\tnsid", text: fmt.Sprint(id)}})
		}
		groups = append(groups, object{
			counted("grpid", g.ID), counted("nnsids", g.NumNSIDs()), counted("chgcnt", g.ChangeCount),
			{name: "state", value: anaState(g.State), label: "state", text: anaState(g.State)},
			{name: "NSIDS", value: list},
		})
	}
	if format == JSON {
		out := object{
			{name: "Asymmetric Namespace Access Log for NVMe device", value: device},
			counted("chgcnt", log.ChangeCount()), counted("ngrps", log.NumGroups()),
			{name: "ANA DESC LIST ", value: groups}, // with the space
		}
		if path != "" {
			out = append(out, member{name: "path", value: path})
		}
		return writeJSON(w, out)
	}
	fmt.Fprintf(w, "Asymmetric Namespace Access Log for NVMe device: %s\n", Text(device))
	if path != "" {
		fmt.Fprintf(w, "over path: %s\n", Text(path))
	}
	fmt.Fprintf(w, "ANA LOG HEADER :-\nchgcnt\t:\t%d\nngrps\t:\t%d\nANA Log Desc :-\n", log.ChangeCount(), log.NumGroups())
	for g := range log.Groups() {
		fmt.Fprintf(w, "grpid\t:\t%d\nnnsids\t:\t%d\nchgcnt\t:\t%d\nstate\t:\t%s\n", g.ID, g.NumNSIDs(), g.ChangeCount, anaState(g.State))
		for id := range g.NSIDs() {
			fmt.Fprintf(w, "\tnsid\t:\t%d\n", id)
		}
		if _, err := fmt.Fprintln(w); err != nil {
			return err
		}
	}
	return nil
}

// counted is a member that is a number, the same for people and programs.
func counted[T any](name string, n T) member {
	return member{name: name, value: n, label: name, text: fmt.Sprint(n)}
}

// anaState is nvme-cli's word for an ANA state.
func anaState(s nvme.ANAState) string {
	switch s {
	case nvme.ANAOptimized:
		return "optimized"
	case nvme.ANANonOptimized:
		return "non-optimized"
	case nvme.ANAInaccessible:
		return "inaccessible"
	case nvme.ANAPersistentLoss:
		return "persistent-loss"
	case nvme.ANAChange:
		return "change"
	}
	return "invalid state"
}

// LogPage writes any log page of a device. nvme-cli has no JSON for it.
func LogPage(w io.Writer, log []byte, device string, lid uint8, nsid uint32, format string) error {
	if format == JSON {
		return writeJSON(w, object{
			{name: "schema_version", value: SchemaVersion}, {name: "log_id", value: lid},
			{name: "namespace_id", value: nsid}, {name: "data", value: hex.EncodeToString(log)},
		})
	}
	fmt.Fprintf(w, "Device:%s log-id:%d namespace-id:%s\n", Text(device), lid, hexNumber(nsid))
	return Dump(w, log)
}
