package target

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"ublk-nvmeof/nvme"
)

// reserver is an I/O queue of one of several hosts.
type reserver struct {
	*hostQueue
	host nvme.UUID
}

// reservers connects hosts 1, 2, … to a target.
func reservers(t *testing.T, n int) []*reserver {
	t.Helper()
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	var all []*reserver
	for i := range n {
		r.hostID = nvme.UUID{byte(i + 1)}
		a := r.admin(testNQN)
		all = append(all, &reserver{r.io(a, 1, 32), r.hostID})
	}
	return all
}

// send sends a command with keys.
func (h *reserver) send(want nvme.Status, cmd *nvme.Command, keys ...uint64) {
	h.t.Helper()
	nvme.PutReservationKeys(h.data.Bytes(), keys...)
	h.want(want, h.keyed(cmd, 8*len(keys)))
}

func (h *reserver) register(want nvme.Status, rrega uint8, current, next uint64) {
	h.t.Helper()
	var cmd nvme.Command
	cmd.SetReservationRegister(1, rrega, false, 0)
	h.send(want, &cmd, current, next)
}

func (h *reserver) acquire(want nvme.Status, racqa, kind uint8, current, preempted uint64) {
	h.t.Helper()
	var cmd nvme.Command
	cmd.SetReservationAcquire(1, racqa, false, kind)
	h.send(want, &cmd, current, preempted)
}

func (h *reserver) release(want nvme.Status, rrela, kind uint8, current uint64) {
	h.t.Helper()
	var cmd nvme.Command
	cmd.SetReservationRelease(1, rrela, false, kind)
	h.send(want, &cmd, current)
}

// may checks what the host may do with the namespace.
func (h *reserver) may(what string, read, write bool) {
	h.t.Helper()
	status := func(allowed bool) nvme.Status {
		if allowed {
			return nvme.StatusSuccess
		}
		return conflict
	}
	var cmd nvme.Command
	for _, c := range []struct {
		set     func()
		n       int
		allowed bool
	}{
		{func() { cmd.SetRead(1, 0, 1, false) }, 512, read},
		{func() { cmd.SetWrite(1, 0, 1, false) }, 512, write},
		{func() { cmd.SetWriteZeroes(1, 0, 1, false, false) }, 0, write},
		{func() { cmd.SetFlush(1) }, 0, write},
		{func() { cmd.SetDSM(1, 1); clear(h.data.Bytes()[:16]); h.data.Bytes()[4] = 1 }, 16, write},
	} {
		c.set()
		if c.n > 0 {
			h.keyed(&cmd, c.n)
		}
		if got := h.do(&cmd, nil).Status(); got != status(c.allowed) {
			h.t.Errorf("%s: host %d, %v: %v", what, h.host[0], &cmd, got)
		}
	}
}

// report returns generation, type, and the keys of the registrants; those that hold the
// reservation are negative.
func (h *reserver) report() (generation uint32, kind uint8, keys []int64) {
	h.t.Helper()
	var cmd nvme.Command
	cmd.SetReservationReport(1, 4096, true)
	h.want(0, h.keyed(&cmd, 4096))
	b := h.data.Bytes()
	for i := range int(binary.LittleEndian.Uint16(b[5:])) {
		d := b[64*(i+1):]
		key := int64(binary.LittleEndian.Uint64(d[8:]))
		if d[2] == 1 {
			key = -key
		}
		keys = append(keys, key)
	}
	return binary.LittleEndian.Uint32(b), b[4], keys
}

func (h *reserver) reports(kind uint8, keys ...int64) {
	h.t.Helper()
	_, k, got := h.report()
	if k != kind || len(got) != len(keys) {
		h.t.Fatalf("type %d, keys %v, want %d, %v", k, got, kind, keys)
	}
	for i := range keys {
		if got[i] != keys[i] {
			h.t.Fatalf("type %d, keys %v, want %d, %v", k, got, kind, keys)
		}
	}
}

