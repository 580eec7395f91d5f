package options

import (
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"

	"ublk-nvmeof/nvme"
	"ublk-nvmeof/target"
)

// Namespace says what a namespace is, in words like these:
//
//	ram=SIZE | file=PATH | device=PATH
//	nsid=N  block-size=SIZE  read-only  cache=SIZE  ana-group=N
//	uuid=UUID|none  nguid=HEX  eui64=HEX  shared
type Namespace struct {
	RAM       int64  // bytes; 0: File
	File      string // absolute
	Device    bool   // File is a block device
	Shared    bool   // File may be that of other namespaces, too
	NSID      uint32 // 0: the lowest that is free
	BlockSize int    // 0: 512
	ReadOnly  bool
	Cache     int64  // bytes of a volatile write cache; 0: none
	ANAGroup  uint32 // 0: 1
	UUID      nvme.UUID
	NoUUID    bool
	NGUID     [16]byte // zero: none
	EUI64     [8]byte  // zero: none
}

// NamespaceWords are what ParseNamespace wants.
const NamespaceWords = "ram=SIZE, file=PATH or device=PATH (write a comma in PATH twice), then nsid=N, block-size=SIZE, read-only, cache=SIZE, " +
	"ana-group=N, uuid=UUID or uuid=none, nguid=32 hex digits, eui64=16 hex digits, shared (several namespaces use PATH)"

// ParseSize reads a size like 1GiB, in bytes, at least 1.
func ParseSize(s string) (int64, error) {
	n, err := humanize.ParseBytes(s)
	switch {
	case err != nil || n == 0 || strings.Contains(s, ","):
		return 0, fmt.Errorf("%q: want a size like 64MiB", s)
	case n > target.MaxRAM:
		return 0, fmt.Errorf("%q: want at most %s", s, humanize.IBytes(target.MaxRAM))
	}
	return int64(n), nil
}

// FormatSize writes a number of bytes for people.
func FormatSize(n int64) string { return humanize.IBytes(uint64(max(0, n))) }

// data are the words that a namespace begins with.
var data = words[Namespace]{
	"ram": func(n *Namespace, f field) (err error) {
		n.RAM, err = ParseSize(f.value)
		return err
	},
	"file": (*Namespace).setFile,
	"device": func(n *Namespace, f field) error {
		n.Device = true
		return n.setFile(f)
	},
}

func (n *Namespace) setFile(f field) (err error) {
	if f.value == "" {
		return f.wrong("a path")
	}
	n.File, err = filepath.Abs(f.value)
	return err
}

// properties are the words that follow.
var properties = words[Namespace]{
	"nsid": func(n *Namespace, f field) error {
		v, err := f.number(1, target.MaxNamespaces)
		n.NSID = uint32(v)
		return err
	},
	"block-size": func(n *Namespace, f field) error {
		size, err := ParseSize(f.value)
		if err != nil || !slices.Contains([]int64{512, 1024, 2048, 4096}, size) {
			return f.wrong("512, 1KiB, 2KiB or 4KiB")
		}
		n.BlockSize = int(size)
		return nil
	},
	"read-only": func(n *Namespace, f field) error {
		n.ReadOnly = true
		return f.bare()
	},
	"shared": func(n *Namespace, f field) error {
		n.Shared = true
		if n.File == "" {
			return errors.New("shared: namespaces in memory cannot share it; want file=PATH or device=PATH")
		}
		return f.bare()
	},
	"cache": func(n *Namespace, f field) (err error) {
		n.Cache, err = ParseSize(f.value)
		return err
	},
	"ana-group": func(n *Namespace, f field) error {
		v, err := f.number(1, target.MaxANAGroups)
		n.ANAGroup = uint32(v)
		return err
	},
	"uuid": func(n *Namespace, f field) (err error) {
		if n.NoUUID = f.value == "none"; n.NoUUID {
			n.UUID = nvme.UUID{}
			return nil
		}
		if n.UUID, err = nvme.ParseUUID(f.value); err != nil || n.UUID.IsZero() {
			return f.wrong("a UUID that is not zero, or none")
		}
		return nil
	},
	"nguid": func(n *Namespace, f field) error { return f.identifier(n.NGUID[:]) },
	"eui64": func(n *Namespace, f field) error { return f.identifier(n.EUI64[:]) },
}

// identifier reads the hexadecimal digits of an identifier, which is not zero.
func (f field) identifier(id []byte) error {
	b, err := hex.DecodeString(f.value)
	if err != nil || len(b) != len(id) || slices.Max(b) == 0 {
		return f.wrong(fmt.Sprintf("%d hexadecimal digits, not all 0", 2*len(id)))
	}
	copy(id, b)
	return nil
}

// ParseNamespace reads a namespace. Relative paths are of this process.
func ParseNamespace(text string) (Namespace, error) {
	var n Namespace
	for i, f := range fields(text) {
		known := properties
		if i == 0 {
			if known = data; data[f.key] == nil {
				return Namespace{}, errors.New("the first word must be ram, file or device")
			}
		}
		if err := known.parse(&n, f); err != nil {
			return Namespace{}, err
		}
	}
	return n, nil
}

// String is what ParseNamespace reads again.
func (n Namespace) String() string {
	file := strings.ReplaceAll(n.File, ",", ",,")
	out := fmt.Sprintf("ram=%dB", n.RAM)
	switch {
	case n.Device:
		out = "device=" + file
	case n.File != "":
		out = "file=" + file
	}
	add := func(on bool, format string, v ...any) {
		if on {
			out += fmt.Sprintf(","+format, v...)
		}
	}
	add(n.Shared, "shared")
	add(n.NSID != 0, "nsid=%d", n.NSID)
	add(n.BlockSize != 0, "block-size=%dB", n.BlockSize)
	add(n.ReadOnly, "read-only")
	add(n.Cache != 0, "cache=%dB", n.Cache)
	add(n.ANAGroup != 0, "ana-group=%d", n.ANAGroup)
	add(!n.UUID.IsZero(), "uuid=%s", n.UUID)
	add(n.NoUUID, "uuid=none")
	add(n.NGUID != [16]byte{}, "nguid=%x", n.NGUID)
	add(n.EUI64 != [8]byte{}, "eui64=%x", n.EUI64)
	return out
}

var anaStates = map[string]nvme.ANAState{
	"optimized": nvme.ANAOptimized, "non-optimized": nvme.ANANonOptimized, "inaccessible": nvme.ANAInaccessible,
	"persistent-loss": nvme.ANAPersistentLoss, "change": nvme.ANAChange,
}

// ParseANAState reads the name of an ANA state.
func ParseANAState(name string) (nvme.ANAState, error) {
	s, ok := anaStates[name]
	if !ok {
		return 0, fmt.Errorf("ANA state %q: want %s", name, names(anaStates))
	}
	return s, nil
}
