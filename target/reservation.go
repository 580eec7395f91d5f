package target

import (
	"encoding/binary"
	"slices"
	"sync"
	"sync/atomic"

	"ublk-nvmeof/nvme"
)

// Types of reservations (Base, "Reservations").
const (
	writeExclusive            = 1
	exclusiveAccess           = 2
	writeExclusiveRegistrants = 3
	exclusiveRegistrants      = 4
	writeExclusiveAll         = 5
	exclusiveAll              = 6
)

const (
	// reservationTypes is RESCAP: all types, and none persists through a loss of power.
	reservationTypes = 0x7E
	// persistPower is the value of CPTPL that asks for the opposite.
	persistPower = 3
	// maxRegistrants bounds the memory that hosts can take. A report has room for no more.
	maxRegistrants = (nvme.IdentifySize - registrantSize) / registrantSize
	registrantSize = 64

	preempt         = 1 // actions of Reservation Acquire
	preemptAndAbort = 2
)

// registrant is a host that is registered with a namespace.
type registrant struct {
	host nvme.UUID
	key  uint64
}

// reservations are the registrants of a namespace and its reservation. Hosts keep both when
// they disconnect.
type reservations struct {
	// current is the reservation, as commands look at it; nil: none.
	current atomic.Pointer[reservation]

	mu          sync.Mutex // guards what follows, and changes of current
	registrants []registrant
	generation  uint32
}

// reservation says who may access a namespace. It does not change.
type reservation struct {
	kind   uint8
	holder nvme.UUID
	// registrants may access the namespace as well, if the kind says so.
	registrants []registrant
}

// all reports whether every registrant holds the reservation.
func (r *reservation) all() bool { return r.kind == writeExclusiveAll || r.kind == exclusiveAll }

// heldBy reports whether a host holds the reservation.
func (r *reservation) heldBy(host nvme.UUID) bool {
	return r.holder == host || r.all() && registered(r.registrants, host) >= 0
}

// conflicts reports whether a host must not carry out an I/O command.
func (r *reservation) conflicts(host nvme.UUID, op nvme.Opcode) bool {
	reads := op == nvme.OpRead || op == nvme.OpCompare
	switch r.kind {
	case writeExclusive, exclusiveAccess:
		return host != r.holder && !(reads && r.kind == writeExclusive)
	}
	return registered(r.registrants, host) < 0 && !(reads && (r.kind == writeExclusiveRegistrants || r.kind == writeExclusiveAll))
}

func registered(all []registrant, host nvme.UUID) int {
	return slices.IndexFunc(all, func(r registrant) bool { return r.host == host })
}

// isReservation reports whether a command is about reservations.
func isReservation(op nvme.Opcode) bool {
	switch op {
	case nvme.OpReservationReport, nvme.OpReservationRegister, nvme.OpReservationAcquire, nvme.OpReservationRelease:
		return true
	}
	return false
}

// reservationLength is how many bytes of data a reservation command has.
func reservationLength(cmd *nvme.Command) uint64 {
	switch cmd.Opcode() {
	case nvme.OpReservationReport:
		return cmd.ReservationReportLength()
	case nvme.OpReservationRelease:
		return nvme.ReservationKeys / 2
	}
	return nvme.ReservationKeys
}

// report answers a Reservation Report.
func (q *queuePair) report(i int) {
	cmd := q.command(i)
	if cmd.CDW11()&1 == 0 { // host identifiers have 128 bits here
		q.respond(i, 0, nvme.StatusHostIDInconsistent|dnr)
		return
	}
	q.reply(i, q.reqs[i].ns.reservations.report(), cmd.ReservationReportLength())
}

// reserve carries out a reservation command whose keys have arrived. After a preempt and
// abort no command of a preempted host is in execution any more.
func (q *queuePair) reserve(i int) nvme.Status {
	cmd := q.command(i)
	s := q.reqs[i].ns.reservations.change(cmd, q.arrived(i), q.ctrl.hostID)
	if s.OK() && cmd.Opcode() == nvme.OpReservationAcquire && cmd.CDW10()&7 == preemptAndAbort && q.target.drained(q.ctx) != nil {
		return nvme.StatusAbortedSQDeletion
	}
	return s
}

// change carries out a command of a host.
func (rs *reservations) change(cmd *nvme.Command, data []byte, host nvme.UUID) nvme.Status {
	action, ignore, kind := uint8(cmd.CDW10()&7), cmd.CDW10()&8 != 0, uint8(cmd.CDW10()>>8)
	key, other := binary.LittleEndian.Uint64(data), uint64(0)
	if cmd.Opcode() != nvme.OpReservationRelease {
		other = binary.LittleEndian.Uint64(data[8:])
	}
	rs.mu.Lock()
	defer rs.mu.Unlock()
	switch op := cmd.Opcode(); {
	case op == nvme.OpReservationRegister && cmd.CDW10()>>30 == persistPower:
		return nvme.StatusInvalidField | dnr
	case op == nvme.OpReservationRegister:
		return rs.register(host, action, ignore, key, other)
	case !rs.knows(host, ignore, key):
		return nvme.StatusReservationConflict | dnr
	case op == nvme.OpReservationAcquire:
		return rs.acquire(host, action, kind, other)
	}
	return rs.release(host, action, kind)
}

