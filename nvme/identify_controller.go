package nvme

// Controller types in [IdentifyController.CNTRLTYPE].
const (
	ControllerTypeIO        = 1
	ControllerTypeDiscovery = 2
	ControllerTypeAdmin     = 3
)

// Bits of [IdentifyController.CMIC].
const (
	CMICMultiPort       = 1 << 0
	CMICMultiController = 1 << 1
	CMICSRIOV           = 1 << 2
	CMICANA             = 1 << 3
)

// Bits of [IdentifyController.CTRATT].
const (
	CTRATTHostID128 = 1 << 0
	// CTRATTTBKAS means that traffic counts as keep alive.
	CTRATTTBKAS = 1 << 6
	CTRATTELBAS = 1 << 15
	CTRATTMEM   = 1 << 16 // MDTS leaves metadata out
	CTRATTFDP   = 1 << 19
)

// Bits of [IdentifyController.OACS].
const (
	OACSSecurity            = 1 << 0
	OACSFormat              = 1 << 1
	OACSFirmware            = 1 << 2
	OACSNamespaceManagement = 1 << 3
	OACSSelfTest            = 1 << 4
	OACSDirectives          = 1 << 5
)

// Bits of [IdentifyController.LPA].
const (
	LPASMARTPerNamespace = 1 << 0
	LPACommandEffects    = 1 << 1
	// LPAExtended means that Get Log Page supports offsets and 32 bit lengths.
	LPAExtended = 1 << 2
)

// Bits of [IdentifyController.ANACAP].
const (
	ANACAPOptimized      = 1 << 0
	ANACAPNonOptimized   = 1 << 1
	ANACAPInaccessible   = 1 << 2
	ANACAPPersistentLoss = 1 << 3
	ANACAPChange         = 1 << 4
	ANACAPFixedGroup     = 1 << 6 // ANAGRPID does not change while attached
	ANACAPGroupID        = 1 << 7 // Namespace Management takes an ANAGRPID
)

// Bits of [IdentifyController.ONCS].
const (
	ONCSCompare            = 1 << 0
	ONCSWriteUncorrectable = 1 << 1
	ONCSDSM                = 1 << 2
	ONCSWriteZeroes        = 1 << 3
	ONCSSaveFeatures       = 1 << 4
	ONCSReservations       = 1 << 5
	ONCSTimestamp          = 1 << 6
	ONCSVerify             = 1 << 7
	ONCSCopy               = 1 << 8
)

// Bits of [IdentifyController.VWC].
const (
	VWCPresent = 1 << 0
	// VWCFlushAllMask covers the bits that describe a Flush with NSIDAll: 2 means
	// that it is refused, and 3 that it flushes all namespaces.
	VWCFlushAllMask = 3 << 1
)

// Bits of [IdentifyController.SGLS].
const (
	SGLSSupportMask = 3 // 0 none, 1 any alignment, 2 dword alignment
	SGLSKeyed       = 1 << 2
	// SGLSOffset means that in-capsule data at an offset are supported (SAOS).
	SGLSOffset = 1 << 20
)

// FCATTRStatic in [IdentifyController.FCATTR] means that controllers keep their ids
// across associations.
const FCATTRStatic = 1 << 0

// OFCSDisconnect in [IdentifyController.OFCS] means that I/O queues can be deleted
// individually.
const OFCSDisconnect = 1 << 0

// IdentifyController is Identify CNS 01h (Base, "Identify Controller Data Structure").
// Text fields come from the controller. They are returned without padding, and must be
// made printable before they are sent to a terminal.
type IdentifyController [IdentifySize]byte

// IdentifyControllerAt returns the first 4096 bytes of b, without a copy. It panics if b
// is shorter.
func IdentifyControllerAt(b []byte) *IdentifyController {
	return (*IdentifyController)(b[:IdentifySize:IdentifySize])
}

// MaxTransfer returns the largest data transfer in bytes, given the smallest memory page
// ([Cap.MPSMIN]). Zero means no limit.
func (c *IdentifyController) MaxTransfer(mpsmin uint8) uint64 {
	mdts := c.MDTS()
	if mdts == 0 {
		return 0
	}
	shift := uint(mdts) + 12 + uint(mpsmin&15)
	if shift > 63 {
		return 0 // beyond any transfer
	}
	return 1 << shift
}

