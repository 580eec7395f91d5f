package output

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"

	"ublk-nvmeof/nvme"
)

var le = binary.LittleEndian

// controllerPlaces are the fields of Identify Controller (Base, "Identify Controller data
// structure"), with the names of nvme-cli 2.13.
var controllerPlaces = []place{
	{name: "vid", at: 0, size: 2, kind: hexadecimal},
	{name: "ssvid", at: 2, size: 2, kind: hexadecimal},
	{name: "sn", at: 4, size: 20, kind: text},
	{name: "mn", at: 24, size: 40, kind: text},
	{name: "fr", at: 64, size: 8, kind: text},
	{name: "rab", at: 72, size: 1},
	{name: "ieee", at: 73, size: 3, kind: oui},
	{name: "cmic", at: 76, size: 1, kind: hexadecimal},
	{name: "mdts", at: 77, size: 1},
	{name: "cntlid", at: 78, size: 2, kind: hexadecimal},
	{name: "ver", at: 80, size: 4, kind: hexadecimal},
	{name: "rtd3r", at: 84, size: 4, kind: hexadecimal},
	{name: "rtd3e", at: 88, size: 4, kind: hexadecimal},
	{name: "oaes", at: 92, size: 4, kind: hexadecimal},
	{name: "ctratt", at: 96, size: 4, kind: hexadecimal},
	{name: "rrls", at: 100, size: 2, kind: hexadecimal},
	{name: "bpcap", at: 102, size: 1, kind: hexadecimal},
	{name: "nssl", at: 104, size: 4, kind: hexadecimal},
	{name: "plsi", at: 110, size: 1},
	{name: "cntrltype", at: 111, size: 1},
	{name: "fguid", at: 112, size: 16, kind: uuid},
	{name: "crdt1", at: 128, size: 2},
	{name: "crdt2", at: 130, size: 2},
	{name: "crdt3", at: 132, size: 2},
	{name: "crcap", at: 134, size: 1},
	{name: "nvmsr", at: 253, size: 1},
	{name: "vwci", at: 254, size: 1},
	{name: "mec", at: 255, size: 1},
	{name: "oacs", at: 256, size: 2, kind: hexadecimal},
	{name: "acl", at: 258, size: 1},
	{name: "aerl", at: 259, size: 1},
	{name: "frmw", at: 260, size: 1, kind: hexadecimal},
	{name: "lpa", at: 261, size: 1, kind: hexadecimal},
	{name: "elpe", at: 262, size: 1},
	{name: "npss", at: 263, size: 1},
	{name: "avscc", at: 264, size: 1, kind: hexadecimal},
	{name: "apsta", at: 265, size: 1, kind: hexadecimal},
	{name: "wctemp", at: 266, size: 2},
	{name: "cctemp", at: 268, size: 2},
	{name: "mtfa", at: 270, size: 2},
	{name: "hmpre", at: 272, size: 4},
	{name: "hmmin", at: 276, size: 4},
	{name: "tnvmcap", at: 280, size: 16},
	{name: "unvmcap", at: 296, size: 16},
	{name: "rpmbs", at: 312, size: 4, kind: hexadecimal},
	{name: "edstt", at: 316, size: 2},
	{name: "dsto", at: 318, size: 1},
	{name: "fwug", at: 319, size: 1},
	{name: "kas", at: 320, size: 2},
	{name: "hctma", at: 322, size: 2, kind: hexadecimal},
	{name: "mntmt", at: 324, size: 2},
	{name: "mxtmt", at: 326, size: 2},
	{name: "sanicap", at: 328, size: 4, kind: hexadecimal},
	{name: "hmminds", at: 332, size: 4},
	{name: "hmmaxd", at: 336, size: 2},
	{name: "nsetidmax", at: 338, size: 2},
	{name: "endgidmax", at: 340, size: 2},
	{name: "anatt", at: 342, size: 1},
	{name: "anacap", at: 343, size: 1},
	{name: "anagrpmax", at: 344, size: 4},
	{name: "nanagrpid", at: 348, size: 4},
	{name: "pels", at: 352, size: 4},
	{name: "domainid", at: 356, size: 2},
	{name: "kpioc", at: 358, size: 1},
	{name: "mptfawr", at: 360, size: 2},
	{name: "megcap", at: 368, size: 16},
	{name: "tmpthha", at: 384, size: 1, kind: hexadecimal},
	{name: "cqt", at: 386, size: 2},
	{name: "sqes", at: 512, size: 1, kind: hexadecimal},
	{name: "cqes", at: 513, size: 1, kind: hexadecimal},
	{name: "maxcmd", at: 514, size: 2},
	{name: "nn", at: 516, size: 4},
	{name: "oncs", at: 520, size: 2, kind: hexadecimal},
	{name: "fuses", at: 522, size: 2, kind: hexadecimal},
	{name: "fna", at: 524, size: 1, kind: hexadecimal},
	{name: "vwc", at: 525, size: 1, kind: hexadecimal},
	{name: "awun", at: 526, size: 2},
	{name: "awupf", at: 528, size: 2},
	{name: "icsvscc", at: 530, size: 1},
	{name: "nwpc", at: 531, size: 1},
	{name: "acwu", at: 532, size: 2},
	{name: "ocfs", at: 534, size: 2, kind: hexadecimal},
	{name: "sgls", at: 536, size: 4, kind: hexadecimal},
	{name: "mnan", at: 540, size: 4},
	{name: "maxdna", at: 544, size: 16},
	{name: "maxcna", at: 560, size: 4},
	{name: "oaqd", at: 564, size: 4},
	{name: "rhiri", at: 568, size: 1},
	{name: "hirt", at: 569, size: 1},
	{name: "cmmrtd", at: 570, size: 2},
	{name: "nmmrtd", at: 572, size: 2},
	{name: "minmrtg", at: 574, size: 1},
	{name: "maxmrtg", at: 575, size: 1},
	{name: "trattr", at: 576, size: 1},
	{name: "mcudmq", at: 578, size: 2},
	{name: "mnsudmq", at: 580, size: 2},
	{name: "mcmr", at: 582, size: 2},
	{name: "nmcmr", at: 584, size: 2},
	{name: "mcdqpc", at: 586, size: 2},
	{name: "subnqn", at: 768, size: 256, kind: text},
	{name: "ioccsz", at: 1792, size: 4},
	{name: "iorcsz", at: 1796, size: 4},
	{name: "icdoff", at: 1800, size: 2},
	{name: "fcatt", at: 1802, size: 1, kind: hexadecimal},
	{name: "msdbd", at: 1803, size: 1},
	{name: "ofcs", at: 1804, size: 2},
}

