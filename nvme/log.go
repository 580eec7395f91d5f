package nvme

import "math"

// Log pages (LID of Get Log Page).
const (
	LogError             = 0x01 // ErrorLogEntry, as many as ELPE+1
	LogSMART             = 0x02 // SMARTLog
	LogFirmwareSlot      = 0x03
	LogChangedNamespaces = 0x04 // ChangedNSList
	LogCommandEffects    = 0x05
	LogANA               = 0x0C // ANALog
	LogDiscovery         = 0x70 // DiscoveryLog
	LogReservation       = 0x80
)

// ErrorLogEntrySize is the size of an entry of the error log in bytes.
const ErrorLogEntrySize = 64

// ErrorLogEntry is one entry of the error log (Base, "Error Information").
type ErrorLogEntry [ErrorLogEntrySize]byte

// ErrorLogEntryAt returns the first 64 bytes of b, without a copy. It panics if b is
// shorter.
func ErrorLogEntryAt(b []byte) *ErrorLogEntry {
	return (*ErrorLogEntry)(b[:ErrorLogEntrySize:ErrorLogEntrySize])
}

// ErrorCount returns the number of this error, unique and rising; 0 marks an
// unused entry.
func (e *ErrorLogEntry) ErrorCount() uint64 { return le.Uint64(e[0:8]) }

// SetErrorCount sets ErrorCount.
func (e *ErrorLogEntry) SetErrorCount(v uint64) { le.PutUint64(e[0:8], v) }

// SQID returns the submission queue of the command; 0xFFFF if the error does not belong
// to a command.
func (e *ErrorLogEntry) SQID() uint16 { return le.Uint16(e[8:10]) }

// SetSQID sets SQID.
func (e *ErrorLogEntry) SetSQID(v uint16) { le.PutUint16(e[8:10], v) }

// CID returns the command id; 0xFFFF if the error does not belong to a command.
func (e *ErrorLogEntry) CID() uint16 { return le.Uint16(e[10:12]) }

// SetCID sets CID.
func (e *ErrorLogEntry) SetCID(v uint16) { le.PutUint16(e[10:12], v) }

// Status returns the status of the command.
func (e *ErrorLogEntry) Status() Status { return Status(le.Uint16(e[12:14]) >> 1) }

// SetStatus sets Status.
func (e *ErrorLogEntry) SetStatus(v Status) { le.PutUint16(e[12:14], uint16(v)<<1) }

// ParamLocation returns the place of the bad parameter in the command: byte in bits 0-7,
// bit in bits 8-10; 0xFFFF if the error is not in a parameter.
func (e *ErrorLogEntry) ParamLocation() uint16 { return le.Uint16(e[14:16]) }

// SetParamLocation sets ParamLocation.
func (e *ErrorLogEntry) SetParamLocation(v uint16) { le.PutUint16(e[14:16], v) }

// LBA returns the first block that had the error.
func (e *ErrorLogEntry) LBA() uint64 { return le.Uint64(e[16:24]) }

// SetLBA sets LBA.
func (e *ErrorLogEntry) SetLBA(v uint64) { le.PutUint64(e[16:24], v) }

// NSID returns the namespace.
func (e *ErrorLogEntry) NSID() uint32 { return le.Uint32(e[24:28]) }

// SetNSID sets NSID.
func (e *ErrorLogEntry) SetNSID(v uint32) { le.PutUint32(e[24:28], v) }

// TRTYPE returns the transport on which the error came up.
func (e *ErrorLogEntry) TRTYPE() TransportType { return TransportType(e[29]) }

// SetTRTYPE sets TRTYPE.
func (e *ErrorLogEntry) SetTRTYPE(v TransportType) { e[29] = byte(v) }

// Version returns the version of the log page.
func (e *ErrorLogEntry) Version() uint8 { return e[63] }

// SetVersion sets Version.
func (e *ErrorLogEntry) SetVersion(v uint8) { e[63] = v }

// Opcode returns the opcode of the command; valid from log page version 1 on.
func (e *ErrorLogEntry) Opcode() Opcode { return Opcode(e[31]) }

// SetOpcode sets Opcode.
func (e *ErrorLogEntry) SetOpcode(v Opcode) { e[31] = byte(v) }

// SMARTLogSize is the size of the SMART log in bytes.
const SMARTLogSize = 512

// Bits of [SMARTLog.CriticalWarning].
const (
	WarningSpare       = 1 << 0
	WarningTemperature = 1 << 1
	WarningReliability = 1 << 2
	WarningReadOnly    = 1 << 3
	WarningBackup      = 1 << 4
	WarningPMR         = 1 << 5
)

// SMARTLog is the health log (Base, "SMART / Health Information"). Its 128 bit counters
// are returned as 64 bits. Larger values are returned as the maximum.
type SMARTLog [SMARTLogSize]byte

// SMARTLogAt returns the first 512 bytes of b, without a copy. It panics if b is shorter.
func SMARTLogAt(b []byte) *SMARTLog { return (*SMARTLog)(b[:SMARTLogSize:SMARTLogSize]) }

// CriticalWarning returns the critical warnings, Warning bits.
func (s *SMARTLog) CriticalWarning() uint8 { return s[0] }

// SetCriticalWarning sets CriticalWarning.
func (s *SMARTLog) SetCriticalWarning(v uint8) { s[0] = v }

// Temperature returns the composite temperature, in kelvins.
func (s *SMARTLog) Temperature() uint16 { return le.Uint16(s[1:3]) }

