package target

import (
	"errors"
	"math/bits"
	"time"

	"ublk-nvmeof/nvme"
)

// identify executes an Identify command.
func (q *queuePair) identify(i int) {
	cmd, s := q.command(i), q.ctrl.subsystem
	nsid, cns, csi := cmd.NSID(), cmd.CNS(), cmd.IdentifyCSI()
	page := make([]byte, nvme.IdentifySize)
	status := nvme.StatusSuccess
	if s.discovery && cns != nvme.CNSController {
		q.respond(i, 0, nvme.StatusInvalidField|dnr)
		return
	}
	ns := s.namespace(nsid)
	switch {
	case cns == nvme.CNSController:
		if err := q.identifyController(nvme.IdentifyControllerAt(page)); err != nil {
			status = nvme.StatusInternal | dnr
		}
	case cns == nvme.CNSNamespace:
		if nsid == nvme.NSIDAll || nsid == 0 {
			status = nvme.StatusInvalidNamespace | dnr
		} else if ns != nil { // otherwise the page is all zeroes
			ns.identify(nvme.IdentifyNamespaceAt(page))
		}
	case cns == nvme.CNSActiveNSList, cns == nvme.CNSActiveNSListCSI && csi == nvme.CSINVM:
		if nsid >= nvme.NSIDAll-1 {
			status = nvme.StatusInvalidNamespace | dnr
			break
		}
		nvme.ActiveNSListAt(page).Set(s.active(nsid))
	case cns == nvme.CNSControllerCSI && csi == nvme.CSINVM: // all zeroes: MDTS is the only limit
	case cns == nvme.CNSCommandSets:
		page[0] = 1 << nvme.CSINVM // the first combination, and the only one
	case cns == nvme.CNSNamespaceDescriptors, cns == nvme.CNSNSIndependent, cns == nvme.CNSNamespaceCSI && csi == nvme.CSINVM:
		if ns == nil {
			status = nvme.StatusInvalidNamespace | dnr
			break
		}
		switch cns {
		case nvme.CNSNamespaceDescriptors:
			ids := nvme.NamespaceIDs{UUID: ns.cfg.UUID, NGUID: ns.cfg.NGUID, EUI64: ns.cfg.EUI64, CSI: nvme.CSINVM, HasCSI: true}
			copy(page, ids.AppendTo(nil))
		case nvme.CNSNSIndependent:
			ns.identifyIndependent(nvme.IdentifyNSIndependentAt(page))
		}
	default:
		status = nvme.StatusInvalidField | dnr
	}
	if !status.OK() {
		q.respond(i, 0, status)
		return
	}
	q.reply(i, page, nvme.IdentifySize)
}

// identifyController fills in Identify Controller. It fails if a text is too long,
// which the checks of the configuration exclude.
func (q *queuePair) identifyController(id *nvme.IdentifyController) error {
	c, s, cfg := q.ctrl, q.ctrl.subsystem, &q.target.cfg
	err := errors.Join(id.SetSN(s.cfg.Serial), id.SetMN(s.cfg.Model), id.SetFR(firmware), id.SetSUBNQN(s.cfg.NQN))
	id.SetMDTS(uint8(bits.TrailingZeros(uint(cfg.MaxTransfer / pageSize))))
	id.SetCNTLID(c.id)
	id.SetVER(version)
	id.SetKAS(keepAliveUnit)
	id.SetAERL(aerLimit - 1)
	id.SetLPA(nvme.LPAExtended)
	id.SetMAXCMD(uint16(cfg.QueueSize))
	id.SetSGLS(1 | nvme.SGLSKeyed) // any alignment
	if cfg.InCapsule > 0 && !s.discovery {
		id.SetSGLS(1 | nvme.SGLSKeyed | nvme.SGLSOffset)
	}
	id.SetIORCSZ(nvme.CompletionSize / 16)
	id.SetMSDBD(1)
	if s.discovery {
		id.SetCNTRLTYPE(nvme.ControllerTypeDiscovery)
		id.SetOAES(nvme.AENDiscoveryChange)
		id.SetIOCCSZ(nvme.CommandSize / 16)
		return err
	}
	id.SetCNTRLTYPE(nvme.ControllerTypeIO)
	id.SetCMIC(nvme.CMICMultiPort | nvme.CMICMultiController | nvme.CMICANA)
	id.SetOAES(nvme.AENNamespaceAttribute | nvme.AENANAChange)
	id.SetCTRATT(nvme.CTRATTHostID128)
	if !cfg.CommandKeepAlive {
		id.SetCTRATT(nvme.CTRATTHostID128 | nvme.CTRATTTBKAS)
	}
	id.SetCQT(uint16(cfg.QuiesceTime / time.Millisecond))
	for i, set := range []func(uint16){id.SetCRDT1, id.SetCRDT2, id.SetCRDT3} {
		set(uint16(cfg.RetryDelays[i] / (100 * time.Millisecond)))
	}
	id.SetACL(3)
	id.SetELPE(errorEntries - 1)
	id.SetANATT(uint8(cfg.ANATransition / time.Second))
	id.SetANACAP(nvme.ANACAPOptimized | nvme.ANACAPNonOptimized | nvme.ANACAPInaccessible | nvme.ANACAPPersistentLoss | nvme.ANACAPChange)
	id.SetANAGRPMAX(MaxANAGroups)
	id.SetNANAGRPID(MaxANAGroups)
	id.SetSQES(0x66)
	id.SetCQES(0x44)
	id.SetNN(MaxNamespaces)
	id.SetMNAN(MaxNamespaces)
	id.SetONCS(nvme.ONCSCompare | nvme.ONCSDSM | nvme.ONCSWriteZeroes | nvme.ONCSReservations)
	if !cfg.NoWriteCache {
		id.SetVWC(nvme.VWCPresent)
	}
	id[nwpc] = 1 // the states "no write protect" and "write protect"
	id.SetIOCCSZ(uint32(nvme.CommandSize+cfg.InCapsule) / 16)
	id.SetMSDBD(uint8(cfg.MaxDescriptors))
	return err
}

// nwpc is the offset of the write protection capabilities in Identify Controller.
const nwpc = 531

const (
	nsShared         = 1      // NMIC
	nsWriteProtected = 1      // NSATTR
	nsReady          = 1      // NSTAT
	deacZeroes       = 1 << 3 // DLFEAT: Write Zeroes may deallocate
)

func (n *Namespace) identify(id *nvme.IdentifyNamespace) {
	blocks := n.blocks.Load()
	id.SetNSZE(blocks)
	id.SetNCAP(blocks)
	id.SetNUSE(blocks)
	id.SetNMIC(nsShared)
	id.SetRESCAP(reservationTypes)
	id.SetDLFEAT(nvme.DLFEATZeroes | deacZeroes)
	id.SetANAGRPID(n.group.Load())
	id.SetNGUID(n.cfg.NGUID)
	id.SetEUI64(n.cfg.EUI64)
	id.SetLBAFormat(0, nvme.LBAFormat{LBADS: n.shift})
	if n.readOnly.Load() {
		id.SetNSATTR(nsWriteProtected)
	}
}

func (n *Namespace) identifyIndependent(id *nvme.IdentifyNSIndependent) {
	id.SetNMIC(nsShared)
	id.SetRESCAP(reservationTypes)
	id.SetANAGRPID(n.group.Load())
	id.SetNSTAT(nsReady)
	if n.readOnly.Load() {
		id.SetNSATTR(nsWriteProtected)
	}
}
