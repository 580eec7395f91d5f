package options

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/target"
)

// FaultWords are what ParseFault wants.
const FaultWords = "delay=TIME, hold=TIME (inside the store), drop, disconnect, status=CODE (also with dnr or crd=1..3), " +
	"corrupt=id|duplicate|short|sqhead|key|data|lost; " +
	"in the data that an admin command or an authentication returns: replay (those of the first such command), patch=OFFSET:HEX (repeatable), truncate=BYTES; " +
	"to select commands: port=N, admin, qid=N, nsid=N, opcode=NAME (repeatable), cns=N, lid=N, fid=N, " +
	"auth=negotiate|challenge|reply|success1|success2|failure1 (repeatable); skip=N, count=N"

var corruptions = map[string]target.Corruption{
	"id": target.CorruptID, "duplicate": target.CorruptDuplicate, "short": target.CorruptShort,
	"sqhead": target.CorruptSQHead, "key": target.CorruptKey, "data": target.CorruptData, "lost": target.CorruptLost,
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

var authMessages = map[string]auth.Kind{
	"negotiate": auth.Negotiate, "challenge": auth.Challenge, "reply": auth.Reply,
	"success1": auth.Success1, "success2": auth.Success2, "failure1": auth.Failure1,
}

// ParseStatus reads a status: type and code as in nvme-cli, decimal or
// hexadecimal (0x6 is "internal error"), and dnr.
func ParseStatus(code string, dnr bool) (nvme.Status, error) {
	n, err := field{key: "status", value: code}.number(1, uint64(nvme.StatusCodeMask))
	if err != nil {
		return 0, err
	}
	s := nvme.Status(n)
	if dnr {
		s |= nvme.StatusDNR
	}
	return s, nil
}

// faultText is a fault of which not every word has its meaning yet.
type faultText struct {
	target.Fault
	dnr     bool
	crd     uint64
	opcodes []string
}

var faultWords = words[faultText]{
	"admin": func(t *faultText, f field) error {
		t.Admin = true
		return f.bare()
	},
	"port": func(t *faultText, f field) error {
		v, err := f.number(1, target.MaxPorts)
		t.Port = uint16(v)
		return err
	},
	"qid": func(t *faultText, f field) error {
		v, err := f.number(1, nvme.MaxQueues)
		t.QID = uint16(v)
		return err
	},
	"nsid": func(t *faultText, f field) error {
		v, err := f.number(1, target.MaxNamespaces)
		t.NSID = uint32(v)
		return err
	},
	"opcode": func(t *faultText, f field) error {
		t.opcodes = append(t.opcodes, f.value)
		return nil
	},
	"cns": func(t *faultText, f field) error { return t.selects(f, nvme.AdminIdentify) },
	"lid": func(t *faultText, f field) error { return t.selects(f, nvme.AdminGetLogPage) },
	"fid": func(t *faultText, f field) error {
		return t.selects(f, nvme.AdminSetFeatures, nvme.AdminGetFeatures)
	},
	"auth": func(t *faultText, f field) error {
		k, ok := authMessages[f.value]
		if !ok {
			return f.wrong(names(authMessages))
		}
		t.Messages = append(t.Messages, k)
		return nil
	},
	"skip": func(t *faultText, f field) error {
		v, err := f.number(0, 1<<30)
		t.Skip = int(v)
		return err
	},
	"count": func(t *faultText, f field) error {
		v, err := f.number(1, 1<<30)
		t.Count = int(v)
		return err
	},
	"delay": func(t *faultText, f field) error { return f.time(&t.Delay) },
	"hold":  func(t *faultText, f field) error { return f.time(&t.Hold) },
	"drop": func(t *faultText, f field) error {
		t.Drop = true
		return f.bare()
	},
	"disconnect": func(t *faultText, f field) error {
		t.Disconnect = true
		return f.bare()
	},
	"status": func(t *faultText, f field) (err error) {
		t.Status, err = ParseStatus(f.value, false)
		return err
	},
	"dnr": func(t *faultText, f field) error {
		t.dnr = true
		return f.bare()
	},
	"crd": func(t *faultText, f field) (err error) {
		t.crd, err = f.number(1, 3)
		return err
	},
	"patch": func(t *faultText, f field) error {
		offset, digits, _ := strings.Cut(f.value, ":")
		n, err := strconv.ParseUint(offset, 0, 31)
		b, herr := hex.DecodeString(digits)
		if err != nil || herr != nil || len(b) == 0 {
			return f.wrong("an offset, a colon and pairs of hexadecimal digits, like 1792:ffffffff")
		}
		t.Patches = append(t.Patches, target.Patch{Offset: int(n), Bytes: b})
		return nil
	},
	"replay": func(t *faultText, f field) error {
		t.Replay = true
		return f.bare()
	},
	"truncate": func(t *faultText, f field) error {
		v, err := f.number(0, 1<<30)
		if t.Truncate = int(v); v == 0 {
			t.Truncate = -1
		}
		return err
	},
	"corrupt": func(t *faultText, f field) error {
		if t.Corrupt = corruptions[f.value]; t.Corrupt == target.CorruptNone {
			return f.wrong("id, duplicate, short, sqhead, key, data or lost")
		}
		return nil
	},
}

// selects makes a fault one of commands that ask for one thing.
func (t *faultText) selects(f field, ops ...nvme.Opcode) error {
	v, err := f.number(0, 255)
	if err != nil {
		return err
	}
	t.Admin = true
	t.Opcodes = append(t.Opcodes, ops...)
	t.Selectors = append(t.Selectors, uint8(v))
	return nil
}

func (f field) time(into *time.Duration) error {
	d, err := time.ParseDuration(f.value)
	if err != nil || d <= 0 {
		return f.wrong("a time like 10ms")
	}
	*into = d
	return nil
}

// ParseFault reads a fault. See FaultWords.
func ParseFault(text string) (target.Fault, error) {
	var t faultText
	for _, f := range fields(text) {
		if err := faultWords.parse(&t, f); err != nil {
			return target.Fault{}, err
		}
	}
	known := opcodes
	if t.Admin {
		known = adminOpcodes
	}
	for _, name := range t.opcodes {
		op, ok := known[name]
		if n, err := strconv.ParseUint(name, 0, 8); err == nil {
			op, ok = nvme.Opcode(n), true
		}
		if !ok {
			return target.Fault{}, fmt.Errorf("opcode %q is unknown; want a number or %s", name, names(known))
		}
		t.Opcodes = append(t.Opcodes, op)
	}
	falsifies := t.Replay || len(t.Patches) > 0 || t.Truncate != 0
	switch {
	case t.Status.OK() && (t.dnr || t.crd != 0):
		return target.Fault{}, errors.New("dnr and crd are bits of a status; want status=CODE as well")
	case t.Delay == 0 && t.Hold == 0 && !t.Drop && !t.Disconnect && t.Status.OK() && t.Corrupt == target.CorruptNone && !falsifies:
		return target.Fault{}, errors.New("the fault does nothing")
	case falsifies && !t.Admin && len(t.Messages) == 0:
		return target.Fault{}, errors.New("replay, patch and truncate: want admin, cns, lid, fid or auth as well")
	case len(t.Messages) > 0 && len(t.Opcodes) > 0:
		return target.Fault{}, errors.New("auth: the opcode is that of authentication; want no opcode, cns, lid or fid")
	case t.Hold != 0 && t.Admin:
		return target.Fault{}, errors.New("hold: an admin command does not enter a store")
	}
	if t.dnr {
		t.Status |= nvme.StatusDNR
	}
	t.Status |= nvme.Status(t.crd) << 11 & nvme.StatusCRD
	return t.Fault, nil
}
