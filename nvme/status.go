package nvme

import "fmt"

// Status is the status field of a completion without the phase bit (Base, "Status
// Field").
//
//	0-7 status code   8-10 status code type   11-12 CRD   13 more   14 do not retry
//
// The constants hold code and type only; compare them with [Status.Code]. The zero value
// is success. On the I/O path, do not convert a Status to an error, because this
// allocates memory.
type Status uint16

// Other fields
const (
	// StatusCodeMask covers the status code and its type.
	StatusCodeMask Status = 0x07FF
	// StatusCRD is the field with the index of the retry delay.
	StatusCRD Status = 0x1800
	// StatusMore means that the error log has more information about this command.
	StatusMore Status = 0x2000
	// StatusDNR means that the same command will fail again.
	StatusDNR Status = 0x4000
)

// Status code types.
const (
	SCTGeneric         = 0
	SCTCommandSpecific = 1
	SCTMedia           = 2
	SCTPath            = 3
	SCTVendor          = 7
)

// Generic status.
const (
	StatusSuccess                     Status = 0x000
	StatusInvalidOpcode               Status = 0x001
	StatusInvalidField                Status = 0x002
	StatusCommandIDConflict           Status = 0x003
	StatusDataTransferError           Status = 0x004
	StatusPowerLoss                   Status = 0x005
	StatusInternal                    Status = 0x006
	StatusAbortRequested              Status = 0x007
	StatusAbortedSQDeletion           Status = 0x008
	StatusAbortedFusedFailed          Status = 0x009
	StatusAbortedFusedMissing         Status = 0x00A
	StatusInvalidNamespace            Status = 0x00B
	StatusCommandSequence             Status = 0x00C
	StatusInvalidSGLSegment           Status = 0x00D
	StatusInvalidSGLCount             Status = 0x00E
	StatusInvalidSGLDataLength        Status = 0x00F
	StatusInvalidSGLMetadataLength    Status = 0x010
	StatusInvalidSGLType              Status = 0x011
	StatusInvalidCMBUse               Status = 0x012
	StatusInvalidPRPOffset            Status = 0x013
	StatusAtomicWriteUnitExceeded     Status = 0x014
	StatusOperationDenied             Status = 0x015
	StatusInvalidSGLOffset            Status = 0x016
	StatusHostIDInconsistent          Status = 0x018
	StatusKeepAliveExpired            Status = 0x019
	StatusKeepAliveInvalid            Status = 0x01A
	StatusAbortedPreempt              Status = 0x01B
	StatusSanitizeFailed              Status = 0x01C
	StatusSanitizeInProgress          Status = 0x01D
	StatusInvalidSGLGranularity       Status = 0x01E
	StatusNotSupportedInCMBQueue      Status = 0x01F
	StatusNamespaceWriteProtected     Status = 0x020
	StatusCommandInterrupted          Status = 0x021
	StatusTransientTransport          Status = 0x022
	StatusProhibitedByLockdown        Status = 0x023
	StatusAdminMediaNotReady          Status = 0x024
	StatusInvalidKeyTag               Status = 0x025
	StatusDispersedNamespacesDisabled Status = 0x026
	StatusHostIDNotInitialized        Status = 0x027
	StatusIncorrectKey                Status = 0x028
	StatusFDPDisabled                 Status = 0x029
	StatusInvalidPlacementHandles     Status = 0x02A

	StatusLBAOutOfRange       Status = 0x080
	StatusCapacityExceeded    Status = 0x081
	StatusNamespaceNotReady   Status = 0x082
	StatusReservationConflict Status = 0x083
	StatusFormatInProgress    Status = 0x084
	StatusInvalidValueSize    Status = 0x085
	StatusInvalidKeySize      Status = 0x086
	StatusKeyDoesNotExist     Status = 0x087
	StatusUnrecovered         Status = 0x088
	StatusKeyExists           Status = 0x089
)