const (
	conflict = nvme.StatusReservationConflict | dnr
	invalid  = nvme.StatusInvalidField | dnr
)

// TestReservationAccess: who may do what under each type. Host 1 holds the reservation, host
// 2 is registered, host 3 is not.
func TestReservationAccess(t *testing.T) {
	h := reservers(t, 3)
	for kind, other := range map[uint8]struct{ registrantReads, registrantWrites, strangerReads bool }{
		writeExclusive:            {true, false, true},
		exclusiveAccess:           {false, false, false},
		writeExclusiveRegistrants: {true, true, true},
		exclusiveRegistrants:      {true, true, false},
		writeExclusiveAll:         {true, true, true},
		exclusiveAll:              {true, true, false},
	} {
		h[0].register(0, 0, 0, 11)
		h[1].register(0, 0, 0, 22)
		h[0].acquire(0, 0, kind, 11, 0)
		name := fmt.Sprintf("type %d", kind)
		h[0].may(name, true, true)
		h[1].may(name, other.registrantReads, other.registrantWrites)
		h[2].may(name, other.strangerReads, false)
		if kind == writeExclusiveAll || kind == exclusiveAll {
			h[2].reports(kind, -11, -22)
		} else {
			h[2].reports(kind, -11, 22)
		}
		h[0].release(0, 0, kind, 11)
		h[2].may("released", true, true)
		h[0].release(0, 1, 0, 11) // clear
		h[2].reports(0)
	}
}

// TestReservationKeys: what hosts without the right key cannot do, and how holders lose the
// reservation.
func TestReservationKeys(t *testing.T) {
	h := reservers(t, 3)
	h[0].acquire(conflict, 0, writeExclusive, 0, 0) // not registered
	h[0].register(conflict, 2, 0, 5)
	h[0].register(0, 0, 0, 11)
	h[0].register(0, 0, 0, 11)        // again
	h[0].register(conflict, 0, 0, 12) // with another key
	h[0].register(conflict, 2, 99, 12)
	h[0].register(0, 2, 11, 12)
	h[0].acquire(conflict, 0, writeExclusive, 11, 0)
	h[0].acquire(invalid, 0, 0, 12, 0)
	h[0].acquire(invalid, 0, 7, 12, 0)
	h[0].acquire(invalid, 3, 1, 12, 0)
	h[0].acquire(0, 0, writeExclusive, 12, 0)
	h[0].acquire(0, 0, writeExclusive, 12, 0) // again
	h[0].acquire(conflict, 0, exclusiveAccess, 12, 0)
	h[1].register(0, 0, 0, 22)
	h[1].acquire(conflict, 0, writeExclusive, 22, 0)
	h[1].release(0, 0, writeExclusive, 22) // has no effect
	h[1].reports(writeExclusive, -12, 22)
	h[0].release(invalid, 0, exclusiveAccess, 12)
	h[0].release(invalid, 2, writeExclusive, 12)
	h[0].release(conflict, 0, writeExclusive, 11)

	h[1].acquire(conflict, preempt, writeExclusive, 22, 99) // nobody has it
	h[1].acquire(invalid, preempt, writeExclusive, 22, 0)
	h[1].acquire(invalid, preempt, 0, 22, 12)
	before, _, _ := h[2].report()
	h[1].acquire(0, preemptAndAbort, exclusiveAccess, 22, 12)
	if after, _, _ := h[2].report(); after != before+1 {
		t.Errorf("generation %d after %d", after, before)
	}
	h[1].reports(exclusiveAccess, -22)
	h[0].may("preempted", false, false)
	h[0].register(0, 0, 0, 11)
	h[1].acquire(0, preempt, 0, 22, 11) // of a registrant, not of the holder
	h[1].reports(exclusiveAccess, -22)
	h[1].register(0, 1, 22, 0) // unregister
	h[1].reports(0)
	h[0].may("the holder left", true, true)

	// All registrants hold it, until the last one leaves.
	h[0].register(0, 0, 0, 11)
	h[1].register(0, 0, 0, 22)
	h[0].acquire(0, 0, exclusiveAll, 11, 0)
	h[0].register(0, 1, 11, 0)
	h[1].reports(exclusiveAll, -22)
	h[2].register(0, 0, 0, 33)
	h[2].acquire(0, preempt, writeExclusive, 33, 0) // of everybody
	h[2].reports(writeExclusive, -33)
	h[2].register(0, 1, 33, 0)
	h[2].reports(0)

	var cmd nvme.Command
	cmd.SetReservationReport(1, 4096, false)
	h[0].want(nvme.StatusHostIDInconsistent|dnr, h[0].keyed(&cmd, 4096))
	cmd.SetReservationRegister(1, 0, false, persistPower)
	h[0].send(invalid, &cmd, 0, 5)
	cmd.SetReservationRegister(1, 0, false, 0)
	h[0].want(nvme.StatusInvalidSGLDataLength|dnr, h[0].keyed(&cmd, 8))
	cmd.SetReservationRegister(1, 2, true, 0) // any current key
	h[0].register(0, 0, 0, 11)
	h[0].send(0, &cmd, 0, 77)
	h[0].reports(0, 77)
}

