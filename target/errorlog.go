package target

import (
	"sync"

	"ublk-nvmeof/nvme"
)

// errorEntries is the length of the error log of a controller.
const errorEntries = 64

// errorLog holds the last errors of a controller.
type errorLog struct {
	mu      sync.Mutex // guards what follows; a leaf
	entries [errorEntries]nvme.ErrorLogEntry
	count   uint64 // errors so far; the newest is entry (count - 1) % errorEntries
}

// add notes a command that failed. Commands are told apart by queue: only I/O commands
// have blocks.
func (l *errorLog) add(qid uint16, cmd *nvme.Command, s nvme.Status) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := &l.entries[l.count%errorEntries]
	*e = nvme.ErrorLogEntry{}
	l.count++
	e.SetErrorCount(l.count)
	e.SetSQID(qid)
	e.SetCID(cmd.CID())
	e.SetStatus(s)
	e.SetParamLocation(0xFFFF) // of no parameter
	e.SetOpcode(cmd.Opcode())
	e.SetTRTYPE(nvme.TransportRDMA)
	e.SetVersion(1)
	if cmd.Opcode() == nvme.OpFabrics {
		return // which has no namespace
	}
	e.SetNSID(cmd.NSID())
	if qid > 0 {
		switch cmd.Opcode() {
		case nvme.OpRead, nvme.OpWrite, nvme.OpCompare, nvme.OpWriteZeroes:
			e.SetLBA(cmd.SLBA())
		}
	}
}

// page is log page 01h, the newest error first.
func (l *errorLog) page() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	page := make([]byte, 0, errorEntries*nvme.ErrorLogEntrySize)
	for i := range uint64(errorEntries) {
		if i >= l.count {
			break
		}
		page = append(page, l.entries[(l.count-1-i)%errorEntries][:]...)
	}
	return page[:cap(page)] // unused entries are zero
}

// errors returns the number of errors so far.
func (l *errorLog) errors() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count
}