// InCapsuleBytes returns the number of bytes of data that fit in an I/O command capsule.
// It is 0 if there is no room for data.
func (c *IdentifyController) InCapsuleBytes() uint64 {
	size := uint64(c.IOCCSZ()) * 16
	if size <= CommandSize {
		return 0
	}
	return size - CommandSize
}

// KeyedDescriptors returns the number of keyed descriptors that an I/O command may have, at least 1:
// MSDBD, as far as a list of so many fits in a capsule. A list is named by its offset, which SGLS must
// allow (SAOS). MSDBD 0 counts as 1, because controllers that do not know the field have it, too.
func (c *IdentifyController) KeyedDescriptors() int {
	if c.SGLS()&SGLSOffset == 0 {
		return 1
	}
	return max(1, int(min(uint64(c.MSDBD()), c.InCapsuleBytes()/SGLSize)))
}

// TBKAS reports whether traffic counts as keep alive.
func (c *IdentifyController) TBKAS() bool { return c.CTRATT()&CTRATTTBKAS != 0 }

// CRDT returns the delay before a retry, in units of 100 ms, for the index in
// [Status.CRD]. It is 0 for index 0 and for an index above 3.
func (c *IdentifyController) CRDT(crd uint8) uint16 {
	switch crd {
	case 1:
		return c.CRDT1()
	case 2:
		return c.CRDT2()
	case 3:
		return c.CRDT3()
	}
	return 0
}

// VID returns the PCI vendor id.
func (c *IdentifyController) VID() uint16 { return le.Uint16(c[0:2]) }

// SetVID sets VID.
func (c *IdentifyController) SetVID(v uint16) { le.PutUint16(c[0:2], v) }

// SSVID returns the PCI subsystem vendor id.
func (c *IdentifyController) SSVID() uint16 { return le.Uint16(c[2:4]) }

// SetSSVID sets SSVID.
func (c *IdentifyController) SetSSVID(v uint16) { le.PutUint16(c[2:4], v) }

// SN returns the serial number, without the padding.
func (c *IdentifyController) SN() string { return text(c[4:24]) }

// SetSN sets SN, at most 20 bytes.
func (c *IdentifyController) SetSN(v string) error { return putText(c[4:24], v) }

// MN returns the model number, without the padding.
func (c *IdentifyController) MN() string { return text(c[24:64]) }

// SetMN sets MN, at most 40 bytes.
func (c *IdentifyController) SetMN(v string) error { return putText(c[24:64], v) }

// FR returns the firmware revision, without the padding.
func (c *IdentifyController) FR() string { return text(c[64:72]) }

// SetFR sets FR, at most 8 bytes.
func (c *IdentifyController) SetFR(v string) error { return putText(c[64:72], v) }

// RAB returns the recommended arbitration burst, 2^n commands.
func (c *IdentifyController) RAB() uint8 { return c[72] }

// SetRAB sets RAB.
func (c *IdentifyController) SetRAB(v uint8) { c[72] = v }

// CMIC returns the CMIC bits: whether the subsystem has several ports or
// controllers, and ANA.
func (c *IdentifyController) CMIC() uint8 { return c[76] }

// SetCMIC sets CMIC.
func (c *IdentifyController) SetCMIC(v uint8) { c[76] = v }

// MDTS returns the largest data transfer, 2^n units of the smallest memory page
// ([Cap.MPSMIN]); 0 means no limit. See [IdentifyController.MaxTransfer].
func (c *IdentifyController) MDTS() uint8 { return c[77] }

// SetMDTS sets MDTS.
func (c *IdentifyController) SetMDTS(v uint8) { c[77] = v }

// CNTLID returns the controller id.
func (c *IdentifyController) CNTLID() uint16 { return le.Uint16(c[78:80]) }

// SetCNTLID sets CNTLID.
func (c *IdentifyController) SetCNTLID(v uint16) { le.PutUint16(c[78:80], v) }

// VER returns the version that the controller complies with.
func (c *IdentifyController) VER() Version { return Version(le.Uint32(c[80:84])) }

