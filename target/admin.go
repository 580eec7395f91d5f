package target

import (
	"time"

	"ublk-nvmeof/nvme"
)

// admin executes an admin command. No supported admin command has data from the host.
func (q *queuePair) admin(i int) {
	cmd := q.command(i)
	op := cmd.Opcode()
	if q.ctrl.subsystem.discovery {
		switch op {
		case nvme.AdminIdentify, nvme.AdminGetLogPage, nvme.AdminSetFeatures, nvme.AdminGetFeatures, nvme.AdminAsyncEvent, nvme.AdminKeepAlive:
		default:
			q.respond(i, 0, nvme.StatusInvalidOpcode|dnr)
			return
		}
	}
	switch op {
	case nvme.AdminIdentify:
		q.identify(i)
		return
	case nvme.AdminGetLogPage:
		q.logPage(i)
		return
	case nvme.AdminGetFeatures:
		q.getFeature(i)
		return
	}
	if q.reqs[i].length != 0 {
		q.respond(i, 0, nvme.StatusInvalidSGLDataLength|dnr)
		return
	}
	switch op {
	case nvme.AdminSetFeatures:
		result, s := q.setFeature(cmd)
		q.respond(i, uint64(result), s)
	case nvme.AdminAsyncEvent:
		if !q.ctrl.request(cmd.CID()) {
			q.respond(i, 0, nvme.StatusAsyncEventLimitExceeded|dnr)
			return
		}
		q.drop(i) // sendEvents completes it
	case nvme.AdminKeepAlive:
		q.respond(i, 0, nvme.StatusSuccess)
	case nvme.AdminAbort:
		q.respond(i, 1, nvme.StatusSuccess) // bit 0: not aborted
	default:
		q.respond(i, 0, nvme.StatusInvalidOpcode|dnr)
	}
}

// Values of the write protection feature.
const (
	writeProtectNone = 0
	writeProtect     = 1
)

func (q *queuePair) setFeature(cmd *nvme.Command) (uint32, nvme.Status) {
	c, value := q.ctrl, cmd.CDW11()
	switch fid := cmd.FeatureID(); {
	case fid == nvme.FeatureAsyncEvent:
		able := uint32(nvme.AENNamespaceAttribute | nvme.AENANAChange)
		if c.subsystem.discovery {
			able = nvme.AENDiscoveryChange
		}
		if value&^able != 0 {
			return 0, nvme.StatusInvalidField | dnr
		}
		c.mu.Lock()
		c.enabled = value
		c.mu.Unlock()
	case fid == nvme.FeatureKeepAlive:
		c.mu.Lock()
		c.setKeepAlive(time.Duration(value) * time.Millisecond)
		c.mu.Unlock()
		return value, nvme.StatusSuccess
	case c.subsystem.discovery:
		return 0, nvme.StatusInvalidField | dnr
	case fid == nvme.FeatureNumberOfQueues:
		return q.grantQueues(value)
	case fid == nvme.FeatureVolatileWriteCache:
		return 0, q.setWriteCache(value&1 == 1)
	case fid == nvme.FeatureHostID:
		return 0, nvme.StatusCommandSequence | dnr // Connect set it
	case fid == nvme.FeatureWriteProtect:
		return 0, q.protect(cmd)
	default:
		return 0, nvme.StatusInvalidField | dnr
	}
	return 0, nvme.StatusSuccess
}

// grantQueues returns the number of I/O queues that the controller grants, as the
// result of the command. Like nvmet, it grants the same number whatever the host asks
// for.
func (q *queuePair) grantQueues(asked uint32) (uint32, nvme.Status) {
	if asked&0xFFFF == 0xFFFF || asked>>16 == 0xFFFF {
		return 0, nvme.StatusInvalidField | dnr
	}
	n := int(q.ctrl.subsystem.maxQueues.Load())
	switch grant := q.target.faults.grant.Load(); {
	case grant < 0:
		return 0, nvme.StatusInternal
	case grant > 0:
		n = int(grant)
	}
	q.ctrl.mu.Lock()
	q.ctrl.granted = n
	q.ctrl.mu.Unlock()
	return nvme.NumberOfQueues(n), nvme.StatusSuccess
}

// setWriteCache turns the volatile write cache on or off. When it turns the cache off,
// it makes the data in the cache durable.
func (q *queuePair) setWriteCache(on bool) nvme.Status {
	if q.target.cfg.NoWriteCache {
		return nvme.StatusInvalidField | dnr
	}
	q.ctrl.cacheOff.Store(!on)
	if on {
		return nvme.StatusSuccess
	}
	return storeStatus(q.ctrl.subsystem.flush())
}

func (q *queuePair) protect(cmd *nvme.Command) nvme.Status {
	q.access.Add(1)
	defer q.exit()
	ns := q.ctrl.subsystem.namespace(cmd.NSID())
	if ns == nil {
		return nvme.StatusInvalidNamespace | dnr
	}
	switch cmd.CDW11() & 7 {
	case writeProtectNone:
		if ns.cfg.ReadOnly { // hosts cannot change this
			return nvme.StatusFeatureNotChangeable | dnr
		}
		ns.SetReadOnly(false)
	case writeProtect:
		if err := ns.cfg.Store.Flush(); err != nil {
			return storeStatus(err)
		}
		ns.SetReadOnly(true)
	default:
		return nvme.StatusFeatureNotChangeable | dnr
	}
	return nvme.StatusSuccess
}

func (q *queuePair) getFeature(i int) {
	c, cmd := q.ctrl, q.command(i)
	fid := cmd.FeatureID()
	if fid == nvme.FeatureHostID && !c.subsystem.discovery {
		if cmd.CDW11()&1 == 0 { // the host asks for the 64-bit form
			q.respond(i, 0, nvme.StatusInvalidField|dnr)
			return
		}
		q.reply(i, c.hostID[:], uint64(len(c.hostID)))
		return
	}
	if q.reqs[i].length != 0 {
		q.respond(i, 0, nvme.StatusInvalidSGLDataLength|dnr)
		return
	}
	value, s := uint32(0), nvme.StatusSuccess
	c.mu.Lock()
	enabled, kato, granted := c.enabled, c.kato, c.granted
	c.mu.Unlock()
	switch {
	case fid == nvme.FeatureAsyncEvent:
		value = enabled
	case fid == nvme.FeatureKeepAlive:
		value = uint32(kato / time.Millisecond)
	case c.subsystem.discovery:
		s = nvme.StatusInvalidField | dnr
	case fid == nvme.FeatureNumberOfQueues:
		value = nvme.NumberOfQueues(granted)
	case fid == nvme.FeatureVolatileWriteCache && q.target.cfg.NoWriteCache:
		s = nvme.StatusInvalidField | dnr
	case fid == nvme.FeatureVolatileWriteCache:
		if !c.cacheOff.Load() {
			value = 1
		}
	case fid == nvme.FeatureWriteProtect:
		if ns := c.subsystem.namespace(cmd.NSID()); ns == nil {
			s = nvme.StatusInvalidNamespace | dnr
		} else if ns.readOnly.Load() {
			value = writeProtect
		}
	default:
		s = nvme.StatusInvalidField | dnr
	}
	q.respond(i, uint64(value), s)
}
