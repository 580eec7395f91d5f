package auth

import (
	"crypto/rand"
	"slices"
)

// The roles in a response.
const (
	hostRole       = "HostHost"
	controllerRole = "Controller"
)

// run is what both sides know after the exchange.
type run struct {
	hash    Hash
	tid     uint16
	session []byte // Ks; nil with the group Null
}

// newRun returns the run for a shared value.
func newRun(h Hash, tid uint16, shared []byte) run {
	r := run{hash: h, tid: tid}
	if shared != nil {
		r.session = h.sum(shared)
	}
	return r
}

// response returns the response to a challenge. key is bound to a name. from is the one who
// responds, and to the one who asked.
func (r run) response(key, challenge []byte, sequence uint32, role, from, to string) []byte {
	if r.session != nil {
		challenge = r.hash.mac(r.session, challenge)
	}
	var fixed []byte
	fixed = le.AppendUint32(fixed, sequence)
	fixed = le.AppendUint16(fixed, r.tid)
	fixed = append(fixed, 0) // SC_C
	return r.hash.mac(key, challenge, fixed, []byte(role), []byte(from), []byte{0}, []byte(to))
}

// newChallenge returns n random bytes and a sequence number, which is not 0, because that
// means that there is none.
func newChallenge(n int) (challenge []byte, sequence uint32) {
	b := make([]byte, n+4)
	rand.Read(b) // never fails
	return b[:n], max(le.Uint32(b[n:]), 1)
}

// first returns the first of the wanted ids that is offered.
func first[T comparable](wanted, offered []T) (T, bool) {
	for _, w := range wanted {
		if slices.Contains(offered, w) {
			return w, true
		}
	}
	return *new(T), false
}
