package nvme

// ReservationKeys is the size of the data of Reservation Register and Reservation Acquire in
// bytes: two keys. Those of Reservation Release are one key.
const ReservationKeys = 16

const (
	reservationIgnoreKey = 1 << 3
	reservationExtended  = 1 << 0
)

// SetReservationReport builds a Reservation Report of lengthBytes bytes, a multiple of 4 and
// not 0. With extended, host identifiers have 128 bits, as all of a fabric have.
func (c *Command) SetReservationReport(nsid, lengthBytes uint32, extended bool) {
	if lengthBytes == 0 || lengthBytes%4 != 0 {
		panic("nvme: length of a reservation report must be whole dwords")
	}
	dw11 := uint64(0)
	if extended {
		dw11 = reservationExtended
	}
	c.fill(OpReservationReport, nsid, uint64(lengthBytes/4-1)|dw11<<32, 0, 0)
}

// SetReservationRegister builds a Reservation Register with action rrega (0 register, 1
// unregister, 2 replace). ignoreKey disregards the current key, and cptpl changes whether
// reservations outlast a loss of power (0 no change, 2 no, 3 yes). The data are the current
// and the new key.
func (c *Command) SetReservationRegister(nsid uint32, rrega uint8, ignoreKey bool, cptpl uint8) {
	c.fill(OpReservationRegister, nsid, reservationAction(rrega, ignoreKey)|uint64(cptpl&3)<<30, 0, 0)
}

// SetReservationAcquire builds a Reservation Acquire with action racqa (0 acquire, 1 preempt,
// 2 preempt and abort) of a reservation of type rtype (1..6). The data are the current key and
// the one to preempt.
func (c *Command) SetReservationAcquire(nsid uint32, racqa uint8, ignoreKey bool, rtype uint8) {
	c.fill(OpReservationAcquire, nsid, reservationAction(racqa, ignoreKey)|uint64(rtype)<<8, 0, 0)
}

// SetReservationRelease builds a Reservation Release with action rrela (0 release, 1 clear) of
// a reservation of type rtype (1..6). The data are the current key.
func (c *Command) SetReservationRelease(nsid uint32, rrela uint8, ignoreKey bool, rtype uint8) {
	c.fill(OpReservationRelease, nsid, reservationAction(rrela, ignoreKey)|uint64(rtype)<<8, 0, 0)
}

func reservationAction(action uint8, ignoreKey bool) uint64 {
	w := uint64(action & 7)
	if ignoreKey {
		w |= reservationIgnoreKey
	}
	return w
}

// ReservationReportLength returns the bytes that a Reservation Report asks for.
func (c *Command) ReservationReportLength() uint64 { return (uint64(c.CDW10()) + 1) * 4 }

// PutReservationKeys writes keys, little-endian, as the data of a reservation command.
func PutReservationKeys(b []byte, keys ...uint64) {
	for i, k := range keys {
		le.PutUint64(b[8*i:], k)
	}
}