// SetVER sets VER.
func (c *IdentifyController) SetVER(v Version) { le.PutUint32(c[80:84], uint32(v)) }

// RTD3R returns the usual time to resume from runtime D3, in microseconds.
func (c *IdentifyController) RTD3R() uint32 { return le.Uint32(c[84:88]) }

// SetRTD3R sets RTD3R.
func (c *IdentifyController) SetRTD3R(v uint32) { le.PutUint32(c[84:88], v) }

// RTD3E returns the usual time to enter runtime D3, in microseconds; hosts wait this long
// for a shutdown.
func (c *IdentifyController) RTD3E() uint32 { return le.Uint32(c[88:92]) }

// SetRTD3E sets RTD3E.
func (c *IdentifyController) SetRTD3E(v uint32) { le.PutUint32(c[88:92], v) }

// OAES returns the AEN bits of the optional asynchronous events.
func (c *IdentifyController) OAES() uint32 { return le.Uint32(c[92:96]) }

// SetOAES sets OAES.
func (c *IdentifyController) SetOAES(v uint32) { le.PutUint32(c[92:96], v) }

// CTRATT returns the CTRATT bits: controller attributes.
func (c *IdentifyController) CTRATT() uint32 { return le.Uint32(c[96:100]) }

// SetCTRATT sets CTRATT.
func (c *IdentifyController) SetCTRATT(v uint32) { le.PutUint32(c[96:100], v) }

// CNTRLTYPE returns the controller type, a ControllerType constant; 0 before
// version 1.4.
func (c *IdentifyController) CNTRLTYPE() uint8 { return c[111] }

// SetCNTRLTYPE sets CNTRLTYPE.
func (c *IdentifyController) SetCNTRLTYPE(v uint8) { c[111] = v }

// CRDT1 returns the first command retry delay, in units of 100 ms.
func (c *IdentifyController) CRDT1() uint16 { return le.Uint16(c[128:130]) }

// SetCRDT1 sets CRDT1.
func (c *IdentifyController) SetCRDT1(v uint16) { le.PutUint16(c[128:130], v) }

// CRDT2 returns the second command retry delay, in units of 100 ms.
func (c *IdentifyController) CRDT2() uint16 { return le.Uint16(c[130:132]) }

// SetCRDT2 sets CRDT2.
func (c *IdentifyController) SetCRDT2(v uint16) { le.PutUint16(c[130:132], v) }

// CRDT3 returns the third command retry delay, in units of 100 ms.
func (c *IdentifyController) CRDT3() uint16 { return le.Uint16(c[132:134]) }

// SetCRDT3 sets CRDT3.
func (c *IdentifyController) SetCRDT3(v uint16) { le.PutUint16(c[132:134], v) }

// OACS returns the optional admin commands, OACS bits.
func (c *IdentifyController) OACS() uint16 { return le.Uint16(c[256:258]) }

// SetOACS sets OACS.
func (c *IdentifyController) SetOACS(v uint16) { le.PutUint16(c[256:258], v) }

// ACL returns the number of Abort commands that may be outstanding, 0-based.
func (c *IdentifyController) ACL() uint8 { return c[258] }

// SetACL sets ACL.
func (c *IdentifyController) SetACL(v uint8) { c[258] = v }

// AERL returns the number of Asynchronous Event Requests that may be
// outstanding, 0-based.
func (c *IdentifyController) AERL() uint8 { return c[259] }

// SetAERL sets AERL.
func (c *IdentifyController) SetAERL(v uint8) { c[259] = v }

// FRMW returns the firmware update properties.
func (c *IdentifyController) FRMW() uint8 { return c[260] }

// SetFRMW sets FRMW.
func (c *IdentifyController) SetFRMW(v uint8) { c[260] = v }

// LPA returns the LPA bits: attributes of log pages.
func (c *IdentifyController) LPA() uint8 { return c[261] }

// SetLPA sets LPA.
func (c *IdentifyController) SetLPA(v uint8) { c[261] = v }

// ELPE returns the number of error log entries, 0-based.
func (c *IdentifyController) ELPE() uint8 { return c[262] }

