package target

import (
	"time"

	"ublk-nvmeof/nvme"
)

// invalidParam is a status and what names the field in question.
func invalidParam(offset uint16, inData bool) (uint64, nvme.Status) {
	return uint64(nvme.NewConnectInvalidParam(offset, inData)), nvme.StatusConnectInvalidParam | dnr
}

// Offsets of the fields that a Connect can have wrong.
const (
	paramRecFmt  = 40
	paramQID     = 42
	paramSQSize  = 44
	paramCNTLID  = 16 // in the data, as all below
	paramSubNQN  = 256
	paramHostNQN = 512
)

// connect finishes a Connect, whose data is there.
func (q *queue) connect(i int) {
	result, s := q.join(q.command(i).ConnectParams(), nvme.ConnectDataAt(q.arrived(i)))
	q.respond(i, result, s)
}

// join makes the controller, or adds the queue to it.
func (q *queue) join(p nvme.ConnectParams, data *nvme.ConnectData) (uint64, nvme.Status) {
	if s := nvme.Status(q.target.faults.connect.Load()); !s.OK() {
		return 0, s
	}
	if q.ctrl != nil { // two Connects were under way
		return 0, nvme.StatusCommandSequence | dnr
	}
	if p.RecFmt != 0 {
		return uint64(nvme.NewConnectInvalidParam(paramRecFmt, false)), nvme.StatusConnectIncompatibleFormat | dnr
	}
	if p.QID != q.qid {
		return invalidParam(paramQID, false)
	}
	s := q.target.subsystem(data.SubNQN())
	if s == nil {
		return invalidParam(paramSubNQN, true)
	}
	if nvme.ValidateNQN(data.HostNQN()) != nil {
		return invalidParam(paramHostNQN, true)
	}
	if !s.allows(data.HostNQN()) {
		return uint64(nvme.NewConnectInvalidParam(paramHostNQN, true)), nvme.StatusConnectInvalidHost | dnr
	}
	if p.SQSize == 0 || int(p.SQSize) >= q.depth {
		return invalidParam(paramSQSize, false)
	}
	q.size = p.SQSize + 1
	q.noFlow = p.Attributes&nvme.ConnectDisableSQFlow != 0
	result, status := q.joinController(s, p, data)
	if !status.OK() {
		q.size, q.noFlow = 0, false
	}
	return result, status
}

func (q *queue) joinController(s *Subsystem, p nvme.ConnectParams, data *nvme.ConnectData) (uint64, nvme.Status) {
	var c *controller
	if p.QID == 0 {
		if data.CNTLID() != nvme.CNTLIDDynamic {
			return invalidParam(paramCNTLID, true)
		}
		c = newController(s, data)
		if !q.target.controllers.add(c) {
			return 0, nvme.StatusConnectControllerBusy | dnr
		}
		if !c.join(q) {
			q.target.controllers.remove(c)
			return 0, nvme.StatusCommandSequence | dnr
		}
		kato := time.Duration(p.KATO) * time.Millisecond
		if s.discovery && kato == 0 {
			kato = discoveryTimeout
		}
		c.mu.Lock()
		c.setKeepAlive(kato)
		c.mu.Unlock()
		q.target.cfg.Log.Info("controller created", "controller", c.id, "host", c.hostNQN, "subsystem", s.cfg.NQN)
	} else {
		c = q.target.controllers.find(data.CNTLID(), s.cfg.NQN)
		if c == nil || c.hostNQN != data.HostNQN() || c.hostID != data.HostID() {
			return invalidParam(paramCNTLID, true)
		}
		c.mu.Lock()
		granted := c.granted
		c.mu.Unlock()
		switch {
		case s.discovery || int(p.QID) > granted:
			return invalidParam(paramQID, false)
		case !c.join(q):
			return 0, nvme.StatusCommandSequence | dnr
		}
	}
	q.ctrl = c
	return uint64(nvme.NewConnectResult(c.id, false)), nvme.StatusSuccess
}

// property carries out a Fabrics command on a connected queue.
func (q *queue) property(i int) {
	cmd, c := q.command(i), q.ctrl
	offset, size8, ok := cmd.Property()
	t := cmd.FCType()
	switch {
	case q.qid != 0 || t != nvme.FabricsPropertyGet && t != nvme.FabricsPropertySet:
		q.respond(i, 0, nvme.StatusInvalidOpcode|dnr)
		return
	case q.reqs[i].length != 0:
		q.respond(i, 0, nvme.StatusInvalidSGLDataLength|dnr)
		return
	case !ok || t == nvme.FabricsPropertySet && (size8 || offset != nvme.PropCC):
		q.respond(i, 0, nvme.StatusInvalidField|dnr)
		return
	case t == nvme.FabricsPropertySet:
		q.respond(i, 0, c.configure(nvme.CC(cmd.PropertyValue())))
		return
	}
	if size8 != (offset == nvme.PropCAP) {
		q.respond(i, 0, nvme.StatusInvalidField|dnr)
		return
	}
	c.mu.Lock()
	cc, csts := c.cc, c.csts
	c.mu.Unlock()
	var value uint64
	switch offset {
	case nvme.PropCAP:
		value = uint64(q.target.capabilities())
	case nvme.PropVS:
		value = uint64(version)
	case nvme.PropCC:
		value = uint64(cc)
	case nvme.PropCSTS:
		value = uint64(csts)
	case nvme.PropCRTO:
		value = readyTimeout
	default:
		q.respond(i, 0, nvme.StatusInvalidField|dnr)
		return
	}
	q.respond(i, value, nvme.StatusSuccess)
}

var version = nvme.NewVersion(2, 1, 0)

// readyWithMedia is the bit of CAP which says that CRTO is there.
const readyWithMedia nvme.Cap = 1 << 59

// capabilities is the CAP property.
func (t *Target) capabilities() nvme.Cap {
	return nvme.NewCap(uint16(t.cfg.QueueSize-1), readyTimeout, nvme.CSSNVM|nvme.CSSIOSets) | readyWithMedia
}
