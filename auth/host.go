package auth

import (
	"crypto/hmac"
	"errors"
	"fmt"
	"slices"
)

// HostConfig configures a Host. Fields are required unless their comment says otherwise.
type HostConfig struct {
	// HostNQN and SubNQN are the names in the Connect command.
	HostNQN, SubNQN string
	Key             *Key // of the host
	// ControllerKey is what the controller must prove to have; nil: nothing.
	ControllerKey *Key
	// Hashes and Groups are what the controller may choose from; nil: all. nvmet can only
	// use Null if a group beside it is offered as well.
	Hashes []Hash
	Groups []Group
	// Transaction identifies the run. It must differ from that of the last run of the same
	// controller.
	Transaction uint16
}

func (c *HostConfig) setDefaults() error {
	if c.Hashes == nil {
		c.Hashes = Hashes()
	}
	if c.Groups == nil {
		c.Groups = Groups()
	}
	switch {
	case c.HostNQN == "" || c.SubNQN == "":
		return errors.New("auth: the name of the host or of the subsystem is missing")
	case c.Key == nil:
		return errors.New("auth: there is no host key")
	case len(c.Hashes) == 0 || len(c.Hashes) > maxIDs || slices.ContainsFunc(c.Hashes, func(h Hash) bool { return h.Size() == 0 }):
		return fmt.Errorf("auth: hashes %v; want some of %v", c.Hashes, Hashes())
	case len(c.Groups) == 0 || len(c.Groups) > maxIDs || slices.ContainsFunc(c.Groups, func(g Group) bool { return !g.known() }):
		return fmt.Errorf("auth: groups %v; want some of %v", c.Groups, Groups())
	}
	return nil
}

// hostState is what a host waits for.
type hostState uint8

const (
	hostUnset    hostState = iota
	hostStart              // Negotiate
	hostAsked              // a Challenge
	hostReplied            // a Success1
	hostAdmitted           // nothing: it is authenticated
	hostFailed             // nothing: the run has failed
)

// Host is the host's side of one run. It is for one goroutine at a time.
type Host struct {
	cfg       HostConfig
	state     hostState
	run       run
	group     Group
	challenge []byte // C2
	sequence  uint32 // S2
}

// NewHost returns the host's side of a new run. The error says what is wrong with cfg.
func NewHost(cfg HostConfig) (*Host, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	return &Host{cfg: cfg, state: hostStart}, nil
}

// Negotiate returns the first message, which the host sends.
func (h *Host) Negotiate() []byte {
	h.state = hostAsked
	return offer{protocol: protocolCHAP, hashes: h.cfg.Hashes, groups: h.cfg.Groups}.encode(h.cfg.Transaction)
}

// Next takes the message that the controller gave for an Authentication Receive, which may
// have more bytes behind it. It returns the message to send, or nil if there is none. After
// an error, which is an *Error, the run has failed, and a message, if there is one, tells
// the controller.
func (h *Host) Next(msg []byte) ([]byte, error) {
	out, err := h.next(msg)
	if err == nil {
		return out, nil
	}
	h.state = hostFailed
	if err.By == HostSide {
		return encodeFailure(Failure2, h.cfg.Transaction, err.Reason), err
	}
	return nil, err
}

func (h *Host) next(msg []byte) ([]byte, *Error) {
	k, tid, err := kindOf(msg)
	switch {
	case err != nil:
		return nil, refuse(HostSide, IncorrectPayload, "%v", err)
	case k == Failure1:
		return nil, h.explain(decodeFailure(msg))
	case tid != h.cfg.Transaction:
		return nil, refuse(HostSide, IncorrectPayload, "%v of transaction %d, not %d", k, tid, h.cfg.Transaction)
	case h.state == hostAsked && k == Challenge:
		return h.reply(msg)
	case h.state == hostReplied && k == Success1:
		return h.verify(msg)
	}
	return nil, refuse(HostSide, IncorrectMessage, "%v", k)
}

// explain returns the error for the controller's reason.
func (h *Host) explain(r Reason) *Error {
	switch {
	case r == Failed && h.state == hostReplied && h.cfg.ControllerKey != nil:
		return refuse(ControllerSide, r, "it has another host key, or no controller key")
	case r == Failed && h.state == hostReplied:
		return refuse(ControllerSide, r, "it has another host key")
	}
	return &Error{By: ControllerSide, Reason: r}
}

// reply answers a Challenge.
func (h *Host) reply(msg []byte) ([]byte, *Error) {
	q, err := decodeQuestion(msg)
	switch {
	case err != nil:
		return nil, refuse(HostSide, IncorrectPayload, "%v", err)
	case !slices.Contains(h.cfg.Hashes, q.hash):
		return nil, refuse(HostSide, HashUnusable, "the controller chose %v, which was not offered", q.hash)
	case !slices.Contains(h.cfg.Groups, q.group):
		return nil, refuse(HostSide, GroupUnusable, "the controller chose %v, which was not offered", q.group)
	}
	own := newExchange(q.group)
	shared, err := own.shared(q.public)
	if err != nil {
		return nil, refuse(HostSide, IncorrectPayload, "%v", err)
	}
	h.run, h.group = newRun(q.hash, h.cfg.Transaction, shared), q.group
	h.challenge, h.sequence = newChallenge(q.hash.Size())
	a := answer{
		response:  h.run.response(h.cfg.Key.Bound(h.cfg.HostNQN), q.challenge, q.sequence, hostRole, h.cfg.HostNQN, h.cfg.SubNQN),
		challenge: h.challenge, asks: h.cfg.ControllerKey != nil,
		sequence: h.sequence, // never 0: old versions of nvmet check it also if nothing is asked
		public:   own.public,
	}
	if !a.asks {
		a.challenge = make([]byte, q.hash.Size())
	}
	h.state = hostReplied
	return a.encode(h.cfg.Transaction), nil
}

// verify checks the controller's proof.
func (h *Host) verify(msg []byte) ([]byte, *Error) {
	if h.cfg.ControllerKey == nil {
		h.state = hostAdmitted
		return nil, nil
	}
	p, err := decodeProof(msg, h.run.hash.Size())
	switch {
	case err != nil:
		return nil, refuse(HostSide, IncorrectPayload, "%v", err)
	case !p.valid:
		return nil, refuse(HostSide, Failed, "the controller does not prove that it has the controller key")
	}
	want := h.run.response(h.cfg.ControllerKey.Bound(h.cfg.SubNQN), h.challenge, h.sequence, controllerRole, h.cfg.SubNQN, h.cfg.HostNQN)
	if !hmac.Equal(want, p.response) {
		return nil, refuse(HostSide, Failed, "the controller has another controller key")
	}
	h.state = hostAdmitted
	return encodeSuccess2(h.cfg.Transaction), nil
}

// Authenticated reports whether the controller has admitted the host and, if there is a
// controller key, has proved to have it.
func (h *Host) Authenticated() bool { return h.state == hostAdmitted }

// Replied reports whether the host has answered the challenge, and the controller has not
// said yet what it thinks of it. A connection that is lost then is most likely the answer.
func (h *Host) Replied() bool { return h.state == hostReplied }

// Method returns the hash and the group that the controller chose.
func (h *Host) Method() (Hash, Group) { return h.run.hash, h.group }
