package output

import (
	"encoding/hex"
	"fmt"
	"io"
)

// reservationPlaces are the fields of a reservation report before its registrants (Base,
// "Reservation Status data structure").
var reservationPlaces = []place{
	{name: "gen", at: 0, size: 4},
	{name: "rtype", at: 4, size: 1},
	{name: "regctl", at: 5, size: 2},
	{name: "ptpls", at: 9, size: 1},
}

// Sizes of the header and of a registrant of a reservation report, in bytes.
const (
	ReservationSize         = 24
	ExtendedReservationSize = 64
)

// Reservations writes a reservation report, which has at least a header. Registrants that
// were cut off are left out.
func Reservations(w io.Writer, report []byte, extended bool, format string) error {
	o := decode(report, reservationPlaces)
	size, name := ReservationSize, "regctls"
	if extended {
		size, name = ExtendedReservationSize, "regctlext"
	}
	registrants := []object{}
	for i := range min(int(le.Uint16(report[5:])), len(report)/size-1) {
		registrants = append(registrants, registrant(report[(i+1)*size:][:size], extended))
	}
	if format == JSON {
		return writeJSON(w, append(o, member{name: name, value: registrants}))
	}
	fmt.Fprintf(w, "\nNVME Reservation status:\n\n")
	if err := o.writeText(w, 10, false); err != nil {
		return err
	}
	for i, r := range registrants {
		fmt.Fprintf(w, "%s[%d] :\n", name[:len(name)-bit(!extended)], i)
		for _, m := range r {
			if _, err := fmt.Fprintf(w, "  %-10s: %s\n", m.name, m.text); err != nil {
				return err
			}
		}
	}
	_, err := fmt.Fprintln(w)
	return err
}

// registrant decodes a registrant. The extended form has a host identifier of 128 bits.
func registrant(b []byte, extended bool) object {
	hexed := func(name string, v uint64) member { return member{name: name, value: v, text: fmt.Sprintf("%x", v)} }
	o := object{hexed("cntlid", uint64(le.Uint16(b))), hexed("rcsts", uint64(b[2]))}
	if !extended {
		return append(o, hexed("hostid", le.Uint64(b[8:])), hexed("rkey", le.Uint64(b[16:])))
	}
	id := hex.EncodeToString(b[16:32])
	return append(o, hexed("rkey", le.Uint64(b[8:])), member{name: "hostid", value: id, text: id})
}
