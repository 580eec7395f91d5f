package output

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"strings"

	"ublk-nvmeof/nvme"
)

// kind is how a field of a structure of the specification is written.
type kind uint8

const (
	decimal     kind = iota
	hexadecimal      // in JSON decimal, as all numbers
	percent          // the same
	kelvins          // the same
	oui              // the same: six digits
	text             // up to a zero byte
	digits           // bytes in hexadecimal
	uuid
)

// place is where a structure has a field. Numbers are little-endian.
type place struct {
	name  string // nvme-cli's, in JSON
	at    int    // byte offset
	size  int    // in bytes, at most 16 for numbers
	kind  kind
	label string // of the text output, if it is not the name
}

// member is one value of an object.
type member struct {
	name  string
	value any
	label string // for people; empty: the value is for JSON only
	text  string // the value for people
}

// object is a JSON object that keeps the order of its members.
type object []member

// MarshalJSON implements json.Marshaler.
func (o object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		name, err := json.Marshal(m.name)
		if err != nil {
			return nil, err
		}
		value, err := json.Marshal(m.value)
		if err != nil {
			return nil, err
		}
		b.Write(name)
		b.WriteByte(':')
		b.Write(value)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// decode reads the fields of a structure. b must have all of them.
func decode(b []byte, places []place) object {
	var o object
	for _, p := range places {
		o = append(o, p.decode(b[p.at:p.at+p.size]))
	}
	return o
}

func (p place) decode(b []byte) member {
	m := member{name: p.name, label: p.label}
	if m.label == "" {
		m.label = p.name
	}
	switch p.kind {
	case text:
		s, _, _ := bytes.Cut(b, []byte{0})
		m.value, m.text = string(s), string(s)
		return m
	case digits:
		m.text = hex.EncodeToString(b)
		m.value = m.text
		return m
	case uuid:
		m.text = nvme.UUID(b).String()
		m.value = m.text
		return m
	}
	n := number(b)
	m.value = n
	switch p.kind {
	case hexadecimal:
		m.text = hexText(n.Bytes())
	case oui:
		m.text = fmt.Sprintf("%06x", n)
	case percent:
		m.text = n.String() + "%"
	case kelvins:
		m.text = temperature(n.Int64())
	default:
		m.text = n.String()
	}
	return m
}

// number reads a little-endian number.
func number(b []byte) *big.Int {
	big := new(big.Int)
	reversed := bytes.Clone(b)
	for i, c := range b {
		reversed[len(b)-1-i] = c
	}
	return big.SetBytes(reversed)
}

// hexText writes a big-endian number as C does, where 0 has no 0x.
func hexText(b []byte) string {
	n := new(big.Int).SetBytes(b)
	if n.Sign() == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", n)
}

// hexNumber is hexText of a number.
func hexNumber[T uint8 | uint16 | uint32](n T) string {
	return hexText([]byte{byte(uint32(n) >> 24), byte(uint32(n) >> 16), byte(uint32(n) >> 8), byte(n)})
}

func temperature(kelvin int64) string { return fmt.Sprintf("%d °C (%d K)", kelvin-273, kelvin) }

// writeText writes the members of an object for people, one in a line, with human each of
// their bits as well.
func (o object) writeText(w io.Writer, width int, human bool) error {
	for _, m := range o {
		if m.label == "" {
			continue
		}
		if _, err := fmt.Fprintf(w, "%-*s: %s\n", width, m.label, Text(m.text)); err != nil {
			return err
		}
		if !human {
			continue
		}
		if err := m.writeBits(w); err != nil {
			return err
		}
	}
	return nil
}

// Dump writes bytes for people, 16 in a line.
func Dump(w io.Writer, b []byte) error {
	for at := 0; at < len(b); at += 16 {
		line := b[at:min(at+16, len(b))]
		var shown strings.Builder
		for _, c := range line {
			if c < ' ' || c > '~' {
				c = '.'
			}
			shown.WriteByte(c)
		}
		if _, err := fmt.Fprintf(w, "%04x: %-47s  \"%s\"\n", at, fmt.Sprintf("% x", line), shown.String()); err != nil {
			return err
		}
	}
	return nil
}
