package options

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/target"
)

func TestParseNamespace(t *testing.T) {
	for _, text := range []string{
		"ram=1048576B", "file=/a/b,nsid=3,block-size=4096B,read-only,cache=8192B,ana-group=2,uuid=12345678-1234-1234-1234-123456789abc", "device=/dev/null",
		"file=/a b/c,,d,,/e=f\n\"%,nsid=3", "file=/a,,,nsid=3", "file=/a,,,,b",
		"file=/a,,b,,,,c,shared,uuid=none,nguid=000102030405060708090a0b0c0d0e0f,eui64=0001020304050607",
	} {
		n, err := ParseNamespace(text)
		if err != nil || n.String() != text {
			t.Errorf("%s: %v, %s", text, err, n)
		}
	}
	for text, want := range map[string]string{
		"":                                "the first word must be ram, file or device",
		"nsid=1":                          "the first word must be ram, file or device",
		"file=":                           "want a path",
		"ram=x":                           "want a size",
		"ram=0":                           "want a size",
		"ram=1MiB,nsid=0":                 "want a number, 1 to 1024",
		"ram=1MiB,block-size=8K":          "want 512, 1KiB, 2KiB or 4KiB",
		"ram=1MiB,ana-group=33":           "want a number, 1 to 32",
		"ram=1MiB,uuid=1":                 "want a UUID",
		"ram=1MiB,read-only=true":         `read-only="true": want read-only alone`,
		"ram=2PiB":                        "want at most 1.0 PiB",
		"ram=1,,0":                        "want a size",
		"ram=1MiB,shared":                 "namespaces in memory cannot share it",
		"ram=1MiB,nguid=00":               "want 32 hexadecimal digits",
		"ram=1MiB,eui64=0000000000000000": "not all 0",
		"ram=1MiB,uuid=00000000-0000-0000-0000-000000000000": "that is not zero",
		"ram=1MiB,ram=1MiB": `unknown word "ram"`,
	} {
		if _, err := ParseNamespace(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestParseFault(t *testing.T) {
	for text, want := range map[string]target.Fault{
		"delay=10ms": {Delay: 10 * time.Millisecond},
		"drop,admin,opcode=keep-alive,opcode=0x6,skip=1,count=2": {
			Match: target.Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminKeepAlive, nvme.AdminIdentify}}, Skip: 1, Count: 2, Drop: true},
		"opcode=read,qid=2,nsid=3,disconnect": {Match: target.Match{QID: 2, NSID: 3, Opcodes: []nvme.Opcode{nvme.OpRead}}, Disconnect: true},
		"dnr,status=0x281":                    {Status: 0x281 | nvme.StatusDNR},
		"status=6":                            {Status: nvme.StatusInternal},
		"corrupt=sqhead":                      {Corrupt: target.CorruptSQHead},
		"corrupt=lost,lid=4,count=1": {Match: target.Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminGetLogPage}, Selectors: []uint8{4}},
			Count: 1, Corrupt: target.CorruptLost},
		"cns=3,status=2,dnr":   {Match: target.Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminIdentify}, Selectors: []uint8{3}}, Status: 2 | nvme.StatusDNR},
		"fid=7,drop":           {Match: target.Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminSetFeatures, nvme.AdminGetFeatures}, Selectors: []uint8{7}}, Drop: true},
		"hold=6s,opcode=write": {Match: target.Match{Opcodes: []nvme.Opcode{nvme.OpWrite}}, Hold: 6 * time.Second},
		"status=0x82,crd=3":    {Status: 0x82 | 3<<11},
		"cns=1,patch=1792:ffff,patch=0x4d:00": {
			Match:   target.Match{Admin: true, Opcodes: []nvme.Opcode{nvme.AdminIdentify}, Selectors: []uint8{1}},
			Patches: []target.Patch{{Offset: 1792, Bytes: []byte{255, 255}}, {Offset: 77, Bytes: []byte{0}}}},
		"auth=challenge,auth=reply,replay,truncate=0": {Match: target.Match{Messages: []auth.Kind{auth.Challenge, auth.Reply}}, Replay: true, Truncate: -1},
		"admin,auth=success1,truncate=16,count=1":     {Match: target.Match{Admin: true, Messages: []auth.Kind{auth.Success1}}, Count: 1, Truncate: 16},
	} {
		got, err := ParseFault(text)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"":                      `unknown word ""`,
		"opcode=read":           "the fault does nothing",
		"drop,opcode=identify":  "want a number or compare, discard",
		"drop,opcode=0x100":     "want a number or compare",
		"delay=1":               "want a time",
		"status=0":              "want a number, 1 to 2047",
		"corrupt=all":           "want id, duplicate, short",
		"drop,count=0":          "want a number",
		"drop,qid=65536":        "want a number, 1 to 65535",
		"stall":                 `unknown word "stall"`,
		"drop,dnr":              "want status=CODE as well",
		"hold=1s,admin":         "does not enter a store",
		"drop,admin=1":          "want admin alone",
		"status=6,crd=4":        "want a number, 1 to 3",
		"cns=256,drop":          "want a number, 0 to 255",
		"cns=1,patch=1792":      "like 1792:ffffffff",
		"cns=1,patch=-1:00":     "like 1792:ffffffff",
		"cns=1,patch=1:0":       "like 1792:ffffffff",
		"patch=1:00":            "want admin, cns, lid, fid or auth",
		"opcode=read,replay":    "want admin, cns, lid, fid or auth",
		"truncate=1,qid=1":      "want admin, cns, lid, fid or auth",
		"auth=success3,drop":    "want challenge, failure1, negotiate, reply, success1, success2",
		"auth=reply,cns=1,drop": "want no opcode, cns, lid or fid",
		"auth=reply":            "the fault does nothing",
		"drop,admin,opcode=dsm": "want a number or abort",
	} {
		if _, err := ParseFault(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}