// Command specific status. From 180h on a code means one thing for Fabrics
// commands and another for I/O commands.
const (
	StatusInvalidCQ                    Status = 0x100
	StatusInvalidQueueID               Status = 0x101
	StatusInvalidQueueSize             Status = 0x102
	StatusAbortLimitExceeded           Status = 0x103
	StatusAbortMissing                 Status = 0x104
	StatusAsyncEventLimitExceeded      Status = 0x105
	StatusInvalidFirmwareSlot          Status = 0x106
	StatusInvalidFirmwareImage         Status = 0x107
	StatusInvalidInterruptVector       Status = 0x108
	StatusInvalidLogPage               Status = 0x109
	StatusInvalidFormat                Status = 0x10A
	StatusFirmwareNeedsConvReset       Status = 0x10B
	StatusInvalidQueueDeletion         Status = 0x10C
	StatusFeatureNotSaveable           Status = 0x10D
	StatusFeatureNotChangeable         Status = 0x10E
	StatusFeatureNotPerNamespace       Status = 0x10F
	StatusFirmwareNeedsSubsystemReset  Status = 0x110
	StatusFirmwareNeedsControllerReset Status = 0x111
	StatusFirmwareNeedsMaxTime         Status = 0x112
	StatusFirmwareProhibited           Status = 0x113
	StatusOverlappingRange             Status = 0x114
	StatusNamespaceInsufficientCap     Status = 0x115
	StatusNamespaceIDUnavailable       Status = 0x116
	StatusNamespaceAlreadyAttached     Status = 0x118
	StatusNamespaceIsPrivate           Status = 0x119
	StatusNamespaceNotAttached         Status = 0x11A
	StatusThinProvisioningUnsupported  Status = 0x11B
	StatusInvalidControllerList        Status = 0x11C
	StatusSelfTestInProgress           Status = 0x11D
	StatusBootPartitionProtected       Status = 0x11E
	StatusInvalidControllerID          Status = 0x11F
	StatusInvalidSecondaryState        Status = 0x120
	StatusInvalidResourceCount         Status = 0x121
	StatusInvalidResourceID            Status = 0x122
	StatusSanitizeProhibitedByPMR      Status = 0x123
	StatusInvalidANAGroup              Status = 0x124
	StatusANAAttachFailed              Status = 0x125
	StatusInsufficientCapacity         Status = 0x126
	StatusAttachmentLimitExceeded      Status = 0x127
	StatusLockdownUnsupported          Status = 0x128
	StatusCommandSetUnsupported        Status = 0x129
	StatusCommandSetDisabled           Status = 0x12A
	StatusCommandSetCombination        Status = 0x12B
	StatusInvalidCommandSet            Status = 0x12C
	StatusIdentifierUnavailable        Status = 0x12D
	StatusNamespaceIsDispersed         Status = 0x12E
	StatusInvalidDiscoveryInfo         Status = 0x12F
	StatusZoningDataLocked             Status = 0x130
	StatusZoningDataNotFound           Status = 0x131
	StatusInsufficientDiscovery        Status = 0x132
	StatusFunctionDisabled             Status = 0x133
	StatusInvalidZoneGroupOriginator   Status = 0x134
	StatusInvalidHost                  Status = 0x135
	StatusInvalidSubsystem             Status = 0x136
	StatusInvalidControllerDataQueue   Status = 0x137
	StatusNotEnoughResources           Status = 0x138
	StatusControllerSuspended          Status = 0x139
	StatusControllerNotSuspended       Status = 0x13A
	StatusControllerDataQueueFull      Status = 0x13B

	// I/O command sets.
	StatusBadAttributes            Status = 0x180
	StatusInvalidProtectionInfo    Status = 0x181
	StatusReadOnlyRange            Status = 0x182
	StatusCommandSizeLimitExceeded Status = 0x183
	StatusIncompatibleNamespace    Status = 0x185
	StatusFastCopyNotPossible      Status = 0x186
	StatusOverlappingIORange       Status = 0x187
	StatusNamespaceNotReachable    Status = 0x188
	StatusInsufficientResources    Status = 0x189

	// Fabrics commands.
	StatusConnectIncompatibleFormat  Status = 0x180
	StatusConnectControllerBusy      Status = 0x181
	StatusConnectInvalidParam        Status = 0x182
	StatusConnectRestartDiscovery    Status = 0x183
	StatusConnectInvalidHost         Status = 0x184
	StatusDisconnectInvalidQueueType Status = 0x185
	StatusDiscoverRestart            Status = 0x190
	StatusAuthRequired               Status = 0x191

	// Zoned command set.
	StatusZoneInvalidOperation  Status = 0x1B6
	StatusZoneRWAUnavailable    Status = 0x1B7
	StatusZoneBoundaryError     Status = 0x1B8
	StatusZoneFull              Status = 0x1B9
	StatusZoneReadOnly          Status = 0x1BA
	StatusZoneOffline           Status = 0x1BB
	StatusZoneInvalidWrite      Status = 0x1BC
	StatusZoneTooManyActive     Status = 0x1BD
	StatusZoneTooManyOpen       Status = 0x1BE
	StatusZoneInvalidTransition Status = 0x1BF
)

