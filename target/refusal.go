package target

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"ublk-nvmeof/nvme"
)

// refusal is the reason for refusing a Connect, and the status for the host.
type refusal struct {
	status nvme.Status
	result uint64
	why    string // one of few, since it is counted by
}

// parameter refuses a Connect for the field at an offset of the command or of its
// data.
func parameter(offset uint16, inData bool, why string) *refusal {
	return &refusal{nvme.StatusConnectInvalidParam | dnr, uint64(nvme.NewConnectInvalidParam(offset, inData)), why}
}

// Reasons to refuse a Connect. Offsets are those of the fields in question.
var (
	refusedFormat     = &refusal{nvme.StatusConnectIncompatibleFormat | dnr, uint64(nvme.NewConnectInvalidParam(40, false)), "unknown record format"}
	refusedQueueID    = parameter(42, false, "wrong queue id")
	refusedQueueSize  = parameter(44, false, "wrong queue size")
	refusedController = parameter(paramCNTLID, true, "unknown controller")
	refusedSubsystem  = parameter(256, true, "unknown subsystem")
	refusedHostNQN    = parameter(512, true, "invalid host NQN")
	refusedHost       = &refusal{nvme.StatusConnectInvalidHost | dnr, uint64(nvme.NewConnectInvalidParam(512, true)), "host not allowed"}
	refusedSequence   = &refusal{nvme.StatusCommandSequence | dnr, 0, "queue exists, or controller is not enabled or ends"}
	refusedIDs        = &refusal{nvme.StatusConnectControllerBusy | dnr, 0, "no controller id is left"}
	refusedMemory     = &refusal{nvme.StatusConnectControllerBusy, 0, "no memory"}
)

// paramCNTLID is the offset of the controller id in the data of a Connect.
const paramCNTLID = 16

// refused counts a connection or a Connect that was refused.
func (t *Target) refused(why string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refusals[why]++
}

// Bounds on what hosts can have logged.
const (
	logBurst    = 50
	logInterval = 200 * time.Millisecond
)

// limited is a log handler for what hosts cause. After a burst it passes one
// record in an interval, which says how many were left out.
type limited struct {
	slog.Handler
	*allowance
}

// allowance is what loggers of one target share.
type allowance struct {
	mu      sync.Mutex
	left    int
	since   time.Time // of left
	omitted int
}

func limitedLog(log *slog.Logger) *slog.Logger {
	return slog.New(limited{log.Handler(), &allowance{left: logBurst}})
}

func (l limited) Handle(ctx context.Context, r slog.Record) error {
	omitted, ok := l.take(r.Time)
	if !ok {
		return nil
	}
	if omitted > 0 {
		r.AddAttrs(slog.Int("omitted_before", omitted))
	}
	return l.Handler.Handle(ctx, r)
}

// take takes one record of the allowance, and says how many had none.
func (a *allowance) take(now time.Time) (omitted int, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if n := int(min(now.Sub(a.since)/logInterval, logBurst)); n > 0 {
		a.left, a.since = min(a.left+n, logBurst), now
	}
	if a.left == 0 {
		a.omitted++
		return 0, false
	}
	a.left--
	omitted, a.omitted = a.omitted, 0
	return omitted, true
}

func (l limited) WithAttrs(attrs []slog.Attr) slog.Handler {
	return limited{l.Handler.WithAttrs(attrs), l.allowance}
}

func (l limited) WithGroup(name string) slog.Handler {
	return limited{l.Handler.WithGroup(name), l.allowance}
}
