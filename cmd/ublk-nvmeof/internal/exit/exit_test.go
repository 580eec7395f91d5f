package exit

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"ublk-nvmeof/initiator"
	"ublk-nvmeof/nvme"
	"ublk-nvmeof/rdma"
	"ublk-nvmeof/ublk"
)

var peer = netip.MustParseAddrPort("192.0.2.1:4420")

func atStep(err error) error { return &initiator.StepError{Step: "connect admin queue", Err: err} }

func refused(s nvme.Status, param nvme.ConnectInvalidParam) error {
	return atStep(fmt.Errorf("%w (%w)", initiator.ConnectStatus(s|nvme.StatusDNR), initiator.ConnectParam(param)))
}

func TestCodes(t *testing.T) {
	cm := func(step string, err error) error {
		return atStep(&rdma.StepError{Step: step, Peer: peer, Err: err})
	}
	for _, tt := range []struct {
		name string
		err  error
		want Code
	}{
		{"none", nil, OK},
		{"anything else", errors.New("rain"), Other},
		{"known", fmt.Errorf("a: %w", Errorf(Busy, "b")), Busy},
		{"known wins over what it wraps", errors.Join(Errorf(Busy, "b"), context.DeadlineExceeded), Busy},

		{"no driver", fmt.Errorf("start: %w", ublk.ErrNoDriver), NoUblk},
		{"no permission for ublk", fmt.Errorf("start: %w (%w)", ublk.ErrPermission, syscall.EACCES), Permission},
		{"id taken", fmt.Errorf("start: %w", ublk.ErrIDTaken), DeviceTaken},
		{"device busy", fmt.Errorf("stop: %w", ublk.ErrBusy), Busy},
		{"no device", fmt.Errorf("get: %w", ublk.ErrNoDevice), NotFound},

		{"no RDMA device", fmt.Errorf("verbs: %w", rdma.ErrNoDevice), NoRDMA},
		{"no RDMA device at a step", cm("resolve address", fmt.Errorf("%w (%w)", rdma.ErrNoDevice, syscall.ENODEV)), NoRDMA},
		{"built without", fmt.Errorf("verbs: %w", rdma.ErrUnsupported), NoRDMA},
		{"no route", cm("resolve address", syscall.ENETUNREACH), Unreachable},
		{"neighbour absent", cm("resolve address", syscall.ETIMEDOUT), Unreachable},
		{"resolving takes too long", cm("resolve route", context.DeadlineExceeded), Unreachable},
		{"broadcast address", cm("resolve address", syscall.EACCES), Unreachable},
		{"connect takes too long", cm("connect", context.DeadlineExceeded), Timeout},
		{"connect is not answered", cm("connect", syscall.ETIMEDOUT), Timeout},
		{"host unreachable", cm("connect", syscall.EHOSTUNREACH), Unreachable},
		{"refused by iWARP", cm("connect", syscall.ECONNREFUSED), Rejected},
		{"connect has no permission", cm("open connection to", syscall.EACCES), Permission},
		{"connect fails otherwise", cm("connect", syscall.ENOMEM), Other},
		{"nobody listens", atStep(&rdma.RejectError{Peer: peer, Reason: rdma.RejectInvalidServiceID}), Rejected},
		{"target rejects", atStep(&rdma.RejectError{Peer: peer, Reason: rdma.RejectConsumer}), Rejected},

		{"unknown subsystem", refused(nvme.StatusConnectInvalidParam, nvme.NewConnectInvalidParam(256, true)), UnknownSubsys},
		{"host name refused", refused(nvme.StatusConnectInvalidParam, nvme.NewConnectInvalidParam(512, true)), HostNotAllowed},
		{"queue size refused", refused(nvme.StatusConnectInvalidParam, nvme.NewConnectInvalidParam(44, false)), Negotiation},
		{"offset in the command, not the data", refused(nvme.StatusConnectInvalidParam, nvme.NewConnectInvalidParam(256, false)), Negotiation},
		{"parameter without a place", atStep(initiator.ConnectStatus(nvme.StatusConnectInvalidParam)), Negotiation},
		{"host not allowed", atStep(initiator.ConnectStatus(nvme.StatusConnectInvalidHost | nvme.StatusDNR)), HostNotAllowed},
		{"no controller left", atStep(initiator.ConnectStatus(nvme.StatusConnectControllerBusy)), Negotiation},
		{"no queues", atStep(initiator.ErrNoQueues), Negotiation},
		{"nonsense of the target", atStep(errors.New("controller id 5, connected to 6")), Negotiation},
		{"identify refused", atStep(nvme.StatusInvalidField), Negotiation},

		{"no key", atStep(&initiator.AuthError{Err: initiator.ErrNoKey}), NotProved},
		{"silent while it authenticates", atStep(&initiator.AuthError{Err: context.DeadlineExceeded}), NotProved},
		{"lost while it authenticates", atStep(&initiator.AuthError{Err: rdma.ErrNoDevice}), NotProved},
		{"not admitted after all", atStep(nvme.StatusAuthRequired | nvme.StatusDNR), NotProved},
		{"deadline", atStep(context.DeadlineExceeded), Timeout},
		{"file deadline", os.ErrDeadlineExceeded, Timeout},
		{"permission", &os.PathError{Op: "mkdir", Path: "/run/x", Err: syscall.EACCES}, Permission},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Of(tt.err); got != tt.want {
				t.Errorf("%v: code %d (%v), want %d (%v)", tt.err, got, got, tt.want, tt.want)
			}
		})
	}
}

