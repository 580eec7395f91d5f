package output

import (
	"fmt"
	"io"
	"math/big"
)

// bitNames are what the bits of a field mean, by the name of the field, in the terms of the
// specification. The bit is the index; an empty name is a bit without a meaning here.
var bitNames = map[string][]string{
	"cmic":   {"more than one port", "more than one controller", "SR-IOV virtual function", "ANA reporting"},
	"oacs":   {"Security Send and Receive", "Format NVM", "Firmware Commit and Download", "Namespace Management", "Device Self-test", "Directives", "NVMe-MI Send and Receive", "Virtualization Management", "Doorbell Buffer Config", "Get LBA Status", "Command and Feature Lockdown"},
	"frmw":   {"first slot is read-only"},
	"lpa":    {"SMART log per namespace", "Commands Supported and Effects log", "extended data of Get Log Page", "Telemetry logs", "Persistent Event log", "Supported Log Pages and more logs", "Telemetry Data Area 4"},
	"oncs":   {"Compare", "Write Uncorrectable", "Dataset Management", "Write Zeroes", "Save and Select of features", "Reservations", "Timestamp", "Verify", "Copy"},
	"fuses":  {"Compare and Write"},
	"fna":    {"Format applies to all namespaces", "Secure Erase applies to all namespaces", "Cryptographic Erase"},
	"vwc":    {"volatile write cache is present"},
	"anacap": {"optimized", "non-optimized", "inaccessible", "persistent loss", "change", "", "ANAGRPID of a namespace does not change", "ANAGRPID in namespace management"},
	"sgls":   {"SGLs", "SGLs need dword alignment", "keyed SGL data block descriptor", "", "", "", "", "", "", "", "", "", "", "", "", "", "bit bucket descriptor", "byte aligned metadata buffer", "SGL longer than the data", "metadata pointer to an SGL", "offset in the address field", "transport SGL data block descriptor"},
	"nsfeat": {"thin provisioning", "atomic units of the namespace", "errors of deallocated blocks", "NGUID and EUI64 are not reused", "preferred sizes"},
	"mc":     {"metadata in an extended block", "metadata in a separate buffer"},
	"nmic":   {"may be shared by controllers", "dispersed namespace"},
	"rescap": {"Persist Through Power Loss", "Write Exclusive", "Exclusive Access", "Write Exclusive - Registrants Only", "Exclusive Access - Registrants Only", "Write Exclusive - All Registrants", "Exclusive Access - All Registrants", "Ignore Existing Key as in version 1.3"},
	"nsattr": {"write protected"},

	"critical_warning": {"available spare is below its threshold", "temperature is beyond a threshold", "reliability is degraded", "media are read-only", "volatile memory backup failed", "persistent memory region is read-only"},
	"oaes":             {8: "Namespace Attribute notices", 9: "Firmware Activation notices", 11: "ANA Change notices", 31: "Discovery Log Page Change notices"},
	"ctratt":           {"128-bit host identifier", "Non-operational Power State Permissive Mode", "NVM Sets", "Read Recovery Levels", "Endurance Groups", "Predictable Latency Mode", "Traffic Based Keep Alive", "Namespace Granularity", "SQ Associations", "UUID List"},
}

// writeBits writes the bits of a field that have a meaning.
func (m member) writeBits(w io.Writer) error {
	n, ok := m.value.(*big.Int)
	if !ok {
		return nil
	}
	for bit, name := range bitNames[m.name] {
		if name == "" {
			continue
		}
		if _, err := fmt.Fprintf(w, "  [%d:%d] : %s\t%s\n", bit, bit, hexNumber(uint8(n.Bit(bit))), name); err != nil {
			return err
		}
	}
	return nil
}
