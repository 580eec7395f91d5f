package exit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"ublk-nvmeof/block"
	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
)

// classify finds the code of an error by the errors in its chain, the most specific
// first. For example, a deadline means Timeout only if the step that it ended says
// nothing more specific.
func classify(err error) Code {
	if errors.As(err, new(*initiator.AuthError)) {
		return NotProved // whatever ended it
	}
	for _, s := range []struct {
		err  error
		code Code
	}{
		{block.ErrNoDriver, NoUblk},
		{block.ErrPermission, Permission},
		{block.ErrTaken, DeviceTaken},
		{block.ErrNoDevice, NotFound},
		{block.ErrBusy, Busy},
		{rdma.ErrNoDevice, NoRDMA},
		{rdma.ErrUnsupported, NoRDMA},
		{initiator.ErrNoQueues, Negotiation},
	} {
		if errors.Is(err, s.err) {
			return s.code
		}
	}
	var (
		reject  *rdma.RejectError
		step    *rdma.StepError
		refused initiator.ConnectStatus
		status  nvme.Status
		answer  *initiator.StepError
		memory  *initiator.MemoryError
	)
	switch {
	case errors.As(err, &memory):
		return NoMemory
	case errors.As(err, &reject):
		return Rejected
	case errors.As(err, &refused):
		return refusal(err, nvme.Status(refused))
	case errors.As(err, &status) && status.Code() == nvme.StatusAuthRequired:
		return NotProved // the target has admitted the host, and does not any more
	case errors.As(err, &status):
		return Negotiation
	case errors.As(err, &step):
		return stepCode(step)
	case isTimeout(err):
		return Timeout
	case errors.Is(err, fs.ErrPermission):
		return Permission
	case errors.As(err, &answer): // the target said something that makes no sense
		return Negotiation
	}
	return Other
}

// refusal distinguishes an unknown subsystem from a host that is not admitted.
func refusal(err error, s nvme.Status) Code {
	switch s.Code() {
	case nvme.StatusConnectInvalidHost:
		return HostNotAllowed
	case nvme.StatusConnectInvalidParam:
		var p initiator.ConnectParam
		switch {
		case !errors.As(err, &p):
		case p.IsSubNQN():
			return UnknownSubsys
		case p.IsHostNQN():
			return HostNotAllowed
		}
	}
	return Negotiation
}

// stepCode classifies the error of a step of the RDMA connection manager. Steps that
// resolve always fail because of an address or a route. Later steps fail because
// somebody does not answer.
func stepCode(e *rdma.StepError) Code {
	switch {
	case strings.HasPrefix(e.Step, "resolve"):
		return Unreachable
	case isTimeout(e.Err):
		return Timeout
	case errors.Is(e.Err, syscall.EHOSTUNREACH), errors.Is(e.Err, syscall.ENETUNREACH):
		return Unreachable
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		return Rejected
	case errors.Is(e.Err, fs.ErrPermission):
		return Permission
	}
	return Other
}

func isTimeout(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) ||
		errors.Is(err, syscall.ETIMEDOUT)
}

// Connecting explains why a host could not connect: first in words for the cause, then
// by the errors of the layers below.
func Connecting(peer, subsystem, host string, err error) *Error {
	code := Of(err)
	var words string
	switch code {
	case NoRDMA:
		words = fmt.Sprintf("no RDMA device leads to %s", peer)
	case Unreachable:
		words = fmt.Sprintf("%s cannot be reached", peer)
	case Rejected:
		words = fmt.Sprintf("%s rejected the connection", peer)
		var r *rdma.RejectError
		if errors.As(err, &r) && r.Reason == rdma.RejectInvalidServiceID || errors.Is(err, syscall.ECONNREFUSED) {
			words = fmt.Sprintf("nobody listens at %s", peer)
		}
	case UnknownSubsys:
		words = fmt.Sprintf("%s has no subsystem %s", peer, subsystem)
	case HostNotAllowed:
		words = fmt.Sprintf("subsystem %s at %s does not admit host %s", subsystem, peer, host)
	case NotProved:
		words = fmt.Sprintf("authentication with subsystem %s at %s failed", subsystem, peer)
		if errors.Is(err, initiator.ErrNoKey) {
			words = fmt.Sprintf("subsystem %s at %s requires authentication of host %s; --dhchap-secret gives its key", subsystem, peer, host)
		}
	case Timeout:
		words = fmt.Sprintf("no answer from %s in time", peer)
	case Negotiation:
		words = fmt.Sprintf("cannot agree with subsystem %s at %s", subsystem, peer)
	default:
		words = fmt.Sprintf("connect to %s at %s", subsystem, peer)
	}
	return Errorf(code, "%s (%v)", words, err)
}
