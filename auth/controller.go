package auth

import (
	"crypto/hmac"
	"slices"
)

// ControllerConfig configures a Controller. Fields are required unless their comment says
// otherwise.
type ControllerConfig struct {
	// HostNQN and SubNQN are the names in the Connect command.
	HostNQN, SubNQN string
	Key             *Key // of the host
	// ControllerKey is what the controller proves to hosts that ask; nil: such hosts are
	// refused.
	ControllerKey *Key
	// Hashes and Groups may be used, the best first; nil: all, the strongest first.
	Hashes []Hash
	Groups []Group
}

func (c *ControllerConfig) setDefaults() {
	if c.Hashes == nil {
		c.Hashes = Hashes()
		slices.Reverse(c.Hashes)
	}
	if c.Groups == nil {
		c.Groups = Groups()
		slices.Reverse(c.Groups)
	}
}

// controllerState is what a controller waits for.
type controllerState uint8

const (
	controllerUnset    controllerState = iota
	controllerStart                    // a Negotiate
	controllerChosen                   // to be asked for the Challenge
	controllerAsked                    // a Reply
	controllerChecked                  // to be asked for the Success1
	controllerProved                   // a Success2
	controllerAdmits                   // nothing: the host is authenticated
	controllerRefuses                  // to be asked for the Failure1
	controllerFinished                 // nothing: the run has failed
)

// Controller is the controller's side of one run. It is for one goroutine at a time.
type Controller struct {
	cfg   ControllerConfig
	state controllerState
	err   *Error

	tid       uint16
	hash      Hash
	own       *exchange
	challenge []byte // C1
	sequence  uint32 // S1
	proof     proof
}

// NewController returns the controller's side of a new run. cfg.Key must not be nil.
func NewController(cfg ControllerConfig) *Controller {
	cfg.setDefaults()
	return &Controller{cfg: cfg, state: controllerStart}
}

// Take takes a message of the host. What is wrong with it is what Give returns next.
func (c *Controller) Take(msg []byte) {
	if err := c.take(msg); err != nil {
		c.err = err
		c.state = controllerRefuses
		if err.By == HostSide {
			c.state = controllerFinished
		}
	}
}

func (c *Controller) take(msg []byte) *Error {
	k, tid, err := kindOf(msg)
	switch {
	case err != nil:
		return refuse(ControllerSide, IncorrectPayload, "%v", err)
	case c.state == controllerStart && k == Negotiate:
		c.tid = tid
		return c.choose(msg)
	case tid != c.tid:
		return refuse(ControllerSide, IncorrectPayload, "%v of transaction %d, not %d", k, tid, c.tid)
	case c.state == controllerAsked && k == Reply:
		return c.check(msg)
	case k == Failure2 && (c.state == controllerAsked || c.state == controllerProved || c.state == controllerAdmits):
		return &Error{By: HostSide, Reason: decodeFailure(msg)}
	case c.state == controllerProved && k == Success2:
		if len(msg) < headerSize {
			return refuse(ControllerSide, IncorrectPayload, "a Success2 of %d bytes; want %d", len(msg), headerSize)
		}
		c.state = controllerAdmits
		return nil
	}
	return refuse(ControllerSide, IncorrectMessage, "%v", k)
}

// choose chooses from what a Negotiate offers.
func (c *Controller) choose(msg []byte) *Error {
	o, err := decodeOffer(msg)
	switch {
	case err != nil:
		return refuse(ControllerSide, IncorrectPayload, "%v", err)
	case o.channel != 0:
		return refuse(ControllerSide, ChannelMismatch, "RDMA has no secure channel")
	case o.protocol != protocolCHAP:
		return refuse(ControllerSide, ProtocolUnusable, "protocol %d is not DH-HMAC-CHAP", o.protocol)
	}
	var ok bool
	if c.hash, ok = first(c.cfg.Hashes, o.hashes); !ok {
		return refuse(ControllerSide, HashUnusable, "the host offers %v; want %v", o.hashes, c.cfg.Hashes)
	}
	group, ok := first(c.cfg.Groups, o.groups)
	if !ok {
		return refuse(ControllerSide, GroupUnusable, "the host offers %v; want %v", o.groups, c.cfg.Groups)
	}
	c.own = newExchange(group)
	c.challenge, c.sequence = newChallenge(c.hash.Size())
	c.state = controllerChosen
	return nil
}

// check checks the host's response, and computes that of the controller.
func (c *Controller) check(msg []byte) *Error {
	a, err := decodeAnswer(msg, c.hash.Size(), c.own.group.Size())
	if err != nil {
		return refuse(ControllerSide, IncorrectPayload, "%v", err)
	}
	shared, err := c.own.shared(a.public)
	if err != nil {
		return refuse(ControllerSide, IncorrectPayload, "%v", err)
	}
	r := newRun(c.hash, c.tid, shared)
	want := r.response(c.cfg.Key.Bound(c.cfg.HostNQN), c.challenge, c.sequence, hostRole, c.cfg.HostNQN, c.cfg.SubNQN)
	switch {
	case !hmac.Equal(want, a.response):
		return refuse(ControllerSide, Failed, "the host has another host key")
	case a.asks && a.sequence == 0:
		return refuse(ControllerSide, IncorrectPayload, "a challenge without a sequence number")
	case a.asks && c.cfg.ControllerKey == nil:
		return refuse(ControllerSide, Failed, "the host asks for a proof, and there is no controller key for it")
	}
	c.proof = proof{valid: a.asks, response: make([]byte, c.hash.Size())}
	if a.asks {
		c.proof.response = r.response(c.cfg.ControllerKey.Bound(c.cfg.SubNQN), a.challenge, a.sequence, controllerRole, c.cfg.SubNQN, c.cfg.HostNQN)
	}
	c.state = controllerChecked
	return nil
}

// Give returns the message for an Authentication Receive of the host.
func (c *Controller) Give() []byte {
	switch c.state {
	case controllerChosen:
		c.state = controllerAsked
		return question{c.hash, c.own.group, c.sequence, c.challenge, c.own.public}.encode(c.tid)
	case controllerChecked:
		c.state = controllerAdmits
		if c.proof.valid {
			c.state = controllerProved
		}
		return c.proof.encode(c.tid)
	case controllerRefuses:
	default:
		c.err = refuse(ControllerSide, IncorrectMessage, "the host asks for a message out of turn")
	}
	c.state = controllerFinished
	return encodeFailure(Failure1, c.tid, c.err.Reason)
}

// Due returns the kind of the message that comes next, from the host or from Give. After
// the end of a run it is the Negotiate of another one.
func (c *Controller) Due() Kind {
	switch c.state {
	case controllerChosen:
		return Challenge
	case controllerAsked:
		return Reply
	case controllerChecked:
		return Success1
	case controllerProved:
		return Success2
	case controllerRefuses:
		return Failure1
	}
	return Negotiate
}

// Authenticated reports whether the host is authenticated, and is satisfied with the
// controller.
func (c *Controller) Authenticated() bool { return c.state == controllerAdmits }

// Finished reports whether the run has ended: the host is authenticated, or the run has
// failed and both sides know.
func (c *Controller) Finished() bool {
	return c.state == controllerAdmits || c.state == controllerFinished
}

// Err returns why the run has failed, or nil if it has not.
func (c *Controller) Err() *Error { return c.err }

// Method returns the chosen hash and group. They are chosen once Take has taken a
// Negotiate.
func (c *Controller) Method() (Hash, Group) {
	if c.own == nil {
		return NoHash, Null
	}
	return c.hash, c.own.group
}