// Power state descriptors.
const (
	powerStates     = 2048 // where they begin
	powerStateSize  = 32
	maxPowerStates  = 32
	powerStateCount = 263 // NPSS, less one
)

var powerPlaces = []place{
	{name: "max_power", at: 0, size: 2},
	{name: "flags", at: 3, size: 1}, // up to nvme-cli 2.8
	{name: "entry_lat", at: 4, size: 4},
	{name: "exit_lat", at: 8, size: 4},
	{name: "read_tput", at: 12, size: 1},
	{name: "read_lat", at: 13, size: 1},
	{name: "write_tput", at: 14, size: 1},
	{name: "write_lat", at: 15, size: 1},
	{name: "idle_power", at: 16, size: 2},
	{name: "active_power", at: 20, size: 2},
}

// powerState decodes a power state descriptor.
func powerState(b []byte) object {
	bits := func(name string, at, shift, mask int) member {
		return member{name: name, value: int(b[at]) >> shift & mask}
	}
	return append(decode(b, powerPlaces),
		bits("max_power_scale", 3, 0, 1), bits("non-operational_state", 3, 1, 1),
		bits("idle_scale", 18, 6, 3), bits("active_power_work", 22, 0, 7), bits("active_scale", 22, 6, 3))
}

// IdentifyController writes Identify Controller (CNS 01h), with human the bits of its fields.
func IdentifyController(w io.Writer, page []byte, human bool, format string) error {
	o := decode(page, controllerPlaces)
	var states []object
	for i := range min(int(page[powerStateCount])+1, maxPowerStates) {
		states = append(states, powerState(page[powerStates+i*powerStateSize:][:powerStateSize]))
	}
	if format == JSON {
		return writeJSON(w, append(o, member{name: "psds", value: states}))
	}
	fmt.Fprintln(w, "NVME Identify Controller:")
	if err := o.writeText(w, 10, human); err != nil {
		return err
	}
	for i, s := range states {
		fmt.Fprintf(w, "ps %4d   : mp:%v enlat:%v exlat:%v rrt:%v rrl:%v rwt:%v rwl:%v\n", i,
			s[0].value, s[2].value, s[3].value, s[4].value, s[5].value, s[6].value, s[7].value)
	}
	return nil
}

