package target

import (
	"fmt"
	"maps"
	"time"

	"ublk-nvmeof/auth"
	"ublk-nvmeof/nvme"
)

// Limits of an authentication, as in SPDK's target and in nvmet.
const (
	// authTimeout is the time that a host has to authenticate a queue if it has no keep
	// alive timeout, which is the limit otherwise.
	authTimeout = 120 * time.Second
	// failureDelay is the time that a host has to read why it is refused.
	failureDelay = 100 * time.Millisecond
)

// HostAuth says how a host must authenticate (DH-HMAC-CHAP).
type HostAuth struct {
	Key           *auth.Key    // of the host; required
	ControllerKey *auth.Key    // what controllers prove to hosts that ask; nil: such hosts are refused
	Hashes        []auth.Hash  // that may be used, the best first; nil: all, the strongest first
	Groups        []auth.Group // the same for groups
	AdminOnly     bool         // ask on the admin queue only, like nvmet, and not on every queue, like SPDK
}

// SetHostAuth makes a host authenticate whenever it connects a queue, or ends that if a is
// nil. A host that must authenticate may use the subsystem. Queues that are connected stay
// connected; a new key counts when their host authenticates again.
func (s *Subsystem) SetHostAuth(nqn string, a *HostAuth) error {
	if err := nvme.ValidateNQN(nqn); err != nil {
		return fmt.Errorf("subsystem: host %q: %w", nqn, err)
	}
	if a != nil && a.Key == nil {
		return fmt.Errorf("subsystem: host %q: no host key", nqn)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	next := maps.Clone(s.hostAuth)
	if next == nil {
		next = map[string]*HostAuth{}
	}
	if delete(next, nqn); a != nil {
		own := *a
		next[nqn] = &own
	}
	s.hostAuth = next
	return nil
}

// authOf returns how a host must authenticate, or nil.
func (s *Subsystem) authOf(nqn string) *HostAuth {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hostAuth[nqn]
}

// requireAuth reports whether the queue, which has joined its controller, must be
// authenticated before its host may use it. It limits the time for that.
func (q *queuePair) requireAuth() bool {
	a := q.ctrl.subsystem.authOf(q.ctrl.hostNQN)
	if a == nil || a.AdminOnly && q.qid != 0 {
		return false
	}
	q.ctrl.mu.Lock()
	limit := q.ctrl.kato
	q.ctrl.mu.Unlock()
	if limit == 0 {
		limit = authTimeout
	}
	q.unproved.Store(true)
	q.authTimer = time.AfterFunc(limit, q.authExpired) // run stops it
	return true
}

// authExpired ends the queue if it is not authenticated.
func (q *queuePair) authExpired() {
	q.sitOutFreeze()
	if q.unproved.Load() {
		q.authFailed("the host did not authenticate in time", "")
	}
}

// authFailed reports a failed authentication, and ends the queue unless an earlier one
// was successful. There must be few different reasons.
func (q *queuePair) authFailed(reason, detail string) {
	q.reportAuth(reason, detail)
	if q.unproved.Load() {
		time.AfterFunc(failureDelay, func() { q.kill("authentication failed") })
	}
}

// authEndedEarly reports that the connection has ended before the host was authenticated,
// unless that is known.
func (q *queuePair) authEndedEarly(why error) {
	if q.unproved.Load() && !q.authReported.Load() {
		q.reportAuth("the connection ended in the middle", fmt.Sprintf("%v was due: %v", q.authDue(), why))
	}
}

func (q *queuePair) reportAuth(reason, detail string) {
	q.authReported.Store(true)
	q.target.refused("authentication: " + reason)
	q.target.log.Warn("authentication failed", "reason", reason, "detail", detail, "qid", q.qid,
		"address", q.id.RemoteAddr(), "host", q.ctrl.hostNQN, "controller", q.ctrl.id)
}

// isAuth reports whether a Fabrics command is one of authentication.
func isAuth(cmd *nvme.Command) bool {
	t := cmd.FCType()
	return cmd.Opcode() == nvme.OpFabrics && (t == nvme.FabricsAuthSend || t == nvme.FabricsAuthReceive)
}

// authenticate begins an Authentication Send or carries out a Receive.
func (q *queuePair) authenticate(i int) {
	cmd := q.command(i)
	length, ok := cmd.AuthLength()
	switch a := q.ctrl.subsystem.authOf(q.ctrl.hostNQN); {
	case a == nil && q.proving == nil:
		q.respond(i, 0, nvme.StatusInvalidOpcode|dnr)
	case !ok || length == 0 || length > auth.MaxMessage:
		q.respond(i, 0, nvme.StatusInvalidField|dnr)
	case length != q.reqs[i].length:
		q.respond(i, 0, nvme.StatusInvalidSGLDataLength|dnr)
	case cmd.FCType() == nvme.FabricsAuthSend:
		q.fetch(i, length)
	default:
		q.giveAuth(i, int(length))
	}
}

// authRun returns the run in progress, or a new one with the present keys, or nil if the
// host has no keys any more.
func (q *queuePair) authRun(begins bool) *auth.Controller {
	if q.proving != nil && !(begins && q.proving.Finished()) {
		return q.proving
	}
	a := q.ctrl.subsystem.authOf(q.ctrl.hostNQN)
	if a == nil {
		return q.proving
	}
	q.proving = auth.NewController(auth.ControllerConfig{
		HostNQN: q.ctrl.hostNQN, SubNQN: q.ctrl.subNQN,
		Key: a.Key, ControllerKey: a.ControllerKey, Hashes: a.Hashes, Groups: a.Groups,
	})
	return q.proving
}

// authDue returns the message that an authentication command is for.
func (q *queuePair) authDue() auth.Kind {
	if q.proving == nil {
		return auth.Negotiate
	}
	return q.proving.Due()
}

// takeAuth takes the message of an Authentication Send, which has arrived.
func (q *queuePair) takeAuth(i int) {
	msg := q.arrived(i)[:q.reqs[i].length]
	run := q.authRun(auth.Begins(msg))
	if run == nil {
		q.respond(i, 0, nvme.StatusInvalidOpcode|dnr)
		return
	}
	run.Take(msg)
	q.respond(i, 0, nvme.StatusSuccess)
	q.authEnded()
}

// giveAuth completes an Authentication Receive with room for n bytes.
func (q *queuePair) giveAuth(i, n int) {
	run := q.authRun(false)
	if run == nil {
		q.respond(i, 0, nvme.StatusInvalidOpcode|dnr)
		return
	}
	msg := run.Give()
	if len(msg) > n {
		q.respond(i, 0, nvme.StatusInvalidField|dnr)
		return
	}
	q.reply(i, msg, uint64(n))
	q.authEnded()
}

// authEnded acts on the end of a run.
func (q *queuePair) authEnded() {
	run := q.proving
	switch {
	case !run.Finished():
	case !run.Authenticated():
		err := run.Err()
		q.authFailed(fmt.Sprintf("the %v refuses: %v", err.By, err.Reason), err.Detail)
	default:
		hash, group := run.Method()
		q.unproved.Store(false)
		q.target.log.Debug("host authenticated", "qid", q.qid, "controller", q.ctrl.id, "host", q.ctrl.hostNQN,
			"hash", hash.String(), "group", group.String())
	}
}