// knows reports whether a host is registered, with this key. The caller holds mu, as for what
// follows.
func (rs *reservations) knows(host nvme.UUID, ignoreKey bool, key uint64) bool {
	i := registered(rs.registrants, host)
	return i >= 0 && (ignoreKey || rs.registrants[i].key == key)
}

// publish lets commands see a reservation, with the present registrants.
func (rs *reservations) publish(kind uint8, holder nvme.UUID) {
	if kind == 0 {
		rs.current.Store(nil)
		return
	}
	rs.current.Store(&reservation{kind: kind, holder: holder, registrants: slices.Clone(rs.registrants)})
}

func (rs *reservations) register(host nvme.UUID, action uint8, ignoreKey bool, key, newKey uint64) nvme.Status {
	i := registered(rs.registrants, host)
	switch {
	case action == 0 && i >= 0 && rs.registrants[i].key != newKey, action == 0 && newKey == 0,
		action > 0 && !rs.knows(host, ignoreKey, key):
		return nvme.StatusReservationConflict | dnr
	case action == 0 && i >= 0: // again
	case action == 0 && len(rs.registrants) >= maxRegistrants:
		return nvme.StatusReservationConflict | dnr
	case action == 0:
		rs.registrants = append(rs.registrants, registrant{host, newKey})
	case action == 1:
		rs.unregister(func(r registrant) bool { return r.host == host })
	case action == 2:
		rs.registrants[i].key = newKey
	default:
		return nvme.StatusInvalidField | dnr
	}
	rs.generation++
	if r := rs.current.Load(); r != nil {
		rs.publish(r.kind, r.holder)
	}
	return nvme.StatusSuccess
}

// unregister removes registrants, and the reservation if nobody holds it any more.
func (rs *reservations) unregister(gone func(registrant) bool) {
	r := rs.current.Load()
	rs.registrants = slices.DeleteFunc(rs.registrants, gone)
	switch {
	case r == nil:
	case r.all() && len(rs.registrants) > 0:
		rs.publish(r.kind, rs.registrants[0].host)
	case r.all(), registered(rs.registrants, r.holder) < 0:
		rs.publish(0, nvme.UUID{})
	default:
		rs.publish(r.kind, r.holder)
	}
}

func (rs *reservations) acquire(host nvme.UUID, action, kind uint8, preempted uint64) nvme.Status {
	if kind > exclusiveAll || kind == 0 && action == 0 {
		return nvme.StatusInvalidField | dnr
	}
	r := rs.current.Load()
	switch action {
	case 0:
		if r != nil && !(r.heldBy(host) && r.kind == kind) {
			return nvme.StatusReservationConflict | dnr
		}
		if r == nil {
			rs.publish(kind, host)
		}
		return nvme.StatusSuccess
	case preempt, preemptAndAbort:
		return rs.preempt(host, kind, preempted, r)
	}
	return nvme.StatusInvalidField | dnr
}

// preempt removes the registrants with a key, and takes the reservation from its holder if
// that is one of them.
func (rs *reservations) preempt(host nvme.UUID, kind uint8, key uint64, r *reservation) nvme.Status {
	everybody := r != nil && r.all() && key == 0
	taken := everybody
	if r != nil && !r.all() {
		i := registered(rs.registrants, r.holder)
		taken = i >= 0 && rs.registrants[i].key == key
	}
	known := slices.ContainsFunc(rs.registrants, func(r registrant) bool { return r.key == key })
	switch {
	case key == 0 && !everybody:
		return nvme.StatusInvalidField | dnr
	case !known && !everybody:
		return nvme.StatusReservationConflict | dnr
	case taken && kind == 0:
		return nvme.StatusInvalidField | dnr
	}
	rs.unregister(func(r registrant) bool { return r.host != host && (everybody || r.key == key) })
	if taken {
		rs.publish(kind, host)
	}
	rs.generation++
	return nvme.StatusSuccess
}

func (rs *reservations) release(host nvme.UUID, action, kind uint8) nvme.Status {
	r := rs.current.Load()
	switch action {
	case 0:
		switch {
		case r == nil, !r.heldBy(host): // nothing to release
		case r.kind != kind:
			return nvme.StatusInvalidField | dnr
		default:
			rs.publish(0, nvme.UUID{})
		}
		return nvme.StatusSuccess
	case 1:
		rs.registrants = nil
		rs.publish(0, nvme.UUID{})
		rs.generation++
		return nvme.StatusSuccess
	}
	return nvme.StatusInvalidField | dnr
}

// report is the extended Reservation Status data structure.
func (rs *reservations) report() []byte {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	b := make([]byte, registrantSize*(1+len(rs.registrants)))
	r := rs.current.Load()
	binary.LittleEndian.PutUint32(b, rs.generation)
	if r != nil {
		b[4] = r.kind
	}
	binary.LittleEndian.PutUint16(b[5:], uint16(len(rs.registrants)))
	for i, reg := range rs.registrants {
		d := b[registrantSize*(1+i):]
		binary.LittleEndian.PutUint16(d, nvme.CNTLIDDynamic) // which controllers a host has changes
		if r != nil && r.heldBy(reg.host) {
			d[2] = 1
		}
		binary.LittleEndian.PutUint64(d[8:], reg.key)
		copy(d[16:], reg.host[:])
	}
	return b
}