// namespacePlaces are the fields of Identify Namespace (NVM Command Set, "Identify
// Namespace data structure"). The optional ones follow nvmcap.
var namespacePlaces = []place{
	{name: "nsze", at: 0, size: 8, kind: hexadecimal},
	{name: "ncap", at: 8, size: 8, kind: hexadecimal},
	{name: "nuse", at: 16, size: 8, kind: hexadecimal},
	{name: "nsfeat", at: 24, size: 1, kind: hexadecimal},
	{name: "nlbaf", at: 25, size: 1},
	{name: "flbas", at: 26, size: 1, kind: hexadecimal},
	{name: "mc", at: 27, size: 1, kind: hexadecimal},
	{name: "dpc", at: 28, size: 1, kind: hexadecimal},
	{name: "dps", at: 29, size: 1, kind: hexadecimal},
	{name: "nmic", at: 30, size: 1, kind: hexadecimal},
	{name: "rescap", at: 31, size: 1, kind: hexadecimal},
	{name: "fpi", at: 32, size: 1, kind: hexadecimal},
	{name: "dlfeat", at: 33, size: 1},
	{name: "nawun", at: 34, size: 2},
	{name: "nawupf", at: 36, size: 2},
	{name: "nacwu", at: 38, size: 2},
	{name: "nabsn", at: 40, size: 2},
	{name: "nabo", at: 42, size: 2},
	{name: "nabspf", at: 44, size: 2},
	{name: "noiob", at: 46, size: 2},
	{name: "nvmcap", at: 48, size: 16},
	{name: "npwg", at: 64, size: 2},
	{name: "npwa", at: 66, size: 2},
	{name: "npdg", at: 68, size: 2},
	{name: "npda", at: 70, size: 2},
	{name: "nows", at: 72, size: 2},
	{name: "mssrl", at: 74, size: 2},
	{name: "mcl", at: 76, size: 4},
	{name: "msrc", at: 80, size: 1},
	{name: "kpios", at: 81, size: 1},
	{name: "nulbaf", at: 82, size: 1},
	{name: "kpiodaag", at: 84, size: 4},
	{name: "anagrpid", at: 92, size: 4},
	{name: "nsattr", at: 99, size: 1},
	{name: "nvmsetid", at: 100, size: 2},
	{name: "endgid", at: 102, size: 2},
	{name: "nguid", at: 104, size: 16, kind: digits},
	{name: "eui64", at: 120, size: 8, kind: digits},
}

// optimal are the names of the fields that a namespace has only if NSFEAT says so.
var optimal = map[string]bool{"npwg": true, "npwa": true, "npdg": true, "npda": true, "nows": true}

// IdentifyNamespace writes Identify Namespace (CNS 00h), with human the bits of its fields.
func IdentifyNamespace(w io.Writer, page []byte, nsid uint32, human bool, format string) error {
	id := nvme.IdentifyNamespaceAt(page)
	var o object
	for _, m := range decode(page, namespacePlaces) {
		if !optimal[m.name] || id.OPTPERF() != 0 {
			o = append(o, m)
		}
	}
	formats := []object{}
	for i := range min(int(id.NLBAF())+1, 64) {
		f := page[128+4*i:]
		formats = append(formats, object{
			{name: "ms", value: le.Uint16(f)}, {name: "ds", value: f[2]}, {name: "rp", value: f[3], text: hexNumber(f[3])},
		})
	}
	if format == JSON {
		return writeJSON(w, append(o, member{name: "lbafs", value: formats}))
	}
	fmt.Fprintf(w, "NVME Identify Namespace %d:\n", nsid)
	if err := o.writeText(w, 8, human); err != nil {
		return err
	}
	for i, f := range formats {
		inUse := ""
		if i == id.FormatIndex() {
			inUse = "(in use)"
		}
		if _, err := fmt.Fprintf(w, "lbaf %2d : ms:%-3d lbads:%-2d rp:%s %s\n", i, f[0].value, f[1].value, f[2].text, inUse); err != nil {
			return err
		}
	}
	return nil
}

// NamespaceList writes a list of namespace ids (CNS 02h).
func NamespaceList(w io.Writer, ids []uint32, format string) error {
	if format == JSON {
		list := []object{}
		for _, id := range ids {
			list = append(list, object{{name: "nsid", value: id}})
		}
		return writeJSON(w, object{{name: "nsid_list", value: list}})
	}
	fmt.Fprintln(w, "NVME Namespace List:")
	for i, id := range ids {
		if _, err := fmt.Fprintf(w, "[%4d]:%s\n", i, hexNumber(id)); err != nil {
			return err
		}
	}
	return nil
}

// descriptorNames are the names of the types of namespace descriptors.
var descriptorNames = map[byte]string{1: "eui64", 2: "nguid", 3: "uuid", 4: "csi"}

// NamespaceDescriptors writes the identification descriptors of a namespace (CNS 03h).
// Those of unknown types are left out.
func NamespaceDescriptors(w io.Writer, page []byte, nsid uint32, format string) error {
	list := []object{}
	var shown object
	for at := 0; at+4 <= len(page); {
		kind, size := page[at], int(page[at+1])
		if size == 0 || at+4+size > len(page) {
			break
		}
		if name := descriptorNames[kind]; name != "" {
			value := descriptor(name, page[at+4:at+4+size])
			list = append(list, object{
				{name: "loc", value: at}, {name: "nidt", value: kind}, {name: "nidl", value: size},
				{name: "Type", value: name}, {name: "type", value: name}, // up to nvme-cli 2.8
				{name: name, value: value},
			})
			shown = append(shown, member{label: name, text: value})
		}
		at += 4 + size
	}
	if format == JSON {
		return writeJSON(w, object{{name: "ns-descs", value: list}})
	}
	fmt.Fprintf(w, "NVME Namespace Identification Descriptors NS %d:\n", nsid)
	return shown.writeText(w, 8, false)
}

// descriptor writes the value of a namespace descriptor.
func descriptor(name string, b []byte) string {
	switch {
	case name == "uuid" && len(b) == len(nvme.UUID{}):
		return nvme.UUID(b).String()
	case name == "csi":
		return hexNumber(b[0])
	}
	return hex.EncodeToString(b)
}
