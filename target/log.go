package target

import "ublk-nvmeof/nvme"

const (
	lspGroupsOnly = 1 << 8  // CDW10 of the ANA log: no namespace ids
	offsetIndex   = 1 << 23 // CDW14: the offset is a number of entries
)

// logPage executes a Get Log Page command.
func (q *queuePair) logPage(i int) {
	c, cmd := q.ctrl, q.command(i)
	lid, length, offset, rae := cmd.LogPage()
	if uint64(q.reqs[i].length) != length {
		q.respond(i, 0, nvme.StatusInvalidSGLDataLength|dnr)
		return
	}
	if offset%4 != 0 || cmd.CDW14()&offsetIndex != 0 {
		q.respond(i, 0, nvme.StatusInvalidField|dnr)
		return
	}
	log := q.log(lid, cmd, offset > 0)
	if log == nil || offset > uint64(len(log)) {
		q.respond(i, 0, nvme.StatusInvalidField|dnr)
		return
	}
	if !rae {
		c.unmask(lid)
	}
	q.reply(i, log[offset:], length)
}

// log returns a whole log page, or nil if it does not exist. A read from the middle
// does not clear the list of changed namespaces.
func (q *queuePair) log(lid uint8, cmd *nvme.Command, middle bool) []byte {
	c, s := q.ctrl, q.ctrl.subsystem
	if s.discovery {
		return q.logOfDiscovery(lid, cmd.LogSpecific())
	}
	switch lid {
	case nvme.LogSupported:
		return supportedLogs(nvme.LogError, nvme.LogSMART, nvme.LogChangedNamespaces, nvme.LogANA)
	case nvme.LogError:
		return c.errors.page()
	case nvme.LogSMART:
		log := make([]byte, nvme.SMARTLogSize)
		q.smart(nvme.SMARTLogAt(log))
		return log
	case nvme.LogChangedNamespaces:
		return c.takeChanged(middle)
	case nvme.LogANA:
		return s.anaLog(q.port, cmd.CDW10()&lspGroupsOnly != 0)
	}
	return nil
}

// logOfDiscovery returns a whole log page of a discovery controller, or nil.
func (q *queuePair) logOfDiscovery(lid, specific uint8) []byte {
	switch lid {
	case nvme.LogSupported:
		log := supportedLogs()
		nvme.PutLogSupport(log, nvme.LogDiscovery, nvme.NewLogSupport(nvme.DiscoveryExtended|nvme.DiscoveryPortOnly))
		return log
	case nvme.LogDiscovery:
		log, err := q.discoveryLog(specific)
		if err != nil {
			q.target.cfg.Log.Error("discovery log", "err", err)
			return nil
		}
		return log
	}
	return nil
}

// supportedLogs returns log page 00h of a controller that has these log pages beside it.
func supportedLogs(lids ...uint8) []byte {
	log := make([]byte, nvme.LogSupportedSize)
	for _, lid := range append(lids, nvme.LogSupported) {
		nvme.PutLogSupport(log, lid, nvme.NewLogSupport(0))
	}
	return log
}

// smart fills in the counts of this controller.
func (q *queuePair) smart(log *nvme.SMARTLog) {
	var reads, writes, read, written uint64
	q.ctrl.mu.Lock()
	for _, io := range q.ctrl.queues {
		reads += io.stats.commands[nvme.OpRead].Load() * uint64(min(io.qid, 1))
		writes += io.stats.commands[nvme.OpWrite].Load() * uint64(min(io.qid, 1))
		read += io.stats.read.Load()
		written += io.stats.written.Load()
	}
	q.ctrl.mu.Unlock()
	const unit = 1000 * 512
	log.SetTemperature(273 + 25)
	log.SetAvailableSpare(100)
	log.SetSpareThreshold(10)
	log.SetDataUnitsRead((read + unit - 1) / unit)
	log.SetDataUnitsWritten((written + unit - 1) / unit)
	log.SetHostReads(reads)
	log.SetHostWrites(writes)
	log.SetErrorLogEntries(q.ctrl.errors.errors())
}
