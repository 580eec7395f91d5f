package options

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/target"
)

// field is a KEY or KEY=VALUE of a text like "ram=1GiB,read-only".
type field struct{ key, value string }

// fields splits a text at its commas. Two commas are one in a value.
func fields(text string) []field {
	var out []field
	var word strings.Builder
	end := func() {
		key, value, _ := strings.Cut(word.String(), "=")
		out = append(out, field{key, value})
		word.Reset()
	}
	for i := 0; i < len(text); i++ {
		switch {
		case text[i] != ',':
			word.WriteByte(text[i])
		case strings.HasPrefix(text[i:], ",,"):
			word.WriteByte(',')
			i++
		default:
			end()
		}
	}
	end()
	return out
}

// doubled writes a value so that fields reads it again.
func doubled(value string) string { return strings.ReplaceAll(value, ",", ",,") }

// wrong is the error of a field whose value is not accepted.
func (f field) wrong(want string) error { return fmt.Errorf("%s=%q: want %s", f.key, f.value, want) }

// number parses a value from lo to hi, in decimal, or in hexadecimal with 0x.
func (f field) number(lo, hi uint64) (uint64, error) {
	n, err := strconv.ParseUint(f.value, 0, 64)
	if err != nil || n < lo || n > hi {
		return 0, f.wrong(fmt.Sprintf("a number, %d to %d", lo, hi))
	}
	return n, nil
}

// Namespace describes a namespace of a target. Its text has these words:
//
//	ram=SIZE | file=PATH | device=PATH
//	nsid=N  block-size=SIZE  read-only  cache=SIZE  ana-group=N  uuid=UUID
//
// A comma in a path is written twice.
type Namespace struct {
	RAM       int64  // bytes; 0: File
	File      string // absolute
	Device    bool   // File is a block device
	NSID      uint32 // 0: the lowest that is free
	BlockSize int    // 0: 512
	ReadOnly  bool
	Cache     int64  // bytes of a volatile write cache; 0: none
	ANAGroup  uint32 // 0: 1
	UUID      nvme.UUID
}

// NamespaceWords are the words that ParseNamespace accepts.
const NamespaceWords = "ram=SIZE, file=PATH or device=PATH (a comma in PATH is written twice), then nsid=N, block-size=SIZE, read-only, cache=SIZE, ana-group=N, uuid=UUID"

// ParseSize parses a size like 1GiB. The result is in bytes, 1 to 2^50.
func ParseSize(s string) (int64, error) {
	n, err := humanize.ParseBytes(s)
	if err != nil || n == 0 || n > 1<<50 {
		return 0, fmt.Errorf("%q: want a size like 64MiB", s)
	}
	return int64(n), nil
}

// ParseNamespace parses a namespace. A relative path is made absolute with the working
// directory of this process.
func ParseNamespace(text string) (Namespace, error) {
	var n Namespace
	for i, f := range fields(text) {
		var err error
		var v uint64
		first := i == 0
		switch {
		case first && f.key == "ram":
			n.RAM, err = ParseSize(f.value)
		case first && (f.key == "file" || f.key == "device") && f.value != "":
			n.Device = f.key == "device"
			n.File, err = filepath.Abs(f.value)
		case first:
			err = errors.New("it begins with what holds the data")
		case f.key == "nsid":
			v, err = f.number(1, target.MaxNamespaces)
			n.NSID = uint32(v)
		case f.key == "block-size":
			var size int64
			if size, err = ParseSize(f.value); err == nil && !slices.Contains([]int64{512, 1024, 2048, 4096}, size) {
				err = f.wrong("512, 1KiB, 2KiB or 4KiB")
			}
			n.BlockSize = int(size)
		case f.key == "read-only" && f.value == "":
			n.ReadOnly = true
		case f.key == "cache":
			n.Cache, err = ParseSize(f.value)
		case f.key == "ana-group":
			v, err = f.number(1, target.MaxANAGroups)
			n.ANAGroup = uint32(v)
		case f.key == "uuid":
			if n.UUID, err = nvme.ParseUUID(f.value); err != nil {
				err = f.wrong("a UUID")
			}
		default:
			err = fmt.Errorf("%q means nothing", f.key)
		}
		if err != nil {
			return Namespace{}, err
		}
	}
	return n, nil
}

// String returns a text that ParseNamespace parses to the same namespace.
func (n Namespace) String() string {
	out := fmt.Sprintf("ram=%dB", n.RAM)
	switch {
	case n.Device:
		out = "device=" + doubled(n.File)
	case n.File != "":
		out = "file=" + doubled(n.File)
	}
	add := func(on bool, format string, v ...any) {
		if on {
			out += fmt.Sprintf(","+format, v...)
		}
	}
	add(n.NSID != 0, "nsid=%d", n.NSID)
	add(n.BlockSize != 0, "block-size=%dB", n.BlockSize)
	add(n.ReadOnly, "read-only")
	add(n.Cache != 0, "cache=%dB", n.Cache)
	add(n.ANAGroup != 0, "ana-group=%d", n.ANAGroup)
	add(!n.UUID.IsZero(), "uuid=%s", n.UUID)
	return out
}