// SetELPE sets ELPE.
func (c *IdentifyController) SetELPE(v uint8) { c[262] = v }

// WCTEMP returns the warning composite temperature, in kelvins.
func (c *IdentifyController) WCTEMP() uint16 { return le.Uint16(c[266:268]) }

// SetWCTEMP sets WCTEMP.
func (c *IdentifyController) SetWCTEMP(v uint16) { le.PutUint16(c[266:268], v) }

// CCTEMP returns the critical composite temperature, in kelvins.
func (c *IdentifyController) CCTEMP() uint16 { return le.Uint16(c[268:270]) }

// SetCCTEMP sets CCTEMP.
func (c *IdentifyController) SetCCTEMP(v uint16) { le.PutUint16(c[268:270], v) }

// MTFA returns the longest pause for firmware activation, in units of 100 ms; 0 means
// undefined.
func (c *IdentifyController) MTFA() uint16 { return le.Uint16(c[270:272]) }

// SetMTFA sets MTFA.
func (c *IdentifyController) SetMTFA(v uint16) { le.PutUint16(c[270:272], v) }

// KAS returns the granularity of the keep alive timer, in units of 100 ms; 0 means no
// keep alive.
func (c *IdentifyController) KAS() uint16 { return le.Uint16(c[320:322]) }

// SetKAS sets KAS.
func (c *IdentifyController) SetKAS(v uint16) { le.PutUint16(c[320:322], v) }

// SANICAP returns the sanitize capabilities: bit 0 crypto erase, 1 block erase,
// 2 overwrite.
func (c *IdentifyController) SANICAP() uint32 { return le.Uint32(c[328:332]) }

// SetSANICAP sets SANICAP.
func (c *IdentifyController) SetSANICAP(v uint32) { le.PutUint32(c[328:332], v) }

// ANATT returns the longest time that an ANA group stays in the change state, in seconds.
func (c *IdentifyController) ANATT() uint8 { return c[342] }

// SetANATT sets ANATT.
func (c *IdentifyController) SetANATT(v uint8) { c[342] = v }

// ANACAP returns the ANACAP bits: ANA states that are reported.
func (c *IdentifyController) ANACAP() uint8 { return c[343] }

// SetANACAP sets ANACAP.
func (c *IdentifyController) SetANACAP(v uint8) { c[343] = v }

// ANAGRPMAX returns the largest ANA group id.
func (c *IdentifyController) ANAGRPMAX() uint32 { return le.Uint32(c[344:348]) }

// SetANAGRPMAX sets ANAGRPMAX.
func (c *IdentifyController) SetANAGRPMAX(v uint32) { le.PutUint32(c[344:348], v) }

// NANAGRPID returns the number of ANA groups.
func (c *IdentifyController) NANAGRPID() uint32 { return le.Uint32(c[348:352]) }

// SetNANAGRPID sets NANAGRPID.
func (c *IdentifyController) SetNANAGRPID(v uint32) { le.PutUint32(c[348:352], v) }

// CQT returns the command quiesce time, in milliseconds: the time that a controller may
// take to end all commands after it has lost its host. Zero means that it is not
// reported.
func (c *IdentifyController) CQT() uint16 { return le.Uint16(c[386:388]) }

// SetCQT sets CQT.
func (c *IdentifyController) SetCQT(v uint16) { le.PutUint16(c[386:388], v) }

// SQES returns the submission queue entry sizes, 2^n bytes: required in bits
// 0-3, largest in bits 4-7.
func (c *IdentifyController) SQES() uint8 { return c[512] }

// SetSQES sets SQES.
func (c *IdentifyController) SetSQES(v uint8) { c[512] = v }

// CQES returns the completion queue entry sizes, 2^n bytes: required in bits
// 0-3, largest in bits 4-7.
func (c *IdentifyController) CQES() uint8 { return c[513] }

// SetCQES sets CQES.
func (c *IdentifyController) SetCQES(v uint8) { c[513] = v }

// MAXCMD returns the number of outstanding commands per I/O queue that the controller
// prefers; 0 means that it does not say.
func (c *IdentifyController) MAXCMD() uint16 { return le.Uint16(c[514:516]) }

