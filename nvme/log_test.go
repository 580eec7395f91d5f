package nvme

import (
	"math"
	"slices"
	"testing"
)

func TestErrorLogEntry(t *testing.T) {
	testFields(t, func() any { return new(ErrorLogEntry) }, []field{
		{"ErrorCount", 0, 8}, {"SQID", 8, 2}, {"CID", 10, 2}, {"ParamLocation", 14, 2}, {"LBA", 16, 8}, {"NSID", 24, 4},
		{"TRTYPE", 29, 1}, {"Opcode", 31, 1}, {"Version", 63, 1},
	}, "Status")
	e := new(ErrorLogEntry)
	e.SetStatus(StatusDNR | StatusLBAOutOfRange)
	wantBytes(t, e[:], layout(64, at{12, "0081"}))
	if e.Status() != 0x4080 {
		t.Errorf("status %#x", uint16(e.Status()))
	}
}

func TestSMARTLog(t *testing.T) {
	counters := map[string]int{
		"DataUnitsRead": 32, "DataUnitsWritten": 48, "HostReads": 64, "HostWrites": 80, "BusyTime": 96, "PowerCycles": 112,
		"PowerOnHours": 128, "UnsafeShutdowns": 144, "MediaErrors": 160, "ErrorLogEntries": 176,
	}
	fields := []field{
		{"CriticalWarning", 0, 1}, {"Temperature", 1, 2}, {"AvailableSpare", 3, 1}, {"SpareThreshold", 4, 1}, {"PercentageUsed", 5, 1},
	}
	for name, off := range counters {
		fields = append(fields, field{name, off, 8})
	}
	testFields(t, func() any { return new(SMARTLog) }, fields)

	s := new(SMARTLog)
	s[40] = 1 // 2^64 data units
	if got := s.DataUnitsRead(); got != math.MaxUint64 {
		t.Errorf("beyond 64 bits: %d", got)
	}
	s.SetDataUnitsRead(7)
	if got := s.DataUnitsRead(); got != 7 {
		t.Errorf("upper half left over: %d", got)
	}
}

func TestChangedNSList(t *testing.T) {
	l := new(ChangedNSList)
	l.Set([]uint32{5, 3})
	wantBytes(t, l[:], layout(4096, at{0, "05000000 03000000"}))
	if ids, overflow := l.NSIDs(); overflow || !slices.Equal(ids, []uint32{5, 3}) {
		t.Errorf("%v %v", ids, overflow)
	}
	full := make([]uint32, 1024)
	for i := range full {
		full[i] = uint32(i) + 1
	}
	l.Set(full)
	if ids, overflow := l.NSIDs(); overflow || !slices.Equal(ids, full) {
		t.Errorf("1024 ids: %d %v", len(ids), overflow)
	}
	l.Set(append(full, 2000))
	wantBytes(t, l[:], layout(4096, at{0, "ffffffff"}))
	if ids, overflow := l.NSIDs(); !overflow || ids != nil {
		t.Errorf("overflow: %v %v", ids, overflow)
	}
	l.Set(nil)
	if ids, overflow := l.NSIDs(); overflow || ids != nil {
		t.Errorf("empty: %v %v", ids, overflow)
	}
}
