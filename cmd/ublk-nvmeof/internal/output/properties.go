package output

import (
	"fmt"
	"io"

	"ublk-nvmeof/nvme"
)

// registers are the names of the properties of a controller, in the order of nvme-cli. A
// controller on a fabric has only some of them.
var registers = []struct {
	name   string
	offset uint32
}{
	{"cap", nvme.PropCAP}, {"vs", nvme.PropVS}, {"intms", 0x0C}, {"intmc", 0x10}, {"cc", nvme.PropCC},
	{"csts", nvme.PropCSTS}, {"nssr", nvme.PropNSSR}, {"aqa", 0x24}, {"asq", 0x28}, {"acq", 0x30},
	{"cmbloc", 0x38}, {"cmbsz", 0x3C}, {"bpinfo", 0x40}, {"bprsel", 0x44}, {"bpmbl", 0x48},
	{"cmbmsc", 0x50}, {"cmbsts", 0x58}, {"cmbebs", 0x5C}, {"cmbswtp", 0x60}, {"nssd", 0x64},
	{"crto", nvme.PropCRTO}, {"pmrcap", 0xE00}, {"pmrctl", 0xE04}, {"pmrsts", 0xE08}, {"pmrebs", 0xE0C},
	{"pmrswtp", 0xE10}, {"pmrmscl", 0xE14}, {"pmrmscu", 0xE18},
}

// Properties writes the properties of a controller by their offsets. Those that it does
// not have are null in JSON and left out for people, who get their parts with human.
func Properties(w io.Writer, values map[uint32]uint64, human bool, format string) error {
	var o object
	for _, r := range registers {
		v, ok := values[r.offset]
		if !ok {
			o = append(o, member{name: r.name})
			continue
		}
		m := member{name: r.name, value: v, label: r.name, text: fmt.Sprintf("%x", v)}
		if human {
			if parts := propertyParts(r.offset, v); parts != "" {
				m.text += " (" + parts + ")"
			}
		}
		o = append(o, m)
	}
	if format == JSON {
		return writeJSON(w, o)
	}
	return o.writeText(w, 8, false)
}

// propertyParts writes what a property says, in the terms of the specification.
func propertyParts(offset uint32, v uint64) string {
	switch offset {
	case nvme.PropCAP:
		c := nvme.Cap(v)
		return fmt.Sprintf("MQES %d, CQR %d, TO %d, DSTRD %d, NSSRS %d, CSS %#x, MPSMIN %d, MPSMAX %d, CRMS %d",
			c.MQES(), bit(c.CQR()), c.TO(), c.DSTRD(), bit(c.NSSRS()), c.CSS(), c.MPSMIN(), c.MPSMAX(), c.CRMS())
	case nvme.PropVS:
		return nvme.Version(v).String()
	case nvme.PropCC:
		c := nvme.CC(v)
		return fmt.Sprintf("EN %d, CSS %d, MPS %d, AMS %d, SHN %d, IOSQES %d, IOCQES %d, CRIME %d",
			bit(c.EN()), c.CSS(), c.MPS(), c.AMS(), c.SHN(), c.IOSQES(), c.IOCQES(), bit(c.CRIME()))
	case nvme.PropCSTS:
		c := nvme.CSTS(v)
		return fmt.Sprintf("RDY %d, CFS %d, SHST %d, NSSRO %d, PP %d", bit(c.RDY()), bit(c.CFS()), c.SHST(), bit(c.NSSRO()), bit(c.PP()))
	case nvme.PropCRTO:
		c := nvme.CRTO(v)
		return fmt.Sprintf("CRWMT %d, CRIMT %d", c.CRWMT(), c.CRIMT())
	}
	return ""
}

func bit(on bool) int {
	if on {
		return 1
	}
	return 0
}

// Property writes one property.
func Property(w io.Writer, offset uint32, v uint64, human bool, format string) error {
	name := fmt.Sprintf("%#x", offset)
	for _, r := range registers {
		if r.offset == offset {
			name = r.name
		}
	}
	if format == JSON {
		return writeJSON(w, object{
			{name: "property", value: fmt.Sprintf("0x%02x", offset)}, {name: "name", value: name}, {name: "value", value: fmt.Sprintf("%x", v)},
		})
	}
	shown := fmt.Sprintf("property: 0x%02x (%s), value: %x", offset, name, v)
	if parts := propertyParts(offset, v); human && parts != "" {
		shown += " (" + parts + ")"
	}
	_, err := fmt.Fprintln(w, shown)
	return err
}