// Media and data integrity errors.
const (
	StatusWriteFault      Status = 0x280
	StatusUnrecoveredRead Status = 0x281
	StatusGuardCheck      Status = 0x282
	StatusAppTagCheck     Status = 0x283
	StatusRefTagCheck     Status = 0x284
	StatusCompareFailed   Status = 0x285
	StatusAccessDenied    Status = 0x286
	StatusUnwrittenBlock  Status = 0x287
	StatusStorageTagCheck Status = 0x288
)

// Path related errors. StatusHostPathError and StatusAbortedByHost never come from a
// controller. The host assigns them to commands that it ends itself.
const (
	StatusInternalPathError   Status = 0x300
	StatusANAPersistentLoss   Status = 0x301
	StatusANAInaccessible     Status = 0x302
	StatusANATransition       Status = 0x303
	StatusControllerPathError Status = 0x360
	// StatusHostPathError means that the command could not be sent, or its path
	// failed.
	StatusHostPathError Status = 0x370
	// StatusAbortedByHost means that the host gave up a command that it had sent.
	StatusAbortedByHost Status = 0x371
)

// SC returns the status code.
func (s Status) SC() uint8 { return uint8(s) }

// SCT returns the status code type, 0..7.
func (s Status) SCT() uint8 { return uint8(s>>8) & 7 }

// CRD returns the index of the retry delay: 0 means no delay, and 1..3 select CRDT1..3 of
// [IdentifyController].
func (s Status) CRD() uint8 { return uint8(s>>11) & 3 }

// More reports whether the error log has more information about this command.
func (s Status) More() bool { return s&StatusMore != 0 }

// DNR reports whether the controller forbids a retry.
func (s Status) DNR() bool { return s&StatusDNR != 0 }

// Code returns the code and its type, to be compared with the constants.
func (s Status) Code() Status { return s & StatusCodeMask }

// OK reports whether the status is success.
func (s Status) OK() bool { return s&StatusCodeMask == 0 }

// IsPathError reports whether the path failed and not the command. The same command may
// succeed on another path.
func (s Status) IsPathError() bool { return s.SCT() == SCTPath }

// IsANAError reports whether the ANA state of the namespace on this path forbids the
// command. The ANA log has details.
func (s Status) IsANAError() bool {
	switch s.Code() {
	case StatusANAPersistentLoss, StatusANAInaccessible, StatusANATransition:
		return true
	}
	return false
}

// Err returns nil for success and the status otherwise.
func (s Status) Err() error {
	if s.OK() {
		return nil
	}
	return s
}

// Error implements error. %v prints its result.
func (s Status) Error() string { return "nvme status " + s.String() }

// String returns the code in hex and in words, for example "002h: invalid field in
// command, do not retry". If a code has two meanings, it returns that of I/O commands;
// see [Status.FabricsString].
func (s Status) String() string { return s.words(s.describe()) }

// FabricsString is like String, for the status of a Fabrics command.
func (s Status) FabricsString() string {
	if w, ok := fabricsWords[s.Code()]; ok {
		return s.words(w)
	}
	return s.String()
}

func (s Status) words(w string) string {
	out := fmt.Sprintf("%03xh: %s", uint16(s.Code()), w)
	if s.More() {
		out += ", more in error log"
	}
	if s.DNR() {
		out += ", do not retry"
	}
	return out
}

func (s Status) describe() string {
	var table []string
	switch s.SCT() {
	case SCTGeneric:
		table = genericWords[:]
	case SCTCommandSpecific:
		table = commandWords[:]
	case SCTMedia:
		table = mediaWords[:]
	case SCTPath:
		table = pathWords[:]
	case SCTVendor:
		return "vendor specific"
	}
	sc := s.SC()
	switch {
	case int(sc) < len(table) && table[sc] != "":
		return table[sc]
	case sc >= 0xC0 && table != nil:
		return "vendor specific"
	}
	return "unknown status"
}

