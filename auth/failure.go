package auth

import "fmt"

// Reason says why an authentication failed. The value is the reason code explanation of a
// failure message.
type Reason uint8

// Reasons.
const (
	ReasonUnset Reason = iota
	Failed
	ProtocolUnusable
	ChannelMismatch
	HashUnusable
	GroupUnusable
	IncorrectPayload
	IncorrectMessage
)

var reasons = [...]string{
	ReasonUnset: "no reason", Failed: "authentication failed", ProtocolUnusable: "the authentication protocol is not usable",
	ChannelMismatch: "the secure channel does not match", HashUnusable: "the hash is not usable", GroupUnusable: "the Diffie-Hellman group is not usable",
	IncorrectPayload: "a message has an incorrect payload", IncorrectMessage: "a message came out of turn",
}

// String returns the reason in words.
func (r Reason) String() string {
	if int(r) < len(reasons) {
		return reasons[r]
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// Side is a participant.
type Side uint8

// Sides.
const (
	SideUnset Side = iota
	HostSide
	ControllerSide
)

// String returns "host" or "controller".
func (s Side) String() string {
	switch s {
	case HostSide:
		return "host"
	case ControllerSide:
		return "controller"
	}
	return fmt.Sprintf("side %d", uint8(s))
}

// Error is the reason for which one side refused the other.
type Error struct {
	By     Side
	Reason Reason
	Detail string // what that means, or ""
}

func (e *Error) Error() string {
	text := fmt.Sprintf("the %v refuses: %v", e.By, e.Reason)
	if e.Detail != "" {
		text += ": " + e.Detail
	}
	return text
}

// refuse returns the error of the side that refuses.
func refuse(by Side, r Reason, format string, args ...any) *Error {
	return &Error{by, r, fmt.Sprintf(format, args...)}
}
