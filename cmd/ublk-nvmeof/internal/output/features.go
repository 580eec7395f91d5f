package output

import (
	"encoding/hex"
	"fmt"
	"io"

	"ublk-nvmeof/nvme"
)

var featureNames = map[uint8]string{
	nvme.FeatureArbitration:        "Arbitration",
	nvme.FeaturePowerManagement:    "Power Management",
	0x03:                           "LBA Range Type",
	nvme.FeatureTemperature:        "Temperature Threshold",
	nvme.FeatureErrorRecovery:      "Error Recovery",
	nvme.FeatureVolatileWriteCache: "Volatile Write Cache",
	nvme.FeatureNumberOfQueues:     "Number of Queues",
	0x08:                           "Interrupt Coalescing",
	0x09:                           "Interrupt Vector Configuration",
	nvme.FeatureWriteAtomicity:     "Write Atomicity Normal",
	nvme.FeatureAsyncEvent:         "Async Event Configuration",
	0x0C:                           "Autonomous Power State Transition",
	0x0D:                           "Host Memory Buffer",
	nvme.FeatureTimestamp:          "Timestamp",
	nvme.FeatureKeepAlive:          "Keep Alive Timer",
	0x10:                           "Host Controlled Thermal Management",
	0x11:                           "Non-Operational Power State Config",
	0x12:                           "Read Recovery Level",
	0x13:                           "Predictable Latency Mode Config",
	0x14:                           "Predictable Latency Mode Window",
	0x15:                           "LBA Status Interval",
	nvme.FeatureHostBehavior:       "Host Behavior",
	0x17:                           "Sanitize",
	0x18:                           "Endurance Event Group Configuration",
	nvme.FeatureCommandSetProfile:  "I/O Command Set Profile",
	0x1A:                           "Spinup Control",
	nvme.FeatureSoftwareProgress:   "Software Progress",
	nvme.FeatureHostID:             "Host Identifier",
	nvme.FeatureReservationMask:    "Reservation Notification Mask",
	nvme.FeatureReservationPersist: "Reservation Persistence",
	nvme.FeatureWriteProtect:       "Namespace Write Protect",
}

var selectNames = [...]string{"Current", "Default", "Saved", "Supported capabilities"}

// Feature is the answer to a Get Features.
type Feature struct {
	ID     uint8
	Select uint8 // 0..3
	Result uint32
	Data   []byte
}

// Features writes features. With human, the text output has the fields of a value; JSON
// always has them.
func Features(w io.Writer, all []Feature, human bool, format string) error {
	if format == JSON {
		var o object
		for _, f := range all {
			o = append(o, f.json()...)
		}
		return writeJSON(w, o)
	}
	for _, f := range all {
		if err := f.writeText(w, human); err != nil {
			return err
		}
	}
	return nil
}

func (f Feature) name() string {
	if n := featureNames[f.ID]; n != "" {
		return n
	}
	return "Unknown"
}

// id and value are written as nvme-cli does, with a width that does not count the 0x of a
// zero, because C does not write it.
func (f Feature) id() string { return fmt.Sprintf("0x%02x", f.ID) }

func (f Feature) value() string {
	if f.Result == 0 {
		return "00000000"
	}
	return fmt.Sprintf("0x%08x", f.Result)
}

// json makes the members of a feature, which are named by it.
func (f Feature) json() object {
	o := object{{name: "feature: " + f.id(), value: []object{{
		{name: "name", value: f.name()}, {name: selectNames[f.Select&3], value: f.value()},
	}}}}
	if f.Select == 3 {
		words := []string{}
		for i, word := range []string{"saveable", "per-namespace", "changeable"} {
			if f.Result>>i&1 == 1 {
				words = append(words, word)
			}
		}
		return append(o, member{name: "Feature: " + f.id() + ": select", value: words})
	}
	fields := f.fields()
	if len(f.Data) > 0 {
		fields = append(fields, member{name: "data", value: hex.EncodeToString(f.Data)})
	}
	return append(o, member{name: "Feature: " + f.id(), value: []object{append(object{}, fields...)}})
}

func (f Feature) writeText(w io.Writer, human bool) error {
	_, err := fmt.Fprintf(w, "get-feature:%s (%s), %s value:%s\n", f.id(), f.name(), selectNames[f.Select&3], f.value())
	if err != nil {
		return err
	}
	if human && f.Select < 3 {
		for _, m := range f.fields() {
			if _, err := fmt.Fprintf(w, "\t%s: %s\n", m.name, m.text); err != nil {
				return err
			}
		}
	}
	return Dump(w, f.Data)
}

// fields are the parts of the value of a feature that targets on a fabric have.
func (f Feature) fields() object {
	v := f.Result
	words := func(name string, on bool, yes, no string) member {
		s := no
		if on {
			s = yes
		}
		return member{name: name, value: s, text: s}
	}
	switch f.ID {
	case nvme.FeatureVolatileWriteCache:
		return object{words("Volatile Write Cache Enable (WCE)", v&1 != 0, "Enabled", "Disabled")}
	case nvme.FeatureNumberOfQueues:
		return object{
			counted("Number of IO Completion Queues Allocated (NCQA)", v>>16+1),
			counted("Number of IO Submission Queues Allocated (NSQA)", v&0xFFFF+1),
		}
	case nvme.FeatureKeepAlive:
		return object{counted("Keep Alive Timeout (KATO) in milliseconds", v)}
	case nvme.FeatureHostID:
		if len(f.Data) >= 8 {
			return object{counted("Host Identifier (HOSTID)", le.Uint64(f.Data))}
		}
	case nvme.FeatureReservationMask:
		return object{
			words("Mask Reservation Preempted Notification (RESPRE)", v&8 != 0, "True", "False"),
			words("Mask Reservation Released Notification (RESREL)", v&4 != 0, "True", "False"),
			words("Mask Registration Preempted Notification (REGPRE)", v&2 != 0, "True", "False"),
		}
	case nvme.FeatureReservationPersist:
		return object{words("Persist Through Power Loss (PTPL)", v&1 != 0, "True", "False")}
	case nvme.FeatureWriteProtect:
		s := [...]string{"No Write Protect", "Write Protect", "Write Protect Until Power Cycle", "Permanent Write Protect"}[v&3]
		return object{{name: "Namespace Write Protect", value: s, text: s}}
	case nvme.FeatureAsyncEvent:
		var o object
		for _, e := range eventBits {
			o = append(o, words(e.name, v>>e.bit&1 == 1, "Send async event", "Do not send async event"))
		}
		return o
	}
	return nil
}

// eventBits are the bits of FeatureAsyncEvent.
var eventBits = []struct {
	name string
	bit  int
}{
	{"Discovery Log Page Change Notices", 31},
	{"Host Discovery Log Page Change Notification", 30},
	{"AVE Discovery Log Page Change Notification", 29},
	{"Pull Model DDC Request Log Page Change Notification", 28},
	{"Zone Descriptor Changed Notices", 27},
	{"Reachability Group", 18},
	{"Reachability Association", 17},
	{"Normal NVM Subsystem Shutdown", 15},
	{"Endurance Group Event Aggregate Log Change Notices", 14},
	{"LBA Status Information Notices", 13},
	{"Predictable Latency Event Aggregate Log Change Notices", 12},
	{"Asymmetric Namespace Access Change Notices", 11},
	{"Telemetry Log Notices", 10},
	{"Firmware Activation Notices", 9},
	{"Namespace Attribute Notices", 8},
	{"SMART / Health Critical Warnings", 0},
}