// Linux errno values, which are defined here because the package needs no system calls,
// and because the values must not depend on the platform.
const (
	errnoEIO          = 5
	errnoENOSPC       = 28
	errnoEBADE        = 52
	errnoENODATA      = 61
	errnoENOLINK      = 67
	errnoEOVERFLOW    = 75
	errnoEILSEQ       = 84
	errnoEOPNOTSUPP   = 95
	errnoETOOMANYREFS = 109
	errnoEREMOTEIO    = 121
)

// Errno returns the Linux errno with which the kernel's NVMe host completes a block
// request of this status, as a positive number; 0 for success
// (drivers/nvme/host/core.c:nvme_error_status, block/blk-core.c:blk_errors). Codes with
// two meanings are interpreted as those of I/O commands.
func (s Status) Errno() int {
	switch s.Code() {
	case StatusSuccess:
		return 0
	case StatusCapacityExceeded:
		return errnoENOSPC
	case StatusLBAOutOfRange, StatusNamespaceNotReady, StatusCommandInterrupted:
		return errnoEREMOTEIO
	case StatusInvalidOpcode, StatusInvalidField, StatusInvalidNamespace, StatusBadAttributes:
		return errnoEOPNOTSUPP
	case StatusWriteFault, StatusUnrecoveredRead, StatusUnwrittenBlock, StatusAccessDenied,
		StatusReadOnlyRange, StatusCompareFailed:
		return errnoENODATA
	case StatusGuardCheck, StatusAppTagCheck, StatusRefTagCheck, StatusInvalidProtectionInfo:
		return errnoEILSEQ
	case StatusReservationConflict:
		return errnoEBADE
	case StatusHostPathError:
		return errnoENOLINK
	case StatusZoneTooManyActive:
		return errnoEOVERFLOW
	case StatusZoneTooManyOpen:
		return errnoETOOMANYREFS
	}
	return errnoEIO
}

var genericWords = [...]string{
	0x00: "success",
	0x01: "invalid command opcode",
	0x02: "invalid field in command",
	0x03: "command id conflict",
	0x04: "data transfer error",
	0x05: "aborted by power loss",
	0x06: "internal error",
	0x07: "aborted on request",
	0x08: "aborted by queue deletion",
	0x09: "aborted by failed fused command",
	0x0A: "aborted by missing fused command",
	0x0B: "invalid namespace or format",
	0x0C: "command sequence error",
	0x0D: "invalid sgl segment descriptor",
	0x0E: "invalid number of sgl descriptors",
	0x0F: "invalid sgl data length",
	0x10: "invalid sgl metadata length",
	0x11: "invalid sgl descriptor type",
	0x12: "invalid use of controller memory buffer",
	0x13: "invalid prp offset",
	0x14: "atomic write unit exceeded",
	0x15: "operation denied",
	0x16: "invalid sgl offset",
	0x18: "host identifier of inconsistent format",
	0x19: "keep alive timer expired",
	0x1A: "invalid keep alive timeout",
	0x1B: "aborted by preempt and abort",
	0x1C: "sanitize failed",
	0x1D: "sanitize in progress",
	0x1E: "invalid sgl data block granularity",
	0x1F: "not supported for queue in controller memory buffer",
	0x20: "namespace is write protected",
	0x21: "command interrupted",
	0x22: "transient transport error",
	0x23: "prohibited by lockdown",
	0x24: "media not ready for admin command",
	0x25: "invalid key tag",
	0x26: "host support for dispersed namespaces not enabled",
	0x27: "host identifier not initialized",
	0x28: "incorrect key",
	0x29: "flexible data placement disabled",
	0x2A: "invalid placement handle list",
	0x80: "lba out of range",
	0x81: "capacity exceeded",
	0x82: "namespace not ready",
	0x83: "reservation conflict",
	0x84: "format in progress",
	0x85: "invalid value size",
	0x86: "invalid key size",
	0x87: "key does not exist",
	0x88: "unrecovered error",
	0x89: "key exists",
}

