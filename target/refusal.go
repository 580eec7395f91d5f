package target

import "ublk-nvmeof/nvme"

// refusal is the reason for refusing a Connect command, and the status for the host.
type refusal struct {
	status nvme.Status
	result uint64
	why    string // a key of Target.refusals; there must be few different ones
}

// parameter returns the refusal for a wrong field at an offset of the command or of its
// data.
func parameter(offset uint16, inData bool, why string) *refusal {
	return &refusal{nvme.StatusConnectInvalidParam | dnr, uint64(nvme.NewConnectInvalidParam(offset, inData)), why}
}

// Reasons to refuse a Connect command. The offsets are those of the wrong fields.
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

// paramCNTLID is the offset of the controller id in the data of a Connect command.
const paramCNTLID = 16

// refused counts a connection or a Connect command that was refused.
func (t *Target) refused(why string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refusals[why]++
}