// SetMAXCMD sets MAXCMD.
func (c *IdentifyController) SetMAXCMD(v uint16) { le.PutUint16(c[514:516], v) }

// NN returns the largest namespace id.
func (c *IdentifyController) NN() uint32 { return le.Uint32(c[516:520]) }

// SetNN sets NN.
func (c *IdentifyController) SetNN(v uint32) { le.PutUint32(c[516:520], v) }

// ONCS returns the ONCS bits: optional I/O commands.
func (c *IdentifyController) ONCS() uint16 { return le.Uint16(c[520:522]) }

// SetONCS sets ONCS.
func (c *IdentifyController) SetONCS(v uint16) { le.PutUint16(c[520:522], v) }

// FUSES returns the fused operations: bit 0 compare and write.
func (c *IdentifyController) FUSES() uint16 { return le.Uint16(c[522:524]) }

// SetFUSES sets FUSES.
func (c *IdentifyController) SetFUSES(v uint16) { le.PutUint16(c[522:524], v) }

// FNA returns the attributes of Format NVM.
func (c *IdentifyController) FNA() uint8 { return c[524] }

// SetFNA sets FNA.
func (c *IdentifyController) SetFNA(v uint8) { c[524] = v }

// VWC returns the VWC bits: volatile write cache.
func (c *IdentifyController) VWC() uint8 { return c[525] }

// SetVWC sets VWC.
func (c *IdentifyController) SetVWC(v uint8) { c[525] = v }

// AWUN returns the atomic write unit, in blocks, 0-based.
func (c *IdentifyController) AWUN() uint16 { return le.Uint16(c[526:528]) }

// SetAWUN sets AWUN.
func (c *IdentifyController) SetAWUN(v uint16) { le.PutUint16(c[526:528], v) }

// AWUPF returns the atomic write unit across power fail, in blocks, 0-based.
func (c *IdentifyController) AWUPF() uint16 { return le.Uint16(c[528:530]) }

// SetAWUPF sets AWUPF.
func (c *IdentifyController) SetAWUPF(v uint16) { le.PutUint16(c[528:530], v) }

// ACWU returns the atomic compare and write unit, in blocks, 0-based.
func (c *IdentifyController) ACWU() uint16 { return le.Uint16(c[532:534]) }

// SetACWU sets ACWU.
func (c *IdentifyController) SetACWU(v uint16) { le.PutUint16(c[532:534], v) }

// SGLS returns the SGLS bits: support of SGLs.
func (c *IdentifyController) SGLS() uint32 { return le.Uint32(c[536:540]) }

// SetSGLS sets SGLS.
func (c *IdentifyController) SetSGLS(v uint32) { le.PutUint32(c[536:540], v) }

// MNAN returns the largest number of allowed namespaces; if it is 0,
// [IdentifyController.NN] is the limit.
func (c *IdentifyController) MNAN() uint32 { return le.Uint32(c[540:544]) }

// SetMNAN sets MNAN.
func (c *IdentifyController) SetMNAN(v uint32) { le.PutUint32(c[540:544], v) }

// SUBNQN returns the NQN of the subsystem, not validated.
func (c *IdentifyController) SUBNQN() string { return cString(c[768:1024]) }

// SetSUBNQN sets SUBNQN. The error is that of [ValidateNQN].
func (c *IdentifyController) SetSUBNQN(v string) error { return putNQN(c[768:1024], v) }

// IOCCSZ returns the size of an I/O command capsule, in units of 16 bytes. See
// [IdentifyController.InCapsuleBytes].
func (c *IdentifyController) IOCCSZ() uint32 { return le.Uint32(c[1792:1796]) }

// SetIOCCSZ sets IOCCSZ.
func (c *IdentifyController) SetIOCCSZ(v uint32) { le.PutUint32(c[1792:1796], v) }

// IORCSZ returns the size of an I/O response capsule, in units of 16 bytes.
func (c *IdentifyController) IORCSZ() uint32 { return le.Uint32(c[1796:1800]) }

// SetIORCSZ sets IORCSZ.
func (c *IdentifyController) SetIORCSZ(v uint32) { le.PutUint32(c[1796:1800], v) }