var commandWords = [...]string{
	0x00: "invalid completion queue",
	0x01: "invalid queue id",
	0x02: "invalid queue size",
	0x03: "abort command limit exceeded",
	0x04: "command to abort is missing",
	0x05: "async event request limit exceeded",
	0x06: "invalid firmware slot",
	0x07: "invalid firmware image",
	0x08: "invalid interrupt vector",
	0x09: "invalid log page",
	0x0A: "invalid format",
	0x0B: "firmware activation needs conventional reset",
	0x0C: "invalid queue deletion",
	0x0D: "feature is not saveable",
	0x0E: "feature is not changeable",
	0x0F: "feature is not namespace specific",
	0x10: "firmware activation needs nvm subsystem reset",
	0x11: "firmware activation needs controller reset",
	0x12: "firmware activation exceeds maximum time",
	0x13: "firmware activation prohibited",
	0x14: "overlapping range",
	0x15: "insufficient capacity for namespace",
	0x16: "namespace id unavailable",
	0x18: "namespace already attached",
	0x19: "namespace is private",
	0x1A: "namespace not attached",
	0x1B: "thin provisioning not supported",
	0x1C: "invalid controller list",
	0x1D: "device self-test in progress",
	0x1E: "boot partition is write protected",
	0x1F: "invalid controller id",
	0x20: "invalid secondary controller state",
	0x21: "invalid number of controller resources",
	0x22: "invalid resource id",
	0x23: "sanitize prohibited while persistent memory region enabled",
	0x24: "invalid ana group id",
	0x25: "ana attach failed",
	0x26: "insufficient capacity",
	0x27: "namespace attachment limit exceeded",
	0x28: "lockdown of command not supported",
	0x29: "i/o command set not supported",
	0x2A: "i/o command set not enabled",
	0x2B: "i/o command set combination rejected",
	0x2C: "invalid i/o command set",
	0x2D: "identifier unavailable",
	0x2E: "namespace is dispersed",
	0x2F: "invalid discovery information",
	0x30: "zoning data structure locked",
	0x31: "zoning data structure not found",
	0x32: "insufficient discovery resources",
	0x33: "requested function disabled",
	0x34: "invalid zone group originator",
	0x35: "invalid host",
	0x36: "invalid nvm subsystem",
	0x37: "invalid controller data queue",
	0x38: "not enough resources",
	0x39: "controller suspended",
	0x3A: "controller not suspended",
	0x3B: "controller data queue full",
	0x80: "conflicting attributes",
	0x81: "invalid protection information",
	0x82: "write to read only range",
	0x83: "command size limit exceeded",
	0x84: "connect: invalid host",
	0x85: "incompatible namespace or format",
	0x86: "fast copy not possible",
	0x87: "overlapping i/o range",
	0x88: "namespace not reachable",
	0x89: "insufficient resources",
	0x90: "discovery information changed, restart",
	0x91: "authentication required",
	0xB6: "invalid zone operation request",
	0xB7: "zone random write area resources unavailable",
	0xB8: "zone boundary error",
	0xB9: "zone is full",
	0xBA: "zone is read only",
	0xBB: "zone is offline",
	0xBC: "invalid write to zone",
	0xBD: "too many active zones",
	0xBE: "too many open zones",
	0xBF: "invalid zone state transition",
}

// fabricsWords holds the codes that have another meaning for Fabrics commands.
var fabricsWords = map[Status]string{
	StatusConnectIncompatibleFormat:  "connect: incompatible format",
	StatusConnectControllerBusy:      "connect: controller busy",
	StatusConnectInvalidParam:        "connect: invalid parameters",
	StatusConnectRestartDiscovery:    "connect: restart discovery",
	StatusConnectInvalidHost:         "connect: invalid host",
	StatusDisconnectInvalidQueueType: "disconnect: invalid queue type",
}

var mediaWords = [...]string{
	0x80: "write fault",
	0x81: "unrecovered read error",
	0x82: "guard check error",
	0x83: "application tag check error",
	0x84: "reference tag check error",
	0x85: "compare failure",
	0x86: "access denied",
	0x87: "deallocated or unwritten block",
	0x88: "storage tag check error",
}

var pathWords = [...]string{
	0x00: "internal path error",
	0x01: "ana persistent loss",
	0x02: "ana inaccessible",
	0x03: "ana transition",
	0x60: "controller path error",
	0x70: "host path error",
	0x71: "aborted by host",
}