// TestReservationOutlivesConnection: registrations are of a host, not of a connection.
func TestReservationOutlivesConnection(t *testing.T) {
	r, _, _ := newDisk(t, Config{}, 1<<20, NamespaceConfig{})
	r.hostID = nvme.UUID{1}
	a := r.admin(testNQN)
	one := &reserver{r.io(a, 1, 32), r.hostID}
	one.register(0, 0, 0, 11)
	one.acquire(0, 0, writeExclusive, 11, 0)
	one.close()
	a.close()
	r.hostID = nvme.UUID{2}
	two := &reserver{r.io(r.admin(testNQN), 1, 32), r.hostID}
	two.may("while the holder is away", true, false)
	two.reports(writeExclusive, -11)
	r.hostID = nvme.UUID{1}
	again := &reserver{r.io(r.admin(testNQN), 1, 32), r.hostID}
	again.may("back", true, true)
}

// TestPreemptAndAbortWaits: when a host is told that it has taken a namespace from another
// one, no write of that host is inside the store any more, and none gets in.
func TestPreemptAndAbortWaits(t *testing.T) {
	r, g, admin, io := heldWrite(t)
	victim := &reserver{r.io(admin, 2, 32), r.hostID}
	victim.register(0, 0, 0, 11)
	victim.acquire(0, 0, writeExclusive, 11, 0)
	r.hostID = nvme.UUID{2}
	h := &reserver{r.io(r.admin(testNQN), 1, 32), r.hostID}
	h.register(0, 0, 0, 22)
	var cmd nvme.Command
	cmd.SetReservationAcquire(1, preemptAndAbort, false, exclusiveAccess)
	nvme.PutReservationKeys(h.data.Bytes(), 22, 11)
	h.hostQueue.send(h.keyed(&cmd, nvme.ReservationKeys), nil)
	answered, alive := make(chan struct{}), false
	go func() {
		alive = h.await()
		close(answered)
	}()
	for {
		if _, kind, _ := victim.report(); kind == exclusiveAccess { // the other host has it
			break
		}
	}
	select {
	case <-answered:
		t.Error("the host was answered while a write of the other host was in the store")
	case <-time.After(50 * time.Millisecond): // it would be answered within one
	}
	g.open()
	if <-answered; !alive || !h.response.Status().OK() {
		t.Errorf("preempt and abort: %v", h.response.Status())
	}
	if !io.await() || !io.response.Status().OK() {
		t.Errorf("the write: %v", io.response.Status())
	}
	cmd.SetWrite(1, 0, 8, false)
	cmd.SetInCapsuleSGL(0, 4096)
	io.want(conflict, &cmd, make([]byte, 4096)...)
}