// ICDOFF returns the offset of in-capsule data from the end of the command, in
// units of 16 bytes; 0 on RDMA.
func (c *IdentifyController) ICDOFF() uint16 { return le.Uint16(c[1800:1802]) }

// SetICDOFF sets ICDOFF.
func (c *IdentifyController) SetICDOFF(v uint16) { le.PutUint16(c[1800:1802], v) }

// FCATTR returns the fabrics controller attributes: bit 0 static controller
// model.
func (c *IdentifyController) FCATTR() uint8 { return c[1802] }

// SetFCATTR sets FCATTR.
func (c *IdentifyController) SetFCATTR(v uint8) { c[1802] = v }

// MSDBD returns the number of SGL data block descriptors per command; 0 means no limit.
func (c *IdentifyController) MSDBD() uint8 { return c[1803] }

// SetMSDBD sets MSDBD.
func (c *IdentifyController) SetMSDBD(v uint8) { c[1803] = v }

// OFCS returns the optional fabrics commands: bit 0 Disconnect.
func (c *IdentifyController) OFCS() uint16 { return le.Uint16(c[1804:1806]) }

// SetOFCS sets OFCS.
func (c *IdentifyController) SetOFCS(v uint16) { le.PutUint16(c[1804:1806], v) }

// DCTYPE returns the kind of discovery controller: 0 not reported, 1 direct, 2 central.
func (c *IdentifyController) DCTYPE() uint8 { return c[1806] }

// SetDCTYPE sets DCTYPE.
func (c *IdentifyController) SetDCTYPE(v uint8) { c[1806] = v }

// IdentifyControllerNVM is Identify CNS 06h for CSINVM (NVM, "I/O Command Set Specific
// Identify Controller Data Structure"): limits of commands that transfer little or no
// data.
type IdentifyControllerNVM [IdentifySize]byte

// IdentifyControllerNVMAt returns the first 4096 bytes of b, without a copy. It panics if
// b is shorter.
func IdentifyControllerNVMAt(b []byte) *IdentifyControllerNVM {
	return (*IdentifyControllerNVM)(b[:IdentifySize:IdentifySize])
}

// VSL returns the largest Verify, 2^n units of the smallest memory page; 0 means no
// limit.
func (c *IdentifyControllerNVM) VSL() uint8 { return c[0] }

// SetVSL sets VSL.
func (c *IdentifyControllerNVM) SetVSL(v uint8) { c[0] = v }

// WZSL returns the largest Write Zeroes, 2^n units of the smallest memory page; 0 means
// no limit.
func (c *IdentifyControllerNVM) WZSL() uint8 { return c[1] }

// SetWZSL sets WZSL.
func (c *IdentifyControllerNVM) SetWZSL(v uint8) { c[1] = v }

// WUSL returns the largest Write Uncorrectable, 2^n units of the smallest memory page; 0
// means no limit.
func (c *IdentifyControllerNVM) WUSL() uint8 { return c[2] }

// SetWUSL sets WUSL.
func (c *IdentifyControllerNVM) SetWUSL(v uint8) { c[2] = v }

// DMRL returns the largest number of ranges of a Dataset Management; 0 means no limit.
func (c *IdentifyControllerNVM) DMRL() uint8 { return c[3] }

// SetDMRL sets DMRL.
func (c *IdentifyControllerNVM) SetDMRL(v uint8) { c[3] = v }

// DMRSL returns the longest range of a Dataset Management, in blocks; 0 means no limit.
func (c *IdentifyControllerNVM) DMRSL() uint32 { return le.Uint32(c[4:8]) }

// SetDMRSL sets DMRSL.
func (c *IdentifyControllerNVM) SetDMRSL(v uint32) { le.PutUint32(c[4:8], v) }

// DMSL returns the largest sum of the ranges of a Dataset Management, in blocks; 0 means
// no limit.
func (c *IdentifyControllerNVM) DMSL() uint64 { return le.Uint64(c[8:16]) }

// SetDMSL sets DMSL.
func (c *IdentifyControllerNVM) SetDMSL(v uint64) { le.PutUint64(c[8:16], v) }