func TestConnecting(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{refused(nvme.StatusConnectInvalidParam, nvme.NewConnectInvalidParam(256, true)),
			"A has no subsystem S (connect admin queue: target refused: 182h: "},
		{refused(nvme.StatusConnectInvalidHost, 0), "subsystem S at A does not admit host H ("},
		{atStep(&rdma.RejectError{Peer: peer, Reason: 8}), "nobody listens at A ("},
		{atStep(&rdma.RejectError{Peer: peer, Reason: 28}), "A rejected the connection ("},
		{atStep(context.DeadlineExceeded), "no answer from A in time ("},
		{atStep(&initiator.AuthError{Err: initiator.ErrNoKey}), "subsystem S at A requires authentication of host H; --dhchap-secret gives its key ("},
		{atStep(&initiator.AuthError{Err: errors.New("rain")}), "authentication with subsystem S at A failed ("},
		{errors.Join(errors.New("rain"), errors.New("wind")), "connect to S at A (rain; wind)"},
	} {
		got := Connecting("A", "S", "H", tt.err)
		if !strings.HasPrefix(got.Error(), tt.want) || strings.Contains(got.Error(), "\n") {
			t.Errorf("%v: %q, want one line that begins with %q", tt.err, got, tt.want)
		}
	}
}

// Every code has a meaning, and the table has a line for each.
func TestTable(t *testing.T) {
	lines := strings.Split(Table(), "\n")
	if len(lines) != nCodes {
		t.Fatalf("%d lines for %d codes:\n%s", len(lines), nCodes, Table())
	}
	for c, line := range lines {
		if meanings[c] == "" || !strings.Contains(line, meanings[c]) || !strings.HasPrefix(strings.TrimSpace(line), fmt.Sprint(c)) {
			t.Errorf("code %d: line %q, meaning %q", c, line, meanings[c])
		}
	}
}

func TestFrom(t *testing.T) {
	if From(nil) != nil {
		t.Error("From(nil) is an error")
	}
	e := From(fmt.Errorf("outer: %w", Errorf(Rejected, "inner %d", 1)))
	if e.Code != Rejected || e.Error() != "outer: inner 1" {
		t.Errorf("%+v", e)
	}
	if e := From(errors.Join(errors.New("a"), ublk.ErrBusy)); e.Code != Busy || strings.Contains(e.Error(), "\n") {
		t.Errorf("%+v", e)
	}
}
