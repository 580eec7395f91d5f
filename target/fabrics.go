package target

import (
	"time"

	"ublk-nvmeof/nvme"
)

// connect executes a Connect command whose data has arrived.
func (q *queuePair) connect(i int) {
	data := nvme.ConnectDataAt(q.arrived(i))
	why := q.join(q.command(i).ConnectParams(), data)
	if why == nil && q.grow() != nil {
		q.leave()
		q.ctrl, why = nil, refusedMemory
	}
	if why != nil {
		q.sqSize, q.noFlow = 0, false
		q.target.refused(why.why)
		q.target.log.Warn("Connect refused", "reason", why.why, "qid", q.qid, "address", q.id.RemoteAddr(),
			"host", data.HostNQN(), "subsystem", data.SubNQN(), "controller", data.CNTLID())
		q.respond(i, why.result, why.status)
		return
	}
	q.joined.Store(true)
	q.target.connected(q)
	if q.qid == 0 {
		q.target.log.Info("controller created", "controller", q.ctrl.id, "host", q.ctrl.hostNQN, "subsystem", q.ctrl.subsystem.cfg.NQN)
	}
	q.respond(i, uint64(nvme.NewConnectResult(q.ctrl.id, q.requireAuth())), nvme.StatusSuccess)
}

// join creates the controller of an admin queue, or adds an I/O queue to its
// controller. It returns the reason if the command is refused, and otherwise nil.
func (q *queuePair) join(p nvme.ConnectParams, data *nvme.ConnectData) *refusal {
	if s := nvme.Status(q.target.faults.connect.Load()); !s.OK() {
		return &refusal{status: s, why: "fault"}
	}
	if p.RecFmt != 0 {
		return refusedFormat
	}
	if p.QID != q.qid {
		return refusedQueueID
	}
	s := q.target.subsystem(data.SubNQN())
	if s == nil {
		return refusedSubsystem
	}
	// SPDK's perf sends an empty host NQN. It is accepted where every host may
	// connect.
	if host := data.HostNQN(); (host != "" || !s.cfg.AllowAny) && nvme.ValidateNQN(host) != nil {
		return refusedHostNQN
	}
	if !s.allows(data.HostNQN()) {
		return refusedHost
	}
	if p.SQSize == 0 || int(p.SQSize) >= q.depth {
		return refusedQueueSize
	}
	q.sqSize = p.SQSize + 1
	q.noFlow = p.Attributes&nvme.ConnectDisableSQFlow != 0
	if q.qid == 0 {
		return q.create(s, p, data)
	}
	c := q.target.controllers.find(data.CNTLID(), s.cfg.NQN)
	if c == nil || c.hostNQN != data.HostNQN() || c.hostID != data.HostID() {
		return refusedController
	}
	c.mu.Lock()
	granted := c.granted
	c.mu.Unlock()
	switch {
	case s.discovery || int(p.QID) > granted:
		return refusedQueueID
	case !c.join(q):
		return refusedSequence
	}
	q.ctrl = c
	return nil
}

// create creates the controller of an admin queue.
func (q *queuePair) create(s *Subsystem, p nvme.ConnectParams, data *nvme.ConnectData) *refusal {
	if data.CNTLID() != nvme.CNTLIDDynamic {
		return refusedController
	}
	c := newController(s, q.port, data)
	if !q.target.controllers.add(c) {
		return refusedIDs
	}
	if !c.join(q) {
		q.target.controllers.remove(c)
		return refusedSequence
	}
	kato := time.Duration(p.KATO) * time.Millisecond
	if s.discovery && kato == 0 {
		kato = discoveryTimeout
	}
	c.mu.Lock()
	c.setKeepAlive(kato)
	c.mu.Unlock()
	q.ctrl = c
	return nil
}

// property carries out a Fabrics command on a connected queue.
func (q *queuePair) property(i int) {
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

// readyWithMedia is the bit of CAP that says that CRTO is supported (CRMS, Controller
// Ready With Media Support).
const readyWithMedia nvme.Cap = 1 << 59

// capabilities returns the CAP property.
func (t *Target) capabilities() nvme.Cap {
	return nvme.NewCap(uint16(t.cfg.QueueSize-1), readyTimeout, nvme.CSSNVM|nvme.CSSIOSets) | readyWithMedia
}