// SetTemperature sets Temperature.
func (s *SMARTLog) SetTemperature(v uint16) { le.PutUint16(s[1:3], v) }

// AvailableSpare returns the spare capacity that is left, in percent.
func (s *SMARTLog) AvailableSpare() uint8 { return s[3] }

// SetAvailableSpare sets AvailableSpare.
func (s *SMARTLog) SetAvailableSpare(v uint8) { s[3] = v }

// SpareThreshold returns the threshold of the spare capacity, in percent.
func (s *SMARTLog) SpareThreshold() uint8 { return s[4] }

// SetSpareThreshold sets SpareThreshold.
func (s *SMARTLog) SetSpareThreshold(v uint8) { s[4] = v }

// PercentageUsed returns the part of the rated life that is used, in percent;
// may exceed 100.
func (s *SMARTLog) PercentageUsed() uint8 { return s[5] }

// SetPercentageUsed sets PercentageUsed.
func (s *SMARTLog) SetPercentageUsed(v uint8) { s[5] = v }

// DataUnitsRead returns the data read, in units of 1000 x 512 bytes, rounded
// up.
func (s *SMARTLog) DataUnitsRead() uint64 { return saturate128(s[32:48]) }

// SetDataUnitsRead sets DataUnitsRead.
func (s *SMARTLog) SetDataUnitsRead(v uint64) { put128(s[32:48], v) }

// DataUnitsWritten returns the data written, in units of 1000 x 512 bytes,
// rounded up.
func (s *SMARTLog) DataUnitsWritten() uint64 { return saturate128(s[48:64]) }

// SetDataUnitsWritten sets DataUnitsWritten.
func (s *SMARTLog) SetDataUnitsWritten(v uint64) { put128(s[48:64], v) }

// HostReads returns the number of read commands.
func (s *SMARTLog) HostReads() uint64 { return saturate128(s[64:80]) }

// SetHostReads sets HostReads.
func (s *SMARTLog) SetHostReads(v uint64) { put128(s[64:80], v) }

// HostWrites returns the number of write commands.
func (s *SMARTLog) HostWrites() uint64 { return saturate128(s[80:96]) }

// SetHostWrites sets HostWrites.
func (s *SMARTLog) SetHostWrites(v uint64) { put128(s[80:96], v) }

// BusyTime returns the time for which the controller was busy, in minutes.
func (s *SMARTLog) BusyTime() uint64 { return saturate128(s[96:112]) }

// SetBusyTime sets BusyTime.
func (s *SMARTLog) SetBusyTime(v uint64) { put128(s[96:112], v) }

// PowerCycles returns the number of power cycles.
func (s *SMARTLog) PowerCycles() uint64 { return saturate128(s[112:128]) }

// SetPowerCycles sets PowerCycles.
func (s *SMARTLog) SetPowerCycles(v uint64) { put128(s[112:128], v) }

// PowerOnHours returns the number of hours under power.
func (s *SMARTLog) PowerOnHours() uint64 { return saturate128(s[128:144]) }

// SetPowerOnHours sets PowerOnHours.
func (s *SMARTLog) SetPowerOnHours(v uint64) { put128(s[128:144], v) }

// UnsafeShutdowns returns the number of shutdowns without notice.
func (s *SMARTLog) UnsafeShutdowns() uint64 { return saturate128(s[144:160]) }

// SetUnsafeShutdowns sets UnsafeShutdowns.
func (s *SMARTLog) SetUnsafeShutdowns(v uint64) { put128(s[144:160], v) }

// MediaErrors returns the number of unrecovered data integrity errors.
func (s *SMARTLog) MediaErrors() uint64 { return saturate128(s[160:176]) }

// SetMediaErrors sets MediaErrors.
func (s *SMARTLog) SetMediaErrors(v uint64) { put128(s[160:176], v) }

// ErrorLogEntries returns the number of error log entries over the controller's
// life.
func (s *SMARTLog) ErrorLogEntries() uint64 { return saturate128(s[176:192]) }

// SetErrorLogEntries sets ErrorLogEntries.
func (s *SMARTLog) SetErrorLogEntries(v uint64) { put128(s[176:192], v) }

func saturate128(b []byte) uint64 {
	if le.Uint64(b[8:16]) != 0 {
		return math.MaxUint64
	}
	return le.Uint64(b[0:8])
}

func put128(b []byte, v uint64) {
	le.PutUint64(b[0:8], v)
	le.PutUint64(b[8:16], 0)
}

// ChangedNSList is log 04h: the ids of namespaces that changed since the log
// was last read.
type ChangedNSList [IdentifySize]byte

// ChangedNSListAt returns the first 4096 bytes of b, without a copy. It panics if b is
// shorter.
func ChangedNSListAt(b []byte) *ChangedNSList {
	return (*ChangedNSList)(b[:IdentifySize:IdentifySize])
}

// NSIDs returns the ids. overflow reports that more namespaces changed than the log can
// name. Then ids is nil, and the host must look at all namespaces.
func (l *ChangedNSList) NSIDs() (ids []uint32, overflow bool) {
	for id := range nsids(l[:]) {
		if id == NSIDAll {
			return nil, true
		}
		ids = append(ids, id)
	}
	return ids, false
}

// Set fills the list with ids, or with the mark of an overflow if there are too many.
func (l *ChangedNSList) Set(ids []uint32) {
	clear(l[:])
	if len(ids) > NSListEntries {
		le.PutUint32(l[0:4], NSIDAll)
		return
	}
	for i, id := range ids {
		le.PutUint32(l[4*i:4*i+4], id)
	}
}