// FaultWords are the words that ParseFault accepts.
const FaultWords = "delay=TIME, drop, disconnect, status=CODE with dnr or without, corrupt=id|duplicate|short|sqhead|key|data; " +
	"for admin, qid=N, nsid=N, opcode=NAME (several by several); skip=N, count=N"

var corruptions = map[string]target.Corruption{
	"id": target.CorruptID, "duplicate": target.CorruptDuplicate, "short": target.CorruptShort,
	"sqhead": target.CorruptSQHead, "key": target.CorruptKey, "data": target.CorruptData,
}

var opcodes = map[string]nvme.Opcode{
	"flush": nvme.OpFlush, "write": nvme.OpWrite, "read": nvme.OpRead, "compare": nvme.OpCompare,
	"write-zeroes": nvme.OpWriteZeroes, "discard": nvme.OpDSM, "fabrics": nvme.OpFabrics,
}

var adminOpcodes = map[string]nvme.Opcode{
	"get-log-page": nvme.AdminGetLogPage, "identify": nvme.AdminIdentify, "abort": nvme.AdminAbort,
	"set-features": nvme.AdminSetFeatures, "get-features": nvme.AdminGetFeatures,
	"async-event": nvme.AdminAsyncEvent, "keep-alive": nvme.AdminKeepAlive, "fabrics": nvme.OpFabrics,
}

// ParseStatus parses a status code type and status code as nvme-cli writes them, in
// decimal or hexadecimal (0x6 is "internal error"). dnr adds Do Not Retry.
func ParseStatus(code string, dnr bool) (nvme.Status, error) {
	n, err := field{"status", code}.number(1, uint64(nvme.StatusCodeMask))
	if err != nil {
		return 0, err
	}
	s := nvme.Status(n)
	if dnr {
		s |= nvme.StatusDNR
	}
	return s, nil
}

// ParseFault parses a fault. See FaultWords.
func ParseFault(text string) (target.Fault, error) {
	var f target.Fault
	var status string
	var dnr bool
	var names []string
	for _, w := range fields(text) {
		var err error
		var v uint64
		switch w.key {
		case "admin":
			f.Admin = true
		case "qid":
			v, err = w.number(1, nvme.MaxQueues)
			f.QID = uint16(v)
		case "nsid":
			v, err = w.number(1, target.MaxNamespaces)
			f.NSID = uint32(v)
		case "opcode":
			names = append(names, w.value)
		case "skip":
			v, err = w.number(0, 1<<30)
			f.Skip = int(v)
		case "count":
			v, err = w.number(1, 1<<30)
			f.Count = int(v)
		case "delay":
			if f.Delay, err = time.ParseDuration(w.value); err != nil || f.Delay <= 0 {
				err = w.wrong("a time like 10ms")
			}
		case "drop":
			f.Drop = true
		case "disconnect":
			f.Disconnect = true
		case "status":
			status = w.value
		case "dnr":
			dnr = true
		case "corrupt":
			if f.Corrupt = corruptions[w.value]; f.Corrupt == target.CorruptNone {
				err = w.wrong("id, duplicate, short, sqhead, key or data")
			}
		default:
			err = fmt.Errorf("%q means nothing", w.key)
		}
		if err != nil {
			return f, err
		}
	}
	known := opcodes
	if f.Admin {
		known = adminOpcodes
	}
	for _, name := range names {
		op, ok := known[name]
		if n, err := strconv.ParseUint(name, 0, 8); err == nil {
			op, ok = nvme.Opcode(n), true
		}
		if !ok {
			return f, fmt.Errorf("opcode %q is unknown; want a number or %s", name, words(known))
		}
		f.Opcodes = append(f.Opcodes, op)
	}
	if status != "" {
		var err error
		if f.Status, err = ParseStatus(status, dnr); err != nil {
			return f, err
		}
	}
	if f.Delay == 0 && !f.Drop && !f.Disconnect && status == "" && f.Corrupt == target.CorruptNone {
		return f, errors.New("it does nothing")
	}
	return f, nil
}

func words[V any](m map[string]V) string {
	var names []string
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

var anaStates = map[string]nvme.ANAState{
	"optimized": nvme.ANAOptimized, "non-optimized": nvme.ANANonOptimized, "inaccessible": nvme.ANAInaccessible,
	"persistent-loss": nvme.ANAPersistentLoss, "change": nvme.ANAChange,
}

// ParseANAState parses the name of an ANA state.
func ParseANAState(name string) (nvme.ANAState, error) {
	s, ok := anaStates[name]
	if !ok {
		return 0, fmt.Errorf("ANA state %q: want %s", name, words(anaStates))
	}
	return s, nil
}
